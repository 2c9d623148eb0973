"""torch.export archives (.pt2) read member by member, before torch sees them.

``torch.export.load`` unpickles example inputs, constants and custom objects, and turns texts of the program into code.
So the file's bytes are read once, each member is compared with what ``torch.export.save`` writes for a plain network,
and torch gets an archive that is made anew of the checked parts.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.export import ExportedProgram

from batchnorm.errors import InputError
from batchnorm.population.formats.plain_pickles import NotPlainError, load_plain, plain_texts, zip_members
from batchnorm.surgery.program_check import LABEL, NotPlainProgramError, checked_payloads, checked_program

Checked = TypeVar("Checked")

_PROGRAM = "models/model.json"
_EXAMPLE = "data/sample_inputs/model.pt"
_TABLES = (
    ("data/weights/", "data/weights/model_weights_config.json", re.compile(r"weight_\d{1,9}", re.ASCII)),
    ("data/constants/", "data/constants/model_constants_config.json", re.compile(r"tensor_\d{1,9}", re.ASCII)),
)
_STRIDED = 7
_DTYPES = dict(enumerate((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), 1))
_DTYPES |= dict(enumerate((torch.float16, torch.float32, torch.float64), 6))
_DTYPES |= dict(enumerate((torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.bfloat16), 9))
_DTYPES |= {28: torch.uint16, 29: torch.float8_e4m3fn, 30: torch.float8_e5m2, 34: torch.uint32, 35: torch.uint64}
_DTYPES |= {31: torch.float8_e4m3fnuz, 32: torch.float8_e5m2fnuz, 33: torch.float8_e8m0fnu}
"""Dtypes by their numbers in torch's schema."""
_RECORDS = {
    "archive_format": re.compile(rb"pt2"),
    "archive_version": re.compile(rb"0"),
    "byteorder": re.compile(rb"little"),
    "version": re.compile(rb"\d{1,3}\n?"),
    ".data/version": re.compile(rb"\d{1,3}\n?"),
    ".data/serialization_id": re.compile(rb"\d{1,64}"),
}
_KINDS = {
    "data/aotinductor/": "compiled code",
    "data/executorch/": "a compiled program",
    "data/constants/custom_obj_": "a custom object",
    "data/constants/opaque_obj_": "a pickled object",
    "extra/": "a file beside the program",
    "models/": "a second program",
    "xl_model_weights/": "weights outside the program's table",
}
_HOW = "Save the network again with torch.export.save, of plain tensors and torch's own operators."


def load_archive(path: str | Path) -> ExportedProgram:
    """The program of a torch.export archive, of which nothing is executed, unpickled or compiled to be read.

    Raises:
        InputError: the file cannot be read, or a member is none that ``torch.export.save`` writes for a network of
            plain tensors and torch's own operators; the member is named.
    """
    try:
        data = Path(path).read_bytes()
        members = zip_members(data)
    except (OSError, NotPlainError) as error:
        raise InputError(f"{path}: it cannot be read as a torch.export archive ({error}). {_HOW}") from error
    made = _Check(str(path), members).archive()
    try:
        return torch.export.load(made)
    except Exception as error:  # json and schema errors
        raise InputError(f"{path}: it cannot be read as a torch.export archive ({error})") from error


class _Check:
    """The members of one archive, and what is made anew of them."""

    def __init__(self, path: str, members: dict[str, bytes]) -> None:
        self.path = path
        self.members = members

    def archive(self) -> io.BytesIO:
        made = self.records()
        made[_PROGRAM] = self.read(_PROGRAM, checked_program)
        for folder, table, pattern in _TABLES:
            payloads = self.read(table, checked_payloads)
            made[table] = json.dumps({"config": payloads}).encode()
            for name, payload in payloads.items():
                made[folder + payload["path_name"]] = self.payload(folder, table, pattern, name, payload)
        made[_EXAMPLE] = self.example()
        for name in self.members.keys() - made.keys():
            kind = next((kind for start, kind in _KINDS.items() if name.startswith(start)), None)
            raise self.refusal(name, f"it is {kind}" if kind else "no table of the archive has it")
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            for name, data in made.items():
                archive.writestr(f"archive/{name}", data)
        packed.seek(0)
        return packed

    def records(self) -> dict[str, bytes]:
        """The short records that say what the archive is."""
        for name in ("archive_format", "archive_version"):
            if name not in self.members:
                raise self.refusal(name, "it is missing")
        found = {name: self.members[name] for name in _RECORDS if name in self.members}
        for name, data in found.items():
            if not _RECORDS[name].fullmatch(data):
                raise self.refusal(name, f"it is {data[:40]!r}")
        return found

    def read(self, name: str, check: Callable[[bytes], Checked]) -> Checked:
        if name not in self.members:
            raise self.refusal(name, "it is missing")
        try:
            return check(self.members[name])
        except (NotPlainError, NotPlainProgramError) as error:
            raise self.refusal(name, str(error)) from error

    def payload(self, folder: str, table: str, pattern: re.Pattern[str], name: str, payload: dict[str, Any]) -> bytes:
        """The bytes of a tensor, which the sizes, strides and dtype of its row in the table must fit."""
        member, meta = folder + payload["path_name"], payload["tensor_meta"]
        if payload["use_pickle"] or meta is None or not pattern.fullmatch(payload["path_name"]):
            what = next((kind for start, kind in _KINDS.items() if member.startswith(start)), "a pickled object")
            raise self.refusal(member, f"{table} gives {what} for {name}")
        if member not in self.members:
            raise self.refusal(member, f"it is missing, and {table} has it for {name}")
        data = self.members[member]
        numbers = [*meta["sizes"], *meta["strides"], meta["storage_offset"]]
        dtype = _DTYPES.get(meta["dtype"])
        if not all(n.get("as_int", -1) >= 0 for n in numbers) or len(meta["sizes"]) != len(meta["strides"]):
            raise self.refusal(table, f"the sizes and strides of {name} are no numbers")
        if dtype is None or meta["layout"] != _STRIDED:
            raise self.refusal(table, f"{name} is no dense tensor of a known dtype")
        sizes, strides = ([n["as_int"] for n in meta[key]] for key in ("sizes", "strides"))
        last = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + meta["storage_offset"]["as_int"]
        needed = 0 if 0 in sizes else (last + 1) * dtype.itemsize
        if len(data) < needed or len(data) % dtype.itemsize:
            state = "it is empty" if not data else f"it has {len(data)} bytes"
            raise self.refusal(member, f"{state}, and {name} needs {needed}; the values of the weights are lost")
        if dtype is torch.bool and data.strip(b"\0\1"):
            raise self.refusal(member, f"its bytes are no bools, as {name} has")
        return data

    def example(self) -> bytes:
        """The example inputs: tensors, numbers and short strings in tuples, lists and dicts, saved anew."""
        if self.members.get(_EXAMPLE) == b"":
            return b""
        example = self.read(_EXAMPLE, load_plain)
        if not (isinstance(example, tuple) and [type(part) for part in example] == [tuple, dict]):
            raise self.refusal(_EXAMPLE, "it is no tuple of positional and named inputs")
        for text in plain_texts(example):
            if not LABEL.fullmatch(text):
                raise self.refusal(_EXAMPLE, f"it has the text {text[:80]!r}")
        saved = io.BytesIO()
        torch.save(example, saved)
        return saved.getvalue()

    def refusal(self, member: str, reason: str) -> InputError:
        return InputError(
            f"{self.path}: member {member} is refused: {reason}. Only what torch.export.save writes for networks of "
            f"plain tensors is read, so that no file can run code. {_HOW}"
        )
