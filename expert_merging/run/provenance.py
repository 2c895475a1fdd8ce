"""Where a number comes from: the command, the versions, the commit."""

import functools
import hashlib
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = ROOT / "docs" / "protocol.md"


def command() -> str:
    """The command line of this process, as one would type it in the repository's root."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return shlex.join(["python", str(shown), *sys.argv[1:]])


@functools.cache  # of the start of the run, though the repository may move on
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on, the hashes of the patched model's files as they are
    installed and of the protocol that says how results will be judged, and the repository's commit."""
    from caem_files import install

    names = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "evaluate", "rouge-score", "numpy")
    return {
        "python": platform.python_version(),
        **{n: importlib.metadata.version(n) for n in names},
        "patch": install.fingerprint(),
        "protocol": hashlib.sha256(PROTOCOL.read_bytes()).hexdigest()[:12],
        "commit": commit(ROOT),
    }


def commit(root: Path) -> str:
    """The commit of the checkout at `root`, with "-dirty" where tracked files differ from it; "unknown" without git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
