"""What a layer is for in its network, read off the data flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from batchnorm.surgery.flow import DataFlow, data_inputs, operation
from batchnorm.surgery.frozen import is_frozen_layer

_NORM_MODULES = (
    _NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)
_NORM_CALLS = {
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "local_response_norm",
    "rms_norm",
}
_NO_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)
_ACTIVATION_CALLS = {
    "celu",
    "elu",
    "gelu",
    "glu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "logsigmoid",
    "mish",
    "prelu",
    "relu",
    "relu6",
    "rrelu",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "softshrink",
    "softsign",
    "tanh",
    "tanhshrink",
    "threshold",
}
_GATES = {"sigmoid", "hardsigmoid", "softmax", "tanh"}
_GATE_MODULES = (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Tanh)
_PRODUCTS = {"baddbmm", "bmm", "einsum", "matmul", "scaled_dot_product_attention"}
_WEIGHTED_CALLS = _PRODUCTS | {
    "addmm",
    "bilinear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "embedding",
    "linear",
    "mm",
}


def is_normalization(flow: DataFlow, node: fx.Node) -> bool:
    module = flow.module(node)
    if module is not None:
        return isinstance(module, _NORM_MODULES) or is_frozen_layer(module)
    return node.op.startswith("call") and operation(node) in _NORM_CALLS


def is_activation(flow: DataFlow, node: fx.Node) -> bool:
    """Whether a node is an elementwise nonlinearity."""
    module = flow.module(node)
    if module is not None:
        return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, _NO_ACTIVATIONS)
    return node.op.startswith("call") and operation(node) in _ACTIVATION_CALLS


def is_weighted(flow: DataFlow, node: fx.Node) -> bool:
    """Whether a node mixes its input's features by weights: linear, convolution, recurrent, ..."""
    module = flow.module(node)
    if module is not None:
        return not is_normalization(flow, node) and any(p.dim() > 1 for p in module.parameters())
    return (
        node.op.startswith("call")
        and operation(node) in _WEIGHTED_CALLS
        and any(is_constant(source) for source in node.all_input_nodes)
    )


def is_constant(node: fx.Node) -> bool:
    """Whether a value depends on the network's parameters and buffers alone."""
    if node.op == "get_attr":
        return True
    sources = node.all_input_nodes
    return node.op.startswith("call") and bool(sources) and all(map(is_constant, sources))


def reach(
    node: fx.Node,
    following: Callable[[fx.Node], list[fx.Node]],
    ends: Callable[[fx.Node], bool],
) -> Iterator[fx.Node]:
    """All nodes reached from ``node`` (itself left out); behind one that ``ends`` nothing is."""
    seen, waiting = set[fx.Node](), following(node)
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        yield current
        if not ends(current):
            waiting += following(current)


def users(node: fx.Node) -> list[fx.Node]:
    return list(node.users)


def is_output_layer(flow: DataFlow, node: fx.Node) -> bool:
    """No layer with weights comes after it."""
    return not any(is_weighted(flow, n) for n in reach(node, users, lambda n: False))


def is_normalized(flow: DataFlow, node: fx.Node) -> bool:
    """Every way from the layer to the next one with weights, or to the output, is normalized."""
    ends: list[fx.Node] = [
        n
        for n in reach(node, users, lambda n: is_normalization(flow, n) or is_weighted(flow, n))
        if is_normalization(flow, n) or is_weighted(flow, n) or n.op == "output"
    ]
    return bool(ends) and all(is_normalization(flow, n) for n in ends)


def is_attention(flow: DataFlow, node: fx.Node) -> bool:
    """The layer makes or takes a product of two activations: query, key, value, their projection,
    a gate, or what only gates are computed from (squeeze and excite)."""

    def ends(n: fx.Node) -> bool:
        return is_normalization(flow, n) or is_weighted(flow, n) or is_activation(flow, n)

    def is_product(n: fx.Node) -> bool:
        return n.op.startswith("call") and operation(n) in _PRODUCTS and not is_weighted(flow, n)

    if any(map(is_product, reach(node, data_inputs, ends))):
        return True
    if any(map(is_product, reach(node, users, ends))) or _is_gate(flow, node):
        return True
    after = [n for n in reach(node, users, partial(is_weighted, flow)) if is_weighted(flow, n)]
    return bool(after) and all(_is_gate(flow, n) for n in after)


def _is_gate(flow: DataFlow, node: fx.Node) -> bool:
    """Squashed into a factor of a value that does not come from the layer itself."""

    def is_squash(n: fx.Node) -> bool:
        module = flow.module(n)
        if module is not None:
            return isinstance(module, _GATE_MODULES)
        return n.op.startswith("call") and operation(n) in _GATES

    def ends(n: fx.Node) -> bool:
        return is_weighted(flow, n) or is_normalization(flow, n)

    own = {node, *reach(node, users, ends)}
    to_squash = {node, *reach(node, users, lambda n: ends(n) or is_squash(n))}
    return any(
        factor.op.startswith("call")
        and operation(factor) == "mul"
        and any(source not in own for source in data_inputs(factor))
        for squash in filter(is_squash, to_squash)
        for factor in squash.users
    )


def is_layer(module: nn.Module | None) -> bool:
    """Linear and convolution layers, before which a bias and after which BN make sense."""
    return isinstance(module, (nn.Linear, _ConvNd))
