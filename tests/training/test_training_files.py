"""Files come whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from types import SimpleNamespace

import pytest

from batchnorm import writing
from batchnorm.errors import InputError
from batchnorm.training.files import CONFIG, next_run_folder, run_folder, write_json
from batchnorm.writing import LOCK, alone_in, write_atomically


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half of the new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_keeps_the_suffix(tmp_path):
    seen = []
    write_atomically(tmp_path / "x.pt2", lambda path: (seen.append(path), path.touch()))
    assert seen[0].suffix == ".pt2"
    assert seen[0] != tmp_path / "x.pt2"


def test_json_is_strict(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, -math.inf, 1.5], "b": None, "c": ("x", True)})
    text = (tmp_path / "a.json").read_text()
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values == {"a": ["nan", "-inf", 1.5], "b": None, "c": ["x", True]}


def taken(folder, *, overwrite):
    with run_folder(folder, overwrite=overwrite):
        pass


def test_run_folders_are_numbered_from_one(tmp_path):
    assert next_run_folder(tmp_path / "runs", "a").name == "a-1"
    assert next_run_folder(tmp_path / "runs", "a").name == "a-2"
    (tmp_path / "runs" / "a-3").touch()
    assert next_run_folder(tmp_path / "runs", "a").name == "a-4"
    assert [path.name for path in sorted((tmp_path / "runs").iterdir()) if path.is_dir()] == ["a-1", "a-2", "a-4"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "config", [None, "", "[]", '{"model_type": "bert"}', '{"config": {}}', '{"config": 1, "data": 2}', "[" * 100_000]
)
def test_a_folder_with_files_of_others_is_refused_and_untouched(tmp_path, overwrite, config):
    (tmp_path / "model.onnx").write_text("work of years")
    (tmp_path / "checkpoint-500").mkdir()
    if config is not None:
        (tmp_path / CONFIG).write_text(config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match="it holds files and no run"):
        taken(tmp_path, overwrite=overwrite)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_folder_of_a_run_is_taken_where_this_is_asked_for(tmp_path):
    write_json(tmp_path / CONFIG, {"config": {}, "data": {}})
    (tmp_path / "probe").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        taken(tmp_path, overwrite=False)
    taken(tmp_path, overwrite=True)
    assert (tmp_path / "probe").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, "probe"}


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / LOCK).touch()  # what a killed process left
    taken(tmp_path, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
    with alone_in(tmp_path):
        for _ in range(2):  # who is refused frees nothing
            with pytest.raises(InputError, match=rf"process {os.getpid()} on .* writes into it"):
                taken(tmp_path, overwrite=True)
    taken(tmp_path, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_its_holder_removes_meanwhile_is_made_anew(tmp_path, monkeypatch):
    """Who waits for the file of a process that ends gets no lock on a file that nobody finds."""
    import fcntl

    locks = []

    def flock(file, how):
        if not locks:
            (tmp_path / LOCK).unlink()
        locks.append(os.fstat(file).st_ino)

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone_in(tmp_path):
        assert len(locks) == 2
        assert (tmp_path / LOCK).stat().st_ino == locks[-1]


def test_windows_locks_a_byte_that_nobody_reads(tmp_path, monkeypatch):
    """By a stand-in for `msvcrt`, whose lock is that of this system."""
    import fcntl

    locked = []

    def locking(file, how, length):
        locked.append((os.lseek(file, 0, os.SEEK_CUR), length))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(writing, "fcntl", None)
    with alone_in(tmp_path):
        text = (tmp_path / LOCK).read_bytes()
        assert text.startswith(f"process {os.getpid()} on ".encode())
        assert all(place > len(text) and length == 1 for place, length in locked)
        with pytest.raises(InputError, match=rf"process {os.getpid()} on .* writes into it"), alone_in(tmp_path):
            pass
    assert len(locked) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_written_as_it_is(tmp_path, monkeypatch):
    import fcntl

    def none(file, how):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with alone_in(tmp_path):
        pass


def test_a_link_in_place_of_the_lock_is_refused(tmp_path):
    (tmp_path / "other").write_text("kept")
    (tmp_path / LOCK).symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match="cannot be written"), alone_in(tmp_path):
        pass
    assert (tmp_path / "other").read_text() == "kept"


@pytest.mark.parametrize("below", [False, True])
def test_a_file_in_the_way_is_one_clear_error(tmp_path, below):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run" if below else tmp_path / "file"
    with pytest.raises(InputError, match=r"output folder .*file"):
        taken(folder, overwrite=True)
