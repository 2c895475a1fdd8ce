"""A Switch Transformer's experts merged for one task, and how near the dense model is to it: variants, measured once each.

The merging itself is in switch.py, what is measured in fidelity.py.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from expert_merging.core.bars import bar as progress_bar
from expert_merging.core.errors import UserError, at_least
from expert_merging.core.files import read_json
from expert_merging.data.tasks import get_task
from expert_merging.meo import fidelity, switch
from expert_merging.run import results
from expert_merging.switch.cross_entropy import teacher_forced


def open_source(c: SimpleNamespace) -> Path:
    """The folder of the model `c.source`.

    Raises UserError where there is none, for numbers of experts that it does not have, an unknown gate, and too few examples.
    """
    folder = Path(c.MODEL_SAVE_PATH) / c.source
    if not folder.is_dir():
        raise UserError(
            f"MODEL_SAVE_PATH: there is no folder {folder}; run CAEM_multi_task_finetune.py, or give --source"
        )
    experts = read_json(folder / "config.json").get("num_experts", 0)
    for name, value in (("k", c.k), *(("ks", value) for value in c.ks)):
        if not 1 <= value <= experts:
            raise UserError(f"{name} is {value}; {c.source} has {experts} experts a layer: give 1 to {experts}")
    if c.gate not in switch.GATES:
        raise UserError(f"gate is {c.gate!r}; it must be probability, usage or uniform")
    at_least(c, 1, "calibration_examples", "compare_examples", "latency_runs")
    if c.compare:
        at_least(c, 1, "latency_batches")
    if c.ridge <= 0:
        raise UserError(f"ridge is {c.ridge}; it must be above 0")
    return folder


class Densifier:
    """Makes dense models of the Switch `model` for the task whose `examples` (training features) are given: experts are
    weighted by how the task uses them, and second matrices fitted to its text."""

    def __init__(self, c: SimpleNamespace, model, examples, tokenizer):
        self.c, self.model = c, model
        chosen = examples.select(range(min(c.calibration_examples, len(examples))))
        self.batches = list(teacher_forced(chosen, tokenizer, c))
        self.uses = switch.measure_use(model, self.batches)

    def dense(self, k: int, gate: str = "", aligned: bool = False, refitted: bool = False):
        """A T5: k experts of each layer merged; 0 leaves the layers out, -1 has hidden units drawn at random."""
        weights = switch.dense_weights(self.model, self.uses, max(k, 1), gate or self.c.gate, aligned)
        if k <= 0:
            weights = {layer: (wi.clone(), torch.zeros_like(wo)) for layer, (wi, wo) in weights.items()}
        if k < 0:
            generator = torch.Generator().manual_seed(self.c.seed)
            for wi, _ in weights.values():
                wi.copy_(torch.randn(wi.shape, generator=generator) * wi.std().item())
        if refitted:
            weights = switch.refit(self.model, weights, self.batches, self.c.ridge)
        return switch.as_t5(self.model, weights)

    def candidate(self, way: str = "dense", **settings: Any) -> tuple[Any, contextlib.AbstractContextManager]:
        """(model, context to use it in) of a variant: a dense model, or the Switch itself with experts merged for each
        token (as the task's gates weight them) or for each sequence."""
        if way == "dense":
            return self.dense(**settings), contextlib.nullcontext()
        k, gates = settings["k"], None
        if way == "token":
            gates = {layer: use.gates(self.c.gate, k) for layer, use in self.uses.items()}
        favourites = {layer: use.favourite for layer, use in self.uses.items()} if settings["aligned"] else None
        return self.model, switch.merged_experts(self.model, k, gates, favourites)

    def use(self) -> dict[str, dict[str, Any]]:
        """How the task uses the experts of each layer, for a record."""
        return {
            layer: {"probability": use.probability.tolist(), "usage": use.usage.tolist(), "scale": use.scale}
            for layer, use in self.uses.items()
        }


def variants(c: SimpleNamespace, experts: int) -> dict[str, dict[str, Any]]:
    """What is compared: {name: settings of `Densifier.candidate`}. `decoded`: whether test examples are written out too."""
    made: dict[str, dict[str, Any]] = {
        "no layer": {"k": 0, "decoded": True},
        "random, refitted": {"k": -1, "refitted": True, "decoded": True},
    }
    middle = max(1, experts // 2)
    for k in c.ks:
        for aligned in (False, True)[: 1 + (k > 1)]:
            ways, label = {"k": k, "aligned": aligned}, f"k={k}{', aligned' * aligned}"
            for refitted in (False, True):
                decoded = k == 1 and not refitted or k == middle and (aligned or not refitted)
                made[f"A {label}{', refitted' * refitted}"] = {**ways, "refitted": refitted, "decoded": decoded}
            made[f"A {label}, router kept"] = {**ways, "way": "token"}
            made[f"{'B' if k > 1 else 'C'} {label}"] = {**ways, "way": "sequence", "decoded": k in (1, middle)}
    made[f"A k={middle}, aligned, by usage"] = {"k": middle, "aligned": True, "gate": "usage"}
    made[f"A k={experts}, aligned, uniform"] = {"k": experts, "aligned": True, "gate": "uniform"}
    return made


def compare(
    c: SimpleNamespace, accelerator, densifier: Densifier, models: dict[str, tuple[Any, Path]], test, tokenizer,
    work: Path, identity: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Measure all `variants` against the Switch: for the same layer inputs, the same targets, and in what both write.

    Args:
        models: {"Switch": (model, its folder), "dense": ...}, whose sizes and latencies are measured.
        test: features of the task's test.
        work: what has been measured stands there meanwhile, and is not measured again.

    Returns:
        The record: what was compared, how the task uses the experts, {"Switch": its loss, scores and texts, "sizes",
        "latency", "variants": {name: settings and what was found}}
    """
    task, experts, name = get_task(c.densify), densifier.model.config.num_experts, models["dense"][1].name
    wanted, test = variants(c, experts), test.select(range(min(c.compare_examples, len(test))))
    found = (results.part(work, identity) or {"found": {}})["found"]
    reference = fidelity.Reference(densifier.model, test, tokenizer, c)

    def once(name: str, measured: Callable[[], Any]) -> None:
        if name not in found:
            found[name] = measured()
            results.save(work, identity, {"found": found})

    def of_switch() -> dict[str, Any]:
        scores, texts = fidelity.written(densifier.model, test, task, tokenizer, c, accelerator)
        return {"loss": reference.loss, "scores": scores, "texts": texts}

    def of_variant(decoded: bool = False, **settings: Any) -> dict[str, Any]:
        candidate, context = densifier.candidate(**settings)
        with context:
            result = reference.compare(candidate)
            if decoded:
                result["scores"], texts = fidelity.written(candidate, test, task, tokenizer, c, accelerator)
                same = sum(mine == theirs for mine, theirs in zip(texts, found["Switch"]["texts"], strict=True))
                result["same_text"] = same / len(texts)
        return result

    def of_label(label: str) -> dict[str, Any]:
        return {**wanted[label], **of_variant(**wanted[label])}

    once("Switch", of_switch)
    once("sizes", lambda: fidelity.sizes(models))
    once("latency", lambda: fidelity.latency({name: model for name, (model, _) in models.items()}, test, tokenizer, c))
    for label in (bar := progress_bar(wanted, desc=name, unit="variant")):
        once(label, functools.partial(of_label, label))
        bar.set_postfix_str(f"{label}: agreement {found[label]['agreement']:.3f}", refresh=False)
    return {
        "name": name, "task": c.densify, "seed": c.seed, "main_score": task.main_score, "experts": experts,
        "device": accelerator.device.type, "threads": torch.get_num_threads(), "examples": len(test),
        "latency_clock": "wall" if accelerator.device.type == "cuda" else "process", "uses": densifier.use(),
        **{key: found.pop(key) for key in ("Switch", "sizes", "latency")}, "variants": found,
    }  # fmt: skip


def lines(record: dict[str, Any]) -> list[str]:
    """What of a record was decoded, a line each, for people to read."""
    score = record["main_score"]
    return [
        f"{label}: {score} {one['scores'][score]:.2f}, loss {one['loss']:.3f}, same text {one.get('same_text', 1):.2f}"
        for label, one in {"Switch": record["Switch"], **record["variants"]}.items()
        if "scores" in one
    ]
