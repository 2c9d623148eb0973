"""Layers whose ranks share statistics, on real processes; what each rank does is in synchronized_ranks.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")


def run_ranks(ranks, *checks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = Path(__file__).with_name("synchronized_ranks.py")
    done = subprocess.run(
        [*command, str(script), *checks],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_two_ranks():
    checks = ["equality", "pools", "ghosts", "precisions", "own_statistics", "two_forwards", "recurrences"]
    run_ranks(2, *checks, "trained_recurrences", "absent")


def test_the_function_is_the_layer_on_two_ranks():
    run_ranks(2, "function", "ghosts_of_the_function")


def test_three_ranks():
    run_ranks(3, "equality", "pools", "ghosts", "steps", "uneven", "recurrences")


def test_four_ranks_under_data_parallel():
    run_ranks(4, "data_parallel", "domains")
