"""What is built, what is run in the matrix, and what the page of installation says name the same versions."""

from __future__ import annotations

import datetime
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def matrix() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "matrix"))


def test_wheels_matrix_and_page_name_the_same_torches(matrix: dict[str, Any]):
    built = runpy.run_path(str(ROOT / "scripts" / "wheels.py"))["TORCHES"]
    assert list(built) == list(matrix["TORCHES"])
    oldest, newest = (".".join(version.split(".")[:2]) for version in (built[0], built[-1]))
    page = (ROOT / "docs" / "installation.md").read_text()
    assert f"torch {oldest} to {newest}" in page
    assert f'torch>={oldest}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("outcome", "passed"),
    [("5 passed, 2 skipped", True), ("1 failed, 5 passed", False), ("5 passed, 1 error", False), ("stopped", False)],
)
def test_a_row_has_passed_if_nothing_failed(matrix: dict[str, Any], outcome: str, passed: bool):
    assert matrix["passed"]({"outcome": outcome}) is passed


@pytest.mark.parametrize(
    ("line", "counted"),
    [
        ("6575 passed, 285 skipped in 534.37s (0:08:54)", "6,575 passed, 285 skipped"),
        ("= 1 failed, 5 passed, 1 error in 2.10s =", "1 failed, 5 passed, 1 error"),
        ("INTERNALERROR> KeyError", "pytest stopped"),
    ],
)
def test_a_row_says_what_pytest_counted(matrix: dict[str, Any], line: str, counted: str):
    assert matrix["counted"](line) == counted


@pytest.mark.parametrize(
    ("tests", "whole"), [("tests", True), ("tests --thorough", True), ("tests/nn", False), ("tests -k fold", False)]
)
def test_a_row_is_whole_if_no_part_of_the_suite_was_chosen(matrix: dict[str, Any], tests: str, whole: bool):
    assert matrix["is_whole"]({"tests": tests}) is whole


def test_what_the_matrix_runs_by_default_counts_as_the_whole_suite(matrix: dict[str, Any]):
    assert matrix["is_whole"]({"tests": matrix["EVERYTHING"]})


def test_a_release_wants_a_whole_new_and_passed_row_of_each_torch_and_python(matrix: dict[str, Any]):
    lacks = runpy.run_path(str(ROOT / "scripts" / "release_check.py"))["lacks"]
    small = {**matrix, "TORCHES": {"2.14.1": None, "2.15.0": None}, "PYTHONS": ("3.13", "3.14")}
    today = datetime.date(2026, 11, 30)
    good = {"tests": "tests", "outcome": "9 passed", "date": "2026-11-29", "speedup": "1.4"}
    rows = {"2.14.1 3.13": good, "2.15.0 3.14": good, "2.15.0 3.13": {**good, "tests": "none", "outcome": "installs"}}
    assert lacks(rows, small, today) == []
    assert lacks({**rows, "2.15.0 3.14": {**good, "tests": "tests/nn"}}, small, today) == [
        "no whole row for torch 2.15.0",
        "no whole row for Python 3.14",
    ]
    for change, reason in (
        ({"outcome": "1 failed, 8 passed"}, "1 failed, 8 passed"),
        ({"date": "2026-11-15"}, "of 2026-11-15"),
        ({"speedup": "1.29"}, "1.29 times torch.nn, less than 1.3"),
    ):
        assert lacks({**rows, "2.14.1 3.13": {**good, **change}}, small, today) == [f"2.14.1 3.13: {reason}"]


def test_the_page_has_the_table_of_the_results(matrix: dict[str, Any]):
    rows = json.loads((ROOT / "docs" / "installation-matrix.json").read_text())
    assert matrix["table"]([rows[name] for name in sorted(rows)]) in (ROOT / "docs" / "installation.md").read_text()


def test_a_path_of_the_machine_that_built_a_library_is_found():
    source = runpy.run_path(str(ROOT / "scripts" / "wheels.py"))["SOURCE"]
    assert source.findall(b'FAILED at "/home/me/headers/torch/ivalue.h":7\0') == [b"/home/me/headers/torch/ivalue.h"]
    assert source.findall(b"\0/opt/x/lib/libc10.so\0") == [b"/opt/x/lib/libc10.so"]
    assert not source.findall(
        b'\0"torch/include/ATen/ivalue.h"\0./csrc/core/plan.cpp\0/sys/devices/system/cpu\0libc10.so'
    )
