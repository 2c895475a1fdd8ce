"""Switch Transformers under the names that training/families.py asks of a family."""

from types import SimpleNamespace
from typing import Any

from expert_merging.data import features
from expert_merging.run.deviations import of_method
from expert_merging.switch.cross_entropy import layer_states, task_loss, teacher_forced, token_loss
from expert_merging.switch.decoding import evaluate_task
from expert_merging.switch.idle_experts import pass_over_idle
from expert_merging.switch.merging import CALIBRATIONS, MERGINGS, calibrate, merge
from expert_merging.switch.models import load_model
from expert_merging.switch.usage import STACKS, read_usage

__all__ = [
    "CALIBRATIONS", "KNOWN_BY", "MERGINGS", "STACKS", "calibrate", "check_constants", "check_tokenizer", "collate",
    "count_usage", "evaluate_task", "experts_of", "layer_states", "load_model", "merge", "pass_over_idle", "read_usage",
    "reset_usage", "task_loss", "teacher_forced", "token_loss",
]  # fmt: skip

KNOWN_BY = ()  # more would make the records that there are those of other runs


def check_constants(c: SimpleNamespace, config) -> None:
    """Everything that the constants can say is known of this family."""


def check_tokenizer(tokenizer) -> None:
    """Features are made as any tokenizer of such a model has it."""


def experts_of(config) -> int:
    """Experts in each sparse layer."""
    return config.num_experts


def count_usage(model, c: SimpleNamespace) -> None:
    """From here on evaluation counts the tokens that each expert gets, as the reading counts."""
    model.set_usage_counting(of_method(c.reading, "counts"))


def reset_usage(model) -> None:
    """Begin to count anew."""
    model.reset_expert_usage()


def collate(rows: list[dict[str, Any]], pad_token_id: int, c: SimpleNamespace) -> dict[str, Any]:
    """A batch for `token_loss`; see features.collate."""
    return features.collate(rows, pad_token_id, *features.padded_lengths(c, "padding"))
