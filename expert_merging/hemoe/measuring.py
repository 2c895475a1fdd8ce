"""The steps measure and evaluation: for each number of experts that fire, what is activated, the loss, and the accuracy."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.core.errors import UserError
from expert_merging.core.files import hold, read_json, sha256
from expert_merging.hemoe import pipeline
from expert_merging.hemoe.dense_model import load_dense, tokenizer_of
from expert_merging.hemoe.examples import Examples
from expert_merging.hemoe.mixtures import load_converted, load_tuned
from expert_merging.hemoe.pipeline import BEFORE, seed_folder

_ALSO = {"social_iqa": "siqa"}  # what lm_eval calls a task: what its data set is called, and instructions made of it


def measure(c: SimpleNamespace) -> None:
    """On held-out examples, for each k: the share of neurons that is activated, and the loss of the right answers."""

    def prepare():
        from expert_merging.hemoe.evaluation import measure as measured

        batches = Examples(c, tokenizer_of(c)).batches("held")

        def found(model, tokenizer, tasks: tuple[str, ...]):
            return measured(model, batches if tasks == ("all",) else {task: batches[task] for task in tasks})

        return found

    _for_each_k(c, "measure", "tuning", prepare)


def evaluation(c: SimpleNamespace) -> None:
    """Accuracy by lm_eval, 0-shot, for each k."""
    names = c.eval_tasks
    if names == ("all",):
        names = tuple(sorted(path.stem for path in Path(c.EVAL_TASKS_PATH).glob("*.yaml")))
    if not names:
        raise UserError(
            f"EVAL_TASKS_PATH: {c.EVAL_TASKS_PATH} holds no task (*.yaml); the step data makes them of QUESTIONS_PATH"
        )
    # What a model tuned for one task is asked: that task, whose name begins with doc_ where it is made here.
    own = {task: name for name in names for task in (name, name.removeprefix("doc_"), _ALSO.get(name, name))}
    if strangers := [task for task in c.tune_tasks if task != "all" and task not in own]:
        raise UserError(f"tune_tasks names {strangers[0]}, which is not evaluated; eval_tasks has {', '.join(names)}")

    def prepare():
        from expert_merging.hemoe.evaluation import accuracy, load_tasks

        loaded = functools.cache(lambda tasks: load_tasks(tasks, c.EVAL_TASKS_PATH))

        def found(model, tokenizer, tasks: tuple[str, ...]):
            asked = loaded(names if tasks == ("all",) else tuple(own[task] for task in tasks))
            return accuracy(model, tokenizer, asked, c.eval_batch_size, c.eval_examples)

        return found

    files = [Path(c.EVAL_TASKS_PATH) / f"{name}.jsonl" for name in names]
    _for_each_k(c, "evaluation", "evaluation", prepare, asked_sha256=[sha256(path) for path in files if path.exists()])


def _for_each_k(c: SimpleNamespace, step: str, follows: str, prepare: Callable[[], Callable], **more: Any) -> None:
    """Write {step}.json of every model: {"k": {k: what the function that `prepare` gives finds}}, after each k anew.

    Which numbers k are asked for does not change what is found: what counts are the constants up to `follows`, and `more`.
    """
    from expert_merging.core.bars import bar as progress_bar

    function = None
    for method in (*pipeline.DENSE, *c.methods):
        for end, ks, tasks in _models(c, method):
            folder = seed_folder(c) / method
            wanted = pipeline.identity(c, follows, method=method, tune_tasks=tasks, **more)
            if end == BEFORE:  # tuning has no part in it
                asked = {name: getattr(c, name) for name in ("eval_tasks", "eval_examples") if step == "evaluation"}
                wanted = pipeline.identity(c, "model", method=method, **asked, **more)
            path = folder / f"{step}{end}.json"
            record = read_json(path) if pipeline.is_done(path, wanted) else {"k": {}}
            left = [k for k in ks if str(k) not in record["k"]]
            if not left:
                continue
            hold(path)
            from expert_merging.run.devices import make_accelerator

            function = function or prepare()
            model, tokenizer = _load(c, method, end, tasks)
            model = model.to(make_accelerator(c).device)
            for k in progress_bar(left, desc=f"{step}, {method}{end.replace('_', ', ', 1)}", unit="k"):
                if k:
                    model.config.k = k
                started = time.perf_counter()
                found = function(model, tokenizer, tasks)
                record.setdefault("seconds", {})[str(k)] = time.perf_counter() - started
                record["k"][str(k)] = found
                record = pipeline.save(c, path, wanted, record)


def _models(c: SimpleNamespace, method: str) -> list[tuple[str, list[int], tuple[str, ...]]]:
    """Of a method: what the names of its results end in, the numbers k, the tasks it was tuned on."""
    if method == "dense":
        return [("", [0], ("all",))]
    dense = method in pipeline.DENSE
    ks = [0] if dense else list(range(1, c.num_experts + 1) if 0 in c.eval_ks else c.eval_ks)
    before = [(BEFORE, [c.before_k], ("all",))] if c.before_k and not dense else []
    return before + [(end, ks, tasks) for end, tasks in pipeline.tunings(c).items()]


def _load(c: SimpleNamespace, method: str, end: str, tasks: tuple[str, ...]):
    """(the model of that name, its tokenizer)"""
    if method == "dense":
        return load_dense(c)
    folder = seed_folder(c) / method / f"tuned{end}"
    if end != BEFORE:
        tuned_as = pipeline.identity(c, "tuning", method=method, tune_tasks=tasks)
        pipeline.load(seed_folder(c) / method / f"tuning{end}.json", "tuning", tuned_as)
    if method == "dense_tuned":
        return load_dense(SimpleNamespace(**{**vars(c), "base_model": str(folder)}))
    return (load_converted(c, method) if end == BEFORE else load_tuned(folder)), tokenizer_of(c)
