"""Two processes give what one process gives, at the same effective batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_as_one(world, tmp_path):
    """Dropout and jitter off, since each process draws its own: losses and weights then agree up to rounding."""
    base = tmp_path / "base-4"
    base.mkdir()
    for path in (world.folder / "base-4").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dropout_rate": 0.0, "router_jitter_noise": 0.0}))

    def words(runs):
        return [*world.words(tmp_path / runs, BASE_MODEL_PATH=tmp_path / "base-{experts}"), "--num_expert", "4"]

    task = ["--task_type", "xsum"]
    for runs in ("one", "two"):
        made = run_script("datasets_preprocessing.py", words(runs))
        assert made.returncode == 0, made.stderr
    one = run_script("single_task_finetune.py", words("one") + task)
    assert one.returncode == 0, one.stderr
    # `accelerate launch` starts several processes for GPUs only; torchrun does what it does there, and works on the CPU.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = subprocess.run(
        [*launch, "single_task_finetune.py", *words("two"), *task],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert two.returncode == 0, two.stderr[-3000:]

    histories = [
        json.loads((tmp_path / runs / "seed0" / "histories" / "single_task_[4]" / "single_task_xsum.json").read_text())
        for runs in ("one", "two")
    ]
    assert histories[1]["processes"] == 2
    assert histories[0]["train_loss"] == pytest.approx(histories[1]["train_loss"], rel=1e-5)
    assert histories[0]["xsum_data"]["test"] == pytest.approx(histories[1]["xsum_data"]["test"], abs=1.0)
    assert len(histories[0]["xsum_data"]["examples"]) == len(histories[1]["xsum_data"]["examples"])
    weights = [
        load_file(tmp_path / runs / "seed0" / "models" / "single_task_[4]" / "single_task_xsum" / "model.safetensors")
        for runs in ("one", "two")
    ]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])
