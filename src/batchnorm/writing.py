"""Writing files so that nobody ever meets half of one, and a full disk is one error that tells the sizes."""

from __future__ import annotations

import errno
import functools
import io
import os
import platform
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from batchnorm.errors import InputError, WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".batchnorm-lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MARK = ".batchnorm-tmp"  # in every temporary name, before the suffix
_DAY = 86_400.0  # seconds after which nobody still writes a file
_unfinished: set[Path] = set()


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


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what processes have there while they write."""
    return all(path.name.startswith(".") and (path.name == LOCK or _MARK in path.name) for path in folder.iterdir())


def obstacle(folder: Path) -> str | None:
    """What keeps files from being written into a folder, which there need not be yet; None if nothing does."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))
    if not nearest.is_dir():
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK) else f"{nearest} cannot be written"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into a folder, which is there.

    The system frees the lock of a process that ends, however it ends; so a file that is left locks nothing. Where the
    system has no locks, nothing is kept out.

    Raises:
        InputError: another process writes into it; nothing was touched.
    """
    held = _locked(folder / LOCK)
    try:
        yield
    finally:
        if held is not None:
            with suppress(OSError):
                (folder / LOCK).unlink()  # before it is freed: it is still this process's own
            os.close(held)
            if fcntl is None:
                with suppress(OSError):  # Windows removes what nobody has open, and nothing else
                    (folder / LOCK).unlink()


def check_alone(folder: Path) -> None:
    """Refuse a folder that another process writes into; nothing is written.

    Raises:
        InputError: see `alone_in`.
    """
    if (folder / LOCK).exists():
        with alone_in(folder):
            pass


def _locked(path: Path) -> int | None:
    """An open and locked file; None where the system has no locks."""
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | careful, 0o644)
        except OSError as error:
            raise refused(path, error) from error
        try:
            _lock(file)
            if _is_named(path, file):
                with suppress(OSError):  # a full disk: the name of the process is told to others alone
                    os.ftruncate(file, 0)
                    os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
                return file
        except BlockingIOError:
            os.lseek(file, 0, os.SEEK_SET)
            holder = os.read(file, 200).decode(errors="replace")
            os.close(file)
            raise InputError(
                f"folder {path.parent}: {holder if holder.isprintable() and holder else 'another process'} writes into "
                "it, and nothing of it was touched. Wait until it has ended, or take another folder."
            ) from None
        except OSError:  # a file system without locks
            os.close(file)
            return None
        os.close(file)  # its holder has removed it meanwhile: a new one is to be locked


def _lock(file: int) -> None:
    """Lock an open file for this process.

    Raises:
        BlockingIOError: another process holds it. Other errors: its file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt  # Windows, where what is locked cannot be read: a byte behind all that is written

    windows: Any = msvcrt
    os.lseek(file, 1 << 20, os.SEEK_SET)
    try:
        windows.locking(file, windows.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(*error.args) from error
    os.lseek(file, 0, os.SEEK_SET)


def _is_named(path: Path, file: int) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


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
        self.refusal: OSError | None = None
        self.size = 0
        self._file = open(path, "wb")  # noqa: SIM115, closed by close()

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
        if "_file" in self.__dict__ and not self.closed:  # the finalizer closes what could not be opened, too
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
    try:
        with temporary_for(path) as temporary:
            yield temporary
            os.replace(temporary, path)
    except WriteError:
        raise
    except OSError as error:
        raise refused(path, error) from error


@contextmanager
def temporary_for(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file or folder that is not finished; it keeps the suffix, and is removed at the end.

    A process that is killed cannot remove it. So the name tells machine and process, and the next process that writes
    into this folder removes what the dead have left there.
    """
    _remove_leftovers(path.parent)
    temporary = path.with_name(f".{path.stem[:40]}.{_machine()}-{os.getpid()}{_MARK}{path.suffix}")
    _unfinished.add(temporary)
    try:
        yield temporary
    finally:
        _remove(temporary)
        _unfinished.discard(temporary)


@contextmanager
def folders_for(path: Path) -> Iterator[None]:
    """Make the folders that a file is to be in; on any error those that were made are removed, if they are empty."""
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def remove_unfinished() -> None:
    """Remove every temporary file of this process, which is about to end at once."""
    for temporary in list(_unfinished):
        _remove(temporary)


def _remove(temporary: Path) -> None:
    with suppress(OSError):
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@functools.cache
def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"


@functools.lru_cache(maxsize=256)
def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes that are dead, once a folder; they belong to this user."""
    with suppress(OSError), os.scandir(folder) as entries:
        found = [entry for entry in entries if entry.name.startswith(".") and _MARK in entry.name]
        for entry in found:
            status = entry.stat(follow_symlinks=False)
            own = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
            machine, _, process = entry.name.partition(_MARK)[0].rpartition(".")[2].partition("-")
            old = time.time() - status.st_mtime > _DAY
            if own and process.isdecimal() and (old or (machine == _machine() and not _is_alive(int(process)))):
                _remove(Path(entry.path))


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user
        return True
    return True
