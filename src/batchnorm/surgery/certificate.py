"""What a fold did, and the proof that the network computes the same."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Folded:
    """One batch normalization that is now part of the layer or layers ``into``."""

    layer: str
    into: str


@dataclass(frozen=True)
class Kept:
    """One batch normalization that stayed in the network, why, and what took its place, if anything."""

    layer: str
    reason: str
    becomes: str | None = None


@dataclass(frozen=True)
class Merged:
    """Branches of one value that are now the convolution ``into``: convolutions by name; "identity" is the value."""

    into: str
    branches: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """Folded against unfolded network for one output.

    Attributes:
        inputs: ``"example"``; ``"random 1"``, ``"random 2"``: normal values with the example's mean and standard
            deviation; ``"doubled batch"``: the example twice along its first axis, where the network takes it.
        dtype: the dtype both networks ran in. ``float64 unrounded``, with weights that were not rounded, shows that
            the edit is exact; the network's own dtype shows what its user gets; ``bfloat16``, for a wider network, is
            the error of the folded network rounded to it, against float64.
        output: path of the output in the network's result.
        absolute: largest absolute difference.
        relative: the same divided by the output's largest magnitude.
        rounding: the unfolded network's own error against float64, relative in the same way, where float64 could
            be run.
        tolerance: the largest ``relative`` that is accepted: where ``rounding`` is large, that is more.
        error: the folded network's own error against float64, to compare with ``rounding``.
    """

    inputs: str
    dtype: str
    output: str
    absolute: float
    relative: float
    rounding: float | None
    tolerance: float
    error: float | None = None

    @property
    def passed(self) -> bool:
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class Certificate:
    """What was folded, what was kept and why, and how far the outputs are apart.

    Attributes:
        folded: each batch normalization that is gone, and the layer that it went into.
        kept: each that stayed, why, and the scale and shift that it became where it could.
        differences: every comparison that was made; all have passed.
        captured_by: ``"torch.fx"``; or ``"torch.fx on the example's shapes"`` or ``"torch.export"``: then the data flow
            is known for the shapes of the example alone. Of several parts it may be several of them.
        tolerance: the largest relative difference that was accepted in the network's dtype.
        dtype: the network's dtype.
        merged: sums of branches that became one convolution.
        parts: the modules that were captured by themselves, where the whole network could not be, or calls them several
            times; each was compared by itself, too, under its name.
        unseen: the folded layers on which no output of the example depends (zeros behind them, as in a network that
            starts from zero): no comparison says anything of them.
    """

    folded: tuple[Folded, ...]
    kept: tuple[Kept, ...]
    differences: tuple[Difference, ...]
    captured_by: str
    tolerance: float
    dtype: str = "float32"
    merged: tuple[Merged, ...] = ()
    parts: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def absolute(self) -> float:
        """Largest absolute difference in the network's own dtype."""
        return max((d.absolute for d in self.differences if d.dtype == self.dtype), default=0.0)

    @property
    def relative(self) -> float:
        """Largest relative difference in the network's own dtype."""
        return max((d.relative for d in self.differences if d.dtype == self.dtype), default=0.0)

    @property
    def rounding(self) -> float | None:
        """Largest error of the unfolded network against float64, in its own dtype: where that is large, so is
        ``relative``, and no implementation of the network could agree better with another one."""
        return max((d.rounding for d in self.differences if d.dtype == self.dtype and d.rounding), default=None)

    @property
    def error(self) -> float | None:
        """The same of the folded network."""
        return max((d.error for d in self.differences if d.dtype == self.dtype and d.error), default=None)

    @property
    def useless_in(self) -> tuple[str, ...]:
        """Dtypes in which rounding alone may change an output by more than its largest value."""
        return tuple(sorted({d.dtype for d in self.differences if d.tolerance > 1}))

    @property
    def proven(self) -> bool:
        """Whether every comparison passed, and there is one that says something."""
        found = [d for d in self.differences if d.tolerance <= 1]
        sees = not self.folded or len(self.unseen) < len({item.layer for item in self.folded})
        return bool(found) and sees and all(d.passed for d in self.differences)

    @property
    def verdict(self) -> str:
        """One or two sentences: whether the outputs stayed, and by how much they moved."""
        if self.proven:
            own = [d for d in self.differences if d.dtype == self.dtype] or self.differences
            worst = max(own, key=lambda d: d.relative / d.tolerance)
            text = (
                f"Proven: in {worst.dtype} the outputs moved by {worst.relative:.1e} of the largest one, accepted are "
                f"{worst.tolerance:.0e}; all {len(self.differences)} comparisons passed."
            )
            if self.unseen:
                text += f" They say nothing of {_few(self.unseen)}, on which no output depends."
        elif self.unseen:
            text = (
                f"Not proven: no output depends on what was folded ({_few(self.unseen)}), so no comparison says "
                "anything. Weights of zeros behind it do that. Fold the network once it is trained."
            )
        else:
            text = "Not proven: " + ("see the differences below." if self.differences else "nothing was compared.")
        if self.useless_in:
            text += (
                f" In {' and '.join(self.useless_in)} this network is unusable: rounding alone changes its outputs by "
                "more than their size."
            )
        return text

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        where = f" in {', '.join(map(repr, self.parts))}" if self.parts else ""
        lines = [self.verdict, f"{len(self.folded)} folded, {len(self.kept)} kept ({self.captured_by}{where})"]
        lines += [f"  {item.layer} -> {item.into}" for item in self.folded]
        lines += [f"  {' + '.join(item.branches)} -> {item.into}" for item in self.merged]
        for item in self.kept:
            becomes = f"; it became a {item.becomes}" if item.becomes else ""
            lines.append(f"  {item.layer} kept: {item.reason}{becomes}")
        lines += [
            f"  {d.inputs}, {d.dtype}, {d.output}: absolute {d.absolute:.2e}, "
            f"relative {d.relative:.2e} (accepted {d.tolerance:.0e}{_against_float64(d)})"
            for d in self.differences
        ]
        return "\n".join(lines)


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _against_float64(d: Difference) -> str:
    if d.rounding is None or d.error is None:
        return ""
    return f"; against float64 {d.error:.0e}, unfolded {d.rounding:.0e}"
