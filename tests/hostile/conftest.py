"""A folder of a user's, and a small disk."""

from __future__ import annotations

import subprocess
import sys

import pytest
from machines import MODULE


@pytest.fixture
def users(tmp_path, monkeypatch):
    """The current folder, with a module of networks in it."""
    (tmp_path / "nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("nets", None)
    yield tmp_path
    sys.modules.pop("nets", None)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 64 kB; skips where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
