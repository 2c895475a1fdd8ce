"""Running the scripts one after another, each only when its result is missing."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from expert_merging.constants import shared_arguments
from expert_merging.errors import UserError
from expert_merging.files import read_json
from expert_merging.provenance import ROOT


@dataclass(frozen=True)
class Step:
    """A script, its own constants, and the JSON file that it writes last."""

    script: str
    constants: dict[str, Any] = field(default_factory=dict)
    result: Path = Path()

    def is_done(self, shared: SimpleNamespace) -> bool:
        """Whether the result is there and notes the same constants. What differs, the script itself will say."""
        if not self.result.exists():
            return False
        content = read_json(self.result)
        noted, wanted = content.get("identity") or content.get("asked") or {}, {**vars(shared), **self.constants}
        return all(
            value == wanted[name] or tuple_as_list(wanted[name]) == value
            for name, value in noted.items()
            if name in wanted
        )

    def arguments(self) -> list[str]:
        """The step's own constants as words of a command line."""
        return [word for name, value in self.constants.items() for word in (f"--{name}", str(value))]


def tuple_as_list(value: Any) -> Any:
    """JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value


def run_missing(steps: list[Step], shared: SimpleNamespace) -> None:
    """Run those of `steps` that are not done, in order, with the shared constants of `shared`.

    Raises UserError when a script stops with an error (it has said why), KeyboardInterrupt when it was interrupted.
    """
    commands: list[list[str]] = []
    for step in steps:
        words = [step.script, *shared_arguments(shared), *step.arguments()]
        if not step.is_done(shared) and words not in commands:
            commands.append(words)
    if not commands:
        print("all runs are there already")
    for number, words in enumerate(commands):
        print(f"[{number + 1}/{len(commands)}] python {' '.join(words)}", flush=True)
        status = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
        if status in (130, -2):
            raise KeyboardInterrupt
        if status != 0:
            raise UserError(
                f"{words[0]} stopped with exit status {status}; mend what it says, then type the same command again"
            )
