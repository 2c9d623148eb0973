"""Moments and calibration by Ray, Spark and Dask, each in one local session; what is checked is in engine_checks.py."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FIRST = ("moments", "refusals", "calibrate")
REST = ("standardize", "many_partitions", "strings", "page", "limit")


def run(engine, *checks):
    for package in (engine, "pyarrow", "pandas"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), *sys.path])),
        "PYTHONWARNINGS": "ignore",
        "PYSPARK_PYTHON": sys.executable,
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    name = engine.removeprefix("py")
    done = subprocess.run(
        [sys.executable, str(HERE / "engine_checks.py"), name, *checks],
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]


@pytest.mark.slow
def test_ray():
    run("ray", *FIRST, "retries", "aggregation", "blocks_that_differ")


@pytest.mark.thorough
def test_the_rest_of_ray():
    run("ray", *REST)


def spark(*checks):
    if shutil.which("java") is None and not os.environ.get("JAVA_HOME"):
        pytest.skip("Spark needs a Java runtime, and there is none (Debian: default-jre-headless)")
    run("pyspark", *checks)


@pytest.mark.slow
def test_spark():
    spark(*FIRST, "retries")


@pytest.mark.thorough
def test_the_rest_of_spark():
    spark(*REST)


def test_dask():
    run("dask", *FIRST, *REST)
