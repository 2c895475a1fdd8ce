"""The primary contrasts from made-up records with a score for each example."""

import json
from pathlib import Path

import numpy as np
import pytest

from expert_merging.analysis import crossed_bootstrap as bootstrap
from expert_merging.core.errors import UserError
from expert_merging.data.scores import pack, unpack
from expert_merging.report import evidence
from expert_merging.report.caem_contrasts import by_interval, compared, contrasts
from expert_merging.report.caem_intervals import intervals
from expert_merging.report.claims import HELD, UNKNOWN, above, all_of
from expert_merging.report.evidence import Evidence

TASKS = ("topic", "qa")
NAMES = ("Baseline-4", "Baseline-4-same-compute", "CAEM-4-Avg", "Average-4", "REAP-4", "MSMoE-4", "CAEM-4")


def record(random, level, tasks=TASKS, examples=300, validation=1.0):
    easiness = np.random.default_rng(0).normal(size=(len(TASKS), examples))  # the same examples for all
    content = {"tasks": list(tasks), "overall": {"validation": validation}}
    for number, task in enumerate(TASKS):
        if task in tasks:
            right = level + 0.5 * easiness[number] + random.normal(size=examples) > 0
            content[f"{task}_data"] = {"main_score": "accuracy", "test_each": pack(100.0 * right)}
    return content


def made(seeds, gain=0.0, spread=0.02):
    random, found = np.random.default_rng(1), {}
    for seed in range(seeds):
        found[seed] = {f"single-task-4 {task}": record(random, 0.3, (task,)) for task in TASKS}
        for name in NAMES:
            level = 0.2 + gain * (name == "CAEM-4") + spread * random.normal()
            found[seed][name] = record(random, level, validation=0.9 + 0.05 * (name == "MSMoE-4"))
    return Evidence("night", 4, 6, TASKS, found)


def rows(e):
    return {(row["contrast"], row["measure"]): row for row in contrasts(e).rows}


def test_five_contrasts_on_every_measure_and_the_rival_that_validates_best():
    found = rows(made(3))
    against = ["Baseline-4", "Baseline-4-same-compute", "CAEM-4-Avg", "Average-4", "MSMoE-4"]
    assert list(found) == [(f"CAEM-4 - {b}", m) for m in ("Overall", "Overall, pooled", *TASKS) for b in against]
    assert all(row["seeds"] == 3 and row["told"] == "nothing with so few seeds" for row in found.values())
    assert all(row["verdict"].startswith(("cannot tell (", "equivalent")) for row in found.values())


def test_a_real_gain_held_with_eight_seeds_and_none_did_not():
    row = rows(made(8, gain=0.4))["CAEM-4 - Baseline-4", "Overall"]
    assert row["verdict"] == "held" and float(row["p"]) < 0.05
    mean, low, high = (float(x) for x in row["difference"].replace("[", "").replace("]", "").replace(",", "").split())
    assert 0 < low < mean < high
    assert rows(made(8, gain=-0.4))["CAEM-4 - Baseline-4", "Overall"]["verdict"] == "did not hold"
    nothing = rows(made(8))["CAEM-4 - Baseline-4", "Overall"]
    assert nothing["verdict"].startswith(("cannot tell (", "equivalent")) and "%)" in nothing["told"]


def test_each_row_is_judged_as_the_protocol_says(monkeypatch):
    """p after Holm over the five contrasts of its measure, equivalence within 2% of the single-task score, and what could have
    been told at Holm's hardest step."""
    from expert_merging.report import caem_contrasts

    e, margins, verdict = made(8, gain=0.1), [], bootstrap.verdict
    monkeypatch.setattr(
        caem_contrasts.bootstrap,
        "verdict",
        lambda found, p, margin: (margins.append(margin), verdict(found, p, margin))[1],
    )
    found = rows(e)
    pairs = [tuple(contrast.split(" - ")) for contrast, measure in found if measure == "qa"]
    single = np.mean([one["test"] for one in _means(e, "single-task-4 qa", "qa")])
    for measure, unit, digits in (("Overall", 1.0, 4), ("qa", single, 2)):
        of_pairs = [one for one, _ in compared(e, pairs, (measure,))[measure]]
        ps = bootstrap.holm([bootstrap.sign_flip_p(one.by_seed) for one in of_pairs])
        for pair, one, p in zip(pairs, of_pairs, ps, strict=True):
            row, told = found[" - ".join(pair), measure], bootstrap.detectable(one, 5)
            assert row["p"] == f"{p:.3f}" and row["told"] == f"{told:.{digits}f} ({told / unit:.1%})"
    assert margins[:5] == [0.02] * 5 and margins[-5:] == pytest.approx([0.02 * single] * 5)


def test_the_rival_is_chosen_over_the_seeds_that_have_run_them_all():
    e = made(3)
    e.records[0]["REAP-4"]["overall"]["validation"] = 2.0
    assert ("CAEM-4 - REAP-4", "qa") in rows(e)
    del e.records[0]["MSMoE-4"]
    assert ("CAEM-4 - MSMoE-4", "qa") in rows(e)


def test_one_model_under_two_names_is_said_to_be_one():
    e = made(2)
    for of_seed in e.records.values():
        of_seed["CAEM-4-Avg"] = of_seed["CAEM-4"]
    (((found, _),),) = compared(e, [("CAEM-4", "CAEM-4-Avg")], ("Overall",)).values()
    assert by_interval(found, 4)[1] == "cannot tell (the same in every seed)"
    assert above([0.0, 0.0]) == "cannot tell (the same in every seed)" and all_of([HELD, above([0.0, 0.0])]) == UNKNOWN


def test_one_seed_says_so():
    row = rows(made(1))["CAEM-4 - Baseline-4", "qa"]
    assert row["verdict"] == "cannot tell: one seed" and row["seeds"] == 1 and row["p"] == row["told"] == ""
    mean, low, high = numbers(row["difference"])
    assert low < mean < high and high - low < 20  # of 300 examples, over these alone


def numbers(text):
    return [float(number) for number in text.replace("[", "").replace("]", "").replace(",", "").split()]


@pytest.mark.parametrize("seeds", [1, 4])
def test_each_score_has_its_interval_over_seeds_and_examples(seeds):
    e = made(seeds)
    del e.records[0]["REAP-4"]["qa_data"]["test_each"]
    found = {row["configuration"]: row for row in intervals(e).rows}
    expected = [name for name in e.multi_task() if name != "REAP-4" or seeds > 1]
    assert list(found) == ["single-task models, 4 experts", *expected]
    row = found["CAEM-4"]
    each = [unpack(e.records[seed]["CAEM-4"]["qa_data"]["test_each"]) for seed in range(seeds)]
    mean, low, high = numbers(row["qa accuracy"])
    assert mean == pytest.approx(np.mean(each), abs=0.01) and row["seeds"] == seeds
    if seeds == 1:  # a share of 300 examples: the normal's interval is near
        error = np.std(each[0]) / 300**0.5
        assert low == pytest.approx(mean - 1.96 * error, abs=0.5) and high == pytest.approx(
            mean + 1.96 * error, abs=0.5
        )
    ratios = [
        np.mean(
            [
                _means(e, "CAEM-4", task)[seed]["test"] / _means(e, f"single-task-4 {task}", task)[seed]["test"]
                for task in TASKS
            ]
        )
        for seed in range(seeds)
    ]
    assert numbers(row["Overall"])[0] == pytest.approx(np.mean(ratios), abs=1e-4)


def test_overall_is_over_the_tasks_that_a_single_task_model_scores_on():
    """As in the other tables."""
    e = made(1)
    e.records[0]["single-task-4 topic"]["topic_data"]["test_each"] = pack(np.zeros(300))
    (row,) = (row for row in intervals(e).rows if row["configuration"] == "CAEM-4")
    single, run = (unpack(e.records[0][name]["qa_data"]["test_each"]).mean() for name in ("single-task-4 qa", "CAEM-4"))
    assert numbers(row["Overall"])[0] == pytest.approx(run / single, abs=1e-4)


def test_runs_without_scores_of_examples_are_left_out():
    e = made(3)
    del e.records[1]["CAEM-4-Avg"]["qa_data"]["test_each"]
    assert rows(e)["CAEM-4 - CAEM-4-Avg", "qa"]["seeds"] == 2 and rows(e)["CAEM-4 - Average-4", "qa"]["seeds"] == 3
    for of_seed in e.records.values():
        del of_seed["single-task-4 topic"]["topic_data"]["test_each"]
    assert contrasts(e).rows == []


def test_other_test_examples_are_refused():
    e = made(2)
    e.records[1]["CAEM-4"] = record(np.random.default_rng(0), 0.2, examples=250)
    with pytest.raises(UserError, match="CAEM-4: the seeds .* were not tested on the same examples of topic"):
        contrasts(e)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"versions": {"protocol": "b"}}, "under different versions of docs/protocol.md"),
        ({"identity": {"ancestor": "y"}}, "from different bases"),
    ],
)
def test_records_of_several_protocols_or_bases_are_refused_by_name(tmp_path: Path, change, said):
    one = {"versions": {"protocol": "a"}, "identity": {"ancestor": "x"}}
    files = {}
    for seed, content in enumerate((one, {**one, **change})):
        files[seed] = {"Baseline-4": tmp_path / f"{seed}.json"}
        files[seed]["Baseline-4"].write_text(json.dumps(content))
    evidence.collect(tmp_path / "report", "night", (4, 6), TASKS, files)
    with pytest.raises(UserError, match=f"Baseline-4 of seed 0 and Baseline-4 of seed 1 were made {said}"):
        evidence.read(tmp_path / "report")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 2}, "lr was 1, is now 2"),
        ({"data": {"qa": "d"}}, "data.qa was 'c', is now 'd'"),
        ({"goals": 1, "seed": 1, "imported": 3}, ""),
    ],
)
def test_records_of_other_constants_or_data_are_refused_by_name(tmp_path: Path, change, said):
    """What each seed has of its own aside."""
    files = {}
    for seed, own in enumerate(({}, change)):
        files[seed] = {"Baseline-4": tmp_path / f"{seed}.json"}
        identity = {"seed": 0, "goals": 0, "lr": 1, "data": {"qa": "c"}, **own}
        files[seed]["Baseline-4"].write_text(json.dumps({"versions": {}, "identity": identity}))
    evidence.collect(tmp_path / "report", "night", (4, 6), TASKS, files)
    if not said:
        assert list(evidence.read(tmp_path / "report").records) == [0, 1]
        return
    with pytest.raises(UserError, match=f"Baseline-4 of seed 1 was made with other constants or data .* 0 .{said}"):
        evidence.read(tmp_path / "report")


def test_secondary_contrasts_by_the_interval_alone():
    from expert_merging.report.caem_secondary import secondary

    e = made(4, gain=0.5)
    for seed, of_seed in e.records.items():
        of_seed["CAEM-4-to-6"] = record(np.random.default_rng(100 + seed), -0.5)
        of_seed["CAEM-6"] = record(np.random.default_rng(200 + seed), 0.4)
    found = {(row["contrast"], row["measure"]): row for row in secondary(e).rows}
    pairs = [
        "CAEM-4 - Baseline-4",
        "CAEM-4-Avg - CAEM-4",
        "CAEM-4 - CAEM-4-to-6",
        "CAEM-4-to-6 - CAEM-6",
    ]  # those with runs
    assert list(found) == [(pair, measure) for measure in ("Overall", *TASKS) for pair in pairs]
    assert {found[pairs[0], measure]["verdict"] for measure in ("Overall", *TASKS)} == {"above"}
    assert found["CAEM-4-Avg - CAEM-4", "Overall"]["verdict"] == "below"
    assert [found[pair, "qa"]["verdict"] for pair in pairs[2:]] == ["above", "below"]
    paper = {task: found["CAEM-4 - CAEM-4-to-6", task]["paper"] for task in TASKS}
    assert paper == {"topic": "above", "qa": "below"}  # SQuAD is the one task that 16 experts help in table 2
    row = found[pairs[0], "topic"]
    ours = np.mean([one["test"] for one in _means(e, "CAEM-4", "topic")])
    theirs = np.mean([one["test"] for one in _means(e, "Baseline-4", "topic")])
    assert row["share"] == f"{ours / theirs - 1:+.1%}" and float(row["difference"].split()[0]) == pytest.approx(
        ours - theirs, abs=0.01
    )
    alone = {(row["contrast"], row["measure"]): row for row in secondary(made(1)).rows}
    assert alone[pairs[0], "Overall"]["verdict"] == "cannot tell: one seed"


def _means(e, name, task):
    return [{"test": unpack(of_seed[name][f"{task}_data"]["test_each"]).mean()} for of_seed in e.records.values()]
