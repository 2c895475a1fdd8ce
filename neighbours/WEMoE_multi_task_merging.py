"""5  Why not merge the single-task models directly? Every method of model merging on the models that CAEM starts from.

Reads   DATA_DIR/{task} (datasets_preprocessing.py); the pre-trained BASE_MODEL_PATH and the single-task models in
        SOURCE_MODEL_WEIGHT_PATH (single_task_finetune.py), or any T5 or Switch folders of one shape in their places; the
        histories in SOURCE_PICKLE_PATH, by which Overall is measured, if there are any.
Writes  for each method PICKLE_PATH/{name}.json, the model as the folder MODEL_SAVE_PATH/{name}, and of WEMoE
        {name}_routing.png, a heat map of the routing weights; {name} is {current_case_name}-{method}_[{experts_num}].
Takes   at tiny some minutes on 2 CPU cores, most of it for decoding the test examples. Interrupted, it goes on.

No method sees a label, but for `fisher` and `regmean`, which look at training examples, and `wemoe_oracle`, which adapts
its routers on the answers of the test examples: a bound for what routing could reach, and no result. AdaMerging and WEMoE
adapt on the inputs of the test examples, as their papers do.
"""

from expert_merging.core.scales import by_scale
from expert_merging.merging.registry import METHODS, constants
from expert_merging.run.constants import run

globals().update(constants(METHODS.values()))  # lam, ties_keep ..: those of the registry
experts_num = 8  # experts in each sparse layer of the single-task models
methods = tuple(METHODS)  # the rows of expert_merging/merging/registry.py
statistics_examples = by_scale(paper=256, night=256, tiny=64)  # training examples a task for Fisher and RegMean
router_depth = 2  # of WEMoE's routers: linear maps, 0 to 2
adapt_losses = by_scale(
    paper=("verbalizer", "self_generated", "self_generated"),
    night=("verbalizer", "self_generated", "self_generated"),
    tiny=("verbalizer", "self_generated", "self_generated"),
)  # of each task: first_token | verbalizer | self_generated | exact_em | teacher_forced_gold (an oracle)
adapt_tokens = by_scale(paper=16, night=16, tiny=8)  # of the model's own answer, in self_generated and exact_em
adapt_steps = by_scale(paper=1000, night=200, tiny=30)  # of test-time adaptation
adapt_batch_size = by_scale(paper=16, night=16, tiny=8)  # examples of each task in a step
router_lr = by_scale(paper=1e-4, night=3e-4, tiny=5e-4)  # of WEMoE's routers; at tiny for the few steps
coefficient_lr = by_scale(paper=1e-3, night=1e-3, tiny=1e-2)  # of AdaMerging's coefficients; at tiny for the few steps
adapt_guard = "rollback"  # when a task collapses into one answer: warn | rollback | off
adapt_window = by_scale(paper=20, night=20, tiny=5)  # steps between two looks of the guard
current_case_name = "Merging"


def main(c):
    from pathlib import Path

    from expert_merging.core.errors import UserError
    from expert_merging.switch.models import preflight

    preflight(c, c.task_types, c.experts_num)

    from expert_merging.data import features
    from expert_merging.run import results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.wemoe import experiment
    from expert_merging.wemoe.sources import check_constants, open_sources

    if unknown := [method for method in c.methods if method not in METHODS]:
        raise UserError(f"there is no method {unknown[0]!r}; there are: {', '.join(METHODS)}")
    check_constants(c)

    accelerator = make_accelerator(c)
    sources = open_sources(c)
    sources.data = {task: features.load(task, c, sources.tokenizer) for task in c.task_types}
    sources.model.to(accelerator.device)
    models = Path(c.MODEL_SAVE_PATH)

    for method in [METHODS[name] for name in c.methods]:
        name = results.run_name(f"{c.current_case_name}-{method.name}", c.experts_num)
        identity = experiment.identity_of(sources, method)
        if results.is_done(f"{c.PICKLE_PATH}/{name}.json", identity, again="merge"):
            continue

        # Merge, and adapt where the method does; then test, in batches of one task and, with routing, of all.
        made = experiment.make_once(sources, models / name, identity, method)
        tested = experiment.test_once(sources, accelerator, models / name, identity)
        accelerator.print(experiment.finish(sources, accelerator, name, method.name, identity, made, tested))


if __name__ == "__main__":
    run(main, globals())
