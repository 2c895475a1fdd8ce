"""caem_files/install.py on a make-believe transformers: it reads and writes files, and imports nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CAEM_FILES = Path(__file__).resolve().parents[2] / "caem_files"
NAMES = ["configuration_switch_transformers.py", "modeling_switch_transformers.py"]
ADDED = ["caem.py", "cpu_kernels.py"]


@pytest.fixture
def site(tmp_path):
    """A folder with a transformers 4.46.3 of three files."""
    folder = tmp_path / "site" / "transformers" / "models" / "switch_transformers"
    folder.mkdir(parents=True)
    (tmp_path / "site" / "transformers" / "__init__.py").write_text('__version__ = "4.46.3"\n')
    for name in NAMES:
        (folder / name).write_text(f"# the original {name}\n")
    return tmp_path / "site"


def run(site, *options, script=CAEM_FILES / "install.py"):
    # -S: without site-packages the interpreter finds no other transformers, and torch cannot be imported by mistake
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-S", script, *options], env=environment, capture_output=True, text=True)


def contents(site):
    root = site / "transformers"
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def installed(site, folder="switch_transformers"):
    return [(site / "transformers" / "models" / folder / name).read_text() for name in NAMES]


def test_apply_check_revert(site):
    before = contents(site)
    originals, ours = installed(site), [(CAEM_FILES / name).read_text() for name in NAMES]

    first = run(site, "--check")
    assert first.returncode == 1 and first.stdout.startswith("not patched") and first.stdout.count("\n") == 1
    assert run(site).returncode == 0
    assert installed(site) == ours and installed(site, "switch_transformers_stock") == originals
    second = run(site, "--check")
    assert second.returncode == 0 and second.stdout.count("\n") == 1

    after = contents(site)
    assert run(site).returncode == 0
    assert contents(site) == after  # again changes nothing

    assert run(site, "--revert").returncode == 0
    assert installed(site) == originals
    assert contents(site) == before | {
        f"models/switch_transformers_stock/{name}": before[f"models/switch_transformers/{name}"] for name in NAMES
    }
    assert run(site, "--check").returncode == 1
    assert run(site, "--revert").returncode == 0


def test_a_newer_patch_never_replaces_the_kept_originals(site, tmp_path):
    originals = installed(site)
    newer = shutil.copytree(CAEM_FILES, tmp_path / "newer")
    run(site)
    for name in NAMES:
        with open(newer / name, "a") as file:
            file.write("# newer\n")
    differs = run(site, "--check", script=newer / "install.py")
    assert differs.returncode == 1 and differs.stdout.startswith("stale patch") and "run: python" in differs.stdout
    assert run(site, script=newer / "install.py").returncode == 0
    assert installed(site)[0].endswith("# newer\n") and installed(site, "switch_transformers_stock") == originals


def test_files_copied_by_hand_count_as_patched_but_cannot_be_reverted(site):
    for name in NAMES + ADDED:
        shutil.copy(CAEM_FILES / name, site / "transformers" / "models" / "switch_transformers" / name)
    assert run(site, "--check").returncode == 0
    assert run(site).returncode == 0
    refused = run(site, "--revert")
    assert refused.returncode == 2 and "reinstall" in refused.stderr and refused.stderr.count("\n") == 1


def test_half_a_patch_is_no_patch(site):
    shutil.copy(CAEM_FILES / NAMES[1], site / "transformers" / "models" / "switch_transformers" / NAMES[1])
    assert run(site, "--check").returncode == 1
    assert run(site).returncode == 0 and run(site, "--check").returncode == 0


def test_another_version_is_refused_by_name(site):
    (site / "transformers" / "__init__.py").write_text('__version__ = "4.47.0"\n')
    before = contents(site)
    refused = run(site)
    assert refused.returncode == 2 and "4.47.0" in refused.stderr and "4.46.3" in refused.stderr
    assert refused.stderr.count("\n") == 1 and contents(site) == before
    assert run(site, "--check").returncode == 1


def test_no_transformers(tmp_path):
    refused = run(tmp_path)
    assert refused.returncode == 2 and "not installed" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder(site):
    folder = site / "transformers" / "models" / "switch_transformers"
    folder.chmod(0o555)
    try:
        refused = run(site)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert installed(site)[0].startswith("# the original")
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize("name", ADDED)
def test_a_missing_file_of_ours_is_half_a_patch(site, name):
    run(site)
    (site / "transformers" / "models" / "switch_transformers" / name).unlink()
    half = run(site, "--check")
    assert half.returncode == 1 and half.stdout.startswith("half a patch") and name in half.stdout
    assert run(site).returncode == 0 and run(site, "--check").returncode == 0


@pytest.mark.parametrize("name", NAMES + ADDED)
def test_one_changed_byte_is_a_stale_patch(site, name):
    run(site)
    path = site / "transformers" / "models" / "switch_transformers" / name
    path.write_bytes(path.read_bytes()[:-2] + b" \n")
    stale = run(site, "--check")
    assert stale.returncode == 1 and stale.stdout.startswith(f"stale patch: {name}") and stale.stdout.count("\n") == 1
    assert run(site).returncode == 0 and run(site, "--check").returncode == 0


def test_it_tells_without_importing(site):
    code = (
        "import install, sys; print(install.problem() is None, 'transformers' in sys.modules, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(CAEM_FILES)])}

    def ask():
        return subprocess.run(
            [sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout.split()

    assert ask() == ["False", "False", "False"]
    run(site)
    assert ask() == ["True", "False", "False"]
