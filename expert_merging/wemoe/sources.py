"""The models that merging without joint training starts from, and what the methods want to know of them.

The methods are the rows of `merging/registry.py`; those that adapt are made here.
"""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from expert_merging.core.errors import UserError, at_least
from expert_merging.core.hub import first_line, load_tokenizer, local_folder
from expert_merging.core.safetensors_folder import SafetensorsFolder
from expert_merging.data.features import collate
from expert_merging.merging.adamerging import AdaMerged
from expert_merging.merging.fisher import diagonal_fisher
from expert_merging.merging.registry import Method
from expert_merging.merging.regmean import gram_matrices
from expert_merging.switch import models
from expert_merging.training import overall
from expert_merging.wemoe import seq2seq
from expert_merging.wemoe.adaptation import adapt, check_guard
from expert_merging.wemoe.ffn import routers
from expert_merging.wemoe.seq2seq_losses import KINDS, AnswerLoss, first_tokens


@dataclass
class Made:
    """What a method made: the tensors of an ordinary model, or a model with weight-ensembling layers; and how."""

    result: Iterable[tuple[str, torch.Tensor]] | nn.Module
    record: dict[str, Any] = field(default_factory=dict)


@dataclass
class Sources:
    """The pre-trained model and the single-task models, in the order of `tasks`.

    `base` and `tuned` map names to tensors; `goals` is what Overall divides by, None where there are no histories.
    """

    c: SimpleNamespace
    tasks: tuple[str, ...]
    model: nn.Module
    ancestor: str
    folders: list[Path]
    tuned: list[SafetensorsFolder]
    tokenizer: Any
    goals: dict[str, dict[str, float]] | None
    data: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None  # of the adaptation under way, and what it depends on
    identity: dict[str, Any] | None = None

    @property
    def base(self) -> dict[str, torch.Tensor]:
        """Only the names that files have too, so that names agree."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if name in self.tuned[0]}

    def merge(self, method: Method) -> Made:
        """What `method` makes of the models with the constants `c`."""
        arguments = method.arguments(vars(self.c))
        if method.adapts:
            return self.adamerging(**arguments) if method.adapts == "coefficients" else self.wemoe(**arguments)
        if method.statistics:
            statistics = {"information": self.fisher_information, "grams": self.gram_matrices}
            arguments[method.statistics] = statistics[method.statistics]()
        return Made(method.load()(self.base, self.tuned, **arguments))

    # -- what Fisher merging and RegMean look at

    def fisher_information(self) -> list[dict[str, torch.Tensor]]:
        """Of each single-task model, on `c.statistics_examples` training examples of its own task."""

        def logits_of(model, batch):
            labels = batch["labels"]
            return self._teacher_forced(model, batch)[labels != -100], len(labels)

        return [diagonal_fisher(model, self._batches(task, 8), logits_of) for task, model in self._tuned_models()]

    def gram_matrices(self) -> list[dict[str, torch.Tensor]]:
        """Likewise; one example at a time, since padding would count."""
        return [gram_matrices(m, self._batches(task, 1), self._teacher_forced) for task, m in self._tuned_models()]

    def _tuned_models(self):
        for task, folder in zip(self.tasks, self.folders, strict=True):
            yield task, load_seq2seq(folder, "SOURCE_MODEL_WEIGHT_PATH").to(self.model.device).eval()

    def _batches(self, task: str, size: int):
        train = self.data[task]["train"]
        for start in range(0, min(self.c.statistics_examples, len(train)), size):
            rows = train[start : min(start + size, self.c.statistics_examples, len(train))]
            examples = [
                {"input_ids": i, "labels": t} for i, t in zip(rows["input_ids"], rows["labels"], strict=True)
            ]  # fmt: skip
            batch = collate(examples, self.tokenizer.pad_token_id)
            yield {key: tensor.to(self.model.device) for key, tensor in batch.items()}

    def _teacher_forced(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        decoder_input_ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return model(**inputs, decoder_input_ids=decoder_input_ids, use_cache=False).logits

    # -- what is learnt from inputs alone

    def adamerging(self, layer_wise: bool, keep: float | None = None) -> Made:
        """AdaMerging, task- or layer-wise; with `keep` AdaMerging++."""
        started = time.perf_counter()
        tuned = [{name: one[name].to(self.model.device) for name in one} for one in self.tuned]
        learning = AdaMerged(copy.deepcopy(self.model), tuned, layer_wise, keep, self.c.lam).eval()
        merging = time.perf_counter() - started
        writing = copy.deepcopy(self.model).eval()
        loss = self._loss(learning, lambda: learning.merged(writing), self.c.adapt_losses)
        adaptation = self._adapt([learning.coefficients], loss, self.c.coefficient_lr)
        merged = learning.merged(writing).state_dict()
        coefficients = learning.coefficients.detach().cpu()
        record = {
            "adaptation": adaptation, "trainable": coefficients.numel(), "seconds_to_merge": merging,
            "coefficients": {
                "tensors": learning.names if layer_wise else ["all"],
                **{task: own.reshape(-1).tolist() for task, own in zip(self.tasks, coefficients, strict=True)},
            },
        }  # fmt: skip
        return Made(((name, merged[name]) for name in self.base), record)

    def wemoe(self, loss: str | None = None, **settings) -> Made:
        """WEMoE with `settings` of `ffn.upscale`, its routers adapted by `loss` for every task (the script's, if None)."""
        started = time.perf_counter()
        made = seq2seq.upscale(
            self.model, self.tuned, lam=self.c.lam, depth=self.c.router_depth, seed=self.c.seed, **settings
        ).eval()
        merging = time.perf_counter() - started
        parameters = [parameter for router in routers(made) for parameter in router.parameters()]
        losses = (loss,) * len(self.tasks) if loss else self.c.adapt_losses
        adaptation = self._adapt(parameters, self._loss(made, lambda: made, losses), self.c.router_lr)
        trainable = sum(parameter.numel() for parameter in parameters)
        return Made(made, {"adaptation": adaptation, "trainable": trainable, "seconds_to_merge": merging})

    def _loss(self, call, writing: Callable[[], nn.Module], losses: tuple[str, ...]) -> AnswerLoss:
        kinds = dict(zip(self.tasks, losses, strict=True))
        words = {t: first_tokens(self.data[t]["train"]["labels"], t) for t, k in kinds.items() if k == "verbalizer"}
        inputs = {task: self.data[task]["test"] for task in self.tasks}
        return AnswerLoss(
            call, self.model, writing, kinds, inputs, words, self.c.adapt_batch_size, self.c.seed, self.c.adapt_tokens
        )

    def _adapt(self, parameters: list[nn.Parameter], loss: AnswerLoss, lr: float) -> dict[str, Any]:
        assert self.checkpoint is not None  # `make_once` says where
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        record = adapt(
            parameters, self.tasks, loss, self.c.adapt_steps, lr, self.c.adapt_guard, window=self.c.adapt_window,
            checkpoint=self.checkpoint, identity=self.identity, title="adapting",
        )  # fmt: skip
        return {"losses": loss.kinds, "batch_size": self.c.adapt_batch_size, **record}


def check_constants(c: SimpleNamespace) -> None:
    """Raises UserError for constants that cannot be, before any model is read."""
    if len(c.task_types) < 2:
        raise UserError(f"task_types names {len(c.task_types)} task; merging needs two or more")
    if len(c.adapt_losses) != len(c.task_types):
        raise UserError(f"adapt_losses names {len(c.adapt_losses)} losses for {len(c.task_types)} tasks; one each")
    if unknown := [kind for kind in c.adapt_losses if kind not in KINDS]:
        raise UserError(f"adapt_losses names {unknown[0]!r}; there are {', '.join(KINDS)}")
    if c.router_depth not in (0, 1, 2):
        raise UserError(f"router_depth is {c.router_depth}; a router has 0, 1 or 2 linear maps")
    at_least(c, 1, "adapt_steps", "adapt_batch_size", "adapt_tokens", "adapt_window", "statistics_examples")
    check_guard(c.adapt_guard)


def open_sources(c: SimpleNamespace) -> Sources:
    """The models to merge, checked to fit together.

    Raises UserError where one is missing or damaged, of another shape or, as far as histories tell, another ancestor.
    """
    folders = [
        Path(c.SOURCE_MODEL_WEIGHT_PATH.format(experts=c.experts_num)) / f"single_task_{task}" for task in c.task_types
    ]
    tuned = [SafetensorsFolder(folder) for folder in folders]
    model = load_seq2seq(c.BASE_MODEL_PATH.format(experts=c.experts_num), "BASE_MODEL_PATH")
    state = model.state_dict()
    for folder, tensors in zip(folders, tuned, strict=True):
        for name in tensors:
            shape = tuple(tensors[name].shape)
            if name not in state or tuple(state[name].shape) != shape:
                own = tuple(state[name].shape) if name in state else "not there"
                raise UserError(f"{folder} is not of BASE_MODEL_PATH's shape: {name} is {shape}, there {own}")
        if missing := sorted(set(tuned[0]) ^ set(tensors)):
            raise UserError(f"{folder} and {folders[0]} are not of one shape: only one of them has {missing[0]}")
    ancestor = models.weights_sha256(model)
    pickles = c.SOURCE_PICKLE_PATH.format(experts=c.experts_num)
    goals = None
    if any((Path(pickles) / f"single_task_{task}.json").exists() for task in c.task_types):
        goals = overall.single_task_goals(pickles, c.task_types, c.experts_num, c)
        for task, folder in zip(c.task_types, folders, strict=True):
            history = overall.single_task_history(pickles, task, c.experts_num, c)
            if history["identity"].get("ancestor") != ancestor:
                raise UserError(
                    f"{folder} was not fine-tuned from BASE_MODEL_PATH ({c.BASE_MODEL_PATH}); give that model"
                )
    tokenizer = load_tokenizer(str(folders[0]), "SOURCE_MODEL_WEIGHT_PATH")
    return Sources(c, tuple(c.task_types), model.eval(), ancestor, folders, tuned, tokenizer, goals)


def load_seq2seq(path: str | Path, constant: str) -> nn.Module:
    """The encoder-decoder model, T5 or Switch, in a folder or on the hub, in float32. Raises UserError where there is none."""
    from transformers import AutoModelForSeq2SeqLM

    folder = local_folder(str(path), constant)
    try:
        return AutoModelForSeq2SeqLM.from_pretrained(folder or path, torch_dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{constant}: {path} is no whole encoder-decoder model ({first_line(error)})") from error
