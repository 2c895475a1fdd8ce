"""Differences between methods from made-up scores of single questions."""

import numpy as np
import pytest

from expert_merging.core.errors import UserError
from expert_merging.core.files import write_json
from expert_merging.data.scores import pack
from expert_merging.hemoe import question_gains, record_checks, report
from expert_merging.report.records import refuse_unlike

TASKS = ("easy", "hard")


def record(random, right, shares=(0.25, 0.5, 1.0), questions=400):
    """Accuracy `right` of k's at those activated shares."""
    ks = {}
    for k, (share, level) in enumerate(zip(shares, right, strict=True), 1):
        each = {task: 100.0 * (random.random(questions) < level - 0.1 * (task == "hard")) for task in TASKS}
        accuracy = {task: values.mean() / 100 for task, values in each.items()}
        packed = {task: pack(values) for task, values in each.items()}
        ks[str(k)] = {"share": dict.fromkeys(TASKS, share), "loss": {}, "accuracy": accuracy, "each": packed}
    return {"k": ks, "method": "x"}


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_gain_is_found_and_none_is_not(seeds):
    random = np.random.default_rng(seeds)
    good, weak, alike = (
        [record(random, right) for _ in range(seeds)] for right in ((0.7, 0.8, 0.8), (0.5, 0.6, 0.6), (0.5, 0.6, 0.6))
    )
    mean, low, high = question_gains.difference(good, weak)
    assert 0 < low < mean < high and mean == pytest.approx(20, abs=4)
    _, low, high = question_gains.difference(weak, alike)
    assert low < 0 < high


def test_curves_are_compared_over_the_shares_that_both_cover():
    """Of straight lines the mean over shares is known: 20 to 60 over 0.2..1 against 30, 50, 70 at 0.1, 0.6, 1."""

    def exact(shares, percents):
        ks = {}
        for k, (share, percent) in enumerate(zip(shares, percents, strict=True), 1):
            each = pack([100.0] * percent + [0.0] * (100 - percent))
            ks[str(k)] = {"share": {"a": share}, "accuracy": {"a": percent / 100}, "each": {"a": each}}
        return {"k": ks}

    low, high = exact((0.2, 1.0), (20, 60)), exact((0.1, 0.6, 1.0), (30, 50, 70))
    mean, _, _ = question_gains.difference([high], [low])
    assert mean == pytest.approx((12 + 10) / 2, abs=0.1)
    assert question_gains.difference([high], [high]) == pytest.approx((0.0, 0.0, 0.0), abs=1e-9)


def test_the_interval_of_one_seed_is_that_of_its_questions():
    random = np.random.default_rng(0)
    one, other = ([record(random, [level], shares=(0.5,), questions=1000)] for level in (0.6, 0.5))
    _, low, high = question_gains.difference(one, other)
    variance = sum((p * (1 - p)) for p in (0.6, 0.5, 0.5, 0.4)) / 1000 / 4  # of the mean over two tasks, in both arms
    assert high - low == pytest.approx(2 * 1.96 * 100 * variance**0.5, rel=0.08)


def test_tables_and_what_they_leave_out():
    random = np.random.default_rng(1)
    groups = {
        f"seed{s}": {"HEMoE": record(random, (0.7, 0.8, 0.8)), "random": record(random, (0.5, 0.6, 0.6))}
        for s in (0, 1)
    }
    groups["seed0"]["EMoE"] = {
        "k": {"1": {"share": {"easy": 0.5}, "accuracy": {"easy": 0.4}}}
    }  # of before each was kept
    rows = question_gains.gains(groups, [("both", "HEMoE", "random"), ("x", "HEMoE", "EMoE")], {"HEMoE": "H"}).rows
    assert [(row["difference"], row["seeds"], row["verdict"]) for row in rows] == [("H - random", 2, "above")]
    of_one = {"seed0": groups["seed0"]}
    (row,) = question_gains.gains(of_one, [("both", "HEMoE", "random")], {"HEMoE": "H"}).rows
    assert row["verdict"] == "cannot tell: one seed"
    table = question_gains.by_task(groups, ("HEMoE", "random", "EMoE"), {"HEMoE": "H"})
    assert [(row["model"], row["fire"]) for row in table.rows] == [(m, k) for m in ("H", "random") for k in "123"]


def test_seeds_with_other_questions_are_refused():
    random = np.random.default_rng(2)
    ours = [record(random, (0.7, 0.8, 0.8)), record(random, (0.7, 0.8, 0.8), questions=300)]
    with pytest.raises(UserError, match="not asked the same questions of easy"):
        question_gains.difference(ours, ours)


def test_records_of_other_constants_are_refused_and_unfinished_ones_left_out(capsys):
    random = np.random.default_rng(3)

    def groups(**seed1):
        identity = {"tune_lr": 1e-3, "asked_sha256": ["a"]}
        found = {
            f"seed{s}": {"HEMoE": record(random, (0.7, 0.8, 0.8)), "EMoE": record(random, (0.7, 0.8, 0.8))}
            for s in (0, 1)
        }
        for seed, of in found.items():
            for method, one in of.items():
                one["identity"] = identity | {"seed": seed, "method": method} | (seed1 if seed == "seed1" else {})
        return found

    alike = ("HEMOE_DIR", ("seed", "method"))
    refuse_unlike(groups(), *alike)
    for changed, said in (
        ({"tune_lr": 3e-4}, "tune_lr 0.0003, seed0/HEMoE with 0.001"),
        ({"asked_sha256": ["b"]}, "asked"),
    ):
        with pytest.raises(UserError, match=said):
            refuse_unlike(groups(**changed), *alike)
    found = groups()
    for point in found["seed1"]["EMoE"]["k"].values():
        del point["accuracy"]["hard"]
    record_checks.leave_out_unfinished(found, "_per_task")
    assert [list(of) for of in found.values()] == [["HEMoE", "EMoE"], ["HEMoE"]]
    assert "seed1/EMoE is left out: it has not been asked hard" in capsys.readouterr().out


def test_a_seed_with_fewer_points_is_drawn_at_those_that_all_have(tmp_path):
    random = np.random.default_rng(4)
    found = {f"seed{s}": {"HEMoE": record(random, (0.7, 0.8, 0.8))} for s in (0, 1)}
    for of in found.values():
        for point in of["HEMoE"]["k"].values():
            point["loss"] = {"easy": 1.0}
    del found["seed1"]["HEMoE"]["k"]["2"]
    report.draw(found, tmp_path)
    assert (tmp_path / "accuracy_by_share.png").stat().st_size > 5_000


def test_models_of_one_task_each_make_one_record_whatever_their_metrics(tmp_path):
    """ARC has acc_norm, WinoGrande has not."""
    for task, metrics in (("arc", {"acc": 0.5, "acc_norm": 0.6}), ("wino", {"acc": 0.7})):
        scored = {"main": metrics.get("acc_norm", metrics["acc"]), **metrics, "each": pack([100.0])}
        made = {"command": "", "versions": {}, "seed": 0, "identity": {}}
        write_json(tmp_path / "HEMoE" / f"evaluation_{task}.json", {**made, "k": {"4": {task: scored}}})
        measured = {"loss": {task: 1.0}, "share": {task: 0.5}, "share_by_layer": [0.5], "use": [[1.0]]}
        write_json(tmp_path / "HEMoE" / f"measure_{task}.json", {"k": {"4": measured}})
    point = report._one_of_each_task(tmp_path, "HEMoE")["k"]["4"]
    assert point["accuracy"] == {"arc": 0.6, "wino": 0.7}
    assert point["acc"] == {"arc": 0.5, "wino": 0.7} and point["acc_norm"] == {"arc": 0.6}
