"""The layers that surgery puts into networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from batchnorm import functional
from batchnorm.errors import InputError
from batchnorm.moments import Moments
from batchnorm.nn.batch_norm import BatchNorm1d


class LastAxisBatchNorm(BatchNorm1d):
    """Batch normalization of (..., C) over all axes but the last, as after a linear layer.

    Constructor, statistics (normalizing variance biased, running variance unbiased) and
    ``state_dict`` are those of ``BatchNorm1d``; the pool of a channel is every value in it.

    Example:
        >>> LastAxisBatchNorm(4)(torch.randn(8, 5, 4)).shape
        torch.Size([8, 5, 4])
    """

    channels_last = True

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """activation(BN(input) + residual), input and residual (..., C), mask and weights what broadcasts to (...)."""
        channels, places = input.shape[-1], input.shape[:-1]
        if lengths is not None:
            raise InputError("a layer over the last of several axes takes a mask (...), got lengths")
        flat = None if residual is None else residual.reshape(-1, channels)
        masked, weighed = (None if t is None else t.expand(places).flatten() for t in (mask, weights))
        return super().forward(input.reshape(-1, channels), flat, masked, None, weighed).reshape(input.shape)

    def input_moments(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Moments:
        """The moments of (..., C), of its valid places."""
        masked, weighed = (None if t is None else t.expand(input.shape[:-1]).flatten() for t in (mask, weights))
        return super().input_moments(input.reshape(-1, input.shape[-1]), None, masked, None, weighed)


class ScaleShift(nn.Module):
    """``activation((x - center) * weight + bias + residual)``, one of each a channel, in one pass over x.

    What ``fold`` makes of a batch normalization with known statistics that no layer can take in: center is the
    running mean, weight ``gamma / sqrt(var + eps)``, bias beta. The same in training and in evaluation mode.

    Args:
        center, weight, bias: of shape (C,).
        activation, negative_slope: as for ``BatchNorm2d``.
        channels_last: whether the channels are the last axis of x, and not the second.

    Example:
        >>> layer = ScaleShift(torch.zeros(4), torch.full((4,), 2.0), torch.ones(4), activation="relu")
        >>> bool((layer(torch.ones(8, 4)) == 3).all())
        True
    """

    center: Tensor
    ones: Tensor

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
        self.register_buffer("ones", torch.ones_like(center), persistent=False)
        self.activation = activation
        self.negative_slope = negative_slope
        self.channels_last = channels_last

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Input and residual (N, C, *space), or (..., C) with ``channels_last``."""
        x = input
        if self.channels_last:
            x = input.reshape(-1, input.shape[-1])
            residual = None if residual is None else residual.reshape(x.shape)
        y = functional.batch_norm(
            x,
            self.center,
            self.ones,
            self.weight,
            self.bias,
            eps=0.0,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
        )
        return y.reshape(input.shape)

    def extra_repr(self) -> str:
        activation = f", activation={self.activation!r}" if self.activation else ""
        return f"{len(self.center)}{activation}"


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

    padding_value: Tensor

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        value = self.padding_value.reshape(-1, *[1] * len(self.kernel_size))
        return super()._conv_forward(input - value, weight, bias)


class ChannelPaddedConv1d(_ChannelPadding, nn.Conv1d):
    """``torch.nn.Conv1d`` padded with ``padding_value`` (C_in,), after which x - padding_value is convolved."""


class ChannelPaddedConv2d(_ChannelPadding, nn.Conv2d):
    """``torch.nn.Conv2d`` padded with ``padding_value`` (C_in,), after which x - padding_value is convolved."""


class ChannelPaddedConv3d(_ChannelPadding, nn.Conv3d):
    """``torch.nn.Conv3d`` padded with ``padding_value`` (C_in,), after which x - padding_value is convolved."""


CHANNEL_PADDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ChannelPaddedConv1d,
    nn.Conv2d: ChannelPaddedConv2d,
    nn.Conv3d: ChannelPaddedConv3d,
}
