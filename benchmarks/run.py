"""Runs suites in processes of their own and keeps their rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .machine import ROOT
from .suites import SUITES


def run(names: Iterable[str], quick: bool, path: Path) -> list[str]:
    """Runs suites; writes their rows to `path` as they come, so that an interruption keeps those so far.

    Returns:
        What failed, a sentence each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    bar = Progress(TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with path.open("w") as rows, bar:
        for name in names:
            failures += _run_suite(name, quick, rows, bar)
    return failures


def _run_suite(name: str, quick: bool, rows: IO[str], bar: Progress) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.worker", name, *(["--quick"] if quick else [])]
    environment = {**os.environ, **{key: value for key, value in SUITES[name].environment.items() if value}}
    task, failures = bar.add_task(name, total=None), []
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as worker,
    ):
        assert worker.stdout is not None
        try:
            for line in worker.stdout:
                message = json.loads(line)
                if "row" in message:
                    rows.write(json.dumps(message["row"]) + "\n")
                    rows.flush()
                elif "failed" in message:
                    failures.append(message["failed"])
                else:
                    bar.update(task, total=message.get("jobs"), advance=message.get("done", 0))
        except BaseException:
            worker.terminate()
            raise
        if code := worker.wait():
            errors.seek(0)
            failures.append(f"{name}: ended with code {code}: {' '.join(errors.read().splitlines()[-3:])}")
    return failures
