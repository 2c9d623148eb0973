"""What a figure is true for: processor, caches, versions, revision."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import batchnorm.ops  # noqa: F401  (loads the native library)
from batchnorm.kernels import cpu

ROOT = Path(__file__).parent.parent


def cache_bytes() -> int:
    """Of the last-level cache; 32 MB where it is not known."""
    return cpu.cache_sizes().get("L3") or 32 << 20


def processor() -> str:
    """Its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def revision() -> str:
    """The git revision, with a plus where the tree differs from it."""
    try:
        run = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "src", "csrc", "benchmarks"], **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + "+" * bool(changed)


def environment() -> dict[str, Any]:
    """The columns that every row has."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": revision(),
        "processor": processor(),
        "instructions": cpu.instruction_set() or "none",
        "torch_instructions": torch.backends.cpu.get_cpu_capability(),
        "caches": cpu.cache_sizes(),
        "threads": torch.get_num_threads(),
        "machine_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "batchnorm": importlib.metadata.version("batchnorm"),
        "huge_pages": _huge_pages(),
    }


def _huge_pages() -> str:
    """The kernel's setting: always, madvise or never."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0]
