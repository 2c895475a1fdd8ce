"""Reading raw examples: every place they can come from, and every way they can be broken."""

import csv
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import raw_data
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_merging.core import hub
from expert_merging.core.errors import UserError
from expert_merging.data import raw_files
from expert_merging.data.tasks import get_task, task_names

TASKS = ("ag_news", "squad", "xsum")
WRITERS = {"ag_news": raw_data.write_ag_news, "squad": raw_data.write_squad, "xsum": raw_data.write_xsum}


def load(name: str, path) -> dict:
    return get_task(name).load(SimpleNamespace(**{f"{name.upper()}_PATH": str(path)}))


def complaint(name: str, path) -> str:
    with pytest.raises(UserError) as error:
        load(name, path)
    assert "\n" not in str(error.value)
    return str(error.value)


def as_on_the_hub(name: str, path: Path) -> DatasetDict:
    """The same examples as the hub serves them: all splits, its columns and some more."""
    splits = raw_files.load_splits(str(path), get_task(name)._published)
    return DatasetDict({s: d.add_column("id", [str(i) for i in range(len(d))]) for s, d in splits.items()})


def test_task_names():
    assert set(TASKS) <= set(task_names())
    assert all(
        callable(getattr(get_task(t), f)) for t in TASKS for f in ("load", "prompt", "target", "references", "score")
    )
    with pytest.raises(UserError, match="no task 'agnews'.*ag_news.*squad"):
        get_task("agnews")


def test_ag_news(tmp_path):
    raw = load("ag_news", raw_data.write_ag_news(tmp_path, train=40, test=12))
    task = get_task("ag_news")
    assert {split: len(examples) for split, examples in raw.items()} == {"train": 36, "validation": 4, "test": 12}
    texts = [e["text"] for split in ("train", "validation") for e in raw[split]]
    assert sorted(texts) == sorted(f"train {i} {text}" for i, text in enumerate(raw_data.sentences(40)))
    example = raw["test"][3]
    assert task.prompt(example) == f"Classify: test 3 {raw_data.sentences(4)[3]}"
    assert [task.target(raw["test"][i]) for i in range(4)] == ["World", "Sports", "Business", "Science and Technology"]
    assert task.references(example) == ["Science and Technology"]


def test_ag_news_validation_is_the_tenth_that_datasets_draws(tmp_path):
    """Shuffled before, as the released preprocessing does."""
    raw = load("ag_news", raw_data.write_ag_news(tmp_path, train=200))
    whole = Dataset.from_dict({"i": list(range(200))}).shuffle(seed=42).train_test_split(test_size=0.1, seed=42)
    numbers = [int(e["text"].split()[1]) for e in raw["validation"]]
    assert numbers == list(whole["test"]["i"])


def test_ag_news_rows_as_published(tmp_path):
    raw_data.write_ag_news(tmp_path)
    (tmp_path / "test.csv").write_text(
        '"3","A ""B"" \\$5","C\\band, &lt;d&gt;\n second line"\n"1"," E","F "\n', encoding="utf-8"
    )
    raw = load("ag_news", tmp_path)["test"]
    assert raw["text"][:] == ['A "B" \\$5 C\\band, &lt;d&gt;\n second line', " E F "]
    assert raw["label"][:] == [2, 0]


def test_ag_news_with_header_and_byte_order_mark(tmp_path):
    raw_data.write_ag_news(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "headed")
    for name in ("train.csv", "test.csv"):
        text = (tmp_path / "plain" / name).read_text(encoding="utf-8")
        (tmp_path / "headed" / name).write_text("Class Index,Title,Description\n" + text, encoding="utf-8-sig")
    plain, headed = load("ag_news", tmp_path / "plain"), load("ag_news", tmp_path / "headed")
    assert all(plain[split].to_list() == headed[split].to_list() for split in plain)


@settings(max_examples=40)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 4), *[st.text(st.characters(codec="utf-8", exclude_characters="\x00"))] * 2),
        min_size=1,
    )
)
def test_ag_news_reads_whatever_csv_can_say(rows, tmp_path_factory):
    file = tmp_path_factory.mktemp("csv") / "a.csv"
    with open(file, "w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, quoting=csv.QUOTE_ALL).writerows(rows)
    read = [example for _, example in raw_files.read_ag_news_csv(file)]
    assert read == [{"text": f"{title} {text}", "label": label - 1} for label, title, text in rows]


def test_squad(tmp_path):
    raw = load("squad", raw_data.write_squad(tmp_path, train=5, dev=3))
    task = get_task("squad")
    assert {split: len(examples) for split, examples in raw.items()} == {"train": 5, "validation": 3, "test": 3}
    assert raw["validation"].to_list() == raw["test"].to_list()
    first = raw_data.sentences(1)[0]
    assert task.prompt(raw["train"][0]) == f"Question: What 0? Context: {first}"
    assert task.target(raw["train"][0]) == "river"
    assert task.target(raw["validation"][0]) == "the river"  # the longest
    assert task.references(raw["validation"][0]) == ["river", "the river", "x"]


def test_xsum(tmp_path):
    raw = load("xsum", raw_data.write_xsum(tmp_path, train=5, validation=3, test=2))
    task = get_task("xsum")
    assert {split: len(examples) for split, examples in raw.items()} == {"train": 5, "validation": 3, "test": 2}
    first = raw_data.sentences(1)[0]
    assert task.prompt(raw["test"][0]) == f"Summarize: {first}\u2028{first}"
    assert task.target(raw["test"][0]) == first[:20] == task.references(raw["test"][0])[0]


@pytest.mark.parametrize("name", TASKS)
def test_published_files_parquet_and_saved_folder_give_the_same(name, tmp_path):
    published = WRITERS[name](tmp_path / "published")
    on_hub = as_on_the_hub(name, published)
    on_hub.save_to_disk(tmp_path / "saved")
    for split, dataset in on_hub.items():
        (tmp_path / "parquet" / "data").mkdir(parents=True, exist_ok=True)
        for shard in range(2):  # several shards a split, as for XSum's training split
            part = dataset.shard(2, shard, contiguous=True)
            part.to_parquet(tmp_path / "parquet" / "data" / f"{split}-0000{shard}-of-00002.parquet")
        (tmp_path / "converted" / "default" / split).mkdir(parents=True)
        dataset.to_parquet(tmp_path / "converted" / "default" / split / "0000.parquet")
    expected = load(name, published)
    before = sorted(tmp_path.rglob("*"))
    for folder in ("saved", "parquet", "converted"):
        found = load(name, tmp_path / folder)
        assert {s: d.to_list() for s, d in found.items()} == {s: d.to_list() for s, d in expected.items()}
    assert sorted(tmp_path.rglob("*")) == before  # reading leaves nothing in the user's folders


def test_hub_is_asked_and_a_script_repository_read_from_its_parquet_copy(monkeypatch, tmp_path):
    import datasets

    served, asked = as_on_the_hub("xsum", raw_data.write_xsum(tmp_path)), []

    def load_dataset(name, revision=None):
        asked.append((name, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found xsum.py")
        return served

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # no probing
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    raw = load("xsum", "EdinburghNLP/xsum")
    assert asked == [("EdinburghNLP/xsum", None), ("EdinburghNLP/xsum", "refs/convert/parquet")]
    assert len(raw["train"]) == 20


def test_hub_out_of_reach(monkeypatch):
    import datasets

    def load_dataset(name, revision=None):
        raise ConnectionError("Couldn't reach the Hub\nand a second line")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = complaint("squad", "rajpurkar/squad")
    assert "train-v1.1.json and dev-v1.1.json" in message and "--SQUAD_PATH FOLDER" in message


def test_unreachable_hub_means_offline(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub.offline_if_unreachable()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.delenv("HF_HUB_OFFLINE")


@pytest.mark.parametrize("path", ["", "./data", "../x/y", "/no/where", "~/no_such_folder", "a/b/c", "data/", "ag_news"])
def test_what_looks_like_a_path_must_exist(path):
    with pytest.raises(UserError, match="^XSUM_PATH: there is no folder"):
        hub.local_folder(path, "XSUM_PATH")


def test_existing_folder_and_file_and_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "file").touch()
    assert hub.local_folder("owner/name", "P") == Path("owner/name")
    assert hub.local_folder("owner/other", "P") is None
    with pytest.raises(UserError, match="is a file"):
        hub.local_folder("file", "P")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "test.csv is empty"),
        (b" \n\n", "test.csv is empty"),
        (b"Class Index,Title,Description\n", "holds no examples"),
        (b'"1","a","b"\n"2","c"\n', "test.csv, line 2: 2 fields"),
        (b'"1","a","b"\n"2","c\nd","e"\n"5","a","b"\n', "test.csv, line 4: the class index is '5'"),
        (b'"1","a","b"\n"World","a","b"\n', "test.csv, line 2: the class index is 'World'"),
        (b'"1","a","b"\n"2","c","cut sho', "test.csv, line 2: not a row of a CSV file"),
        (b'"1","a"b,"c"\n', "test.csv, line 1: not a row of a CSV file"),
        (b'"1","a","b"\n"2","caf\xe9","c"\n', "test.csv, line 2: not UTF-8"),
    ],
)
def test_broken_ag_news(content, expected, tmp_path):
    raw_data.write_ag_news(tmp_path)
    (tmp_path / "test.csv").write_bytes(content)
    assert expected in complaint("ag_news", tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"document": "a", "summary": "b"}\n{"document": "a"}\n', "test.jsonl, line 2: no field 'summary'"),
        (
            b'{"document": "a", "summary": "b"}\n\n{"document": 1, "summary": "b"}\n',
            "line 3: the field 'document' is no text",
        ),
        (b'{"document": "a", "summary": "b"}\n{"document": "a", "su', "line 2: not whole JSON"),
        (b'["a"]\n', "line 1: not a JSON object"),
        (b"", "is empty"),
        (b'{"document": "\xff", "summary": "b"}\n', "line 1: not UTF-8"),
    ],
)
def test_broken_xsum(content, expected, tmp_path):
    raw_data.write_xsum(tmp_path)
    (tmp_path / "test.jsonl").write_bytes(content)
    assert expected in complaint("xsum", tmp_path)


def _squad_without(*path):
    content = {
        "data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": [{"text": "c"}]}]}]}]
    }
    inner = content
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return content


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (_squad_without("data"), "at the top: no field 'data'"),
        (_squad_without("data", 0, "paragraphs"), "article 1: no field 'paragraphs'"),
        (_squad_without("data", 0, "paragraphs", 0, "context"), "article 1, paragraph 1: no field 'context'"),
        (
            _squad_without("data", 0, "paragraphs", 0, "qas", 0, "answers"),
            "paragraph 1, question 1: no field 'answers'",
        ),
        (
            _squad_without("data", 0, "paragraphs", 0, "qas", 0, "answers", 0),
            "question 1: no answer; SQuAD v1.1 is wanted",
        ),
        ([1], "at the top: not built as SQuAD v1.1 is"),
        ({"data": []}, "holds no examples"),
    ],
)
def test_broken_squad(content, expected, tmp_path):
    raw_data.write_squad(tmp_path)
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(content), encoding="utf-8")
    assert expected in complaint("squad", tmp_path)


def test_squad_cut_short(tmp_path):
    raw_data.write_squad(tmp_path)
    file = tmp_path / "train-v1.1.json"
    file.write_bytes(file.read_bytes()[:-40])
    assert "not whole JSON" in complaint("squad", tmp_path)


@pytest.mark.parametrize("name", TASKS)
def test_folders_that_lack_something(name, tmp_path):
    assert "holds neither" in complaint(name, tmp_path)
    WRITERS[name](tmp_path)
    last = list(get_task(name)._published.files.values())[-1]
    (tmp_path / last).unlink()
    assert complaint(name, tmp_path).endswith(f"lacks {last}")


def test_parquet_with_a_shard_missing_or_cut(tmp_path):
    on_hub = as_on_the_hub("xsum", raw_data.write_xsum(tmp_path / "raw"))
    folder = tmp_path / "parquet"
    folder.mkdir()
    for split, dataset in on_hub.items():
        dataset.to_parquet(folder / f"{split}-00000-of-0000{2 if split == 'train' else 1}.parquet")
    assert "1 parquet files of the split train, of 2" in complaint("xsum", folder)
    (folder / "train-00000-of-00002.parquet").rename(folder / "train-00000-of-00001.parquet")
    load("xsum", folder)
    file = folder / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-10])
    assert "split test" in complaint("xsum", folder)
    file.unlink()
    assert "has no split 'test'" in complaint("xsum", folder)


def test_broken_rows_in_tables(tmp_path):
    good = {"text": ["a"] * 20, "label": [0] * 20}
    for name, train, expected in (
        ("label", {"text": ["a", "b"], "label": [0, 4]}, "split train, row 2: the label is 4"),
        ("kind", {"text": ["a", "b"], "label": [0.0, 1.0]}, r"row 1: the label is 0.0.*row 2"),
        ("truth", {"text": ["a"], "label": [True]}, "the label is True"),
        ("twice", {"text": ["a"] * 3, "label": [0] * 3, "id": [7, 8, 7]}, "row 3: the id 7 is that of row 1"),
        ("none", {"text": ["a", None], "label": [0, 1]}, "split train, row 2: the field 'text' is no text"),
        ("column", {"sentence": ["a", "b"], "label": [0, 1]}, "split train of .* has no column text"),
    ):
        DatasetDict({"train": Dataset.from_dict(train), "test": Dataset.from_dict(good)}).save_to_disk(tmp_path / name)
        with pytest.raises(UserError, match=expected):
            load("ag_news", tmp_path / name)


def test_saved_folder_cut_short(tmp_path):
    as_on_the_hub("squad", raw_data.write_squad(tmp_path / "raw")).save_to_disk(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "validation")
    assert "not a whole DatasetDict" in complaint("squad", tmp_path / "saved")


# ---------------------------------------------------------------- counted, and never silently altered


def test_broken_rows_are_counted_and_the_first_named(tmp_path):
    raw_data.write_xsum(tmp_path)
    lines = ['{"document": "a", "summary": "b", "id": "1"}', "{}", "[]", '{"document": 1}', "{", '"text"', "7"]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    said = complaint("xsum", tmp_path)
    assert "line 2: no field 'document'; line 3: not a JSON object; line 4: the field 'document' is no text" in said
    assert said.endswith("(and 3 more broken rows)")


def test_an_id_that_comes_twice(tmp_path):
    raw_data.write_xsum(tmp_path / "xsum")
    with (tmp_path / "xsum" / "train.jsonl").open("a") as file:
        file.write('{"document": "another", "summary": "a", "id": "3"}\n')
    assert complaint("xsum", tmp_path / "xsum").endswith("line 21: the id '3' is that of line 4")
    raw_data.write_squad(tmp_path / "squad")
    path = tmp_path / "squad" / "train-v1.1.json"
    path.write_text(path.read_text().replace('"train5"', '"train2"'))
    assert "paragraph 6, question 1: the id 'train2' is that of article 1, paragraph 3" in complaint(
        "squad", path.parent
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (r'{"document": "a \ud800 b", "summary": "c"}', "line 1: the field 'document' holds half a character at position 2"),
        ("[" * 100_000, "line 1: not whole JSON"),
        ('{"document": "a", "summary": ' + "9" * 5000 + "}", "line 1: not whole JSON"),
    ],
)  # fmt: skip
def test_json_that_python_reads_and_nobody_can_use(line, expected, tmp_path):
    raw_data.write_xsum(tmp_path)
    (tmp_path / "test.jsonl").write_text(line)
    assert expected in complaint("xsum", tmp_path)


def test_squad_of_other_kinds(tmp_path):
    raw_data.write_squad(tmp_path / "squad")
    path = tmp_path / "squad" / "dev-v1.1.json"
    path.write_text("[" * 100_000)
    assert "no JSON that can be read" in complaint("squad", path.parent)
    good = {"question": "q", "context": "c", "answers": {"text": ["a"]}}
    for name, answers in (("text", {"text": "abc"}), ("list", ["a"]), ("empty", {"text": []}), ("none", None)):
        rows = Dataset.from_list([{**good, "answers": answers}] * 2)
        DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / name)
        assert "split train, row 1: no answer" in complaint("squad", tmp_path / name)


def test_empty_texts_stay_and_are_counted(tmp_path):
    from expert_merging.data import features

    for name, write in WRITERS.items():
        write(tmp_path / name)
    empty = '{"document": "", "summary": "x"}\n{"document": "x", "summary": ""}\n{"document": "x", "summary": "y"}\n'
    (tmp_path / "xsum" / "test.jsonl").write_text(empty)
    manifest = features.prepare("xsum", raw_data.constants(tmp_path, tmp_path / "out"), raw_data.tiny_tokenizer())
    assert manifest["splits"]["test"]["examples"] == 3 and manifest["splits"]["test"]["odd"] == 2


def test_a_document_of_ten_megabytes(tmp_path):
    """It is read as it is, and cut where every long input is; the share that was cut is in the manifest."""
    from expert_merging.data import features

    raw_data.write_xsum(tmp_path / "xsum")
    text = "the river rose " * 700_000
    (tmp_path / "xsum" / "test.jsonl").write_text(json.dumps({"document": text, "summary": "a river"}))
    assert load("xsum", tmp_path / "xsum")["test"][0]["document"] == text
    (tmp_path / "xsum" / "test.jsonl").write_text(json.dumps({"document": text[:500_000], "summary": "a river"}))
    manifest = features.prepare("xsum", raw_data.constants(tmp_path, tmp_path / "out"), raw_data.tiny_tokenizer())
    test = manifest["splits"]["test"]
    assert test["input_cut"] == 1.0 and test["input_length"]["100"] > 50_000
    raw_data.write_ag_news(tmp_path / "ag_news")
    (tmp_path / "ag_news" / "test.csv").write_text(f'"1","a","{text}"\n')
    assert "test.csv, line 1: not a row of a CSV file (field larger" in complaint("ag_news", tmp_path / "ag_news")


def test_parquet_that_holds_bytes_for_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    raw_data.write_xsum(tmp_path / "raw")
    good = raw_files.load_splits(str(tmp_path / "raw"), get_task("xsum")._published)
    for split, rows in good.items():
        rows.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    shutil.rmtree(tmp_path / "raw")
    wrong = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    table = pyarrow.table({"document": wrong, "summary": pyarrow.array(["a"])})
    pyarrow.parquet.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    assert "split test, after row 0: not readable" in complaint("xsum", tmp_path)


@pytest.mark.parametrize("name", TASKS)
def test_damaged_files_are_read_right_or_refused_in_one_line(name, tmp_path):
    """The same as `make faults` does with more of them: bytes changed, cut out, doubled, in every format."""
    from bad_inputs import try_damaged

    tried, refused = try_damaged(name, tmp_path, number=40, seed=0)
    assert tried == 80 and refused > 20
