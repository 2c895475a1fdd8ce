"""WEMoE models on disk: the routers alone, or all that is not the pre-trained model's.

Both know the models they belong to by the hash of their weights, and refuse others.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from expert_merging.core.errors import UserError
from expert_merging.core.files import new_folder, read_json, replacing, write_json
from expert_merging.wemoe.ffn import ensembles, put_layers, routers, state_sha256
from expert_merging.wemoe.vectors import SparseVectors

SAME = ("depth", "share_router", "layers", "base_sha256", "experts_sha256")  # what routers depend on


def save_routers(model: nn.Module, path: Path) -> None:
    """Write the routers of an up-scaled model, and lambda, prune ratio, depth and the hashes of theta_0 and theta_i."""
    tensors = {f"{i}.{n}": p.detach().cpu() for i, r in enumerate(routers(model)) for n, p in r.named_parameters()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"wemoe": json.dumps(model.wemoe)})


def load_routers(model: nn.Module, path: Path) -> None:
    """Put routers that `save_routers` wrote into an up-scaled model.

    Raises UserError when the file is none of those, or its models, depth, layers or sharing are not this model's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["wemoe"])
        tensors = load_file(path)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} holds no routers of WEMoE; adapt the model again") from error
    for name in SAME:
        if record[name] != model.wemoe[name]:
            raise UserError(f"{path} belongs to another model: its {name} differ; adapt this one")
    with torch.no_grad():
        for number, router in enumerate(routers(model)):
            for name, parameter in router.named_parameters():
                parameter.copy_(tensors[f"{number}.{name}"])


def save(model: nn.Module, folder: Path) -> dict[str, int]:
    """Write what an up-scaled model adds to the pre-trained one: other.safetensors, the tensors outside its feed-forward
    layers; task_vectors.safetensors; routers.safetensors; wemoe.json.

    Sparse task vectors are written as a bit an element and the values of those that are not zero.

    Returns the bytes of each file.
    """
    inside = tuple(f"{name}." for name, _ in ensembles(model))
    other, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside) and tensor.data_ptr() not in seen:  # tied tensors once
            other[name] = tensor.detach().cpu().contiguous()
            seen.add(tensor.data_ptr())
    with new_folder(folder) as temporary:
        save_file(other, temporary / "other.safetensors")
        del other
        save_file(dict(_packed(model)), temporary / "task_vectors.safetensors")
        save_routers(model, temporary / "routers.safetensors")
        write_json(temporary / "wemoe.json", model.wemoe)
    return {path.name: path.stat().st_size for path in sorted(Path(folder).iterdir())}


def _packed(model: nn.Module):
    for ffn, layer in ensembles(model):
        for name, vectors in zip(layer.names, layer.vectors, strict=True):
            if not isinstance(vectors, SparseVectors):
                yield f"{ffn}.{name}", vectors.values.detach().cpu().contiguous()
                continue
            dense = vectors.rows(0, vectors.shape[0]).cpu()
            yield f"{ffn}.{name}:bits", torch.from_numpy(np.packbits(dense.ne(0).numpy()))
            yield f"{ffn}.{name}:values", dense[dense.ne(0)]


def load(model: nn.Module, folder: Path) -> nn.Module:
    """The up-scaled model that `save` wrote, out of the pre-trained `model`, which stays as it is.

    Raises UserError when the folder is none of those or was made from another pre-trained model.
    """
    folder = Path(folder)
    record = read_json(folder / "wemoe.json")
    base = model.state_dict()
    if state_sha256(base) != record["base_sha256"]:
        raise UserError(f"{folder} was made from another pre-trained model than the one given")
    try:
        other, packed = load_file(folder / "other.safetensors"), load_file(folder / "task_vectors.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged ({error}); write it again") from error
    made = copy.deepcopy(model).requires_grad_(False)
    made.wemoe = record

    def task_vectors(name: str, number: int) -> dict[str, torch.Tensor]:
        return {n: _unpacked(packed, f"{name}.{n}", p, number) for n, p in model.get_submodule(name).named_parameters()}

    put_layers(made, task_vectors)
    state = made.state_dict()
    for name, tensor in other.items():
        state[name].copy_(tensor)
    load_routers(made, folder / "routers.safetensors")
    return made


def _unpacked(packed: Mapping[str, torch.Tensor], name: str, like: torch.Tensor, number: int) -> torch.Tensor:
    """Task vector `number` of the tensor `name`, dense."""
    if name in packed:
        return packed[name][number].view_as(like).to(like.device)
    bits = np.unpackbits(packed[f"{name}:bits"].numpy(), bitorder="big").astype(bool)
    size, values = like.numel(), packed[f"{name}:values"]
    before, here = bits[: number * size].sum(), torch.from_numpy(bits[number * size : (number + 1) * size])
    dense = values.new_zeros(size)
    dense[here] = values[before : before + int(here.sum())]
    return dense.view_as(like).to(like.device)
