"""The proof of a fold: the folded network beside the given one, on several inputs and in several dtypes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import SurgeryError
from batchnorm.surgery.certificate import Difference, Folded
from batchnorm.surgery.comparison import Example, copy_of, distances, random_state_kept, tensors_of
from batchnorm.surgery.plan import Step
from batchnorm.surgery.rounding import TOLERANCE as TOLERANCE
from batchnorm.surgery.rounding import Rounding, attempt, coarsest_dtype, dtype_text, errors_against, shaken

_STRUCTURE_TOLERANCE = 1e-6
_RANDOM_INPUTS = 2


def verify(
    reference: nn.Module,
    unfolded: nn.Module,
    folded: nn.Module,
    steps: Callable[[nn.Module], list[Step]],
    folds: Sequence[Folded],
    example: Example,
    tolerance: float,
) -> list[Difference]:
    """Compare the folded network with the given one on several inputs and in several dtypes.

    Args:
        reference: the network that was given, in evaluation mode.
        unfolded: the same, with its subclasses opened: what the folds are made in.
        folded: the network after the folds.
        steps: the folds in a copy of ``unfolded`` whose weights are float64 and not rounded.
        folds: what was folded, for the error.
        example: the input; random ones and a doubled batch are made of it.
        tolerance: largest accepted difference in the network's dtype.

    Raises:
        SurgeryError: a difference that is too large, or a folded network that fails.
    """
    exact, exact_folded = copy_of(reference).double(), copy_of(unfolded).double()
    for step in steps(exact_folded):
        step.do()
    candidate = copy_of(folded, training=False)
    inputs = {"example": example}
    inputs |= {f"random {i}": example.randomized(i) for i in range(1, _RANDOM_INPUTS + 1)}
    inputs["doubled batch"] = example.doubled()
    differences: list[Difference] = []
    roundings: dict[str, Rounding] = {}
    dtype, narrow = dtype_text(coarsest_dtype(reference)), False
    for name, given in inputs.items():
        own = roundings[name] = Rounding(reference, given, exact)
        if name != "example" and attempt(reference, given) is None:
            continue
        actual, truth = _run_folded(candidate, given), own.truth
        error = errors_against(truth, actual)
        with warnings.catch_warnings():
            if name != "example":
                warnings.simplefilter("ignore")  # of no interest are choices on inputs that are ours
            found = own.differences(candidate, actual, tolerance, "fold", f" on the {name} input")
        in_dtype = [
            Difference(
                name, dtype, d.output, d.absolute, d.relative, own.errors.get(d.output), limit, error.get(d.output)
            )
            for d in found
            for limit in [own.limit(d, tolerance)]
        ]
        if truth is not None:
            narrow = narrow or (name == "example" and own.narrows)
            limits = {d.output: d.tolerance if narrow else _STRUCTURE_TOLERANCE for d in in_dtype}
            differences += _unrounded(name, own, _run_folded(exact_folded, given.to(torch.float64)), limits)
        differences += in_dtype
        if name == "example" and truth is not None and coarsest_dtype(reference) in (torch.float32, torch.float64):
            differences += _in_bfloat16(reference, candidate, given, truth)
    _raise_if_failed(differences, folds, roundings, candidate, tolerance)
    return differences


def unseen(net: nn.Module, example: Example, layers: Sequence[str]) -> tuple[str, ...]:
    """The layers that no output depends on, so that a comparison of outputs says nothing of them.

    So it is with weights of zeros behind them, as in networks that start from zero. A layer whose output has a gradient
    of zero, or none, is unseen if noise on its output changes no output of the network. Of a network without gradients
    nothing is known, and no layer is named.

    Args:
        net: the network, in evaluation mode; it is run, not changed.
        example: the input.
        layers: the names of its layers.
    """
    copy = copy_of(net).double()
    shifts: dict[str, list[Tensor]] = {}
    noisy: str | None = None

    def shifted(name: str, module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        if not torch.is_grad_enabled():
            return output + torch.randn_like(output) if name == noisy else output
        shift = torch.zeros_like(output, requires_grad=True)
        shifts.setdefault(name, []).append(shift)
        return output + shift

    modules = dict(copy.named_modules())
    for name in layers:
        if name in modules:
            modules[name].register_forward_hook(partial(shifted, name))
    exact = example.to(torch.float64)
    given = exact.map(lambda x: x.detach().clone())
    try:
        with random_state_kept(copy), torch.enable_grad():
            found = [x for _, x in tensors_of(copy(*given.args, **given.kwargs)) if x.requires_grad]
            # A list of its own, since the backward may run layers again, which adds to theirs.
            asked = [(name, shift) for name, each in shifts.items() for shift in each]
            if not found or not asked:
                return ()
            total = torch.stack([(x * torch.randn_like(x)).sum().real for x in found]).sum()
            gradients = torch.autograd.grad(total, [shift for _, shift in asked], allow_unused=True)
        truth = exact.run(copy)
    except Exception:  # a network that does not run in float64, or has no gradients
        return ()
    touched = {name for (name, _), g in zip(asked, gradients, strict=True) if g is not None and g.any()}
    hidden = []
    for name in layers:
        if name in shifts and name not in touched:
            noisy = name
            if all(d.absolute == 0 for d in distances(truth, exact.run(copy))):
                hidden.append(name)
    return tuple(hidden)


def _unrounded(name: str, own: Rounding, actual: Any, limits: dict[str, float]) -> list[Difference]:
    """The folded network whose weights are not rounded against float64: what float64 itself rounds is accepted."""
    found = []
    for d in distances(own.truth, actual):
        limit = limits[d.output]
        if not d.relative <= limit:
            changed = attempt(shaken(own.exact), own.example.to(torch.float64))
            limit = (
                max(limit, 4 * errors_against(own.truth, changed).get(d.output, 0.0)) if changed is not None else limit
            )
        found.append(Difference(name, "float64 unrounded", d.output, d.absolute, d.relative, None, limit))
    return found


def _run_folded(net: nn.Module, example: Example) -> Any:
    try:
        return example.run(net)
    except Exception as error:
        raise SurgeryError(
            f"fold: the folded network fails where the unfolded one does not ({type(error).__name__}: {error}): its "
            "forward looks at its layers from outside; nothing was changed"
        ) from error


def _in_bfloat16(net: nn.Module, folded: nn.Module, example: Example, truth: Any) -> list[Difference]:
    """Both networks rounded to bfloat16, against float64: folding may not make the error much larger."""
    narrow = torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the copies are ours
        outputs = [attempt(copy_of(n).to(narrow), example.to(narrow)) for n in (net, folded)]
    if any(output is None for output in outputs):
        return []
    own = errors_against(truth, outputs[0])
    return [
        Difference("example", dtype_text(narrow), d.output, d.absolute, d.relative, own[d.output], limit, d.relative)
        for d in distances(truth, outputs[1], dtype=torch.float64)
        if d.output in own
        for limit in [max(TOLERANCE[narrow], 4 * own[d.output])]
    ]


def _raise_if_failed(
    differences: list[Difference],
    folds: Sequence[Folded],
    roundings: dict[str, Rounding],
    folded: nn.Module,
    tolerance: float,
) -> None:
    failed = [d for d in differences if not d.passed]
    if failed:
        worst = failed[0]
        own = roundings[worst.inputs]
        raise SurgeryError(
            f"fold: {worst.output} of the folded network differs by {worst.relative:.2e} of its "
            f"largest value on the {worst.inputs} input in {worst.dtype} (accepted "
            f"{worst.tolerance:.0e}); nothing was changed. {own.blame(folded, tolerance)}{own.told(worst.output)} "
            "Folded were " + ", ".join(f"{item.layer} into {item.into}" for item in folds)
        )
