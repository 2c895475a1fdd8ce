"""Switch Transformers from and to disk."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder, replacing
from expert_merging.core.hub import first_line, load_tokenizer, local_folder, offline_if_unreachable
from expert_merging.data.tasks import get_task


def preflight(constants: SimpleNamespace, tasks: Iterable[str], experts: int | None = None) -> dict[str, Any]:
    """What can be found wrong before anything slow, transformers too, is imported; returns {name: task}.

    Args:
        experts: of the pre-trained model, where the script reads one.

    Raises UserError for an unknown task, without the patch, and where BASE_MODEL_PATH is a folder that does not exist.
    """
    found = {task: get_task(task) for task in tasks}
    require_patch()
    if experts is not None:
        find_base(constants, experts)
    return found


def require_patch() -> None:
    """Raises UserError, naming the command that applies the patch, when transformers is not patched with the very files of
    caem_files/, or with those of an older checkout."""
    from caem_files import install

    if found := install.problem():
        raise UserError(found)


def find_base(constants: SimpleNamespace, experts: int) -> None:
    """Look for the pre-trained model. To be called before transformers is imported, which decides then whether to try the
    hub. Raises UserError where BASE_MODEL_PATH is a folder that does not exist."""
    if local_folder(constants.BASE_MODEL_PATH.format(experts=experts), "BASE_MODEL_PATH") is None:
        offline_if_unreachable()


def base_tokenizer(constants: SimpleNamespace, experts: int):
    """The tokenizer of the pre-trained model. Raises UserError where there is none."""
    return load_tokenizer(constants.BASE_MODEL_PATH.format(experts=experts))


def load_model(path: str | Path, constant: str):
    """The SwitchTransformersForConditionalGeneration in a local folder or on the hub, in float32.

    Raises UserError where there is none, it is cut short, or it is another kind of model. `constant` named the path.
    """
    folder = local_folder(str(path), constant)
    import torch
    from safetensors import SafetensorError
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"] if folder else "switch_transformers"
        if kind != "switch_transformers":
            raise UserError(f"{constant}: {path} holds a {kind} model, not a Switch Transformer")
        config = SwitchTransformersConfig.from_pretrained(folder or path)
        model = SwitchTransformersForConditionalGeneration.from_pretrained(
            folder or path, config=config, torch_dtype=torch.float32
        )
        model.set_usage_counting(None)  # until it is asked for: it costs a product per sparse layer
        return model
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        where = f"a whole model in the folder {path}" if folder else f"the folder {path}, nor that model on the hub"
        raise UserError(f"{constant}: did not find {where} ({first_line(error)}); bring the model's folder") from error


def weights_sha256(model) -> str:
    """SHA-256 over names, shapes and bytes of all weights, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def save_model(model, tokenizer, folder: Path) -> None:
    """Write a Hugging Face folder: weights, configuration and tokenizer; whole or not at all."""
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def save_state_dict(model, path: Path) -> None:
    """Write the weights as the released code does: a pickled state dict with the prefix `STmodel.` before each name."""
    import torch

    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
    ):  # given a name, torch would write that into the file
        torch.save({f"STmodel.{name}": tensor for name, tensor in model.state_dict().items()}, file)
