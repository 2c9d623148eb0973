"""Networks with fused layers under torch.compile: one graph, gradients of eager mode, no reordering around layers."""

import copy
import re

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.utils import run_and_get_code

import batchnorm as bn


class Residual(nn.Module):
    """activation(BN(convolution) + shortcut): the last activation has a derivative of two values."""

    def __init__(self, activation: str, options: dict[str, object]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(3, 8, 1)
        self.inner = bn.BatchNorm2d(8, activation=activation, **options)
        self.outer = bn.BatchNorm2d(8, activation=activation, **options)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.inner(self.first(x)).sin())
        return self.last(self.outer(y.cos(), self.shortcut(x)))  # y.cos() can be made again in the backward


def gradients(run: nn.Module, net: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and all gradients of a step."""
    net.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = run(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters())]


def test_compiled_layers_call_the_operators_of_this_package():
    """Every torch compiles them; in one, Dynamo says of every compilation that it is an export."""
    found: list[str] = []

    def backend(graph, inputs):
        def note(module, _):
            found.extend(str(node.target) for node in module.graph.nodes if "batchnorm" in str(node.target))
            return make_boxed_func(module.forward)

        return aot_module_simplified(graph, inputs, fw_compiler=note, bw_compiler=note)

    torch.compiler.reset()
    net = torch.compile(Residual("relu", {}), fullgraph=True, backend=backend)
    net(torch.randn(4, 3, 48, 48)).sum().backward()  # beyond what is left to compilers
    assert found.count("batchnorm.forward.default") == found.count("batchnorm.backward.default") == 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["planar", "interleaved"])
@pytest.mark.parametrize("options", [{}, {"ghost_size": 2}, {"channel_groups": 2}], ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu"])
def test_residuals_compile_whole(activation, options, order, training):
    net = Residual(activation, options).double().train(training)
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64).contiguous(memory_format=order)
    eager = copy.deepcopy(net)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, net, x), gradients(eager, eager, x))
    torch.testing.assert_close(net.state_dict(), eager.state_dict())


@pytest.mark.slow
def test_inductor_gives_layers_the_order_of_convolutions():
    """It lays convolutions out channels last on the CPU. Our layers take that as it is, and so their neighbours do."""
    net = Residual("relu", {})
    x = torch.randn(4, 3, 48, 48)  # beyond what is left to compilers
    eager = copy.deepcopy(net)
    torch.compiler.reset()
    found, written = run_and_get_code(gradients, torch.compile(net, fullgraph=True), net, x)
    torch.testing.assert_close(found, gradients(eager, eager, x), atol=1e-5, rtol=1e-4)
    claims = (  # the second name since torch 2.14
        r"assert_(?:size_stride|tensor_metadata)\(\w+, \(4, 8, 48, 48\), \((.*?)\), (?:torch.float32, )?"
        r"'torch.ops.batchnorm.(\w+).default'\)"
    )
    strides = [(name, numbers.split(", ")[1]) for code in written for numbers, name in re.findall(claims, code)]
    assert sorted(set(strides)) == [("backward", "1"), ("forward", "1")]
    assert len(strides) == 5  # one output of each forward, dx of each backward, one gradient of a residual
