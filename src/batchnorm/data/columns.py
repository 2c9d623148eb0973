"""The moments of a data set, column by column, with what is needed to merge them without a mistake."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from batchnorm.data.blocks import FeatureSums, merge
from batchnorm.data.features import Column, column_names, columns_of, row_count
from batchnorm.errors import DataError, InputError
from batchnorm.moments import Moments

NonFinite = Literal["error", "skip"]

FORMAT, VERSION = "batchnorm.ColumnMoments", 1


@dataclass(frozen=True, eq=False)
class ColumnMoments:
    """The `Moments` of the columns of a data set, or of a part of one; a monoid under `merge`.

    Parts merge only where they have the same columns of the same types, and where none has been read twice.
    `ColumnMoments.empty()` is the identity.

    Args:
        moments: of every feature, shape (C,).
        columns: the name of each feature; None for the features of an array. A column of arrays of k values has k
            features, "name[0]" to "name[k - 1]".
        types: the type of each feature's values, as its own library calls it.
        nonfinite: how many values of each feature were not finite, int64 of shape (C,); they are in no moment.
        found_in: for each feature the first part with such a value, or "".
        rows: the number of rows.
        parts: the names of the parts (files, partitions) that were read.
        low: what float64 rounds off each mean, so that parts merge exactly where a mean is large beside the spread.

    Examples:
        >>> import numpy as np
        >>> a = ColumnMoments.of({"age": np.array([1.0, 3.0])}, part="a.parquet")
        >>> b = ColumnMoments.of({"age": np.array([8.0])}, part="b.parquet")
        >>> a.merge(b).moments.mean
        tensor([4.], dtype=torch.float64)
    """

    moments: Moments
    columns: tuple[str, ...] | None = None
    types: tuple[str, ...] = ()
    nonfinite: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    found_in: tuple[str, ...] = ()
    rows: int = 0
    parts: tuple[str, ...] = ()
    low: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @classmethod
    def empty(cls, part: str | None = None) -> ColumnMoments:
        """Those of no rows: the identity of `merge`."""
        return cls(Moments.empty(0), parts=() if part is None else (part,))

    @classmethod
    def of(
        cls, block: Any, *, columns: Sequence[str] | None = None, feature_axis: int = 1, part: str | None = None
    ) -> ColumnMoments:
        """Those of one block of rows.

        Args:
            block: an array (N, C, ...), a table of Arrow, pandas or polars, or a dict of arrays by name.
            columns: the columns to read, by default all.
            feature_axis: the axis of the features of an array; those of a column of arrays are on the same axis.
            part: what to call the block in errors. Blocks of one name do not merge.

        Raises:
            DataError: a column that is not there, or that holds no real numbers.
        """
        return cls.of_blocks([block], columns=columns, feature_axis=feature_axis, part=part)

    @classmethod
    def of_blocks(
        cls,
        blocks: Iterable[Any],
        *,
        columns: Sequence[str] | None = None,
        feature_axis: int = 1,
        part: str | None = None,
        any_type: bool = False,
    ) -> ColumnMoments:
        """Those of one part that comes in blocks, in the memory of one block; see `of`."""
        name = "the data" if part is None else part
        sums: FeatureSums | None = None
        first: list[tuple[str, str]] = []
        order: list[str] | None = None
        rows = 0
        for block in blocks:
            size = row_count(block)
            if not size:
                continue
            there = column_names(block)
            if columns is None and order is not None and there is not None and sorted(there) == sorted(order):
                there = order  # as in the first block
            order = order or there
            found = columns_of(block, there if columns is None else columns, name)
            read = [_by_feature(column, feature_axis, name) for column in found]
            layout = [pair for column, pieces in read for pair in _layout(column, pieces)]
            if sums is None:
                sums, first = FeatureSums(len(layout)), layout
            elif layout != first:
                _compare(first, layout, f"{name}, from row {rows}", f"{name} before it", any_type)
            place = 0
            for _, pieces in read:
                for piece in pieces:
                    _add(sums, place, piece)
                place += _features(pieces)
            rows += size
        if sums is None:
            return cls.empty(part)
        whole, low = sums.moments()
        return cls(
            whole,
            None if any(column == "" for column, _ in first) else tuple(column for column, _ in first),
            tuple(type_ for _, type_ in first),
            torch.from_numpy(sums.nonfinite.copy()),
            tuple(name if bad else "" for bad in sums.nonfinite),
            rows,
            () if part is None else (part,),
            low,
        )

    def merge(self, other: ColumnMoments, *, any_type: bool = False) -> ColumnMoments:
        """Those of both; the columns are matched by name.

        Args:
            other: of other parts of the same data.
            any_type: let a column have another type of number in another part.

        Raises:
            DataError: a part that both have read, or columns that are not the same; the message names part and column.
        """
        twice = sorted(set(self.parts) & set(other.parts))
        if twice:
            raise DataError(f"{twice[0]} was read twice; each part of a data set counts once")
        parts = self.parts + other.parts
        if not self.rows or not other.rows:
            some = self if self.rows else other
            return replace(some, parts=parts)
        mine, theirs = self._layout(), other._layout()
        if mine != theirs:
            _compare(mine, theirs, _some(other.parts), _some(self.parts), any_type)
            other = other._ordered(self)
        count, mean, low, m2 = (torch.from_numpy(each) for each in merge(self._arrays(), other._arrays()))
        return ColumnMoments(
            Moments(count, mean, m2),
            self.columns,
            self.types,
            self.nonfinite + other.nonfinite,
            tuple(a or b for a, b in zip(self.found_in, other.found_in, strict=True)),
            self.rows + other.rows,
            parts,
            low,
        )

    def beside(self, others: Sequence[ColumnMoments]) -> ColumnMoments:
        """Those of the same rows with more columns, which were read by themselves.

        Args:
            others: of the same part.

        Raises:
            DataError: another number of rows.
        """
        each = [self, *others]
        rows = {one.rows for one in each}
        if len(rows) > 1:
            raise DataError(f"{_some(self.parts)}: its columns have {sorted(rows)} rows; expected one number")
        if not others or not self.rows:
            return self
        return ColumnMoments(
            Moments(
                *(torch.from_numpy(np.concatenate(x)) for x in ([one._arrays()[k] for one in each] for k in (0, 1, 3)))
            ),
            tuple(name for one in each for name in one.columns or ()),
            tuple(type_ for one in each for type_ in one.types),
            torch.cat([one.nonfinite for one in each]),
            tuple(part for one in each for part in one.found_in),
            self.rows,
            self.parts,
            torch.cat([one.low for one in each]),
        )

    def _arrays(self) -> tuple[Any, ...]:
        count = self.moments.count.expand_as(self.moments.mean)
        return count.numpy(), self.moments.mean.numpy(), self.low.numpy(), self.moments.m2.numpy()

    def check(self, called: str, nonfinite: NonFinite = "error") -> ColumnMoments:
        """The same, once it is known to be usable.

        Raises:
            DataError: no rows; values that are not finite where ``nonfinite="error"``, counted by column; a column
                without a finite value; values so large that their variance is not.
        """
        check_choice(called, nonfinite)
        if not self.rows:
            raise DataError(f"{called}: the data set has no rows ({len(self.parts)} part(s) were read)")
        bad = [(self._name(k), int(n), self.found_in[k]) for k, n in enumerate(self.nonfinite.tolist()) if n]
        if bad and nonfinite == "error":
            listed = "; ".join(f"{name}: {n}, the first in {part}" for name, n, part in bad[:8])
            more = f"; and {len(bad) - 8} more columns" if len(bad) > 8 else ""
            raise DataError(
                f"{called}: values are missing or not finite in {listed}{more}. Remove or impute them, or leave them "
                "out by nonfinite='skip'"
            )
        count = self.moments.count.expand_as(self.moments.mean)
        for k in range(len(count)):
            if not count[k]:
                raise DataError(f"{called}: {self._name(k)} has no finite value")
            if not (torch.isfinite(self.moments.mean[k]) and torch.isfinite(self.moments.m2[k])):
                raise DataError(f"{called}: the values of {self._name(k)} are so large that their variance overflows")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them, to the last bit."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "moments": self.moments.to_dict(),
            "columns": None if self.columns is None else list(self.columns),
            "types": list(self.types),
            "nonfinite": self.nonfinite.tolist(),
            "found_in": list(self.found_in),
            "rows": self.rows,
            "parts": list(self.parts),
            "low": self.low.tolist(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> ColumnMoments:
        """What `to_dict` made it of.

        Raises:
            InputError: another format or version, or entries that do not fit together.
        """
        if not isinstance(state, Mapping) or state.get("format") != FORMAT or state.get("version") != VERSION:
            raise InputError(f"ColumnMoments.from_dict: expected what to_dict gives (format {FORMAT!r}, {VERSION})")
        try:
            moments = Moments.from_dict(state["moments"])
            columns = None if state["columns"] is None else tuple(map(str, state["columns"]))
            made = cls(
                moments,
                columns,
                tuple(map(str, state["types"])),
                torch.tensor(state["nonfinite"], dtype=torch.int64),
                tuple(map(str, state["found_in"])),
                int(state["rows"]),
                tuple(map(str, state["parts"])),
                torch.tensor(state["low"], dtype=torch.float64),
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"ColumnMoments.from_dict: the entries cannot be read ({error!r})") from error
        features = moments.mean.numel()
        sizes = [len(made.types), made.nonfinite.numel(), len(made.found_in), made.low.numel()]
        sizes += [] if columns is None else [len(columns)]
        if moments.mean.ndim != 1 or any(size != features for size in sizes):
            raise InputError(f"ColumnMoments.from_dict: got {features} features, and entries for {sizes}")
        return made

    def _layout(self) -> list[tuple[str, str]]:
        names = self.columns if self.columns is not None else ("",) * len(self.types)
        return list(zip(names, self.types, strict=True))

    def _name(self, feature: int) -> str:
        return f"feature {feature}" if self.columns is None else f"column {self.columns[feature]!r}"

    def _ordered(self, like: ColumnMoments) -> ColumnMoments:
        """The features in another's order."""
        if self.columns is None or like.columns is None:
            return self
        order = [self.columns.index(name) for name in like.columns]
        count = self.moments.count.expand_as(self.moments.mean)
        return ColumnMoments(
            Moments(count[order], self.moments.mean[order], self.moments.m2[order]),
            like.columns,
            tuple(self.types[k] for k in order),
            self.nonfinite[order],
            tuple(self.found_in[k] for k in order),
            self.rows,
            self.parts,
            self.low[order],
        )


def check_choice(called: str, nonfinite: Any) -> None:
    """Raise InputError for an option that is none."""
    if nonfinite not in get_args(NonFinite):
        raise InputError(f"{called}: got nonfinite={nonfinite!r}; expected one of {get_args(NonFinite)}")


def merge_all(found: Iterable[ColumnMoments], any_type: bool = False) -> ColumnMoments:
    """All of them, merged in this order."""
    whole = ColumnMoments.empty()
    for one in found:
        whole = whole.merge(one, any_type=any_type)
    return whole


def _by_feature(column: Column, axis: int, part: str) -> tuple[Column, list[np.ndarray[Any, Any]]]:
    """A column, and its pieces as (n,), or (n, C) or (n, C, s) for a column of arrays."""
    if column.name and column.is_scalar:
        return column, list(column.chunks)
    shaped = []
    for chunk in column.chunks:
        if chunk.ndim < 2 or not -chunk.ndim <= axis < chunk.ndim or axis % chunk.ndim == 0:
            what = f"column {column.name!r}" if column.name else "the array"
            raise DataError(
                f"{part}: {what} has the shape {chunk.shape}; expected samples on axis 0 and features on "
                f"axis {axis} (feature_axis)"
            )
        at = axis % chunk.ndim
        if chunk.ndim == 2:
            shaped.append(chunk)
        elif at == chunk.ndim - 1:
            shaped.append(chunk.reshape(-1, chunk.shape[-1]))
        else:
            shaped.append(np.moveaxis(chunk, at, 1).reshape(len(chunk), chunk.shape[at], -1))
    sizes = {piece.shape[1] for piece in shaped}
    if len(sizes) > 1:
        raise DataError(f"{part}: column {column.name!r} holds arrays of {sorted(sizes)} features; expected one number")
    return column, shaped


def _features(pieces: list[np.ndarray[Any, Any]]) -> int:
    return 1 if pieces[0].ndim == 1 else int(pieces[0].shape[1])


def _layout(column: Column, pieces: list[np.ndarray[Any, Any]]) -> list[tuple[str, str]]:
    """(name, type) of each feature of a column."""
    if pieces[0].ndim == 1:
        return [(column.name, column.type)]
    return [(f"{column.name}[{k}]" if column.name else "", column.type) for k in range(_features(pieces))]


def _add(sums: FeatureSums, place: int, piece: np.ndarray[Any, Any]) -> None:
    if piece.ndim == 1:
        sums.add_column(place, piece)
    else:
        sums.add_rows(place, piece)


def _some(parts: tuple[str, ...]) -> str:
    if not parts:
        return "a part without a name"
    return parts[0] if len(parts) == 1 else f"one of {parts[0]} to {parts[-1]}"


def _compare(
    expected: list[tuple[str, str]], got: list[tuple[str, str]], where: str, before: str, any_type: bool
) -> None:
    """Raise DataError where the columns of two parts are not the same."""
    if (expected and expected[0][0] == "") or (got and got[0][0] == ""):
        if len(expected) != len(got) or expected[0][0] != got[0][0]:
            raise DataError(f"{where} has {len(got)} features, {before} has {len(expected)}; expected the same number")
    else:
        types = dict(got)
        for name, _ in expected:
            if name not in types:
                raise DataError(f"{where} has no column {name!r}, which {before} has")
        for name, _ in got:
            if name not in dict(expected):
                raise DataError(
                    f"{where} has a column {name!r}, which {before} lacks; name the columns to read by columns=[...]"
                )
        got = [(name, types[name]) for name, _ in expected]
    for k, ((name, a), (_, b)) in enumerate(zip(expected, got, strict=True)):
        if a != b and not any_type:
            what = f"column {name!r}" if name else f"feature {k}"
            raise DataError(
                f"{where}: {what} is of type {b}, and of type {a} in {before}; convert one of them, or give "
                "any_type=True if both are the same quantity"
            )
