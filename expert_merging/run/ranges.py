"""What the constants that scripts share may be, looked at before anything else is done with them."""

import math
from typing import Any

from expert_merging.core.errors import UserError

SEEDS = 2**32  # numpy takes no more
_FROM_1 = (
    "max_input_length", "max_decoder_length", "batch_size", "gradient_accumulation_steps", "num_epochs", "num_beams",
    "eval_batch_size",
)  # fmt: skip
_FROM_0 = (
    "train_examples", "train_sample", "validation_examples", "test_examples", "no_repeat_ngram_size", "weight_decay",
    "max_grad_norm", "checkpoint_minutes",
)  # fmt: skip
_ABOVE_0 = ("lr", "adam_eps", "repetition_penalty")


def check(values: dict[str, Any]) -> None:
    """Raises UserError for the first of the shared constants among `values` that no run can take."""
    for names, fits, said in (
        (_FROM_1, lambda x: x >= 1, "it must be 1 or more"),
        (_FROM_0, lambda x: x >= 0, "it must be 0 or more"),
        (_ABOVE_0, lambda x: x > 0, "it must be above 0"),
        (("length_penalty",), lambda x: True, "it must be a number"),
        (("adam_betas",), lambda x: 0 <= x < 1, "its numbers must be from 0 to below 1"),
        (("seed", "seeds"), lambda x: 0 <= x < SEEDS, f"a seed is from 0 to {SEEDS - 1}"),
    ):
        for name in names:
            value = values.get(name, ())
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(number) and fits(number) for number in numbers):
                raise UserError(f"{name} is {_shown(value)}; {said}")
    if len(values.get("adam_betas", (0, 0))) != 2:
        raise UserError(f"adam_betas is {_shown(values['adam_betas'])}; it must be two numbers")
    tasks = values.get("task_types", ())
    if twice := [task for task in tasks if tasks.count(task) > 1]:
        raise UserError(f"task_types has {twice[0]} twice")
    name = values.get("current_case_name", "run")
    if not name or "/" in name or name.startswith("."):
        raise UserError(
            f"current_case_name is {name!r}; it names files: give a word without / that does not begin with a dot"
        )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
