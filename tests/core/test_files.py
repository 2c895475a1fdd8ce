"""Writing whole or not at all."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from expert_merging.core import files
from expert_merging.core.errors import UserError


def test_write_and_read(tmp_path):
    files.write_json(tmp_path / "a" / "b.json", {"x": [1, "é"]})
    assert files.read_json(tmp_path / "a" / "b.json") == {"x": [1, "é"]}
    assert os.listdir(tmp_path / "a") == ["b.json"]


def test_failed_write_keeps_the_old(tmp_path):
    path = tmp_path / "a.txt"
    files.write_atomic(path, "old")
    with pytest.raises(ZeroDivisionError):
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_full_disk_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write .*a.txt: No space left"):
        with files.replacing(tmp_path / "a.txt"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("exchanges", [True, False])
def test_new_folder_is_whole_or_absent(tmp_path, monkeypatch, exchanges):
    """In one step where the system can exchange two names; elsewhere the old folder steps aside."""
    moved = []
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    elif not sys.platform.startswith("linux"):
        pytest.skip("names are exchanged on Linux only")
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (moved.append(names), replace(*names))[1])
    with pytest.raises(ZeroDivisionError):
        with files.new_folder(tmp_path / "f") as temporary:
            (temporary / "x").write_text("1")
            raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    for content in ("1", "2"):
        with files.new_folder(tmp_path / "f") as temporary:
            (temporary / "x").write_text(content)
        assert (tmp_path / "f" / "x").read_text() == content and os.listdir(tmp_path) == ["f"]
    assert len(moved) == (1 if exchanges else 3)


def test_two_that_would_make_one_folder_do_not_both_begin(tmp_path):
    """`is_there` of tools/merge.py and upcycle.py takes the lock where there is nothing yet."""
    program = (
        "import sys; from expert_merging.core import files; files.is_there(files.Path(sys.argv[1]), lambda: True); "
    )
    first = subprocess.Popen(
        [sys.executable, "-c", program + "print(1, flush=True); sys.stdin.read()", tmp_path / "out"], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert first.stdout.readline() == "1\n"
    second = subprocess.run([sys.executable, "-c", program, tmp_path / "out"], cwd=ROOT, text=True, capture_output=True)
    first.communicate("")
    assert second.returncode != 0 and f"{tmp_path / 'out'} is being written by another run" in second.stderr


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked on this file system: start no second run there"):
        files.hold(tmp_path / "result.json")


def test_a_file_where_a_folder_is_wanted(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        files.write_atomic(tmp_path / "f" / "x", "1")


def test_broken_json_is_a_user_error(tmp_path):
    (tmp_path / "a.json").write_text('{"x": ')
    with pytest.raises(UserError, match="a.json is not readable JSON"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="does not exist"):
        files.read_json(tmp_path / "b.json")


# ---------------------------------------------------------------- durable, and one writer


def test_flushed_before_renamed_and_the_folder_after(tmp_path, monkeypatch):
    """What a power cut leaves cannot be tried here; the order of calls that decides it can."""
    calls = []

    def noted(name, original):
        def call(*arguments):
            target = arguments[0]
            calls.append((name, os.readlink(f"/proc/self/fd/{target}") if name == "fsync" else str(arguments[1])))
            return original(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", noted("fsync", os.fsync))
    monkeypatch.setattr(os, "replace", noted("replace", os.replace))
    files.write_atomic(tmp_path / "new" / "a.txt", "1")
    (made, first), (flushed, temporary), (renamed, path), (after, folder) = calls
    assert (made, flushed, renamed, after) == ("fsync", "fsync", "replace", "fsync")
    assert first == str(tmp_path) and temporary.endswith(".unfinished")
    assert path == str(tmp_path / "new" / "a.txt") and folder == str(tmp_path / "new")
    calls.clear()
    with files.new_folder(tmp_path / "f") as place:
        (place / "sub").mkdir()
        (place / "sub" / "x").write_text("1")
    names = [name for name, _ in calls]
    assert names.index("replace") == 3 and names[-1] == "fsync"  # x, sub and the folder itself, then the name
    assert {os.path.basename(path) for _, path in calls[:2]} == {"x", "sub"}


@pytest.mark.parametrize("write", ["json", "safetensors", "torch", "folder"])
def test_a_disk_that_fills_up(tmp_path, write):
    """Files may not grow above 8 KB: one line, the old content, and no remains."""
    import resource

    import numpy as np
    import torch
    from safetensors.numpy import save_file

    path = tmp_path / "f" if write == "folder" else tmp_path / "a"
    if write == "folder":
        path.mkdir()
        (path / "x").write_text("old")
    else:
        path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*: .*free space") as error:
            if write == "json":
                files.write_json(path, ["x" * 20_000])
            elif write == "folder":
                with files.new_folder(path) as place:
                    (place / "y").write_bytes(bytes(20_000))
            else:
                with files.replacing(path) as place:
                    if write == "torch":
                        torch.save({"a": torch.zeros(20_000)}, place)
                    else:
                        save_file({"a": np.zeros(20_000)}, place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert (path / "x" if write == "folder" else path).read_text() == "old" and os.listdir(tmp_path) == [path.name]


def test_what_the_dead_left_is_removed_and_the_living_keep_theirs(tmp_path):
    (tmp_path / ".a.txt.x1.unfinished").write_text("half")
    (tmp_path / ".f.x2.unfinished").mkdir()
    (tmp_path / ".f.x2.unfinished" / "x").write_text("half")
    with files.replacing(tmp_path / "b.txt") as temporary:
        temporary.write_text("1")
        files.sweep(tmp_path)
        files.write_atomic(tmp_path / "c.txt", "2")
        assert temporary.exists()
    assert sorted(os.listdir(tmp_path)) == ["b.txt", "c.txt"]


def _other(path, then=""):
    code = f"from expert_merging.core import files; files.hold({str(path)!r}, patience=0.2); print('held', flush=True); {then}"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_lock_refuses_a_second_process_and_dies_with_the_first(tmp_path):
    path = tmp_path / "run.json"
    first = _other(path, "import time; time.sleep(60)")
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"is being written by another run \(process {first.pid} on "):
        files.hold(path, patience=0.1)
    first.kill()
    first.wait()
    assert (tmp_path / ".run.json.lock").exists()  # binds nobody
    second = _other(path)
    assert second.communicate()[0] == "held\n" and os.listdir(tmp_path) == []


def test_a_process_may_hold_again_what_it_holds(tmp_path):
    files.hold(tmp_path / "a")
    files.hold(tmp_path / "a")
    refused = _other(tmp_path / "a")
    assert "is being written by another run" in refused.communicate()[1]
    files._let_go()
    assert os.listdir(tmp_path) == []


def test_only_the_first_process_of_a_run_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    files.hold(tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_json_too_deep_is_a_user_error(tmp_path):
    (tmp_path / "a.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="not readable JSON"):
        files.read_json(tmp_path / "a.json")
