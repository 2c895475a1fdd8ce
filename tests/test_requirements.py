"""requirements.lock is made of requirements.txt: .ci/lock was run after the last change of that."""

import re

from conftest import ROOT

PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", re.MULTILINE)


def pins(name: str) -> dict[str, set[str]]:
    """Package (in the index's spelling) -> versions; several where they depend on Python's."""
    found: dict[str, set[str]] = {}
    for package, version in PIN.findall((ROOT / name).read_text()):
        found.setdefault(re.sub(r"[-_.]+", "-", package).lower(), set()).add(version)
    return found


def test_the_lock_holds_what_is_required_in_the_same_version():
    required, locked = pins("requirements.txt"), pins("requirements.lock")
    assert {name for name in required if not required[name] <= locked.get(name, set())} == {"torch"}
    assert not any(name == "triton" or name.startswith(("nvidia-", "cuda-")) for name in locked)


def test_every_file_has_a_hash():
    blocks = re.split(r"\n(?=[a-z])", (ROOT / "requirements.lock").read_text())[1:]
    assert len(blocks) > 80
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)
