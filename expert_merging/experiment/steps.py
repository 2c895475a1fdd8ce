"""Running the scripts, each only when its result is missing and what it needs is there, with one bar over all."""

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
from expert_merging.core.threads import cores
from expert_merging.run import results
from expert_merging.run.constants import shared_arguments
from expert_merging.run.provenance import ROOT
from expert_merging.training import families

BASE_SIZES = ("num_expert", "experts_num")  # the scripts' constants that choose the base they start from


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
        return not results.changes(*results.shared(noted, wanted))

    def words(self, shared: SimpleNamespace) -> list[str]:
        """The command line after `python`."""
        words = [self.script, *shared_arguments(SimpleNamespace(**{**vars(shared), **self.constants}))]
        for name, value in self.constants.items():
            if not hasattr(global_config, name):  # the script's own
                words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
        return words


@dataclass(frozen=True)
class Job:
    """A step for one seed. `name` says what it is, for people; `kind` is the same for all seeds, for expected times;
    `needs` are the results (of other jobs) that it reads."""

    name: str
    kind: str
    step: Step
    shared: SimpleNamespace
    needs: tuple[Path, ...] = ()


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


def check_start(at_once: int, folder: str) -> None:
    """Raises UserError where as many runs cannot be made side by side or their `folder` is a file, or this process is one of
    several of a launcher, which the runs would take for their own."""
    if Path(folder).is_file():
        raise UserError(f"RUN_DIR: {folder} is a file; give a folder")
    if at_once < 1:
        raise UserError(f"runs_at_once is {at_once}; it must be 1 or more")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "this script starts the others one by one and is started by python alone; with several GPUs launch the other "
            "scripts by hand, and this one makes the tables of what is there"
        )


def check_bases(jobs: list[Job]) -> None:
    """Raises UserError where the base that a job starts from is missing or has another number of experts."""
    sizes = {job.step.constants[name]: job.shared for job in jobs for name in BASE_SIZES if name in job.step.constants}
    for experts, shared in sizes.items():
        families.check_base(shared, experts)


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


def run_missing(jobs: list[Job], times: Path, logs: Path, guesses: Path, at_once: int = 1) -> None:
    """Run `jobs`, each as a process of its own, with one bar over all; what they print goes into `logs`.

    Args:
        times: JSON file that gets the seconds (and with nvidia-smi the energy in joules) that each took.
        logs: folder for what the scripts print.
        guesses: another such file, for the times of what has not run here yet.
        at_once: how many run side by side (no more than there are cores), each with its share of the cores. The longest of
            those whose needs are there begins first.

    Raises UserError for a base that cannot be and when a script stops with an error, KeyboardInterrupt when it was
    interrupted; what runs beside it is interrupted too, and goes on from its checkpoint the next time.
    """
    check_bases(jobs)
    at_once = min(at_once, cores())
    weights = {job.name: expected(job.kind, times, guesses) or 60.0 for job in jobs}
    total, done = sum(weights.values()), 0.0
    bar = progress_bar(total=round(total), unit="s", bar_format="{desc} |{bar}| {percentage:3.0f}% {postfix}")
    waiting, begun = list(jobs), 0
    running: list[_Running] = []
    try:
        while waiting or running:
            unmade = {job.step.result for job in waiting} | {one.job.step.result for one in running}
            ready = [job for job in waiting if not unmade & set(job.needs)]
            ready.sort(key=lambda job: -weights[job.name])  # a long one that begins last would end alone
            for job in ready[: at_once - len(running)]:
                waiting.remove(job)
                running.append(_Running(job, logs / f"{job.name.replace(' ', '_')}.log", at_once))
                begun += 1
            bar.set_description_str(
                f"[{begun}/{len(jobs)}] {' | '.join(one.job.name for one in running)}", refresh=False
            )
            while all(one.process.poll() is None for one in running):
                spent = done + sum(min(one.seconds(), 0.98 * weights[one.job.name]) for one in running)
                left = f"about {minutes((total - spent) / at_once)} left"
                said = " | ".join(_last_line(one.log) for one in running)
                bar.set_postfix_str(f"{left}; {said}"[:110], refresh=False)
                bar.update(round(spent) - bar.n)
                for one in running:
                    one.energy.sample()
                time.sleep(0.2 if min(one.seconds() for one in running) < 5 else 1.0)
            for one in [one for one in running if one.process.poll() is not None]:
                one.must_have_ended_well()
                running.remove(one)
                done += weights[one.job.name]
                row = {
                    "name": one.job.name, "kind": one.job.kind, "seconds": round(one.seconds(), 1),
                    "at_once": at_once, "joules": one.energy.joules,
                }  # fmt: skip
                rows = read_json(times)["steps"] if times.exists() else []
                write_json(times, {"cores": os.cpu_count(), "steps": [*rows, row]})
    except BaseException:
        bar.close()
        for one in running:
            one.process.terminate()  # which a script takes as Ctrl-C, that a job in the background would not hear
        for one in running:
            one.process.wait()
        raise
    bar.n = bar.total
    bar.set_description_str(f"[{len(jobs)}/{len(jobs)}]")
    bar.set_postfix_str("done")
    bar.close()


class _Running:
    """A job's process, begun with `1 / at_once` of the cores, and what it took so far."""

    def __init__(self, job: Job, log: Path, at_once: int):
        self.job, self.log, self.energy, self._began = job, log, Energy(), time.monotonic()
        words = job.step.words(job.shared)
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = {"OMP_NUM_THREADS": str(max(1, cores() // at_once))} if at_once > 1 else {}
        with log.open("a") as output:
            output.write(f"\n$ python {' '.join(words)}\n")
            output.flush()
            self.process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=os.environ | threads,
                preexec_fn=_end_with_parent,
            )  # fmt: skip

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def must_have_ended_well(self) -> None:
        status = self.process.returncode
        if status in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if status != 0:
            raise UserError(
                f"{self.job.step.script} stopped with exit status {status}: {_last_line(self.log)} (all it printed: "
                f"{self.log}); mend that, then type the same command again"
            )


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
