"""MEO_finetune.py --scale real: tasks in folders, the scores of single examples, the claims' statistics, and bad input."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call_main, run_script
from raw_data import sentences, tiny_tokenizer

from expert_merging.analysis import crossed_bootstrap as bootstrap
from expert_merging.core.errors import UserError
from expert_merging.data.scores import pack, unpack
from expert_merging.data.text_tasks import SPLITS
from expert_merging.meo import claims, recipes, run_records, several_tasks

SCRIPT = "neighbours/MEO_finetune.py"


def write_task(folder, classes, pairs=False, sizes=(40, 8, 12)):
    """A task of so many classes, which the first word of a text tells."""
    folder.mkdir(parents=True)
    texts = iter(sentences(sum(sizes)))
    for split, size in zip(SPLITS, sizes, strict=True):
        rows = []
        for number in range(size):
            label = number % classes
            row = {"text": f"{('river', 'bank', 'striker')[label]} {next(texts)}", "label": label}
            rows.append(row | ({"text2": "a river"} if pairs else {}))
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small random BERT with its tokenizer, and two tasks."""
    from expert_merging.meo import bases

    place = tmp_path_factory.mktemp("real")
    tokenizer = bases.new_tokenizer(tiny_tokenizer())
    torch.manual_seed(0)
    sizes = SimpleNamespace(d_model=16, d_ff=32, num_layers=1, num_heads=2)
    bases.new_model("bert", tokenizer, sizes).save_pretrained(place / "bert")
    tokenizer.save_pretrained(place / "bert")
    write_task(place / "tasks" / "kinds", classes=3)
    write_task(place / "tasks" / "pairs", classes=2, pairs=True)
    return place


def words(world, **changed):
    values = {
        "scale": "real", "device": "cpu", "RUN_DIR": world / "run", "MODEL_PATH": world / "bert", "tasks": "kinds pairs",
        "TASKS_PATH": world / "tasks", "seeds": "0 1", "n": 3, "ks": 2, "epochs": 2, "train_batch": 4, "input_length": 24,
        "learning_rate": 0.01, "task_train": 12, **changed,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", *str(value).split(" "))]


def constants(given):
    from expert_merging.run.constants import read_constants
    from neighbours import MEO_finetune

    return read_constants(vars(MEO_finetune), given)


@pytest.fixture(scope="module")
def done(world):
    """Two tasks, two seeds, as a process; {task: {seed: {run: record}}} and what was printed."""
    result = run_script(SCRIPT, words(world))
    assert result.returncode == 0, result.stderr
    found = {task: run_records.records_of(world / "run" / "meo" / f"bert_{task}") for task in ("kinds", "pairs")}
    return found, result.stdout


def test_every_run_keeps_the_score_of_each_test_example(done):
    found, _ = done
    names = {"dense", "block", "moe_sequence_k2", "meo_sequence_k2", "moe_token_k2", "meo_token_k2"}
    for of_task in found.values():
        assert set(of_task) == {"seed0", "seed1"} and all(set(runs) == names for runs in of_task.values())
        for record in (record for runs in of_task.values() for record in runs.values()):
            each = unpack(record["test_each"])
            assert set(each) <= {0, 100} and len(each) == 12
            assert each.mean() == pytest.approx(record["scores"]["test"]["accuracy"])
            selected = [epoch["scores"]["accuracy"] for epoch in record["history"]]  # on validation
            assert record["best_epoch"] == 1 + selected.index(max(selected))


def test_seeds_draw_their_own_training_examples(done):
    rows = list(range(40))
    first, again, other = (recipes.drawn(rows, 12, seed) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 12
    assert recipes.drawn(rows, 0, 1) == recipes.drawn(rows, 40, 1) == rows
    found, printed = done
    assert "40 train, 8 validation, 12 test, of training 12 a seed" in printed
    assert all(len(runs["dense"]["step_losses"]) == 2 * 3 for of in found.values() for runs in of.values())


def test_the_tables_of_all_tasks_follow_from_their_records(done, world):
    from expert_merging.meo.report import WING
    from expert_merging.report import folders

    place = world / "run" / "meo" / "bert_kinds+pairs"
    assert {"bert_average.md", "intervals.md", "claims.md", "paper.md", "costs.md", "equal.md"} <= {
        file.name for file in (place / "tables").iterdir()
    }
    assert {file.name for file in (place / "figures").glob("*.png")} == {"variants.png", "claims.png"}
    assert folders.check(place, WING) == []
    _, printed = done
    for line in ("MEO's claims", "| MEO token k=2 - MEO sequence k=2 |", "| 82.6 (GLUE) |"):
        assert line in printed
    (place / "tables" / "claims.md").write_text("no\n")
    assert len(folders.check(place, WING)) == 1


def test_moe_and_meo_answer_alike_and_are_equivalent(done):
    found, _ = done
    records = run_records.listed(several_tasks.together(found))
    rows = claims.judged(claims.Runs(records), claims.asked(run_records.variants(records)))
    (equal,) = (row for row in rows if row["difference"] == "MEO sequence k=2 - MoE sequence k=2")
    assert equal["points"] == "+0.00 [+0.00, +0.00]"
    assert equal["verdict"] == bootstrap.EQUIVALENT and equal["p"] == "0.000"


def test_one_table_never_holds_runs_of_two_set_ups(done, world):
    """Seed 2 would be trained on other examples than the seeds that are there, or for another number of epochs."""
    for changed in ({"task_train": 16}, {"epochs": 1}):
        with pytest.raises(UserError, match="one table would show both: restore them, or choose another MEO_DIR"):
            call_main(SCRIPT, words(world, seeds=2, **changed))


def test_of_several_learning_rates_the_best_on_validation_counts(world, tmp_path):
    given = words(world, RUN_DIR=tmp_path, tasks="pairs", learning_rate="0.01 0.0001", seeds=0, levels="sequence")
    call_main(SCRIPT, given)
    folder = tmp_path / "meo" / "bert_pairs" / "seed0"
    assert {file.stem for file in folder.glob("dense*")} == {"dense_lr0.01", "dense_lr0.0001"}
    for name, validation, test in (("dense_lr0.01", 60, 90), ("dense_lr0.0001", 70, 10)):
        record = json.loads((folder / f"{name}.json").read_text())
        record["scores"]["validation"]["accuracy"], record["scores"]["test"]["accuracy"] = validation, test
        (folder / f"{name}.json").write_text(json.dumps(record))
    found = run_records.records_of(folder.parent)["seed0"]
    assert found["dense"]["scores"]["test"]["accuracy"] == 10 and set(found) == {
        "dense", "block", "moe_sequence_k2", "meo_sequence_k2",
    }  # fmt: skip

    # What other commands left, a run at one rate and one of other rates, stands in no table of these two, however good.
    stale = json.loads((folder / "dense_lr0.01.json").read_text())
    stale["identity"]["recipe"]["lr"], stale["scores"]["validation"]["accuracy"] = 0.5, 99
    stale["scores"]["test"]["accuracy"] = 99
    for name in ("dense", "dense_lr0.5", "block_lr0.5"):
        (folder / f"{name}.json").write_text(json.dumps(stale))
    call_main(SCRIPT, given)
    shown = json.loads((folder.parent / "report" / "seed0.json").read_text())
    assert shown["dense"]["scores"]["test"]["accuracy"] == 10 and shown["block"]["scores"]["test"]["accuracy"] != 99
    one = run_records.records_of(folder.parent, [0.5])["seed0"]
    assert set(one) == {"dense"} and one["dense"]["scores"]["test"]["accuracy"] == 99
    assert set(run_records.records_of(folder.parent, [0.5, 0.01])["seed0"]) == {"dense", "block"}  # tried at both
    stale["identity"]["recipe"]["epochs"] = 9
    (folder / "dense_lr0.5.json").write_text(json.dumps(stale))
    with pytest.raises(UserError, match="dense_lr0.5.json was made with other constants .recipe.epochs was 9, is now"):
        call_main(SCRIPT, given)


def test_the_same_learning_rate_twice_is_one(world):
    c = constants(words(world, learning_rate="0 2e-4 1e-3"))
    assert [recipe.lr for recipe in recipes.chosen(c, "plain")] == [2e-4, 1e-3]


def test_a_command_at_one_rate_is_not_refused_for_what_one_of_several_left(world, tmp_path):
    given = words(world, RUN_DIR=tmp_path, tasks="pairs", learning_rate="0.01", seeds=0, levels="sequence")
    call_main(SCRIPT, given)
    folder = tmp_path / "meo" / "bert_pairs" / "seed0"
    tried = json.loads((folder / "dense.json").read_text())
    tried["identity"]["recipe"]["lr"] = 0.0001
    (folder / "dense_lr0.0001.json").write_text(json.dumps(tried))
    call_main(SCRIPT, given)  # what one of several rates left stands in none of its tables


# ---------------------------------------------------------------- statistics


def made(gains, seeds=3, examples=400, tasks=("a", "b"), spread=0.02):
    """Records of made-up variants: {(how, level, k): gain in the chance of a right answer}."""
    random, found = np.random.default_rng(0), []
    for (how, level, k), gain in gains.items():
        name = how if not level else f"{how.upper().replace('MOE', 'MoE')} {level} k={k}"
        for seed in range(seeds):
            for task in tasks:
                right = random.random(examples) < 0.6 + gain + spread * random.normal()
                variant = {"how": how, "level": level, "k": k, "name": name}
                found.append(
                    {"task": task, "seed": seed, "variant": variant, "test_each": pack((100.0 * right).tolist())}
                )
    return found


def verdicts(records):
    found = claims.judged(claims.Runs(records), claims.asked(run_records.variants(records)))
    return {(row["claim"], row["difference"]): row for row in found}


def test_claims_are_asked_of_what_was_run():
    kinds = [("dense", "", 1), ("block", "", 1)]
    kinds += [(how, level, k) for level in ("sequence", "token") for k in (2, 4) for how in ("moe", "meo")]
    asked = claims.asked(run_records.variants(made(dict.fromkeys(kinds, 0.0), seeds=1, examples=2)))
    count = {claim: sum(one.claim == claim for one in asked) for claim in dict.fromkeys(one.claim for one in asked)}
    assert count == {claims.HELP: 4, claims.ASIDE: 2, claims.EQUAL: 4, claims.TOKEN: 4}
    assert all(one.first.startswith("MEO") for one in asked if one.claim != claims.TOKEN)
    assert claims.asked(run_records.variants(made({("meo", "token", 2): 0.0}))) == []


def test_a_large_gain_holds_a_loss_does_not_and_noise_cannot_tell():
    gains = {("dense", "", 1): 0.0, ("meo", "sequence", 2): 0.3, ("meo", "sequence", 4): -0.4}
    found = verdicts(made(gains, spread=0.005))
    assert found[claims.HELP, "MEO sequence k=2 - dense"]["verdict"] == bootstrap.HELD
    assert found[claims.HELP, "MEO sequence k=4 - dense"]["verdict"] == bootstrap.NOT
    noisy = verdicts(made({("dense", "", 1): 0.0, ("meo", "sequence", 2): 0.02}, examples=40, spread=0.1))
    assert next(iter(noisy.values()))["verdict"].startswith("cannot tell (")
    (one,) = verdicts(made({("dense", "", 1): 0.0, ("meo", "sequence", 2): 0.3}, seeds=1)).values()
    assert (one["verdict"], one["p"], one["seeds"]) == ("cannot tell: one seed", "", 1)


def test_equality_is_not_told_by_a_difference_that_is_merely_unsure():
    records = made({("moe", "sequence", 2): 0.0, ("meo", "sequence", 2): 0.0}, examples=60, spread=0.1)
    assert next(iter(verdicts(records).values()))["verdict"].startswith("cannot tell (")
    apart = made({("moe", "sequence", 2): 0.0, ("meo", "sequence", 2): 0.3}, spread=0.005)
    assert next(iter(verdicts(apart).values()))["verdict"] == bootstrap.NOT


def test_seeds_alike_by_luck_are_not_equivalent_where_many_claims_are_asked():
    """What published records gave: three seeds within half a point, the two one-sided tests at 0.018 by themselves."""
    random, by_seed = np.random.default_rng(0), np.array([0.12, 0.53, 0.06])
    draws = random.choice(by_seed, (2000, 3)).mean(1) + 0.15 * random.normal(size=2000)
    found = bootstrap.Contrast(by_seed, draws, np.tile(by_seed, (2000, 1)))
    claim = claims.Claim(claims.TOKEN, "MEO token k=4", "MEO sequence k=4")
    p = bootstrap.equivalence_p(found, claims.MARGIN)
    assert p < 0.05 and claims._verdict(claim, found, 1.0, p, 10) == bootstrap.EQUIVALENT
    ten = bootstrap.holm([p] + [0.9] * 9)[0]
    assert ten > 0.05 and claims._verdict(claim, found, 1.0, ten, 10).startswith("cannot tell (")


def test_what_it_takes_is_told_where_the_difference_is_beyond_the_margin():
    by_seed = np.array([-9.0, -2.0, -1.0])
    found = bootstrap.Contrast(
        by_seed, np.random.default_rng(0).choice(by_seed, (2000, 3)).mean(1), np.tile(by_seed, (2000, 1))
    )
    claim = claims.Claim(claims.EQUAL, "MEO", "MoE")
    assert " seeds would)" in claims._verdict(claim, found, 1.0, 1.0, 1)


def test_tasks_without_a_seed_in_common_have_no_claims(tmp_path):
    records = made({("dense", "", 1): 0.0, ("meo", "sequence", 2): 0.0})
    kept = [r for r in records if (r["task"] == "a") == (r["seed"] == 0)]
    runs = claims.Runs(kept)
    assert not runs.seeds and claims.judged(runs, claims.asked(run_records.variants(kept))) == []


def test_the_average_is_over_tasks_and_only_over_seeds_that_both_have():
    records = made({("dense", "", 1): 0.0, ("meo", "sequence", 2): 0.0})
    kept = [r for r in records if (r["variant"]["how"], r["task"], r["seed"]) != ("meo", "b", 2)]
    runs = claims.Runs(kept)
    assert runs.shared("dense", "MEO sequence k=2") == [0, 1] and runs.shared("dense") == [0, 1, 2]
    scores = {(r["variant"]["how"], r["task"], r["seed"]): unpack(r["test_each"]).mean() for r in kept if r["seed"] < 2}
    by_hand = np.mean([scores["meo", task, s] - scores["dense", task, s] for task in "ab" for s in (0, 1)])
    mean, low, high = runs.difference("MEO sequence k=2", "dense")
    assert mean == pytest.approx(by_hand) and low < mean < high
    with pytest.raises(UserError, match="the runs on a were not tested on the same examples"):
        claims.Runs([*records, *made({("block", "", 1): 0.0}, examples=20)])


def test_p_without_noise_of_examples_is_student_s():
    from scipy import stats

    by_seed = np.array([1.0, 2.0, 4.0])
    draws = np.random.default_rng(0).choice(by_seed, (2000, 3)).mean(1)
    found = bootstrap.Contrast(by_seed, draws, np.tile(by_seed, (2000, 1)))
    assert bootstrap.difference_p(found) == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue)
    one_sided = stats.ttest_1samp(by_seed, 9.0, alternative="less").pvalue
    assert bootstrap.equivalence_p(found, 9.0) == pytest.approx(one_sided)
    assert bootstrap.equivalence_p(found, 1.0) > 0.5
    same = bootstrap.Contrast(np.zeros(3), np.zeros(10), np.zeros((10, 3)))
    assert bootstrap.difference_p(same) == 1 and bootstrap.equivalence_p(same, 1.0) == 0
    told = [bootstrap.seeds_needed(found, flips=False), bootstrap.seeds_needed(found, distance=0.5, flips=False)]
    assert told[0] < told[1] and bootstrap.seeds_needed(found, distance=-1.0) is None


# ---------------------------------------------------------------- bad input


def change(path, line, **fields):
    rows = [json.loads(one) for one in path.read_text().splitlines()]
    rows[line] = {name: value for name, value in (rows[line] | fields).items() if value is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "test.jsonl").unlink(), "test.jsonl is missing; a task has train, validation and test"),
        (lambda f: change(f / "validation.jsonl", 2, text=" "), "validation.jsonl, line 3: the field 'text' is empty"),
        (lambda f: change(f / "train.jsonl", 0, text2=""), "train.jsonl, line 1: the field 'text2' is empty"),
        (lambda f: change(f / "train.jsonl", 3, text2=None), "some examples have a text2 and others none"),
        (
            lambda f: change(f / "test.jsonl", 1, label=2),
            "a test example has label 2; in training labels are 0 to 1",
        ),
        (lambda f: change(f / "train.jsonl", 1, label=-1), "train.jsonl, line 2: the label is -1"),
        (lambda f: change(f / "train.jsonl", 1, label="yes"), "train.jsonl, line 2: the label is 'yes'"),
        (lambda f: change(f / "train.jsonl", 1, label=True), "train.jsonl, line 2: the label is True"),
        (lambda f: change(f / "train.jsonl", 1, label=None), "train.jsonl, line 2: the label is None"),
        (lambda f: [change(f / "train.jsonl", i, label=0) for i in range(40)], "all training examples have label 0"),
        (lambda f: (f / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text"\n'), "line 2: not whole JSON"),
        (lambda f: (f / "train.jsonl").write_text("\n"), "train.jsonl is empty"),
    ],
)
def test_a_broken_task_is_one_line(world, tmp_path, spoil, said):
    write_task(tmp_path / "pairs", classes=2, pairs=True)
    spoil(tmp_path / "pairs")
    with pytest.raises(UserError, match=said) as error:
        call_main(SCRIPT, words(world, TASKS_PATH=tmp_path, tasks="pairs", RUN_DIR=tmp_path / "run"))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"TASKS_PATH": "./nowhere"}, "TASKS_PATH: there is no folder nowhere/kinds; tasks there: none"),
        ({"TASKS_PATH": ""}, "TASKS_PATH is empty; give the folder that holds the folder kinds"),
        ({"tasks": "kinds poems"}, "TASKS_PATH: there is no folder .*poems; tasks there: kinds, pairs"),
        ({"ks": "2 4"}, "ks has 4; k, the active experts, is from 1 to n = 3"),
        ({"family": "t5"}, "kinds is classification, which t5 does not do"),
        ({"learning_rate": "0.01 -1"}, "the learning rate given is -1"),
        ({"task_train": -1}, "task_train is -1; it must be 0 or more"),
        ({"tasks": "kinds", "publish": "true"}, "publish is for several tasks together"),
    ],
)
def test_what_is_wrong_is_said(world, tmp_path, changed, said):
    given = words(world, RUN_DIR=tmp_path / "run", **changed)
    if changed.get("TASKS_PATH") == "":
        given = [word for name, word in zip(["", *given], given, strict=False) if "TASKS_PATH" not in name + word]
    with pytest.raises(UserError, match=said) as error:
        call_main(SCRIPT, given)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_an_encoder_without_its_tokenizer_is_refused(world, tmp_path):
    import shutil

    shutil.copytree(world / "bert", tmp_path / "bare", ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(UserError, match="MODEL_PATH: no tokenizer of .*bare"):
        call_main(SCRIPT, words(world, MODEL_PATH=tmp_path / "bare", RUN_DIR=tmp_path / "run"))


def test_costs_are_held_against_the_dense_models_on_the_same_tasks():
    """k is the task's own: 2 on the task of long texts, 4 on that of short ones."""
    records = []
    for task, k, length in (("long", 2, 1000.0), ("short", 4, 100.0)):
        for how, level, of_k, factor in (("dense", "", 1, 1.0), ("meo", "sequence", k, 1.1)):
            name = how if not level else f"MEO {level} k={of_k}"
            variant, cost = {"how": how, "level": level, "k": of_k, "name": name}, factor * length
            records.append({
                "task": task, "seed": 0, "family": "bert", "device": "cpu", "variant": variant, "flops": cost,
                "flops_length": int(length), "step_seconds": cost, "parameters": 1, "kept_bytes": 1,
            })  # fmt: skip
    table = several_tasks._costs({"seed0": {f"{r['task']}_{r['variant']['name']}": r for r in records}})
    ratios = {row["variant"]: (row["x"], row["x, time"]) for row in table.rows}
    assert ratios["MEO sequence k=2"] == pytest.approx((1.1, 1.1)) and ratios["MEO sequence k=4"] == pytest.approx(
        (1.1, 1.1)
    )
    assert "one sequence of 100 or 1000 tokens" in table.note
