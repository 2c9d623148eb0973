"""Files come whole or not at all."""

from __future__ import annotations

import json
import math

import pytest

from batchnorm.errors import InputError
from batchnorm.training.files import make_run_folder, next_run_folder, write_atomically, write_json


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


def test_run_folders_are_numbered_from_one(tmp_path):
    assert next_run_folder(tmp_path, "a").name == "a-1"
    (tmp_path / "a-1").mkdir()
    assert next_run_folder(tmp_path, "a").name == "a-2"


def test_a_folder_with_files_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("work of years")
    with pytest.raises(InputError, match="not empty"):
        make_run_folder(tmp_path, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    make_run_folder(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "work of years"


def test_an_empty_folder_is_taken(tmp_path):
    make_run_folder(tmp_path, overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", [False, True])
def test_a_file_in_the_way_is_one_clear_error(tmp_path, below):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run" if below else tmp_path / "file"
    with pytest.raises(InputError, match=r"output folder .*file"):
        make_run_folder(folder, overwrite=True)
