"""The built-in networks, and factories of the user's."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from batchnorm.errors import DataError, InputError
from batchnorm.training.networks import build_network, load_weights


def test_figure1_is_the_network_of_the_paper():
    network = build_network("figure1", (1, 28, 28), 10)
    widths = [m.weight.shape for m in network.modules() if isinstance(m, nn.Linear)]
    assert widths == [(100, 784), (100, 100), (100, 100), (10, 100)]
    assert sum(isinstance(m, nn.Sigmoid) for m in network.modules()) == 3


@pytest.mark.parametrize(("spec", "shape"), [("figure1", (7,)), ("figure1", (3, 5, 5)), ("convnet", (2, 8, 9))])
def test_built_in_networks_fit_the_data(spec, shape):
    assert build_network(spec, shape, 4)(torch.randn(3, *shape)).shape == (3, 4)


@pytest.mark.parametrize("shape", [(7,), (1, 3, 8)])
def test_convnet_says_what_it_cannot_take(shape):
    with pytest.raises(InputError, match="network convnet: it takes images"):
        build_network("convnet", shape, 4)


@pytest.fixture
def factory(monkeypatch):
    """Puts a function behind 'given:make' and builds with it."""

    def put(function):
        module = types.ModuleType("given")
        module.make = function
        monkeypatch.setitem(sys.modules, "given", module)
        return build_network("given:make", (3, 4, 5), 6)

    return put


def test_a_factory_gets_the_arguments_that_it_names(factory):
    given = []

    def keep(network=nn.Identity, **arguments):
        given.append(arguments)
        return nn.Identity()

    factory(lambda: keep())
    factory(lambda num_classes, depth=3: keep(num_classes=num_classes, depth=depth))
    factory(lambda **arguments: keep(**arguments))
    assert given[0] == {}
    assert given[1] == {"num_classes": 6, "depth": 3}
    offered = {"num_features": 60, "in_channels": 3, "input_shape": (3, 4, 5), "num_classes": 6}
    assert given[2] == offered


def test_a_module_class_is_a_factory(factory):
    class Net(nn.Linear):
        def __init__(self, num_features, num_classes):
            super().__init__(num_features, num_classes)

    assert factory(Net).weight.shape == (6, 60)


def failing():
    raise RuntimeError("no luck")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: "network", "returned str, expected a torch.nn.Module"),
        (lambda width: nn.Identity(), "its argument 'width' has no default"),
        (failing, r"RuntimeError: no luck, at .*test_networks\.py:\d+"),
    ],
)
def test_what_is_no_factory_is_refused(factory, function, message):
    with pytest.raises(InputError, match=f"network given:make: .*{message}"):
        factory(function)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("figure2", "unknown, expected figure1, convnet, lstm or package.module:factory"),
        (":make", "unknown"),
        ("nothing_here:make", "module nothing_here cannot be imported"),
        ("math:make", "make does not exist in module math"),
    ],
)
def test_unknown_networks_are_named(spec, message):
    with pytest.raises(InputError, match=message):
        build_network(spec, (4,), 2)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_come_back(tmp_path, suffix):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pt" else save_file)(source.state_dict(), path)
    load_weights(target, path)
    assert torch.equal(source.weight, target.weight)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "other.pt")
    torch.save(nn.Linear(3, 2), tmp_path / "whole.pt")  # a pickle of a module, not a state dict
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    for name in ("other.pt", "whole.pt", "cut.safetensors", "missing.pt"):
        with pytest.raises(DataError, match=name):
            load_weights(nn.Linear(3, 2), tmp_path / name)
