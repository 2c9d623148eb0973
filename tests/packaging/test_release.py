"""What is built, what is run in the matrix, and what the page of installation says name the same versions."""

from __future__ import annotations

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
    ("tests", "whole"), [("tests", True), ("tests --thorough", True), ("tests/nn", False), ("tests -k fold", False)]
)
def test_a_row_is_whole_if_no_part_of_the_suite_was_chosen(matrix: dict[str, Any], tests: str, whole: bool):
    assert matrix["is_whole"]({"tests": tests}) is whole


def test_what_the_matrix_runs_by_default_counts_as_the_whole_suite(matrix: dict[str, Any]):
    assert matrix["is_whole"]({"tests": matrix["EVERYTHING"]})


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
