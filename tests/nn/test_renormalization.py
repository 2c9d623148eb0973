"""Batch renormalization against its formula, its limits, and the two laws that define it."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import batchnorm as bn
from batchnorm import reference
from batchnorm.errors import InputError

LIMITS = [(3.0, 5.0), (1.1, 0.2), (1.0, 5.0), (math.inf, 0.0), (math.inf, math.inf)]


def layer_of(r_max: float, d_max: float, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    layer = bn.BatchNorm2d(4, renorm=bn.Renorm(r_max, d_max, warmup=0), dtype=dtype, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(values.exp() if name == "running_var" else values + (name == "weight"))
    return layer


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return (torch.randn(6, 4, 3, 2, generator=generator) * 2 + 1).to(dtype)


@pytest.mark.parametrize(("r_max", "d_max"), LIMITS)
@pytest.mark.parametrize("affine", [True, False])
def test_output_and_gradients_are_the_formulas(r_max: float, d_max: float, affine: bool):
    layer, x = layer_of(r_max, d_max, affine=affine), images().requires_grad_()
    mean, var = (b.numpy().copy() for b in (layer.running_mean, layer.running_var))
    gamma, beta = (None, None) if not affine else (layer.weight.detach().numpy(), layer.bias.detach().numpy())
    y, dy = layer(x), torch.randn(6, 4, 3, 2, dtype=torch.float64)
    y.backward(dy)
    array, limits = x.detach().numpy(), {"r_max": r_max, "d_max": d_max}
    want = reference.renormalize(array, mean, var, gamma, beta, **limits)
    gradients = reference.renormalize_backward(dy.numpy(), array, mean, var, gamma, **limits)
    np.testing.assert_allclose(y.detach().numpy(), want.y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), gradients.dx, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(layer.renorm_r.numpy(), want.r, rtol=1e-12)
    np.testing.assert_allclose(layer.renorm_d.numpy(), want.d, rtol=1e-12, atol=1e-13)
    if affine:
        np.testing.assert_allclose(layer.weight.grad.numpy(), gradients.dgamma, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(layer.bias.grad.numpy(), gradients.dbeta, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"activation": "relu"}, {"bias": False}], ids=str)
def test_is_batch_normalization_bit_for_bit_at_r_1_and_d_0(dtype: torch.dtype, options: dict[str, Any]):
    renormalized = layer_of(1.0, 0.0, dtype, **options)
    plain = bn.BatchNorm2d(4, dtype=dtype, **options)
    plain.load_state_dict(renormalized.state_dict())
    dy = torch.randn(6, 4, 3, 2).to(dtype)
    results = []
    for layer in (renormalized, plain):
        x = images(dtype).requires_grad_()
        y = layer(x, x.detach() * 0.5) if options.get("activation") else layer(x)
        y.backward(dy)
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_training_gives_what_inference_gives_without_clipping():
    """torch's training output differs from its inference output; ours without limits does not."""
    layer = layer_of(math.inf, math.inf)
    theirs = nn.BatchNorm2d(4, dtype=torch.float64)
    theirs.load_state_dict(layer.state_dict())
    x = images()
    inference = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), inference, rtol=1e-12, atol=1e-12)
    assert (theirs(x) - inference).abs().max() > 0.1


@pytest.mark.parametrize("step", [0, 4_999, 5_001, 15_000, 25_000, 30_000, 40_000, 10**6])
def test_the_default_schedule_is_the_papers(step: int):
    r_max, d_max = bn.Renorm().limits(torch.tensor(step))
    expected = reference.renormalization_limits(step)
    np.testing.assert_allclose([r_max.item(), d_max.item()], expected, rtol=1e-12)


def test_limits_open_with_the_batches_seen():
    layer, x = bn.BatchNorm1d(2, renorm=bn.Renorm(3.0, 5.0, warmup=8)), torch.randn(16, 2) * 50 + 100
    seen = []
    for _ in range(9):
        layer.running_mean.zero_()
        layer.running_var.fill_(1.0)
        layer(x)
        seen.append((layer.renorm_r.max().item(), layer.renorm_d.max().item()))
    expected = [(1 + 2 * min(max(k - 1, 0) / 7, 1), 5 * min(max(k - 1, 0) / 4, 1)) for k in range(9)]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_gradients_of_gradients_and_forward_mode():
    layer = layer_of(1.3, 0.4)
    layer.update = "never"
    x = images()[:3].requires_grad_()
    # r and d are constants of the gradient, so finite differences of the layer would see them move.
    tangent, dy = torch.randn_like(x), torch.randn_like(x)
    with forward_ad.dual_level():
        forward = forward_ad.unpack_dual(layer(forward_ad.make_dual(x.detach(), tangent))).tangent
    (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    torch.testing.assert_close((forward * dy).sum(), (dx.detach() * tangent).sum())
    (second,) = torch.autograd.grad((dx * tangent).sum(), x)
    step, moved = 1e-6, []
    for sign in (1, -1):
        at = (x.detach() + sign * step * dy).requires_grad_()
        plain = reference.backward(dy.numpy(), at.detach().numpy(), layer.weight.detach().numpy())
        moved.append(torch.from_numpy(plain.dx) * layer.renorm_r[:, None, None])
    torch.testing.assert_close(
        (second * dy).sum(), ((moved[0] - moved[1]) / (2 * step) * tangent).sum(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_compiled_and_exported():
    layer, x = layer_of(1.5, 0.5), images()
    eager = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer, (x,)).module()
    for k in range(2):
        expected = eager(x + k)
        torch.testing.assert_close(compiled(x + k), expected)
        torch.testing.assert_close(exported(x + k), expected)
    torch.testing.assert_close(dict(exported.state_dict()), dict(eager.state_dict()))


def test_state_and_copies():
    layer = layer_of(3.0, 5.0, torch.float32)
    layer(images(torch.float32))
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(4).state_dict())
    assert "renorm=Renorm(r_max=3.0, d_max=5.0, warmup=0)" in repr(layer)
    assert torch.equal(copy.deepcopy(layer).renorm_r, layer.renorm_r)
    layer.renorm = None
    assert repr(layer) == repr(bn.BatchNorm2d(4))
    assert dict(layer.named_buffers()).keys() == dict(nn.BatchNorm2d(4).named_buffers()).keys()


def test_refused():
    for bad in ({"r_max": 0.5}, {"d_max": -1.0}, {"warmup": -1}, {"r_max": math.nan}):
        with pytest.raises(InputError, match="expected r_max >= 1"):
            bn.Renorm(**bad)
    with pytest.raises(InputError, match="must be a Renorm"):
        bn.BatchNorm1d(3, renorm=True)
    with pytest.raises(InputError, match="needs running statistics"):
        bn.BatchNorm1d(3, renorm=bn.Renorm(), track_running_stats=False)


def test_ensembles_under_vmap_are_the_layers_one_by_one():
    layers = [bn.BatchNorm1d(3, renorm=bn.Renorm(r_max=2, d_max=1, warmup=0)) for _ in range(4)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    parameters, buffers = torch.func.stack_module_state(layers)
    x, slope = torch.randn(8, 3), torch.arange(3.0)

    def loss(parameters, buffers, x):
        y = torch.func.functional_call(layers[0], (parameters, buffers), (x,))
        return (y * slope).sin().sum()

    gradients, dx = torch.vmap(torch.func.grad(loss, (0, 2)), (0, 0, None))(parameters, buffers, x)
    for k, layer in enumerate(layers):
        alone = copy.deepcopy(layer)
        mine = x.clone().requires_grad_()
        (alone(mine) * slope).sin().sum().backward()
        torch.testing.assert_close(gradients["weight"][k], alone.weight.grad)
        torch.testing.assert_close(dx[k], mine.grad)
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(buffers[name][k], buffer)
