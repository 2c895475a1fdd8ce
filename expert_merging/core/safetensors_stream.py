"""A model folder written a tensor at a time: the files' headers come first, so that no tensor waits for the others.

`write_tensors` of safetensors_folder.py holds a shard before it writes it; this must know what will come, and holds nothing.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import torch

from expert_merging.core.safetensors_folder import Kind, shard_names, write_index

SHARD_BYTES = 5_000_000_000  # the most a file holds, unless one tensor is larger
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def size(kind: Kind) -> int:
    """Bytes of a tensor. Raises KeyError for a dtype that is not in DTYPES."""
    return torch.Size(kind.shape).numel() * DTYPES[kind.dtype].itemsize


def shards(kinds: Mapping[str, Kind], most: int) -> list[dict[str, Kind]]:
    """The tensors in order, shared out among files of at most `most` bytes, or of one tensor."""
    files: list[dict[str, Kind]] = [{}]
    held = 0
    for name, kind in kinds.items():
        if files[-1] and held + size(kind) > most:
            files.append({})
            held = 0
        files[-1][name], held = kind, held + size(kind)
    return files


def write_stream(tensors: Iterable[tuple[str, torch.Tensor]], kinds: Mapping[str, Kind], folder: Path) -> None:
    """Write (name, tensor) pairs, in any order, as model.safetensors, or above SHARD_BYTES as shards and their index.

    Args:
        tensors: those of `kinds`, each once.
        kinds: what each will be.

    Raises ValueError where a tensor is not what `kinds` says, or one of them has not come.
    """
    files = shards(kinds, SHARD_BYTES)
    names = shard_names(len(files))
    left = dict(kinds)
    with ExitStack() as stack:
        places: dict[str, tuple[IO[bytes], int]] = {}
        for file_name, held in zip(names, files, strict=True):
            file = stack.enter_context(open(folder / file_name, "wb"))
            header, offsets = _header(held)
            file.write(header)
            places |= {name: (file, len(header) + offset) for name, offset in offsets.items()}
        for name, tensor in tensors:
            if left.pop(name, None) != Kind(_NAMES[tensor.dtype], tuple(tensor.shape)):
                raise ValueError(f"{name} came as {tensor.dtype} {tuple(tensor.shape)}, which was not what was to come")
            place, offset = places[name]
            place.seek(offset)
            place.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if left:
        raise ValueError(f"{next(iter(left))} did not come")
    if len(files) > 1:
        weight_map = {name: file_name for file_name, held in zip(names, files, strict=True) for name in held}
        write_index(folder, sum(map(size, kinds.values())), weight_map)


def _header(held: Mapping[str, Kind]) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes (the header's length, the header in JSON), and where behind them each tensor begins.

    The widest dtypes come first, so that every tensor begins at a multiple of its entries' width.
    """
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offsets, begin = {}, 0
    for name in sorted(held, key=lambda name: -DTYPES[held[name].dtype].itemsize):
        end = begin + size(held[name])
        entries[name] = {"dtype": held[name].dtype, "shape": held[name].shape, "data_offsets": [begin, end]}
        offsets[name], begin = begin, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


_NAMES = {dtype: name for name, dtype in DTYPES.items()}
