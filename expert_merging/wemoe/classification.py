"""Merging image classifiers of several tasks: what CLIP_vision does with frozen text heads, by every method, measured alike.

A model maps pixels to embeddings; a task has a head of unit class embeddings, and logits are scaled cosines. So samples of
several tasks can share a batch, which tells a router that looks at each sample from one that looks at the batch.
"""

import copy
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from expert_merging.core.bars import bar as progress_bar
from expert_merging.core.errors import UserError, at_least
from expert_merging.merging.adamerging import AdaMerged
from expert_merging.merging.fisher import diagonal_fisher
from expert_merging.merging.registry import FROM_WEIGHTS, LAM, constants
from expert_merging.merging.registry import METHODS as ROWS
from expert_merging.merging.regmean import gram_matrices
from expert_merging.wemoe.adaptation import adapt, batch_at, check_guard, entropy_loss
from expert_merging.wemoe.ffn import ensembles, upscale
from expert_merging.wemoe.vectors import held_bytes

_WEMOE = re.compile(r"(?P<pruned>e)?wemoe(?P<percent>_[\d.]+)?(?P<depth>_depth[012])?(?P<batch>_batch)?$")
# Merged once and for all, from weights alone or with statistics of each expert: the registry's rows, of which one has an
# older name in this experiment's records.
STATIC = {
    {"ties": "ties_mean"}.get(name, name): method
    for name, method in ROWS.items() if name in FROM_WEIGHTS or method.statistics
}  # fmt: skip
ADAMERGING = ("adamerging_task", "adamerging_layer", "adamerging_task++", "adamerging_layer++")
METHODS = ", ".join(
    ("individual", "pretrained", *STATIC, *ADAMERGING, "wemoe[_depth0|1|2][_batch]", "ewemoe[_PERCENT][...]")
)
CONSTANTS = constants(FROM_WEIGHTS.values())


@dataclass
class Task:
    """Test inputs of a task. `pixels(indices)` gives [len(indices), channels, height, width]; `head` is [classes, D]."""

    name: str
    labels: list[int]
    head: torch.Tensor
    pixels: Callable[[list[int]], torch.Tensor]

    def to(self, device: torch.device) -> "Task":
        """The same with head and pixels on `device`."""
        return Task(self.name, self.labels, self.head.to(device), lambda indices: self.pixels(indices).to(device))


@dataclass
class Settings:
    """What the methods share: see the scripts' constants; `constants` are those of the registry's methods."""

    lam: float = LAM.default
    lr: float = 1e-4
    adamerging_lr: float = 1e-3
    steps: int = 1000
    adapt_batch_size: int = 16
    eval_batch_size: int = 128
    logit_scale: float = 100.0
    guard: str = "warn"
    guard_floor: float = 0.5
    statistics_examples: int = 256
    seed: int = 0
    layers: Sequence[int] | None = None
    constants: Mapping[str, Any] = field(default_factory=lambda: {name: x.default for name, x in CONSTANTS.items()})

    @classmethod
    def of(cls, c: SimpleNamespace, **more: Any) -> "Settings":
        """From the constants of a script; `more` gives what no constant of both scripts does."""
        return cls(
            lam=c.lam, lr=c.adapt_lr, adamerging_lr=c.adamerging_lr, steps=c.adapt_steps, guard=c.guard,
            guard_floor=c.guard_floor, adapt_batch_size=c.adapt_batch_size, statistics_examples=c.statistics_examples,
            constants={name: getattr(c, name) for name in CONSTANTS}, **more,
        )  # fmt: skip


def check_adaptation(c: SimpleNamespace) -> None:
    """Raises UserError for constants of the adaptation that cannot be."""
    at_least(c, 1, "adapt_steps", "adapt_batch_size", "statistics_examples")
    at_least(c, 0, "images_per_task")
    check_guard(c.guard, c.guard_floor)


def changed(c: SimpleNamespace) -> list[str]:
    """Those constants of the methods that have another value than by default: with them the records of an experiment follow
    from more than without."""
    defaults = {name: constant.default for name, constant in CONSTANTS.items()}
    defaults["statistics_examples"] = Settings.statistics_examples
    return [name for name, default in defaults.items() if getattr(c, name) != default]


def check_method(method: str) -> None:
    """Raises UserError for a method that there is not."""
    if method not in ("individual", "pretrained", *STATIC, *ADAMERGING) and not _WEMOE.match(method):
        raise UserError(f"there is no merging method {method!r}; there are: {METHODS}")
    found = _WEMOE.match(method)
    if found and (bool(found["pruned"]) != bool(found["percent"]) or float((found["percent"] or "_0")[1:]) > 100):
        raise UserError(f"{method!r} should read ewemoe_90 for task vectors pruned by 90 percent, wemoe for whole ones")


def expanded(methods: Sequence[str], prune_ratios: Sequence[float]) -> tuple[str, ...]:
    """The methods, each once, with an E-WEMoE for every ratio in the place of one that names none: of ewemoe_batch at 0.9 and
    0.99 are made ewemoe_90_batch and ewemoe_99_batch. Raises UserError for a ratio that cannot be, and for unknown methods."""
    if wrong := [ratio for ratio in prune_ratios if not 0 <= ratio <= 1]:
        raise UserError(f"prune_ratios has {wrong[0]:g}; it is the share of a task vector that is dropped, from 0 to 1")
    names: dict[str, None] = {}
    for method in methods:
        found = _WEMOE.match(method)
        if found and found["pruned"] and not found["percent"]:
            tail = method.removeprefix("ewemoe")
            names |= dict.fromkeys(f"ewemoe_{100 * ratio:.10g}{tail}" for ratio in prune_ratios)
        else:
            names[method] = None
    for method in names:
        check_method(method)
    return tuple(names)


def sweep_of(methods: Iterable[str]) -> dict[str, dict[str, float]]:
    """{how else the E-WEMoEs among the methods are made ("", "_batch", "_depth1" ..): {method: percent pruned}}, ascending."""
    found: dict[str, dict[str, float]] = {}
    for method in methods:
        if (match := _WEMOE.match(method)) and match["pruned"] and match["percent"]:
            kind = f"{match['depth'] or ''}{match['batch'] or ''}"
            found.setdefault(kind, {})[method] = float(match["percent"][1:])
    return {kind: dict(sorted(own.items(), key=lambda item: item[1])) for kind, own in found.items()}


def build(
    method: str, base: nn.Module, experts: Sequence[Mapping[str, torch.Tensor]], s: Settings,
    statistics: Mapping[str, Any] = MappingProxyType({}),
) -> nn.Module:  # fmt: skip
    """The merged model before adaptation; the parameters to adapt are those with gradients. Inputs stay as they are.

    `statistics`: what the method wants of the experts besides their weights, under the name of its argument.
    """
    check_method(method)
    if method in ADAMERGING:
        layer_wise, keep = "layer" in method, 0.2 if method.endswith("++") else None
        return AdaMerged(copy.deepcopy(base), experts, layer_wise=layer_wise, keep=keep, initial=s.lam)
    found = _WEMOE.match(method)
    if found:
        pruned = float(found["percent"][1:]) / 100 if found["pruned"] else 0.0
        depth = int((found["depth"] or "_depth2")[-1])
        # E-WEMoE is both: pruned, and one router for all layers.
        return upscale(
            base, experts, layers=s.layers, lam=s.lam, depth=depth, share_router=bool(found["pruned"]), prune=pruned,
            routing="batch" if found["batch"] else "sample", seed=s.seed,
        )  # fmt: skip
    model = copy.deepcopy(base).requires_grad_(False)
    if method in STATIC:
        arguments = {**STATIC[method].arguments({**s.constants, "lam": s.lam, "seed": s.seed}), **statistics}
        try:
            model.load_state_dict(dict(STATIC[method].load()(base.state_dict(), experts, **arguments)))
        except ValueError as error:
            raise UserError(f"{method} cannot merge these models: {error}") from error
    return model


def statistics_of(
    kind: str, base: nn.Module, experts: Mapping[str, Mapping[str, torch.Tensor]], tasks: Sequence[Task], s: Settings
) -> list[dict[str, torch.Tensor]]:
    """Of each expert, in their order, its diagonal Fisher information (`kind` is "information") or its linear layers' Gram
    matrices ("grams"), over the first `s.statistics_examples` of the task's images in random order.

    The Fisher information is that of the model's own predictions, so no label is needed. It takes an image at a time:
    the square of a batch's summed gradient would hold products between images.
    """
    by_name = {task.name: task for task in tasks}
    found: list[dict[str, torch.Tensor]] = []
    for name, tensors in experts.items():
        task = by_name[name]
        model = copy.deepcopy(base).eval()
        model.load_state_dict(dict(tensors))
        model.requires_grad_(kind == "information").to(task.head.device)
        order = torch.randperm(len(task.labels), generator=torch.Generator().manual_seed(s.seed)).tolist()
        chosen = order[: s.statistics_examples]
        size = 1 if kind == "information" else s.eval_batch_size
        batches = (task.pixels(chosen[start : start + size]) for start in range(0, len(chosen), size))
        if kind == "information":

            def logits_of(model: nn.Module, pixels: torch.Tensor, head=task.head) -> tuple[torch.Tensor, int]:
                return s.logit_scale * embed(model, pixels) @ head.t(), len(pixels)

            one = diagonal_fisher(model, batches, logits_of)
        else:
            one = gram_matrices(model, batches, embed)
        found.append({key: tensor.cpu() for key, tensor in one.items()})
    return found


def embed(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Unit embeddings [batch, D]."""
    return F.normalize(model(pixel_values=pixels).image_embeds.float(), dim=-1)


def adapt_to(model: nn.Module, tasks: Sequence[Task], s: Settings, lr: float, **more) -> dict[str, Any]:
    """Adapt what of `model` has gradients to the tasks' test inputs, without their labels; the record of `adapt`."""
    by_name = {task.name: task for task in tasks}

    def loss(name: str, step: int):
        task = by_name[name]
        pixels = task.pixels(batch_at(step, len(task.labels), s.adapt_batch_size, s.seed))
        return entropy_loss(s.logit_scale * embed(model, pixels) @ task.head.t())

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return adapt(trained, list(by_name), loss, s.steps, lr, s.guard, s.guard_floor, **more)


@torch.no_grad()
def evaluate(
    model: nn.Module, tasks: Sequence[Task], s: Settings, mixed: bool = False, title: str = ""
) -> dict[str, Any]:
    """Accuracy and loss of each task, each example counting the same; and mean routing weights by layer and task.

    Args:
        mixed: batches hold examples of all tasks in random order, in the place of one task's.

    Returns:
        {task: {"accuracy": 0..1, "loss": nats}, ..., "routing_weights": {layer: {task: [T]}}}
    """
    layers = dict(ensembles(model))
    right, loss, count = ({task.name: 0.0 for task in tasks} for _ in range(3))
    # Sums, tensors from the first batch on.
    weights: dict[str, dict[str, Any]] = {layer: {task.name: 0.0 for task in tasks} for layer in layers}
    batches = list(_batches(tasks, s, mixed))
    for batch in progress_bar(batches, title, leave=False):
        embedded = embed(model, torch.cat([task.pixels(indices) for task, indices in batch]))
        routing = {}
        for name, layer in layers.items():
            assert layer.last_weights is not None  # the pass above has just left them
            routing[name] = layer.last_weights.expand(len(embedded), -1)
        start = 0
        for task, indices in batch:
            here = slice(start, start := start + len(indices))
            logits = s.logit_scale * embedded[here] @ task.head.t()
            labels = torch.tensor([task.labels[i] for i in indices], device=logits.device)
            right[task.name] += int((logits.argmax(dim=-1) == labels).sum())
            loss[task.name] += F.cross_entropy(logits, labels, reduction="sum").item()
            count[task.name] += len(indices)
            for name, of_layer in routing.items():
                weights[name][task.name] = weights[name][task.name] + of_layer[here].float().sum(dim=0).cpu()
    found: dict[str, Any] = {
        name: {"accuracy": right[name] / count[name], "loss": loss[name] / count[name]} for name in right
    }
    if layers:
        found["routing_weights"] = {
            layer: {name: [round(w, 5) for w in (total / count[name]).tolist()] for name, total in of_layer.items()}
            for layer, of_layer in weights.items()
        }
    return found


def _batches(tasks: Sequence[Task], s: Settings, mixed: bool) -> Iterator[list[tuple[Task, list[int]]]]:
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


def run_method(
    method: str, base: nn.Module, experts: Mapping[str, Mapping[str, torch.Tensor]], tasks: Sequence[Task],
    adapt_tasks: Sequence[Task], s: Settings, **more,
) -> tuple[dict[str, Any], nn.Module | None]:  # fmt: skip
    """Merge by `method`, adapt where it does, and measure: (record, model). "individual" has no one model.

    The record has the keys of the released results, {"model_info", task: {"accuracy", "loss"}, "average_accuracy"}, of
    batches of one task; "mixed" has the same of mixed batches, and for batch routing "sample_wise" the same weights
    routed sample by sample.

    Args:
        experts: {task: the fine-tuned model's tensors}.
        tasks: to evaluate on, on the device to compute on; `adapt_tasks`: to adapt to.
        more: for `adapt`.
    """
    device = tasks[0].head.device
    if method == "individual":
        model = copy.deepcopy(base).requires_grad_(False)
        info = _model_info(model)  # of as many models as there are tasks
        info |= {key: len(experts) * info[key] for key in ("all_params", "effective_params", "bytes")}
        record: dict[str, Any] = {"model_info": info}
        model.to(device)
        for task in tasks:
            if task.name in experts:
                model.load_state_dict(dict(experts[task.name]))
                record |= evaluate(model, [task], s, title=f"individual: {task.name}")
        return record | {"average_accuracy": _average(record, tasks)}, None
    started = time.monotonic()
    statistics = {}
    if method in STATIC and (kind := STATIC[method].statistics):
        statistics[kind] = statistics_of(kind, base, experts, adapt_tasks, s)
    model = build(method, base, list(experts.values()), s, statistics).eval().to(device)
    seconds = {"merge": time.monotonic() - started}
    record = {"model_info": _model_info(model)}
    adaptation = None
    if any(parameter.requires_grad for parameter in model.parameters()):
        lr = s.adamerging_lr if method in ADAMERGING else s.lr
        adaptation = adapt_to(model, adapt_tasks, s, lr, title=f"{method}: adapting", **more)
        seconds["adapt"] = adaptation["seconds"]
    if isinstance(model, AdaMerged):
        coefficients = {name: [round(float(x), 5) for x in own] for name, own in model.learnt().items()}
        assert adaptation is not None  # the coefficients have gradients
        adaptation["coefficients"] = coefficients if "layer" in method else next(iter(coefficients.values()))
        model = model.merged(model.model)
    started = time.monotonic()
    record |= evaluate(model, tasks, s, title=f"{method}: one-task batches")
    seconds["evaluate"] = time.monotonic() - started
    record["average_accuracy"] = _average(record, tasks)
    if any(True for _ in ensembles(model)):
        for key, mixed, routing in (("mixed", True, None), ("sample_wise", False, "sample")):
            before = {layer: layer.routing for _, layer in ensembles(model)}
            if routing and set(before.values()) == {routing}:
                continue
            for layer in before:
                layer.routing = routing or layer.routing
            found = evaluate(model, tasks, s, mixed=mixed, title=f"{method}: {key}")
            found.pop("routing_weights")
            record[key] = found | {"average_accuracy": _average(found, tasks)}
            for layer, was in before.items():
                layer.routing = was
    return record | {"method": method, "seconds": seconds, "adaptation": adaptation}, model


def _average(record: Mapping[str, Any], tasks: Sequence[Task]) -> float:
    found = [record[task.name]["accuracy"] for task in tasks if task.name in record]
    return sum(found) / len(found)


def _model_info(model: nn.Module) -> dict[str, Any]:
    """Parameters in all, task vectors counted as if dense; those with gradients; elements not zero; bytes in memory."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    info = {"trainable_params": trainable, "all_params": parameters, "effective_params": parameters, "bytes": size}
    for _, layer in ensembles(model):
        for vectors in layer.vectors:
            info["all_params"] += len(vectors) * vectors.shape.numel()
            info["effective_params"] += sum(vectors.nonzeros())
            info["bytes"] += held_bytes(vectors)
    if isinstance(model, AdaMerged):
        info |= {"all_params": parameters, "bytes": size + held_bytes(model)}
    return info | {"trainable_percentage": trainable / info["all_params"]}
