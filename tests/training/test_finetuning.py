"""What a step of fine-tuning computes, and what Overall is."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from expert_merging.core.errors import UserError
from expert_merging.data.batches import Size
from expert_merging.data.features import collate
from expert_merging.switch import models
from expert_merging.switch.cross_entropy import token_loss
from expert_merging.training import families, finetuning
from expert_merging.training.overall import overall, selection_split

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 1], "labels": [10, 11, 1]},
    {"input_ids": [12, 1], "labels": [13, 1]},
    {"input_ids": [14, 15, 16, 1], "labels": [17, 18, 19, 20, 1]},
]
STEP = Size(len(ROWS), sum(len(row["input_ids"]) for row in ROWS), sum(len(row["labels"]) for row in ROWS))


@pytest.fixture(scope="module")
def model(world):
    return models.load_model(world.folder / "base-4", "BASE_MODEL_PATH").eval()


def loss(model, rows, reading="paper"):
    return token_loss(model, model, collate(rows, 0), STEP, reading)


def test_unpadded_it_is_the_loss_of_transformers(model):
    for row in ROWS:
        step = Size(1, len(row["input_ids"]), len(row["labels"]))
        stock = model(**collate([row], 0)).loss
        for reading in ("paper", "released"):
            assert token_loss(model, model, collate([row], 0), step, reading).item() == pytest.approx(
                stock.item(), rel=1e-6
            )


def test_released_reading_is_the_loss_of_transformers(model):
    stock = model(**collate(ROWS, 0)).loss
    assert loss(model, ROWS, "released").item() == pytest.approx(stock.item(), rel=1e-6)


def test_padding_changes_nothing_in_the_paper_reading_only(model):
    padded = collate(ROWS, 0)
    wide = {
        "input_ids": torch.nn.functional.pad(padded["input_ids"], (0, 9)),
        "attention_mask": torch.nn.functional.pad(padded["attention_mask"], (0, 9)),
        "labels": torch.nn.functional.pad(padded["labels"], (0, 4), value=-100),
    }
    values = {r: token_loss(model, model, wide, STEP, r).item() for r in ("paper", "released")}
    assert values["paper"] == pytest.approx(loss(model, ROWS).item(), rel=1e-6)
    assert abs(values["released"] - loss(model, ROWS, "released").item()) > 1e-6


def test_passes_add_up_to_the_step(model):
    """Neither cross-entropy nor router losses depend on how a step is cut into passes, nor do their gradients."""

    def gradient(parts):
        model.zero_grad()
        total = sum(loss(model, rows) for rows in parts)
        total.backward()
        return total.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, parts = gradient([ROWS]), gradient([ROWS[:1], ROWS[1:]])
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert all(torch.allclose(parts[1][name], whole[1][name], atol=1e-6) for name in whole[1])


def test_passes_hold_the_step_once():
    group, inputs, targets = np.array([4, 2, 9, 7, 5]), np.arange(10) * 2, np.arange(10)
    passes = finetuning._passes("squad", group, inputs, targets, 2)
    assert np.concatenate([one.rows for one in passes]).tolist() == group.tolist()
    assert {one.step for one in passes} == {Size(rows=5, input_tokens=54, target_tokens=27)}


def test_overall():
    scores = {"ag_news": {"accuracy": 90.0}, "squad": {"exact_match": 30.0, "f1": 1.0}}
    assert overall(scores, {"ag_news": 90.0, "squad": 60.0}) == pytest.approx(0.75)
    assert overall(scores, None) == pytest.approx(60.0)
    # A single-task model that scores nothing cannot be compared with.
    assert overall(scores, {"ag_news": 45.0, "squad": 0.0}) == pytest.approx(2.0)
    assert overall(scores, {"ag_news": 0.0, "squad": 0.0}) == 0.0


def test_overall_gives_the_papers_figures():
    """Baseline-8 and CAEM-8 of table 2 have one set of denominators; with theirs, both Overalls come out."""
    tasks, table = ("ag_news", "squad", "xsum"), {"Baseline-8": (94.72, 76.50, 29.36), "CAEM-8": (94.57, 76.51, 31.26)}
    names = dict(zip(tasks, ("accuracy", "exact_match", "rougeL"), strict=True))
    goals = dict(zip(tasks, (94.4, 76.9, 31.2), strict=True))
    got = {
        label: overall({t: {names[t]: s} for t, s in zip(tasks, row, strict=True)}, goals)
        for label, row in table.items()
    }
    assert got["CAEM-8"] - got["Baseline-8"] == pytest.approx(1.0056 - 0.9862, abs=1e-3)


def test_the_released_code_selects_on_test():
    assert (selection_split("paper"), selection_split("released")) == ("validation", "test")


def test_weights_hash_sees_one_changed_number(world):
    model = models.load_model(world.folder / "base-4", "BASE_MODEL_PATH")
    before = models.weights_sha256(model)
    assert before == models.weights_sha256(models.load_model(world.folder / "base-4", "BASE_MODEL_PATH"))
    with torch.no_grad():
        model.shared.weight[3, 3] += 1e-6
    assert before != models.weights_sha256(model)


def test_base_of_another_size_is_refused(world):
    c = SimpleNamespace(BASE_MODEL_PATH=str(world.folder / "base-4"))
    with pytest.raises(UserError, match="has 4 experts a sparse layer, not 8"):
        families.load_base(c, 8)


def test_base_of_another_kind_is_refused(world, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="holds a bert model"):
        models.load_model(tmp_path, "BASE_MODEL_PATH")


def test_base_cut_short_is_refused(world, tmp_path):
    import shutil

    shutil.copytree(world.folder / "base-4", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="did not find a whole model"):
        models.load_model(tmp_path / "cut", "BASE_MODEL_PATH")


def test_a_full_disk_leaves_nothing_and_says_so(world, tmp_path, monkeypatch):
    model = models.load_model(world.folder / "base-4", "BASE_MODEL_PATH")

    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot write .*a.pt: .*failed writing"):
        models.save_state_dict(model, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []
