"""Writing whole or not at all."""

import errno
import os

import pytest

from expert_merging import files
from expert_merging.errors import UserError


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


def test_new_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with files.new_folder(tmp_path / "f") as temporary:
            (temporary / "x").write_text("1")
            raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    for content in ("1", "2"):
        with files.new_folder(tmp_path / "f") as temporary:
            (temporary / "x").write_text(content)
        assert (tmp_path / "f" / "x").read_text() == content and os.listdir(tmp_path) == ["f"]


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
