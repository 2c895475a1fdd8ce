"""5  Why not merge the single-task models directly? Every method of model merging on the models that CAEM starts from.

Reads   DATA_DIR/{task} (datasets_preprocessing.py); the pre-trained BASE_MODEL_PATH and the single-task models in
        SOURCE_MODEL_WEIGHT_PATH (single_task_finetune.py), or any T5 or Switch folders of one shape in their places; the
        histories in SOURCE_PICKLE_PATH, by which Overall is measured, if there are any.
Writes  for each method PICKLE_PATH/{name}.pkl and .json, the model as the folder MODEL_SAVE_PATH/{name}, and of WEMoE
        {name}_routing.png, a heat map of the routing weights; {name} is {current_case_name}-{method}_[{experts_num}].
Takes   at tiny some minutes on 2 CPU cores, most of it for decoding the test examples. Interrupted, it goes on.

No method sees a label, but for `fisher` and `regmean`, which look at training examples, and `wemoe_oracle`, which adapts
its routers on the answers of the test examples: a bound for what routing could reach, and no result. AdaMerging and WEMoE
adapt on the inputs of the test examples, as their papers do.
"""

from expert_merging.core.scales import by_scale
from expert_merging.run.constants import run

experts_num = 8  # experts in each sparse layer of the single-task models
methods = (
    "average", "task_arithmetic", "ties", "ties_sum", "dare", "dare_ties", "fisher", "regmean", "adamerging_task",
    "adamerging_layer", "adamerging_plus", "wemoe", "ewemoe", "wemoe_batch", "wemoe_oracle",
)  # fmt: skip
lam = 0.3  # weight of the task vectors in sums (task arithmetic, DARE, TIES), and at first of AdaMerging and WEMoE
ties_lam = 1.0  # weight of TIES' disjoint mean: its paper's, for want of validation data
ties_keep = 0.2  # share of each task vector that TIES and AdaMerging++ keep
dare_drop = 0.5  # share of each task vector that DARE drops
statistics_examples = by_scale(paper=256, small=256, tiny=64)  # training examples a task for Fisher and RegMean
router_depth = 2  # of WEMoE's routers: linear maps, 0 to 2
prune_ratio = 0.9  # share of each task vector that E-WEMoE drops
adapt_losses = by_scale(
    paper=("verbalizer", "self_generated", "self_generated"),
    small=("verbalizer", "self_generated", "self_generated"),
    tiny=("verbalizer", "self_generated", "self_generated"),
)  # of each task: first_token | verbalizer | self_generated | exact_em | teacher_forced_gold (an oracle)
adapt_tokens = by_scale(paper=16, small=16, tiny=8)  # of the model's own answer, in self_generated and exact_em
adapt_steps = by_scale(paper=1000, small=200, tiny=30)  # of test-time adaptation
adapt_batch_size = by_scale(paper=16, small=16, tiny=8)  # examples of each task in a step
router_lr = by_scale(paper=1e-4, small=3e-4, tiny=5e-4)  # of WEMoE's routers; at tiny for the few steps
coefficient_lr = by_scale(paper=1e-3, small=1e-3, tiny=1e-2)  # of AdaMerging's coefficients; at tiny for the few steps
adapt_guard = "rollback"  # when a task collapses into one answer: warn | rollback | off
adapt_window = by_scale(paper=20, small=20, tiny=5)  # steps between two looks of the guard
current_case_name = "Merging"


def main(c):
    from pathlib import Path

    from expert_merging.core.errors import UserError
    from expert_merging.switch.models import preflight

    preflight(c, c.task_types, c.experts_num)

    from expert_merging import merging
    from expert_merging.data import features
    from expert_merging.run import results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.wemoe import experiment
    from expert_merging.wemoe.experiment import Made

    # A line a method: the constants that it depends on, and what it makes of the models.
    adapt = "lam seed adapt_losses adapt_tokens adapt_steps adapt_batch_size adapt_guard adapt_window"
    ada, we = f"{adapt} coefficient_lr", f"{adapt} router_lr router_depth"
    gold = ("teacher_forced_gold",) * len(c.task_types)
    lines = {
        "average": ("", lambda: Made(merging.simple_average(base, tuned))),
        "task_arithmetic": ("lam", lambda: Made(merging.task_arithmetic(base, tuned, c.lam))),
        "ties": ("ties_lam ties_keep", lambda: Made(merging.ties(base, tuned, c.ties_lam, c.ties_keep, "mean"))),
        "ties_sum": ("lam ties_keep", lambda: Made(merging.ties(base, tuned, c.lam, c.ties_keep, "sum"))),
        "dare": (
            "lam dare_drop seed",
            lambda: Made(merging.dare_task_arithmetic(base, tuned, c.lam, c.dare_drop, c.seed)),
        ),
        "dare_ties": (
            "ties_lam dare_drop ties_keep seed",
            lambda: Made(merging.dare_ties(base, tuned, c.ties_lam, c.dare_drop, c.seed, c.ties_keep)),
        ),
        "fisher": ("statistics_examples", lambda: Made(merging.fisher(base, tuned, sources.fisher_information()))),
        "regmean": ("statistics_examples", lambda: Made(merging.regmean(base, tuned, sources.gram_matrices()))),
        "adamerging_task": (ada, lambda: sources.adamerging(layer_wise=False)),
        "adamerging_layer": (ada, lambda: sources.adamerging(layer_wise=True)),
        "adamerging_plus": (ada + " ties_keep", lambda: sources.adamerging(layer_wise=True, keep=c.ties_keep)),
        "wemoe": (we, lambda: sources.wemoe()),
        "ewemoe": (we + " prune_ratio", lambda: sources.wemoe(share_router=True, prune=c.prune_ratio)),
        "wemoe_batch": (we, lambda: sources.wemoe(routing="batch")),
        "wemoe_oracle": (we, lambda: sources.wemoe(losses=gold)),
    }
    if unknown := [method for method in c.methods if method not in lines]:
        raise UserError(f"there is no method {unknown[0]!r}; there are: {', '.join(lines)}")
    experiment.check_constants(c)

    accelerator = make_accelerator(c)
    sources = experiment.open_sources(c)
    sources.data = {task: features.load(task, c, sources.tokenizer) for task in c.task_types}
    sources.model.to(accelerator.device)
    base, tuned, models = sources.base, sources.tuned, Path(c.MODEL_SAVE_PATH)

    for method in c.methods:
        constants, make = lines[method]
        name = results.run_name(f"{c.current_case_name}-{method}", c.experts_num)
        identity = experiment.identity_of(sources, method, constants.split())
        if results.is_done(f"{c.PICKLE_PATH}/{name}.json", identity, again="merge"):
            continue

        # Merge, and adapt where the method does; then test, in batches of one task and, with routing, of all.
        made = experiment.make_once(sources, models / name, identity, make)
        tested = experiment.test_once(sources, accelerator, models / name, identity)
        accelerator.print(experiment.finish(sources, accelerator, name, method, identity, made, tested))


if __name__ == "__main__":
    run(main, globals())
