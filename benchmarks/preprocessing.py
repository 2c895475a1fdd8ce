"""Raw examples -> features on disk: ours against the released recipe, examples a second and bytes an example.

    python benchmarks/preprocessing.py [--examples 500 7000 40000] [--pairs 5] [--threads N]

The released recipe, as its description has it: one example at a time through the tokenizer, inputs padded to 1,000 tokens
and targets to 200, the padding of targets replaced by -100 in a loop, ids and masks saved (without the texts). The texts are
the installed packages' docstrings, cut to about the lengths of AG News, SQuAD and XSum in words: real text, since how often
words repeat decides how fast ours is, and the more examples there are the more they do. 7,000 a task take all docstrings, in
which 8% of the words are new; 40,000 take them six times over, with 1.4% new, about what is to be expected of the paper's
data, which have 110 million words (a sample of 320,000 has 14% new ones, and a quarter less with every doubling). An example
costs the released recipe the same however many there are, so it gets 500 a task at most. The time is the clock's. Writes
the machine's preprocessing.json.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import machine

ROOT = Path(__file__).resolve().parent.parent

WORDS = {
    "ag_news": (29, 2),
    "squad": (80, 3),
    "xsum": (258, 14),
}  # that make about 55, 150 and 480 tokens, and 3, 5, 25
SPEED, SIZE = 10.0, 0.1  # targets
RELEASED_GETS = 500  # examples of a task


def make_examples(number: int) -> dict[str, list[dict]]:
    """Raw examples of each task, in the fields that the tasks read."""
    import numpy as np

    from expert_merging.data import docstring_reader, docstring_splits

    random = np.random.default_rng(0)
    texts = docstring_splits.pretraining_texts(docstring_reader.read_docstrings())
    random.shuffle(texts)
    words = itertools.cycle([word for text in texts for word in text.split()])

    def text(mean: int) -> str:
        return " ".join(itertools.islice(words, max(1, int(random.normal(mean, mean / 4)))))

    made = {task: [(text(long), text(short)) for _ in range(number)] for task, (long, short) in WORDS.items()}
    return {
        "ag_news": [{"text": a, "label": i % 4} for i, (a, _) in enumerate(made["ag_news"])],
        "squad": [{"question": b, "context": a, "answers": {"text": [b]}} for a, b in made["squad"]],
        "xsum": [{"document": a, "summary": b} for a, b in made["xsum"]],
    }


def released(examples: dict[str, list[dict]], tokenizer, folder: Path) -> None:
    """One example at a time, all padded to the limits."""
    from datasets import Dataset

    from expert_merging.data.tasks import get_task

    for name, rows in examples.items():
        task = get_task(name)
        fill = {"padding": "max_length", "truncation": True}

        def features(row, task=task, fill=fill):
            inputs = tokenizer(task.prompt(row), max_length=1000, **fill)
            labels = tokenizer(task.target(row), max_length=200, **fill)["input_ids"]
            labels = [-100 if token == tokenizer.pad_token_id else token for token in labels]
            return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}

        raw = Dataset.from_list(rows)
        made = raw.map(features, load_from_cache_file=False, keep_in_memory=True, remove_columns=raw.column_names)
        made.save_to_disk(str(folder / name))


def ours(examples: dict[str, list[dict]], tokenizer, folder: Path) -> None:
    """What datasets_preprocessing.py does with raw examples."""
    from expert_merging.data import features

    constants = SimpleNamespace(
        scale="paper", reading="paper", DATA_DIR=str(folder), BASE_MODEL_PATH="base_models/tiny-{experts}",
        AG_NEWS_PATH="", SQUAD_PATH="", XSUM_PATH="", max_input_length=1000, max_decoder_length=200,
        train_examples=0, validation_examples=0, test_examples=0,
    )  # fmt: skip
    for name, rows in examples.items():
        features.prepare(name, constants, tokenizer, {"train": rows, "validation": rows[:1], "test": rows[:1]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--examples", type=int, nargs="+", default=[500, 7000, 40000], help="of each task [500 7000 40000]"
    )
    parser.add_argument("--pairs", type=int, default=5, help="measurements [5]")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores to use [all]")
    chosen = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if chosen.threads == 1 else "true"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: chosen.threads])
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "base_models" / "tiny-8")
    every, rows = make_examples(max(chosen.examples)), []
    for number in chosen.examples:
        examples = {task: of_task[:number] for task, of_task in every.items()}
        words = [word for of_task in examples.values() for one in of_task for word in str(one).split()]
        part = {task: of_task[:RELEASED_GETS] for task, of_task in examples.items()}
        rates, sizes = [], []
        for _ in range(chosen.pairs):
            rate, size = [], []
            for recipe, given in ((ours, examples), (released, part)):
                total = sum(map(len, given.values()))
                with tempfile.TemporaryDirectory() as folder:
                    started = time.perf_counter()
                    recipe(given, tokenizer, Path(folder))
                    rate.append(total / (time.perf_counter() - started))
                    size.append(sum(file.stat().st_size for file in Path(folder).rglob("*.arrow")) / total)
            rates.append(rate)
            sizes.append(size)
        for what, pairs, target, unit in (
            ("speed", rates, SPEED, "examples/s"),
            ("disk", sizes, SIZE, "bytes an example"),
        ):
            row = {
                "name": f"preprocessing, {number} examples a task: {what}", "target": target if number > 500 else None,
                "ratio": round(statistics.median(a / b for a, b in pairs), 3), "unit": unit,
                "better": "higher" if what == "speed" else "lower",
                "new words": round(len(set(words)) / len(words), 4),
            }  # fmt: skip
            row |= {
                key: round(statistics.median(values), 1)
                for key, values in zip(("ours", "theirs"), zip(*pairs, strict=True), strict=True)
            }
            rows.append(row | {"pairs": [[round(a, 1), round(b, 1)] for a, b in pairs]})
            print("{name}: {ours} {unit} against {theirs}: ratio {ratio}, target {target}".format(**row))
    machine.write("preprocessing", {"rows": rows})


if __name__ == "__main__":
    main()
