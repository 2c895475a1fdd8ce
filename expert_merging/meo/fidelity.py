"""How near a model with merged experts is to the Switch Transformer it was made from, on a task's examples."""

import contextlib
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from expert_merging.meo.switch import real_tokens, sparse_layers, teacher_forced
from expert_merging.switch.cross_entropy import teacher_forced as batches_of
from expert_merging.switch.decoding import evaluate_task, generate


class Reference:
    """What a Switch makes of examples, teacher-forced: its logits, and the input and output of each sparse layer.

    Keeps them all: a few hundred examples are enough to measure by.
    """

    @torch.no_grad()
    def __init__(self, model, dataset, tokenizer, constants: SimpleNamespace):
        self.model = model
        self.batches = list(batches_of(dataset, tokenizer, constants))
        self.states: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        with contextlib.ExitStack() as stack:
            for name, layer in sparse_layers(model).items():
                kept = self.states.setdefault(name, [])

                def keep(_, arguments, output, kept=kept):
                    kept.append((arguments[0].clone(), output[0].clone()))

                stack.callback(layer.register_forward_hook(keep).remove)
            self.logits, self.targets = self._answers(model)
        self.loss = F.cross_entropy(self.logits, self.targets).item()

    def _answers(self, model) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [target tokens, vocabulary] and the tokens themselves, over all batches."""
        logits, targets = [], []
        for batch in self.batches:
            real = batch["labels"] != -100
            logits.append(teacher_forced(model, batch).logits.float().cpu()[real])
            targets.append(batch["labels"][real])
        return torch.cat(logits), torch.cat(targets)

    @torch.no_grad()
    def compare(self, model) -> dict[str, Any]:
        """A T5 from `as_t5`, or the Switch itself inside `merged_experts`, against the Switch as it was.

        {"layers": {layer: |new - old| / |old| of its outputs for the same inputs}, "logits": the same of the logits,
        "agreement": share of target tokens where both find the same token best, "loss": nats a target token}
        """
        layers = {}
        for name, states in self.states.items():
            changed = old = 0.0
            layer = model.get_submodule(name if model is self.model else name.replace(".mlp", ".DenseReluDense"))
            for batch, (x, y) in zip(self.batches, states, strict=True):
                if hasattr(layer, "real"):  # gates of each sequence
                    layer.merged, layer.real = None, batch["attention_mask"] if name.startswith("encoder") else None
                new, real = layer(x), real_tokens(name, batch)
                new = new[0] if isinstance(new, tuple) else new
                changed += (new - y)[real].double().square().sum().item()
                old += y[real].double().square().sum().item()
            layers[name] = (changed / old) ** 0.5
        logits, _ = self._answers(model)
        return {
            "layers": layers,
            "logits": ((logits - self.logits).norm() / self.logits.norm()).item(),
            "agreement": (logits.argmax(-1) == self.logits.argmax(-1)).double().mean().item(),
            "loss": F.cross_entropy(logits, self.targets).item(),
        }


def written(model, dataset, task, tokenizer, constants: SimpleNamespace, accelerator) -> tuple[dict, list[str]]:
    """(scores, texts) of what a model writes; see decoding.evaluate_task."""
    return evaluate_task(model, dataset, task, tokenizer, constants, accelerator, "writing")


def sizes(models: dict[str, tuple[Any, Path]]) -> dict[str, dict[str, int]]:
    """{name: {"parameters", "bytes": of the weights' files}} of (model, its folder)."""
    return {
        name: {
            "parameters": model.num_parameters(),
            "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        }
        for name, (model, folder) in models.items()
    }


def latency(models: dict[str, Any], dataset, tokenizer, constants: SimpleNamespace) -> dict[str, dict[str, Any]]:
    """Seconds to write batches of the first examples, {name: {batch size: {"seconds", "runs"}}}: medians, turn about.

    The same examples for all, `latency_batches` of them together, each `latency_runs` times; all write as many tokens as
    they like, which "tokens" notes. On a GPU the clock on the wall, on a CPU the time of this process's threads.
    """
    on_gpu = next(iter(models.values())).device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time  # which others on the machine disturb less
    results: dict[str, dict[str, Any]] = {name: {} for name in models}
    for size in constants.latency_batches:
        part = dataset.select(range(min(size, len(dataset))))
        runs: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(constants.latency_runs + 1):
            for name, model in models.items():
                started = clock()
                texts = generate(model, part, tokenizer, constants, model.device, size)
                if turn:  # the first warms up
                    runs[name].append(clock() - started)
                written = sum(len(ids) for ids in tokenizer(list(texts.values()))["input_ids"])
                results[name][str(size)] = {
                    "seconds": statistics.median(runs[name] or [0]),
                    "runs": runs[name],
                    "tokens": written,
                }
    return results
