"""Writing files so that nobody ever meets half of one, and a full disk is one error that tells the sizes."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from batchnorm.errors import WriteError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    A reader sees the old file or the new one; if `write` raises, the old one stays and nothing
    else is left behind. The temporary name keeps the suffix, since savers look at it.

    Raises:
        WriteError: the system refused to write, as on a full disk. Other errors of `write` pass through.
    """
    with _moved_to(path) as temporary:
        write(temporary)


@contextmanager
def writing(path: Path) -> Iterator[Stream]:
    """A binary stream whose content gets the name `path` at the end: all of it, or nothing.

    Raises:
        WriteError: the system refused to write, as on a full disk.
    """
    with _moved_to(path) as temporary:
        stream = Stream(temporary)
        try:
            yield stream
        finally:
            stream.close()
        if stream.refusal is not None:
            raise refused(path, stream.refusal, stream.size) from stream.refusal


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes, all of them or nothing; raises WriteError."""
    with writing(path) as stream:
        stream.write(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, all of it or nothing; raises WriteError."""
    write_bytes(path, text.encode())


def refused(path: Path, error: OSError, size: int | None = None) -> WriteError:
    """The error of a file that the system would not write.

    Args:
        path: what was to be written.
        error: what the system said.
        size: bytes that were to be written, where this is known.
    """
    reason = error.strerror or str(error)
    needed = "" if size is None else f"; it needs {in_bytes(size)}"
    if error.errno == errno.EFBIG:
        reason, needed = "file size limit (ulimit -f)", needed.removeprefix(";")
    elif error.errno in _FULL:
        with suppress(OSError):
            needed += f"{',' if needed else ';'} {in_bytes(shutil.disk_usage(path.parent).free)} are free there"
    return WriteError(f"{path}: it cannot be written ({reason}{needed}). Nothing is left of it.")


def in_bytes(size: float) -> str:
    """A size in words, as in 3.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, {"bytes": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


class Stream(io.BufferedIOBase):
    """A file to write, which keeps the first refusal of the system instead of raising it, and counts on.

    Writers in C++ end the process when a stream raises in their destructor, so they are let finish.

    Args:
        path: the file, which is made anew.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115, closed by close()
        self.refusal: OSError | None = None
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        size = memoryview(content).nbytes
        self.size += size
        self._unless_refused(lambda: self._file.write(content))
        return size

    def seekable(self) -> bool:  # torch.export asks for it
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._unless_refused(lambda: self._file.seek(offset, whence))
        return self.tell()

    def tell(self) -> int:
        return self.size if self.refusal is not None or self._file.closed else self._file.tell()

    def flush(self) -> None:
        self._unless_refused(self._file.flush)

    def close(self) -> None:
        if not self.closed:
            self._unless_refused(self._file.close)
            with suppress(OSError):
                self._file.close()
            super().close()

    def _unless_refused(self, act: Callable[[], object]) -> None:
        if self.refusal is None and not self._file.closed:
            try:
                act()
            except OSError as error:
                self.refusal = error


@contextmanager
def _moved_to(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved there at the end; removed on any error."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except WriteError:
        raise
    except OSError as error:
        raise refused(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
