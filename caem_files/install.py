"""
Put the patched Switch Transformers of this folder into the transformers of the running interpreter.

    python caem_files/install.py             apply the patch, keeping the originals
    python caem_files/install.py --check     say whether it is applied, byte for byte: exit status 0 if so, 1 if not
    python caem_files/install.py --revert    put the originals back

The originals are kept in `transformers/models/switch_transformers_stock/`, where Python can still import them. Nothing
of transformers or torch is imported here, so that scripts can ask `problem()` before anything slow.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path

TRANSFORMERS_VERSION = "4.46.3"
REPLACED = ("configuration_switch_transformers.py", "modeling_switch_transformers.py")
ADDED = ("caem.py", "cpu_kernels.py")
FILES = ADDED + REPLACED  # in the order in which they are written: what another one imports comes first
MARK = re.compile(rb'^CAEM_PATCH = "', re.MULTILINE)
HERE = Path(__file__).resolve().parent


class InstallError(Exception):
    """What stands in the way, in one line."""


def find_transformers() -> Path:
    """Folder of the transformers package that this interpreter would import. Raises InstallError if there is none."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.origin:
        raise InstallError(
            f"transformers is not installed for {sys.executable}: pip install transformers=={TRANSFORMERS_VERSION}"
        )
    return Path(spec.origin).parent


def check_version(package: Path) -> None:
    """Raise InstallError, naming the version found, unless the package is the one the patch is for."""
    found = re.search(rb'^__version__ = "([^"]+)"', (package / "__init__.py").read_bytes(), re.MULTILINE)
    version = found.group(1).decode() if found else "of unknown version"
    if version != TRANSFORMERS_VERSION:
        raise InstallError(
            f"the patch is for transformers {TRANSFORMERS_VERSION} but {version} is in {package}: "
            f"pip install transformers=={TRANSFORMERS_VERSION}"
        )


def target_folder(package: Path) -> Path:
    return package / "models" / "switch_transformers"


def kept_folder(package: Path) -> Path:
    return package / "models" / "switch_transformers_stock"


def is_ours(path: Path) -> bool:
    """Whether this file is the patch (of whichever age) and not the original."""
    return path.is_file() and MARK.search(path.read_bytes()) is not None


def problem() -> str | None:
    """
    What keeps the installed transformers from being the patched one, in a line; None where all files are those of this
    folder, byte for byte. Told from their text, in milliseconds.
    """
    try:
        package = find_transformers()
        check_version(package)
    except InstallError as error:
        return f"not patched: {error}"
    target = target_folder(package)
    remedy = f"run: python {_shown(HERE / 'install.py')}"
    if not all(is_ours(target / name) for name in REPLACED):
        return f"not patched: {target}; {remedy}"
    missing = [name for name in ADDED if not (target / name).is_file()]
    if missing:
        return f"half a patch: {target} has no {', '.join(missing)}; {remedy}"
    stale = [name for name in FILES if (target / name).read_bytes() != (HERE / name).read_bytes()]
    if stale:
        return f"stale patch: {', '.join(stale)} in {target} differs from that in {_shown(HERE)}; {remedy}"
    return None


def fingerprint() -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the installed files, by which runs note what they ran with."""
    target = target_folder(find_transformers())
    if not all((target / name).is_file() for name in FILES):
        return "not patched"
    return hashlib.sha256(b"".join((target / name).read_bytes() for name in FILES)).hexdigest()[:12]


def _shown(path: Path) -> Path:
    """As seen from the working directory, if it lies below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _write(path: Path, content: bytes) -> None:
    """Write whole or not at all; leave a file alone that has the content already."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock other users out of a shared installation
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def apply() -> str:
    """Keep what is installed if it is original, then put our files in its place. Returns a line to print."""
    package = find_transformers()
    check_version(package)
    target, kept = target_folder(package), kept_folder(package)
    for name in REPLACED:
        if not is_ours(target / name):
            _write(kept / name, (target / name).read_bytes())
    for name in FILES:
        _write(target / name, (HERE / name).read_bytes())
    return f"patched {target}"


def check() -> tuple[bool, str]:
    """Whether the patch is applied as it stands here, and a line that says so or why not."""
    found = problem()
    return found is None, found or f"patched: {target_folder(find_transformers())}"


def revert() -> str:
    """Put the originals back; returns a line to print. Raises InstallError if a needed one was not kept."""
    package = find_transformers()
    target, kept = target_folder(package), kept_folder(package)
    ours = [name for name in REPLACED if is_ours(target / name)]
    missing = [name for name in ours if not (kept / name).is_file()]
    if missing:
        raise InstallError(
            f"no original of {', '.join(missing)} was kept in {kept}: "
            f"pip install --force-reinstall --no-deps transformers=={TRANSFORMERS_VERSION}"
        )
    for name in reversed(ours):
        _write(target / name, (kept / name).read_bytes())
    for name in ADDED:
        (target / name).unlink(missing_ok=True)
    return f"{'reverted' if ours else 'already the original'}: {target}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="exit status 0 if the patch is applied, 1 if not")
    action.add_argument("--revert", action="store_true", help="put the originals back")
    options = parser.parse_args()
    try:
        if options.check:
            applied, line = check()
            print(line)
            return 0 if applied else 1
        print(revert() if options.revert else apply())
        return 0
    except (InstallError, OSError) as error:
        print(f"install.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
