"""How many digits the kernels of the CPU keep, beside what one rounding to float32 takes."""

from __future__ import annotations

import pytest
import torch

from batchnorm.kernels import cpu
from batchnorm.nn import BatchNorm1d

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
