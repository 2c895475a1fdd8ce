"""Causal mixtures of experts (Mixtral, Qwen2-MoE, OLMoE) under the names that training/families.py asks of a family.

Input and target stand in one sequence, and there is one stack. What tells these families apart are a few lines of names,
in merging/moe_layouts.py.
"""

from types import SimpleNamespace
from typing import Any

from expert_merging.causal.decoding import evaluate_task
from expert_merging.causal.losses import layer_states, task_loss, teacher_forced, token_loss
from expert_merging.causal.merging import CALIBRATIONS, MERGINGS, STACKS, merge
from expert_merging.causal.models import load_model
from expert_merging.causal.sequences import join
from expert_merging.core.errors import UserError
from expert_merging.data import features
from expert_merging.merging.moe_caem import check_chosen
from expert_merging.merging.moe_layouts import layout_of
from expert_merging.run.deviations import DEVIATIONS, deviates
from expert_merging.switch.idle_experts import pass_over_idle

__all__ = [
    "CALIBRATIONS", "KNOWN_BY", "MERGINGS", "STACKS", "check_constants", "check_tokenizer", "collate", "count_usage",
    "evaluate_task", "experts_of", "layer_states", "load_model", "merge", "pass_over_idle", "read_usage", "reset_usage",
    "task_loss", "teacher_forced", "token_loss",
]  # fmt: skip

KNOWN_BY = ("config", "usage")
_OF_SWITCH = ("counts", "projection", "padding")  # deviations that there are only in the released code's model


def check_constants(c: SimpleNamespace, config) -> None:
    """Raises UserError for a reading that is one of Switch Transformers', and where the model has too few positions, or would
    have fewer experts than it sends each token to."""
    if wrong := [what for what in _OF_SWITCH if deviates(c.reading, what)]:
        raise UserError(
            f"reading {c.reading} is of Switch Transformers ({DEVIATIONS[wrong[0]]}); for {config.model_type} there is paper"
        )
    asked = c.max_input_length + c.max_decoder_length
    if asked > config.max_position_embeddings:
        raise UserError(
            f"max_input_length {c.max_input_length} and max_decoder_length {c.max_decoder_length} are more than the "
            f"{config.max_position_embeddings} positions of the model"
        )
    if hasattr(c, "target_experts_num"):
        check_chosen(config.to_dict(), c.target_experts_num, "target_experts_num")


def check_tokenizer(tokenizer) -> None:
    """Raises UserError for one that closes every text: its features are made as for an encoder, the input an ended text."""
    if features.frame(tokenizer)[1] == [tokenizer.eos_token_id]:
        raise UserError(
            f"the tokenizer ends every text with {tokenizer.eos_token}, where the answer is to follow; save it with "
            "add_eos_token false, and make the features again"
        )


def experts_of(config) -> int:
    """Experts in each sparse layer."""
    return getattr(config, layout_of(config.to_dict()).number)


def count_usage(model, c: SimpleNamespace) -> None:
    """From here on evaluation counts the choices of all real tokens that the model reads: inputs, and what is written."""
    model.routers.counting = True


def reset_usage(model) -> None:
    """Begin to count anew."""
    model.routers.reset()


def read_usage(model, accelerator) -> dict[str, list[list[int]]]:
    """{"decoder": [sparse layer][expert] choices} counted since the last reset, over all processes."""
    counts = model.routers.counts().to(accelerator.device)
    return {STACKS[0]: accelerator.reduce(counts, "sum").tolist()}


def collate(rows: list[dict[str, Any]], pad_token_id: int, c: SimpleNamespace) -> dict[str, Any]:
    """A batch for `token_loss`; see `join`."""
    return join(rows, pad_token_id)
