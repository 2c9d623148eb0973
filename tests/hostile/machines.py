"""Hostile machines: limits on files and memory; and the state of a folder, to compare."""

from __future__ import annotations

import resource
import sys
from contextlib import contextmanager
from pathlib import Path

MODULE = """
import os, signal
from torch import nn
def net(num_features=64, num_classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(num_features, 8), nn.BatchNorm1d(8), nn.ReLU(),
                         nn.Linear(8, num_classes))
def terminated(num_features=64, num_classes=10):
    os.kill(os.getpid(), signal.SIGTERM)
    return net(num_features, num_classes)
def plain(num_features, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(num_features, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""


@contextmanager
def file_size_limit(size):
    """No file may grow beyond `size` bytes (ulimit -f).

    What is imported meanwhile is not cached: Python keeps the part of a module's bytecode that fits, and no later
    process could read it.
    """
    before, caches = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = caches


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, but for Python's caches."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
