"""The files of a run folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from batchnorm.errors import InputError, OutOfMemoryError, WriteError
from batchnorm.memory import is_exhausted, out_of_memory
from batchnorm.writing import alone_in, check_alone, is_empty, obstacle, temporary_for, write_text

CHECKPOINT, CONFIG, METRICS, CERTIFICATE = ("checkpoint.pt", "config.json", "metrics.json", "certificate.json")
REPORT = "report.html"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as strict JSON: non-finite numbers become the strings that name them."""
    write_text(path, json.dumps(_jsonable(value), indent=2, allow_nan=False) + "\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def next_run_folder(parent: Path, stem: str) -> Path:
    """Make the first of `parent/stem-1`, `parent/stem-2`, ... that does not exist; no two processes get the same.

    Raises:
        InputError: it cannot be made.
    """
    with _unwritable(parent):
        parent.mkdir(parents=True, exist_ok=True)
        numbers = itertools.count(1)
        while True:
            folder = parent / f"{stem}-{next(numbers)}"
            with suppress(FileExistsError):
                folder.mkdir()
                return folder


def check_run_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that cannot be a run's, before work is done for it. Nothing is written.

    Raises:
        InputError: the folder holds files, and either `overwrite` is false or they are no run's; another process writes
            into it; it is a file; or it cannot be written.
    """
    with _unwritable(folder):
        if folder.is_dir():
            check_alone(folder)
        _check_content(folder, overwrite=overwrite)
        if (reason := obstacle(folder)) is not None:
            raise InputError(f"output folder {folder}: it cannot be written ({reason}). Give another --out.")


@contextmanager
def run_folder(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """Create `folder`, or take one that `check_run_folder` lets pass, and keep other processes out of it.

    Raises:
        InputError: see `check_run_folder`.
    """
    check_run_folder(folder, overwrite=overwrite)
    with _unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_for(folder / "probe") as probe:
            probe.touch()
    with alone_in(folder):
        _check_content(folder, overwrite=overwrite)  # another process may have been there since
        yield


def _check_content(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"output folder {folder}: it is a file. Give another --out.")
    if is_empty(folder):
        return
    if not _is_run(folder):
        raise InputError(
            f"output folder {folder}: it holds files and no run (no {CONFIG} of one), and nothing of it was touched. "
            "Give another --out."
        )
    if not overwrite:
        raise InputError(
            f"output folder {folder}: it is not empty, and nothing of it was touched. "
            "Give another --out, go on from it with --resume, or replace it with --overwrite."
        )


def _is_run(folder: Path) -> bool:
    """Whether a folder has the settings of a run; those of another version, too."""
    try:
        held = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return isinstance(held["config"], dict) and isinstance(held["data"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@contextmanager
def _unwritable(folder: Path) -> Iterator[None]:
    try:
        yield
    except WriteError as error:
        raise InputError(f"output folder {folder}: it cannot be written ({error}) Give another --out.") from error
    except OSError as error:
        raise InputError(
            f"output folder {folder}: it cannot be written ({error.strerror or error}). Give another --out."
        ) from error


@contextmanager
def going_on_from(folder: Path, checkpoint: Path) -> Iterator[None]:
    """Say, of a full disk and of exhausted memory, what is kept of the run, and how to go on with it."""
    try:
        yield
    except WriteError as error:
        raise WriteError(f"{error} {_kept(checkpoint)}. Make room, then go on with: {_command(folder)}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemoryError) or not is_exhausted(error):
            raise
        raise OutOfMemoryError(
            f"{out_of_memory(error)} {_kept(checkpoint)}. If more memory is free, go on with: {_command(folder)}"
        ) from error


def _kept(checkpoint: Path) -> str:
    return f"{checkpoint} is kept" if checkpoint.exists() else "No step of the training is kept"


def _command(folder: Path) -> str:
    return f"batchnorm train --resume {folder}"
