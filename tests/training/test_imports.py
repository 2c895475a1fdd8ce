"""Models and histories of the released code: brought in, measured, merged and compared; and what is refused."""

import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import call_main
from transformers import SwitchTransformersForConditionalGeneration

from expert_merging.core.errors import UserError
from expert_merging.training import released_models

TASKS = ("ag_news", "squad", "xsum")
TOOL = "tools/import_released.py"


def fine_tuned(base, seed: int, doubled: bool = False) -> dict[str, torch.Tensor]:
    """What the released code would write: weights near the base's, the last expert of each layer untouched."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in base.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator) * tensor.std() * 0.1 if tensor.dim() > 1 else 0.01
        state[f"STmodel.{name}"] = tensor if "expert_3" in name else tensor + noise
    shared = state["STmodel.shared.weight"]
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        state[f"STmodel.{name}.weight"] = shared * (2 if doubled and name == "lm_head" else 1)
    return state


@pytest.fixture(scope="module")
def prepared(world, tmp_path_factory):
    """A folder with what the released code left, and one with features."""
    runs = tmp_path_factory.mktemp("imports")
    call_main("datasets_preprocessing.py", [*world.words(runs), "--num_expert", "4"])
    base = SwitchTransformersForConditionalGeneration.from_pretrained(world.folder / "base-4")
    released = runs / "released"
    released.mkdir()
    for number, task in enumerate(TASKS):
        torch.save(fine_tuned(base, number), released / f"single_task_{task}.pt")
        scores = {f"{name}_data": [] for name in TASKS} | {f"{task}_data": [np.float64(0.25), np.mean([0.5, 1.0])]}
        grids = {"expert_usage_grid": [[[0.5, 0.5, 0.0, 0.0]] * 2], "expert_usage_grid_de": [[[0.25] * 4] * 2]}
        (released / f"single_task_{task}.pkl").write_bytes(pickle.dumps(scores | grids))
    torch.save(fine_tuned(base, 7), released / "Baseline_[4]_ep2.pt")
    torch.save(fine_tuned(base, 8, doubled=True), released / "CAEM_[4|4]_ep1.pt")
    return runs


@pytest.fixture
def words(world, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "runs")
    return [*world.words(tmp_path / "runs"), "--released_folder", str(tmp_path / "runs" / "released")]


def imported(words, *more):
    call_main(TOOL, [*words, "--num_expert", "4", *more])


def history(tmp_path, name):
    return json.loads((tmp_path / "runs" / "seed0" / "histories" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def everything(world, prepared, tmp_path_factory):
    """Three single-task models and two multi-task ones brought in."""
    folder = tmp_path_factory.mktemp("everything")
    shutil.copytree(prepared, folder / "runs")
    words = [*world.words(folder / "runs"), "--released_folder", str(folder / "runs" / "released")]
    for task in TASKS:
        imported(words, "--task_type", task)
    imported(words, "--released_run", "Baseline_[4]", "--epoch", "2")
    imported(words, "--released_run", "CAEM_[4|4]", "--epoch", "1")
    return folder, words


def test_single_task_models_become_sources_of_caem(everything):
    folder, words = everything
    for task in TASKS:
        found = history(folder, f"single_task_[4]/single_task_{task}")
        assert found["released"]["history"][f"{task}_data"] == [0.25, 0.75]  # beside what is measured here
        assert len(found[f"{task}_data"]["validation"]) == 1 and found[f"{task}_data"]["test"]
        assert torch.tensor(found["usage"]["encoder"][task]).shape == (2, 4)
        assert found["kinship"]["untouched"] == 4 * 2 and 0.05 < found["kinship"]["distance"] < 0.3
        model = SwitchTransformersForConditionalGeneration.from_pretrained(
            folder / "runs/seed0/models/single_task_[4]" / f"single_task_{task}"
        )
        state = torch.load(folder / "runs/released" / f"single_task_{task}.pt")
        assert all(torch.equal(tensor, state[f"STmodel.{name}"]) for name, tensor in model.state_dict().items())
    call_main(
        "CAEM_multi_task_finetune.py",
        [
            *words[:-2],
            "--source_experts_num",
            "4",
            "--target_experts_num",
            "4",
            "--merge_only",
            "--current_case_name",
            "Again",
        ],
    )
    merged = json.loads((folder / "runs/seed0/models/Again_[4|4]_merged/merging.json").read_text())
    assert all(sum(layer) == 4 for layer in merged["allocation"]["encoder"])


def test_multi_task_models_can_be_compared(everything):
    folder, words = everything
    overall = history(folder, "Baseline_[4]")["overall"]
    assert set(overall) == {"validation", "test"}
    caem = SwitchTransformersForConditionalGeneration.from_pretrained(folder / "runs/seed0/models/CAEM_[4|4]")
    assert caem.config.separate_embeddings and not caem.config.tie_word_embeddings
    assert torch.equal(caem.lm_head.weight, 2 * caem.shared.weight)  # not tied again to either
    pair = ["--first", "Baseline_[4]", "--second", "CAEM_[4|4]", "--measures"]
    call_main("tools/compare_models.py", [*words[:-2], *pair, "cka"])
    found = history(folder, "pairs/Baseline_[4]__CAEM_[4|4]")["cka"]
    assert set(found) == {"after"} and len(found["after"]["squad"]["encoder"]) == 4  # what it began with is not known
    with pytest.raises(UserError, match="made with other constants|has an output projection tied to its embedding"):
        call_main("tools/compare_models.py", [*words[:-2], *pair, "soup"])
    imported(words, "--released_run", "Baseline_[4]", "--epoch", "2")  # is there already


def test_another_file_under_the_same_name_is_refused(everything, world, tmp_path):
    folder, words = everything
    base = SwitchTransformersForConditionalGeneration.from_pretrained(world.folder / "base-4")
    other = tmp_path / "other"
    other.mkdir()
    torch.save(fine_tuned(base, 99), other / "Baseline_[4]_ep2.pt")
    with pytest.raises(UserError, match="was made with other constants .*imported was"):
        imported([*words[:-1], str(other)], "--released_run", "Baseline_[4]", "--epoch", "2")


def rename(state):
    return {name.removeprefix("STmodel."): tensor for name, tensor in state.items()}


def unrelated(state):
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randn(t.shape, generator=generator) * t.std() if t.dim() > 1 else t + 1 for n, t in state.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename, "has shared.weight; the released code's files hold tensors whose names begin with STmodel"),
        (unrelated, "does not come from BASE_MODEL_PATH"),
        (lambda s: {n: t for n, t in s.items() if "decoder.block.1" not in n}, "has no decoder.block.1"),
        (list, "holds no tensors"),
        (lambda s: {}, "holds no tensors"),
        (lambda s: s | {3: torch.zeros(2)}, "has 3; the released code's files hold tensors"),
        (lambda s: s | {"STmodel.encoder.block.9.x": torch.zeros(2)}, "has encoder.block.9.x, which the pre-trained"),
        (lambda s: s | {"STmodel.encoder.final_layer_norm.weight": torch.zeros(3)}, r"is \(3,\), in the pre-trained"),
        (lambda s: s | {"STmodel.encoder.final_layer_norm.weight": torch.full((16,), torch.nan)}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(words, tmp_path, change, said):
    path = tmp_path / "runs" / "released" / "single_task_squad.pt"
    torch.save(change(torch.load(path)), path)
    with pytest.raises(UserError, match=said) as error:
        imported(words, "--task_type", "squad")
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "runs" / "seed0").rglob("*") if path.suffix in (".json", ".pt", ".pkl")]


@pytest.mark.parametrize("length", [0, 100, -100])
def test_files_cut_short(words, tmp_path, length):
    path = tmp_path / "runs" / "released" / "single_task_squad.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    with pytest.raises(UserError, match="is no whole file of weights") as error:
        imported(words, "--task_type", "squad")
    assert "\n" not in str(error.value)
    path.write_bytes(whole)
    path.with_suffix(".pkl").write_bytes(path.with_suffix(".pkl").read_bytes()[:length])
    with pytest.raises(UserError, match="is no history of the released code"):
        imported(words, "--task_type", "squad")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--released_folder", "nowhere"], "released_folder is 'nowhere'"),
        (["--task_type", "poems"], "there is no task 'poems'"),
        (["--released_run", "Baseline_8"], "is not the name of a run"),
        (["--released_run", "Baseline_[4]", "--epoch", "1"], "there is no .*Baseline_.4._ep1.pt"),
        (["--num_expert", "6", "--task_type", "squad"], "has no decoder.block.1.layer.2.mlp.experts.expert_4"),
    ],
)
def test_bad_input(words, more, said):
    with pytest.raises(UserError, match=said):
        imported(words, *more)


class Malicious:
    def __reduce__(self):
        return print, ("hello",)


def test_no_code_of_a_file_is_run(words, tmp_path, capsys):
    released = tmp_path / "runs" / "released"
    (released / "single_task_squad.pkl").write_bytes(pickle.dumps({"squad_data": Malicious()}))
    with pytest.raises(UserError, match="it asks for builtins.print"):
        imported(words, "--task_type", "squad")
    torch.save({"STmodel.shared.weight": Malicious()}, released / "single_task_xsum.pt")
    with pytest.raises(UserError, match="is no whole file of weights"):
        imported(words, "--task_type", "xsum")
    assert "hello" not in capsys.readouterr().out


def test_the_old_format_of_torch_is_read(tmp_path):
    state = {"STmodel.shared.weight": torch.ones(2, 3)}
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pt")
    assert torch.equal(released_models.read_weights(tmp_path / "old.pt")["shared.weight"], torch.ones(2, 3))
