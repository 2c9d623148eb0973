"""What a figure is true for: processor, caches, versions, revision."""

from __future__ import annotations

import datetime
import importlib.metadata
import mmap
import platform
import subprocess
import time
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


def touch_memory(most: int | None = None, seconds: float = 120.0) -> int:
    """Writes to free memory once and gives it back. For a process of its own, before the first figure.

    A virtual machine's memory is often backed by its host on the first touch of a page, which takes over ten times as
    long as a page that was used before, and falls on whichever contestant is handed fresh ones.

    Args:
        most: bytes; by default four fifths of what is available.
        seconds: after which it stops.

    Returns:
        The bytes touched; 0 where the system does not tell how much is free.
    """
    block, page, end = 1 << 28, mmap.PAGESIZE, time.perf_counter() + seconds
    held: list[mmap.mmap] = []
    limit = available_memory() * 4 // 5 if most is None else most
    while len(held) * block + block <= limit and time.perf_counter() < end:
        held.append(mmap.mmap(-1, block, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        held[-1].madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, block, page):
            held[-1][at] = 1
    return len(held) * block


def available_memory() -> int:
    """Bytes that a process may take without swapping; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        return free if limit == "max" else min(free, int(limit) - int((group / "memory.current").read_text()))
    except OSError:
        return free


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
