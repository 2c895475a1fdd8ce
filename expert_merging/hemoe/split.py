"""A split: which neurons of every FFN go to which expert, and what is known about how good that is."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from expert_merging.core.errors import UserError
from expert_merging.core.files import replacing, write_atomic
from expert_merging.core.part_files import read_part_file


@dataclass
class Split:
    """The neurons of n experts in each of L layers, out of N neurons a layer.

    `experts[l][e]` is the ascending array of neurons of expert e in the model's layer `layers[l]` (0-based). In a
    partition every neuron has one expert; MoEBERT's splits repeat some neurons and leave others out. Where a solver made
    it, `serves` [L, n, D] says which expert serves which domain, and objective, bound, gap, seconds [L] and status
    (L words) what was found: "optimal" (proved, to a gap of 1e-6) or "bounded"; gap is (bound - objective) / objective.
    Without a solver these are NaN and "heuristic".
    """

    method: str
    neurons: int
    layers: tuple[int, ...]
    experts: list[list[np.ndarray]]
    serves: np.ndarray | None = None
    domains: tuple[str, ...] = ()
    objective: np.ndarray | None = None
    bound: np.ndarray | None = None
    gap: np.ndarray | None = None
    seconds: np.ndarray | None = None
    status: tuple[str, ...] = ()
    seed: int = 0
    settings: dict = field(default_factory=dict)  # what it was made with; JSON values

    def __post_init__(self):
        self.layers = tuple(int(layer) for layer in self.layers)
        self.experts = [[np.asarray(i, dtype=np.int64) for i in layer] for layer in self.experts]
        if len(self.layers) != len(self.experts) or len({len(layer) for layer in self.experts}) != 1:
            raise ValueError("a split needs as many lists of experts as layers, and as many experts in each")
        for layer in self.experts:
            for indices in layer:
                if len(indices) and (indices[0] < 0 or indices[-1] >= self.neurons or (np.diff(indices) <= 0).any()):
                    raise ValueError(f"an expert's neurons must ascend within 0..{self.neurons - 1}")
        for name in ("objective", "bound", "gap", "seconds"):
            values = getattr(self, name)
            filled = np.full(len(self.layers), np.nan) if values is None else np.asarray(values, dtype=np.float64)
            setattr(self, name, filled)
        self.status = tuple(self.status) or ("heuristic",) * len(self.layers)

    @property
    def expert_count(self) -> int:
        return len(self.experts[0])

    @property
    def sizes(self) -> np.ndarray:
        """Neurons of each expert, int [L, n]."""
        return np.array([[len(indices) for indices in layer] for layer in self.experts])

    @property
    def labels(self) -> np.ndarray:
        """The expert of each neuron, int16 [L, N]. Raises ValueError where neurons are repeated or left out."""
        if not self.is_partition():
            raise ValueError(f"{self.method} repeats neurons or leaves some out: it has no labels")
        labels = np.empty((len(self.layers), self.neurons), dtype=np.int16)
        for row, layer in zip(labels, self.experts, strict=True):
            for expert, indices in enumerate(layer):
                row[indices] = expert
        return labels

    def is_partition(self) -> bool:
        """Whether every neuron of every layer is in exactly one expert."""
        return all((self._times(layer) == 1).all() for layer in self.experts)

    def left_out(self) -> np.ndarray:
        """Neurons in no expert, int [L]."""
        return np.array([(self._times(layer) == 0).sum() for layer in self.experts])

    def repeated(self) -> np.ndarray:
        """Neurons in several experts, int [L]."""
        return np.array([(self._times(layer) > 1).sum() for layer in self.experts])

    def _times(self, layer: list[np.ndarray]) -> np.ndarray:
        return np.bincount(np.concatenate(layer), minlength=self.neurons)

    def record(self) -> dict:
        """All but the neurons, as JSON values; NaN as null."""

        def plain(values: np.ndarray) -> list:
            return [None if np.isnan(value) else float(value) for value in values]

        return {
            "method": self.method, "seed": self.seed, "neurons": self.neurons, "layers": list(self.layers),
            "domains": list(self.domains), "sizes": self.sizes.tolist(), "status": list(self.status),
            "serves": None if self.serves is None else self.serves.astype(int).tolist(),
            **{name: plain(getattr(self, name)) for name in ("objective", "bound", "gap", "seconds")},
            "settings": self.settings,
        }  # fmt: skip

    # ---------------------------------------------------------------- files

    def save(self, path: str | Path) -> None:
        """Write one .npz: all neurons after one another, the sizes [L, n] that cut them, and `record()` as JSON."""
        flat = np.concatenate([indices for layer in self.experts for indices in layer]).astype(np.int32)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, neurons=flat, sizes=self.sizes, record=np.array(json.dumps(self.record())))

    @classmethod
    def load(cls, path: str | Path) -> "Split":
        """Read what `save` wrote. Raises UserError when it is absent or something else."""
        try:
            with np.load(path) as file:
                flat, sizes, record = file["neurons"], file["sizes"], json.loads(str(file["record"]))
            cuts = np.cumsum(sizes.reshape(-1))[:-1]
            pieces, n = np.split(flat, cuts), sizes.shape[1]
            record.pop("sizes")
            serves = record.pop("serves")
            values: dict[str, Any] = {name: np.array(record.pop(name), dtype=np.float64) for name in _PER_LAYER}
            return cls(
                **record, **values, experts=[pieces[i : i + n] for i in range(0, len(pieces), n)],
                serves=None if serves is None else np.array(serves, dtype=bool),
            )  # fmt: skip
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist; make the split first") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a split ({error}); remove it and make the split again") from error

    def export_parts(self, folder: str | Path) -> None:
        """Write the released `{layer}.part.{n}` files: line i names the experts of neuron i, with commas between several,
        empty for none."""
        for number, layer in zip(self.layers, self.experts, strict=True):
            lines: list[list[str]] = [[] for _ in range(self.neurons)]
            for expert, indices in enumerate(layer):
                for i in indices:
                    lines[i].append(str(expert))
            text = "".join(",".join(line) + "\n" for line in lines)
            write_atomic(Path(folder) / f"{number}.part.{self.expert_count}", text)

    @classmethod
    def import_parts(cls, folder: str | Path, method: str, layers: Sequence[int] | None = None) -> "Split":
        """Read the released files of a folder (of all layers there, unless `layers` names some).

        Raises UserError for a folder without such files, of several numbers of experts or neurons, and as `read_part_file`.
        """
        found = {}
        for path in Path(folder).glob("*.part.*"):
            match = re.fullmatch(r"(\d+)\.part\.(\d+)", path.name)
            if match:
                found[int(match[1])] = (path, int(match[2]))
        wanted = sorted(found) if layers is None else list(layers)
        missing = [layer for layer in wanted if layer not in found]
        if missing or not wanted:
            raise UserError(f"{folder} holds no LAYER.part.EXPERTS file for layer {missing[0] if missing else 0}")
        counts = {found[layer][1] for layer in wanted}
        if len(counts) > 1:
            raise UserError(f"{folder} holds splits into {sorted(counts)} experts; keep one of them there")
        (n,) = counts
        experts, neurons = [], set()
        for layer in wanted:
            groups, neurons_there = read_part_file(found[layer][0], n)
            experts.append([np.array(group, dtype=np.int64) for group in groups])
            neurons.add(neurons_there)
        if len(neurons) > 1:
            raise UserError(f"{folder}: the layers have different numbers of neurons {sorted(neurons)}")
        return cls(method=method, neurons=neurons.pop(), layers=tuple(wanted), experts=experts)


_PER_LAYER = ("objective", "bound", "gap", "seconds")


def experts_from_labels(labels: np.ndarray, n: int) -> list[np.ndarray]:
    """The ascending neurons of each of n experts, from the expert [N] of each neuron."""
    return [np.flatnonzero(labels == expert) for expert in range(n)]
