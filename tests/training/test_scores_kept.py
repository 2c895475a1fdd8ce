"""What becomes of scores on the way from decoded answers to a history: what is kept of each example, which epoch is best, what
Overall divides by. The models of the other tests score nothing, whose scores would be 0 whatever became of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call_main, constants_of

from expert_merging.data.scores import unpack
from expert_merging.training import evaluate, finetuning, histories, overall
from expert_merging.training.evaluate import on_split

GOALS = {"validation": {"squad": 60.0}, "test": {"squad": 90.0}}


def scored(value: float) -> dict:
    return {"exact_match": value, "f1": value, "loss": 1.0}


class Stop(Exception):
    pass


@pytest.mark.parametrize(("reading", "wanted"), [("paper", 30 / 60), ("released", 45 / 90)])
def test_an_epoch_is_chosen_by_overall_on_its_split(monkeypatch, reading, wanted):
    """Validation in the paper, test in the released code, each divided by the single-task score on the same split."""
    of_split = {"validation": 30.0, "test": 45.0}
    asked, found = [], []

    def on_split(c, accelerator, model, tokenizer, data, split, label):
        asked.append(split)
        return {"squad": {"scores": scored(of_split[split]), "each": split, "usage": {}, "examples": []}}

    def train(*_, after_epoch, **__):
        found.append(after_epoch(0))
        raise Stop

    family = SimpleNamespace(
        check_tokenizer=lambda tokenizer: None, count_usage=lambda *_: None, pass_over_idle=lambda *_: None
    )
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(vocab_size=9)
    for name, value in {
        "on_split": on_split, "_lengths": lambda _: None, "families": SimpleNamespace(family_of=lambda _: family),
        "checkpoints": SimpleNamespace(claim=lambda *_: None), "loop": SimpleNamespace(train=train),
        "sharding": SimpleNamespace(place=lambda _, model: model, is_sharded=lambda _: False),
    }.items():  # fmt: skip
        monkeypatch.setattr(finetuning, name, value)
    c = SimpleNamespace(
        reading=reading, test_each_epoch=False, gradient_checkpointing=False, lr=1.0, adam_betas=(0.9, 0.9), adam_eps=1.0,
        weight_decay=0.0, num_epochs=1, checkpoint_minutes=0, max_grad_norm=0.0,
    )  # fmt: skip
    accelerator = SimpleNamespace(print=lambda *_: None)
    with pytest.raises(Stop):
        finetuning.finetune(
            c, accelerator, model, [], {"squad": {"train": []}}, name="x", save_as="x", work=None, identity={}, goals=GOALS,
            models_folder=None, histories_folder=None,
        )  # fmt: skip
    assert found[0]["selection"] == pytest.approx(wanted)
    assert found[0]["scores"] == {"squad": scored(30.0)}
    assert asked == (["validation"] if reading == "paper" else ["validation", "test"])


def test_a_history_has_overall_of_each_split_by_that_splits_goals(world):
    from expert_merging.switch import models

    model = models.load_model(world.folder / "base-4", "BASE_MODEL_PATH")
    epochs = [
        {
            "selection": s,
            "seconds": 1.0,
            "scores": {"squad": scored(v)},
            "test": {},
            "usage": {"squad": {"encoder": [[1, 1, 1, 1]]}},
        }
        for s, v in ((0.5, 30.0), (0.2, 50.0))
    ]
    tested = {"squad": {"scores": scored(18.0), "each": "kept", "examples": []}}
    accelerator = SimpleNamespace(device=SimpleNamespace(type="cpu"), num_processes=1, mixed_precision="no")
    found = histories.history_of(accelerator, model, "x", "now", epochs, tested, GOALS, {})
    assert found["best_epoch"] == 1 and found["selection"] == [0.5, 0.2]
    assert found["overall"] == {"validation": pytest.approx(30 / 60), "test": pytest.approx(18 / 90)}
    assert found["squad_data"]["test_each"] == "kept" and found["squad_data"]["test"]["exact_match"] == 18.0


def test_overall_divides_by_the_best_epochs_validation_and_its_own_test_score(tmp_path, monkeypatch):
    monkeypatch.setattr(overall, "command", lambda *_, **__: "python it.py")
    history = {
        "best_epoch": 1,
        "squad_data": {"validation": [scored(40.0), scored(20.0)], "test": scored(36.0)},
        "xsum_data": {"validation": [{"rougeL": 3.0}], "test": {"rougeL": 0.0}},
    }
    for task in ("squad", "xsum"):
        (tmp_path / f"single_task_{task}.json").write_text(json.dumps(history))
    asked = SimpleNamespace(**dict.fromkeys(overall.SCORED_WITH))
    with pytest.warns(UserWarning, match="Overall on test leaves out xsum: the single-task score is 0"):
        found = overall.single_task_goals(str(tmp_path), ["squad", "xsum"], 8, asked)
    assert found == {"validation": {"squad": 40.0, "xsum": 3.0}, "test": {"squad": 36.0, "xsum": 0.0}}


def test_each_examples_score_is_kept(monkeypatch):
    features = {"test": {"references": [["a"], ["b"], ["c"]]}}
    family = SimpleNamespace(
        reset_usage=lambda model: None, read_usage=lambda *_: {}, task_loss=lambda *_: 1.0,
        evaluate_task=lambda model, features, task, *_: (task.score(["a", "x", "c"], features["references"]), ["a", "x", "c"]),
    )  # fmt: skip
    monkeypatch.setattr(evaluate, "family_of", lambda model: family)
    monkeypatch.setattr(evaluate, "shown", lambda *_: [])
    found = on_split(SimpleNamespace(), None, None, None, {"squad": features}, "test", "testing")["squad"]
    assert unpack(found["each"]).tolist() == [100.0, 0.0, 100.0]
    assert found["scores"]["exact_match"] == pytest.approx(np.mean([100.0, 0.0, 100.0]))


@pytest.mark.parametrize(("sizes", "epochs", "worth"), [((24, 48), 2, 3), ((24, 24, 24), 2, 2), ((10, 10, 40), 1, 2)])
def test_the_same_compute_is_as_many_examples_as_the_sources_saw(sizes, epochs, worth):
    """A joint epoch takes as many of each task as the smallest has."""
    data = {str(number): {"train": range(size)} for number, size in enumerate(sizes)}
    assert finetuning.epochs_worth(data, epochs) == worth
    assert worth * len(sizes) * min(sizes) == pytest.approx(epochs * sum(sizes), abs=len(sizes) * min(sizes) / 2)


def test_the_baseline_of_the_same_compute_trains_for_both(world, monkeypatch):
    from expert_merging.core.hub import load_tokenizer
    from expert_merging.data import features

    trained = []
    monkeypatch.setattr(finetuning, "finetune", lambda *_, num_epochs, **__: trained.append(num_epochs))
    monkeypatch.setattr(overall, "single_task_goals", lambda *_: GOALS)
    words = [*world.words("compute"), "--experts_num", "4"]
    call_main("datasets_preprocessing.py", [*words[:-2], "--num_expert", "4"])
    for more in ([], ["--same_compute"]):
        call_main("Baseline_multi_task_finetune.py", [*words, *more])
    c, tokenizer = constants_of("Baseline_multi_task_finetune.py", words), load_tokenizer(str(world.folder / "base-4"))
    sizes = [len(features.load(task, c, tokenizer)["train"]) for task in c.task_types]
    assert trained == [2, 2 + round(2 * sum(sizes) / (3 * min(sizes)))]
