"""neighbours/WEMoE_text.py on a random BERT and task folders that the test writes; its encoder, corruptions and claims."""

import importlib
import json
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, call_main, run_script
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TEXT_TASKS, write_lines, write_text_place

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json, write_json
from expert_merging.core.scales import SCALES
from expert_merging.data import text_tasks
from expert_merging.data.scores import pack, unpack
from expert_merging.data.text_tasks import Row
from expert_merging.report import folders
from expert_merging.run.constants import read_constants
from expert_merging.wemoe import report, text_claims, text_docs, text_encoder, text_plan, text_report
from expert_merging.wemoe.ffn import ensembles, upscale
from expert_merging.wemoe.scoring import Task, joined
from expert_merging.wemoe.text_corruptions import CORRUPTIONS, STRENGTHS, corrupted
from expert_merging.wemoe.text_encoder import TextEncoder, regrouped

SCRIPT = "neighbours/WEMoE_text.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_text_place(tmp_path_factory.mktemp("text"))


def words(place, results, **more) -> list[str]:
    values = {
        "scale": "tiny", "device": "cpu", "ENCODER": place / "bert", "TASKS_PATH": place / "tasks",
        "text_tasks": " ".join(TEXT_TASKS[:2]), "unseen_tasks": "pairs", "general_tasks": 2, "max_tokens": 16,
        "train_texts": 40, "validation_texts": 12, "test_texts": 20, "select_texts": 10, "robust_texts": 8,
        "grid": "0.3 1", "adapt_steps": 3, "adapt_batch_size": 4, "statistics_examples": 4, "finetune_lr": 0.01,
        "parts": "main", "methods": "individual average task_arithmetic", "WEMOE_TEXT_DIR": results, **more,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", *str(value).split(" "))]


@pytest.fixture(scope="module")
def everything(place, tmp_path_factory):
    """All parts and methods, two seeds, as a process; of three tasks, so that merging two of them is another number."""
    folder = tmp_path_factory.mktemp("results") / "r"
    more = {"text_tasks": " ".join(TEXT_TASKS), "unseen_tasks": "", "seeds": "0 1"}
    given = words(place, folder, **more)
    for name in ("--parts", "--methods"):
        at = given.index(name)
        end = next((i for i in range(at + 1, len(given)) if given[i].startswith("--")), len(given))
        del given[at:end]
    done = run_script(SCRIPT, given)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, given


def test_everything_leaves_a_record_a_run_and_tables_that_follow(everything):
    folder, out, _ = everything
    groups = report.read_groups(folder)
    assert set(groups) == {"seed0", "seed1"}
    from expert_merging.merging.registry import once

    expected = {"individual", "pretrained", "multi_task", *once(), "adamerging_task", "adamerging_layer"}
    expected |= {"adamerging_layer++", "wemoe", "ewemoe_90", "ewemoe_99"}
    for runs in groups.values():
        assert {run.removeprefix("main.") for run in runs if run.startswith("main.")} == expected
        parts = {record["part"] for record in runs.values()}
        dear = {"number2", "modules", "depth"} if runs is groups["seed0"] else set()  # of ablation_seeds, which is 1
        assert parts == {*text_plan.PARTS} - {*text_plan.ABLATIONS} | dear
        for run, record in runs.items():
            assert record["tasks"] == list(TEXT_TASKS)[: len(record["tasks"])], run
            for task in record["tasks"] if "corrupted" not in record else ():
                each = unpack(record[task]["each"])
                assert len(each) == 20 and each.mean() / 100 == pytest.approx(record[task]["accuracy"])
        assert (
            runs["generalization.wemoe"]["unseen"] == ["pairs"] and "accuracy" in runs["generalization.wemoe"]["pairs"]
        )
        assert len(runs["robustness.wemoe"]["corrupted"]) == 1 + 2 * len(CORRUPTIONS)
        assert runs["validation.wemoe"]["adaptation"]["loss"] != runs["main.wemoe"]["adaptation"]["loss"]
        assert runs["main.wemoe"]["mixed"]["average_accuracy"] == pytest.approx(
            runs["main.wemoe"]["average_accuracy"], abs=0.04
        )
    assert folders.check(folder, report.WING) == []
    tables = {path.stem for path in (folder / "tables").glob("*.md")}
    assert tables == {
        "accuracy", "cost", "claims", "coefficients", "inputs", "guard", "mixed", "generalization", "robustness", "number",
        "ablation",
    }  # fmt: skip
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"accuracy", "number", "robustness", "coefficients", "routing_wemoe", "adaptation_wemoe"} <= figures
    assert "WEMoE > AdaMerging" in out and "E-WEMoE 90% within 1 of WEMoE" in out


def test_what_is_there_is_not_made_again_and_records_do_not_move(everything):
    folder, _, given = everything
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    call_main(SCRIPT, given)
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before
    with pytest.raises(UserError, match="adapt_steps was 3, is now 4.*choose another WEMOE_TEXT_DIR"):
        call_main(SCRIPT, [*given, "--adapt_steps", "4"])
    with pytest.raises(UserError, match="scoring_batch was 32, is now 7"):  # what routes by batch would score otherwise
        call_main(SCRIPT, [*given, "--scoring_batch", "7"])
    for path in before:  # as records of earlier versions, which do not note it
        if path.parent.parent.name == "records":
            record = read_json(path)
            record["identity"].pop("scoring_batch")
            write_json(path, record)
    call_main(SCRIPT, given)
    for path, content in before.items():
        path.write_bytes(content)


def test_what_was_adapted_is_what_robustness_tests(everything):
    """On clean texts the reloaded model's accuracy is that of the same examples in the part main."""
    folder, _, _ = everything
    runs = report.read_groups(folder)["seed0"]
    for method in ("wemoe", "adamerging_layer", "ties", "multi_task", "individual"):
        assert (folder / "seed0" / "adapted" / f"{method}.safetensors").exists() == (
            method in ("wemoe", "adamerging_layer")
        )
        for task in TEXT_TASKS:
            clean = runs[f"robustness.{method}"]["corrupted"]["clean"][task]
            assert 0 <= clean <= 1 and clean * 8 == pytest.approx(round(clean * 8))


def test_the_coefficient_is_the_best_of_the_grid_on_validation(everything):
    folder, _, _ = everything
    runs = report.read_groups(folder)["seed0"]
    for method in ("task_arithmetic", "ties", "iso_c", "wemoe", "adamerging_task"):
        record = runs[f"main.{method}"]
        curve = dict(record["curve"])
        best = max(curve.values())
        assert set(curve) == {0.3, 1.0} and record["coefficient"] == min(x for x, y in curve.items() if y == best)
    assert runs["main.wemoe"]["coefficient"] == runs["main.task_arithmetic"]["coefficient"]
    assert [runs[f"defaults.{m}"]["coefficient"] for m in ("task_arithmetic", "ties", "wemoe")] == [0.3, 1.0, 0.3]
    assert "curve" not in runs["main.average"] and "main.average" in runs and "defaults.average" not in runs


def test_a_coefficient_at_an_end_of_the_grid_is_marked():
    """With a part defaults or without, as what is published has none."""
    curve = [[0.5, 0.9], [1.0, 0.95], [2.0, 0.97]]
    main = {"part": "main", "tasks": ["a"], "a": {"accuracy": 0.6}, "curve": curve}
    runs = {
        f"main.{method}": main | {"coefficient": coefficient}
        for method, coefficient in (("ties", 2.0), ("task_arithmetic", 1.0), ("tsv_m", 0.5))
    }
    runs["main.individual"] = {"part": "main", "tasks": ["a"], "a": {"accuracy": 0.8}}
    table = text_report.coefficients({"seed0": runs})
    assert "default" not in table.rows[0]
    assert {row["method"]: row["chosen"] for row in table.rows} == {
        "task arithmetic": "1",
        "TIES": "2*",
        "TSV-M": "0.5*",
    }
    assert "*: an end of the grid" in table.note and str(table.rows[0]["relative"]) == "75.00"
    runs["main.ties"]["coefficient"] = runs["main.tsv_m"]["coefficient"] = 1.0
    runs["main.ties"]["a"] = {"accuracy": 0.75, "each": pack([100.0, 100.0, 100.0, 0.0])}
    runs["defaults.ties"] = runs["main.ties"] | {
        "part": "defaults",
        "a": {"accuracy": 0.5, "each": pack([100.0, 100.0, 0.0, 0.0])},
    }
    table = text_report.coefficients({"seed0": runs, "seed1": {}})
    assert "end of the grid" not in table.note
    ties = next(row for row in table.rows if row["method"] == "TIES")
    assert ties["its seeds"] == "0" and re.match(r"\+25\.00 \[[+-]\d", ties["chosen - default"])
    assert {row["method"]: row["default"] for row in table.rows} == {"task arithmetic": "", "TIES": "1", "TSV-M": ""}


def test_every_scale_tries_more_than_1():
    """Iso-C, TSV-M and TIES chose 1 where it was the end."""
    for scale in SCALES:
        grid = read_constants(vars(importlib.import_module("neighbours.WEMoE_text")), ["--scale", scale]).grid
        assert grid[0] <= 0.2 and max(grid) >= 2


def test_publishing_adds_to_what_was_published_from_elsewhere(everything, tmp_path, monkeypatch):
    folder, *_ = everything
    elsewhere, published = tmp_path / "text" / "seed7.json", {}
    found = report.read_groups(folder)
    run = found["seed0"]["main.average"]
    write_json(elsewhere, {"main.average": run})
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report.publish, "publish", lambda groups, wing: published.update(groups))
    c = SimpleNamespace(WEMOE_TEXT_DIR=str(folder), publish=True)
    report.write_text(c)
    assert published == {elsewhere.parent: {"seed7": {"main.average": run}, **found}}
    write_json(elsewhere, {"main.average": run | {"identity": run["identity"] | {"grid": [0.5]}}})
    with pytest.raises(UserError, match=r"was made with grid .*choose another WEMOE_TEXT_DIR"):
        report.write_text(c)


def test_the_guard_is_run_again_only_where_it_spoke_up(place, tmp_path):
    """At a floor of 1 any fall of the entropy of the mean prediction counts as a collapse."""
    more = {"parts": "main guard", "methods": "individual wemoe", "guard_window": 1, "guard_floor": 1, "adapt_steps": 6}
    with pytest.warns(UserWarning, match="most inputs get one answer"):
        call_main(SCRIPT, words(place, tmp_path / "r", **more))
    runs = report.read_groups(tmp_path / "r")["seed0"]
    main, rolled = runs["main.wemoe"]["adaptation"], runs["guard.wemoe"]["adaptation"]
    assert main["collapsed"] and main["steps_done"] == 6 and "rolled_back_to" in rolled
    assert "as_main" not in runs["guard.wemoe"]
    call_main(SCRIPT, words(place, tmp_path / "s", **more | {"guard_floor": 0}))
    runs = report.read_groups(tmp_path / "s")["seed0"]
    assert runs["guard.wemoe"]["as_main"] and runs["guard.wemoe"]["who"] == runs["main.wemoe"]["who"]


def test_separate_models_are_folders_that_load_alone(everything):
    from transformers import AutoModel, AutoTokenizer

    folder, _, _ = everything
    own = folder / "seed0" / "models" / "who"
    model, tokenizer = AutoModel.from_pretrained(own), AutoTokenizer.from_pretrained(own)
    assert (
        model(**tokenizer("the river rose", return_tensors="pt")).last_hidden_state.shape[-1]
        == model.config.hidden_size
    )
    told = read_json(own / "finetuning.json")
    assert told["validation"]["who"] == max(epoch["validation"]["who"] for epoch in told["history"])
    first, second = (read_json(folder / f"seed{seed}" / "models" / "who" / "finetuning.json") for seed in (0, 1))
    assert first["identity"]["data"] != second["identity"]["data"]  # each seed draws a training sample of its own


def test_the_same_command_in_another_folder_gives_the_same_numbers(place, tmp_path):
    found = []
    for name in ("one", "two"):
        call_main(SCRIPT, words(place, tmp_path / name, methods="individual task_arithmetic wemoe ewemoe_90 fisher"))
        runs = report.read_groups(tmp_path / name)["seed0"]
        volatile = ("command", "versions", "seconds")
        found.append({run: {k: v for k, v in record.items() if k not in volatile} for run, record in runs.items()})
        for record in found[-1].values():
            record.pop("adaptation", {}) if record.get("adaptation") is None else record["adaptation"].pop("seconds")
    assert found[0] == found[1]


def test_a_task_is_a_folder(place, tmp_path):
    shutil.copytree(place / "tasks", tmp_path / "tasks")
    shutil.copytree(place / "tasks" / "who", tmp_path / "tasks" / "new")
    call_main(SCRIPT, words(place, tmp_path / "r", TASKS_PATH=tmp_path / "tasks", text_tasks="all"))
    record = report.read_groups(tmp_path / "r")["seed0"]["main.average"]
    assert record["tasks"] == ["new", "where", "who"] and record["unseen"] == []


# -- mistakes


def broken(place, tmp_path, task="who", split="train", change=None, remove=False):
    shutil.copytree(place / "tasks", tmp_path / "tasks", dirs_exist_ok=True)
    path = tmp_path / "tasks" / task / f"{split}.jsonl"
    if remove:
        path.unlink()
    else:
        write_lines(path, change([json.loads(line) for line in path.read_text().splitlines()]))
    return {"TASKS_PATH": tmp_path / "tasks"}


def with_first(**fields):
    return lambda rows: [rows[0] | fields, *rows[1:]]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            {"change": with_first(label=-1)},
            r"who/train.jsonl, line 1: the label is -1; it must be a whole number from 0",
        ),
        ({"change": with_first(label="1")}, r"who/train.jsonl, line 1: the label is '1'"),
        ({"change": with_first(label=7)}, r"who: no training example has label 3, one has 7; count labels from 0"),
        (
            {"split": "test", "change": with_first(label=9)},
            r"who: a test example has label 9; in training labels are 0 to 2",
        ),
        (
            {"split": "validation", "change": with_first(text=" ")},
            r"who/validation.jsonl, line 1: the field 'text' is empty",
        ),
        (
            {"change": lambda rows: [row | {"label": 0} for row in rows]},
            r"who: all training examples have label 0; a task needs",
        ),
        (
            {"split": "validation", "remove": True},
            r"who/validation.jsonl is missing; a task has train, validation and test",
        ),
        ({"split": "test", "remove": True}, r"who/test.jsonl is missing"),
        ({"change": lambda rows: [{"sentence": "a", "label": 0}, *rows]}, r"who/train.jsonl, line 1: no field 'text'"),
        ({"split": "test", "change": with_first(text2="b")}, r"who: some examples have a text2 and others none"),
    ],
)
def test_what_is_wrong_with_a_task_is_one_line(place, tmp_path, how, said):
    with pytest.raises(UserError, match=said) as error:
        call_main(SCRIPT, words(place, tmp_path / "r", **broken(place, tmp_path, **how)))
    assert "\n" not in str(error.value) and not (tmp_path / "r").exists()


def test_an_encoder_without_a_tokenizer_and_what_is_no_encoder(place, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(place / "bert" / name, bare / name)
    (tmp_path / "none").mkdir()
    gpt = tmp_path / "gpt"
    shutil.copytree(place / "bert", gpt)
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)).save_pretrained(gpt)
    for encoder, said in (
        (bare, "bare has no whole tokenizer"), (tmp_path / "none", "none has no whole tokenizer"),
        (gpt, "gpt holds no encoder that can be used .*packaged_model.py minilm-l6"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"ENCODER: .*{said}") as error:
            call_main(SCRIPT, words(place, tmp_path / "r", ENCODER=encoder))
        assert "\n" not in str(error.value) and not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"text_tasks": "who", "unseen_tasks": ""}, "1 task to merge .who.; give two or more"),
        ({"text_tasks": "who why"}, "no folder of the task 'why' in .*there are: pairs, where, who"),
        ({"text_tasks": "who where pairs"}, "name 'pairs' twice"),
        ({"TASKS_PATH": "/nowhere"}, "there is no folder /nowhere"),
        ({"parts": "main minor"}, "parts: there is no 'minor'; there are main, defaults"),
        ({"parts": "robustness"}, "robustness tests the models of the part main"),
        ({"methods": "average"}, "methods lacks individual"),
        ({"methods": "individual avrage"}, "there is no merging method 'avrage'"),
        ({"grid": "0 1"}, "grid is 0.0 1.0; give different coefficients above 0"),
        ({"warmup": "1"}, "warmup is 1.0"),
        ({"adapt_steps": "0"}, "adapt_steps is 0"),
        ({"guard": "hope"}, "the guard is 'hope'"),
        (
            {"parts": "main guard", "guard": "off"},
            "the part guard asks where the guard of main spoke up, and guard is off",
        ),
        ({"train_texts": "2"}, "seed 0 draws no example of label . of who in its 2 training examples"),
        ({"parts": "generalization", "general_tasks": "3"}, "nothing would be left to generalize to"),
    ],
)
def test_what_is_wrong_with_constants_is_one_line(place, tmp_path, wrong, said):
    with pytest.raises(UserError, match=said) as error:
        call_main(SCRIPT, words(place, tmp_path / "r", **wrong))
    assert "\n" not in str(error.value) and not (tmp_path / "r").exists()


def test_check_compares_the_tables_in_results(capsys):
    call_main(SCRIPT, ["--device", "cpu", "--check"])
    assert "follow from their records" in capsys.readouterr().out


# -- tasks


def test_ag_news_is_read_from_its_csv_and_its_validation_is_a_tenth_of_training(tmp_path):
    from raw_data import write_ag_news

    task = text_tasks.read(write_ag_news(tmp_path / "ag_news", train=40, test=12))
    assert task.classes == 4 and {split: len(rows) for split, rows in task.rows.items()} == {
        "train": 36, "validation": 4, "test": 12,
    }  # fmt: skip
    assert not {row.text for row in task.rows["train"]} & {row.text for row in task.rows["validation"]}


def test_samples_are_fixed_but_for_those_of_a_seed():
    rows = [Row(str(i), None, i % 2) for i in range(50)]
    task = text_tasks.TextTask("t", 2, {"train": rows, "test": rows})
    assert task.sample("test", 10) == task.sample("test", 20)[:10] and len(set(task.sample("test", 0))) == 50
    assert task.sample("train", 10, 0) != task.sample("train", 10, 1)


def test_test_texts_that_another_task_trains_on_are_told():
    def task(name, train, test):
        rows = {"train": [Row(*text, 0) for text in train], "test": [Row(*text, 0) for text in test]}
        return text_tasks.TextTask(name, 2, rows)

    own = [(f"text {i}", None) for i in range(198)]
    one = task("one", [("A good film , really !", None), ("left", "right"), ("of both", None)], [("else", None)])
    two = task("two", [("of both", None)], [*own, ("a good film, really", None), ("left", None)])  # 1 of 200 is few
    three = task(
        "three", [("else", None)], [("a GOOD film,really", None), ("Left", "right."), ("x", None), ("y", None)]
    )
    tasks = {each.name: each for each in (one, two, three)}
    assert text_tasks.overlaps(tasks, ["one", "two"]) == [("one", "three", 0.5)]
    assert text_tasks.overlaps(tasks, ["one"], least=0.001) == [("one", "two", 0.005), ("one", "three", 0.5)]
    (told,) = text_tasks.overlaps(tasks, ["three"])
    assert str(told) == "100% of one's test texts are among three's training texts"


def test_shared_texts_are_a_line_and_in_the_notes(place, tmp_path, capsys):
    shutil.copytree(place / "tasks", tmp_path / "tasks")
    tests = (place / "tasks" / "who" / "test.jsonl").read_text().splitlines()
    path = tmp_path / "tasks" / "where" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, line in zip(rows, tests[: len(tests) // 2], strict=False):
        row["text"] = json.loads(line)["text"].upper()
    write_lines(path, rows)
    call_main(SCRIPT, words(place, tmp_path / "r", TASKS_PATH=tmp_path / "tasks", methods="individual average"))
    said = "of who's test texts are among where's training texts"
    out = capsys.readouterr().out
    assert f"{said}; models merged with where have seen them" in out
    assert said in (tmp_path / "r" / "tables" / "accuracy.md").read_text()


def test_docstring_tasks_are_task_folders(tmp_path, monkeypatch):
    from expert_merging.data import docstring_reader

    few = docstring_reader.read_docstrings(("joblib", "numpy"))
    monkeypatch.setattr(docstring_reader, "read_docstrings", lambda: few)
    c = SimpleNamespace(WEMOE_TEXT_DIR=str(tmp_path), train_texts=30, validation_texts=6, select_texts=6, test_texts=8)
    folder = text_docs.write_once(c)
    there = text_tasks.read_all([folder], ("type", "default", "summary", "next", "order"), [])  # one library alone
    for name, task in there.items():
        assert 2 <= task.classes <= text_docs.COMMON and len(task.rows["test"]) >= 4, name
    assert {row.text2 is None for row in there["summary"].rows["test"]} == {False}
    monkeypatch.setattr(docstring_reader, "read_docstrings", lambda: 1 / 0)
    assert text_docs.write_once(c) == folder  # it is there


# -- the encoder


@pytest.fixture(scope="module")
def encoder(place):
    torch.manual_seed(1)
    model = text_encoder.load(place / "bert")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def batch(place):
    tokenizer = text_encoder.load_tokenizer(str(place / "bert"))
    rows = [Row("the river rose", None, 0), Row("a striker lost at night on Monday", None, 1), Row("the bank", None, 0)]
    return text_encoder.batch_of(text_encoder.tokens(tokenizer, rows, 16), range(3))


def test_regrouping_changes_nothing_and_pooling_passes_over_padding(encoder, batch):
    with torch.no_grad():
        plain, made = TextEncoder(encoder)(batch), TextEncoder(regrouped(encoder))(batch)
        torch.testing.assert_close(made, plain, atol=1e-6, rtol=0)
        alone = TextEncoder(encoder)(batch[2:, : int((batch[2, :, 0] >= 0).sum())])
    torch.testing.assert_close(plain[2:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("select", [text_encoder.FEED_FORWARD, text_encoder.ATTENTION])
def test_with_equal_weights_routing_is_task_arithmetic_and_padding_has_no_say(encoder, batch, select):
    base = TextEncoder(regrouped(encoder))
    experts = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        experts.append({n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.state_dict().items()})
    model = upscale(base, experts, select, lam=0.4, depth=2).eval()
    assert len(list(ensembles(model))) == 2
    with torch.no_grad():
        for _, layer in ensembles(model):
            layer.gate.weight.zero_()
        merged = {n: t + 0.4 * sum(e[n] - t for e in experts) for n, t in base.state_dict().items()}
        expected = torch.func.functional_call(base, merged, (batch,))
        torch.testing.assert_close(model(batch), expected, atol=1e-5, rtol=1e-4)
        for _, layer in ensembles(model):
            layer.gate.weight.normal_()
        together, alone = model(batch), model(batch[2:, : int((batch[2, :, 0] >= 0).sum())])
    torch.testing.assert_close(together[2:], alone, atol=1e-5, rtol=1e-4)


def test_joined_batches_are_padded_as_texts_are(batch):
    short = batch[:1, :3]
    both = joined([batch, short])
    assert both.shape == (4, batch.shape[1], 2) and (both[3, 3:] == -1).all() and torch.equal(both[:3], batch)
    pixels = torch.rand(2, 1, 3, 3)
    assert torch.equal(joined([pixels, pixels[:1]]), torch.cat([pixels, pixels[:1]]))


def test_a_task_lies_shortest_first(place):
    tokenizer = text_encoder.load_tokenizer(str(place / "bert"))
    rows = [Row("a striker lost at night on Monday", None, 3), Row("the bank", None, 1), Row("the river rose", None, 2)]
    task = text_encoder.task_of("t", rows, torch.zeros(4, 16), tokenizer, SimpleNamespace(max_tokens=16))
    assert isinstance(task, Task) and task.labels == [1, 2, 3] and task.ragged
    lengths = (task.inputs([0, 1, 2])[..., 0] >= 0).sum(dim=1).tolist()
    assert lengths == sorted(lengths)


# -- corruptions


@given(
    st.text(min_size=1, max_size=60).filter(str.strip), st.sampled_from(sorted(CORRUPTIONS)), st.sampled_from(STRENGTHS)
)
def test_a_spoilt_text_is_never_empty_and_the_same_each_time(text, name, strength):
    made = corrupted(text, name, strength, "here")
    assert made.strip() and made == corrupted(text, name, strength, "here")


def test_corruptions_by_hand():
    text = "one two three four five six seven eight nine ten " * 20
    shuffled = corrupted(text, "shuffled_words", 2, "x").split()
    assert sorted(shuffled) == sorted(text.split()) and shuffled != text.split()
    runs = corrupted(text, "shuffled_words", 1, "x").split()
    assert all(sorted(runs[i : i + 3]) == sorted(text.split()[i : i + 3]) for i in range(0, 200, 3))
    assert corrupted(text, "case", 2, "x") == text.upper()
    for name, strength, low, high in (("dropped_words", 1, 5, 40), ("dropped_words", 2, 40, 85)):
        assert low < 200 - len(corrupted(text, name, strength, "x").split()) < high
    for strength, low, high in ((1, 5, 40), (2, 35, 85)):
        wrong = sum(a != b for a, b in zip(corrupted(text, "typos", strength, "x").split(), text.split(), strict=True))
        assert low < wrong < high


# -- claims


def made_groups(gaps: dict[str, float], seeds: int = 4, examples: int = 400):
    """Records in which a method's examples are right as often as 0.6 and its gap say."""
    groups: dict = {}
    for seed in range(seeds):
        dice = np.random.default_rng(seed)
        luck = dice.random(examples)
        for method, gap in gaps.items():
            each = 100.0 * (luck < 0.6 + gap)
            record = {"part": "main", "tasks": ["a"], "a": {"accuracy": each.mean() / 100, "each": pack(each)}}
            groups.setdefault(f"seed{seed}", {})[f"main.{method}"] = record
    return groups


def test_claims_follow_the_scores():
    gaps = {
        "wemoe": 0.2,
        "adamerging_layer": 0.1,
        "ties": 0.1,
        "task_arithmetic": 0.15,
        "average": 0.0,
        "ewemoe_90": 0.2,
    }
    rows = {row["claim"]: row for row in text_claims.claims(made_groups(gaps, seeds=8), {}).rows}
    said = {claim: row["verdict"] for claim, row in rows.items()}
    assert said == {
        "wemoe > adamerging_layer": "held", "adamerging_layer > ties": "equivalent within the margin",
        "ties > task_arithmetic": "did not hold", "task_arithmetic > average": "held", "ewemoe_90 within 1 of wemoe": "held",
    }  # fmt: skip
    assert rows["wemoe > adamerging_layer"]["sign flips"] == "0.008"
    far = text_claims.claims(made_groups(gaps | {"ewemoe_90": 0.1}, seeds=8), {}).rows[-1]
    assert far["verdict"] == "did not hold" and far["difference"].startswith("-")
    one = text_claims.claims(made_groups(gaps, seeds=1), {}).rows
    assert {row["verdict"] for row in one} == {"cannot tell: one seed"} and not any(row["p"] for row in one)
    mean, low, high = (float(part.strip("[],")) for part in one[0]["difference"].split())  # over examples alone
    assert low < mean < high
    few = {row["claim"]: row for row in text_claims.claims(made_groups(gaps, seeds=3), {}).rows}
    told = few["wemoe > adamerging_layer"]
    assert told["verdict"] == "held" and told["sign flips"] == "0.250"  # of three seeds the least that flips can give


def test_the_note_says_where_adamerging_could_hardly_move():
    groups = made_groups({"wemoe": 0.1, "adamerging_layer": 0.1}, seeds=2)
    assert "AdaMerging" not in text_claims.claims(groups, {}).note
    for far, said in ((0.65, True), (0.45, False)):
        for runs in groups.values():
            learnt = {"steps_done": 50, "lr": 0.001, "coefficients": {"a": [0.7, far], "b": [0.72, 0.7]}}
            runs["main.adamerging_layer"] |= {"coefficient": 0.7, "adaptation": learnt}
        note = text_claims.claims(groups, {}).note
        assert ("50 steps of Adam at 0.001 and moved by 0.050 at most" in note) == said
        assert ("says nothing of the paper's order" in note) == said


def test_parts_hold_what_they_say():
    methods = (
        "individual",
        "pretrained",
        "multi_task",
        "average",
        "ties",
        "fisher",
        "wemoe",
        "ewemoe_90",
        "adamerging_task",
    )
    tasks = ("a", "b", "c", "d")
    names = {part: [run.name for run in text_plan.runs_of(part, methods, tasks, 3)] for part in text_plan.PARTS}
    assert names["main"] == [f"main.{method}" for method in methods]
    assert names["defaults"] == [f"defaults.{method}" for method in ("ties", "wemoe", "ewemoe_90", "adamerging_task")]
    assert names["validation"] == ["validation.wemoe", "validation.ewemoe_90"]
    assert names["number"] == [f"number{n}.{m}" for n in (2, 3) for m in ("average", "ties", "wemoe", "ewemoe_90")]
    assert names["generalization"] == [
        f"generalization.{m}" for m in ("pretrained", "average", "ties", "wemoe", "ewemoe_90")
    ]
    assert {len(run.tasks) for run in text_plan.runs_of("generalization", methods, tasks, 3)} == {3}
    static = ("individual", "average")
    assert not any(text_plan.runs_of(part, static, tasks, 3) for part in ("mixed", "modules", "depth", "guard"))
    every = [name for of_part in names.values() for name in of_part]
    assert len(set(every)) == len(every)


def test_shared_data_is_read_where_it_is():
    """The real folders; skipped without them."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "classification").is_dir():
        pytest.skip(f"{folder} is not there")
    tasks = text_tasks.read_all(
        [str(folder / "classification"), str(folder)], ("sst2", "trec", "mrpc", "ag_news"), ["mr"]
    )
    assert {name: task.classes for name, task in tasks.items()} == {
        "sst2": 2,
        "trec": 6,
        "mrpc": 2,
        "ag_news": 4,
        "mr": 2,
    }
    assert random.Random(0).choice(tasks["mrpc"].rows["test"]).text2
