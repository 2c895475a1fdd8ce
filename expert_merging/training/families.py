"""Families of mixtures of experts, of which each has a module that does what is particular to it.

A model's family follows from the model_type of its configuration: nothing else asks which kind of model it has in hand.
"""

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol, cast

from expert_merging.core.errors import UserError
from expert_merging.core.hub import first_line, local_folder
from expert_merging.data.docstring_reader import corpus_hash

ROOMS = {"switch_transformers": "switch", "mixtral": "causal", "qwen2_moe": "causal", "olmoe": "causal"}


class Family(Protocol):
    """What a family's module (`expert_merging/{room}/family.py`) has. Models are as `load_model` gives them, unwrapped."""

    STACKS: tuple[str, ...]  # for which usage is counted, and experts are shared out
    MERGINGS: tuple[str, ...]  # values of the constant `merging`
    CALIBRATIONS: tuple[str, ...]  # values of the constant `calibration` beside none
    KNOWN_BY: tuple[str, ...]  # what identities note of models beside their weights: config, usage

    def check_constants(self, c: SimpleNamespace, config) -> None:
        """Raises UserError where constants ask for what there is not in this family, or a model has no room for."""

    def check_tokenizer(self, tokenizer) -> None:
        """Raises UserError for a tokenizer by which features would not be what this family reads."""

    def load_model(self, path: str | Path, constant: str):
        """The model in a local folder or on the hub, in float32. Raises UserError where there is none, or not whole."""

    def experts_of(self, config) -> int:
        """Experts in each sparse layer, by a configuration."""
        ...

    def count_usage(self, model, c: SimpleNamespace) -> None:
        """From here on evaluation counts how often each expert is chosen."""

    def reset_usage(self, model) -> None:
        """Begin to count anew."""

    def read_usage(self, model, accelerator) -> dict[str, list[list[int]]]:
        """{stack: [sparse layer][expert]} since then, over all processes."""
        ...

    def collate(self, rows: list[dict[str, Any]], pad_token_id: int, c: SimpleNamespace) -> dict[str, Any]:
        """A batch for `token_loss` of examples with input_ids and labels."""
        ...

    def token_loss(self, wrapped, model, batch, step, reading: str) -> Any:
        """What a batch adds to its task's loss in a step."""

    def pass_over_idle(self, model, optimizer) -> None:
        """Let the steps of `optimizer` leave experts without a token as they are."""

    def evaluate_task(
        self, model, dataset, task: ModuleType, tokenizer, constants: SimpleNamespace, accelerator, label: str = ""
    ) -> tuple[dict[str, float], list[str]]:
        """(scores, predictions) on features of a task."""
        ...

    def task_loss(self, model, dataset, tokenizer, constants: SimpleNamespace, accelerator) -> float:
        """Mean cross-entropy in nats a target token."""
        ...

    def teacher_forced(self, dataset, tokenizer, constants: SimpleNamespace) -> Iterator[dict[str, Any]]:
        """Batches for `layer_states`, every row once."""
        ...

    def layer_states(self, model, batch: dict[str, Any]) -> dict[str, tuple[Sequence[Any], Any]]:
        """{stack: (states after each block [batch, tokens, width], which of the tokens are real)}, the targets given."""
        ...

    def merge(
        self, c: SimpleNamespace, sources: Sequence[Any], by: list[dict[str, list[float]]] | None, device
    ) -> tuple[dict[str, Any], Iterator[tuple[str, Any]], Any]:
        """(record, tensors, configuration) of the merged model."""
        ...

    def calibrate(
        self, c: SimpleNamespace, sources: Sequence[Any], folder: Path, record: dict[str, Any], device
    ) -> dict[str, Any]:
        """Fit the routers of the merged model in `folder`; {layer: how near each came}. Only where there are CALIBRATIONS."""
        ...


def family_of(config) -> Family:
    """The family of a configuration, or of a model by its configuration. Raises UserError where there is none."""
    kind = getattr(config, "config", config).model_type
    if kind not in ROOMS:
        raise UserError(f"model_type is {kind}; there are {', '.join(ROOMS)}")
    return cast(Family, importlib.import_module(f"expert_merging.{ROOMS[kind]}.family"))


def load_model(path: str | Path, constant: str):
    """The model in a local folder or on the hub, in float32. `constant` named the path.

    Raises UserError where there is none, it is cut short, or of a family that is not known.
    """
    return family_of(SimpleNamespace(model_type=_model_type(str(path), constant))).load_model(path, constant)


def load_base(c: SimpleNamespace, experts: int):
    """(model, ancestor): the pre-trained model, with `experts` experts a sparse layer.

    `ancestor` is the SHA-256 of its weights and `config_lines`, by which models that may be merged know each other.
    Raises UserError where there is no such model, it has another number of experts, or constants do not go with it.
    """
    from expert_merging.switch.models import weights_sha256

    path = c.BASE_MODEL_PATH.format(experts=experts)
    model = load_model(path, "BASE_MODEL_PATH")
    _check_experts(path, model.config, experts)
    family_of(model).check_constants(c, model.config)
    ancestor, lines = weights_sha256(model), config_lines(model.config)
    return model, corpus_hash([ancestor, lines]) if lines else ancestor


def check_base(c: SimpleNamespace, experts: int) -> None:
    """What load_base says of a base that is missing or has another number of experts, by its configuration alone."""
    from expert_merging.switch.models import find_base

    find_base(c, experts)
    from transformers import AutoConfig

    path = c.BASE_MODEL_PATH.format(experts=experts)
    _model_type(path, "BASE_MODEL_PATH")
    _check_experts(path, AutoConfig.from_pretrained(path), experts)


def _check_experts(path: str, config, experts: int) -> None:
    if (there := family_of(config).experts_of(config)) != experts:
        raise UserError(f"BASE_MODEL_PATH: {path} has {there} experts a sparse layer, not {experts}")


def config_lines(config) -> dict[str, Any]:
    """The lines of a configuration that say what the model computes with its weights (experts a token is sent to, say), where
    identities of its family note them; else none: Switch Transformers are known by their weights, as in all their records."""
    from expert_merging.merging.model_folders import SAYS_NOTHING

    if "config" not in family_of(config).KNOWN_BY:
        return {}
    lines = config.to_diff_dict()
    return {name: lines[name] for name in sorted(lines) if name not in SAYS_NOTHING and not name.startswith("_")}


def _model_type(path: str, constant: str) -> str:
    """By config.json; a folder or hub name where there is none is left to the reader of Switch models to name."""
    from transformers import PretrainedConfig

    folder = local_folder(path, constant)
    try:
        if folder:
            return json.loads((folder / "config.json").read_text())["model_type"]
        return PretrainedConfig.get_config_dict(path)[0]["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        where = f"a whole model in the folder {path}" if folder else f"the folder {path}, nor that model on the hub"
        raise UserError(f"{constant}: did not find {where} ({first_line(error)}); bring the model's folder") from error
