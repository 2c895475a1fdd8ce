"""The steps measure and evaluation: for each number of experts that fire, what is activated, the loss, and the accuracy."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from expert_merging.core.errors import UserError
from expert_merging.core.files import hold, read_json
from expert_merging.hemoe import pipeline
from expert_merging.hemoe.dense_model import load_dense, tokenizer_of
from expert_merging.hemoe.examples import Examples
from expert_merging.hemoe.mixtures import load_mixture
from expert_merging.hemoe.pipeline import seed_folder


def measure(c: SimpleNamespace) -> None:
    """On held-out examples, for each k: the share of neurons that is activated, and the loss of the right answers."""

    def prepare():
        from expert_merging.hemoe.evaluation import measure as measured

        batches = Examples(c, tokenizer_of(c)).batches("held")
        return lambda model, tokenizer: measured(model, batches)

    _for_each_k(c, "measure", "tuning", prepare)


def evaluation(c: SimpleNamespace) -> None:
    """Accuracy by lm_eval, 0-shot, for each k."""

    def prepare():
        from expert_merging.hemoe.evaluation import accuracy, load_tasks

        names = c.eval_tasks
        if names == ("all",):
            names = tuple(sorted(path.stem for path in Path(c.EVAL_TASKS_PATH).glob("*.yaml")))
        tasks = load_tasks(names, c.EVAL_TASKS_PATH)
        return lambda model, tokenizer: accuracy(model, tokenizer, tasks, c.eval_batch_size, c.eval_examples)

    _for_each_k(c, "evaluation", "evaluation", prepare)


def _for_each_k(c: SimpleNamespace, step: str, follows: str, prepare: Callable[[], Callable]) -> None:
    """Write {step}.json of every model: {"k": {k: what the function that `prepare` gives finds}}, after each k anew.

    Which numbers k are asked for does not change what is found: the constants that count are those up to `follows`.
    """
    from expert_merging.core.bars import bar as progress_bar

    function = None
    for method in (*pipeline.DENSE, *c.methods):
        folder, wanted = seed_folder(c) / method, pipeline.identity(c, follows, method=method)
        path = folder / f"{step}.json"
        every = list(range(1, c.num_experts + 1))
        ks = [0] if method in pipeline.DENSE else every if 0 in c.eval_ks else list(c.eval_ks)
        record = read_json(path) if pipeline.is_done(path, wanted) else {"k": {}}
        left = [k for k in ks if str(k) not in record["k"]]
        if not left:
            continue
        hold(path)
        from expert_merging.run.devices import make_accelerator

        function = function or prepare()
        if method in pipeline.DENSE:
            model, tokenizer = load_dense(c) if method == "dense" else _load_tuned_dense(c, folder / "tuned")
        else:
            model, tokenizer = load_mixture(folder / "tuned"), tokenizer_of(c)
        model = model.to(make_accelerator(c).device)
        for k in progress_bar(left, desc=f"{step}, {method}", unit="k"):
            if k:
                model.config.k = k
            record["k"][str(k)] = function(model, tokenizer)
            record = pipeline.save(c, path, wanted, record)


def _load_tuned_dense(c: SimpleNamespace, folder: Path):
    if not folder.exists():
        raise UserError(f"{folder} does not exist; run the step tuning first")
    return load_dense(SimpleNamespace(**{**vars(c), "base_model": str(folder)}))
