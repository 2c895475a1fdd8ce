"""Models and histories that the released code left, brought into this repository's form."""

import pickle
import statistics
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.caem import merged_config

from expert_merging.core.errors import UserError
from expert_merging.core.hub import first_line

PREFIX = "STmodel."  # before each name in the released files
_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
_UNRELATED = 1.0  # relative distance of a matrix to that of its ancestor; of unrelated matrices about the root of 2
# NumPy's numbers, as np.mean leaves them in the released histories; nothing else is made from a pickle.
_NUMBERS = {
    (module, name)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
    for name in ("scalar", "dtype")
}


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a released .pt file, under Hugging Face's names. Runs no code of the file.

    Raises UserError where it is absent, damaged, or holds anything but tensors under the prefix `STmodel.`.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}; name the folder in which the released code left it by --released_folder")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is no whole file of weights ({first_line(error)}); bring it again") from error
    tensors = state if isinstance(state, dict) else {}
    odd = [name for name, found in tensors.items() if not (str(name).startswith(PREFIX) and torch.is_tensor(found))]
    if odd or not tensors:
        found = f"has {odd[0]}" if odd else "holds no tensors"
        raise UserError(f"{path} {found}; the released code's files hold tensors whose names begin with {PREFIX}")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def build_model(path: Path, state: dict[str, torch.Tensor], base):
    """The model whose weights are `state`, in the shape of the pre-trained model `base`.

    Where the file has a projection or embeddings of their own, as the released merging leaves them, so has the model.
    (Their own class would tie them again on loading, to the doubled projection.) Raises UserError where it does not fit.
    """
    wanted = base.state_dict()
    missing = sorted(wanted.keys() - state.keys() - (set(_EMBEDDINGS) if "shared.weight" in state else set()))
    if unknown := sorted(state.keys() - wanted.keys()):
        raise UserError(f"{path} has {unknown[0]}, which the pre-trained model has not; name its BASE_MODEL_PATH")
    if missing:
        raise UserError(f"{path} has no {missing[0]}, which the pre-trained model has; name its BASE_MODEL_PATH")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, in the pre-trained model {tuple(wanted[name].shape)}"
            raise UserError(f"{path}: {name} is {shapes}; name its BASE_MODEL_PATH")
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: {name} has numbers that are not finite; nothing can be made of it")
    shared = state["shared.weight"]
    tied = all(torch.equal(state.get(name, shared), shared) for name in _EMBEDDINGS)
    config = merged_config(base.config, base.config.num_experts, "paper" if tied else "released")
    model = SwitchTransformersForConditionalGeneration(config)
    model.load_state_dict({name: state.get(name, shared).float() for name in wanted})
    model.set_usage_counting(None)
    return model


def kinship(path: Path, state: dict[str, torch.Tensor], base) -> dict[str, Any]:
    """How near the weights are to those of the pre-trained model they are said to come from, as far as this can be seen:
    {"untouched": tensors equal to the last bit (experts that no token reached), "tensors": of how many, "distance": median
    over the matrices but for experts and routers of |a - b| / |b|}.

    Raises UserError where they are as far apart as unrelated ones.
    """
    distances, untouched = [], 0
    for name, ours in base.state_dict().items():
        if name in state:
            theirs = state[name].float()
            untouched += torch.equal(theirs, ours)
            if theirs.dim() > 1 and ".experts." not in name and ".router." not in name and name not in _EMBEDDINGS:
                distances.append(float((theirs - ours).norm() / ours.norm().clamp(min=1e-12)))
    found = {"untouched": untouched, "tensors": len(state), "distance": round(statistics.median(distances), 4)}
    if untouched == 0 and found["distance"] > _UNRELATED:
        raise UserError(
            f"{path} does not come from BASE_MODEL_PATH: no tensor is the same, and the median distance is "
            f"{found['distance']} of a matrix's size; name the pre-trained model that it was fine-tuned from"
        )
    return found


class _Numbers(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NUMBERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_history(path: Path) -> Any:
    """What a released .pkl holds, in plain numbers, lists and dictionaries; None where there is none. Runs no code of the
    file. Raises UserError where it is damaged, or holds anything else."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            return _plain(_Numbers(file).load())
    except Exception as error:  # what a damaged pickle raises can be anything
        raise UserError(f"{path} is no history of the released code ({first_line(error)}); bring it again") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    return float(value)
