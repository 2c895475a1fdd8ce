"""What the constants that scripts share may be, looked at before anything else is done with them."""

import math
from types import SimpleNamespace
from typing import Any

from expert_merging.core.errors import UserError, at_least

SEEDS = 2**32  # numpy takes no more


def check(c: SimpleNamespace) -> None:
    """Raises UserError for the first of the shared constants that no run can take, and of those that several scripts have
    under one name: seeds, current_case_name."""
    at_least(
        c, 1, "max_input_length", "max_decoder_length", "batch_size", "gradient_accumulation_steps", "num_epochs", "num_beams",
        "eval_batch_size",
    )  # fmt: skip
    at_least(
        c, 0, "train_examples", "train_sample", "validation_examples", "test_examples", "no_repeat_ngram_size",
        "weight_decay", "max_grad_norm", "checkpoint_minutes",
    )  # fmt: skip
    for name in ("lr", "adam_eps", "repetition_penalty"):
        if not 0 < getattr(c, name) < math.inf:
            raise UserError(f"{name} is {getattr(c, name)}; it must be above 0")
    if not math.isfinite(c.length_penalty):
        raise UserError(f"length_penalty is {c.length_penalty}; it must be a number")
    if not all(0 <= beta < 1 for beta in c.adam_betas):
        raise UserError(f"adam_betas is {_shown(c.adam_betas)}; its numbers must be from 0 to below 1")
    if len(c.adam_betas) != 2:
        raise UserError(f"adam_betas is {_shown(c.adam_betas)}; it must be two numbers")
    for name, seeds in (("seed", (c.seed,)), ("seeds", getattr(c, "seeds", ()))):
        if not all(0 <= seed < SEEDS for seed in seeds):
            raise UserError(f"{name} is {_shown(seeds)}; a seed is from 0 to {SEEDS - 1}")
    if twice := [task for task in c.task_types if c.task_types.count(task) > 1]:
        raise UserError(f"task_types has {twice[0]} twice")
    case = getattr(c, "current_case_name", "run")
    if not case or "/" in case or case.startswith("."):
        raise UserError(
            f"current_case_name is {case!r}; it names files: give a word without / that does not begin with a dot"
        )


def _shown(values: tuple[Any, ...]) -> str:
    return " ".join(map(str, values))
