"""Features on disk: what is stored, that half of it is refused, and that batches are padded right."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import raw_data
import torch
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.core.errors import UserError
from expert_merging.core.hub import load_tokenizer
from expert_merging.data import features
from expert_merging.data.tasks import get_task


@pytest.fixture(scope="module")
def tokenizer():
    return raw_data.tiny_tokenizer()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    raw_data.write_ag_news(folder / "ag_news")
    raw_data.write_squad(folder / "squad")
    raw_data.write_xsum(folder / "xsum")
    return folder


def refused(name, constants, tokenizer) -> str:
    with pytest.raises(UserError) as error:
        features.load(name, constants, tokenizer)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["ag_news", "squad", "xsum"])
def test_what_is_stored(name, data, tmp_path, tokenizer):
    c = raw_data.constants(data, tmp_path)
    manifest = features.prepare(name, c, tokenizer)
    stored, raw, task = features.load(name, c, tokenizer), get_task(name).load(c), get_task(name)
    for split in features.SPLITS:
        expected = []
        for example in raw[split]:
            row = {}
            for key, text, limit in (("input_ids", task.prompt(example), 32), ("labels", task.target(example), 8)):
                row[key] = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
            expected.append({**row, "references": task.references(example)})
        found = stored[split].to_list()
        assert sorted(found, key=str) == sorted(expected, key=str)
        assert all(row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id for row in found)
        report = manifest["splits"][split]
        assert report["examples"] == len(raw[split])
        full = [len(tokenizer(task.prompt(e))["input_ids"]) for e in raw[split]]
        assert report["input_cut"] == sum(n > 32 for n in full) / len(full)
        assert report["input_length"]["100"] == max(full)
        assert min(full) <= report["input_length"]["50"] <= report["input_length"]["90"] <= max(full)


def test_limits_take_the_first_of_one_order(data, tmp_path, tokenizer):
    whole = raw_data.constants(data, tmp_path / "whole")
    part = raw_data.constants(data, tmp_path / "part", train_examples=10, test_examples=3)
    features.prepare("ag_news", whole, tokenizer)
    features.prepare("ag_news", part, tokenizer)
    all_rows, rows = features.load("ag_news", whole, tokenizer), features.load("ag_news", part, tokenizer)
    assert [len(rows[s]) for s in features.SPLITS] == [10, 4, 3]
    assert rows["train"].to_list() == all_rows["train"].to_list()[:10]
    # The classes take turns in the raw files: a shuffled order does not keep that.
    assert [r[0] for r in all_rows["test"]["references"][:4]] != [
        "World",
        "Sports",
        "Business",
        "Science and Technology",
    ]
    # A run that asks for fewer than are stored gets the first of them.
    fewer = raw_data.constants(data, tmp_path / "whole", train_examples=10, test_examples=3)
    assert features.load("ag_news", fewer, tokenizer)["train"].to_list() == rows["train"].to_list()
    # One that asks for more is refused, unless there are no more.
    for more in (11, 0):
        asking = raw_data.constants(data, tmp_path / "part", train_examples=more, test_examples=3)
        assert f"holds 10 train examples and {more or 'all'} are asked for" in refused("ag_news", asking, tokenizer)
    features.prepare("ag_news", raw_data.constants(data, tmp_path / "ample", train_examples=1000), tokenizer)
    ample = raw_data.constants(data, tmp_path / "ample", train_examples=2000)
    assert len(features.load("ag_news", ample, tokenizer)["train"]) == 36


def test_each_seed_draws_its_own_training_sample(data, tmp_path, tokenizer):
    whole = raw_data.constants(data, tmp_path)
    for task in ("ag_news", "squad"):
        features.prepare(task, whole, tokenizer)

    def sample(seed: int, task: str = "ag_news", size: int = 12) -> list[dict]:
        return features.load(task, raw_data.constants(data, tmp_path, seed=seed, train_sample=size), tokenizer)[
            "train"
        ].to_list()

    everything = features.load("ag_news", whole, tokenizer)["train"].to_list()
    assert len(sample(0)) == 12 and all(row in everything for row in sample(0))
    assert sample(0) == sample(0) and sample(0) != sample(1)
    assert sorted(map(str, sample(3, size=len(everything)))) == sorted(map(str, everything))
    asked = raw_data.constants(data, tmp_path, seed=0, train_sample=10_000)
    assert "train_sample is 10000, but squad has" in refused("squad", asked, tokenizer)


def test_same_again_however_it_is_batched(data, tmp_path, tokenizer, monkeypatch):
    manifests = [features.prepare("xsum", raw_data.constants(data, tmp_path / x), tokenizer) for x in "ab"]
    assert manifests[0] == manifests[1]
    monkeypatch.setattr(features, "_BATCH", 3)
    assert features.prepare("xsum", raw_data.constants(data, tmp_path / "c"), tokenizer) == manifests[0]


def test_missing_folder_names_the_command(data, tmp_path, tokenizer):
    c = raw_data.constants(data, tmp_path, max_input_length=33)
    message = refused("squad", c, tokenizer)
    assert "does not exist; run: python datasets_preprocessing.py --scale tiny --task_types squad" in message
    assert f"--DATA_DIR {tmp_path} --SQUAD_PATH {data / 'squad'} --max_input_length 33" in message
    assert "BASE_MODEL_PATH" not in message  # it is global_config.py's


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"max_input_length": 31}, "made with max_input_length 32, not 31"),
        ({"max_decoder_length": 9}, "made with max_decoder_length 8, not 9"),
    ],
)
def test_other_lengths_are_refused(changed, reason, data, tmp_path, tokenizer):
    features.prepare("squad", raw_data.constants(data, tmp_path), tokenizer)
    asking = raw_data.constants(data, tmp_path, **changed)
    assert reason in refused("squad", asking, tokenizer)
    assert features.is_complete("squad", asking, tokenizer) is None


def test_another_tokenizer_is_refused(data, tmp_path, tokenizer):
    from expert_merging.switch.base_model import new_tokenizer

    c = raw_data.constants(data, tmp_path)
    manifest = features.prepare("squad", c, tokenizer)
    assert features.is_complete("squad", c, tokenizer) == manifest
    other = new_tokenizer(raw_data.sentences(50), 200)
    assert "made with another tokenizer" in refused("squad", c, other)
    assert features.is_complete("squad", c, other) is None


def test_another_source_is_made_again_but_may_be_trained_on(data, tmp_path, tokenizer):
    c = raw_data.constants(data, tmp_path)
    features.prepare("squad", c, tokenizer)
    c.SQUAD_PATH = "rajpurkar/squad"
    assert features.is_complete("squad", c, tokenizer) is None
    features.load("squad", c, tokenizer)


def test_raw_examples_that_changed_are_read_again(tmp_path, tokenizer):
    raw_data.write_xsum(tmp_path / "xsum", train=6, validation=4, test=4)
    c = raw_data.constants(tmp_path, tmp_path / "data")
    manifest = features.prepare("xsum", c, tokenizer)
    assert features.is_complete("xsum", c, tokenizer) == manifest
    path = next((tmp_path / "xsum").glob("train*"))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert features.is_complete("xsum", c, tokenizer) is None


def test_of_docstrings_the_packages_versions_are_noted(monkeypatch):
    noted = features._content("doc_topic", SimpleNamespace())
    assert {"python", "torch", "sklearn", "numpy"} <= noted.keys()
    monkeypatch.setattr(features.importlib.metadata, "version", lambda name: "0")
    assert features._content("doc_topic", SimpleNamespace()) != noted


def remove_manifest(folder):
    (folder / "complete.json").unlink()


def cut_manifest(folder):
    (folder / "complete.json").write_text((folder / "complete.json").read_text()[:50])


def remove_split(folder):
    shutil.rmtree(folder / "test")


def cut_arrow(folder):
    file = next((folder / "train").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-200])


def empty_arrow(folder):
    next((folder / "train").glob("*.arrow")).write_bytes(b"")


def change_a_number(folder):
    file = next((folder / "train").glob("*.arrow"))
    content = bytearray(file.read_bytes())
    at = content.index((1).to_bytes(4, "little"), len(content) // 2)
    content[at] = 3
    file.write_bytes(content)


def drop_rows(folder):
    part = datasets.Dataset.load_from_disk(str(folder / "train")).select(range(5))
    rows = datasets.Dataset.from_list(part.to_list())
    shutil.rmtree(folder / "train")
    rows.save_to_disk(str(folder / "train"))


DAMAGES = [remove_manifest, cut_manifest, remove_split, cut_arrow, empty_arrow, change_a_number, drop_rows]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_half_a_folder_is_refused(damage, data, tmp_path, tokenizer):
    c = raw_data.constants(data, tmp_path)
    features.prepare("squad", c, tokenizer)
    features.load("squad", c, tokenizer)
    damage(tmp_path / "squad")
    refused("squad", c, tokenizer)
    if damage is remove_manifest:  # it might be anybody's folder
        with pytest.raises(UserError, match="in the way"):
            features.prepare("squad", c, tokenizer)
        shutil.rmtree(tmp_path / "squad")
    else:
        assert features.is_complete("squad", c, tokenizer) is None
    features.prepare("squad", c, tokenizer)
    features.load("squad", c, tokenizer)


def test_raw_data_are_never_overwritten(data, tmp_path, tokenizer):
    raw = raw_data.write_squad(tmp_path / "squad")
    before = {file.name: file.read_bytes() for file in raw.iterdir()}
    c = raw_data.constants(tmp_path, tmp_path)  # DATA_DIR is where the raw data lie
    with pytest.raises(UserError, match="in the way"):
        features.is_complete("squad", c, tokenizer)
    with pytest.raises(UserError, match="in the way"):
        features.prepare("squad", c, tokenizer)
    assert {file.name: file.read_bytes() for file in raw.iterdir()} == before


def test_a_full_disk_leaves_nothing(data, tmp_path, tokenizer, monkeypatch):
    def save_to_disk(self, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.DatasetDict, "save_to_disk", save_to_disk)
    with pytest.raises(UserError, match="No space left on device"):
        features.prepare("squad", raw_data.constants(data, tmp_path), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_remake_keeps_the_old_features(data, tmp_path, tokenizer, monkeypatch):
    c = raw_data.constants(data, tmp_path)
    features.prepare("squad", c, tokenizer)

    def interrupt(self, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.DatasetDict, "save_to_disk", interrupt)
    with pytest.raises(KeyboardInterrupt):
        features.prepare("squad", c, tokenizer)
    assert [file.name for file in tmp_path.iterdir()] == ["squad"]
    features.load("squad", c, tokenizer)


def test_empty_texts_are_kept_and_counted(tmp_path, tokenizer):
    raw_data.write_xsum(tmp_path / "xsum", train=2)
    with open(tmp_path / "xsum" / "train.jsonl", "a", encoding="utf-8") as file:
        for row in (
            {"document": "", "summary": "a"},
            {"document": "b", "summary": " "},
            {"document": "so they said: ", "summary": "c"},
        ):
            file.write(json.dumps(row) + "\n")
    c = raw_data.constants(tmp_path, tmp_path / "out")
    report = features.prepare("xsum", c, tokenizer)["splits"]["train"]
    assert (report["examples"], report["odd"]) == (5, 2)
    assert [tokenizer.eos_token_id] in features.load("xsum", c, tokenizer)["train"]["labels"][:]


def test_lists_of_examples_will_do(tmp_path, data, tokenizer):
    c = raw_data.constants(data, tmp_path / "lists")
    raw = get_task("squad").load(c)
    lists = {split: list(examples) for split, examples in raw.items()}
    as_lists = features.prepare("squad", c, tokenizer, lists)
    assert (
        as_lists["sha256"]
        == features.prepare("squad", raw_data.constants(data, tmp_path / "sets"), tokenizer, raw)["sha256"]
    )


def test_tokenizer_hash(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    expected = features.tokenizer_hash(tokenizer)
    assert features.tokenizer_hash(loaded) == expected
    loaded("some text", truncation=True, max_length=2, padding="max_length")  # which the backend remembers
    assert features.tokenizer_hash(loaded) == expected
    loaded.add_tokens(["<new>"])
    assert features.tokenizer_hash(loaded) != expected


def test_no_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="^BASE_MODEL_PATH: the folder .* holds no whole tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_cut_short(world, tmp_path):
    import shutil

    shutil.copytree(world.folder / "base-4", tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(UserError, match="^BASE_MODEL_PATH: the folder .* holds no whole tokenizer") as error:
        load_tokenizer(str(tmp_path / "base"))
    assert "\n" not in str(error.value)


ids = st.lists(st.integers(0, 50), min_size=1, max_size=9)


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=5))
def test_collate(pairs):
    batch = features.collate([{"input_ids": i, "labels": t, "references": ["x"]} for i, t in pairs], pad_token_id=0)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert all(tensor.dtype == torch.long for tensor in batch.values())
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(pairs), max(len(i) for i, _ in pairs))
    assert batch["labels"].shape == (len(pairs), max(len(t) for _, t in pairs))
    for row, (inputs, labels) in enumerate(pairs):
        assert (
            batch["input_ids"][row, : len(inputs)].tolist() == inputs
            and not batch["input_ids"][row, len(inputs) :].any()
        )
        assert batch["attention_mask"][row].tolist() == [1] * len(inputs) + [0] * (
            batch["input_ids"].shape[1] - len(inputs)
        )
        assert batch["labels"][row].tolist() == labels + [-100] * (batch["labels"].shape[1] - len(labels))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"max_input_length": 1}, "max_input_length is 1"),
        ({"max_decoder_length": 0}, "max_decoder"),
        ({"test_examples": -1}, "test_examples is -1"),
    ],
)
def test_constants_out_of_range(changed, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        features.check_constants(raw_data.constants(tmp_path, tmp_path / "out", **changed))
    assert not (tmp_path / "out").exists()


def test_data_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write in"):
        features.check_constants(raw_data.constants(tmp_path, tmp_path / "file" / "out"))
    features.check_constants(raw_data.constants(tmp_path, tmp_path / "new" / "out"))
    assert not (tmp_path / "new").exists()


def test_the_released_reading_pads_to_the_limits():
    rows = [{"input_ids": [5, 6, 1], "labels": [7, 1]}, {"input_ids": [8, 1], "labels": [9, 10, 1]}]
    c = raw_data.constants(Path(), Path(), reading="released", max_input_length=6, max_decoder_length=5)
    batch = features.collate(rows, 0, *features.padded_lengths(c, "padding"))
    assert batch["input_ids"].tolist() == [[5, 6, 1, 0, 0, 0], [8, 1, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[7, 1, -100, -100, -100], [9, 10, 1, -100, -100]]
    c.reading = "paper"
    assert features.collate(rows, 0, *features.padded_lengths(c, "padding"))["input_ids"].shape == (2, 3)
