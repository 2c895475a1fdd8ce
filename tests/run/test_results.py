"""The protocol of a run: what a result depends on, whether it is done, what is taken up, and what runs are called."""

import contextlib
import json
import pickle
from types import SimpleNamespace

import pytest
from conftest import call_main, run_script
from hypothesis import given
from hypothesis import strategies as st

from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json, sha256, write_json
from expert_merging.experiment.steps import Step
from expert_merging.run import results
from expert_merging.training import checkpoints


def constants(**more):
    shared = {"RUN_DIR": "runs", "lr": 0.1, "task_types": ("a", "b"), "eval_batch_size": 4}
    return SimpleNamespace(**shared | {"device": "cpu", "precision": "auto"} | more)


# ---------------------------------------------------------------- identity


def test_paths_do_not_count_and_precision_does():
    was = results.identity(constants())
    assert was == {"lr": 0.1, "task_types": ["a", "b"], "precision": "fp32"}
    assert was == results.identity(constants(RUN_DIR="elsewhere", eval_batch_size=8, precision="fp32"))
    changed = results.changes(was, results.identity(constants(precision="bf16")))
    assert changed == "precision was 'fp32', is now 'bf16'"


def test_auto_is_what_it_comes_to_on_this_machine(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: not including_emulation)
    assert results.identity(constants(device="cuda"))["precision"] == "bf16"
    assert results.identity(constants(device="auto"))["precision"] == "bf16"
    assert results.identity(constants(device="cpu"))["precision"] == "fp32"
    assert results.identity(constants(device="cuda", precision="fp32"))["precision"] == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert results.identity(constants(device="cuda"))["precision"] == "fp32"
    with pytest.raises(UserError, match="precision is 'half'"):
        results.identity(constants(precision="half"))


@pytest.mark.parametrize("key", ["identity", "asked", "constants"])
def test_records_of_earlier_versions_are_read_alike(tmp_path, key):
    """They say neither "identity" nor a precision; a history notes the precision beside it."""
    now = results.identity(constants())
    noted = {name: value for name, value in now.items() if name != "precision"}
    write_json(tmp_path / "old.json", {key: noted, "loss": 1.5})
    assert results.is_done(tmp_path / "old.json", now)
    assert results.part(tmp_path / "old.json", now) == {"loss": 1.5}
    for precision, same in (("no", True), ("bf16", False)):
        write_json(tmp_path / "history.json", {key: noted, "precision": precision})
        assert (results.changes(results.made_with(read_json(tmp_path / "history.json")), now) == "") == same


# ---------------------------------------------------------------- done, taken up, refused


def test_a_result_is_made_once_and_anothers_is_refused(tmp_path, capsys):
    path, work = tmp_path / "seed0" / "one.json", tmp_path / "one.run"
    now, other = results.identity(constants()), results.identity(constants(lr=0.2))
    assert not results.is_done(path, now, work)
    work.mkdir()
    saved = results.save(path, now, {"score": 3}, released={"squad_data": [0.03]})
    assert saved == read_json(path) and saved["identity"] == now and {"command", "versions"} <= saved.keys()
    assert pickle.loads(path.with_suffix(".pkl").read_bytes()) == {"squad_data": [0.03]}
    assert results.is_done(path, now, work, again="train") and not work.exists()
    assert capsys.readouterr().out == f"{path} is there already; remove it to train again\n"
    before = path.read_bytes()
    with pytest.raises(
        UserError, match=r"one.json was made with other constants \(lr was 0.1, is now 0.2\); .*remove it"
    ) as e:
        results.is_done(path, other)
    assert "\n" not in str(e.value) and path.read_bytes() == before
    path.write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        results.is_done(path, now)


def test_a_run_that_was_begun_with_other_constants_is_refused_before_anything_is_made(tmp_path):
    path, work = tmp_path / "one.json", tmp_path / "one.run"
    checkpoints.claim(work, results.identity(constants()))
    assert not results.is_done(path, results.identity(constants()), work)
    with pytest.raises(UserError, match=r"one.run was made with other constants \(lr was 0.1, is now 0.2\); .*begun"):
        results.is_done(path, results.identity(constants(lr=0.2)), work)
    assert work.exists()


def test_a_part_of_another_is_made_again_and_says_nothing_of_its_making(tmp_path):
    now, other = results.identity(constants()), results.identity(constants(lr=0.2))
    assert results.part(tmp_path / "test.json", now) is None
    results.save(tmp_path / "test.json", now, {"score": 3})
    assert results.part(tmp_path / "test.json", now) == {"score": 3}
    assert results.part(tmp_path / "test.json", other) is None


def test_a_dict_that_has_changed_is_named_by_its_entries_and_none_is_no_absence():
    was = {"recipe": {"lr": 4, "epochs": 2}, "data": {"squad": None}}
    now = {"recipe": {"lr": 5, "epochs": 2}, "data": {}}
    said = results.changes(was, now)
    assert said == "data.squad was None, is now None, recipe.lr was 4, is now 5"
    assert not results.changes(was, was) and results.changes({"recipe": {"lr": 4}}, {"recipe": 4})


def test_no_table_shows_rows_of_several_constants(tmp_path):
    now = results.identity(constants(seed=1))
    results.save(tmp_path / "a.json", results.identity(constants(seed=0)), {})
    results.refuse_others(tmp_path.glob("*.json"), now, "MEO_DIR", but=("seed",))
    with pytest.raises(UserError, match="a.json was made with other constants .seed was 0, is now 1.*another MEO_DIR"):
        results.refuse_others(tmp_path.glob("*.json"), now, "MEO_DIR")
    results.save(tmp_path / "b.json", results.identity(constants(seed=1), recipe={"lr": 1, "epochs": 2}), {})
    (tmp_path / "a.json").unlink()
    for epochs in (2, 3):
        wanted = results.identity(constants(seed=1), recipe={"lr": 4, "epochs": epochs})
        refused = contextlib.nullcontext() if epochs == 2 else pytest.raises(UserError, match="recipe.epochs was 2")
        with refused:
            results.refuse_others(tmp_path.glob("*.json"), wanted, "MEO_DIR", but=("recipe.lr",))


def test_what_is_absent_names_the_command(tmp_path):
    with pytest.raises(UserError, match="one.json does not exist; run: python it.py"):
        results.load(tmp_path / "one.json", "python it.py")


def test_a_step_in_another_precision_is_not_done(tmp_path):
    path = tmp_path / "one.json"
    results.save(path, results.identity(constants()), {})
    step = Step("one.py", {"task_types": ("a", "b")}, path)
    assert step.is_done(constants()) and step.is_done(constants(precision="fp32"))
    assert not step.is_done(constants(precision="bf16")) and not step.is_done(constants(lr=0.2))


def test_a_run_in_another_precision_is_refused(world):
    """As a user meets it; nothing is trained."""
    words = [*world.words("precision", num_epochs=1), "--num_expert", "4"]
    call_main("datasets_preprocessing.py", words)
    words += ["--task_type", "squad"]
    call_main("single_task_finetune.py", words)
    call_main("single_task_finetune.py", [*words, "--precision", "fp32"])  # what auto is on a CPU
    refused = run_script("single_task_finetune.py", [*words, "--precision", "bf16"])
    assert refused.returncode == 2 and "(precision was 'fp32', is now 'bf16')" in refused.stderr.splitlines()[-1]


# ---------------------------------------------------------------- names


@given(
    st.sampled_from(["Baseline", "CAEM-Avg", "Baseline-same-compute", "x y"]), st.integers(1, 99), st.integers(0, 99)
)
def test_names_are_read_back(case, experts, target):
    assert results.parse_run_name(results.run_name(case, experts, target or None)) == (case, experts, target or None)


def test_the_same_run_in_files_and_in_tables():
    assert results.run_name("CAEM", 8, 16) + "_ep{epoch}.pt" == "CAEM_[8|16]_ep{epoch}.pt"  # the released name
    labels = {
        "Baseline_[8]": "Baseline-8", "CAEM_[8|8]": "CAEM-8", "CAEM_[8|16]": "CAEM-8-to-16", "CAEM-Avg_[16|16]": "CAEM-16-Avg",
        "Average_[8|8]": "Average-8", "Baseline-same-compute_[8]": "Baseline-8-same-compute",
    }  # fmt: skip
    assert {name: results.run_label(name) for name in labels} == labels
    for wrong in ("CAEM", "CAEM_8", "../CAEM_[8]", "CAEM_[8|]", "CAEM_[8|8]_merged"):
        with pytest.raises(UserError, match="is not the name of a run"):
            results.run_label(wrong)


def test_each_run_of_the_grid_is_what_the_protocol_calls_by_its_name():
    import reproduce_tables
    from expert_merging.experiment import grid
    from expert_merging.run.constants import read_constants

    c = read_constants(vars(reproduce_tables), ["--scale", "night"])
    own = {name: step.constants for name, step in grid.grid(c).steps.items()}
    assert own["CAEM-8"]["alpha"] == 1.0 and own["CAEM-8"]["merging"] == "caem"
    assert own["CAEM-8-Avg"]["alpha"] == own["CAEM-16-Avg"]["alpha"] == 0.0
    assert own["CAEM-8-Avg"]["merging"] == "caem"
    merged = {
        case: own[f"{case}-8"]["merging"] for case in ("Average", "MSMoE", "HCSMoE", "REAP", "MostUsed", "AtRandom")
    }
    assert list(merged.values()) == ["average", "m_smoe", "hc_smoe", "reap", "most_used", "at_random"]
    assert own["Baseline-8-same-compute"]["same_compute"] is True and "same_compute" not in own["Baseline-8"]
    for shares in ("inverse", "tokens", "random", "doc_topic"):
        assert own[f"CAEM-8-{shares}"]["shares"] == shares and own[f"CAEM-8-{shares}"]["alpha"] == 1.0
    for case, merging in (("CAEM", "caem"), ("Average", "average")):
        calibrated = own[f"{case}-8-calibrated"]
        assert (calibrated["merging"], calibrated["calibration"]) == (merging, "routers")
    sizes = [
        (own[name]["source_experts_num"], own[name]["target_experts_num"])
        for name in ("CAEM-8", "CAEM-8-to-16", "CAEM-16")
    ]
    assert sizes == [(8, 8), (8, 16), (16, 16)]
    # And the scale is the one that docs/protocol.md fixed.
    fixed = {
        "train_sample": 2400, "validation_examples": 240, "test_examples": 0, "num_epochs": 2, "lr": 5e-4, "batch_size": 4,
        "gradient_accumulation_steps": 1, "num_beams": 3, "parts": ("primary",),
    }  # fmt: skip
    assert {name: getattr(c, name) for name in fixed} == fixed


def test_a_record_notes_the_protocol_that_it_was_made_under():
    from expert_merging.run.provenance import PROTOCOL, versions

    assert versions()["protocol"] == sha256(PROTOCOL)[:12]


def test_the_grid_calls_runs_as_their_files_are_called():
    import reproduce_tables
    from expert_merging.experiment import grid
    from expert_merging.run.constants import read_constants

    steps = grid.grid(read_constants(vars(reproduce_tables), ["--scale", "tiny"])).steps
    runs = {name: step for name, step in steps.items() if "multi_task_finetune" in step.script}
    some = {
        "CAEM-8",
        "CAEM-8-to-16",
        "CAEM-16-Avg",
        "Baseline-8-same-compute",
        "MSMoE-8",
        "CAEM-8-inverse",
        "CAEM-8-calibrated",
        "Average-8-calibrated",
        "CAEM-8-doc_qa",
    }
    assert len(runs) == 24 and some <= runs.keys()
    assert all(results.run_label(step.result.stem) == name for name, step in runs.items())
    for pattern in (name for name in steps if " + " in name):
        first, second = pattern.split(" + ")
        assert steps[pattern].result.stem == results.pair_name(runs[first].result.stem, runs[second].result.stem)


def test_json_has_no_tuples():
    assert json.loads(json.dumps(results.identity(constants()))) == results.identity(constants())
