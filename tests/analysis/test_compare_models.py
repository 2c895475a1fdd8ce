"""tools/compare_models.py on small finished runs."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import call_main, run_script

from expert_merging.core.errors import UserError
from expert_merging.experiment.steps import Step
from expert_merging.run.constants import read_constants

SHORT = {"num_epochs": 1, "train_examples": 8, "batch_size": 8, "gradient_accumulation_steps": 1}  # a step or two
TASKS = ("ag_news", "squad", "xsum")
CAEM, BASELINE, RELEASED, WIDE = "CAEM_[4|4]", "Baseline_[4]", "Released_[4|4]", "Baseline_[6]"


@pytest.fixture(scope="module")
def runs(world):
    """Four runs of one epoch, and the words that name their folder."""
    words = world.words("pairs", **SHORT)
    call_main("datasets_preprocessing.py", [*words, "--num_expert", "4"])
    for task in TASKS:
        call_main("single_task_finetune.py", [*words, "--task_type", task, "--num_expert", "4"])
    folder = world.folder / "pairs" / "seed0"
    # By what Overall is measured does not matter here.
    shutil.copytree(folder / "histories" / "single_task_[4]", folder / "histories" / "single_task_[6]")
    for experts in ("4", "6"):
        call_main("Baseline_multi_task_finetune.py", [*words, "--experts_num", experts])
    caem = ["--source_experts_num", "4", "--target_experts_num", "4"]
    call_main("CAEM_multi_task_finetune.py", [*words, *caem])
    call_main(
        "CAEM_multi_task_finetune.py",
        [*words, *caem, "--reading", "paper+projection", "--current_case_name", "Released"],
    )
    return SimpleNamespace(folder=folder, words=words)


def compare(runs, first, second, *words):
    call_main("tools/compare_models.py", [*runs.words, "--first", first, "--second", second, *words])
    return json.loads((runs.folder / "histories" / "pairs" / f"{first}__{second}.json").read_text())


def history(runs, name):
    return json.loads((runs.folder / "histories" / f"{name}.json").read_text())


def validation_losses(runs, name):
    """Of the epoch that was kept, as noted in training."""
    past = history(runs, name)
    return [past[f"{task}_data"]["validation"][past["best_epoch"] - 1]["loss"] for task in TASKS]


def load(folder):
    from transformers import SwitchTransformersForConditionalGeneration

    return SwitchTransformersForConditionalGeneration.from_pretrained(folder)


@pytest.fixture(scope="module")
def done(runs):
    """(all that is measured of two runs, what was printed, the bar)."""
    out, err = io.StringIO(), io.StringIO()
    err.isatty = lambda: True  # where bars move; in a log quick ones say nothing
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        content = compare(runs, CAEM, BASELINE, "--line_points", "3")
    return content, out.getvalue(), err.getvalue()


def test_what_is_written(runs, done):
    content, printed, bar = done
    assert list(content) == ["command", "versions", "identity", "seconds", "first", "second", "soup", "line", "cka"]
    assert content["first"] == CAEM and content["second"] == BASELINE
    assert content["identity"]["weights"].keys() == {CAEM, BASELINE} == content["identity"]["starts"].keys()
    assert content["seconds"] > 0
    assert "soup: ag_news" in printed and "barrier" in printed and "CKA before" in printed
    assert "24/24" in bar  # three tasks of a soup, of five points, and of two pairs
    assert not list((runs.folder / "histories" / "pairs").glob(f"{CAEM}*.run.json"))


def test_parents_are_their_histories(runs, done):
    for which, name in (("first", CAEM), ("second", BASELINE)):
        parent, past = done[0]["soup"]["parents"][which], history(runs, name)
        assert parent["test"] == {task: past[f"{task}_data"]["test"] for task in TASKS}
        assert parent["overall"] == pytest.approx(past["overall"]["test"])


def test_soup_is_the_mean_of_both(runs, done):
    """Averaged again by hand, and scored."""
    from accelerate import Accelerator

    from expert_merging.core.hub import load_tokenizer
    from expert_merging.data import features
    from expert_merging.data.tasks import get_task
    from expert_merging.switch import decoding
    from expert_merging.switch.cross_entropy import task_loss

    c = constants(runs)
    model, other = load(runs.folder / "models" / CAEM), load(runs.folder / "models" / BASELINE)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.add_(theirs).div_(2)
    tokenizer = load_tokenizer(str(runs.folder / "models" / CAEM))
    accelerator = Accelerator(cpu=True)
    for task in TASKS:
        test = features.load(task, c, tokenizer)["test"]
        scores, _ = decoding.evaluate_task(model, test, get_task(task), tokenizer, c, accelerator)
        scores["loss"] = task_loss(model, test, tokenizer, c, accelerator)
        assert done[0]["soup"]["test"][task] == pytest.approx(scores, abs=1e-5)


def test_line_ends_at_both_models(runs, done):
    line = done[0]["line"]
    assert line["t"] == [0, 0.25, 0.5, 0.75, 1]
    for name, end in ((CAEM, 0), (BASELINE, -1)):
        assert [line["loss"][task][end] for task in TASKS] == pytest.approx(validation_losses(runs, name), abs=1e-5)
    mean = [sum(line["loss"][task][i] for task in TASKS) / 3 for i in range(5)]
    above = [mean[i] - (1 - t) * mean[0] - t * mean[4] for i, t in enumerate(line["t"])]
    assert line["mean"] == pytest.approx(mean)
    assert line["barrier"] == pytest.approx(max(above), abs=1e-9)
    assert line["barrier"] == pytest.approx(above[line["t"].index(line["at"])], abs=1e-9)


def test_cka_before_and_after(world, runs, done):
    from expert_merging.analysis.cka import layerwise_cka
    from expert_merging.core.hub import load_tokenizer
    from expert_merging.data import features

    folders = {
        "before": (runs.folder / "models" / f"{CAEM}_merged", world.folder / "base-4"),
        "after": (runs.folder / "models" / CAEM, runs.folder / "models" / BASELINE),
    }
    c, tokenizer = constants(runs), load_tokenizer(str(world.folder / "base-4"))
    assert done[0]["cka"].keys() == folders.keys()
    for when, (first, second) in folders.items():
        for task in TASKS:
            found = done[0]["cka"][when][task]
            assert all(len(found[stack]) == 4 and 0 < min(found[stack]) < 1 for stack in ("encoder", "decoder"))
        data = features.load("xsum", c, tokenizer)["validation"]
        again = layerwise_cka(load(first), load(second), data, tokenizer, c, "cpu")
        for stack in ("encoder", "decoder"):
            assert found[stack] == pytest.approx(again[stack], abs=1e-9)


def constants(runs, *words):
    from tools import compare_models

    return read_constants(vars(compare_models), [*runs.words, *words])


def test_done_once(runs, done, capsys, tmp_path):
    path = runs.folder / "histories" / "pairs" / f"{CAEM}__{BASELINE}.json"
    before = path.stat().st_mtime_ns
    compare(runs, CAEM, BASELINE, "--line_points", "3")
    assert (
        path.stat().st_mtime_ns == before and "is there already; remove it to compare again" in capsys.readouterr().out
    )
    step = Step("tools/compare_models.py", {"first": CAEM, "second": BASELINE, "line_points": 3}, path)
    assert step.is_done(constants(runs))
    assert not Step("tools/compare_models.py", {"first": CAEM, "measures": ("cka",)}, path).is_done(constants(runs))
    # A kill right after the result was written left working files, or took what is written after it.
    here, away = tmp_path, tmp_path / "away"
    assert not replace(step, work=here).is_done(constants(runs)) and replace(step, work=away).is_done(constants(runs))
    assert not replace(step, also=away).is_done(constants(runs)) and replace(step, also=here).is_done(constants(runs))
    with pytest.raises(UserError, match="line_points was 3, is now 5"):
        compare(runs, CAEM, BASELINE)


def test_a_model_with_itself(runs):
    content = compare(runs, CAEM, CAEM, "--line_points", "1")
    past, soup = history(runs, CAEM), content["soup"]
    for task in TASKS:
        assert soup["test"][task] == pytest.approx(past[f"{task}_data"]["test"], abs=1e-5)
        values = [stacks for when in content["cka"].values() for stacks in when[task].values()]
        assert sum(values, []) == pytest.approx([1] * 16, abs=1e-6)
    assert content["line"]["barrier"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("pair", [(RELEASED, BASELINE), (BASELINE, RELEASED)])
def test_a_projection_of_its_own_beside_a_tied_one(runs, pair):
    assert load(runs.folder / "models" / RELEASED).config.tie_word_embeddings is False
    content = compare(runs, *pair, "--line_points", "1", "--measures", "line", "soup", "--eval_batch_size", "5")
    for name, end in zip(pair, (0, -1), strict=True):
        losses = [content["line"]["loss"][task][end] for task in TASKS]
        assert losses == pytest.approx(validation_losses(runs, name), abs=1e-5)
    assert content["soup"]["test"].keys() == set(TASKS) and "cka" not in content


def test_other_numbers_of_experts(runs):
    for measure in ("soup", "line"):
        with pytest.raises(UserError, match="has 4 experts a sparse layer and .* 6: .*give --measures cka"):
            compare(runs, CAEM, WIDE, "--measures", "cka", measure)
    content = compare(runs, CAEM, WIDE, "--measures", "cka", "--cka_examples", "2")
    assert list(content)[-1] == "cka" and content["identity"]["goals"] is None
    assert all(0 < v < 1 for when in content["cka"].values() for stacks in when.values() for v in stacks["encoder"])


def test_interrupted(runs, done, monkeypatch):
    """Measures that are done are kept, but only for the same question."""
    from expert_merging.analysis import soups_and_lines

    def stop(*_):
        raise KeyboardInterrupt

    words = ["--line_points", "0", "--measures", "line", "cka"]
    with monkeypatch.context() as patch:
        patch.setattr(soups_and_lines, "cka", stop)
        with pytest.raises(KeyboardInterrupt):
            compare(runs, BASELINE, CAEM, *words)
        patch.setattr(soups_and_lines, "line", lambda *_: stop())
        with pytest.raises(KeyboardInterrupt):
            compare(runs, BASELINE, CAEM, "--line_points", "1", "--measures", "line", "cka")
    work = runs.folder / "histories" / "pairs" / f"{BASELINE}__{CAEM}.run.json"
    assert work.exists()
    with monkeypatch.context() as patch:
        patch.setattr(soups_and_lines, "line", stop)
        content = compare(runs, BASELINE, CAEM, *words)
    assert not work.exists() and content["line"]["t"] == [0, 1] and content["line"]["barrier"] == 0
    for when, tasks in content["cka"].items():  # CKA does not mind the order
        for task, stacks in tasks.items():
            for stack, values in stacks.items():
                assert values == pytest.approx(done[0]["cka"][when][task][stack], abs=1e-9)


# -- bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--measures", "soup", "tea"], "measures has 'tea'; it may have soup, line and cka"),
        (["--line_points", "-1"], "line_points is -1; it must be 0 or more"),
        (["--cka_examples", "-2"], "cka_examples is -2; it must be 0 or more"),
        (["--first", "CAEM-8"], "'CAEM-8' is not the name of a run"),
        (["--first", "../Baseline_[4]"], "is not the name of a run"),
        (
            ["--second", "Baseline_[5]"],
            "run: python Baseline_multi_task_finetune.py --scale tiny --experts_num 5 --seed 0",
        ),
        (
            ["--first", "CAEM-Avg_[4|9]"],
            "run: python CAEM_multi_task_finetune.py --scale tiny --source_experts_num 4 --target_experts_num 9 "
            "--current_case_name CAEM-Avg --seed 0",
        ),
        (["--num_beams", "1"], r"CAEM_\[4\|4\] was scored with other constants or data \(num_beams was 3, is now 1\)"),
        (["--task_types", "chess"], "chess"),
    ],
)
def test_bad_input(runs, words, said):
    with pytest.raises(UserError, match=said):
        call_main("tools/compare_models.py", [*runs.words, "--first", CAEM, "--second", BASELINE, *words])


def test_one_line_on_stderr(runs):
    result = run_script("tools/compare_models.py", [*runs.words, "--second", "Baseline_[5]"])
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("compare_models.py: ") and "python CAEM_multi_task_finetune.py" in result.stderr


@pytest.fixture
def copied(world, runs, tmp_path):
    """A copy of the runs, to spoil."""
    shutil.copytree(world.folder / "pairs", tmp_path / "runs", ignore=shutil.ignore_patterns("pairs"))
    return SimpleNamespace(folder=tmp_path / "runs" / "seed0", words=world.words(tmp_path / "runs", **SHORT))


def without_weights(models: Path):
    (models / BASELINE / "model.safetensors").unlink()


def without_start(models: Path):
    shutil.rmtree(models / f"{CAEM}_merged")


def with_another_start(models: Path):
    path = models / f"{CAEM}_merged" / "merging.json"
    path.write_text(path.read_text().replace('"alpha": 1.0', '"alpha": 0.5'))


def of_another_depth(models: Path):
    from transformers import SwitchTransformersForConditionalGeneration

    model = load(models / BASELINE)
    model.config.num_decoder_layers = 5
    SwitchTransformersForConditionalGeneration(model.config).save_pretrained(models / BASELINE)


def with_unscaled_projection(models: Path):
    from transformers import SwitchTransformersForConditionalGeneration

    model = load(models / BASELINE)
    model.config.tie_word_embeddings = False
    SwitchTransformersForConditionalGeneration(model.config).save_pretrained(models / BASELINE)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_weights, "holds no model.safetensors; train that model first"),
        (without_start, "_merged, with which .* began, does not exist; bring it, or leave out cka"),
        (with_another_start, "is not what .* began with .*alpha was 1.0, is now 0.5.*; bring that, or leave out cka"),
        (of_another_depth, "are not of one shape: only one of them has decoder.block.4"),
        (with_unscaled_projection, "only one of .* has an output projection tied"),
    ],
)
def test_runs_that_do_not_fit(copied, spoil, said):
    spoil(copied.folder / "models")
    with pytest.raises(UserError, match=said):
        compare(copied, CAEM, BASELINE)
    assert not list(copied.folder.rglob("*__*.json"))


def test_overall_is_by_the_single_task_scores(copied):
    """Made up: the models here score nothing."""
    for name, score in (("single_task_[4]/single_task_squad", 50), (CAEM, 30), (BASELINE, 10)):
        path = copied.folder / "histories" / f"{name}.json"
        past = json.loads(path.read_text())
        past["squad_data"]["test"]["exact_match"] = score
        path.write_text(json.dumps(past))
    parents = compare(copied, CAEM, BASELINE, "--measures", "soup")["soup"]["parents"]
    assert [parent["overall"] for parent in parents.values()] == pytest.approx([0.6, 0.2])


def test_depths_that_cka_cannot_compare(copied):
    of_another_depth(copied.folder / "models")
    with pytest.raises(UserError, match="cannot be compared by cka on ag_news: the decoders have 4 and 5 layers"):
        compare(copied, CAEM, BASELINE, "--measures", "cka")


def test_another_base_model(world, copied, tmp_path):
    base = load(world.folder / "base-4")
    torch.nn.init.zeros_(base.decoder.final_layer_norm.weight)
    base.save_pretrained(tmp_path / "base-4")
    for path in (world.folder / "base-4").glob("*token*"):
        shutil.copy(path, tmp_path / "base-4")
    with pytest.raises(UserError, match=r"is not the model that Baseline_\[4\] began with"):
        compare(copied, CAEM, BASELINE, "--BASE_MODEL_PATH", f"{tmp_path}/base-{{experts}}")
