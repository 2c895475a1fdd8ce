"""The loop: interrupted anywhere it ends as if it had not been."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from expert_merging import training
from expert_merging.errors import UserError


class Toy(torch.nn.Module):
    """Enough of a model for the loop: random (dropout), and it can save itself."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout = torch.nn.Linear(4, 1), torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.layer(self.dropout(x))

    def save_pretrained(self, folder):
        torch.save(self.state_dict(), folder / "weights.pt")


class Killed(BaseException):
    pass


def steps_of(epoch):
    generator = torch.Generator().manual_seed(epoch)
    return [[torch.randn(3, 4, generator=generator) for _ in range(2)] for _ in range(5)]


def loss_of(model, x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean() / 2, len(x)


def run(folder, kill_at=None, selections=(1, 3, 2), loss=loss_of, schedule=None):
    """Three epochs; `kill_at` raises at that call of the loss (or of the evaluation, as "epoch n")."""
    set_seed(0)
    model, calls = Toy(), []

    def counted(model, x):
        calls.append(len(calls))
        if kill_at == len(calls):
            raise Killed
        return loss(model, x)

    def after_epoch(epoch):
        if kill_at == f"epoch {epoch}":
            raise Killed
        return {"selection": selections[epoch], "weight": model.layer.weight.sum().item()}

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    history = training.train(
        Accelerator(cpu=True), model, optimizer, num_epochs=3, steps_of=steps_of, loss_of=counted, after_epoch=after_epoch,
        folder=folder, checkpoint_minutes=0, schedule=schedule, label="toy",
    )  # fmt: skip
    for record in history:
        record.pop("seconds")
    return history, {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("kill_at", [1, 2, 7, 10, 11, 23, 30, "epoch 0", "epoch 2"])
def test_killed_and_resumed_ends_the_same(tmp_path, undisturbed, kill_at):
    with pytest.raises(Killed):
        run(tmp_path, kill_at)
    history, weights = run(tmp_path)
    assert history == undisturbed[0]
    assert all(torch.equal(weights[name], undisturbed[1][name]) for name in weights)


def test_dropout_matters_here(tmp_path, undisturbed):
    """Else the test above would not see lost random states."""
    model = Toy()
    x = torch.ones(2, 4)
    assert not torch.equal(model(x), model(x))


def test_best_epoch_is_kept_and_others_go(tmp_path):
    history, last = run(tmp_path)
    assert training.best_epoch(history) == 1
    assert {p.name for p in tmp_path.glob("best-*")} == {"best-1"}
    best = torch.load(training.best_folder(tmp_path, history) / "weights.pt", weights_only=True)
    assert best["layer.weight"].sum().item() == pytest.approx(history[1]["weight"])
    assert not torch.equal(best["layer.weight"], last["layer.weight"])
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


def test_earliest_of_equal_epochs():
    assert training.best_epoch([{"selection": s} for s in (1.0, 2.0, 2.0)]) == 1


def test_done_is_done(tmp_path, undisturbed):
    run(tmp_path)
    assert run(tmp_path, kill_at=1)[0] == undisturbed[0]


def test_loss_that_is_no_number_stops(tmp_path):
    def bad(model, x):
        loss, n = loss_of(model, x)
        return loss * float("nan"), n

    with pytest.raises(UserError, match="toy: the loss became nan at epoch 1, step 1 of 5; lower lr"):
        run(tmp_path, loss=bad)


def test_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, kill_at=7)
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    weights = next(checkpoint.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(UserError, match="is damaged .*remove .* to begin"):
        run(tmp_path)


def test_schedule_scales_every_group(tmp_path):
    still = run(tmp_path, schedule=lambda epoch, step: 0.0)[1]
    set_seed(0)
    assert torch.equal(still["layer.weight"], Toy().layer.weight)


def test_claim_refuses_other_constants(tmp_path):
    training.claim(tmp_path / "run", {"lr": 0.1, "tasks": ["a"]})
    training.claim(tmp_path / "run", {"lr": 0.1, "tasks": ["a"]})
    with pytest.raises(UserError, match="lr was 0.1, is now 0.2"):
        training.claim(tmp_path / "run", {"lr": 0.2, "tasks": ["a"]})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["lr"] == 0.1
