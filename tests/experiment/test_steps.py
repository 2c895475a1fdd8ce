"""Running steps side by side: order, failures, interruption."""

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from expert_merging.core.errors import UserError
from expert_merging.experiment import steps

NOTES = """
import pathlib, sys, time
folder = pathlib.Path({folder!r})
(folder / "{name}.began").touch()
deadline = time.monotonic() + 60
while not all((folder / one).exists() for one in {awaits!r}) and time.monotonic() < deadline:
    time.sleep(0.01)
missing = [one for one in {reads!r} if not (folder / one).exists()]
if missing:
    sys.exit(f"began before {{missing}}")
(folder / "{name}").touch()
"""


@dataclass(frozen=True)
class Script(steps.Step):
    """A step whose command is a few lines of Python."""

    code: str = ""

    def words(self, shared):
        return ["-c", self.code]


@pytest.fixture
def job(tmp_path):
    def make(
        name: str, reads: tuple[str, ...] = (), awaits: tuple[str, ...] = (), code: str | None = None
    ) -> steps.Job:
        written = code or NOTES.format(folder=str(tmp_path), name=name, reads=reads, awaits=awaits)
        step = Script("script.py", {}, tmp_path / name, code=written)
        return steps.Job(name, name, step, SimpleNamespace(), tuple(tmp_path / one for one in reads))

    return make


def run(jobs: list[steps.Job], folder: Path, at_once: int) -> list[str]:
    """The names of the jobs in the order in which they ended."""
    times = folder / "times.json"
    steps.run_missing(jobs, times, folder / "logs", folder / "guesses.json", at_once)
    return [row["name"] for row in json.loads(times.read_text())["steps"]]


def test_two_run_side_by_side_and_none_before_what_it_needs(job, tmp_path):
    # "a" ends only when "c" has begun; "b" needs "a", and lets "c" pass.
    jobs = [job("a", awaits=("c.began",)), job("b", reads=("a",)), job("c"), job("d", reads=("b", "c"))]
    ended = run(jobs, tmp_path, 2)
    assert sorted(ended) == ["a", "b", "c", "d"]
    assert ended.index("a") < ended.index("b") < ended.index("d")


def test_one_at_a_time_keeps_the_order(job, tmp_path):
    assert run([job("b"), job("a"), job("c", reads=("a", "b"))], tmp_path, 1) == ["b", "a", "c"]


def test_each_gets_its_share_of_the_cores(job, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "cores", lambda: 4)
    code = f"import os; open({str(tmp_path / 'threads')!r}, 'w').write(os.environ['OMP_NUM_THREADS'])"
    run([job("a", code=code)], tmp_path, 2)
    assert (tmp_path / "threads").read_text() == "2"


def test_one_that_fails_is_named_and_what_runs_beside_it_is_interrupted(job, tmp_path):
    told = tmp_path / "told"
    sleeper = (
        "import signal, sys, time, pathlib\n"
        f"def told(*_): pathlib.Path({str(told)!r}).touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, told)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)"
    )
    failing = (
        f"import pathlib, sys, time\nwhile not pathlib.Path({str(tmp_path / 'ready')!r}).exists(): time.sleep(0.01)\n"
        "sys.exit('no such task')"
    )
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"script.py stopped with exit status 1: no such task \(all it printed: .*b\.log"
    ):
        run([job("a", code=sleeper), job("b", code=failing), job("c")], tmp_path, 2)
    assert told.exists() and not (tmp_path / "c").exists() and time.monotonic() - began < 30


def test_interrupted_it_passes_that_on_to_all(job, tmp_path):
    jobs = [job("a", awaits=("never",)), job("b", awaits=("never",))]

    def interrupt():
        while not all((tmp_path / f"{name}.began").exists() for name in "ab"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore it
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            run(jobs, tmp_path, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
