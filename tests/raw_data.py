"""Raw data in the published formats, small and made up, and a tokenizer of its words: what several tests need."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

SUBJECTS = (
    "the river",
    "a striker",
    "the bank",
    "a telescope",
    "the council",
    "an engine",
    "the market",
    "a goalkeeper",
)
VERBS = ("rose", "fell", "won", "lost", "opened", "closed", "moved", "waited")
PLACES = ("in London", "near Oslo", "at night", "on Monday", "for years", "without warning", "in 1998", "by train")


def sentences(count: int) -> list[str]:
    """`count` different sentences of different length."""
    made = []
    for i in range(count):
        words = [SUBJECTS[i % 8], VERBS[i // 8 % 8], PLACES[i // 64 % 8], *PLACES[: i % 7]]
        made.append(f"{' '.join(words)} ({i}).")
    return made


def write_ag_news(folder: Path, train: int = 40, test: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("test", test)):
        with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows([i % 4 + 1, f"{name} {i}", text] for i, text in enumerate(sentences(count)))
    return folder


def write_squad(folder: Path, train: int = 20, dev: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("dev", dev)):
        paragraphs = []
        for i, text in enumerate(sentences(count)):
            answers = [{"text": text.split()[1], "answer_start": 4}]
            if name == "dev":
                answers += [{"text": " ".join(text.split()[:2]), "answer_start": 0}, {"text": "x", "answer_start": 0}]
            paragraphs.append(
                {"context": text, "qas": [{"id": f"{name}{i}", "question": f"What {i}?", "answers": answers}]}
            )
        content = {"version": "1.1", "data": [{"title": "T", "paragraphs": paragraphs}]}
        (folder / f"{name}-v1.1.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_xsum(folder: Path, train: int = 20, validation: int = 8, test: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("validation", validation), ("test", test)):
        rows = [
            {"document": f"{text}\u2028{text}", "summary": text[:20], "id": str(i)}
            for i, text in enumerate(sentences(count))
        ]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def tiny_tokenizer():
    """A T5TokenizerFast of a few hundred pieces."""
    from expert_merging.switch.base_model import new_tokenizer

    return new_tokenizer([*sentences(200), "Classify: Question: Context: Summarize: What? Sports Business World"], 300)


def constants(data: Path, out: Path, **changed) -> SimpleNamespace:
    """Constants of the scripts, as far as features and decoding look at them; raw data in `data`, features in `out`."""
    values = {
        "scale": "tiny", "reading": "paper", "DATA_DIR": str(out), "BASE_MODEL_PATH": "base_models/tiny-{experts}",
        "AG_NEWS_PATH": str(data / "ag_news"), "SQUAD_PATH": str(data / "squad"), "XSUM_PATH": str(data / "xsum"),
        "max_input_length": 32, "max_decoder_length": 8,
        "train_examples": 0, "train_sample": 0, "validation_examples": 0, "test_examples": 0,
        "num_beams": 3, "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3, "length_penalty": 1.0, "eval_batch_size": 4,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changed})
