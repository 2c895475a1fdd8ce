"""datasets_preprocessing.py from the command line: what it writes, that it does so once, how it answers mistakes."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import raw_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Raw data and a base model's tokenizer."""
    folder = tmp_path_factory.mktemp("world")
    raw_data.write_ag_news(folder / "ag_news")
    raw_data.write_squad(folder / "squad")
    raw_data.write_xsum(folder / "xsum")
    raw_data.tiny_tokenizer().save_pretrained(folder / "base-8")
    return folder


SCRIPT = ROOT / "datasets_preprocessing.py"


def command_line(world: Path, *arguments: str, tasks=("ag_news", "squad", "xsum")) -> list[str]:
    words = [str(SCRIPT), "--scale", "tiny", "--task_types", *tasks, "--BASE_MODEL_PATH", str(world / "base-{experts}")]
    words += ["--max_input_length", "24", "--max_decoder_length", "8"]
    for constant, name in (("AG_NEWS_PATH", "ag_news"), ("SQUAD_PATH", "squad"), ("XSUM_PATH", "xsum")):
        words += [f"--{constant}", str(world / name)]
    return [*words, *arguments]


def run(world: Path, *arguments: str, **more) -> subprocess.CompletedProcess:
    """The script in a process of its own, in the folder `world`, offline."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command_line(world, *arguments, **more)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=world)


@pytest.fixture
def run_here(world, monkeypatch, capfd):
    """As `run`, in this process: what imports torch then takes no seconds."""

    def run_here(*arguments: str, **more) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", command_line(world, *arguments, **more))
        monkeypatch.chdir(world)
        capfd.readouterr()
        with pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return subprocess.CompletedProcess(sys.argv, leaving.value.code, *capfd.readouterr())

    return run_here


def test_writes_once_and_makes_damaged_and_changed_features_again(world, run_here, tmp_path):
    data = tmp_path / "data"
    first = run(world, "--DATA_DIR", str(data))
    assert first.returncode == 0, first.stderr
    assert sorted(file.name for file in data.iterdir()) == ["ag_news", "lengths.png", "squad", "xsum"]
    assert (data / "lengths.png").read_bytes().startswith(b"\x89PNG")
    table = [line.split() for line in first.stdout.splitlines()[-10:]]
    assert table[0][:3] == ["task", "split", "examples"]
    counts = {(line[0], line[1]): line[2] for line in table[1:]}
    assert counts == {
        ("ag_news", "train"): "36", ("ag_news", "validation"): "4", ("ag_news", "test"): "12",
        ("squad", "train"): "20", ("squad", "validation"): "8", ("squad", "test"): "8",
        ("xsum", "train"): "20", ("xsum", "validation"): "8", ("xsum", "test"): "8",
    }  # fmt: skip

    before = {file: file.stat().st_mtime_ns for file in data.rglob("*")}
    second = run(world, "--DATA_DIR", str(data))
    assert second.returncode == 0 and "already" in second.stdout
    assert second.stdout.splitlines()[-10:] == first.stdout.splitlines()[-10:]
    assert {file: file.stat().st_mtime_ns for file in data.rglob("*")} == before

    next((data / "squad" / "train").glob("*.arrow")).write_bytes(b"half")
    third = run_here("--DATA_DIR", str(data), "--max_decoder_length", "8")
    assert third.returncode == 0 and "squad\n" in third.stdout and "xsum\n" not in third.stdout.split("task ")[0]
    fourth = run_here("--DATA_DIR", str(data), "--train_examples", "5", tasks=("xsum",))
    assert fourth.returncode == 0 and fourth.stdout.splitlines()[-3].split()[:3] == ["xsum", "train", "5"]


MISTAKES = {
    "unknown constant": (["--max_imput_length", "24"], "no such constant"),
    "wrong type": (["--train_examples", "many"], "train_examples"),
    "unknown task": (["--task_types", "agnews"], "there is no task 'agnews'"),
    "length": (["--max_input_length", "1"], "max_input_length is 1"),
    "limit": (["--train_examples", "-3"], "train_examples is -3"),
    "no folder": (["--AG_NEWS_PATH", "./nowhere"], "AG_NEWS_PATH: there is no folder './nowhere'"),
    "no hub": (
        ["--XSUM_PATH", "EdinburghNLP/xsum"],
        "bring a folder with train.jsonl, validation.jsonl and test.jsonl",
    ),
    "no base model": (
        ["--BASE_MODEL_PATH", "base_models/nothing-{experts}"],
        "BASE_MODEL_PATH: base_models/nothing-8 is no folder here",
    ),
    "no tokenizer in the base model": (["--BASE_MODEL_PATH", "ag_news"], "the folder ag_news holds no whole tokenizer"),
    "wrong data set": (["--SQUAD_PATH", "xsum"], "holds neither train-v1.1.json and dev-v1.1.json"),
    "data folder is a file": (["--DATA_DIR", "ag_news/train.csv"], "DATA_DIR: cannot write"),
    "data folder holds raw data": (["--DATA_DIR", "."], "in the way"),
}


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, expected, world, run_here, tmp_path, request):
    before = sorted(world.rglob("*"))
    # Whether the hub may be asked is settled when its library is imported: that needs a process of its own.
    arguments = ["--DATA_DIR", str(tmp_path / "data"), *arguments]
    done = run(world, *arguments) if request.node.callspec.id in ("no hub", "no base model") else run_here(*arguments)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and expected in done.stderr, done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "data").exists() and sorted(world.rglob("*")) == before


def test_the_last_task_broken_stops_before_the_first_is_written(run_here, tmp_path):
    path = raw_data.write_ag_news(tmp_path / "broken")
    (path / "test.csv").write_bytes(b'"1","a","b"\n"9","a","b"\n')
    done = run_here(
        "--DATA_DIR", str(tmp_path / "data"), "--AG_NEWS_PATH", str(path), tasks=("squad", "xsum", "ag_news")
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"datasets_preprocessing.py: {path}/test.csv, line 2: the class index is '9'; it must be 1, 2, 3 or 4"
    ]
    assert not (tmp_path / "data").exists()


def test_help_needs_no_library():
    command = [sys.executable, "-S", str(SCRIPT), "--help"]  # -S: nothing that was installed is found
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--SQUAD_PATH" in done.stdout and "--num_expert" in done.stdout
