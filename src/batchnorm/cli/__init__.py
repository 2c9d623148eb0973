"""The command line: a module a command, and in each one function call and one report."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from batchnorm.errors import BatchNormError, InstallationError
from batchnorm.memory import is_exhausted, out_of_memory

__all__ = ["INTERRUPTED", "main"]

INTERRUPTED = 130  # the shell's code for a command that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: done. 1: done, but the network diverged or a file failed its check. 2: wrong usage or input,
    one message on stderr. 130: interrupted, with a checkpoint to resume from.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # for package.module:name beside the user
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BatchNormError as error:
        interrupted = type(error).__name__ == "Interrupted"
        sys.stderr.write(f"batchnorm: {'' if interrupted else 'error: '}{error}\n")
        return INTERRUPTED if interrupted else 2
    except KeyboardInterrupt:
        sys.stderr.write("batchnorm: interrupted.\n")
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return 1
    except (MemoryError, RuntimeError, ImportError) as error:
        if not is_exhausted(error):
            raise
        sys.stderr.write(f"batchnorm: error: {out_of_memory(error)}\n")
        return 2
    except OSError as error:  # standard output that goes to a full disk, above all
        sys.stderr.write(f"batchnorm: error: {error}\n")
        _drop_output()
        return 2
    return code


def _run(arguments: Sequence[str] | None) -> int:
    app = _application()
    try:
        app(args=None if arguments is None else list(arguments), prog_name="batchnorm")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _application() -> Any:
    """The application with its commands; else an error that tells which part of the installation is missing."""
    try:
        from batchnorm.cli.commands import app
    except ImportError as failure:
        from batchnorm.installation import described, explained

        sys.stderr.write(f"batchnorm {described()}, Python {sys.version.split()[0]} in {sys.executable}\n")
        error = explained(failure)
        if isinstance(error, BatchNormError):
            raise error from None
        raise InstallationError(f"{failure}: pip install --force-reinstall batchnorm") from failure
    return app


def _drop_output() -> None:
    """Let the interpreter's last flush of standard output go nowhere."""
    with suppress(OSError, ValueError):  # a stream without a file, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
