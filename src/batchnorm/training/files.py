"""Writing files so that nobody ever meets half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchnorm.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    A reader sees the old file or the new one; if `write` raises, the old one stays and nothing
    else is left behind. The temporary name keeps the suffix, since savers look at it.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with `write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


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
    """The first of `parent/stem-1`, `parent/stem-2`, ... that does not exist."""
    number = 1
    while (parent / f"{stem}-{number}").exists():
        number += 1
    return parent / f"{stem}-{number}"


def make_run_folder(folder: Path, *, overwrite: bool) -> None:
    """Create `folder`, or take an empty one; a folder with files in it needs `overwrite`.

    Raises:
        InputError: the folder holds files, is a file, or cannot be written.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"output folder {folder}: it is a file. Give another --out.")
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise InputError(
                f"output folder {folder}: it is not empty, and nothing of it was touched. "
                "Give another --out, go on from it with --resume, or replace it with --overwrite."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "probe", lambda temporary: temporary.touch())
        (folder / "probe").unlink()
    except OSError as error:
        raise InputError(
            f"output folder {folder}: it cannot be written ({error.strerror or error}). Give another --out."
        ) from error
