"""The loop: interrupted anywhere it ends as if it had not been."""

import json
import resource
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file

from expert_merging.core import files
from expert_merging.core.errors import UserError
from expert_merging.data.batches import MicroBatches
from expert_merging.training import checkpoints, loop


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


def run(folder, kill_at=None, selections=(1, 3, 2), loss=loss_of, schedule=None, steps=steps_of):
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
    history = loop.train(
        Accelerator(cpu=True), model, optimizer, num_epochs=3, steps_of=steps, loss_of=counted, after_epoch=after_epoch,
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
    assert checkpoints.best_epoch(history) == 1
    assert {p.name for p in tmp_path.glob("best-*")} == {"best-1"}
    best = torch.load(checkpoints.best_folder(tmp_path, history) / "weights.pt", weights_only=True)
    assert best["layer.weight"].sum().item() == pytest.approx(history[1]["weight"])
    assert not torch.equal(best["layer.weight"], last["layer.weight"])
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


def test_earliest_of_equal_epochs():
    assert checkpoints.best_epoch([{"selection": s} for s in (1.0, 2.0, 2.0)]) == 1


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
    checkpoints.claim(tmp_path / "run", {"lr": 0.1, "tasks": ["a"]})
    checkpoints.claim(tmp_path / "run", {"lr": 0.1, "tasks": ["a"]})
    with pytest.raises(UserError, match="lr was 0.1, is now 0.2"):
        checkpoints.claim(tmp_path / "run", {"lr": 0.2, "tasks": ["a"]})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["lr"] == 0.1


# ---------------------------------------------------------------- checkpoints that can be trusted


def begun(folder, identity=None, kill_at=7):
    """A run killed with a checkpoint there; returns that."""
    if identity is not None:
        checkpoints.claim(folder, identity)
    with pytest.raises(Killed):
        run(folder, kill_at)
    return sorted(folder.glob("checkpoint-*"))[-1]


def test_a_checkpoint_says_what_it_is(tmp_path):
    checkpoint = begun(tmp_path, {"lr": 0.1})
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert manifest["identity"] == {"lr": 0.1} and manifest["processes"] == 1
    assert {"torch", "python", "commit"} <= manifest["versions"].keys()
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert manifest["sha256"].keys() == files - {"manifest.json"}


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    begun(tmp_path / "other", {"lr": 0.1})
    begun(tmp_path / "mine", {"lr": 0.2})
    shutil.rmtree(tmp_path / "mine" / "checkpoint-0000-00000003")
    shutil.copytree(tmp_path / "other" / "checkpoint-0000-00000003", tmp_path / "mine" / "checkpoint-0000-00000003")
    with pytest.raises(UserError, match="is a checkpoint of another run .lr was 0.1, is now 0.2."):
        run(tmp_path / "mine")


@pytest.mark.parametrize("damage", ["changed", "missing", "cut"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, undisturbed, damage):
    """Both are there only where a kill came between writing the one and removing the other."""
    older = begun(tmp_path, kill_at=5)
    shutil.copytree(older, tmp_path / "kept")
    newer = begun(tmp_path, kill_at=3)
    assert newer.name > older.name and not older.exists()
    shutil.move(tmp_path / "kept", older)
    path = newer / "optimizer.bin"
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-20] if damage == "cut" else content[:200] + b"?" + content[201:])
    with pytest.warns(UserWarning, match="is damaged .optimizer.bin .*; going on from the one before"):
        history, weights = run(tmp_path)
    assert history == undisturbed[0]
    assert all(torch.equal(weights[name], undisturbed[1][name]) for name in weights)


def test_the_older_checkpoint_stays_until_the_new_one_is_read_back(tmp_path, monkeypatch):
    older = begun(tmp_path, kill_at=5)

    def unreadable(path, read_back=checkpoints._read_back):
        if path != older:
            raise OSError("read error")
        read_back(path)

    monkeypatch.setattr(checkpoints, "_read_back", unreadable)
    with pytest.raises(UserError, match="cannot write the checkpoint .*read error.*the last one is kept"):
        run(tmp_path)
    assert older.exists()


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path, undisturbed):
    checkpoint = begun(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*checkpoint-0000-00000004.*free space") as error:
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
    assert run(tmp_path)[0] == undisturbed[0]


class Malicious:
    """What unpickling would call leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_a_checkpoint_from_elsewhere_runs_no_code(tmp_path, name):
    """Even one whose manifest fits."""
    checkpoint = begun(tmp_path)
    torch.save({"step": Malicious(tmp_path / "ran"), "state": {}}, checkpoint / name)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"][name] = files.sha256(checkpoint / name)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is damaged .*eights"):
        run(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer.bias": None}, "model.safetensors lacks layer.bias"),
        ({"layer.more": torch.ones(2)}, "model.safetensors has layer.more, which the model has not"),
        ({"layer.bias": torch.ones(2)}, "Toy"),
    ],
)
def test_a_checkpoint_with_other_tensors_than_the_model(tmp_path, change, said):
    """Even one whose manifest fits."""
    checkpoint = begun(tmp_path)
    weights = checkpoint / "model.safetensors"
    tensors = load_file(weights) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, weights)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"][weights.name] = files.sha256(weights)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"is damaged .*{said}"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("was", "said"),
    [({"versions": {"torch": "1.0"}}, "torch was '1.0', is now "), ({"processes": 2}, "processes was 2, is now 1")],
)
def test_other_versions_and_processes_are_said(tmp_path, undisturbed, was, said):
    checkpoint = begun(tmp_path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name, value in was.items():
        manifest[name] = {**manifest[name], **value} if isinstance(value, dict) else value
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=f"{said}.*may differ in its last digits"):
        assert run(tmp_path)[0] == undisturbed[0]


# ---------------------------------------------------------------- numbers that go wrong


class OfTask(torch.Tensor):
    """A pass that knows its task."""

    task = "squad"


def test_a_loss_that_is_no_number_names_its_task_and_keeps_the_checkpoint(tmp_path, undisturbed):
    checkpoint = begun(tmp_path)

    def bad(model, x):
        loss, n = loss_of(model, x)
        return loss * float("inf"), n

    passes = [[step[0], step[1].as_subclass(OfTask)] for step in steps_of(0)]
    with pytest.raises(UserError, match=r"the loss of squad became inf at epoch 1, step 4 of 5; lower lr and remove"):
        run(
            tmp_path,
            loss=lambda model, x: (bad if isinstance(x, OfTask) else loss_of)(model, x),
            steps=lambda _: passes,
        )
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
    assert run(tmp_path)[0] == undisturbed[0]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """The loss is finite, its gradient is not: the step's checkpoint would hold nothing of use."""
    checkpoint = begun(tmp_path)

    def bad(model, x):
        loss, n = loss_of(model, x)
        return loss + (model.layer.weight.sum() * 0).sqrt(), n

    with pytest.raises(UserError, match="a weight became infinite or no number at epoch 1, step 4 of 5"):
        run(tmp_path, loss=bad)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


# ---------------------------------------------------------------- memory that is short


@dataclass(frozen=True)
class Examples:
    """A pass that can be cut: its loss is the sum of its rows' losses, over the rows of the whole."""

    task: str
    rows: np.ndarray
    of: int


def run_in(folder, room: int, micro_batches) -> tuple[list[int], list[dict], dict]:
    """Two steps of 6 + 3 rows on a device where `room` rows of the task "long" fit: (rows tried, history, weights)."""
    set_seed(0)
    model, tried = Toy(), []
    model.dropout.p = 0.0
    data = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))

    def loss(model, one):
        tried.append(len(one.rows))
        made = (model(data[one.rows]) - 1).square().sum() / one.of
        if one.task == "long" and len(one.rows) > room:
            # Half of a backward pass is done when memory runs out.
            (made / 2).backward()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return made, len(one.rows)

    steps = [[Examples("long", np.arange(6), 9), Examples("short", np.arange(6, 9), 9)]] * 2
    history = loop.train(
        Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=0.1), num_epochs=1, steps_of=lambda epoch: steps,
        loss_of=loss, after_epoch=lambda epoch: {"selection": 0}, folder=folder, checkpoint_minutes=9, label="toy",
        micro_batches=micro_batches,
    )  # fmt: skip
    return tried, history, model.state_dict()


def test_passes_are_cut_where_memory_runs_out_and_the_step_stays_the_same(tmp_path, capsys):
    tried, history, weights = run_in(tmp_path / "short", 2, MicroBatches())
    assert tried == [
        6,
        3,
        *[2, 2, 1, 1, 3] * 2,
    ]  # six rows do not fit, nor three; four parts do, then and in the next step
    _, undisturbed, expected = run_in(tmp_path / "ample", 6, MicroBatches())
    assert history[0]["train_loss"] == pytest.approx(undisturbed[0]["train_loss"], rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name])
    assert "out of memory: passes of long in parts of 3 examples from here on" in capsys.readouterr().out


def test_an_example_that_does_not_fit_ends_the_run(tmp_path):
    with pytest.raises(UserError, match="out of memory in training; lower batch_size .* give --gradient_checkpointing"):
        run_in(tmp_path, 0, MicroBatches())


def test_other_errors_pass(tmp_path):
    def broken(model, x):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(tmp_path, loss=broken)
