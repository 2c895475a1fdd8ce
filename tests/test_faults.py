"""The fast part of `make faults`: kills, Ctrl-C and damaged files; and that no two runs write the same folder."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, call_main, run_script, start
from faults import CASES, WITHOUT_CASE

from expert_merging.core import files
from expert_merging.core.errors import UserError

# test_scripts.py kills reproduce_tables.py, which takes long.
KILLED_HERE = sorted({case.script for case in CASES.values()} - {"reproduce_tables.py"})


def test_every_script_killed_anywhere_ends_the_same():
    """Each also runs twice undisturbed, in two folders, and leaves the same bytes."""
    words = ["--kills", "1", "--inputs", "5", "--workers", "1", "--scripts", *KILLED_HERE]
    done = subprocess.run(
        [sys.executable, "tests/faults.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for script in KILLED_HERE:
        assert re.search(rf"^{script}: 1 / 1 kills survived", done.stdout, re.MULTILINE)
    assert "bad inputs tried: 30" in done.stdout and "changed files: 0" in done.stdout


def test_the_harness_covers_every_script():
    folders = ("*.py", "neighbours/*.py", "tools/*.py")
    scripts = {str(path.relative_to(ROOT)) for folder in folders for path in ROOT.glob(folder)} - {"global_config.py"}
    assert scripts == {case.script for case in CASES.values()} | WITHOUT_CASE


@pytest.fixture(scope="module")
def features(world, tmp_path_factory):
    """A folder with the features of all three tasks."""
    runs = tmp_path_factory.mktemp("runs")
    call_main("datasets_preprocessing.py", [*world.words(runs), "--num_expert", "4"])
    return runs


def test_ctrl_c_ends_with_one_line_and_a_second_run_is_refused(world, features, tmp_path):
    """As users meet it: real processes. The line comes last, the bars stand before it."""
    shutil.copytree(features / "data", tmp_path / "data")
    words = [*world.words(tmp_path, num_epochs=500), "--task_type", "squad", "--num_expert", "4"]
    first = start("single_task_finetune.py", words)
    lock = tmp_path / "seed0" / "histories" / "single_task_[4]" / ".single_task_squad.json.lock"
    deadline = time.monotonic() + 300
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    second = run_script("single_task_finetune.py", words)
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert re.search(rf"is being written by another run \(process {first.pid} on .*\); wait for it, or", second.stderr)
    began = time.monotonic()
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=120)
    assert time.monotonic() - began < 20  # on a busy machine; on a free one it is one or two
    assert first.returncode == 130
    lines = said.strip().replace("\r", "\n").splitlines()
    assert lines[-1] == "single_task_finetune.py: interrupted; the same command goes on from the last checkpoint"
    assert "Traceback" not in said and not lock.exists()


HOLD = "from expert_merging.core import files; import sys, time; files.hold(sys.argv[1]); print(flush=True); time.sleep(600)"


@pytest.mark.parametrize(
    ("script", "words", "held"),
    [
        ("datasets_preprocessing.py", ["--num_expert", "4", "--max_input_length", "20"], "data"),
        ("single_task_finetune.py", ["--task_type", "squad", "--num_expert", "4"],
         "seed0/histories/single_task_[4]/single_task_squad.json"),
        ("reproduce_tables.py", ["--parts", "comparison", "--experts_num", "4"], "."),
    ],
)  # fmt: skip
def test_a_folder_that_another_run_writes_is_refused(world, features, monkeypatch, script, words, held):
    files._let_go()  # what this process holds as it has made the features
    holder = subprocess.Popen([sys.executable, "-c", HOLD, features / held], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(UserError, match=rf"is being written by another run \(process {holder.pid} on"):
            words = [*world.words(features), *words]
            monkeypatch.setattr(sys, "argv", [script, *words])
            call_main(script, words)
    finally:
        holder.kill()
        holder.wait()


def test_a_pickled_history_is_never_opened(world, features, tmp_path):
    """Only the JSON is read, though both are written."""

    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    import pickle

    folder = tmp_path / "seed0" / "histories" / "single_task_[4]"
    folder.mkdir(parents=True)
    for task in ("ag_news", "squad", "xsum"):
        (folder / f"single_task_{task}.pkl").write_bytes(pickle.dumps(Malicious()))
    shutil.copytree(features / "data", tmp_path / "data")
    for script in ("Baseline_multi_task_finetune.py", "CAEM_multi_task_finetune.py", "tools/reference_scores.py"):
        words = {"B": ["--experts_num", "4"], "t": ["--num_expert", "4"]}.get(
            script[0], ["--source_experts_num", "4", "--target_experts_num", "4"]
        )
        with pytest.raises(UserError, match="json does not exist; run: python single_task_finetune.py"):
            call_main(script, [*world.words(tmp_path), *words])
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_from_elsewhere_run_no_code(world, features, tmp_path):
    """google/switch-base is published as pytorch_model.bin, so such files are read; what they would call is not called."""
    import torch

    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    shutil.copytree(world.folder / "base-4", tmp_path / "base-4")
    (tmp_path / "base-4" / "model.safetensors").unlink()
    torch.save({"shared.weight": Malicious()}, tmp_path / "base-4" / "pytorch_model.bin")
    shutil.copytree(features / "data", tmp_path / "data")
    words = world.words(tmp_path, BASE_MODEL_PATH=f"{tmp_path}/base-{{experts}}")
    with pytest.raises(UserError, match="BASE_MODEL_PATH: did not find a whole model"):
        call_main("single_task_finetune.py", [*words, "--task_type", "squad", "--num_expert", "4"])
    assert not (tmp_path / "ran").exists()
