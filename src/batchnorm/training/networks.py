"""The built-in networks, and networks from a factory of the user's."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.errors import DataError, InputError, message_and_place
from batchnorm.nn import recurrent
from batchnorm.population.state_dicts import as_tensor, load_state, read_state, renamed_state, state_dicts
from batchnorm.training.files import CONFIG
from batchnorm.undo import evaluating

ONE_TENSOR = (
    "A network gets one tensor, the samples of a batch; if yours takes something else, let the factory return a module "
    "whose forward makes it of that tensor."
)
ALIAS = "num_outputs"  # another name of num_classes: offered where it is asked for by name alone
ANY_CLASSES = 10  # where neither data nor arguments say; weights tell the right number


def figure1(num_features: int = 784, num_classes: int = 10) -> nn.Sequential:
    """The network of Figure 1 in Ioffe & Szegedy (2015): three hidden layers of 100 sigmoids.

    Weights start Gaussian with the variance 2/(inputs + outputs) (Glorot & Bengio 2010), biases
    at 0; the paper says "small random Gaussian values" (section 4.1) and gives no spread, so this
    one is our choice. Takes (N, *shape) with prod(shape) == num_features.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    width = num_features
    for _ in range(3):
        layers += [_gaussian_linear(width, 100), nn.Sigmoid()]
        width = 100
    return nn.Sequential(*layers, _gaussian_linear(width, num_classes))


def convnet(in_channels: int = 1, num_classes: int = 10) -> nn.Sequential:
    """Three 3x3 convolutions with ReLU (16, 32, 64 channels), average pooled, and a linear layer.

    torch's own initial weights. Takes (N, in_channels, H, W) with H, W >= 4.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


class SequenceClassifier(nn.Module):
    """A recurrent layer over a sequence, and a linear layer from its last state to the classes.

    Takes sequences (N, T, C), whose frames of zeros at the end are padding; or images (N, 1, H, W) row by row, where
    none is.

    Args:
        layer: `torch.nn.LSTM` or this package's, with ``batch_first=True`` and one direction.
        num_classes: of the output.
        padded: whether zeros at the end are padding.
        counts_padding: whether what normalizes in training takes padding for frames: what a mask is there to avoid.
    """

    def __init__(self, layer: nn.RNNBase, num_classes: int, *, padded: bool, counts_padding: bool = False) -> None:
        super().__init__()
        self.recurrent = layer
        self.classes = nn.Linear(layer.hidden_size, num_classes)
        self.padded = padded
        self.counts_padding = counts_padding

    def forward(self, x: Tensor) -> Tensor:
        if not self.padded:
            found = self.recurrent(x.squeeze(1))
            return self.classes(found[0][:, -1])  # type: ignore[no-any-return]
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)
        frames = ((x != 0).any(2).long() * steps).amax(1).clamp(min=1)
        # A frame does not see those after it, so only normalization needs to know of padding.
        masked = any(self.recurrent.children()) and not self.counts_padding
        found = self.recurrent(x, lengths=frames) if masked else self.recurrent(x)
        last = (frames - 1)[:, None, None].expand(-1, 1, self.recurrent.hidden_size)
        return self.classes(found[0].gather(1, last).squeeze(1))  # type: ignore[no-any-return]

    def with_batch_norm(self, **options: Any) -> SequenceClassifier:
        """A copy with batch normalization in its recurrent layer, from the same weights; options as of `LSTM`."""
        made = copy.deepcopy(self)
        old = self.recurrent
        sizes = (old.input_size, old.hidden_size, old.num_layers)
        made.recurrent = recurrent.LSTM(*sizes, batch_first=True, **options)
        made.recurrent.load_state_dict(old.state_dict())
        return made


def lstm(input_shape: tuple[int, ...], num_classes: int = 10, hidden_size: int = 100) -> SequenceClassifier:
    """A long short-term memory of 100 units over a sequence (T, C), or over the rows of an image (1, H, W).

    torch's own initial weights; see `SequenceClassifier`.
    """
    return SequenceClassifier(
        nn.LSTM(input_shape[-1], hidden_size, batch_first=True), num_classes, padded=len(input_shape) == 2
    )


BUILT_IN: dict[str, Callable[..., nn.Module]] = {"figure1": figure1, "convnet": convnet, "lstm": lstm}


def modules_called(network: nn.Module, example: Tensor) -> list[nn.Module]:
    """The modules that a forward pass in evaluation mode calls, in the order in which their calls end.

    Args:
        network: it is left as it was.
        example: a batch that it takes.

    Returns:
        A module once for each call, the network itself at the end.
    """
    called: list[nn.Module] = []
    hooks = [m.register_forward_hook(lambda module, args, output: called.append(module)) for m in network.modules()]
    try:
        with evaluating(network), torch.no_grad():
            network(example)
    finally:
        for hook in hooks:
            hook.remove()
    return called


class Rescale(nn.Module):
    """Outputs in the units of the targets: y = x * std + mean; the last layer of a network for regression.

    Args:
        mean, std: of each target over the training part, (K,).
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), -1)
        return x * self.std + self.mean  # type: ignore[operator]


def build_network(
    spec: str | Callable[..., nn.Module],
    sample_shape: tuple[int, ...],
    num_classes: int | None,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The network that `spec` names, for samples of `sample_shape` and `num_classes` classes.

    A factory, or the one that "package.module:factory" names, is called with those of these keyword arguments that its
    signature names (all of them if it takes **kwargs): `num_features` (prod of the sample's
    shape), `in_channels` (its first axis), `input_shape`, `num_classes` and `num_outputs` (unless these are None). It
    returns a torch.nn.Module that maps (N, *input_shape) to logits (N, num_classes). `arguments` are given to it, too,
    and go before what is offered.

    Raises:
        InputError: there is no such network or factory, it asks for an argument that is not
            offered, it raised, or it did not return a module.
    """
    offered: dict[str, Any] = {
        "num_features": math.prod(sample_shape),
        "in_channels": sample_shape[0] if sample_shape else 1,
        "input_shape": sample_shape,
    }
    if num_classes is not None:
        offered |= {"num_classes": num_classes, "num_outputs": num_classes}
    if isinstance(spec, nn.Module):
        raise _not_a_factory("network", spec)
    if not isinstance(spec, str):
        factory = spec
        spec = getattr(factory, "__qualname__", repr(factory))
    elif spec in BUILT_IN:
        if spec == "convnet" and len(sample_shape) != 3:
            raise InputError(
                f"network convnet: it takes images (N, C, H, W), the data's samples have shape "
                f"{sample_shape}. Use figure1, or a factory of your own."
            )
        if spec == "convnet" and min(sample_shape[1:]) < 4:
            raise InputError(
                f"network convnet: it takes images of 4x4 or larger, the data's samples have shape "
                f"{sample_shape}. Use figure1, or a factory of your own."
            )
        if spec == "lstm" and not (len(sample_shape) == 2 or (len(sample_shape) == 3 and sample_shape[0] == 1)):
            raise InputError(
                f"network lstm: it takes sequences (N, T, C) or images (N, 1, H, W), the data's samples have shape "
                f"{sample_shape}. Use figure1, or a factory of your own."
            )
        factory = BUILT_IN[spec]
    else:
        factory = load_callable(spec, "network", f"{', '.join(BUILT_IN)} or package.module:factory")
        if isinstance(factory, nn.Module):
            raise _not_a_factory(f"network {spec}", factory)
    network = call_with_offered(factory, offered, f"network {spec}", arguments or {})
    if not isinstance(network, nn.Module):
        raise InputError(f"network {spec}: the factory returned {type(network).__name__}, expected a torch.nn.Module.")
    return network


def _not_a_factory(what: str, network: nn.Module) -> InputError:
    return InputError(f"{what}: got a {type(network).__name__}, expected a factory, a function that returns a new one.")


def build_for_weights(
    spec: str,
    sample_shape: tuple[int, ...],
    num_classes: int | None,
    weights: Path | None,
    arguments: Mapping[str, Any],
) -> nn.Module:
    """The network of a factory with the weights of a file; a number of classes that nobody gave is read off them.

    Raises:
        InputError, DataError: as of `build_network` and `load_weights`.
    """
    if weights is None:
        return build_network(spec, sample_shape, num_classes, arguments)
    state = read_state(weights)
    known = num_classes is not None or any(name in arguments for name in ("num_classes", "num_outputs"))
    network = build_network(spec, sample_shape, num_classes if known else ANY_CLASSES, arguments)
    if not known and (found := _outputs_of(network, state)) not in (None, ANY_CLASSES):
        network = build_network(spec, sample_shape, found, arguments)
    load_weights(network, weights)
    return network


def _outputs_of(network: nn.Module, state: Any) -> int | None:
    """The first size in which weights differ from a network's and agree with one another: that of its last layer."""
    expected = network.state_dict()
    for _, given in state_dicts(state):
        made: Mapping[str, Any] = renamed_state(given, network) or {}
        pairs = [(tensor.shape, as_tensor(made.get(name))) for name, tensor in expected.items()]
        differing = [(mine, given.shape) for mine, given in pairs if isinstance(given, Tensor) and given.shape != mine]
        sizes = {theirs[0] for mine, theirs in differing if len(theirs) and mine[1:] == theirs[1:]}
        if len(sizes) == 1 and all(mine[1:] == theirs[1:] for mine, theirs in differing):
            return int(sizes.pop())
    return None


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a .safetensors file, or a state dict saved by torch; no pickled code is run. See `load_state`.

    Raises:
        DataError: the file cannot be read, or its tensors are not those of the network.
    """
    try:
        load_state(network, path)
    except DataError as error:
        if not (path.parent / CONFIG).is_file():
            raise
        raise DataError(
            f"{error} The file belongs to a run: give --run {path.parent} in place of --network and --weights, which "
            "builds the network as it was trained."
        ) from error


def load_callable(spec: str, role: str, choices: str) -> Callable[..., Any]:
    """Import "package.module:name" and return what it names.

    Raises:
        InputError: the spec has another form, the module cannot be imported, or it has no
            callable of that name.
    """
    module_name, separator, name = spec.partition(":")
    if not (separator and module_name and name):
        raise InputError(f"{role} {spec!r}: unknown, expected {choices}.")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script that is no module parses its arguments, and ends
        raise InputError(
            f"{role} {spec}: module {module_name} cannot be imported ({message_and_place(error)}). "
            "Run from the folder that holds it, or put that folder on PYTHONPATH."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        state = "is not callable" if hasattr(module, name) else "does not exist"
        raise InputError(f"{role} {spec}: {name} {state} in module {module_name}.")
    return found  # type: ignore[no-any-return]


def call_with_offered(
    function: Callable[..., Any], offered: dict[str, Any], what: str, given: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    """Call `function` with those of the `offered` keyword arguments that its signature takes, and with all `given`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature takes none of them
        parameters = {}.values()
    by_keyword = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        taken = {name: value for name, value in offered.items() if name != ALIAS or name in by_keyword}
    else:
        taken = {name: value for name, value in offered.items() if name in by_keyword}
        unknown = [name for name in given if name not in by_keyword]
        if unknown:
            raise InputError(
                f"{what}: it has no argument {unknown[0]!r}; it has {', '.join(sorted(by_keyword)) or 'none'}."
            )
    taken = {**taken, **given}
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in taken
    ]
    if missing:
        raise InputError(
            f"{what}: its argument {missing[0]!r} has no default and is not one that is offered "
            f"({', '.join(offered)}). Give it with --set {missing[0]}=VALUE, or give it a default."
        )
    try:
        return function(**taken)
    except (Exception, SystemExit) as error:
        raise InputError(f"{what}: it raised {message_and_place(error)}.") from error


def outline(output: object) -> str:
    """What a network returned, in a few words: a shape, or the class of what is no tensor."""
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    return "nothing" if output is None else f"an object of type {type(output).__name__}"


def _gaussian_linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
