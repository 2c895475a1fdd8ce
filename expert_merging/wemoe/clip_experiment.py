"""What neighbours/WEMoE_clip.py compares: which tasks and groups an experiment has, and the models that it merges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from expert_merging.core.errors import UserError, at_least
from expert_merging.core.files import sha256
from expert_merging.core.hub import local_folder, weights_sha256
from expert_merging.run import results
from expert_merging.wemoe import checkpoints, clip, report
from expert_merging.wemoe.classification import Settings, changed, check_adaptation, expanded
from expert_merging.wemoe.corruptions import CORRUPTIONS, corrupting
from expert_merging.wemoe.scoring import Task

DEPENDS_ON = (
    "CLIP_PATH",
    "EXPERT_PATH",
    "DATASET_PATH",
    "CLASS_NAMES_PATH",
    "clip_tasks",
    "unseen_tasks",
    "robust_tasks",
    "lam",
    "first_layer",
    "adapt_lr",
    "adapt_steps",
    "adapt_batch_size",
    "adamerging_lr",
    "guard",
    "guard_floor",
    "images_per_batch",
    "images_per_task",
    "seed",
    "experiment",
)  # the constants that a record follows from
EXPERIMENTS = ("multi_task", "generalization", "robustness")


@dataclass(frozen=True)
class Experiment:
    """`methods` by which to merge; `tasks` to test on, of which `unseen` are not merged; a record a method for each of
    `groups`: seeds or corruptions.

    `apart`: entries of the `identity` in which the groups of one table differ.
    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    unseen: tuple[str, ...]
    groups: tuple[str, ...]
    apart: tuple[str, ...]
    identity: dict[str, Any]


@dataclass
class Pool:
    """theta_0, {task: the tensors of its fine-tuned vision tower}, and what tells images apart: the tasks' data and heads."""

    base: nn.Module
    experts: Mapping[str, Mapping[str, torch.Tensor]]
    images: dict[str, clip.Images]
    heads: dict[str, torch.Tensor]
    processor: Any
    settings: Settings


def experiment_of(c: SimpleNamespace) -> Experiment:
    """What the constants ask for. Raises UserError for what cannot be, before any model is read."""
    if c.experiment not in EXPERIMENTS:
        raise UserError(f"there is no experiment {c.experiment!r}; there are {', '.join(EXPERIMENTS)}")
    methods = expanded(c.methods, c.prune_ratios)
    check_adaptation(c)
    at_least(c, 1, "images_per_batch")
    robust = c.experiment == "robustness"
    if wrong := [group for group in c.corruptions if robust and group != "clean" and group not in CORRUPTIONS]:
        raise UserError(f"there is no corruption {wrong[0]!r}; there are: clean, {', '.join(CORRUPTIONS)}")
    tasks = c.robust_tasks if robust else c.clip_tasks
    unseen = c.unseen_tasks if c.experiment == "generalization" else ()
    merged = [task for task in tasks if task not in unseen]
    if not merged:
        raise UserError(f"unseen_tasks leaves none of {', '.join(tasks)} to merge")
    return Experiment(
        methods=methods,
        tasks=tasks,
        unseen=unseen,
        groups=c.corruptions if robust else (f"seed{c.seed}",),
        apart=() if robust else ("seed",),
        identity=results.identity(c, (*DEPENDS_ON, *changed(c)), **_contents(c, merged)),
    )


def _contents(c: SimpleNamespace, merged: Sequence[str]) -> dict[str, Any]:
    """Of what lies in local folders the hashes, in the place of where it lies."""
    paths = {task: c.EXPERT_PATH.replace("*", task) for task in merged}
    found: dict[str, Any] = {}
    if local_folder(c.CLIP_PATH, "CLIP_PATH"):
        found["CLIP_PATH"] = weights_sha256(c.CLIP_PATH)
    if any([local_folder(path, "EXPERT_PATH") for path in paths.values()]):  # each is looked at
        found["EXPERT_PATH"] = {task: weights_sha256(path) for task, path in paths.items()}
    if c.CLASS_NAMES_PATH:
        names = sorted(Path(c.CLASS_NAMES_PATH).expanduser().glob("*.json"))
        found["CLASS_NAMES_PATH"] = {path.stem: sha256(path) for path in names}
    return found


def open_pool(c: SimpleNamespace, e: Experiment, device: torch.device) -> Pool:
    """The models to merge, and the test images with each task's frozen head, made by the text tower.

    Raises UserError where one is missing or does not fit, for a `clip_size` that is not CLIP's, and for a `first_layer` that
    it does not have.
    """
    base, text, tokenizer, processor = clip.load_clip(c.CLIP_PATH, "CLIP_PATH")
    clip.check_size(c.clip_size, base, c.CLIP_PATH)
    layers = base.config.num_hidden_layers
    if not 0 <= c.first_layer < layers:
        raise UserError(f"first_layer is {c.first_layer}; {c.CLIP_PATH} has layers 0 to {layers - 1}")
    state = base.state_dict()
    experts = {
        task: clip.Expert(c.EXPERT_PATH.replace("*", task), "EXPERT_PATH", state)
        for task in e.tasks if task not in e.unseen
    }  # fmt: skip
    images = {
        task: clip.Images(*clip.data_of(task, c.DATASET_PATH), "test", "DATASET_PATH", c.images_per_task)
        for task in e.tasks
    }
    heads = clip.heads_of(text.to(device), tokenizer, images, c.CLASS_NAMES_PATH)
    settings = Settings.of(
        c, seed=c.seed, eval_batch_size=c.images_per_batch, logit_scale=text.logit_scale.exp().item(),
        layers=range(c.first_layer, layers) if c.first_layer else None,
    )  # fmt: skip
    return Pool(base, experts, images, heads, processor, settings)


def tasks_of(c: SimpleNamespace, e: Experiment, pool: Pool, group: str, device: torch.device) -> list[Task]:
    """The tasks with their test images, as they are or corrupted as `group` says."""
    made = [
        clip.test_task(task, pool.images[task], pool.heads[task], pool.processor, c, group, corrupting)
        for task in e.tasks
    ]
    return [task.to(device) for task in made]


def noted(
    c: SimpleNamespace, e: Experiment, found: dict[str, Any], model: nn.Module | None, place: Path
) -> dict[str, Any]:
    """Further entries of a record: means over tasks merged and not; of a WEMoE the bytes of its files, which are written to
    `place`.routers.safetensors and, where models are to be kept, the folder `place`."""
    more: dict[str, Any] = report.seen_and_unseen(found, e.tasks, e.unseen) if e.unseen else {}
    if hasattr(model, "wemoe"):
        checkpoints.save_routers(model, place.with_name(f"{place.name}.routers.safetensors"))
        more["files"] = checkpoints.save(model, place) if c.save_models else {}
    return more
