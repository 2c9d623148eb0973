"""The layers that surgery puts into networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from batchnorm import functional
from batchnorm.batch import Batch
from batchnorm.errors import InputError
from batchnorm.kernels.aten import activate
from batchnorm.nn.batch_norm import BatchNorm1d
from batchnorm.nn.leaves import recorded_call
from batchnorm.ops.context import is_compiled, is_recorded


class LastAxisBatchNorm(BatchNorm1d):
    """Batch normalization of (..., C) over all axes but the last, as after a linear layer.

    Constructor, statistics (normalizing variance biased, running variance unbiased) and
    ``state_dict`` are those of ``BatchNorm1d``; the pool of a channel is every value in it.

    Examples:
        >>> LastAxisBatchNorm(4)(torch.randn(8, 5, 4)).shape
        torch.Size([8, 5, 4])
    """

    channels_last = True

    def _as_batch(
        self, input: Any, residual: Any, mask: Tensor | None, lengths: Tensor | None, weights: Tensor | None
    ) -> Batch:
        """Input and residual are (..., C); mask and weights broadcast to (...)."""
        if lengths is not None:
            raise InputError("a layer over the last of several axes takes a mask (...), got lengths")
        shape = input.shape
        flat = None if residual is None else residual.reshape(-1, shape[-1])
        masked, weighed = (None if t is None else t.expand(shape[:-1]).flatten() for t in (mask, weights))
        batch = super()._as_batch(input.reshape(-1, shape[-1]), flat, masked, None, weighed)
        return batch._replace(restore=lambda y: y.reshape(shape))


class ScaleShift(nn.Module):
    """``activation((x - center) * weight + bias + residual)``, one of each a channel, in one pass over x.

    What ``fold`` makes of a batch normalization with known statistics that no layer can take in: center is the
    running mean, weight ``gamma / sqrt(var + eps)``, bias beta. The same in training and in evaluation mode.

    Args:
        center, weight, bias: of shape (C,).
        activation, negative_slope: as for ``BatchNorm2d``.
        channels_last: whether the channels are the last axis of x, and not the second.

    Examples:
        >>> layer = ScaleShift(torch.zeros(4), torch.full((4,), 2.0), torch.ones(4), activation="relu")
        >>> bool((layer(torch.ones(8, 4)) == 3).all())
        True
    """

    if TYPE_CHECKING:  # TorchScript cannot read annotations that are strings
        center: Tensor

    def __init__(
        self,
        center: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.register_buffer("center", center)
        self.activation = activation
        self.negative_slope = negative_slope
        self.channels_last = channels_last

    def forward(self, input: Tensor, residual: Optional[Tensor] = None) -> Tensor:  # noqa: UP045, for TorchScript
        """Input and residual (N, C, *space), or (..., C) with ``channels_last``."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._by_operators(input, residual)
        return self._in_python(input, residual)

    @torch.jit.unused
    def _in_python(self, input: Tensor, residual: Optional[Tensor]) -> Tensor:  # noqa: UP045
        if (recorded := recorded_call(self, (input,), {"residual": residual})) is not None:
            return recorded  # type: ignore[return-value]
        if isinstance(input, fx.Proxy):  # torch.fx records this layer as the whole network, without its sizes
            last = (lambda x: x) if self.channels_last else (lambda x: x.movedim(1, -1))
            y = (last(input) - self.center) * self.weight + self.bias
            y = y if self.channels_last else y.movedim(-1, 1)
            if residual is not None:
                y = input.tracer.create_proxy("call_function", _plus, (y, residual), {})
            return y if self.activation is None else activate(y, self.activation, self.negative_slope)
        if is_recorded(input) or _is_recorded():
            return self._by_operators(input, residual)
        x = input
        if self.channels_last:
            x = input.reshape(-1, input.shape[-1])
            residual = None if residual is None else residual.reshape(x.shape)
        y = functional.batch_norm(
            x,
            self.center,
            torch.ones_like(self.center),
            self.weight,
            self.bias,
            eps=0.0,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
        )
        return y.reshape(input.shape)

    def _by_operators(self, input: Tensor, residual: Optional[Tensor]) -> Tensor:  # noqa: UP045
        """The same as a subtraction, a multiplication and an addition, which every exporter has.

        16-bit numbers are computed with in float32, as in one pass.
        """
        shape = [-1] if self.channels_last else [-1] + [1] * (input.dim() - 2)
        center, weight, bias = self.center.view(shape), self.weight.view(shape), self.bias.view(shape)
        x = input
        narrow = x.dtype == torch.float16 or x.dtype == torch.bfloat16
        if narrow:
            x = x.float()
        if weight.dtype == torch.float16 or weight.dtype == torch.bfloat16:
            center, weight, bias = center.float(), weight.float(), bias.float()
        y = (x - center) * weight + bias
        if residual is not None:
            y = y + residual
        if self.activation is not None:
            y = activate(y, self.activation, self.negative_slope)
        return y.to(input.dtype) if narrow else y

    def extra_repr(self) -> str:
        activation = f", activation={self.activation!r}" if self.activation else ""
        return f"{len(self.center)}{activation}"


def _plus(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else y + residual


def _is_recorded() -> bool:
    """Whether make_fx records operators."""
    if is_compiled():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


class AddActivation(nn.Module):
    """``activation(x + residual)``: what stays of a layer with a residual whose normalization was folded."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.activation(input + residual)
        return y


class _ChannelPadding(_ConvNd):
    """A zero-padded convolution whose padding has a value of its own for every input channel.

    Padding x with the value p is padding x - p with zeros; the bias holds what p adds.
    """

    if TYPE_CHECKING:
        padding_value: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._conv_forward(input, self.weight, self.bias)
        return self._in_python(input)

    @torch.jit.unused
    def _in_python(self, input: Tensor) -> Tensor:
        recorded = recorded_call(self, (input,))
        return self._conv_forward(input, self.weight, self.bias) if recorded is None else recorded  # type: ignore[return-value]


class ChannelPaddedConv1d(_ChannelPadding, nn.Conv1d):
    """``torch.nn.Conv1d`` padded with ``padding_value`` (C_in,), after which x - padding_value is convolved."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP045
        x = input - self.padding_value.reshape(-1, 1)
        return F.conv1d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class ChannelPaddedConv2d(_ChannelPadding, nn.Conv2d):
    """``torch.nn.Conv2d`` padded with ``padding_value`` (C_in,), after which x - padding_value is convolved."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP045
        x = input - self.padding_value.reshape(-1, 1, 1)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class ChannelPaddedConv3d(_ChannelPadding, nn.Conv3d):
    """``torch.nn.Conv3d`` padded with ``padding_value`` (C_in,), after which x - padding_value is convolved."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:  # noqa: UP045
        x = input - self.padding_value.reshape(-1, 1, 1, 1)
        return F.conv3d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


CHANNEL_PADDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ChannelPaddedConv1d,
    nn.Conv2d: ChannelPaddedConv2d,
    nn.Conv3d: ChannelPaddedConv3d,
}
