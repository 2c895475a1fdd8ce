"""Classifying inputs of several tasks by one model: what CLIP does with frozen text heads, and an encoder of texts with heads
that are frozen after they were trained.

A model maps inputs to embeddings; a task has a head of class embeddings, and logits are scaled products of unit embeddings
with those. So samples of several tasks can share a batch, which tells a router that looks at each sample from one that looks
at the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from expert_merging.core.bars import bar as progress_bar
from expert_merging.data.scores import pack
from expert_merging.wemoe.ffn import ensembles


@dataclass
class Task:
    """Inputs of a task. `inputs(indices)` gives pixels [len(indices), channels, height, width], or tokens [len(indices),
    length, 2], -1 behind the end of shorter texts (`text_encoder.TextEncoder`); `head` is [classes, D].

    `ragged`: inputs differ in length, so that a batch of several holds padding.
    """

    name: str
    labels: list[int]
    head: torch.Tensor
    inputs: Callable[[list[int]], torch.Tensor]
    ragged: bool = False

    def to(self, device: torch.device) -> "Task":
        """The same with head and inputs on `device`."""
        return replace(self, head=self.head.to(device), inputs=lambda indices: self.inputs(indices).to(device))


class Scoring(Protocol):
    """What of `classification.Settings` is asked for here."""

    eval_batch_size: int
    logit_scale: float
    seed: int


def embed(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Unit embeddings [batch, D]."""
    made = model(inputs)
    return F.normalize((made if torch.is_tensor(made) else made.image_embeds).float(), dim=-1)


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inputs of several tasks as one batch; the shorter texts get -1 behind their end."""
    if parts[0].is_floating_point():
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1]), value=-1) for part in parts])


@torch.no_grad()
def evaluate(
    model: nn.Module, tasks: Sequence[Task], s: Scoring, mixed: bool = False, title: str = ""
) -> dict[str, Any]:
    """Accuracy and loss of each task, each example counting the same; and mean routing weights by layer and task.

    Args:
        mixed: batches hold examples of all tasks in random order, in the place of one task's.

    Returns:
        {task: {"accuracy": 0..1, "loss": nats, "each": 100 or 0 for each example, packed}, ...,
        "routing_weights": {layer: {task: [T]}}}
    """
    layers = dict(ensembles(model))
    loss, count = ({task.name: 0.0 for task in tasks} for _ in range(2))
    right = {task.name: [0.0] * len(task.labels) for task in tasks}
    # Sums, tensors from the first batch on.
    weights: dict[str, dict[str, Any]] = {layer: {task.name: 0.0 for task in tasks} for layer in layers}
    batches = list(_batches(tasks, s, mixed))
    for batch in progress_bar(batches, title, leave=False):
        embedded = embed(model, joined([task.inputs(indices) for task, indices in batch]))
        routing = {}
        for name, layer in layers.items():
            assert layer.last_weights is not None  # the pass above has just left them
            routing[name] = layer.last_weights.expand(len(embedded), -1)
        start = 0
        for task, indices in batch:
            here = slice(start, start := start + len(indices))
            logits = s.logit_scale * embedded[here] @ task.head.t()
            labels = torch.tensor([task.labels[i] for i in indices], device=logits.device)
            for i, is_right in zip(indices, (logits.argmax(dim=-1) == labels).tolist(), strict=True):
                right[task.name][i] = 100.0 * is_right
            loss[task.name] += F.cross_entropy(logits, labels, reduction="sum").item()
            count[task.name] += len(indices)
            for name, of_layer in routing.items():
                weights[name][task.name] = weights[name][task.name] + of_layer[here].float().sum(dim=0).cpu()
    found: dict[str, Any] = {
        name: {"accuracy": sum(each) / 100 / len(each), "loss": loss[name] / count[name], "each": pack(each)}
        for name, each in right.items()
    }
    if layers:
        found["routing_weights"] = {
            layer: {name: [round(w, 5) for w in (total / count[name]).tolist()] for name, total in of_layer.items()}
            for layer, of_layer in weights.items()
        }
    return found


def _batches(tasks: Sequence[Task], s: Scoring, mixed: bool) -> Iterator[list[tuple[Task, list[int]]]]:
    size = s.eval_batch_size
    if not mixed:
        for task in tasks:
            for start in range(0, len(task.labels), size):
                yield [(task, list(range(start, min(start + size, len(task.labels)))))]
        return
    pairs = [(number, i) for number, task in enumerate(tasks) for i in range(len(task.labels))]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(s.seed)).tolist()
    for start in range(0, len(order), size):
        chosen = sorted(pairs[i] for i in order[start : start + size])
        yield [(task, own) for n, task in enumerate(tasks) if (own := [i for number, i in chosen if number == n])]
