"""A model folder as a mapping from names to tensors, each read from disk when it is asked for; and written as they come."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json, sha256, write_json

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 500_000_000  # what is held before it is written


class Kind(NamedTuple):
    """A tensor's dtype, as safetensors names it ("F32", "BF16"), and its shape."""

    dtype: str
    shape: tuple[int, ...]


class SafetensorsFolder(Mapping[str, torch.Tensor]):
    """The weights of a Hugging Face folder (model.safetensors, or shards and their index).

    Every access maps its file anew, so that nothing stays in memory but the tensors in use.

    Raises UserError when the folder has none, or a file is cut short.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index, whole = self.folder / INDEX, self.folder / "model.safetensors"
        if not index.exists() and not whole.exists():
            raise UserError(f"{folder} holds no model.safetensors; train that model first, or bring its folder")
        self.files = (
            [self.folder / n for n in sorted(set(read_json(index)["weight_map"].values()))]
            if index.exists()
            else [whole]
        )
        self._file_of: dict[str, Path] = {}
        for path in self.files:
            try:
                with safe_open(path, framework="pt") as file:
                    self._file_of |= dict.fromkeys(file.keys(), path)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} is cut short or damaged ({error}); train that model again") from error

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def kinds(self) -> dict[str, "Kind"]:
        """What each tensor is, from the files' headers: no tensor is read."""
        found: dict[str, Kind] = {}
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                found |= {name: Kind(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
        return found

    def sha256(self) -> list[str]:
        """SHA-256 of each file."""
        return [sha256(path) for path in self.files]


def write_tensors(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write (name, tensor) pairs as they come: model.safetensors, or, above SHARD_BYTES, shards and their index.

    Names in a row with the same tensor are tied; the file holds it once, under the first.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    places: dict[str, int] = {}
    held = total = 0
    previous = None

    def part(number: int) -> Path:
        return folder / f"part-{number}.safetensors"

    for name, tensor in tensors:
        if tensor is previous:
            continue
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and held + size > SHARD_BYTES:
            save_file(shards[-1], part(len(shards) - 1), metadata={"format": "pt"})
            shards[-1] = {}
            shards.append({})
            held = 0
        shards[-1][name], places[name], previous = tensor, len(shards) - 1, tensor
        held, total = held + size, total + size
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    save_file(shards[-1], part(len(shards) - 1), metadata={"format": "pt"})
    names = shard_names(len(shards))
    for number, name in enumerate(names):
        part(number).rename(folder / name)
    write_index(folder, total, {name: names[place] for name, place in places.items()})


def shard_names(number: int) -> list[str]:
    """Hugging Face's names for a model's files: model.safetensors alone, or with its place among the others."""
    if number == 1:
        return ["model.safetensors"]
    return [f"model-{one:05}-of-{number:05}.safetensors" for one in range(1, number + 1)]


def write_index(folder: Path, total: int, weight_map: dict[str, str]) -> None:
    """The index of a folder of shards: `total` bytes of tensors, and the file of each."""
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
