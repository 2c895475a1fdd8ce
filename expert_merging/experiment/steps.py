"""Running the scripts one after another, each only when its result is missing, with one bar over all."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import global_config
from expert_merging.core.bars import bar as progress_bar
from expert_merging.core.errors import UserError
from expert_merging.core.files import read_json, write_json
from expert_merging.run import results
from expert_merging.run.constants import shared_arguments
from expert_merging.run.provenance import ROOT


@dataclass(frozen=True)
class Step:
    """A script, its own constants, and the JSON file with its result.

    A kill right after that was written may leave `work`, checkpoints that the script removes last, or not `also`, what it
    writes last: then it is called once more.
    """

    script: str
    constants: dict[str, Any] = field(default_factory=dict)
    result: Path = Path()
    work: Path | None = None
    also: Path | None = None

    def is_done(self, shared: SimpleNamespace) -> bool:
        """Whether the result is there and notes the same constants. What differs, the script itself will say."""
        if not self.result.exists() or self.work and self.work.exists() or self.also and not self.also.exists():
            return False
        noted = results.made_with(read_json(self.result))
        wanted = results.identity(SimpleNamespace(**{**vars(shared), **self.constants}))
        both = noted.keys() & wanted.keys()
        return not results.changes({name: noted[name] for name in both}, {name: wanted[name] for name in both})

    def words(self, shared: SimpleNamespace) -> list[str]:
        """The command line after `python`."""
        words = [self.script, *shared_arguments(SimpleNamespace(**{**vars(shared), **self.constants}))]
        for name, value in self.constants.items():
            if not hasattr(global_config, name):  # the script's own
                words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
        return words


@dataclass(frozen=True)
class Job:
    """A step for one seed. `name` says what it is, for people; `kind` is the same for all seeds, for expected times."""

    name: str
    kind: str
    step: Step
    shared: SimpleNamespace


def missing(jobs: list[Job]) -> list[Job]:
    """The jobs whose result is not there; of several with the same command or the same result the first."""
    left, commands, files = [], [], set()
    for job in jobs:
        words = job.step.words(job.shared)
        if words not in commands and job.step.result not in files and not job.step.is_done(job.shared):
            left.append(job)
            commands.append(words)
        files.add(job.step.result)
    return left


def expected(kind: str, *records: Path) -> float | None:
    """Seconds that steps of this kind took, by the first of `records` (files that `run_missing` writes) that knows."""
    for path in records:
        took = [row["seconds"] for row in read_json(path)["steps"] if row["kind"] == kind] if path.exists() else []
        if took:
            return sum(took) / len(took)
    return None


def plan(jobs: list[Job], left: list[Job], *records: Path) -> str:
    """What there is to do, for people: a line a kind of run, with the time it is expected to take."""
    kinds: dict[str, list[int]] = {}
    for job in jobs:
        count = kinds.setdefault(job.kind, [0, 0, 0])
        count[0] += 1
        count[1] += job in left
        count[2] += job.step.is_done(job.shared)
    lines, total, known = [], 0.0, True
    width = max(map(len, kinds))
    for kind, (number, to_run, done) in kinds.items():
        seconds = expected(kind, *records)
        total += to_run * (seconds or 0)
        known = known and (seconds is not None or not to_run)
        each = f"{to_run} to run, about {minutes(seconds)} each" if seconds else f"{to_run} to run"
        left_to_say = f"; {each}" if to_run else "; comes with another" if done < number else ""
        lines.append(f"  {kind:<{width}}  {done} of {number} there{left_to_say}")
    if not left:
        return "\n".join([*lines, "all runs are there already"])
    words = f"about {minutes(total)}" if known else f"{minutes(total)} for those whose time is known"
    return "\n".join([*lines, f"{len(left)} runs to do, {words}"])


def run_missing(jobs: list[Job], times: Path, logs: Path, guesses: Path) -> None:
    """Run `jobs` in order, each as a process of its own, with one bar over all; what they print goes into `logs`.

    Args:
        times: JSON file that gets the seconds (and with nvidia-smi the energy in joules) that each took.
        logs: folder for what the scripts print.
        guesses: another such file, for the times of what has not run here yet.

    Raises UserError when a script stops with an error, KeyboardInterrupt when it was interrupted.
    """
    weights = [expected(job.kind, times, guesses) or 60.0 for job in jobs]
    shape = "{desc} |{bar}| {percentage:3.0f}% {postfix}"
    bar = progress_bar(total=round(sum(weights)), unit="s", bar_format=shape)
    for number, (job, weight) in enumerate(zip(jobs, weights, strict=True)):
        words, before = job.step.words(job.shared), sum(weights[:number])
        log = logs / f"{job.name.replace(' ', '_')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        bar.set_description_str(f"[{number + 1}/{len(jobs)}] {job.name}", refresh=False)
        began, energy = time.monotonic(), Energy()
        with log.open("a") as output:
            output.write(f"\n$ python {' '.join(words)}\n")
            output.flush()
            process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent
            )
            try:
                while process.poll() is None:
                    elapsed = time.monotonic() - began
                    left = max(sum(weights[number:]) - elapsed, 0)
                    bar.set_postfix_str(f"about {minutes(left)} left; {_last_line(log)}"[:110], refresh=False)
                    bar.update(round(before + min(elapsed, 0.98 * weight)) - bar.n)
                    energy.sample()
                    time.sleep(0.2 if elapsed < 5 else 1.0)
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)  # a terminal has sent it to both, a program perhaps to one
                process.wait()
                raise
            finally:
                if process.poll() is None:
                    process.kill()
        if process.returncode in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if process.returncode != 0:
            bar.close()
            raise UserError(
                f"{words[0]} stopped with exit status {process.returncode}: {_last_line(log)} (all it printed: {log}); "
                "mend that, then type the same command again"
            )
        row = {
            "name": job.name,
            "kind": job.kind,
            "seconds": round(time.monotonic() - began, 1),
            "joules": energy.joules,
        }
        rows = read_json(times)["steps"] if times.exists() else []
        write_json(times, {"cores": os.cpu_count(), "steps": [*rows, row]})
    bar.n = bar.total
    bar.set_description_str(f"[{len(jobs)}/{len(jobs)}]")
    bar.set_postfix_str("done")
    bar.close()


class Energy:
    """What the GPUs of this machine drew, from nvidia-smi's power readings; None where there is none."""

    def __init__(self):
        self.joules: float | None = None
        self._command = shutil.which("nvidia-smi")
        self._last: float | None = None

    def sample(self) -> None:
        """Add the power drawn now, for the time since the last sample (every ten seconds at most)."""
        now = time.monotonic()
        if self._command is None or (self._last is not None and now - self._last < 10):
            return
        query = [self._command, "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        try:
            watts = sum(map(float, subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split()))
        except (ValueError, OSError, subprocess.TimeoutExpired):
            self._command = None
            return
        if self._last is not None:
            self.joules = round((self.joules or 0) + watts * (now - self._last), 1)
        self._last = now


def minutes(seconds: float) -> str:
    """A time for people."""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _end_with_parent() -> None:
    """On Linux a script ends when this process is killed, so that two never write the same run."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _last_line(log: Path) -> str:
    """The last thing that a script printed; bars end in carriage returns."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
