"""Merging classifiers of several tasks, of images or of texts, by every method: what merges, adapts and is measured alike.

A model maps inputs to embeddings, and each task has a frozen head (scoring.py).
"""

import copy
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from expert_merging.core.errors import UserError, at_least
from expert_merging.core.files import replacing
from expert_merging.merging.adamerging import AdaMerged
from expert_merging.merging.fisher import diagonal_fisher
from expert_merging.merging.registry import FROM_WEIGHTS, LAM, constants, once
from expert_merging.merging.registry import METHODS as ROWS
from expert_merging.merging.regmean import gram_matrices
from expert_merging.wemoe.adaptation import adapt, batch_at, check_guard, entropy_loss, neighbours_at
from expert_merging.wemoe.ffn import FFN, ensembles, upscale
from expert_merging.wemoe.scoring import Task, embed, evaluate
from expert_merging.wemoe.vectors import held_bytes

_WEMOE = re.compile(
    r"(?P<pruned>e)?wemoe(?P<percent>_[\d.]+)?(?P<depth>_depth[012])?(?P<modules>_attention|_both)?(?P<batch>_batch)?$"
)
# Merged once and for all, from weights alone or with statistics of each expert: the registry's rows, of which one has an
# older name, too, in the records of images.
STATIC = {name: ROWS[name] for name in once()} | {"ties_mean": ROWS["ties"]}
ADAMERGING = ("adamerging_task", "adamerging_layer", "adamerging_task++", "adamerging_layer++")
METHODS = ", ".join(
    (
        "individual",
        "pretrained",
        *STATIC,
        *ADAMERGING,
        "wemoe[_depth0|1|2][_attention|_both][_batch]",
        "ewemoe[_PERCENT][...]",
    )
)
CONSTANTS = constants(FROM_WEIGHTS.values())


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
    mixed: bool = True  # whether to measure a WEMoE in mixed batches, too
    modules: str = FFN  # names of what WEMoE routes, and of what wemoe_attention does
    attention: str = r"(^|\.)self_attn$"
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
    """{how else the E-WEMoEs among the methods are made ("", "_batch", "_both" ..): {method: percent pruned}}, ascending."""
    found: dict[str, dict[str, float]] = {}
    for method in methods:
        if (match := _WEMOE.match(method)) and match["pruned"] and match["percent"]:
            kind = f"{match['depth'] or ''}{match['modules'] or ''}{match['batch'] or ''}"
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
        layer_wise, keep = "layer" in method, s.constants["ties_keep"] if method.endswith("++") else None
        return AdaMerged(copy.deepcopy(base), experts, layer_wise=layer_wise, keep=keep, initial=s.lam)
    found = _WEMOE.match(method)
    if found:
        pruned = float(found["percent"][1:]) / 100 if found["pruned"] else 0.0
        depth = int((found["depth"] or "_depth2")[-1])
        select = {"": s.modules, "_attention": s.attention}.get(found["modules"] or "", f"{s.modules}|{s.attention}")
        layers = s.layers
        if layers is not None and found["modules"] == "_both":  # of which each layer has two
            layers = [2 * layer + half for layer in layers for half in (0, 1)]
        # E-WEMoE is both: pruned, and one router for all layers.
        return upscale(
            base, experts, select, layers=layers, lam=s.lam, depth=depth, share_router=bool(found["pruned"]), prune=pruned,
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
    matrices ("grams"), over the first `s.statistics_examples` of the task's inputs in random order.

    The Fisher information is that of the model's own predictions, so no label is needed. It takes an input at a time:
    the square of a batch's summed gradient would hold products between inputs. So do Gram matrices of texts, in which
    padding would count.
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
        size = 1 if kind == "information" or task.ragged else s.eval_batch_size
        batches = (task.inputs(chosen[start : start + size]) for start in range(0, len(chosen), size))
        if kind == "information":

            def logits_of(model: nn.Module, inputs: torch.Tensor, head=task.head) -> tuple[torch.Tensor, int]:
                return s.logit_scale * embed(model, inputs) @ head.t(), len(inputs)

            one = diagonal_fisher(model, batches, logits_of)
        else:
            one = gram_matrices(model, batches, embed)
        found.append({key: tensor.cpu() for key, tensor in one.items()})
    return found


def adapt_to(model: nn.Module, tasks: Sequence[Task], s: Settings, lr: float, **more) -> dict[str, Any]:
    """Adapt what of `model` has gradients to the tasks' test inputs, without their labels; the record of `adapt`."""
    by_name = {task.name: task for task in tasks}

    def loss(name: str, step: int):
        task = by_name[name]
        rows_at = neighbours_at if task.ragged else batch_at  # else half of a batch of texts is padding
        inputs = task.inputs(rows_at(step, len(task.labels), s.adapt_batch_size, s.seed))
        return entropy_loss(s.logit_scale * embed(model, inputs) @ task.head.t())

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return adapt(trained, list(by_name), loss, s.steps, lr, s.guard, s.guard_floor, **more)


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
        more: for `merged_model`.
    """
    if method == "individual":
        model = copy.deepcopy(base).requires_grad_(False)
        info = model_info(model)  # of as many models as there are tasks
        info |= {key: len(experts) * info[key] for key in ("all_params", "effective_params", "bytes")}
        record: dict[str, Any] = {"model_info": info}
        model.to(tasks[0].head.device)
        for task in tasks:
            if task.name in experts:
                model.load_state_dict(dict(experts[task.name]))
                record |= evaluate(model, [task], s, title=f"individual: {task.name}")
        return record | {"average_accuracy": _average(record, tasks)}, None
    model, made = merged_model(method, base, experts, adapt_tasks, s, **more)
    record = measured(model, tasks, s, method)
    return record | made | {"method": method, "seconds": made["seconds"] | record["seconds"]}, model


def merged_model(
    method: str, base: nn.Module, experts: Mapping[str, Mapping[str, torch.Tensor]], adapt_tasks: Sequence[Task],
    s: Settings, statistics_tasks: Sequence[Task] | None = None, keep: Path | None = None, reuse: Path | None = None, **more,
) -> tuple[nn.Module, dict[str, Any]]:  # fmt: skip
    """(the model that `method` makes, adapted where it adapts; {"model_info", "seconds", "adaptation"}).

    Args:
        adapt_tasks: to adapt to, on the device to compute on.
        statistics_tasks: whose inputs statistics of the experts are taken on; as `adapt_tasks` by default.
        keep: a file for what was adapted.
        reuse: such a file; what is in it takes the place of adapting.
        more: for `adapt`.
    """
    started = time.monotonic()
    statistics = {}
    if method in STATIC and (kind := STATIC[method].statistics):
        statistics[kind] = statistics_of(kind, base, experts, statistics_tasks or adapt_tasks, s)
    model = build(method, base, list(experts.values()), s, statistics).eval().to(adapt_tasks[0].head.device)
    made: dict[str, Any] = {"model_info": model_info(model), "seconds": {"merge": time.monotonic() - started}}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    made["adaptation"] = adaptation = None
    if trained and reuse is not None:
        with torch.no_grad():
            for name, tensor in load_file(reuse).items():
                trained[name].copy_(tensor)
    elif trained:
        # A router of depth 0 is nothing but coefficients.
        lr = s.adamerging_lr if method in ADAMERGING or "_depth0" in method else s.lr
        made["adaptation"] = adaptation = adapt_to(model, adapt_tasks, s, lr, title=f"{method}: adapting", **more)
        made["seconds"]["adapt"] = adaptation["seconds"]
    if trained and keep is not None:
        with replacing(keep) as temporary:
            save_file({name: parameter.detach().contiguous() for name, parameter in trained.items()}, temporary)
    if isinstance(model, AdaMerged):
        if adaptation is not None:
            coefficients = {name: [round(float(x), 5) for x in own] for name, own in model.learnt().items()}
            adaptation["coefficients"] = coefficients if "layer" in method else next(iter(coefficients.values()))
        model = model.merged(model.model)
    return model, made


def measured(model: nn.Module, tasks: Sequence[Task], s: Settings, title: str) -> dict[str, Any]:
    """Scores of a model on each of the tasks and their mean; of one that routes in mixed batches, too."""
    started = time.monotonic()
    record = evaluate(model, tasks, s, title=f"{title}: one-task batches")
    record |= {"average_accuracy": _average(record, tasks), "seconds": {"evaluate": time.monotonic() - started}}
    if s.mixed and any(True for _ in ensembles(model)):
        for key, mixed, routing in (("mixed", True, None), ("sample_wise", False, "sample")):
            before = {layer: layer.routing for _, layer in ensembles(model)}
            if routing and set(before.values()) == {routing}:
                continue
            for layer in before:
                layer.routing = routing or layer.routing
            found = evaluate(model, tasks, s, mixed=mixed, title=f"{title}: {key}")
            found.pop("routing_weights")
            record[key] = found | {"average_accuracy": _average(found, tasks)}
            for layer, was in before.items():
                layer.routing = was
    return record


def _average(record: Mapping[str, Any], tasks: Sequence[Task]) -> float:
    found = [record[task.name]["accuracy"] for task in tasks if task.name in record]
    return sum(found) / len(found)


def model_info(model: nn.Module) -> dict[str, Any]:
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
