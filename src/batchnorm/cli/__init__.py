"""The command line: a module a command, and in each one function call and one report."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from batchnorm.errors import BatchNormError, InstallationError, message_and_place, message_of
from batchnorm.memory import is_exhausted, keep_freed, out_of_memory

__all__ = ["INTERRUPTED", "main"]

INTERRUPTED = 130  # the shell's code for a command that Ctrl-C ended


class Stopped(KeyboardInterrupt):
    """Another signal that asks a command to end; all that cleans up after Ctrl-C cleans up after it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done. 1: done, but the network diverged or a file failed its check. 2: wrong usage or input,
    one message on stderr. 130: interrupted by Ctrl-C, SIGTERM or SIGHUP, one line on stderr; nothing
    half-written is left, and of a training the checkpoint stays.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # for package.module:name beside the user
    if arguments is None and sys.argv[1:2] == ["train"]:  # this process is the command's own, and trains
        keep_freed()
    try:
        with _stoppable(), _damage_named():
            code = _run(arguments)
        sys.stdout.flush()
    except BatchNormError as error:
        interrupted = type(error).__name__ == "Interrupted"
        sys.stderr.write(f"batchnorm: {'' if interrupted else 'error: '}{message_of(error)}\n")
        return INTERRUPTED if interrupted else 2
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"batchnorm: interrupted by {stop if isinstance(stop, Stopped) else 'Ctrl-C'}.\n")
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return 1
    except Exception as error:
        if is_exhausted(error):
            told = str(out_of_memory(error))
        elif _is_of_a_network(error):
            told = f"the network raised {message_and_place(error)}. Mend it there."
        elif isinstance(error, OSError):  # standard output that goes to a full disk, above all
            told = message_of(error)
        else:
            raise
        sys.stderr.write(f"batchnorm: error: {told}\n")
        if isinstance(error, OSError):
            _drop_output()
        return 2
    return code


def _is_of_a_network(error: BaseException) -> bool:
    """Whether a module of torch was being called, and the fault is in no line of this package."""
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = Path(__file__).parents[1]
    return any(code.co_name == "_call_impl" for code in frames) and own not in Path(frames[-1].co_filename).parents


def _run(arguments: Sequence[str] | None) -> int:
    app = _application()
    try:
        app(args=None if arguments is None else list(arguments), prog_name="batchnorm")
    except SystemExit as end:
        cause: BaseException | None = end
        while cause is not None:  # typer makes an exit of it, without a word
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Stopped, unless somebody answers to them already; a second one is passed over."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in answered:
            signal.signal(each, signal.SIG_IGN)  # while things are put in order
        raise Stopped(signal.Signals(number).name)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    own = threading.current_thread() is threading.main_thread()
    answered = [number for number in numbers if own and signal.getsignal(number) == signal.SIG_DFL]
    for number in answered:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in answered:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _damage_named() -> Iterator[None]:
    """A part of the package that is missing or damaged, and that a command meets while it runs, is one error."""
    try:
        yield
    except (ImportError, SyntaxError) as failure:
        from batchnorm.installation import explained

        error = explained(failure)
        if error is failure:
            raise
        raise error from None


def _application() -> Any:
    """The application with its commands; else an error that tells which part of the installation is missing."""
    from batchnorm.installation import FOLDER, MEND, described, explained, mended

    if not (FOLDER / "__init__.py").exists():
        raise InstallationError(f"__init__.py is missing from {FOLDER}: this installation is damaged; {MEND}")
    try:
        from batchnorm.cli.commands import app
    except (ImportError, SyntaxError) as failure:
        sys.stderr.write(f"batchnorm {described()}, Python {sys.version.split()[0]} in {sys.executable}\n")
        error = explained(failure)
        if isinstance(error, BatchNormError) or isinstance(failure, SyntaxError):
            raise error from None
        raise InstallationError(f"{failure}: {mended(failure.name)}") from failure
    return app


def _drop_output() -> None:
    """Let the interpreter's last flush of standard output go nowhere."""
    with suppress(OSError, ValueError):  # a stream without a file, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
