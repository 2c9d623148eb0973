"""What exporting a network will do to its batch normalization, said before it is done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import BatchNormError
from batchnorm.nn import batch_norm as ours
from batchnorm.surgery.archives import quiet
from batchnorm.surgery.comparison import Example, copy_of, run_example
from batchnorm.surgery.folding import fold, uses_batch_statistics
from batchnorm.surgery.layers import ScaleShift
from batchnorm.surgery.modules import unwrap
from batchnorm.surgery.recurrent import normalizations

_OPENVINO = (
    'OpenVINO 2026.4.1 computes in bfloat16 where it can, 2e-3 to 5e-3 off; INFERENCE_PRECISION_HINT="f32" mends it.'
)
_BY_BATCH = "the output for one sample will depend on the others in its batch; call net.eval() or bn.freeze(net)"


@dataclass(frozen=True)
class ExportedLayer:
    """One layer: what it becomes, and a warning where that is hardly meant."""

    layer: str
    becomes: str
    warning: str | None = None


@dataclass(frozen=True)
class ExportPreview:
    """What ``torch.export`` and ONNX will make of each batch normalization, as the network stands.

    Attributes:
        layers: one entry a layer.
        foldable: how many of them ``bn.fold`` would take away first.
        notes: on the network as a whole.
        exports: whether torch.export takes the network, in the modes that it is in.
    """

    layers: tuple[ExportedLayer, ...]
    foldable: int
    notes: tuple[str, ...]
    exports: bool = True

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(f"{item.layer}: {item.warning}" for item in self.layers if item.warning)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = []
        for item in self.layers:
            lines.append(f"{item.layer or 'the network'}: {item.becomes}")
            lines += [f"  warning: {item.warning}"] if item.warning else []
        return "\n".join([*lines, *self.notes])


def preview_export(net: nn.Module, example: Any) -> ExportPreview:
    """Say what exporting ``net`` as it stands will do to its batch normalization; nothing is written or changed.

    A copy goes through torch.export, for the example's shapes, to see whether it does.

    Args:
        net: the network.
        example: the input that it would be exported with.

    Returns:
        The preview: a row a layer, and warnings of what tools do with such files. ``print`` shows it.

    Raises:
        InputError: when ``net`` is no module or fails on the example.

    Source: this package; docs/after-the-fold.md has the tools with versions.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
        >>> print(preview_export(net, torch.randn(2, 3, 8, 8)))
        1: one BatchNormalization with its running statistics as constants
        1 of 1 could be folded first (bn.fold).
        OpenVINO 2026.4.1 computes in bfloat16 where it can, 2e-3 to 5e-3 off; INFERENCE_PRECISION_HINT="f32" mends it.
    """
    root = unwrap(net, "preview_export")
    given = Example.of(example)
    run_example(copy_of(root), given)
    layers: list[ExportedLayer] = []
    inside: set[int] = set()
    for name, module in root.named_modules():
        if normalizations(module):
            layers.append(_preview_recurrent(name, module))
            inside |= {id(norm) for norm in module.modules()}
        elif isinstance(module, (_BatchNorm, ScaleShift)) and id(module) not in inside:
            layers.append(_preview(name, module))
    notes = []
    try:
        with quiet():
            torch.export.export(copy_of(root), *_arguments(given))
    except Exception as error:  # what torch.export raises has no public base
        reason = str(error).strip().splitlines() or [type(error).__name__]
        notes.append(f"torch.export refuses it: {reason[0]}")
        if inside:
            notes.append("Recurrent layers take no lengths=, mask= or packed sequences there: give whole sequences.")
    exports = not notes
    try:
        foldable = len(fold(root, example).certificate.folded)
        notes.append(f"{foldable} of {_norms(root)} could be folded first (bn.fold).")
    except BatchNormError as error:
        foldable = 0
        notes.append(f"none could be folded first: {error}")
    if any(p.dtype == torch.float32 for p in root.parameters()):
        notes.append(_OPENVINO)
    if root.training:
        notes.append("The network is in training mode: dropout is exported as dropout; call net.eval() first.")
    return ExportPreview(tuple(layers), foldable, tuple(notes), exports)


def _arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    fresh = example.map(lambda x: x.detach().clone())
    return fresh.args, fresh.kwargs


def _norms(net: nn.Module) -> int:
    return sum(isinstance(module, (_BatchNorm, ScaleShift)) for module in net.modules())


def _preview_recurrent(name: str, layer: nn.Module) -> ExportedLayer:
    becomes = "its steps one after the other, for as many sequences and steps as the example has and no others"
    norms = normalizations(layer).values()
    if any(uses_batch_statistics(norm) for norm in norms if isinstance(norm, _BatchNorm)):
        return ExportedLayer(name, becomes, _BY_BATCH)
    return ExportedLayer(name, becomes)


def _wrong_elsewhere(layer: _BatchNorm) -> str | None:
    """What a tool makes wrong of a right file, with the version that it was seen in."""
    var = layer.running_var
    if var is None:
        return None
    if var.dtype == torch.float16 and bool((var + var.new_tensor(layer.eps) == 0).any()):
        return (
            "in float16 a channel's variance + eps is 0, and onnxruntime (1.31.1, optimizations on) gives NaN where "
            "it fuses the layer into a convolution; call bn.fold before .half(), or use an eps of at least 1e-5"
        )
    if var.dtype == torch.bfloat16:
        return (
            "torch.onnx.export (2.13, dynamo=True) fuses it into a convolution before it and writes float32 weights "
            "into a bfloat16 model, which does not load; call bn.fold first, or export in float32"
        )
    return None


def _preview(name: str, layer: nn.Module) -> ExportedLayer:
    if isinstance(layer, ScaleShift):
        return ExportedLayer(name, "a subtraction, a multiplication and an addition by channel")
    assert isinstance(layer, _BatchNorm)
    fused = getattr(layer, "activation", None)
    extra = f", then {fused}" if fused else ""
    if not uses_batch_statistics(layer):
        if getattr(layer, "example_weight", 0.0):
            return ExportedLayer(name, "elementary operations on each example's statistics" + extra)
        becomes = "one BatchNormalization with its running statistics as constants" + extra
        return ExportedLayer(name, becomes, _wrong_elsewhere(layer))
    updates = layer.updates_statistics if isinstance(layer, ours.BatchNorm) else layer.track_running_stats
    becomes = "normalization by the statistics of whatever batch comes" + extra
    if updates:
        becomes += (
            "; torch.export writes the running statistics at each call; ONNX has no such node: torch's exporter fails, "
            "or makes it normalize with the running statistics and does not say so"
        )
    return ExportedLayer(name, becomes, _BY_BATCH)
