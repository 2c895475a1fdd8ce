"""The real scripts, as processes, from raw data to the table; killed and resumed; and what they say to bad input."""

import contextlib
import json
import math
import pickle
import shutil
import subprocess
import time

import pytest
import torch
from conftest import ROOT, call_main, constants_of, run_script, start

from expert_merging.core.errors import UserError
from expert_merging.core.files import sha256
from expert_merging.data.scores import unpack
from expert_merging.report import folders
from expert_merging.report.caem_tables import WING

TASKS = ("ag_news", "squad", "xsum")
SIZES = ("--experts_num", "4", "--larger_experts_num", "6")


@pytest.fixture(scope="session")
def done(world):
    """Everything that reproduce_tables.py runs, done once."""
    result = run_script("reproduce_tables.py", [*world.words(), *SIZES, "--parts", "comparison", "CAEM-4 + Baseline-4"])
    assert result.returncode == 0, result.stderr
    return world.folder / "runs" / "seed0", result.stdout


def history(folder, name):
    return json.loads((folder / "histories" / f"{name}.json").read_text())


def numbers(content):
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return [n for one in content for n in numbers(one)]
    return [content] if isinstance(content, (int, float)) else []


def test_table_and_figures(done):
    folder, printed = done[0].parent / "report", done[1]
    rows = ("most common training answer", "base model, not fine-tuned", "single-task models", "Baseline-4", "CAEM-4 ")
    for row in rows:
        assert f"| {row}" in printed
    assert (folder / "tables" / "scores.md").read_text() in printed
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    wanted = {
        "scores_over_epochs",
        "loss_over_epochs",
        "cka",
        "lines_between",
        "allocation_CAEM-4",
        "expert_use_CAEM-4",
    }
    assert wanted <= figures
    page = (folder / "report.html").read_text()
    assert page.count("<img ") == len(figures) and 'src="http' not in page and "reproduce_tables" not in page
    assert all(table in page for table in ("table 2", "tables 4 and 5", "figures 2 and 4"))
    assert folders.check(folder, WING) == []


def test_a_changed_record_is_noticed(done, tmp_path):
    shutil.copytree(done[0].parent / "report", tmp_path / "report")
    path = tmp_path / "report" / "seed0.json"
    content = json.loads(path.read_text())
    content["CAEM-4"]["overall"]["test"] += 0.1
    path.write_text(json.dumps(content))
    wrong = folders.check(tmp_path / "report", WING)
    assert any("scores.md differs" in line for line in wrong) and any("claims.csv differs" in line for line in wrong)


def test_killed_reproduction_ends_with_the_same_tables(world, done, tmp_path):
    """SIGKILL at three moments while the multi-task models are trained; tables and records as undisturbed."""
    for part in ("data", "seed0/models/single_task_[4]", "seed0/histories/single_task_[4]"):
        shutil.copytree(done[0].parent / part, tmp_path / part)
    words = [*world.words(tmp_path), *SIZES, "--parts", "comparison", "--checkpoint_minutes", "0"]
    for seconds in (9, 12, 15):
        process = start("reproduce_tables.py", words)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.communicate()
    result = run_script("reproduce_tables.py", words)
    assert result.returncode == 0, result.stderr
    for name in ("scores", "allocation", "entropies", "merged_only"):
        mine, theirs = (
            (folder / "report" / "tables" / f"{name}.csv").read_text() for folder in (tmp_path, done[0].parent)
        )
        assert mine == theirs


def test_what_merging_alone_gives_can_be_asked_for_afterwards(world, done, capsys):
    before = sha256(done[0] / "histories" / "CAEM_[4|4].json")
    words = [*world.words(), "--source_experts_num", "4", "--target_experts_num", "4", "--merge_only"]
    call_main("CAEM_multi_task_finetune.py", words)
    assert "CAEM_[4|4]_merged" in capsys.readouterr().out and before == sha256(
        done[0] / "histories" / "CAEM_[4|4].json"
    )


def test_second_call_runs_nothing(world, done):
    began = time.monotonic()
    again = run_script("reproduce_tables.py", [*world.words(), *SIZES, "--parts", "comparison", "CAEM-4 + Baseline-4"])
    assert again.returncode == 0 and "all runs are there already" in again.stdout
    assert again.stdout.split("all runs are there already\n")[1] in done[1]
    assert time.monotonic() - began < 120


def test_the_parts_of_a_scale_are_those_that_its_base_can_run(tmp_path):
    plan = run_script("reproduce_tables.py", ["--scale", "real", "--RUN_DIR", str(tmp_path), "--plan_only"]).stdout
    assert "CAEM-8-Avg" in plan and "Average-8" in plan and "-16" not in plan and "usage" not in plan


def test_single_parts_and_what_they_need(world, done, tmp_path):
    words = [*world.words(tmp_path), *SIZES, "--plan_only", "--seeds", "0", "1", "--parts"]
    plan = run_script("reproduce_tables.py", [*words, "CAEM-4-to-6"]).stdout
    assert "single-task-4 squad" in plan and "single-task-6 squad" in plan and "Baseline" not in plan
    assert "CAEM-4-to-6" in plan and "0 of 2 there" in plan
    result = run_script("reproduce_tables.py", [*words, "tables"])
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "parts names 'tables'" in result.stderr
    assert not (tmp_path / "seed0").exists()


def test_a_base_with_another_number_of_experts_is_named_before_anything_runs(world, tmp_path):
    words = [*world.words(tmp_path), "--BASE_MODEL_PATH", str(world.folder / "base-4"), *SIZES, "--parts"]
    result = run_script("reproduce_tables.py", [*words, "comparison", "Baseline-6"])
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "base-4 has 4 experts a sparse layer, not 6" in result.stderr
    assert not (tmp_path / "logs").exists() and not (tmp_path / "seed0").exists()


@pytest.mark.parametrize(
    ("words", "launched", "said"),
    [
        (("--runs_at_once", "0"), {}, "runs_at_once is 0; it must be 1 or more"),
        (("--larger_experts_num", "4"), {}, "experts_num and larger_experts_num are both 4"),
        (("--RUN_DIR", str(ROOT / "README.md")), {}, "README.md is a file; give a folder"),
        ((), {"WORLD_SIZE": "2", "RANK": "0"}, "is started by python alone"),
    ],
)
def test_what_cannot_be_run_is_said_before_the_plan(world, tmp_path, monkeypatch, words, launched, said):
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    given = [*world.words(tmp_path), *SIZES, *words, "--plan_only"]
    monkeypatch.setattr("sys.argv", ["reproduce_tables.py", *given])
    with pytest.raises(UserError, match=said):
        call_main("reproduce_tables.py", given)


# As of 27 November 2026, before other families than Switch came in. To rounding, since machines add up in other orders.
GOLDEN = {
    "single_task_[4]/single_task_squad": ([5.876631, 5.971849], [5.627651]),
    "Baseline_[4]": ([6.012493, 5.860452], [5.570447, 5.576475, 6.107380]),
    "CAEM_[4|4]": ([5.808780, 5.649873], [5.355297, 5.381340, 5.943763]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_whole_path_ends_where_it_always_ended(done, name):
    """From raw data over fine-tuning and the merge to joint fine-tuning: the losses of training and on test."""
    content = history(done[0], name)
    train, test = GOLDEN[name]
    assert content["train_loss"] == pytest.approx(train, rel=1e-4)
    assert [content[f"{task}_data"]["test"]["loss"] for task in content["tasks"]] == pytest.approx(test, rel=1e-4)
    if "allocation" in content:
        wanted = {"encoder": [[2, 1, 1], [1, 2, 1]], "decoder": [[1, 1, 2], [2, 1, 1]]}
        assert content["allocation"] == wanted


@pytest.mark.parametrize("name", ["single_task_[4]/single_task_squad", "Baseline_[4]", "CAEM_[4|4]"])
def test_histories_are_whole_and_finite(done, name):
    content = history(done[0], name)
    assert all(map(math.isfinite, numbers(content)))
    pickled = pickle.loads((done[0] / "histories" / f"{name}.pkl").read_bytes())
    assert {"ag_news_data", "squad_data", "xsum_data", "expert_usage_grid", "expert_usage_grid_de"} <= pickled.keys()
    assert ("record_stay_num_experts_de" in pickled) == name.startswith("CAEM")
    for key, stack in (("entropy", "encoder"), ("entropy_de", "decoder")):
        assert pickled[key] == content["entropy"][stack]
    assert {"command", "versions", "identity"} <= content.keys()
    assert content["identity"]["seed"] == 0 and len(content["selection"]) == 2
    for task in content["tasks"]:
        of_task = content[f"{task}_data"]
        assert len(of_task["validation"]) == 2
        assert unpack(of_task["test_each"]).mean() == pytest.approx(of_task["test"][of_task["main_score"]], abs=0.006)
        for stack in ("encoder", "decoder"):
            assert torch.tensor(content["usage"][stack][task]).shape == (2, 4)
            assert all(0 <= value <= 1 for value in content["entropy"][stack][task])


@pytest.mark.parametrize(("name", "first"), [("Baseline_[4]", 0), ("CAEM_[4|4]", 1)])
def test_pickles_are_read_as_the_released_closing_lines_read_them(done, name, first):
    """They divide each epoch's score by the list's first, take the mean over the tasks, and look for the best."""
    loaded = pickle.loads((done[0] / "histories" / f"{name}.pkl").read_bytes())
    lists = [loaded[f"{task}_data"] for task in TASKS]
    assert all(len(scores) == 2 + first and all(0 < score <= 1 for score in scores) for scores in lists)
    ratios = [sum(scores[i] / scores[0] for scores in lists) / 3 for i in range(len(lists[0]))]
    best = ratios.index(max(ratios[first:]))
    assert math.isfinite(ratios[best]) and ratios[0] == 1
    for key in ("expert_usage_grid", "expert_usage_grid_de"):
        assert len(loaded[key]) == 2  # epochs
        assert all(sum(layer) == pytest.approx(1) for epoch in loaded[key] for layer in epoch)
    if first:
        assert all(len(layer) == 3 for layer in loaded["record_stay_num_experts_en"])


def test_usage_counts_every_real_validation_token(world, done):
    from datasets import DatasetDict

    data = DatasetDict.load_from_disk(str(world.folder / "runs" / "data" / "squad"))
    tokens = sum(map(len, data["validation"]["input_ids"]))
    grid = history(done[0], "single_task_[4]/single_task_squad")["usage"]["encoder"]["squad"]
    assert [sum(layer) for layer in grid] == [tokens, tokens]


def test_weights_load_as_folder_and_as_released(done):
    from transformers import SwitchTransformersForConditionalGeneration

    for folder, file in (
        ("single_task_[4]/single_task_xsum", "single_task_[4]/single_task_xsum.pt"),
        ("CAEM_[4|4]", f"CAEM_[4|4]_ep{history(done[0], 'CAEM_[4|4]')['best_epoch']}.pt"),
    ):
        model = SwitchTransformersForConditionalGeneration.from_pretrained(done[0] / "models" / folder)
        released = torch.load(done[0] / "models" / file, weights_only=True)
        assert {f"STmodel.{name}" for name in model.state_dict()} == released.keys()
        assert all(torch.equal(tensor, released[f"STmodel.{name}"]) for name, tensor in model.state_dict().items())
    assert not list((done[0] / "models").rglob("*.run"))


def test_allocation_is_recorded_and_followed(done):
    content = history(done[0], "CAEM_[4|4]")
    for layers in content["allocation"].values():
        assert all(sum(layer) == 4 and min(layer) >= 1 for layer in layers)
    given = [sum(layer[i] for layer in content["allocation"]["encoder"]) for i in range(3)]
    assert content["weights"]["encoder"] == pytest.approx([n / sum(given) for n in given])
    assert content["before"]["test"].keys() == set(TASKS)


def test_merge_into_more_experts_and_stop(world, done):
    from transformers import SwitchTransformersForConditionalGeneration

    words = [*world.words(), "--source_experts_num", "4", "--target_experts_num", "9", "--merge_only", "true"]
    before = {path: sha256(path) for path in (done[0] / "models" / "single_task_[4]").rglob("*.safetensors")}
    call_main("CAEM_multi_task_finetune.py", words)
    model = SwitchTransformersForConditionalGeneration.from_pretrained(done[0] / "models" / "CAEM_[4|9]_merged")
    assert model.config.num_experts == 9 and model.lm_head.weight is model.shared.weight
    assert before == {path: sha256(path) for path in before}


@pytest.mark.parametrize("merging", ["m_smoe", "hc_smoe", "reap", "most_used", "at_random"])
def test_pooled_methods_make_an_ordinary_model(world, done, merging):
    from transformers import SwitchTransformersForConditionalGeneration

    words = [
        *world.words(current_case_name=merging),
        "--merging",
        merging,
        "--merge_only",
        "true",
        "--pool_inputs",
        "5",
    ]
    call_main("CAEM_multi_task_finetune.py", [*words, "--source_experts_num", "4", "--target_experts_num", "5"])
    folder = done[0] / "models" / f"{merging}_[4|5]_merged"
    model = SwitchTransformersForConditionalGeneration.from_pretrained(folder)
    assert model.config.num_experts == 5 and all(parameter.isfinite().all() for parameter in model.parameters())
    record = json.loads((folder / "merging.json").read_text())
    members = [expert for group in record["pool"]["encoder.block.1.layer.1.mlp"] for expert in group]
    assert (
        len(set(members)) == len(members)
        and set(members) <= set(range(12))
        and record["identity"]["merging"] == merging
    )


def test_pooled_methods_look_at_validation_inputs(world, done, monkeypatch):
    from expert_merging.core.hub import load_tokenizer
    from expert_merging.data import features
    from expert_merging.switch import expert_pool

    looked_at, observe = [], expert_pool.observe
    monkeypatch.setattr(
        expert_pool, "observe", lambda t, m, inputs, *more: (looked_at.extend(inputs), observe(t, m, inputs, *more))[1]
    )
    words = [*world.words(current_case_name="Seen"), "--source_experts_num", "4", "--target_experts_num", "4"]
    call_main("CAEM_multi_task_finetune.py", [*words, "--merging", "reap", "--merge_only", "--pool_inputs", "5"])
    c, tokenizer = constants_of("CAEM_multi_task_finetune.py", words), load_tokenizer(str(world.folder / "base-4"))
    for task, rows in zip(TASKS, looked_at, strict=True):
        stored = features.load(task, c, tokenizer)
        assert list(rows["input_ids"]) == stored["validation"][:5]["input_ids"]
        apart = list(rows["input_ids"]) != stored["test"][:5]["input_ids"]
        assert apart or task != "ag_news"  # the others' splits are alike here


def calibrated_words(world, case, *words):
    named = [*world.words(current_case_name=case), "--source_experts_num", "4", "--target_experts_num", "4"]
    return [*named, "--calibration", "routers", "--pool_inputs", "5", *words]


@pytest.mark.parametrize("merging", ["caem", "average", "m_smoe"])
def test_calibration_changes_routers_only(world, done, merging, monkeypatch):
    """Interrupted it leaves nothing, and goes on to what an undisturbed run makes."""
    from expert_merging.core.safetensors_folder import SafetensorsFolder
    from expert_merging.merging import router_calibration

    plain, calibrated = (done[0] / "models" / f"{kind}-{merging}_[4|4]_merged" for kind in ("Plain", "Calibrated"))
    words = ["--merging", merging, "--merge_only"]
    call_main(
        "CAEM_multi_task_finetune.py", [*calibrated_words(world, f"Plain-{merging}", *words), "--calibration", "none"]
    )

    fit, begun = router_calibration.calibrated, []

    def interrupted(*given, **more):
        begun.append(1)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return fit(*given, **more)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(router_calibration, "calibrated", interrupted)
        call_main("CAEM_multi_task_finetune.py", calibrated_words(world, f"Calibrated-{merging}", *words))
    assert len(begun) == 3 and not calibrated.exists()
    weights = []
    for _ in range(2):
        call_main("CAEM_multi_task_finetune.py", calibrated_words(world, f"Calibrated-{merging}", *words))
        weights.append(sha256(calibrated / "model.safetensors"))
        record = json.loads((calibrated / "merging.json").read_text())
        left = {path.name for path in calibrated.iterdir()} ^ {path.name for path in plain.iterdir()}
        shutil.rmtree(calibrated)
    assert weights[0] == weights[1] and not left
    call_main("CAEM_multi_task_finetune.py", calibrated_words(world, f"Calibrated-{merging}", *words))
    before, after = SafetensorsFolder(plain), SafetensorsFolder(calibrated)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == {name for name in before if ".router." in name}
    assert len(changed) == 4 == len(record["calibration"]) and record["identity"]["calibration"] == "routers"
    for near in record["calibration"].values():
        assert near["divergence"][1] < near["divergence"][0] and 0 < near["kept"] <= 1


def test_calibrated_merge_as_a_process(world, done):
    result = run_script("CAEM_multi_task_finetune.py", calibrated_words(world, "Fitted", "--merging", "average"))
    assert result.returncode == 0, result.stderr
    content = history(done[0], "Fitted_[4|4]")
    assert content["identity"]["calibration"] == "routers" and len(content["calibration"]) == 4
    assert content["before"]["test"].keys() == set(TASKS) and len(content["selection"]) == 2


@pytest.mark.parametrize("shares", ["squad", "tokens", "inverse", "random"])
def test_other_shares_than_by_entropy(world, done, shares):
    words = [*world.words(current_case_name=f"CAEM-{shares}"), "--shares", shares, "--merge_only", "true"]
    call_main("CAEM_multi_task_finetune.py", [*words, "--source_experts_num", "4", "--target_experts_num", "8"])
    record = json.loads((done[0] / "models" / f"CAEM-{shares}_[4|8]_merged" / "merging.json").read_text())
    counts = [layer for layers in record["allocation"].values() for layer in layers]
    assert all(sum(layer) == 8 and min(layer) >= 1 for layer in counts)
    if shares == "squad":
        assert all(layer[1] == 4 for layer in counts)  # all that it has
    if shares == "inverse":
        entropies = history(done[0], "CAEM_[4|4]")["entropies"]["encoder"]
        lowest = min(range(3), key=lambda number: entropies[number][0])
        assert record["allocation"]["encoder"][0][lowest] == max(record["allocation"]["encoder"][0])
    if shares == "random":
        assert record["allocation"]["encoder"] != record["allocation"]["decoder"]  # drawn anew for each layer
    if shares == "tokens":
        tokens = [
            history(done[0], f"single_task_[4]/single_task_{task}")["usage"]["encoder"][task][0] for task in TASKS
        ]
        totals = list(map(sum, tokens))
        assert record["allocation"]["encoder"][0][totals.index(max(totals))] == max(record["allocation"]["encoder"][0])


def test_scores_before_fine_tuning_are_not_those_of_another_decoding(copied, monkeypatch):
    """Taken up by the same command; made again where the constants that scores depend on are others."""
    from expert_merging.training import finetuning

    seen = []
    monkeypatch.setattr(finetuning, "finetune", lambda *_, more, **__: seen.append(more["before"]))
    folder, words = copied
    call_main("CAEM_multi_task_finetune.py", words)
    path = folder / "seed0" / "models" / "CAEM_[4|4]_merged" / "test.json"
    content = json.loads(path.read_text())
    content["test"]["squad"]["exact_match"] = 77.0
    path.write_text(json.dumps(content))
    for constants in ([], ["--lr", "0.5"], ["--num_beams", "1"]):
        if "--num_beams" in constants:
            for task in TASKS:
                spoil(folder, lambda content: content["identity"].update(num_beams=1), task)
        call_main("CAEM_multi_task_finetune.py", [*words, *constants])
    scores = [before["test"]["squad"]["exact_match"] for before in seen]
    assert scores[1:3] == [77.0, 77.0] and 77.0 not in (scores[0], scores[3])
    assert json.loads(path.read_text())["identity"]["num_beams"] == 1


def test_the_projection_alone_can_deviate(world, done):
    from transformers import SwitchTransformersForConditionalGeneration

    words = [*world.words(reading="paper+projection", current_case_name="Released"), "--source_experts_num", "4"]
    call_main("CAEM_multi_task_finetune.py", [*words, "--target_experts_num", "4", "--merge_only", "true"])
    model = SwitchTransformersForConditionalGeneration.from_pretrained(done[0] / "models" / "Released_[4|4]_merged")
    encoder, decoder = model.encoder.embed_tokens.weight, model.decoder.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    assert torch.allclose(model.lm_head.weight, encoder + decoder, atol=1e-6)


def test_released_reading_counts_every_padded_position(world, done, tmp_path):
    shutil.copytree(world.folder / "runs" / "data", tmp_path / "data")
    words = [*world.words(tmp_path, reading="released", num_epochs=1), "--task_type", "squad", "--num_expert", "4"]
    call_main("single_task_finetune.py", words)
    content = history(tmp_path / "seed0", "single_task_[4]/single_task_squad")
    examples = json.loads((tmp_path / "data" / "squad" / "complete.json").read_text())["splits"]["validation"][
        "examples"
    ]
    grid = content["usage"]["encoder"]["squad"]
    assert [sum(layer) for layer in grid] == [24 * examples] * 2  # the capacity, 64, cuts nothing here
    assert content["best_epoch"] == 1 and content["squad_data"]["validation"]


# ---------------------------------------------------------------- bad input


def test_one_line_and_status_2(world):
    """As a user meets it; the others below look at the same error inside this process."""
    result = run_script(
        "single_task_finetune.py", [*world.words("nowhere"), "--task_type", "poetry", "--num_expert", "4"]
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "no task 'poetry'" in result.stderr or "poetry" in result.stderr and "squad" in result.stderr
    assert not (world.folder / "nowhere").exists()


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("single_task_finetune.py", ["--RUN_DIR", "{nowhere}", "--num_expert", "4"], "run: python datasets_preprocessing.py"),
        ("single_task_finetune.py", ["--num_expert", "5"], "BASE_MODEL_PATH: there is no folder"),
        ("single_task_finetune.py", ["--num_expert", "4", "--max_input_length", "20"], "max_input_length 24, not 20"),
        ("single_task_finetune.py", ["--num_expert", "4", "--device", "tpu"], "must be cuda, cpu or auto"),
        ("single_task_finetune.py", ["--num_expert", "4", "--lr", "0.5"], "made with other constants"),
        ("Baseline_multi_task_finetune.py", ["--experts_num", "6"], "run: python single_task_finetune.py .*--num_expert 6"),
        ("Baseline_multi_task_finetune.py", ["--experts_num", "4", "--task_types", "squad", "poems"], "poems"),
        ("CAEM_multi_task_finetune.py", ["--target_experts_num", "2"], "must be between 3 and 12"),
        ("CAEM_multi_task_finetune.py", ["--target_experts_num", "13"], "must be between 3 and 12"),
        ("CAEM_multi_task_finetune.py", ["--source_experts_num", "6"], "run: python single_task_finetune.py"),
        ("CAEM_multi_task_finetune.py", ["--merging", "best"], "merging is 'best'; there are caem, average, m_smoe"),
        ("CAEM_multi_task_finetune.py", ["--shares", "best"], "shares is 'best'; there are entropy, inverse"),
        ("CAEM_multi_task_finetune.py", ["--calibration", "best"], "calibration is 'best'; there are none, routers"),
        ("CAEM_multi_task_finetune.py", ["--pool_inputs", "-1"], "pool_inputs is -1"),
        ("CAEM_multi_task_finetune.py", ["--task_types", "squad", "--target_experts_num", "4"], "two or more"),
    ],
)  # fmt: skip
def test_bad_input_is_said(world, done, tmp_path, script, words, said):
    words = [word.replace("{nowhere}", str(tmp_path / "nowhere")) for word in words]
    if script.startswith("CAEM") and "--source_experts_num" not in words:
        words += ["--source_experts_num", "4"]
    with pytest.raises(UserError, match=said):
        call_main(script, [*world.words(), *words])
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_paper_scale_without_cuda(world, done):
    with pytest.raises(UserError, match="needs a CUDA device.*--device cpu"):
        call_main("single_task_finetune.py", [*world.words(device="cuda"), "--task_type", "squad", "--num_expert", "4"])


@pytest.fixture
def copied(world, done, tmp_path):
    """A copy of the finished single-task runs, to spoil."""
    for part in ("models", "histories"):
        shutil.copytree(done[0] / part / "single_task_[4]", tmp_path / "seed0" / part / "single_task_[4]")
    shutil.copytree(world.folder / "runs" / "data", tmp_path / "data")
    return tmp_path, [*world.words(tmp_path), "--source_experts_num", "4", "--target_experts_num", "4"]


def spoil(folder, change, task="xsum"):
    path = folder / "seed0" / "histories" / "single_task_[4]" / f"single_task_{task}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h["identity"].update(ancestor="0" * 64), "come from different pre-trained models"),
        (lambda h: h.pop("usage"), "lacks expert usage"),
        (lambda h: h["usage"]["encoder"].update(xsum=[[0] * 4] * 2), "or of no token"),
        (lambda h: h["usage"]["encoder"].update(xsum=[[1] * 3] * 2), r"usage of shape \(2, 3\)"),
        (
            lambda h: h["identity"].update(num_beams=7),
            "xsum.json .*num_beams was 7, is now 3.*single_task_finetune.py .*xsum",
        ),
        (
            lambda h: h["identity"]["data"].update(xsum="0" * 64),
            "xsum was scored on other data than .*single_task_finetune.py",
        ),
    ],
)
def test_sources_that_do_not_fit(copied, change, said):
    spoil(copied[0], change)
    with pytest.raises(UserError, match=said):
        call_main("CAEM_multi_task_finetune.py", copied[1])
    assert not list(copied[0].rglob("*_merged"))


def test_a_merge_by_other_usage_is_not_taken_for_this_one(copied):
    """The same weights, whose experts were counted on other examples, say."""
    call_main("CAEM_multi_task_finetune.py", [*copied[1], "--merge_only"])
    record = copied[0] / "seed0" / "models" / "CAEM_[4|4]_merged" / "merging.json"
    before = json.loads(record.read_text())
    spoil(copied[0], lambda h: h["usage"]["encoder"].update(xsum=[[9, 9, 9, 9], [9, 0, 0, 0]]))
    call_main("CAEM_multi_task_finetune.py", [*copied[1], "--merge_only"])
    after = json.loads(record.read_text())
    assert after["entropies"]["encoder"][2] == pytest.approx([1, 0]) != before["entropies"]["encoder"][2]


@pytest.mark.parametrize("merging", ["caem", "m_smoe"])
def test_training_after_a_merge_does_not_depend_on_who_made_it(copied, merging, monkeypatch):
    """Models loaded for a merge draw random numbers; a run that finds the merge done has the same noise."""
    from expert_merging.training import finetuning

    states = []
    monkeypatch.setattr(finetuning, "finetune", lambda *_, **__: states.append(torch.get_rng_state()))
    for _ in range(2):
        call_main("CAEM_multi_task_finetune.py", [*copied[1], "--merging", merging, "--pool_inputs", "5"])
    assert torch.equal(*states)


def test_source_cut_short(copied):
    weights = copied[0] / "seed0" / "models" / "single_task_[4]" / "single_task_xsum" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(UserError, match="cut short or damaged"):
        call_main("CAEM_multi_task_finetune.py", copied[1])


def test_source_missing(copied):
    shutil.rmtree(copied[0] / "seed0" / "models" / "single_task_[4]" / "single_task_xsum")
    with pytest.raises(UserError, match="single_task_xsum holds no model.safetensors"):
        call_main("CAEM_multi_task_finetune.py", copied[1])


def test_half_a_data_folder(copied):
    (copied[0] / "data" / "xsum" / "complete.json").unlink()
    with pytest.raises(UserError, match="xsum"):
        call_main("CAEM_multi_task_finetune.py", copied[1])


def test_stock_transformers_is_refused(world, monkeypatch):
    from caem_files import install

    monkeypatch.setattr(install, "is_ours", lambda path: False)
    with pytest.raises(UserError, match="not patched: .*; run: python caem_files/install.py"):
        call_main("single_task_finetune.py", [*world.words(), "--task_type", "squad"])


def test_a_patch_from_another_checkout_is_refused(world, monkeypatch, tmp_path):
    from caem_files import install

    shutil.copytree(install.HERE, tmp_path / "caem_files")
    with (tmp_path / "caem_files" / "modeling_switch_transformers.py").open("a") as file:
        file.write("\n")
    monkeypatch.setattr(install, "HERE", tmp_path / "caem_files")
    with pytest.raises(UserError, match="stale patch: modeling_switch_transformers.py .*; run: python .*install.py"):
        call_main("single_task_finetune.py", [*world.words(), "--task_type", "squad"])


def test_usage_counted_afterwards(world, done, copied):
    """tools/count_expert_usage.py agrees with the training run's own counts, and feeds the reading that counts as released."""
    folder, words = copied
    for task in TASKS:
        words_of_task = ["--task_type", task, "--num_expert", "4", "--input_lengths", "8"]
        call_main("tools/count_expert_usage.py", [*world.words(folder), *words_of_task])
        counted = json.loads((folder / "seed0/histories/single_task_[4]" / f"expert_usage_{task}.json").read_text())
        rows = {(row["counting"], row["input_length"]): row for row in counted["rows"]}
        assert len(rows) == 4
        trained = history(folder / "seed0", f"single_task_[4]/single_task_{task}")
        assert rows["paper", 24]["usage"]["encoder"] == trained["usage"]["encoder"][task]
        assert rows["paper", 24]["usage"]["decoder"] == trained["usage"]["decoder"][task]
        examples = sum(rows["released", 8]["usage"]["encoder"][0]) / 24  # all positions of all examples
        assert examples == round(examples) and rows["paper", 8]["mean_length"] <= 8
    call_main("CAEM_multi_task_finetune.py", [*words, "--reading", "paper+counts", "--merge_only"])
    path = folder / "seed0/histories/single_task_[4]/expert_usage_squad.json"
    content = json.loads(path.read_text())
    for change in ({"identity": {**content["identity"], "weights": ["0" * 64]}}, {"rows": content["rows"][:2]}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(
            UserError, match="usage of squad was counted on other weights or lengths; remove expert_usage_sq"
        ):
            call_main("CAEM_multi_task_finetune.py", [*words, "--reading", "paper+counts", "--merge_only"])
    with pytest.raises(UserError, match="input_lengths is .0,.; it must be 1 or more"):
        call_main("tools/count_expert_usage.py", [*world.words(folder), "--task_type", "squad", "--input_lengths", "0"])


def test_average_is_the_mean_of_the_sources(world, copied):
    from safetensors.torch import load_file

    folder, words = copied
    call_main(
        "CAEM_multi_task_finetune.py",
        [*words, "--merging", "average", "--current_case_name", "Average", "--merge_only"],
    )
    models = folder / "seed0" / "models"
    merged = load_file(models / "Average_[4|4]_merged" / "model.safetensors")
    sources = [load_file(models / "single_task_[4]" / f"single_task_{task}" / "model.safetensors") for task in TASKS]
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, sum(source[name] for source in sources) / 3)
