"""The memory of this process: how much it may still take, the error if it gets no more, and what it gives back."""

from __future__ import annotations

import ctypes
import re
import sys
import warnings
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

# Of malloc.h: what mallopt sets, and to what.
_SETTINGS = {
    "M_MMAP_MAX": (-4, 0),  # no mapping of its own for any block
    "M_TRIM_THRESHOLD": (-1, -1),  # nothing at the end of the heap is given back
    "M_TOP_PAD": (-2, 64 << 20),  # the heap grows by so many bytes at a time
}


def reuse_memory() -> bool:
    """Let this process use the memory that a training step frees for the next step, and not give it back to the system.

    glibc gives freed memory at the end of its heap back to the system, and maps large blocks one by one. Each step then
    gets fresh pages, whose first touch takes the processor's time, whichever layers the network has (docs,
    *Performance*). This call sets glibc's ``mallopt`` so that the heap grows by 64 MiB at a time and never shrinks. It
    is meant for a process that trains on the CPU: call it once, before the first step. It can't be undone, and the
    process keeps as much memory as it has needed at most. ``batchnorm train`` does so by itself.

    Returns:
        Whether the settings hold from now on.

    Warns:
        UserWarning: nothing was set, as the process uses another allocator than glibc's; with its name.

    Raises:
        Nothing: a process whose settings stay as they are is warned.

    Source: this package; glibc's manual, *Malloc Tunable Parameters*.

    Examples:
        >>> reuse_memory()
        True
    """
    obstacle = keep_freed()
    if obstacle is not None:
        warnings.warn(f"reuse_memory changed nothing: {obstacle}", stacklevel=2)
    return obstacle is None


def keep_freed() -> str | None:
    """`reuse_memory`, without a warning: why nothing was set, or None."""
    owner = _owner_of_malloc()
    if owner is None:
        return f"there is no glibc on {sys.platform}, or no malloc to be found"
    if not re.match(r"libc(-[\d.]+)?\.so", owner):
        return f"{owner} allocates in this process, which has rules of its own"
    taken = all(ctypes.CDLL(None).mallopt(*setting) for setting in _SETTINGS.values())
    return None if taken else f"mallopt of {owner} refused"


class _Symbol(ctypes.Structure):
    """What dladdr tells of an address."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _owner_of_malloc() -> str | None:
    """The file name of the library that allocates in this process; None where there is no mallopt."""
    owners = [_owner_of(name) for name in ("malloc", "posix_memalign", "malloc_usable_size")]
    # A program that is linked to fixed addresses (Debian's Python is) has an entry of its own for `malloc`, whoever
    # serves it. An allocator that replaces glibc's replaces the other two as well.
    return owners[1] if owners[1] == owners[2] else owners[0]


def _owner_of(name: str) -> str | None:
    try:
        library = ctypes.CDLL(None)
        found = _Symbol()
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p)
        known = library.mallopt and library.dladdr(address, ctypes.byref(found))
    except (OSError, AttributeError, TypeError):
        return None
    return Path(found.file.decode()).name if known and found.file else None


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
