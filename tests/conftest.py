"""What several tests share: a small world of raw data, features and a random base model, and ways to run the scripts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

# No deadline, since machines are slow at times; the same examples in every run, so that a green suite stays green.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent
# Before torch is imported: the models are small, and two processes of one thread each do more than one of two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> "World":
    """Raw data in the published formats and a base model with random weights; nothing else yet."""
    return build_world(tmp_path_factory.mktemp("world"))


def build_world(folder: Path) -> "World":
    """The same, in any folder."""
    import torch
    from raw_data import tiny_tokenizer, write_ag_news, write_squad, write_xsum
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    write_ag_news(folder / "ag_news", train=60, test=8)
    write_squad(folder / "squad", train=24, dev=6)
    write_xsum(folder / "xsum", train=30, validation=6, test=6)
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    for experts in (4, 6):
        config = SwitchTransformersConfig(
            vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=4, num_decoder_layers=4,
            num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=experts, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0,
        )  # fmt: skip
        SwitchTransformersForConditionalGeneration(config).save_pretrained(folder / f"base-{experts}")
        tokenizer.save_pretrained(folder / f"base-{experts}")
    return World(folder)


class World:
    """Where things are, and the command-line words that name them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def words(self, runs: Path | str = "runs", **constants) -> list[str]:
        """Words for any script: everything below `runs`, three tasks from local folders, two short epochs."""
        values = {
            "scale": "tiny", "RUN_DIR": self.folder / runs, "BASE_MODEL_PATH": f"{self.folder}/base-{{experts}}",
            "AG_NEWS_PATH": self.folder / "ag_news", "SQUAD_PATH": self.folder / "squad", "XSUM_PATH": self.folder / "xsum",
            "max_input_length": 24, "max_decoder_length": 6, "train_examples": 0, "batch_size": 4, "num_epochs": 2,
            "gradient_accumulation_steps": 2, "device": "cpu", **constants,
        }  # fmt: skip
        if "task_types" not in constants:
            values["task_types"] = "ag_news squad xsum"
        return [word for name, value in values.items() for word in (f"--{name}", *str(value).split(" "))]


def start(script: str, words: list[str]) -> subprocess.Popen:
    """A script of the repository as a process of its own, one thread, without the hub."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, ROOT / script, *words], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Tests in the background have Ctrl-C ignored, and their children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run_script(script: str, words: list[str]) -> subprocess.CompletedProcess:
    """Run a script to its end."""
    process = start(script, words)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def call_main(script: str, words: list[str]) -> None:
    """Run a script's main() inside this process: quicker than `run_script`, for what fails early."""
    _module(script).main(constants_of(script, words))


def constants_of(script: str, words: list[str]):
    """The constants that a script has with these words on its command line."""
    from expert_merging.run.constants import read_constants

    return read_constants(vars(_module(script)), words)


def _module(script: str):
    import importlib

    return importlib.import_module(script.removesuffix(".py").replace("/", "."))
