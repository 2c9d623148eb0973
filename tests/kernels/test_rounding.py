"""How many digits the kernels of the CPU keep, beside what one rounding to float32 takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchnorm import reference
from batchnorm.kernels import cpu
from batchnorm.nn import BatchNorm1d, BatchNorm2d
from operator_contract import assert_within_budget

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the kernels are not there")

ROUNDING = 2.0**-24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_gamma_in_large_pools_keep_the_digits_of_float32(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    values, channels = 10_000, 256
    x = (torch.randn(values, channels, generator=generator) + 5 * torch.randn(channels, generator=generator)).to(dtype)
    dy = torch.randn(values, channels, generator=generator).to(dtype)
    wide = x.double()
    terms = dy.double() * (wide - wide.mean(0)) / (wide.var(0, unbiased=False) + 1e-5).sqrt()
    layer = BatchNorm1d(channels)
    layer(x.requires_grad_()).backward(dy)
    assert layer.weight.grad is not None
    error = (layer.weight.grad.double() - terms.sum(0)) / terms.square().sum(0).sqrt()
    # Differences from a mean of 24 digits, each rounded, lose 0.91 and 0.92.
    assert float(error.square().mean().sqrt()) < 0.75 * ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["elu", "mish", "gelu_tanh"])
def test_gradients_of_activations_keep_their_digits_far_from_zero(activation: str, dtype: torch.dtype):
    z = torch.tensor([-1e15, -1e9, -80, -40, -20, -15, -9, -3, -1e-6, 1e-6, 3, 9, 15, 25, 45, 1e9, 1e13, 1e18, 1e30])
    layer = BatchNorm1d(1, eps=0.0, activation=activation, dtype=dtype).eval()  # of mean 0 and variance 1, so it sees z
    x = z.to(dtype)[:, None].requires_grad_()
    y = layer(x)
    y.sum().backward()
    wide = z.double()
    value = reference.activation(wide, activation)
    slope = reference.activation_gradient(wide.clamp(-1e3, 1e3), activation)
    close = {"rtol": 3e-5, "atol": 1e-35} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-300}
    moderate = wide.abs() < 100
    np.testing.assert_allclose(y.detach().double()[moderate, 0], value[moderate], **{**close, "atol": 1e-33})
    loose = 0 if activation == "elu" else 1e-6 if dtype == torch.float32 else 1e-14
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.double()[:, 0], slope, rtol=close["rtol"], atol=max(close["atol"], loose))


def test_gelu_keeps_its_digits_down_to_minus_eight():
    z = torch.linspace(-12, 12, 240_001)
    layer = BatchNorm1d(1, eps=0.0, activation="gelu").eval()  # of mean 0 and variance 1, so it sees z
    with torch.no_grad():
        y = layer(z[:, None])[:, 0].double()
    wide = z.double()
    true = wide * torch.erfc(-wide / 2**0.5) / 2
    allowed = (8 + 4 * wide**2) * ROUNDING * true.abs() + torch.where(wide < -7.99, 1e-14, 0)
    assert bool(((y - true).abs() <= allowed).all())
    assert float(y[z < 0].max()) < 0


FEW, MANY = 90, 1440  # values of float32 that are normalized in float64, and in float32


def channels_far_from_zero(dtype: torch.dtype, samples: int) -> torch.Tensor:
    """(samples, 400): each channel takes a few neighbouring values of the dtype, far from 0, some of them two alone."""
    generator = torch.Generator().manual_seed(1)
    digits = {torch.float32: 24, torch.bfloat16: 8}[dtype]
    first = 2.0 ** (digits - 1) + torch.randint(2 ** (digits - 1) - 8, (1, 400), generator=generator)
    steps = torch.arange(400) % 7 + 1
    values = first + torch.rand(samples, 400, generator=generator).mul(steps + 1).floor()
    return (values * 2.0 ** torch.randint(-9, 9, (1, 400), generator=generator)).to(dtype)


@pytest.mark.parametrize("samples", [FEW, MANY])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_that_hardly_vary_far_from_zero_are_within_the_budget(
    dtype: torch.dtype, training: bool, samples: int
):
    x = channels_far_from_zero(dtype, samples)
    assert x.unique(dim=0).shape[0] > 1
    layer = BatchNorm1d(400, activation=None).train(training)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.bias.normal_(generator=generator)
        layer.running_mean.copy_(x.float().mean(0))
        layer.running_var.copy_(x.float().var(0))
    given = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    truth, peer = (
        torch.nn.functional.batch_norm(t, *(each.detach().to(kind).clone() for each in given), training, 0.1, layer.eps)
        for t, kind in ((x.double(), torch.float64), (x, torch.float32))
    )
    with torch.no_grad():
        y = layer(x)
    assert_within_budget(y, truth, peer, terms=torch.maximum(truth.abs(), layer.bias.double().abs().expand_as(truth)))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["planar", "interleaved"])
@pytest.mark.parametrize("samples", [FEW, MANY])
def test_float32_of_any_mean_is_rounded_in_digits_of_the_result_alone(samples: int, order: torch.memory_format):
    generator = torch.Generator().manual_seed(5)
    width = 10.0 ** torch.randint(-6, 7, (1, 300, 1, 1), generator=generator)
    mean = width * torch.tensor([0, 0.3, -5, 100, -1e4])[torch.arange(300) % 5].reshape(1, 300, 1, 1)
    x = (mean + width * torch.randn(samples // 9, 300, 3, 3, generator=generator)).contiguous(memory_format=order)
    layer = BatchNorm2d(300, eps=1e-5)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.bias.normal_(generator=generator)
        y = layer(x)
    truth = torch.nn.functional.batch_norm(x.double(), None, None, layer.weight.double(), layer.bias.double(), True)
    truth = truth.detach()
    gamma, beta = (t.detach().abs().double().reshape(1, 300, 1, 1) for t in (layer.weight, layer.bias))
    std = (x.double().var((0, 2, 3), unbiased=False, keepdim=True) + layer.eps).sqrt()
    away = x.double().mean((0, 2, 3), keepdim=True).abs() / std
    terms = truth.abs()  # the last rounding
    if samples == MANY:  # and those of the difference from the mean, if there is one, and of the shift
        stays = away <= 2
        terms = terms + torch.where(stays, 0, (truth - layer.bias.detach().double().reshape(1, 300, 1, 1)).abs())
        terms = terms + 2 * (beta + gamma * torch.where(stays, away, 2.0**-12 + 2.0**-23 * away))
    lost = 8 * ROUNDING**2 * (2 * x.double().abs() / std * gamma + beta)
    assert float(((y - truth).abs() - 1.0001 * ROUNDING * terms - lost).max()) <= 0


def channels_of(kind: str, samples: int, generator: torch.Generator) -> torch.Tensor:
    """(samples, 1000): normal values of a mean; what ReLU leaves of them, heavy tails, one outlier; of a deviation far
    below the root of eps; a few different values, where torch's error can be 0.
    """
    x = torch.randn(samples, 1000, generator=generator)
    if kind == "relu":
        return x.relu()
    if kind == "tails":
        return x * torch.randn(samples, 1000, generator=generator).exp()
    if kind == "outlier":
        x[0] *= 100
        return x
    if kind in ("narrow", "narrower"):
        return 0.006 * torch.rand(1, 1000, generator=generator) + (1e-4 if kind == "narrow" else 1e-6) * x
    if kind == "binary":
        return (torch.rand(samples, 1000, generator=generator) < 0.1).float()
    if kind == "pixels":
        return torch.randint(0, 256, (samples, 1000), generator=generator).float()
    return x + float(kind)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("samples", [FEW, MANY])
@pytest.mark.parametrize(
    "kind",
    ["0", "0.5", "1.9", "2.1", "10", "1e4", "relu", "tails", "outlier", "narrow", "narrower", "binary", "pixels"],
)
def test_no_channel_misses_the_budget(kind: str, samples: int, training: bool):
    """Sums of two roundings missed it in one channel in 3,000 to 200, of means near 0 and of tails (DESIGN.md)."""
    generator = torch.Generator().manual_seed(8)
    for scales, shift in (((1, 1), 0), ((0.1, 2), 1), ((0.01, 0.1), 1), ((0.5, 5), 0.1)):
        x = channels_of(kind, samples, generator)
        layer = BatchNorm1d(1000).train(training)
        with torch.no_grad():
            layer.weight.uniform_(*scales, generator=generator)
            layer.bias.normal_(generator=generator).mul_(shift)
            layer.running_mean.copy_(x.mean(0))
            layer.running_var.copy_(x.var(0))
            given = [t.clone() for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)]
            y = layer(x)
        truth = torch.nn.functional.batch_norm(x.double(), *(t.double() for t in given), training)
        peer = torch.nn.functional.batch_norm(x, *given, training)
        ours, theirs = ((t - truth).abs().amax(0) for t in (y, peer))
        missed = ours > theirs + ROUNDING * truth.abs().amax(0)
        assert not missed.any(), (scales, missed.nonzero().flatten().tolist())
        assert float(ours.mean()) < float(theirs.mean())


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["planar", "interleaved"])
def test_infinite_values_stay_so_in_evaluation(order: torch.memory_format):
    x = torch.randn(30, 24, 7, 7, generator=torch.Generator().manual_seed(6)).contiguous(memory_format=order)
    x[3, :, 2, 2], x[4, :, 2, 2], x[5, :, 2, 2] = torch.inf, -torch.inf, torch.nan
    layer = BatchNorm2d(24).eval()
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(7))
        layer.running_var.mul_(3)
        y = layer(x)
    assert torch.equal(y[3, :, 2, 2], torch.inf * layer.weight.sign())
    assert torch.equal(y[4, :, 2, 2], -torch.inf * layer.weight.sign())
    assert bool(y[5, :, 2, 2].isnan().all())
    assert int(y.isfinite().sum()) == y.numel() - 3 * 24


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["planar", "interleaved"])
@pytest.mark.parametrize("samples", [6, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_constant_channels_give_beta_and_the_residual(dtype: torch.dtype, samples: int, order: torch.memory_format):
    generator = torch.Generator().manual_seed(3)
    values = 1000 * torch.randn(1, 37, 1, 1, generator=generator)
    x = values.expand(samples, 37, 5, 9).to(dtype).contiguous(memory_format=order)
    residual = torch.randn(samples, 37, 5, 9, generator=generator).to(dtype).contiguous(memory_format=order)
    layer = BatchNorm2d(37)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.bias.normal_(generator=generator)
        layer.bias[::3] = 0
        layer = layer.double() if dtype is torch.float64 else layer
        beta = layer.bias.reshape(1, 37, 1, 1)
        assert torch.equal(layer(x), beta.to(dtype).expand_as(x))
        kind = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
        assert torch.equal(layer(x, residual), (beta.to(kind) + residual).to(dtype))
        pools = BatchNorm2d(37, ghost_size=2).to(layer.bias.dtype)  # of which only one is constant
        mixed = torch.cat([x[:2], residual[:2], x[2:4]])
        found = pools(mixed.contiguous(memory_format=order))
        assert not found[:2].any()
        assert found[2:4].all()
        assert not found[4:].any()
