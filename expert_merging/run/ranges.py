"""What the constants that scripts share may be, looked at before anything else is done with them."""

import math
from types import SimpleNamespace
from typing import Any

from expert_merging.core.errors import UserError, at_least

SEEDS = 2**32  # numpy takes no more


def check(c: SimpleNamespace) -> None:
    """Raises UserError for the first of the shared constants that no run can take, and of those that several scripts have
    under one name: seeds, current_case_name, rates, the constants of merging methods."""
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
    for name in ("length_penalty", "lam", "ties_lam", "iso_lam", "tsv_lam"):
        if not math.isfinite(getattr(c, name, 0)):
            raise UserError(f"{name} is {getattr(c, name)}; it must be a number")
    for name in [name for name in vars(c) if name.endswith("_lr")]:
        if not 0 <= getattr(c, name) < math.inf:
            raise UserError(f"{name} is {getattr(c, name)}; a rate is 0 or more")
    if not 0 < getattr(c, "ties_keep", 1) <= 1:
        raise UserError(f"ties_keep is {c.ties_keep}; it is the share that is kept, above 0 and up to 1")
    if not 0 <= getattr(c, "dare_drop", 0) < 1:
        raise UserError(f"dare_drop is {c.dare_drop}; it is the share that is dropped, from 0 to below 1")
    if not 0 <= getattr(c, "prune_ratio", 0) <= 1:
        raise UserError(f"prune_ratio is {c.prune_ratio}; it is the share that is dropped, from 0 to 1")
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
