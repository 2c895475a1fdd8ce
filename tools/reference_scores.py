"""What needs no fine-tuning, to read the other rows of the table against.

Reads   DATA_DIR/{task}, BASE_MODEL_PATH, and the single-task histories (for Overall).
Writes  SOURCE_PICKLE_PATH/reference_scores.json: test scores of always giving the most common training answer, of the
        input's first sentence, and of the base model as it is.
Takes   at tiny about a minute on 2 CPU cores.
"""

from expert_merging.run.constants import run

num_expert = 8  # experts in each sparse layer of the base model


def first_sentence(input_ids: list[int], tokenizer) -> str:
    """The lead of an input, after the prompt's first word: what summaries are commonly compared with."""
    text = tokenizer.decode(input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.partition(": ")[2].partition(". ")[0]


def main(c):
    from collections import Counter
    from pathlib import Path

    from expert_merging.data.tasks import get_task
    from expert_merging.switch.models import find_base, require_patch

    tasks = {task: get_task(task) for task in c.task_types}
    require_patch()
    find_base(c, c.num_expert)

    from expert_merging.core.files import write_json
    from expert_merging.data import features
    from expert_merging.run import provenance, results
    from expert_merging.run.devices import make_accelerator
    from expert_merging.switch import models
    from expert_merging.training import evaluate, finetuning, overall

    accelerator = make_accelerator(c)
    folder = Path(c.SOURCE_PICKLE_PATH.format(experts=c.num_expert))
    goals = overall.single_task_goals(str(folder), c.task_types, c.num_expert, c)
    tokenizer = models.base_tokenizer(c, c.num_expert)
    data = {task: features.load(task, c, tokenizer) for task in tasks}
    model, ancestor = models.load_base(c, c.num_expert)
    identity = results.identity(c, ancestor=ancestor, data=finetuning.data_hashes(c, list(data)), goals=goals)
    work = folder / "reference_scores.run.json"
    if results.finished(folder, "reference_scores", identity, work):
        accelerator.print(f"{folder}/reference_scores.json is there already; remove it to score again")
        return

    common = {}
    for task in tasks:
        answers = Counter(answers[0] for answers in data[task]["train"]["references"])
        # Of equally common answers the first in the alphabet.
        common[task] = min(answers, key=lambda answer: (-answers[answer], answer))
    constant = {
        task: tasks[task].score([common[task]] * len(features["test"]), features["test"]["references"])
        for task, features in data.items()
    }
    lead = {
        task: tasks[task].score([first_sentence(ids, tokenizer) for ids in features["test"]["input_ids"]],
                                features["test"]["references"])
        for task, features in data.items()
    }  # fmt: skip
    untrained = evaluate.test_once(c, accelerator, model, tokenizer, data, goals, work)
    rows = {
        "most common training answer": {
            "test": constant,
            "overall": {"test": overall.overall(constant, goals["test"])},
        },
        "first sentence of the input": {"test": lead, "overall": {"test": overall.overall(lead, goals["test"])}},
        "base model, not fine-tuned": untrained,
    }
    if accelerator.is_main_process:
        write_json(
            folder / "reference_scores.json",
            {
                "command": provenance.command(), "versions": provenance.versions(), "identity": identity, "rows": rows,
                "most_common_answers": common,
            },
        )  # fmt: skip
        work.unlink()
    for label, row in rows.items():
        accelerator.print(f"{label}: {overall.scores_line(row['test'], row['overall']['test'])}")


if __name__ == "__main__":
    run(main, globals())
