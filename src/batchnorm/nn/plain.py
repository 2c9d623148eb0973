"""The layer of torch.nn that is the same as one of ours, and lists of torch's that learn of ours."""

from __future__ import annotations

from torch import nn

from batchnorm.errors import SurgeryError
from batchnorm.nn import buffers as layer_buffers
from batchnorm.nn import options, outside
from batchnorm.nn.batch_norm import BY_RANK, BatchNorm
from batchnorm.nn.leaves import is_of_this_package


def as_torch(layer: BatchNorm) -> nn.Module:
    """The layer of torch.nn that holds the same tensors and computes the same.

    Raises:
        SurgeryError: if the layer is more than torch's.
    """
    kind = next((theirs for theirs in _TORCH if isinstance(layer, theirs)), None)
    changed = [option for option in options.changed(layer) if option.name != "negative_slope"]
    if kind is None or changed or not is_of_this_package(type(layer)):
        what = f"has {changed[0].spelled}={getattr(layer, changed[0].name)!r}" if changed else "is of another class"
        raise SurgeryError(
            f"{layer._name()} {what}, which torch.nn's layers lack; bn.revert(net) after bn.accelerate, or "
            "bn.convert(net, to='torch'), gives torch's layers back"
        )
    layer_buffers.widen_parameters(layer)
    plain = kind(layer.num_features, layer.eps, layer.momentum, device="meta")
    names = plain.__dict__.keys() | {"affine", "track_running_stats"}
    plain.__dict__.update({name: value for name, value in layer.__dict__.items() if name in names})
    return plain


_TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
outside.teach_fusers(dict(zip(_TORCH, BY_RANK.values(), strict=True)), as_torch)
