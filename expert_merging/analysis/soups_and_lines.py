"""Two finished runs side by side: their soup, the line between them, and how alike they represent the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from expert_merging.analysis.cka import layerwise_cka
from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json
from expert_merging.core.safetensors_folder import SafetensorsFolder
from expert_merging.data.tasks import get_task
from expert_merging.merging.average import average
from expert_merging.run import results
from expert_merging.training import families, overall
from expert_merging.training.overall import SCORED_WITH


@dataclass(frozen=True)
class Run:
    """A finished run: its model's folder, and in `start` the merged model it began with; None is the pre-trained one."""

    name: str
    history: dict[str, Any]
    folder: Path
    config: PretrainedConfig
    weights_sha256: list[str]
    start: Path | None


def open_run(c: SimpleNamespace, name: str, history: dict[str, Any], data: dict[str, str]) -> Run:
    """The run `name` with this history, checked to be scored as this script would score (`data`: each task's hash).

    Raises UserError where its weights are missing, or it was made with other data or settings.
    """
    noted, now = results.made_with(history), results.identity(c, SCORED_WITH, **_data_entries(data, data))
    was = {key: noted[key] for key in SCORED_WITH if key in noted} | _data_entries(noted["data"], data)
    if difference := results.changes(was, now):
        raise UserError(f"{name} was scored with other constants or data ({difference}); restore them to compare it")
    folder, start = Path(c.MODEL_SAVE_PATH) / name, Path(c.MODEL_SAVE_PATH) / f"{name}_merged"
    digests = weights_sha256(folder)
    config = AutoConfig.from_pretrained(folder)
    return Run(name, history, folder, config, digests, start if start.is_dir() else None)


def _data_entries(hashes: dict[str, str], tasks: dict[str, str]) -> dict[str, str | None]:
    return {f"data of {task}": hashes.get(task) for task in tasks}


def weights_sha256(folder: Path) -> list[str]:
    """SHA-256 of each file of weights in a model's folder. Raises UserError where it holds none."""
    return SafetensorsFolder(folder).sha256()


def left_only_its_end(run: Run) -> bool:
    """Whether it is a merged model that the released code trained: what that began with was never kept."""
    noted = results.made_with(run.history)
    return run.start is None and "ancestor" not in noted and "imported" in noted


def start_sha256(run: Run) -> list[str]:
    """SHA-256 of what a run began with; nothing where only its end is left. Raises UserError where it is not there, or is
    not what the history says."""
    noted = results.made_with(run.history)
    if left_only_its_end(run):
        return []
    if run.start is None:
        if "ancestor" not in noted:
            raise UserError(
                f"{run.folder}_merged, with which {run.name} began, does not exist; bring it, or leave out cka"
            )
        return [noted["ancestor"]]
    merged = results.made_with(read_json(run.start / "merging.json"))
    if difference := results.changes({key: noted.get(key, merged[key]) for key in merged}, merged):
        raise UserError(f"{run.start} is not what {run.name} began with ({difference}); bring that, or leave out cka")
    return weights_sha256(run.start)


def load_start(c: SimpleNamespace, run: Run):
    """The model that a run began with. Raises UserError where BASE_MODEL_PATH now names another one."""
    if run.start is not None:
        return families.load_model(run.start, "MODEL_SAVE_PATH")
    model, ancestor = families.load_base(c, run.history["experts_num"])
    if ancestor != run.history["identity"]["ancestor"]:
        raise UserError(
            f"BASE_MODEL_PATH: {c.BASE_MODEL_PATH} is not the model that {run.name} began with; bring that one"
        )
    return model


def load_end(c: SimpleNamespace, run: Run):
    """The model that a run ended with."""
    return families.load_model(run.folder, "MODEL_SAVE_PATH")


def check_averages(first: Run, second: Run) -> None:
    """Raises UserError where the two models have no weights in between."""
    experts = [families.family_of(run.config).experts_of(run.config) for run in (first, second)]
    if experts[0] != experts[1]:
        raise UserError(
            f"{first.name} has {experts[0]} experts a sparse layer and {second.name} {experts[1]}: soup and line need the "
            "same number; give --measures cka"
        )
    scaled = {run.config.tie_word_embeddings or _separate(run) for run in (first, second)}
    if len(scaled) > 1:
        raise UserError(
            f"only one of {first.name} and {second.name} has an output projection tied to its embedding, and they scale "
            "its inputs differently: soup and line make no sense; give --measures cka"
        )


def _separate(run: Run) -> bool:
    return getattr(run.config, "separate_embeddings", False)


class Line:
    """The straight line between two runs' weights, experts slot by slot; `model` holds one point of it at a time.

    Raises UserError where the two are not of one shape.
    """

    def __init__(self, first: Run, second: Run, device):
        # Where only one model has projections of its own, so have the points in between.
        self.model = families.load_model((second if _separate(second) else first).folder, "MODEL_SAVE_PATH").to(device)
        self.between = f"{first.name} and {second.name}"
        self.ends = [SafetensorsFolder(run.folder) for run in (first, second)]
        modules = {module: name for name, module in self.model.named_modules()}
        self.embedding = f"{modules[self.model.get_input_embeddings()]}.weight"
        names = set(self.model.state_dict())
        for end in self.ends:
            if odd := sorted((set(end) - names) | (names - set(end) - set(self.model._tied_weights_keys))):
                raise UserError(f"{self.between} are not of one shape: only one of them has {odd[0]}")

    def move_to(self, t: float) -> None:
        """Put `model` at (1 - t) first + t second, a tensor at a time."""
        for name, place in self.model.state_dict().items():
            # Files hold tied weights once.
            pair = [{name: end[name if name in end else self.embedding]} for end in self.ends]
            try:
                place.copy_(average(pair, [1 - t, t])[name])
            except ValueError as error:
                raise UserError(f"{self.between} are not of one shape: {error}") from error


def soup(
    c: SimpleNamespace, accelerator, runs: tuple[Run, Run], tokenizer, data: dict, goals: dict, advance: Callable[[], Any]
) -> dict[str, Any]:  # fmt: skip
    """The equal average of both models on test, without fine-tuning (paper, tables 4 and 5), beside its parents.

    `advance` is called after each task. Returns {"test": {task: scores}, "overall": number, "parents": {"first": {"test",
    "overall"}, "second": ...}}; the parents' scores are their histories'.
    """
    line = Line(*runs, accelerator.device)
    line.move_to(0.5)
    test, family = {}, families.family_of(line.model)
    for task, features in data.items():
        test[task], _ = family.evaluate_task(
            line.model, features["test"], get_task(task), tokenizer, c, accelerator, f"soup: {task}"
        )
        test[task]["loss"] = family.task_loss(line.model, features["test"], tokenizer, c, accelerator)
        advance()
    parents = {}
    for which, run in zip(("first", "second"), runs, strict=True):
        scores = {task: run.history[f"{task}_data"]["test"] for task in data}
        parents[which] = {"test": scores, "overall": overall.overall(scores, goals["test"])}
    return {"test": test, "overall": overall.overall(test, goals["test"]), "parents": parents}


def line(
    c: SimpleNamespace, accelerator, runs: tuple[Run, Run], tokenizer, data: dict, advance: Callable[[], Any]
) -> dict[str, Any]:
    """Cross-entropy on validation along the line between both models, at both ends and `line_points` between them.

    `advance` is called after each task of each point. Returns {"t": [...], "loss": {task: nats a target token at each t},
    "mean": [over tasks], "barrier": number, "at": t}. The barrier is by how much `mean` rises above the straight line
    between its ends at most, never negative; `at` is where.
    """
    between = Line(*runs, accelerator.device)
    family = families.family_of(between.model)
    places = [i / (c.line_points + 1) for i in range(c.line_points + 2)]
    loss: dict[str, list[float]] = {task: [] for task in data}
    for t in places:
        between.move_to(t)
        for task, features in data.items():
            loss[task].append(family.task_loss(between.model, features["validation"], tokenizer, c, accelerator))
            advance()
    mean = [sum(values) / len(values) for values in zip(*loss.values(), strict=True)]
    above = [value - ((1 - t) * mean[0] + t * mean[-1]) for t, value in zip(places, mean, strict=True)]
    above[0] = above[-1] = 0.0
    barrier = max(above)
    return {"t": places, "loss": loss, "mean": mean, "barrier": barrier, "at": places[above.index(barrier)]}


def cka(
    c: SimpleNamespace, accelerator, runs: tuple[Run, Run], tokenizer, data: dict, advance: Callable[[], Any]
) -> dict[str, Any]:
    """Layer-wise linear CKA on validation between what both runs began with, and between what they became.

    `advance` is called after each task of each pair. Of several processes each computes all of it. Returns {"before":
    {task: {stack: [a value a layer]}}, "after": ...}, without "before" where a start is not known.
    """
    result: dict[str, Any] = {}
    for when in ("after",) if any(map(left_only_its_end, runs)) else ("before", "after"):
        load = load_start if when == "before" else load_end
        first, second = (load(c, run).to(accelerator.device) for run in runs)
        result[when] = {}
        for task, features in data.items():
            examples = features["validation"]
            examples = examples.select(range(min(c.cka_examples or len(examples), len(examples))))
            label = f"cka {when}: {task}" if accelerator.is_main_process else ""
            try:
                result[when][task] = layerwise_cka(first, second, examples, tokenizer, c, accelerator.device, label)
            except ValueError as error:
                raise UserError(
                    f"{runs[0].name} and {runs[1].name} cannot be compared by cka on {task}: {error}"
                ) from error
            advance()
        del first, second  # two models at a time, not four
    return result
