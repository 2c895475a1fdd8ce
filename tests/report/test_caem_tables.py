"""Tables, claims and the report from made-up records, without a model."""

import csv
import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.core.errors import UserError
from expert_merging.data.scores import pack
from expert_merging.report import claims, evidence, folders, publish
from expert_merging.report.caem_tables import WING
from expert_merging.report.tables import Stat, Table, stat

TASKS = ("ag_news", "squad")
SCORES = {"ag_news": "accuracy", "squad": "exact_match"}


def scored(value, loss=1.0):
    return {task: {SCORES[task]: value + number, "loss": loss} for number, task in enumerate(TASKS)}


def with_overall(value, overall):
    return {"test": scored(value), "validation": scored(value), "overall": {"test": overall, "validation": overall}}


def history(name, tasks, value, overall=None, experts=4, **more):
    entropy = {task: [0.5 + 0.1 * number, 0.6] for number, task in enumerate(TASKS) if task in tasks}
    content = {
        "name": name, "command": f"python {name}.py", "versions": {"commit": "abc", "torch": "2"}, "tasks": list(tasks),
        "identity": {"lr": 0.1, "seed": 0}, "device": "cpu", "processes": 1, "threads": 1, "seconds": 12.5,
        "parameters": 4_800_000, "experts_num": experts, "selection": [0.5, 0.6], "best_epoch": 2,
        "usage": {stack: {task: [[5, 3, 2, 0], [1, 1, 1, 7]] for task in tasks} for stack in ("encoder", "decoder")},
        "entropy": {"encoder": entropy, "decoder": entropy}, **more,
    }  # fmt: skip
    for task in tasks:
        epochs = [scored(value - 1, 1.2)[task], scored(value, 1.1)[task]]
        content[f"{task}_data"] = {
            "main_score": SCORES[task], "validation": epochs, "test": epochs[1], "test_epochs": [epochs[1], epochs[0]],
        }  # fmt: skip
    if overall is not None:
        content["overall"] = {"test": overall, "validation": overall}
    return content


def caem(name, value, overall, counts=((1, 3), (2, 2))):
    return history(
        name, TASKS, value, overall, before=with_overall(value / 2, overall / 4),
        allocation={"encoder": [list(layer) for layer in counts], "decoder": [[2, 2], [2, 2]]},
        weights={"encoder": [0.4, 0.6], "decoder": [0.5, 0.5]},
    )  # fmt: skip


def pair(overall, cka):
    layers = {stack: [cka, 1.0] for stack in ("encoder", "decoder")}
    return {
        "command": "python tools/compare_models.py", "versions": {"commit": "abc", "torch": "2"}, "identity": {},
        "soup": {"test": scored(10.0), "overall": overall},
        "line": {"t": [0, 0.5, 1], "loss": {task: [1.0, 2.0, 1.0] for task in TASKS}, "barrier": 1.0, "at": 0.5},
        "cka": {when: {task: layers for task in TASKS} for when in ("before", "after")},
    }  # fmt: skip


def merged(name, value, overall, **more):
    content = {
        "name": name, "command": f"python {name}.py", "versions": {"commit": "abc", "torch": "2"}, "identity": {},
        "tasks": list(TASKS), "parameters": 4_800_000, "bytes": 19_200_000, "seconds_to_merge": 1.5, "trainable": 0,
        "overall": {"test": overall, **({"mixed": overall - 0.1} if "routing" in more else {})}, **more,
    }  # fmt: skip
    return content | {f"{task}_data": {"main_score": SCORES[task], "test": scored(value)[task]} for task in TASKS}


def records(shift=0.0):
    usage = [
        {
            "input_length": n,
            "mean_length": n - 0.5,
            "counting": counting,
            "entropy": {"encoder": [h, h], "decoder": [h]},
        }
        for n in (8, 16)
        for counting, h in (("paper", 0.8), ("released", 0.3))
    ]
    rows = {"most common training answer": {"test": scored(5.0), "overall": {"test": 0.2}}}
    rows["base model, not fine-tuned"] = with_overall(1.0, 0.05)
    made = {"reference-4": {"rows": rows}, "reference-6": {"rows": rows}}
    for task in TASKS:
        made |= {f"single-task-{n} {task}": history("single", [task], 50.0, experts=n) for n in (4, 6)}
        made[f"usage {task}"] = {"rows": usage, "command": "python tools/count_expert_usage.py", "versions": {}}
    made["Baseline-4"] = history("Baseline_[4]", TASKS, 40.0, 0.90)
    made["Baseline-4-same-compute"] = history("more", TASKS, 40.0, 0.90)
    made["Baseline-6"] = history("Baseline_[6]", TASKS, 40.0, 0.90, experts=6)
    for name, overall in (("CAEM-4", 1.0), ("CAEM-4-Avg", 0.95), ("Average-4", 0.94), ("CAEM-4-counts", 0.97)):
        made[name] = caem(name, 42.0, overall + shift)
    made["CAEM-4-counts"]["allocation"]["encoder"] = [[1, 3], [3, 1]]
    for name, overall in (("CAEM-4-to-6", 0.99), ("CAEM-6", 0.98), ("CAEM-6-Avg", 0.97)):
        made[name] = caem(name, 42.0, overall + shift) | {"experts_num": 6}
    made["merging-4 average"] = merged("average", 20.0, 0.4 + shift)
    weights = {layer: {task: [0.3, 0.4] for task in TASKS} for layer in ("encoder.block.0.layer.1.mlp", "other")}
    made["merging-4 wemoe"] = merged("wemoe", 30.0, 0.6 + shift, routing=weights, adaptation={"seconds": 60.0})
    made["CAEM-4 + Baseline-4"] = pair(0.8, 0.5)
    made["CAEM-4-to-6 + Baseline-6"] = pair(0.01, 0.5)
    made["CAEM-4-to-6 + CAEM-4"] = {key: value for key, value in pair(0.0, 0.9995).items() if key != "soup"}
    return made


@pytest.fixture
def without_figures(monkeypatch):
    """Drawing takes most of the time; the test of the page does it once."""
    monkeypatch.setattr(sys.modules[__name__], "WING", replace(WING, draw=lambda e, folder: {}))


@pytest.fixture
def folder(tmp_path):
    """A report's folder with records of three seeds that differ a little."""
    files = {}
    for seed, shift in enumerate((0.0, 0.01, -0.005)):
        files[seed] = {}
        for name, content in records(shift).items():
            files[seed][name] = tmp_path / f"{seed}-{name}.json"
            files[seed][name].write_text(json.dumps(content))
    evidence.collect(tmp_path / "report", "tiny", (4, 6), TASKS, files)
    return tmp_path / "report"


def write(folder):
    return folders.write(folder, WING)


def check(folder):
    return folders.check(folder, WING)


def rows_of(folder, name):
    with (folder / "tables" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_table_and_figure(folder):
    tables = write(folder)
    assert {table.name for table in tables} == {
        "scores", "claims", "entropies", "allocation", "soups", "similarity", "merged_only",
        "deviations", "best_on_test", "entropy_by_length", "cost", "merging",
    }  # fmt: skip
    assert check(folder) == []
    html = (folder / "report.html").read_text()
    assert html.count("data:image/svg+xml") == len(list((folder / "figures").glob("*.svg"))) > 8
    assert not re.search(r'(src|href)="(?!data:|#)', html)  # nothing from elsewhere
    for table in tables:
        assert (folder / "tables" / f"{table.name}.tex").read_text().count(r"\toprule") == 1
        for row in rows_of(folder, table.name):
            file, runs = row["from"].split(": ")
            content = json.loads((folder / file.replace("{0,1,2}", "0")).read_text())
            assert all(run in content for run in runs.split("; ")), row["from"]


def test_scores_are_means_over_seeds(without_figures, folder):
    write(folder)
    row = next(row for row in rows_of(folder, "scores") if row["configuration"] == "CAEM-4")
    assert float(row["Overall"]) == pytest.approx(1.0 + 0.005 / 3)
    assert [float(x) for x in row["Overall by seed"].split()] == pytest.approx([1.0, 1.01, 0.995])
    assert float(row["Overall sd"]) == pytest.approx(0.0076376, rel=1e-4)
    assert "| CAEM-4 | 1.0017 ± 0.0076 |" in (folder / "tables" / "scores.md").read_text()


def test_a_task_that_overall_leaves_out_is_named(without_figures, folder):
    path = folder / "seed1.json"
    content = json.loads(path.read_text())
    content["single-task-4 squad"]["squad_data"]["test"]["exact_match"] = 0.0
    path.write_text(json.dumps(content))
    write(folder)
    assert "the single-task score being 0: squad (4 experts, seed 1)." in (folder / "tables" / "scores.md").read_text()


def test_models_that_learnt_nothing(without_figures, folder):
    for path in folder.glob("seed*.json"):
        content = json.loads(path.read_text())
        for record in content.values():
            if "overall" in record:
                record["overall"] = {"test": 0.0, "validation": 0.0}
        path.write_text(json.dumps(content))
    write(folder)
    assert rows_of(folder, "soups")[0]["kept"] == "" and check(folder) == []
    assert not any(row["claim"].startswith("soups") for row in rows_of(folder, "claims"))


def test_claims(without_figures, folder):
    write(folder)
    verdicts = {(row["claim"], row["numbers"].split(":")[0]): row["verdict"] for row in rows_of(folder, "claims")}
    assert verdicts["CAEM above Baseline on Overall", "CAEM-4 - Baseline-4"] == "held"
    assert verdicts["4 above 4-to-6", "CAEM-4 - CAEM-4-to-6"] == "held"  # the same difference for every seed
    by_claim = {row["claim"]: row for row in rows_of(folder, "claims")}
    assert by_claim["entropy ag_news < squad: encoder, 4 experts"]["verdict"] == "held"
    soups = {claim: row["verdict"] for claim, row in by_claim.items() if claim.startswith("soups")}
    assert list(soups.values()) == ["held", "held"]
    assert next(row for claim, row in by_claim.items() if "CKA > 0.999" in claim)["verdict"] == "held"


def test_a_contrast_with_scores_of_examples_has_one_verdict(without_figures, folder):
    """By the interval that has the chance in the test examples; not a second one in the claims."""
    runs = ["CAEM-4", "Baseline-4", *(f"single-task-4 {task}" for task in TASKS)]
    for path in folder.glob("seed*.json"):
        content = json.loads(path.read_text())
        for run in runs:
            for task in TASKS if run in runs[:2] else (run.split()[1],):
                content[run][f"{task}_data"]["test_each"] = pack(np.full(20, 50.0))
        path.write_text(json.dumps(content))
    write(folder)
    claimed = [row["numbers"].split(":")[0] for row in rows_of(folder, "claims")]
    contrasts = [row["contrast"] for row in rows_of(folder, "contrasts")]
    assert "CAEM-4 - Baseline-4" in contrasts and "CAEM-4 - Baseline-4" not in claimed
    assert "CAEM-4 - CAEM-4-to-6" in claimed  # the other has none


def test_what_the_paper_reads_off_its_figures_is_tested(without_figures, folder):
    """CKA rises from `before` to `after` but for 8-to-16; a joint model's tasks share experts more than their own models."""
    for number, path in enumerate(sorted(folder.glob("seed*.json"))):
        content = json.loads(path.read_text())
        for name, after in (
            ("CAEM-4 + Baseline-4", 0.7),
            ("CAEM-4-to-6 + Baseline-6", 0.9),
            ("CAEM-4-to-6 + CAEM-6", 0.6),
        ):
            content[name] = content[name] if name in content else json.loads(json.dumps(content["CAEM-4 + Baseline-4"]))
            for task in TASKS:
                content[name]["cka"]["after"][task]["encoder"] = [after + 0.01 * number, 1.0]
        content["CAEM-6 + Baseline-6"] = json.loads(json.dumps(content["CAEM-4 + Baseline-4"]))
        content["CAEM-6 + Baseline-6"]["cka"]["after"]["ag_news"]["decoder"] = [0.2 - 0.01 * number, 0.9]
        for stack in ("encoder", "decoder"):
            content["single-task-4 squad"]["usage"][stack]["squad"] = [[0, 0, 0, 10 + number], [9, 1, 0, 0]]
        path.write_text(json.dumps(content))
    write(folder)
    by_claim = {row["claim"]: row for row in rows_of(folder, "claims")}
    assert by_claim["fine-tuning makes the encoders of CAEM-4 and Baseline-4 more alike (CKA)"]["verdict"] == "held"
    assert not any("encoders of CAEM-4-to-6" in claim for claim in by_claim)
    assert by_claim["the decoders of CAEM-6 and Baseline-6 part most on ag_news (CKA)"]["verdict"] == "held"
    nearer = "CAEM-4-to-6 is nearer to Baseline-6 than to CAEM-6 (CKA): "
    assert by_claim[nearer + "encoder"]["verdict"] == "held"
    assert by_claim[nearer + "decoder"]["verdict"] == "cannot tell (the same in every seed)"
    for stack in ("encoder", "decoder"):
        alike = by_claim[f"tasks use the experts of CAEM-4 more alike than those of their own models: {stack}"]
        assert alike["verdict"] == "held" and "- CAEM-4: +0." in alike["numbers"]


def test_entropy_pooled_and_distance_between_tasks_by_hand():
    from expert_merging.report.caem_usage import pooled_entropy, task_distance

    apart = {"a": [[4, 0], [1, 1]], "b": [[0, 7], [5, 5]]}  # one layer without an expert in common, one used alike
    record = {"usage": {"encoder": apart}}
    assert pooled_entropy(record, "encoder") == pytest.approx(1.0)  # tasks weigh the same, whatever their tokens
    assert task_distance([apart]) == pytest.approx((1 + 0) / 2)
    assert task_distance([{"a": apart["a"]}, {"b": apart["b"]}]) == pytest.approx(0.5)
    assert pooled_entropy({"usage": {"encoder": {"a": [[3, 0]], "b": [[5, 0]]}}}, "encoder") == 0


def test_table_3_has_pooled_entropy_and_distance(without_figures, folder):
    write(folder)
    row = next(row for row in rows_of(folder, "entropies") if row["configuration"] == "CAEM-4")
    assert 0 < float(row["encoder, pooled"]) < 1 and float(row["decoder, distance"]) == 0  # both tasks use alike


def test_audit_tables(without_figures, folder):
    write(folder)
    counts = next(row for row in rows_of(folder, "deviations") if row["deviation"] == "counts")
    assert float(counts["layers allocated otherwise"]) == 1 and counts["minus paper"].startswith("-0.03")
    best = next(row for row in rows_of(folder, "best_on_test") if row["configuration"] == "CAEM-4")
    assert float(best["by test"]) == pytest.approx((42 / 50 + 43 / 51) / 2)  # the first epoch tests better
    lengths = rows_of(folder, "entropy_by_length")
    assert [(row["task"], row["cut to"]) for row in lengths[:2]] == [("ag_news", "8"), ("ag_news", "16")]
    assert float(lengths[0]["encoder, released"]) == 0.3


def test_merging_methods_stand_beside_caem_and_baseline(without_figures, folder):
    write(folder)
    rows = {row["method"]: row for row in rows_of(folder, "merging")}
    assert list(rows) == ["average", "WEMoE", "CAEM-4, merged", "CAEM-4, trained", "Baseline-4, trained"]
    assert float(rows["WEMoE"]["Overall"]) == pytest.approx(0.6 + 0.005 / 3)
    assert float(rows["WEMoE"]["mixed"]) == pytest.approx(0.5 + 0.005 / 3) and rows["average"]["mixed"] == ""
    assert float(rows["CAEM-4, merged"]["Overall"]) == pytest.approx((1.0 + 0.005 / 3) / 4)
    assert rows["WEMoE"]["s to adapt"] == "60.0" and float(rows["average"]["MB"]) == 19.2
    for seed in range(3):  # a seed without one of the methods
        path = folder / f"seed{seed}.json"
        content = json.loads(path.read_text())
        del content["merging-4 average"]
        path.write_text(json.dumps(content))
    write(folder)
    assert [row["method"] for row in rows_of(folder, "merging")][0] == "WEMoE" and check(folder) == []


def test_the_grid_and_the_script_name_the_methods_of_the_registry():
    from expert_merging.experiment import grid
    from expert_merging.merging.registry import METHODS
    from expert_merging.run.constants import read_constants
    from neighbours import WEMoE_multi_task_merging as script

    c = read_constants({"__file__": grid.__file__, "experts_num": 4, "larger_experts_num": 6}, ["--scale", "tiny"])
    named = [f"merging-4 {method}" for method in METHODS]
    assert [name for name in grid.grid(c).steps if name.startswith("merging-4 ")] == named
    assert grid.names_of("merging-4", c, grid.grid(c)) == named and script.methods == tuple(METHODS)


def test_seeds_and_runs_published_before_stay(without_figures, folder, tmp_path):
    """A seed at a time may come from machines that do not keep what they made."""
    files = {}
    for seed, names in ((1, ("CAEM-4",)), (7, ("CAEM-4", "Baseline-4"))):
        files[seed] = {}
        for name in names:
            files[seed][name] = tmp_path / f"new-{seed}-{name}.json"
            files[seed][name].write_text(json.dumps(caem(name, 60.0, 2.0)))
    evidence.collect(tmp_path / "next", "tiny", (4, 6), TASKS, files, earlier=folder)
    found = evidence.read(tmp_path / "next").records
    assert list(found) == [0, 1, 2, 7] and found[0] == evidence.read(folder).records[0]
    assert found[1]["CAEM-4"]["overall"]["test"] == 2.0  # the new one
    assert found[1]["Baseline-4"] == evidence.read(folder).records[1]["Baseline-4"]
    evidence.collect(tmp_path / "first", "tiny", (4, 6), TASKS, files, earlier=tmp_path / "nothing yet")
    assert list(evidence.read(tmp_path / "first").records) == [1, 7]


def test_one_seed_cannot_tell(without_figures, tmp_path):
    files = {0: {}}
    for name, content in records().items():
        files[0][name] = tmp_path / f"{name}.json"
        files[0][name].write_text(json.dumps(content))
    evidence.collect(tmp_path / "report", "tiny", (4, 6), TASKS, files)
    write(tmp_path / "report")
    rows = [row for row in rows_of(tmp_path / "report", "claims") if row["claim"].startswith("CAEM above")]
    assert {row["verdict"] for row in rows} == {"cannot tell"}
    assert "±" not in (tmp_path / "report" / "tables" / "scores.md").read_text()


def test_the_paper_stands_beside_at_its_scale(without_figures, folder):
    facts = folder / "experiment.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"scale": "paper"}))
    write(folder)
    assert "paper: Overall" in rows_of(folder, "scores")[0]


@pytest.mark.parametrize("spoil", ["change", "remove"])
def test_check_sees_what_does_not_follow(without_figures, folder, spoil):
    write(folder)
    path = folder / "tables" / "soups.md"
    path.write_text(path.read_text().replace("0.8000", "0.9000")) if spoil == "change" else path.unlink()
    assert [line.split()[0] for line in check(folder)] == [str(path)]


def test_what_is_no_report(without_figures, tmp_path):
    with pytest.raises(UserError, match="it is not a report"):
        check(tmp_path)


def test_a_page_takes_its_tables_from_files(without_figures, folder, tmp_path):
    write(folder)
    shutil.copytree(folder, tmp_path / "root" / "results" / "caem" / "tiny")
    old = "before\n<!-- table: results/caem/tiny/tables/soups.md -->\nold\n<!-- end -->\nafter\n"
    text = publish.filled(old, tmp_path / "root")
    assert "old" not in text and "| CAEM-4 + Baseline-4 |" in text and "seed{" not in text
    assert text.startswith("before\n") and text.endswith("after\n") and publish.filled(text, tmp_path / "root") == text
    with pytest.raises(UserError, match="not there"):
        publish.filled(old.replace("soups", "poems"), tmp_path / "root")


# ---------------------------------------------------------------- tables and verdicts by themselves


def test_latex_and_markdown_escape():
    table = Table("t", "A & B", "50%", [{"a_b": "x|y", "n": 1.5, "from": "f"}])
    assert (
        r"A \& B. 50\%" in table.latex()
        and r"a\_b & n \\" in table.latex()
        and "f" not in table.latex().split("x|y")[1][:9]
    )
    assert r"x\|y" in table.markdown() and "<td>x|y</td>" not in table.html() and 'title="f"' in table.html()


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6))
def test_stat(values):
    one = stat(values, 3)
    assert min(values) - 1e-9 <= one.mean <= max(values) + 1e-9
    assert (one.sd is None) == (len(values) == 1) and (" ± " in str(one)) == (len(values) > 1)


def test_no_numbers_no_stat():
    assert stat([None, float("nan")]) is None and stat([None, 2.0]) == Stat((2.0,), 2)


@given(st.lists(st.floats(-10, 10), min_size=0, max_size=8))
def test_verdicts_are_fair(differences):
    """A claim and its opposite never both hold, and turning the sign turns the verdict."""
    turned = {"held": "did not hold", "did not hold": "held", "cannot tell": "cannot tell"}
    if len(differences) > 1 and not any(differences):
        turned = {claims.above(differences): "cannot tell (the same in every seed)"}
    assert claims.above([-d for d in differences]) == turned[claims.above(differences)]
    if len(differences) < 2:
        assert claims.above(differences) == "cannot tell"


def test_verdicts():
    assert claims.above([1.0, 1.1, 0.9]) == "held" and claims.above([1.0, -1.1, 0.9]) == "cannot tell"
    assert claims.above([1.0, 1.0]) == "held" and claims.above([0.0, 0.0]) == "cannot tell (the same in every seed)"
    assert claims.all_of(["held", "cannot tell"]) == "cannot tell" and claims.all_of([]) == "cannot tell"
    assert claims.all_of(["held", "did not hold", "cannot tell"]) == "did not hold"
