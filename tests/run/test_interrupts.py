"""Ctrl-C and SIGTERM end a run as an interrupt, even where the code that they meet makes another error of them."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from expert_merging.core import interrupts
from expert_merging.core.bars import bar
from expert_merging.core.errors import UserError
from expert_merging.run import constants
from expert_merging.run.constants import run

SAID = "\na_script.py: interrupted; the same command goes on from the last checkpoint\n"


@pytest.fixture
def ended(tmp_path, monkeypatch, capsys):
    """main -> (exit status, what was said on standard error) of a script; signals are handled as before afterwards."""
    path = tmp_path / "a_script.py"
    path.write_text("")
    monkeypatch.setattr("sys.argv", ["a_script.py"])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def call(main):
        with pytest.raises(SystemExit) as exit:
            run(main, {"__file__": str(path)})
        return exit.value.code, capsys.readouterr().err

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupts._came = False


def interrupted_read(*_, number=signal.SIGINT, **__):
    """What torch does where Ctrl-C meets it while it reads a file: the KeyboardInterrupt is lost, an error of its own comes."""
    try:
        os.kill(os.getpid(), number)
        time.sleep(1)
    except KeyboardInterrupt:
        pass
    raise RuntimeError("could not determine the shape of object type 'torch.storage.UntypedStorage'")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", [UserError, ValueError, KeyboardInterrupt])
def test_whatever_surfaces_after_an_interrupt_is_an_interrupt(ended, number, kind):
    def main(c):
        try:
            interrupted_read(number=number)
        except RuntimeError as error:
            raise kind(f"the folder holds no whole model ({error})") from error

    assert ended(main) == (130, SAID)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("by_hand", [True, False])
def test_an_interrupt_that_python_drops_ends_the_next_step(ended, by_hand):
    class Interrupted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    steps = []

    def main(c):
        held = Interrupted()
        moved = bar(total=9) if by_hand else None
        for step in range(9) if by_hand else bar(range(9)):
            steps.append(step)
            if step == 3:
                del held
            if moved is not None:
                moved.update()

    status, said = ended(main)
    assert status == 130 and said.endswith(SAID) and len(steps) == 4


def test_a_second_one_does_not_cut_the_last_line(ended, monkeypatch):
    monkeypatch.setattr(constants, "_close_bars", lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(0.1))
    assert ended(lambda c: os.kill(os.getpid(), signal.SIGINT) or time.sleep(1)) == (130, SAID)


def test_without_one_bad_data_is_bad_data(ended):
    def main(c):
        raise UserError("the folder {model} holds no whole model")

    assert ended(main) == (2, "a_script.py: the folder {model} holds no whole model\n")

    def broken(c):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        ended(broken)


def test_one_interrupt_does_not_stand_for_the_next_run(ended):
    assert ended(lambda c: os.kill(os.getpid(), signal.SIGINT) or time.sleep(1))[0] == 130
    assert ended(lambda c: None) == (0, "")


def test_where_ctrl_c_is_ignored_it_stays_so(ended):
    """As in a job that a shell has put into the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert ended(lambda c: os.kill(os.getpid(), signal.SIGINT)) == (0, "")


def test_a_model_that_is_being_read_is_not_called_damaged(ended, world, monkeypatch):
    """Of every reader of models the one line is the interrupt's, though each would say that its folder is damaged."""
    from transformers import AutoModelForSeq2SeqLM, CLIPModel, SwitchTransformersForConditionalGeneration

    from expert_merging.switch import models
    from expert_merging.wemoe import clip, sources

    folder = str(world.folder / "base-4")
    for kind in (AutoModelForSeq2SeqLM, CLIPModel, SwitchTransformersForConditionalGeneration):
        monkeypatch.setattr(kind, "from_pretrained", interrupted_read)
    for reader in (
        lambda: sources.load_seq2seq(folder, "SOURCE_MODEL_WEIGHT_PATH"),
        lambda: models.load_model(folder, "MODEL_SAVE_PATH"),
        lambda: clip.load_clip(folder, "CLIP_PATH"),
    ):
        with pytest.raises(UserError, match="no whole|did not find a whole"):
            reader()
        assert ended(lambda c, reader=reader: reader()) == (130, SAID)


def test_an_interrupt_does_not_send_training_back_to_an_older_checkpoint(ended, tmp_path, monkeypatch):
    """Nor is the newest one called damaged."""
    from accelerate import Accelerator

    from expert_merging.training import checkpoints

    for name in ("checkpoint-0000-00000001", "checkpoint-0000-00000002"):
        (tmp_path / name).mkdir()
    tried = []

    def read(path, shards):
        tried.append(path.name)
        interrupted_read()

    monkeypatch.setattr(checkpoints, "_checked", read)

    def main(c):
        checkpoints.load_newest(Accelerator(cpu=True), None, None, checkpoints.whole_checkpoints(tmp_path))

    monkeypatch.setattr(checkpoints.sharding, "is_sharded", lambda model: False)
    assert ended(main) == (130, SAID) and tried == ["checkpoint-0000-00000002"]


def test_features_that_are_being_read_are_not_made_anew(ended, tmp_path, monkeypatch):
    from expert_merging.data import features

    def damaged(*_):
        try:
            interrupted_read()
        except RuntimeError as error:
            raise UserError("the features are damaged") from error

    monkeypatch.setattr(features, "_read_whole", damaged)
    began = []

    class Closing:
        eos_token_id = 1

        def __call__(self, text):
            return {"input_ids": [5, 1]}

    def main(c):
        c.DATA_DIR, c.max_input_length = str(tmp_path), 8
        began.append(features.is_complete("squad", c, Closing()))

    assert ended(main) == (130, SAID) and began == []


def test_as_users_meet_it(world, tmp_path):
    """A process of its own, interrupted while it reads the pre-trained model, which then seems to be damaged."""
    for task in ("ag_news", "squad", "xsum"):
        shutil.copytree(world.folder / "base-4", tmp_path / "seed0/models/single_task_[4]" / f"single_task_{task}")
    code = """
import os, runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background has it ignored
from transformers import AutoModelForSeq2SeqLM
def read(*_, **__):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except KeyboardInterrupt:
        pass
    raise RuntimeError("could not determine the shape of object type 'torch.storage.UntypedStorage'")
AutoModelForSeq2SeqLM.from_pretrained = read
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    words = ["neighbours/WEMoE_multi_task_merging.py", *world.words(tmp_path), "--experts_num", "4"]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = {words!r}\n{code}"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    said = "WEMoE_multi_task_merging.py: interrupted; the same command goes on from the last checkpoint"
    assert done.stderr.splitlines()[-1] == said and "whole" not in done.stderr
