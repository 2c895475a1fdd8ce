"""Which examples a step sees: rotation over epochs (paper, 4.1) and batches of similar length, as functions of the seed;
and how many of them at a time fit in memory."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Size:
    """How much a task brings to a step: what its losses are averaged over."""

    rows: int
    input_tokens: int
    target_tokens: int


def epoch_examples(size: int, per_epoch: int, epoch: int, seed: int) -> np.ndarray:
    """The `per_epoch` examples (indices below `size`) that epoch number `epoch` (from 0) sees, in random order.

    Every pass over the data is a fresh permutation, and epochs cut the endless row of passes into equal pieces: the next
    epoch goes on where the last one stopped, and every example gets used.
    """
    start, stop = epoch * per_epoch, (epoch + 1) * per_epoch
    pieces = []
    for number in range(start // size, (stop - 1) // size + 1):
        permutation = np.random.default_rng([seed, number]).permutation(size)
        pieces.append(permutation[max(start - number * size, 0) : stop - number * size])
    return np.concatenate(pieces)


def length_grouped(examples: np.ndarray, lengths: np.ndarray, batch_size: int, seed: int) -> list[np.ndarray]:
    """Cut `examples` into batches of `batch_size` (the last may be smaller), each of similar length, in random order.

    Sorting happens inside windows of 50 batches, so that batches differ from epoch to epoch. Each example appears exactly
    as often as in `examples`; inside a batch the longest comes first.
    """
    window = 50 * batch_size
    rows = [examples[start : start + window] for start in range(0, len(examples), window)]
    in_order = np.concatenate([row[np.argsort(-lengths[row], kind="stable")] for row in rows])
    batches = [in_order[start : start + batch_size] for start in range(0, len(in_order), batch_size)]
    return [batches[i] for i in np.random.default_rng(seed).permutation(len(batches))]


class MicroBatches:
    """In how many parts the passes of a task are computed: in one until memory runs out, then in twice as many.

    A pass is a dataclass with `task` and `rows` (which examples) whose loss is the sum of its parts' losses.
    """

    def __init__(self):
        self.parts: dict[str, int] = {}

    def cut(self, one: Any) -> list[Any]:
        """The pass in parts of as many rows each as can be."""
        number = min(self.parts.get(one.task, 1), len(one.rows))
        return [replace(one, rows=rows) for rows in np.array_split(one.rows, number)] if number > 1 else [one]

    def halve(self, one: Any) -> bool:
        """Note that a part `one` did not fit; whether there is a smaller one."""
        if len(one.rows) > 1:
            self.parts[one.task] = 2 * self.parts.get(one.task, 1)
        return len(one.rows) > 1
