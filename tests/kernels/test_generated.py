"""Formulas for compilers: as exact as operators, for small inputs alone, and the same network around them."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import aot_module_simplified

import batchnorm as bn
from batchnorm.kernels import aten
from batchnorm.ops import generated
from batchnorm.ops.fusion import Fusion
from batchnorm.ops.schemas import ACTIVATIONS
from operator_contract import assert_within_budget

EPS, SLOPE = 1e-5, 0.01


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, dy, gamma and beta; each channel of x has a mean and a spread of its own."""
    generator = torch.Generator().manual_seed(seed)
    channels = (1, shape[1], *(1,) * (len(shape) - 2))
    spread, mean = (torch.randn(channels, generator=generator) for _ in range(2))
    x = torch.randn(shape, generator=generator) * spread.exp() + 5 * mean
    dy = torch.randn(shape, generator=generator)
    weight, bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    return x.to(dtype), dy.to(dtype), weight, bias


def torchs(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, activation: str) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = nn.functional.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.0, EPS)
    y = aten.activate(y, activation, SLOPE)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(8, 700), (40, 300), (500, 100), (16, 50, 13), (4, 60, 9, 15), (2, 90, 3, 5, 7)])
def test_results_are_off_by_one_rounding_more_than_those_of_torch(shape, dtype, activation):
    x, dy, weight, bias = drawn(shape, dtype)
    fusion = Fusion(weight, bias, None, EPS, activation, SLOPE)
    y, mean, var = generated.forward(x, fusion)
    gate = y if generated.gates_by_output(x, activation) else None
    dx, _, d_weight, d_bias = generated.gradients(dy, x, mean, var, gate, fusion, False)
    truth = torchs(*(t.double() for t in (x, weight, bias, dy)), activation)
    peer = torchs(x, weight, bias, dy, activation)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    factor = (weight.double() * torch.rsqrt(var[0] + EPS)).reshape(-1, *(1,) * (x.ndim - 2))
    row = mean[0].reshape(-1, *(1,) * (x.ndim - 2))
    terms = [
        torch.maximum(((x - row) * factor).abs(), bias.double().abs().reshape(row.shape)),
        (dy.double() * factor).abs(),
        (dy.double() * (x - row)).abs().sum(axes) * torch.rsqrt(var[0] + EPS),
        dy.double().abs().sum(axes),
    ]
    for name, ours, true, their, term in zip(
        ("y", "dx", "d_gamma", "d_beta"), (y, dx, d_weight.float(), d_bias.float()), truth, peer, terms, strict=True
    ):
        assert_within_budget(ours, true, their, terms=term, name=name)
    wide = x.double()
    torch.testing.assert_close(mean[0], wide.mean(axes), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(var[0], wide.var(axes, correction=0), rtol=1e-11, atol=1e-13)


def test_a_constant_channel_gives_beta():
    x = torch.tensor([0.1, -3e4, 7.7e-9, 123456.0]).expand(37, 4).contiguous()
    bias = torch.randn(4)
    y, mean, var = generated.forward(x, Fusion(torch.randn(4), bias))
    assert torch.equal(y, bias.expand_as(y))
    assert torch.equal(mean[0], x[0].double())
    assert not var.any()


def called(layer: nn.Module, x: Tensor) -> set[str]:
    """The operators of this package in the forward and in the backward graph of one step."""
    found: set[str] = set()

    def note(module, _):
        found.update(str(node.target) for node in module.graph.nodes if "batchnorm." in str(node.target))
        return make_boxed_func(module.forward)

    def backend(graph, inputs):
        return aot_module_simplified(graph, inputs, fw_compiler=note, bw_compiler=note)

    torch.compiler.reset()
    torch.compile(layer, fullgraph=True, backend=backend)(x).float().sum().backward()
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("x", "operators"),
    [
        (torch.zeros(512, 128), False),
        (torch.zeros(512, 129), True),
        (torch.zeros(64, 128).bfloat16(), False),
        (torch.zeros(64, 129).half(), True),
        (torch.zeros(8, 4).double(), True),
    ],
    ids=["small", "large", "small of 16 bits", "large of 16 bits", "float64"],
)
def test_small_inputs_alone_are_left_to_the_compiler(x, operators, training):
    layer = bn.BatchNorm1d(x.shape[1]).to(x.dtype).train(training)
    found = called(layer, x.requires_grad_())
    first = "forward" if training else "normalize"
    assert found == ({f"batchnorm.{name}.default" for name in (first, "backward")} if operators else set())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "x",
    [torch.randn(7, 33).t(), torch.randn(4, 9, 5).transpose(1, 2), torch.randn(3, 4, 6, 8)[..., ::2]],
    ids=["transposed", "time before channels", "every other column"],
)
def test_inputs_in_another_order_have_the_outputs_of_eager_mode(x, training):
    """Formulas keep the order of x, and a network that views the output would end in an error."""
    layer = {2: bn.BatchNorm1d, 3: bn.BatchNorm1d, 4: bn.BatchNorm2d}[x.ndim](x.shape[1], activation="relu")
    eager = copy.deepcopy(layer.train(training))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer(x).view(-1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), eager(x).view(-1))


def test_pools_within_the_batch_are_left_to_the_operators():
    found = called(bn.BatchNorm1d(6, ghost_size=4), torch.randn(8, 6, requires_grad=True))
    assert "batchnorm.forward.default" in found


def step(
    run: nn.Module, layer: nn.Module, x: Tensor, residual: Tensor | None, counted: Tensor | float = 1.0
) -> list[Tensor]:
    """Output and gradients, of a loss that has a weight for each element and takes only those that are counted."""
    layer.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    given = (x,) if residual is None else (x, residual.clone().requires_grad_())
    y = run(*given)
    (y.float() * torch.linspace(-1, 2, y.numel()).reshape(y.shape) * counted).sum().backward()
    return [y.detach(), *(t.grad for t in given), *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["planar", "interleaved"])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_layers_do_what_eager_ones_do(activation, training, has_residual, order, dtype):
    torch.manual_seed(0)
    layer = bn.BatchNorm2d(5, activation=activation).train(training)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.running_var.add_(torch.rand(5))
    x = (torch.randn(6, 5, 4, 7) + 2).to(dtype).contiguous(memory_format=order)
    residual = torch.randn(6, 5, 4, 7).to(dtype).contiguous(memory_format=order) if has_residual else None
    eager = copy.deepcopy(layer)
    with torch.no_grad():
        linear = copy.deepcopy(layer).double()
        linear.activation = None
        z = linear(x.double(), None if residual is None else residual.double())
    # Near a kink rounding decides on which side a value lies; without its library eager code rounds twice.
    near = 1e-3 if dtype == torch.float32 else 0.03
    kinks = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}.get(activation, ())
    counted = torch.stack([torch.ones_like(z, dtype=torch.bool), *((z - kink).abs() > near for kink in kinks)]).all(0)
    assert counted.float().mean() > 0.9
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close = {"rtol": 5e-5, "atol": 5e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for _ in range(2):
        found, expected = (step(*each, x, residual, counted) for each in ((compiled, layer), (eager, eager)))
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        assert found[0].stride() == expected[0].stride()
        torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str)
def test_compiled_layers_with_options_do_what_eager_ones_do(options):
    layer = bn.BatchNorm1d(9, **options)
    eager = copy.deepcopy(layer)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for k in range(3):
        x = torch.randn(11, 9) + k
        torch.testing.assert_close(step(compiled, layer, x, None), step(eager, eager, x, None), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "relu6", "gelu"])
def test_inductor_generates_code_as_exact(activation):
    x, dy, weight, bias = drawn((60, 300), torch.float32)
    layer = bn.BatchNorm1d(300, activation=activation)
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    torch.compiler.reset()
    given = x.clone().requires_grad_()
    y = torch.compile(layer, fullgraph=True)(given)
    y.backward(dy)
    truth = torchs(*(t.double() for t in (x, weight, bias, dy)), activation)
    found = [y.detach(), given.grad, layer.weight.grad, layer.bias.grad]
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=3e-6 * true.abs().max().item())
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0), rtol=1e-6, atol=1e-7)
    assert layer.num_batches_tracked == 1


def test_batches_of_other_sizes_need_one_more_graph_at_most():
    layer, counter = bn.BatchNorm1d(64, activation="relu"), CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for n in (5, 9, 300, 77, 900):
        compiled(torch.randn(n, 64))
    assert counter.frame_count == 1
    for n in (1100, 4000, 6):
        compiled(torch.randn(n, 64))
    assert counter.frame_count == 2
