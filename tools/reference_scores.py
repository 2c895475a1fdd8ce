"""What needs no fine-tuning, to read the other rows of the table against.

Reads   DATA_DIR/{task}, BASE_MODEL_PATH, and the single-task histories (for Overall).
Writes  SOURCE_PICKLE_PATH/reference_scores.json: test scores of answers that need no understanding (the most common one,
        the input's first sentence, the words after the question's last word, the nearest training example's answer), and
        of the base model as it is.
Takes   at tiny about a minute on 2 CPU cores.
"""

from expert_merging.run.constants import run

num_expert = 8  # experts in each sparse layer of the base model


def main(c):
    from pathlib import Path

    from expert_merging.switch.models import preflight

    tasks = preflight(c, c.task_types, c.num_expert)

    from expert_merging.analysis import references
    from expert_merging.core import hub
    from expert_merging.data import features
    from expert_merging.run import results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.training import evaluate, families, finetuning, overall

    accelerator = make_accelerator(c)
    folder = c.SOURCE_PICKLE_PATH.format(experts=c.num_expert)
    goals = overall.single_task_goals(folder, c.task_types, c.num_expert, c)
    tokenizer = hub.load_tokenizer(c.BASE_MODEL_PATH.format(experts=c.num_expert))
    data = {task: features.load(task, c, tokenizer) for task in tasks}
    model, ancestor = families.load_base(c, c.num_expert)
    hashes = finetuning.data_hashes(c, list(data))
    identity = results.identity(c, ancestor=ancestor, data=hashes, goals=goals)
    path, work = Path(folder) / "reference_scores.json", Path(folder) / "reference_scores.run.json"
    if results.is_done(path, identity, work, again="score"):
        return

    common, trivial = references.most_common_answers(data), references.trivial_answers(data, tokenizer)
    scored = evaluate.scoring_identity(c, hashes, goals, ancestor=ancestor)
    rows = {
        **{how: references.row(tasks, data, goals, answers) for how, answers in trivial.items()},
        "base model, not fine-tuned": evaluate.test_once(c, accelerator, model, tokenizer, data, goals, work, scored),
    }
    if accelerator.is_main_process:
        results.save(path, identity, {"rows": rows, "most_common_answers": common})
        work.unlink()
    for label, row in rows.items():
        accelerator.print(f"{label}: {overall.scores_line(row['test'], row['overall']['test'])}")


if __name__ == "__main__":
    run(main, globals())
