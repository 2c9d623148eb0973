"""What of this package is on the path, whether it is whole, and in one line how to mend it. It runs without torch."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import re
import struct
import sys
from pathlib import Path

from batchnorm.errors import InstallationError

NAME = "batchnorm"
FOLDER = Path(__file__).parent
MEND = "pip install --force-reinstall --no-deps batchnorm"
_SHOWN = 3  # names in one line


def version() -> str:
    """The version of these files."""
    return _version_in(FOLDER) or "of an unknown version"


def described() -> str:
    """Version and folder; and the other versions on the path, whose files may lie among these."""
    found = {f"{each.version} in {each.locate_file('')}" for each in importlib.metadata.distributions(name=NAME)}
    for place in sys.path:
        folder = Path(place or ".").resolve() / NAME
        other = _version_in(folder)
        if other and folder != FOLDER.resolve():
            found.add(f"{other} in {folder.parent}")
    others = sorted(each for each in found if each not in _same(version(), FOLDER.parent))
    note = f"; on the path, too: {', '.join(others)}: pip uninstall the one not meant" if others else ""
    return f"{version()} in {FOLDER}{note}"


def _same(own: str, folder: Path) -> set[str]:
    """What names these very files: the folder as it is written on the path, and as it is."""
    names = {f"{own} in {folder}", f"{own} in {folder.resolve()}"}
    for each in importlib.metadata.distributions(name=NAME):  # an editable installation lies elsewhere than its files
        if each.version == own and not any(str(file) == f"{NAME}/__init__.py" for file in each.files or ()):
            names.add(f"{own} in {each.locate_file('')}")
    return names


def _version_in(folder: Path) -> str | None:
    try:
        found = re.search(r'^__version__ = "([^"]+)"', (folder / "__init__.py").read_text("utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return found[1] if found else None


def condition() -> str:
    """Whether all files are there as they were installed; else which are not, and the command that mends it."""
    listed, missing, changed = 0, [], []
    for each in importlib.metadata.distributions(name=NAME):
        if Path(str(each.locate_file(NAME))).resolve() != FOLDER.resolve():
            continue
        # `each.files` leaves out what is missing, from Python 3.12 on.
        for name, signed, *_ in csv.reader((each.read_text("RECORD") or "").splitlines()):
            algorithm, _, expected = signed.partition("=")
            if not name.startswith(f"{NAME}/") or not expected:
                continue
            listed += 1
            try:
                contents = Path(str(each.locate_file(name))).read_bytes()
            except OSError:
                missing.append(name)
                continue
            digest = base64.urlsafe_b64encode(hashlib.new(algorithm, contents).digest()).rstrip(b"=").decode()
            if digest != expected:
                changed.append(name)
    told = [f"{_some(files)} {verb}" for files, verb in ((missing, "missing"), (changed, "changed")) if files]
    if told:
        return f"{'; '.join(told)}: {MEND}"
    return "complete" if listed else "not on any list of pip's: a source tree or an editable installation"


def is_cut_short(library: Path) -> bool:
    """Whether the end of a shared library of Linux (ELF, 64 bits) is missing; to load it would end the process.

    The system's loader maps what the headers promise, and the first read behind the file's end is a bus error. Files of
    other kinds are left to their loaders.
    """
    size = library.stat().st_size
    with library.open("rb") as file:
        head = file.read(64)
        if head[:6] != b"\x7fELF\x02\x01":
            return False
        if len(head) < 64:
            return True
        segments, sections = struct.unpack_from("<QQ", head, 32)
        segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", head, 54)
        if max(segments + segment_size * segment_count, sections + section_size * section_count) > size:
            return True
        file.seek(segments)
        table = file.read(segment_size * segment_count)
    ends = (
        sum(struct.unpack_from("<Q16xQ", table, start + 8)[:2]) for start in range(0, len(table), segment_size or 56)
    )
    return any(end > size for end in ends)


def _some(files: list[str]) -> str:
    rest = len(files) - _SHOWN
    return ", ".join(sorted(files)[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def mended(module: str | None) -> str:
    """The command that mends a module of another package that does not import, and replaces nothing else."""
    top = (module or "").partition(".")[0]
    owners = importlib.metadata.packages_distributions().get(top) or _owners(top)
    return f"pip install --force-reinstall --no-deps {owners[0]}" if owners else f"pip install {NAME}"


def _owners(top: str) -> list[str]:
    """The distributions whose lists of files have a module; Python 3.10 looks at top_level.txt alone."""
    found = []
    for each in importlib.metadata.distributions():
        if any(file.parts[0] in (top, f"{top}.py") for file in each.files or ()):
            found.append(each.metadata["Name"])
    return found


def explained(failure: ImportError | SyntaxError) -> ImportError | SyntaxError:
    """The error to raise in place of one from an import: what is missing or damaged, and the command that mends it."""
    if isinstance(failure, SyntaxError):
        file = Path(failure.filename or "")
        if FOLDER not in file.parents:
            return failure
        return InstallationError(f"{file} is damaged (line {failure.lineno}: {failure.msg}); {MEND}")
    name = failure.name or ""
    found = getattr(sys.modules.get("torch"), "__version__", None)
    if name.partition(".")[0] == "torch" and found is not None:
        numbers = re.match(r"(\d+)\.(\d+)", found)
        if numbers is None or (int(numbers[1]), int(numbers[2])) >= (2, 10):
            return failure  # a newer one that has dropped the name: its own error says most
        return InstallationError(
            f"batchnorm needs torch 2.10 or later, this is torch {found}: pip install --upgrade 'torch>=2.10'"
        )
    if name == "torch":
        return InstallationError("batchnorm needs torch, and this Python has none: pip install 'torch>=2.10'")
    if name.partition(".")[0] != NAME or isinstance(failure, InstallationError):
        return failure
    part = re.match(r"cannot import name '(\w+)'", str(failure))
    return InstallationError(
        f"{name}{'.' + part[1] if part else ''} is missing from {FOLDER}: this installation is damaged; {MEND}"
    )
