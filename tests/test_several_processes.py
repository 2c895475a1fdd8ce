"""Two processes give what one process gives, at the same effective batch; one that dies ends the other, and the run goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, call_main
from safetensors.torch import load_file

from expert_merging.devices import become_several
from expert_merging.errors import UserError
from expert_merging.files import sha256

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--cpu"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def words_of(world, tmp_path_factory):
    """Command-line words for a folder of runs. Without dropout and jitter, which each process draws by itself."""
    folder = tmp_path_factory.mktemp("processes")
    base = folder / "base-4"
    base.mkdir()
    for path in (world.folder / "base-4").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.0, "router_jitter_noise": 0.0}))

    def words(runs):
        paths = {"BASE_MODEL_PATH": folder / "base-{experts}", "DATA_DIR": folder / "data"}
        return [*world.words(runs, **paths), "--num_expert", "4"]

    call_main("datasets_preprocessing.py", words(folder))
    return lambda runs: [*words(runs), "--task_type", "xsum", "--checkpoint_minutes", "0"]


def launch(launcher: list[str], words: list[str]) -> subprocess.Popen:
    """A launcher that starts single_task_finetune.py."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *launcher, "single_task_finetune.py", *words], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def results(runs):
    """(history, model file) of a finished run."""
    history = json.loads((runs / "seed0" / "histories" / "single_task_[4]" / "single_task_xsum.json").read_text())
    return history, runs / "seed0" / "models" / "single_task_[4]" / "single_task_xsum" / "model.safetensors"


@pytest.fixture(scope="module")
def two(words_of, tmp_path_factory):
    """The run of two processes, started as accelerate's documentation says."""
    runs = tmp_path_factory.mktemp("two")
    process = launch(ACCELERATE, words_of(runs))
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err[-3000:]
    assert out.count("best epoch") == 1  # one of them speaks
    return runs


def test_two_processes_train_and_evaluate_as_one(words_of, two, tmp_path):
    call_main("single_task_finetune.py", words_of(tmp_path))
    (one, weights_of_one), (both, weights_of_both) = results(tmp_path), results(two)
    assert (one["processes"], both["processes"]) == (1, 2)
    assert both["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    assert both["xsum_data"]["test"] == pytest.approx(one["xsum_data"]["test"], rel=1e-5, abs=1e-5)
    first, second = load_file(weights_of_one), load_file(weights_of_both)
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5
    # Every validation token was counted once, every test example decoded once.
    for key in ("expert_usage_grid", "expert_usage_grid_de"):
        assert [sum(layer) for layer in both[key]["xsum"]] == [sum(layer) for layer in one[key]["xsum"]]
    assert both["xsum_data"]["examples"] == one["xsum_data"]["examples"]


def test_one_that_dies_ends_the_other_and_the_run_goes_on(words_of, two, tmp_path):
    process = launch(TORCHRUN, words_of(tmp_path))
    work = tmp_path / "seed0" / "models" / "single_task_[4]" / "single_task_xsum.run"
    deadline = time.monotonic() + 600
    while not list(work.glob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = psutil.Process(process.pid).children()
    next(worker for worker in workers if worker.environ().get("RANK") == "1").send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0 and not any(worker.is_running() for worker in workers)
    assert "single_task_finetune.py: another process of this run has ended; the same command goes on" in said or (
        "single_task_finetune.py: interrupted; the same command goes on from the last checkpoint" in said
    )
    again = launch(TORCHRUN, words_of(tmp_path))
    _, said = again.communicate(timeout=1200)
    assert again.returncode == 0, said[-3000:]
    (mine, my_weights), (theirs, their_weights) = results(tmp_path), results(two)
    assert sha256(my_weights) == sha256(their_weights) and mine["train_loss"] == theirs["train_loss"]
    assert not work.exists()


def test_a_launch_that_cannot_be_read_names_torchrun(monkeypatch):
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["something", "else"])
    with pytest.raises(UserError, match="torchrun --standalone --nproc_per_node 2 SCRIPT"):
        become_several()
