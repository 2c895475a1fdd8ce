"""A model folder as a mapping from names to tensors, each read from disk when it is asked for."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from expert_merging.errors import UserError
from expert_merging.files import read_json, sha256


class SafetensorsFolder(Mapping[str, torch.Tensor]):
    """The weights of a Hugging Face folder (model.safetensors, or shards and their index).

    Raises UserError when the folder has none, or a file is cut short. Close it, or use it in a `with` block.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index, whole = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if not index.exists() and not whole.exists():
            raise UserError(f"{folder} holds no model.safetensors; train that model first, or bring its folder")
        self.files = (
            [self.folder / n for n in sorted(set(read_json(index)["weight_map"].values()))]
            if index.exists()
            else [whole]
        )
        self._open, self._file_of = ExitStack(), {}
        for path in self.files:
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} is cut short or damaged ({error}); train that model again") from error
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(self, *error) -> None:
        self._open.close()

    def sha256(self) -> list[str]:
        """SHA-256 of each file."""
        return [sha256(path) for path in self.files]
