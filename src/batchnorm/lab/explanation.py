"""One real mini-batch through one channel of one layer, forward and backward, number by number."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.errors import InputError
from batchnorm.lab.fitting import train
from batchnorm.lab.instruments.objective import Loss, batch_loss
from batchnorm.lab.settings import Config, checked
from batchnorm.lab.task import Task
from batchnorm.nn import options
from batchnorm.training.loop import batch_indices
from batchnorm.undo import in_mode


@dataclass(frozen=True)
class Explanation:
    """The pool of one channel on its way, all in float64; lists hold one entry for each of its m values.

    Args:
        layer, channel: where.
        x, centered, xhat, y: before; minus the mean; normalized; scaled and shifted.
        mean, var, eps, inv_std: of the pool; var is *biased* (1/m).
        gamma, beta: of the channel; 1 and 0 where the layer has none.
        running_before, running_after: (mean, variance, *unbiased*) kept for inference; None where none are.
        momentum: share of the new batch, this time.
        dy: the gradient that arrives; dx: the one that leaves.
        sum_dy, sum_dy_xhat: d beta and d gamma.
        without_mean, without_both: dy minus its mean, and minus xhat mean(dy xhat) too.
        forward_gap, backward_gap: the largest distance from what the layer itself put out, and sent back, in units
            of the largest value.
    """

    layer: str
    channel: int
    x: list[float]
    centered: list[float]
    xhat: list[float]
    y: list[float]
    mean: float
    var: float
    eps: float
    inv_std: float
    gamma: float
    beta: float
    running_before: tuple[float, float] | None
    running_after: tuple[float, float] | None
    momentum: float
    dy: list[float]
    dx: list[float]
    sum_dy: float
    sum_dy_xhat: float
    without_mean: list[float]
    without_both: list[float]
    forward_gap: float
    backward_gap: float

    @property
    def m(self) -> int:
        """Values in the pool."""
        return len(self.x)


def explain(
    net: nn.Module, batch: Any, *, layer: str | None = None, channel: int = 0, loss: Loss | None = None
) -> Explanation:
    """Walk a mini-batch through one channel of a batch norm layer, as in training. The network is not changed.

    Forward: ``xhat = (x - mean) / sqrt(var + eps)``, ``y = gamma xhat + beta``. Backward, with dy from the loss:
    ``dx = gamma / sqrt(var + eps) (dy - mean(dy) - xhat mean(dy xhat))``.

    Args:
        net: any network with batch norm of torch.nn or this package, without a fused activation in that layer.
        batch: ``(x, y)``, or what `loss` takes.
        layer: its name; by default the first.
        channel: its number.
        loss: ``loss(net, batch)``, a scalar; by default the mean cross-entropy.

    Raises:
        InputError: no batch norm (the message offers `insert`), no such layer or channel, a layer with options that
            the walk does not show, or a layer that this batch does not reach once.

    Source: Ioffe & Szegedy 2015, Algorithm 1 and section 3.
    """
    name = _choose(net, layer)
    walked = in_mode(copy.deepcopy(net), True)
    norm = walked.get_submodule(name)
    assert isinstance(norm, _BatchNorm)
    if not 0 <= channel < norm.num_features:
        raise InputError(f"explain: channel={channel}, layer {name!r} has {norm.num_features}, numbered from 0")
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        args[0].requires_grad_() if args[0].is_leaf else args[0].retain_grad()
        output.retain_grad()
        seen.append((args[0], output))

    before = _running(norm, channel)
    norm.register_forward_pre_hook(lambda module, args: (_joined(args[0]),))
    norm.register_forward_hook(keep)
    with torch.enable_grad():
        (loss or batch_loss)(walked, batch).backward()
    if len(seen) != 1:
        raise InputError(f"explain: layer {name!r} was called {len(seen)} times on this batch, expected once")
    x, output = seen[0]
    return _walk(name, channel, norm, before, *(_pool(t, norm, channel) for t in (x, output, output.grad, x.grad)))


def _joined(x: Tensor) -> Tensor:
    """The input with a place in the graph of its own, so that its gradient is this layer's alone."""
    return x.clone() if x.requires_grad else x.detach().clone().requires_grad_()


def _pool(values: Tensor | None, norm: nn.Module, channel: int) -> Tensor:
    if values is None:
        raise InputError("explain: no gradient reaches the layer from this loss")
    axis = -1 if getattr(norm, "channels_last", False) else 1
    return values.detach().select(axis, channel).flatten().double()


def _walk(
    name: str, channel: int, norm: _BatchNorm, before: tuple[float, float] | None,
    x: Tensor, y_layer: Tensor, dy: Tensor, dx_layer: Tensor,
) -> Explanation:  # fmt: skip
    mean, var = x.mean(), x.var(correction=0)
    inv_std = (var + norm.eps).rsqrt()
    centered = x - mean
    xhat = centered * inv_std
    gamma = 1.0 if norm.weight is None else float(norm.weight[channel].detach())
    beta = 0.0 if norm.bias is None else float(norm.bias[channel].detach())
    y = gamma * xhat + beta
    without_mean = dy - dy.mean()
    without_both = without_mean - xhat * (dy * xhat).mean()
    dx = gamma * inv_std * without_both
    share = norm.momentum
    if share is None:
        share = 1 / int(norm.num_batches_tracked) if norm.num_batches_tracked is not None else 0.0
    return Explanation(
        layer=name, channel=channel, x=x.tolist(), centered=centered.tolist(), xhat=xhat.tolist(), y=y.tolist(),
        mean=float(mean), var=float(var), eps=norm.eps, inv_std=float(inv_std), gamma=gamma, beta=beta,
        running_before=before, running_after=_running(norm, channel), momentum=share,
        dy=dy.tolist(), dx=dx.tolist(), sum_dy=float(dy.sum()), sum_dy_xhat=float((dy * xhat).sum()),
        without_mean=without_mean.tolist(), without_both=without_both.tolist(),
        forward_gap=_gap(y, y_layer), backward_gap=_gap(dx, dx_layer),
    )  # fmt: skip


def _gap(ours: Tensor, layers: Tensor) -> float:
    largest = float(layers.abs().max())
    return float((ours - layers).abs().max()) / largest if largest else 0.0


def _running(norm: _BatchNorm, channel: int) -> tuple[float, float] | None:
    if norm.running_mean is None or norm.running_var is None:
        return None
    return float(norm.running_mean[channel]), float(norm.running_var[channel])


@dataclass(frozen=True)
class ExplainConfig(Config):
    """Args: layer, channel: that are walked, "" for the first layer; seed: of everything random."""

    steps: int = 200
    layer: str = ""
    channel: int = 0
    seed: int = 0


def explain_built_in(**changes: Any) -> tuple[Explanation, str]:
    """`explain` for a training batch of a built-in or given network after a short training, and where it comes from.

    Args:
        changes: of `ExplainConfig`: network, data, insert, steps, batch_size, lr, layer, channel, seed.

    Raises:
        InputError: an unknown setting, or what `explain` raises.
    """
    config = checked(ExplainConfig(), "explain", changes)
    task = Task("explain", config, config.seed)
    net = task.normalized()
    train(net, task, every=None)
    at = batch_indices(len(task.data.x_train), config.batch_size, config.seed, config.steps)
    batch = task.data.x_train[at], task.data.y_train[at]
    names = config.plain()
    source = f"Network {names['network']} after {config.steps:,} training steps on {names['data']}, its next batch of "
    return explain(net, batch, layer=config.layer or None, channel=config.channel), f"{source}{config.batch_size}."


def _choose(net: nn.Module, layer: str | None) -> str:
    norms = {name: module for name, module in net.named_modules() if isinstance(module, _BatchNorm)}
    if not norms:
        raise InputError(
            f"explain: {type(net).__name__} has no batch normalization; put it in with bn.insert(net, example)"
        )
    name = next(iter(norms)) if layer is None else layer
    if name not in norms:
        raise InputError(f"explain: no batch norm layer {name!r}; expected one of {', '.join(norms)}")
    for option in options.changed(norms[name]):
        if not option.walked:
            raise InputError(
                f"explain: layer {name!r} has {option.name}={getattr(norms[name], option.name)!r}, which the walk does "
                "not show; choose another with layer="
            )
    return name


def highlighted(values: Sequence[float]) -> tuple[int, int, int]:
    """The places of the smallest, the middle and the largest value, to be followed through all steps."""
    order = sorted(range(len(values)), key=lambda i: (values[i] if math.isfinite(values[i]) else 0.0, i))
    return order[0], order[len(order) // 2], order[-1]
