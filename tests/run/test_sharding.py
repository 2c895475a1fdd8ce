"""Two processes give what one process gives, at the same effective batch, with whole weights and with weights that are
shared out (FSDP); one that dies ends the other, and the run goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, call_main
from safetensors.torch import load_file

from expert_merging.core.errors import UserError
from expert_merging.core.files import sha256
from expert_merging.run import sharding
from expert_merging.run.devices import become_several, make_accelerator

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


def launch(launcher: list[str], words: list[str], **more: str) -> subprocess.Popen:
    """A launcher that starts single_task_finetune.py, with `more` in its environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    return subprocess.Popen(
        [sys.executable, *launcher, "single_task_finetune.py", *words], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def results(runs):
    """(history, model file) of a finished run."""
    history = json.loads((runs / "seed0" / "histories" / "single_task_[4]" / "single_task_xsum.json").read_text())
    return history, runs / "seed0" / "models" / "single_task_[4]" / "single_task_xsum" / "model.safetensors"


@pytest.fixture(scope="module")
def alone(words_of, tmp_path_factory):
    """The run of one process."""
    runs = tmp_path_factory.mktemp("one")
    call_main("single_task_finetune.py", words_of(runs))
    return runs


@pytest.fixture(scope="module")
def two(words_of, tmp_path_factory):
    """The run of two processes, started as accelerate's documentation says."""
    return finished(launch(ACCELERATE, words_of(runs := tmp_path_factory.mktemp("two"))), runs)


def finished(process: subprocess.Popen, runs):
    """`runs`, when `process` has ended well."""
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err[-3000:]
    assert out.count("best epoch") == 1  # one of them speaks
    return runs


def same_as_one(alone, runs) -> None:
    """`runs`, of two processes, are as `alone`, of one."""
    (one, weights_of_one), (both, weights_of_both) = results(alone), results(runs)
    assert (one["processes"], both["processes"]) == (1, 2)
    assert both["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    assert both["xsum_data"]["test"] == pytest.approx(one["xsum_data"]["test"], rel=1e-5, abs=1e-5)
    first, second = load_file(weights_of_one), load_file(weights_of_both)
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5
    # Every validation token was counted once, every test example decoded once.
    for stack in ("encoder", "decoder"):
        tokens = [[sum(layer) for layer in record["usage"][stack]["xsum"]] for record in (one, both)]
        assert tokens[0] == tokens[1]
    assert both["xsum_data"]["examples"] == one["xsum_data"]["examples"]
    assert both["parameters"] == one["parameters"]


def killed(process: subprocess.Popen, runs):
    """The working folder of `runs`, when one of its two processes was killed after a checkpoint and the other ended."""
    work = runs / "seed0" / "models" / "single_task_[4]" / "single_task_xsum.run"
    deadline = time.monotonic() + 600
    while not list(work.glob("checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [one for one in psutil.Process(process.pid).children(recursive=True) if "RANK" in one.environ()]
    assert len(workers) == 2
    next(worker for worker in workers if worker.environ()["RANK"] == "1").send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0 and not any(worker.is_running() for worker in workers)
    lines = ("another process of this run has ended", "interrupted")
    assert any(f"single_task_finetune.py: {line}; the same command goes on from the last" in said for line in lines), (
        said
    )
    return work


def test_two_processes_train_and_evaluate_as_one(alone, two):
    same_as_one(alone, two)
    assert not results(two)[0]["sharded"]


def test_one_that_dies_ends_the_other_and_the_run_goes_on(words_of, two, tmp_path):
    work = killed(launch(TORCHRUN, words_of(tmp_path)), tmp_path)
    finished(launch(TORCHRUN, words_of(tmp_path)), tmp_path)
    (mine, my_weights), (theirs, their_weights) = results(tmp_path), results(two)
    assert sha256(my_weights) == sha256(their_weights) and mine["train_loss"] == theirs["train_loss"]
    assert not work.exists()


def test_processes_that_share_out_the_weights_do_as_one_also_after_a_kill(words_of, alone, tmp_path):
    work = killed(launch([*ACCELERATE, "--config_file", "fsdp.yaml"], words_of(tmp_path)), tmp_path)
    each_holds_half(sorted(work.glob("checkpoint-*"))[-1])
    shutil.copytree(tmp_path, tmp_path / "copy")
    with pytest.raises(UserError, match="a launch with fsdp.yaml and --num_processes 2; go on with the same"):
        call_main("single_task_finetune.py", words_of(tmp_path / "copy"))
    finished(launch(TORCHRUN, words_of(tmp_path), ACCELERATE_USE_FSDP="true"), tmp_path)
    same_as_one(alone, tmp_path)
    assert results(tmp_path)[0]["sharded"] and not work.exists()


def each_holds_half(checkpoint):
    """Each process wrote the weights and optimizer states that it holds: about half of all."""
    parts = [torch.load(checkpoint / f"shard_{process}.bin", weights_only=True) for process in range(2)]
    sizes = [sum(tensor.numel() for tensor in part["model"].values()) for part in parts]
    states = [sum(state["exp_avg"].numel() for state in part["optimizer"]["state"].values()) for part in parts]
    assert max(sizes) < 0.55 * sum(sizes)
    assert max(states) < 0.55 * sum(states)


@pytest.mark.parametrize(
    "settings, can_shard, said",
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, True, "fsdp_version is 1; only 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"},
            True,
            "fsdp_offload_params is true; only false",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, False, "launch this script without it"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, True, "DeepSpeed is not supported"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(settings, can_shard, said, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        make_accelerator(SimpleNamespace(device="cpu", precision="auto", seed=0), can_shard)


def test_one_process_has_nothing_to_share_out(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    accelerator = make_accelerator(SimpleNamespace(device="cpu", precision="auto", seed=0), can_shard=True)
    assert accelerator.shards and not sharding.is_sharded(sharding.place(accelerator, torch.nn.Linear(2, 2)))


def test_a_launch_that_cannot_be_read_names_torchrun(monkeypatch):
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: ["something", "else"])
    with pytest.raises(UserError, match="torchrun --standalone --nproc_per_node 2 SCRIPT"):
        become_several()
