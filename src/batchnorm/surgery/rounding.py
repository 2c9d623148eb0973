"""One rule for how far an edited network may be from the original: as far as the original's own rounding takes it.

A network that multiplies rounding by 10^4 cannot agree with any other implementation of itself to 10^-5. So a verb
accepts four times the original's own rounding where that is more than its tolerance. The rounding is the error against
float64, or the change of the outputs when the last bits of the weights change, whichever is larger.

A choice between values that are equal up to rounding is no rounding: where one falls otherwise, outputs are compared
with the original's choices.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import BatchNormError, SurgeryError
from batchnorm.surgery.choices import Choice, choices, with_choices
from batchnorm.surgery.comparison import Distance, Example, copy_of, distances, narrows, run_example

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest accepted difference relative to an output's largest value, by the network's dtype."""
_TIMES = 4
_ILL = 1e3  # times the resolution of the dtype


def accepted(tolerance: float, own: float | None) -> float:
    """The largest accepted difference of an output whose own rounding is ``own``, both relative to its largest value.

    Four times the rounding, where that is more than the tolerance. An error of 1 and more tells of no rounding: the
    exact output and the given one have nothing to do with each other, as where an evaluator is wrong in float64.
    """
    return max(tolerance, _TIMES * own) if own is not None and own < 1 else tolerance


def coarsest_dtype(net: nn.Module) -> torch.dtype:
    """The widest tolerance counts: the coarsest floating-point dtype among the parameters."""
    dtypes = {p.dtype for p in net.parameters() if p.is_floating_point()} & set(TOLERANCE)
    return max(dtypes, key=lambda dtype: TOLERANCE[dtype], default=torch.float32)


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def attempt(net: nn.Module, example: Example) -> Any:
    """The output, or None for a network that fails."""
    try:
        return example.run(net)
    except Exception:
        return None


def errors_against(exact: Any, rounded: Any) -> dict[str, float]:
    """The relative error of each output against float64."""
    try:
        return {} if exact is None else {d.output: d.relative for d in distances(exact, rounded, dtype=torch.float64)}
    except BatchNormError:
        return {}


def shaken(net: nn.Module, seed: int = 0) -> nn.Module:
    """A copy whose floating-point parameters and buffers differ in their last bits, by one unit up or down."""
    twin, generator = copy_of(net), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            if tensor.dtype in TOLERANCE:
                signs = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor.device, tensor.dtype) * 2 - 1
                tensor.mul_(1 + signs * torch.finfo(tensor.dtype).eps)
    return twin


def trembling(net: nn.Module, seed: int) -> nn.Module:
    """A shaken copy in which the outputs of batch normalizations differ in their last bits as well.

    This is what another implementation of these layers does to a network: each of its values may be rounded otherwise.
    """
    twin, generator = shaken(net, seed), torch.Generator().manual_seed(seed)

    def tremble(module: nn.Module, args: Any, output: Any) -> Any:
        if not (isinstance(output, Tensor) and output.dtype in TOLERANCE):
            return output
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device, output.dtype) * 2 - 1
        return output * (1 + signs * torch.finfo(output.dtype).eps)

    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(tremble)
    return twin


@dataclass(frozen=True)
class Tie:
    """Why outputs of two networks that compute the same are far apart: rounding alone makes a choice.

    Attributes:
        differences: what is left of them with the same choices.
        operators: what chooses, by the name in torch.
        apart: how far what it looks at is apart in both networks, relative to its largest value.
    """

    differences: list[Distance]
    operators: tuple[str, ...]
    apart: float

    def told(self, failed: Distance | SurgeryError, where: str) -> str:
        """A sentence for a warning; ``failed``: the first output that differs, or how the outputs do."""
        left = max((d.relative for d in self.differences), default=0.0)
        what = str(failed)
        if isinstance(failed, Distance):
            what = f"{failed.output}{where} differs by {failed.relative:.1e} of its largest value"
        return (
            f"{what}, since rounding alone decides a choice there ({', '.join(self.operators)}, whose values differ by "
            f"{self.apart:.1e}). With the same choices the outputs differ by {left:.1e}"
        )


class Rounding:
    """The rounding of a network's own outputs on an example, in evaluation or whatever mode it is in.

    Args:
        net: the original; it is run, not changed.
        example: the input.
        exact: the same network in float64; by default a copy is made where one is needed.
    """

    def __init__(self, net: nn.Module, example: Example, exact: nn.Module | None = None) -> None:
        self.net, self.example, self._exact = net, example, exact
        self.dtype = coarsest_dtype(net)

    @cached_property
    def exact(self) -> nn.Module:
        return copy_of(self.net).double() if self._exact is None else self._exact

    @cached_property
    def expected(self) -> Any:
        """The outputs as they are."""
        return run_example(self.net, self.example)

    @cached_property
    def truth(self) -> Any:
        """The outputs in float64; None for a network that does not run in it."""
        return attempt(self.exact, self.example.to(torch.float64))

    @cached_property
    def narrows(self) -> bool:
        """Whether the network rounds to a narrower type on its own in float64, too."""
        return self.truth is None or narrows(self.exact, self.example.to(torch.float64))

    @cached_property
    def choices(self) -> list[Choice]:
        """What the network chooses."""
        return choices(copy_of(self.net), self.example)

    @cached_property
    def errors(self) -> dict[str, float]:
        """The relative error of each output against float64; empty where it is unknown.

        Against float64 with the network's own choices, where float64 chooses otherwise.
        """
        found = errors_against(self.truth, self.expected)
        if max(found.values(), default=0.0) <= TOLERANCE[self.dtype]:
            return found
        held = with_choices(copy_of(self.exact), self.example.to(torch.float64), self.choices)
        return found if held is None or not held.changed else errors_against(held.output, self.expected)

    @cached_property
    def changes(self) -> dict[str, float]:
        """The largest relative change of each output when the last bits of the weights change, in two trials.

        What it chooses stays.
        """
        found = []
        for seed in (0, 1):
            twin = shaken(self.net, seed)
            held = with_choices(twin, self.example, self.choices)
            output = attempt(twin, self.example) if held is None else held.output
            if output is not None:
                found.append(errors_against(self.expected, output))
        return {key: max(each.get(key, 0.0) for each in found) for key in (found[0] if found else ())}

    def limit(self, difference: Distance, tolerance: float) -> float:
        """The largest accepted relative difference of an output; the trials are made where it matters."""
        limit = accepted(tolerance, self.errors.get(difference.output))
        if difference.relative <= limit:
            return limit
        return accepted(limit, self.changes.get(difference.output))

    def told(self, output: str) -> str:
        """How ill-conditioned the original is, in a sentence."""
        own = max(self.errors.get(output, 0.0), self.changes.get(output, 0.0))
        resolution = torch.finfo(self.dtype).eps
        kind = "ill-conditioned" if own > _ILL * resolution else "well-conditioned"
        return (
            f"The original is {kind}: its own rounding in {dtype_text(self.dtype)} moves {output} by {own:.1e} of its "
            f"largest value, {own / resolution:,.0f} times the resolution of the type."
        )

    def compare(self, edited: nn.Module, tolerance: float, verb: str, where: str = "") -> list[Distance]:
        """The `differences` of an edited network.

        Raises:
            SurgeryError: one of them is larger than the tolerance and the original's own rounding allow.
        """
        found = self.differences(edited, run_example(edited, self.example), tolerance, verb, where)
        for d in found:
            limit = self.limit(d, tolerance)
            if not d.relative <= limit:
                raise SurgeryError(
                    f"{verb}: {d.output}{where} differs by {d.relative:.1e} of its largest value (accepted "
                    f"{limit:.0e}); nothing was changed. {self.blame(edited, tolerance)}{self.told(d.output)}"
                )
        return found

    def differences(
        self, edited: nn.Module, actual: Any, tolerance: float, verb: str, where: str = ""
    ) -> list[Distance]:
        """How far the outputs ``actual`` of an edited network are from the original's.

        Where they are further apart than they may be, and rounding alone decides a choice, what is left of it with
        the original's choices.

        Warns:
            UserWarning: it is so.
        """
        failed: SurgeryError | Distance | None = None
        found: list[Distance] = []
        try:
            found = distances(self.expected, actual)
            failed = next((d for d in found if not d.relative <= self.limit(d, tolerance)), None)
        except SurgeryError as error:  # other shapes, as of what passes a threshold
            failed = error
        if failed is None:
            return found
        tie = self.with_own_choices(edited, tolerance)
        if tie is not None:
            warnings.warn(f"{verb}: {tie.told(failed, where)}", stacklevel=2)
            return tie.differences
        if isinstance(failed, SurgeryError):
            raise failed
        return found

    def with_own_choices(self, edited: nn.Module, tolerance: float) -> Tie | None:
        """An edited network that makes the original's choices: its differences, if rounding alone explains them.

        None unless it would choose otherwise, what the choices look at is equal within the tolerance, and so are the
        outputs then.
        """
        run = with_choices(copy_of(edited), self.example, self.choices)
        if run is None or not run.changed or not run.apart <= tolerance:
            return None
        try:
            found = distances(self.expected, run.output)
        except SurgeryError:
            return None
        if not all(d.relative <= self.limit(d, tolerance) for d in found):
            return None
        return Tie(found, run.changed, run.apart)

    def blame(self, edited: nn.Module, tolerance: float) -> str:
        """A sentence that names the layer where the difference begins; empty where none can be named."""
        try:
            name = self.first_difference(edited, tolerance)
        except Exception:  # whatever a forward of any class raises
            return ""
        return "" if name is None else f"The difference begins at the output of '{name}'. "

    def first_difference(self, edited: nn.Module, tolerance: float) -> str | None:
        """The first module, in the order of calls, whose output differs by more than it may there."""
        names = [name for name, module in self.net.named_modules() if name and _computes_alike(module, edited, name)]
        before, after = (_outputs(net, self.example, names) for net in (self.net, edited))
        exact = _outputs(self.exact, self.example.to(torch.float64), names) if self.truth is not None else {}
        for key in before:
            if key not in after or before[key].shape != after[key].shape:
                continue
            (difference,) = distances(before[key], after[key])
            own = errors_against(exact[key], before[key]) if key in exact else {}
            if difference.relative > max(tolerance, *(_TIMES * error for error in own.values()), 0.0):
                return key[0]
        return None


def _computes_alike(module: nn.Module, edited: nn.Module, name: str) -> bool:
    """Whether an edited network has a module of this name that is to give the same: no activation was fused into it."""
    try:
        other = edited.get_submodule(name)
    except AttributeError:
        return False
    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return not is_norm or bool(getattr(module, "activation", None) == getattr(other, "activation", None))


def _outputs(net: nn.Module, example: Example, names: list[str]) -> dict[tuple[str, int], Tensor]:
    """The tensors that modules give, by name and number of the call, in the order of calls."""
    found: dict[tuple[str, int], Tensor] = {}
    counts: dict[str, int] = {}

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            counts[name] = counts.get(name, 0) + 1
            if isinstance(output, Tensor):
                found[name, counts[name]] = output.detach().clone()

        return note

    watched = copy_of(net)
    for name in names:
        watched.get_submodule(name).register_forward_hook(noting(name))
    example.run(watched)
    return found
