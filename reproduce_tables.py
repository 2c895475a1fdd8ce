"""Run what is missing of the experiment, in order, then print the tables and draw the figures.

Reads   what the other scripts read; runs them one after another with this script's constants.
Writes  what they write, and REPORT_DIR: table.md, .csv, .json and figures (.png).
Takes   at tiny about a quarter of an hour on 2 CPU cores, and seconds when all is there. Interrupted, it goes on.
"""

from expert_merging.constants import run

num_expert = 8
alpha = 1.0
REPORT_DIR = "{RUN_DIR}/seed{seed}/report"  # tables and figures


def main(c):
    from pathlib import Path

    from expert_merging import histories, report, steps
    from expert_merging.models import require_patch
    from expert_merging.tasks import get_task

    require_patch()
    tasks = {task: get_task(task).main_score for task in c.task_types}
    n, sources = c.num_expert, c.SOURCE_PICKLE_PATH.format(experts=c.num_expert)
    configurations = {
        f"Baseline-{n}": steps.Step(
            "Baseline_multi_task_finetune.py", {"experts_num": n}, Path(c.PICKLE_PATH) / f"Baseline_[{n}].json"
        ),
        f"CAEM-{n}": steps.Step(
            "CAEM_multi_task_finetune.py", {"source_experts_num": n, "target_experts_num": n, "alpha": c.alpha},
            Path(c.PICKLE_PATH) / f"CAEM_[{n}|{n}].json",
        ),
    }  # fmt: skip
    single_task = {
        task: steps.Step(
            "single_task_finetune.py", {"task_type": task, "num_expert": n}, Path(sources) / f"single_task_{task}.json"
        )
        for task in tasks
    }
    features = [
        steps.Step("datasets_preprocessing.py", {"num_expert": n}, Path(c.DATA_DIR) / task / "complete.json")
        for task in tasks
    ]
    reference = steps.Step("reference_scores.py", {"num_expert": n}, Path(sources) / "reference_scores.json")

    steps.run_missing([*features, *single_task.values(), reference, *configurations.values()], c)

    singles = {task: histories.read(step.result) for task, step in single_task.items()}
    runs = {label: histories.read(step.result) for label, step in configurations.items()}
    references = histories.read(reference.result)["rows"]
    text = report.write_report(
        Path(c.REPORT_DIR), f"CAEM-MoE at scale {c.scale}, seed {c.seed}", tasks, references, singles, runs
    )
    print(text)
    print(f"tables and figures are in {c.REPORT_DIR}")


if __name__ == "__main__":
    run(main, globals())
