"""What must hold before a version is given away: `make release-check`. It changes nothing but dist/ and build/."""

from __future__ import annotations

import datetime
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FRESH = datetime.timedelta(days=14)  # of the matrix
FASTER = 1.3  # times torch.nn's BN + ReLU at (64, 32), forward and backward
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"


def version() -> str:
    """The version, from the one place that says it."""
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "src/batchnorm/__init__.py").read_text())
    assert found is not None
    return found[1]


def run(*command: str | Path, **environment: str) -> str | None:
    """None where a command succeeds, else its last lines."""
    done = subprocess.run(
        [str(each) for each in command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    )  # fmt: skip
    return None if done.returncode == 0 else "\n    ".join(done.stdout.strip().splitlines()[-8:])


def clean_tree() -> str | None:
    changes = subprocess.check_output(["git", "status", "--porcelain"], cwd=ROOT, text=True)
    return f"not committed: {changes.strip()}" if changes.strip() else None


def changelog_is_cut() -> str | None:
    heading = re.compile(rf"^## \[{re.escape(version())}\] - \d{{4}}-\d\d-\d\d$", re.MULTILINE)
    return None if heading.search((ROOT / "CHANGELOG.md").read_text()) else f"no dated section for {version()}"


def matrix_is_fresh() -> str | None:
    """Whether each torch and each Python has a whole row, and all of these are new, passed and fast; else why not."""
    path = ROOT / "docs" / "installation-matrix.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    return "; ".join(lacks(rows, runpy.run_path(str(ROOT / "scripts" / "matrix")), datetime.date.today())) or None


def lacks(rows: dict[str, Any], matrix: dict[str, Any], today: datetime.date) -> list[str]:
    """What the rows of the matrix lack on a day. One of a part of the suite is for readers, and counts for nothing."""
    whole = {name: row for name, row in rows.items() if matrix["is_whole"](row)}
    torches, pythons = ({name.split()[place] for name in whole} for place in (0, 1))
    found = [f"no whole row for torch {torch}" for torch in matrix["TORCHES"] if torch not in torches]
    found += [f"no whole row for Python {one}" for one in matrix["PYTHONS"] if one not in pythons]
    for name, row in whole.items():
        if not matrix["passed"](row):
            found.append(f"{name}: {row['outcome']}")
        elif today - datetime.date.fromisoformat(row["date"]) > FRESH:
            found.append(f"{name}: of {row['date']}")
        elif float(row["speedup"]) < FASTER:
            found.append(f"{name}: {row['speedup']} times torch.nn, less than {FASTER}")
    return found


def wheels_hold() -> str | None:
    return run(sys.executable, "scripts/wheels.py", "--twice")


def installed_wheel_runs() -> str | None:
    wheel = next((ROOT / "dist").glob(f"batchnorm-{version()}-*{os.uname().machine}.whl"), None)
    if wheel is None:
        return "no wheel of this version in dist/"
    return run(sys.executable, "-m", "pytest", "tests/packaging", BATCHNORM_WHEEL=str(wheel))


def typed_program_passes() -> str | None:
    """Whether mypy takes a user's program that names the whole public face, with the types that the wheel brings."""
    wheel = next((ROOT / "dist").glob(f"batchnorm-{version()}-*{os.uname().machine}.whl"), None)
    if wheel is None:
        return "no wheel of this version in dist/"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder) / "env")
        python = Path(folder) / "env" / "bin" / "python"
        site = Path(subprocess.check_output([python, "-c", SITE], text=True).strip())
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        (site / "others.pth").write_text(subprocess.check_output([sys.executable, "-c", SITE], text=True))
        program = shutil.copy(ROOT / "tests" / "packaging" / "user_code.py", folder)
        options = ("--strict", "--allow-untyped-calls", "--config-file=", "--python-executable", python)
        return run(sys.executable, "-m", "mypy", *options, program, MYPYPATH="")


def archive_builds_the_same() -> str | None:
    """Whether the source archive alone gives the wheel that the clone gives."""
    epoch = subprocess.check_output(["git", "log", "-1", "--format=%ct"], cwd=ROOT, text=True).strip()
    failed = run(
        sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", "dist", SOURCE_DATE_EPOCH=epoch
    )
    if failed:
        return failed
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(ROOT / "dist" / f"batchnorm-{version()}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        unpacked = Path(folder) / f"batchnorm-{version()}"
        (unpacked / "build").mkdir()
        (unpacked / "build" / "headers").symlink_to(ROOT / "build" / "headers")
        machine = os.uname().machine
        failed = run(sys.executable, unpacked / "scripts" / "wheels.py", machine, SOURCE_DATE_EPOCH=epoch)
        if failed:
            return failed
        (theirs,), (ours,) = ([*place.glob(f"dist/*{machine}.whl")] for place in (unpacked, ROOT))
        return None if theirs.read_bytes() == ours.read_bytes() else f"{theirs.name} has other bytes"


CHECKS = {
    "the tree is clean": clean_tree,
    "the changelog is cut": changelog_is_cut,
    "the matrix is fresh, whole and passed": matrix_is_fresh,
    "lint": lambda: run("make", "lint"),
    "the documentation builds, and its links lead somewhere": lambda: run("make", "docs"),
    "both wheels hold what they promise": wheels_hold,
    "the source archive gives the same wheel": archive_builds_the_same,
    "the installed wheel runs": installed_wheel_runs,
    "a user's typed program passes with the installed wheel": typed_program_passes,
}


def main() -> int:
    failures = 0
    for name, check in CHECKS.items():
        reason = check()
        failures += reason is not None
        print(f"{'ok    ' if reason is None else 'FAILED'} {name}{'' if reason is None else ': ' + reason}", flush=True)
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
