"""The build backend: scikit-build-core's, which builds for the torch that is installed where the package will be.

A build needs torch's headers. An isolated build would take the newest torch that there is, gigabytes of it, and build
the short call for that one, although another may be installed. pip runs a backend by the Python that it installs into,
so this one looks there first. It asks for a torch of its own only where there is none, and for nothing where
there is no compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from scikit_build_core import build as _scikit
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

OLDEST = (2, 10)
_TORCH = "cmake.define.BATCHNORM_TORCH"


def installed_torch() -> Path | None:
    """The folder of a torch that is new enough, in the environment of this Python."""
    for kind in ("platlib", "purelib"):
        folder = Path(sysconfig.get_path(kind)) / "torch"
        try:
            found = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
        except OSError:
            continue
        if found and (int(found[1]), int(found[2])) >= OLDEST and (folder / "include").is_dir():
            return folder
    return None


def has_compiler() -> bool:
    """Whether CMake will find a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++").split()[0], "c++", "g++", "clang++"))


def requirements(settings: dict[str, Any] | None, scikits: list[str]) -> list[str]:
    """What a build needs beside scikit-build-core."""
    if installed_torch() or _TORCH in (settings or {}) or not has_compiler():
        return scikits
    return [*scikits, "torch>=2.10"]


def with_torch(settings: dict[str, Any] | None) -> dict[str, Any]:
    """The settings of a build, with the folder of the installed torch where none was given."""
    torch = installed_torch()
    if torch is None or _TORCH in (settings or {}):
        return dict(settings or {})
    return {**(settings or {}), _TORCH: torch.as_posix()}


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return requirements(config_settings, _scikit.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return requirements(config_settings, _scikit.get_requires_for_build_editable(config_settings))


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    return _scikit.build_wheel(wheel_directory, with_torch(config_settings), metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    return _scikit.build_editable(wheel_directory, with_torch(config_settings), metadata_directory)
