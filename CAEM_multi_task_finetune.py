"""4  CAEM: merge the single-task models by the entropy of their expert usage, then the same joint fine-tuning.

Reads   DATA_DIR/{task} (datasets_preprocessing.py); the single-task models in SOURCE_MODEL_WEIGHT_PATH and their histories
        with the expert usage in SOURCE_PICKLE_PATH (single_task_finetune.py with num_expert = source_experts_num; Overall
        is measured by those with target_experts_num).
Writes  MODEL_SAVE_PATH/CAEM_[{source}|{target}]_ep{n}.pt (n: the best epoch by Overall on validation), the same weights as
        the folder CAEM_[{source}|{target}], the merged model before fine-tuning as CAEM_[{source}|{target}]_merged, and
        PICKLE_PATH/CAEM_[{source}|{target}].pkl and .json, with the experts each task got in each layer.
Takes   as the baseline does, and some seconds more. Interrupted, it goes on.
"""

from expert_merging.run.constants import run

source_experts_num = 8  # experts in each sparse layer of the single-task models
target_experts_num = 8  # of the merged model: at least one for each task, at most all they have
merging = "caem"  # caem | average: every tensor averaged, experts slot by slot, as a control
alpha = 1.0  # 1 shares by entropy (CAEM), 0 evenly (CAEM-Avg), between: a blend
current_case_name = "CAEM"
merge_only = False  # stop after merging


def main(c):
    from pathlib import Path

    from expert_merging.data.tasks import get_task
    from expert_merging.switch.models import require_patch

    for task in c.task_types:
        get_task(task)
    require_patch()

    from expert_merging.data import features
    from expert_merging.run import results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.switch import models
    from expert_merging.training import caem_sources, evaluate, finetuning, overall

    accelerator = make_accelerator(c, can_shard=True)
    name = f"{c.current_case_name}_[{c.source_experts_num}|{c.target_experts_num}]"
    work = Path(c.MODEL_SAVE_PATH) / f"{name}.run"
    sources = caem_sources.open_sources(c, c.task_types, c.source_experts_num, c.target_experts_num)
    tokenizer = sources[0].tokenizer
    data = {} if c.merge_only else {task: features.load(task, c, tokenizer) for task in c.task_types}
    goals = None
    if not c.merge_only:
        goals_folder = c.SOURCE_PICKLE_PATH.format(experts=c.target_experts_num)
        goals = overall.single_task_goals(goals_folder, c.task_types, c.target_experts_num, c)
    identity = results.identity(
        c, data=finetuning.data_hashes(c, list(data)), goals=goals,
        sources={source.task: source.weights_sha256 for source in sources},
    )  # fmt: skip
    if results.finished(c.PICKLE_PATH, name, identity, work):
        accelerator.print(f"{c.PICKLE_PATH}/{name}.json is there already; remove it to train again")
        return

    # Merge: experts by entropy and usage, all else averaged (Algorithm 1). The result is an ordinary model folder.
    merged_folder = Path(c.MODEL_SAVE_PATH) / f"{name}_merged"
    record = caem_sources.merge_sources(c, accelerator, sources, merged_folder)
    if c.merging == "caem":
        accelerator.print(caem_sources.allocation_lines(record, c.task_types))
    if c.merge_only:
        accelerator.print(f"the merged model is in {merged_folder}")
        return
    model = models.load_model(merged_folder, "merged model")

    # What merging alone gives.
    before = evaluate.test_once(c, accelerator, model, tokenizer, data, goals, merged_folder / "test.json")
    accelerator.print(
        "merged, before fine-tuning: " + overall.scores_line(before["test"], before["overall"]["test"])
    )

    # Fine-tune jointly, as the baseline does.
    history = finetuning.finetune(
        c, accelerator, model, tokenizer, data, name=name, save_as=name + "_ep{epoch}.pt",
        work=work, identity=identity, goals=goals, more={**record, "before": before},
        models_folder=Path(c.MODEL_SAVE_PATH), histories_folder=Path(c.PICKLE_PATH),
    )  # fmt: skip

    accelerator.print(overall.summary(history))


if __name__ == "__main__":
    run(main, globals())
