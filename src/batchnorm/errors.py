"""One base error. A message tells what was called, what was given, what was expected, and how to mend it."""

import traceback
from collections.abc import Mapping


def message_of(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or "no message"


def message_and_place(error: BaseException) -> str:
    """Type, message and place of an exception out of the user's code, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f", at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {message_of(error)}{place}"


def by_reason(reasons: Mapping[str, str], most: int = 4) -> str:
    """Names and what is true of each, in one line: names with the same reason stand behind the first, if few."""
    named: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        named.setdefault(reason, []).append(f"'{name}'")
    told = []
    for reason, (first, *others) in named.items():
        if len(others) > most:
            others[most - 1 :] = [f"{len(others) - most + 1} more"]
        listed = " and ".join([", ".join(others[:-1]), others[-1]][len(others) < 2 :]) if others else ""
        told.append(f"{first} (like {listed}) {reason}" if listed else f"{first} {reason}")
    return "; ".join(told)


class BatchNormError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(BatchNormError, ValueError):
    """A value or shape that the called function cannot take."""


class DtypeError(BatchNormError, NotImplementedError):  # which is a RuntimeError
    """A dtype, device or layout that the called function cannot take."""


class StateError(BatchNormError, RuntimeError):
    """Something that has been changed since, and is needed as it was."""


class SurgeryError(BatchNormError, RuntimeError):
    """An edit of a network that cannot be done exactly; the network is left as it was."""


class DataError(BatchNormError, ValueError):
    """A file or data set that cannot be used."""


class WriteError(InputError, OSError):
    """A file that the system would not write, as on a full disk; the file of before stays, and no half of a new one."""


class OutOfMemoryError(BatchNormError, MemoryError):
    """The system gave no more memory."""


class MissingDependencyError(BatchNormError, ImportError):
    """An optional package that the called function needs is not installed."""


class SynchronizationError(BatchNormError, RuntimeError):
    """Ranks that did not exchange what they must."""


class InstallationError(BatchNormError, ImportError):
    """torch is missing or too old, or a part of this installation is missing."""
