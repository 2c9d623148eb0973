"""The memory that this process may still take, and the error of one that gets no more."""

from __future__ import annotations

import re
from pathlib import Path

from batchnorm.errors import OutOfMemoryError
from batchnorm.writing import in_bytes

# What the allocators, threads and the loader say; only CUDA's allocator has an error of its own.
_EXHAUSTED = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|"
    r"std::bad_alloc|can't start new thread|failed to map segment",
    re.IGNORECASE,
)
_ASKED_FOR = re.compile(r"(?:tried to allocate|[Bb]uy new RAM.*?|allocate) (\d+) bytes")


def free_memory() -> int | None:
    """Bytes that this process may still take, by the system, its control group and its own limits; None if unknown."""
    found = [_of_system(), _of_control_group(), *_of_limits()]
    known = [value for value in found if value is not None]
    return max(0, min(known)) if known else None


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that the system gave no more memory."""
    return isinstance(error, MemoryError) or bool(_EXHAUSTED.search(str(error)))


def out_of_memory(error: BaseException) -> OutOfMemoryError:
    """The error of this package for one of Python's or torch's, with sizes."""
    asked = _ASKED_FOR.search(str(error))
    free = free_memory()
    sizes = [f"{in_bytes(int(asked[1]))} were asked for"] if asked else []
    sizes += [] if free is None else [f"{in_bytes(free)} are free"]
    told = f": {', and '.join(sizes)}" if sizes else ""
    return OutOfMemoryError(f"the memory is exhausted{told}. A smaller batch takes less.")


def _of_system() -> int | None:
    return _figure(Path("/proc/meminfo"), "MemAvailable:")


def _of_control_group() -> int | None:
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        return int(limit) - int(used) if limit.strip() != "max" else None
    except (OSError, ValueError):
        return None


def _of_limits() -> list[int]:
    """What ulimit -v (all that is mapped) and ulimit -d (all that is written) leave."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    found = []
    for kind, line in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            found.append(limit - (_figure(Path("/proc/self/status"), line) or 0))
    return found


def _figure(path: Path, name: str) -> int | None:
    """The bytes that a line of the kernel's names in kB."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)
    except (OSError, ValueError, IndexError):
        return None
