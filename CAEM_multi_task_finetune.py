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
merging = "caem"  # caem | average (slot by slot, a control) | m_smoe | hc_smoe | reap | most_used | at_random
alpha = 1.0  # 1 shares by entropy (CAEM), 0 evenly (CAEM-Avg), between: a blend
shares = "entropy"  # what CAEM shares by: entropy | inverse | tokens | random | a task, which gets all but the least
calibration = "none"  # after merging: none | routers, each fitted to what the sources choose, all else fixed
pool_inputs = 256  # validation inputs a task that m_smoe ... most_used and calibration look at; 0: all
current_case_name = "CAEM"
merge_only = False  # stop after merging


def main(c):
    from pathlib import Path

    from expert_merging.switch.models import preflight

    preflight(c, c.task_types)

    from expert_merging.run import results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.training import caem_sources, evaluate, families, finetuning, overall

    accelerator = make_accelerator(c, can_shard=True)
    name = results.run_name(c.current_case_name, c.source_experts_num, c.target_experts_num)
    work, merged = (Path(c.MODEL_SAVE_PATH) / f"{name}{end}" for end in (".run", "_merged"))
    sources = caem_sources.open_sources(c, c.task_types, c.source_experts_num, c.target_experts_num)
    data, goals = ({}, None) if c.merge_only else data_and_goals(c, sources[0].tokenizer)
    hashes = finetuning.data_hashes(c, list(data))
    identity = results.identity(c, data=hashes, goals=goals, **caem_sources.sources_identity(sources))
    if is_done(c, Path(c.PICKLE_PATH) / f"{name}.json", identity, work):
        return

    # Merge: experts by entropy and usage, all else averaged (Algorithm 1). The result is an ordinary model folder.
    record = caem_sources.merge_sources(c, accelerator, sources, merged)
    if c.merge_only:
        accelerator.print(f"the merged model is in {merged}")
        return

    # What merging alone gives.
    model, tokenizer = families.load_model(merged, "merged model"), sources[0].tokenizer
    scored = evaluate.scoring_identity(c, hashes, goals, merging=caem_sources.merging_identity(c, sources))
    before = evaluate.test_once(c, accelerator, model, tokenizer, data, goals, merged / "test.json", scored)
    accelerator.print("merged, before fine-tuning: " + overall.scores_line(before["test"], before["overall"]["test"]))

    # Fine-tune jointly, as the baseline does.
    finetuning.finetune(
        c, accelerator, model, tokenizer, data, name=name, save_as=name + "_ep{epoch}.pt",
        work=work, identity=identity, goals=goals, more={**record, "before": before},
        models_folder=Path(c.MODEL_SAVE_PATH), histories_folder=Path(c.PICKLE_PATH),
    )  # fmt: skip


def is_done(c, history, identity, work):
    """Whether the run is done. After a whole run of the same sources and constants, `merge_only` merges again."""
    from expert_merging.core import files
    from expert_merging.run import results

    if not (c.merge_only and history.exists()):
        return results.is_done(history, identity, work, again="train")
    files.hold(history)
    results.refuse_others([history], identity, "current_case_name", but=("data", "goals"))
    return False


def data_and_goals(c, tokenizer):
    """({task: features}, what Overall divides by): what fine-tuning needs beside the merged model."""
    from expert_merging.data import features
    from expert_merging.training import overall

    folder = c.SOURCE_PICKLE_PATH.format(experts=c.target_experts_num)
    data = {task: features.load(task, c, tokenizer) for task in c.task_types}
    return data, overall.single_task_goals(folder, c.task_types, c.target_experts_num, c)


if __name__ == "__main__":
    run(main, globals())
