"""The network and the data of a trial: the same initial weights with and without batch norm."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import Standardize, convert, insert
from batchnorm.errors import DataError, InputError
from batchnorm.lab.settings import Config
from batchnorm.surgery.layers import ScaleShift
from batchnorm.surgery.plan import replace_module
from batchnorm.training.datasets import Dataset, load_data, make_data
from batchnorm.training.networks import BUILT_IN, build_network, call_with_offered
from batchnorm.training.procedure2 import check_output
from batchnorm.undo import in_mode


class Task:
    """What one seed of an experiment works on.

    Args:
        experiment: its name, for messages.
        config: with the network and the data.
        seed: of the data's split, the initial weights, and the order of the batches.

    Raises:
        InputError, DataError: a network or data that cannot be had, or data smaller than a batch.
    """

    def __init__(self, experiment: str, config: Config, seed: int) -> None:
        self.experiment, self.config, self.seed = experiment, config, seed
        self.data = _data(config.data, seed)
        if not isinstance(self.data.x_train, Tensor) or self.data.task != "classification":
            raise DataError(f"lab {experiment}: experiments need classes, and data that fits in memory as a whole.")
        if len(self.data.x_train) < config.batch_size:
            raise DataError(
                f"lab {experiment}: {len(self.data.x_train)} training samples do not make one batch of "
                f"{config.batch_size}; give a smaller batch_size."
            )

    @property
    def example(self) -> Tensor:
        """A few training samples."""
        examples: Tensor = self.data.x_train[:8]
        return examples

    def normalized(self, placement: str = "before_activation", **options: Any) -> nn.Module:
        """The network with batch norm, freshly initialized by the seed; `options` go to every layer of it.

        Raises:
            InputError: a network of the user's has none; the message offers `insert`.
        """
        net, has_own = self._build()
        if not has_own:
            if not (self.config.insert or self.config.network in BUILT_IN):
                raise InputError(
                    f"lab {self.experiment}: the network has no batch normalization, which this experiment needs. "
                    "Put it in with bn.insert(net, example) in your factory, or let the lab do it: insert=True "
                    "(--insert on the command line)."
                )
            insert(net, self.example, placement=placement)
        elif placement != "before_activation":
            raise InputError(
                f"lab {self.experiment}: the network comes with its own batch normalization, which cannot be placed "
                "elsewhere; give a network without."
            )
        if options:
            convert(net, **options)
        return self._seeded(net)

    def plain(self) -> nn.Module:
        """The same network without, from the same weights: where it has batch norm of its own, with gamma and beta
        alone in its place."""
        net, has_own = self._build()
        return self._seeded(replace_norms(net, _affine_alone) if has_own else net)

    def with_norm(self, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
        """The normalized network with another layer in place of each batch norm layer."""
        return self._seeded(replace_norms(self.normalized(), make))

    @functools.cached_property
    def probe(self) -> str:
        """The module whose output is the input of the last normalized activation, in both networks."""
        with torch.random.fork_rng(devices=[]):
            net, (_, has_own) = self.normalized(), self._build()
        last = [name for name, module in net.named_modules() if isinstance(module, _BatchNorm)][-1]
        return str(last if has_own else last.rpartition(".")[0])

    def _build(self) -> tuple[nn.Module, bool]:
        torch.manual_seed(self.seed)
        shape, classes = self.data.input_shape, self.data.num_classes
        net = build_network(self.config.network, shape, classes, self.config.arguments)
        has_own = any(isinstance(module, _BatchNorm) for module in net.modules())
        if self.data.standardize:
            first = Standardize(shape[0]).fit(self.data.x_train)
            net = nn.Sequential(OrderedDict(standardize=first, network=net))
        if (given := self.config.network) not in BUILT_IN:
            with torch.random.fork_rng(devices=[]):
                name = given if isinstance(given, str) else getattr(given, "__qualname__", type(given).__name__)
                check_output(name, net, self.example, self.data)
        return net, has_own

    def _seeded(self, net: nn.Module) -> nn.Module:
        torch.manual_seed(self.seed)  # dropout draws the same in every arm
        return in_mode(net, True)


def replace_norms(net: nn.Module, make: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """Puts ``make(layer)`` in place of every batch norm layer, in place."""
    if isinstance(net, _BatchNorm):
        return make(net)
    for layer in [m for m in net.modules() if isinstance(m, _BatchNorm)]:
        replace_module(net, layer, make(layer))
    return net


def _affine_alone(layer: _BatchNorm) -> nn.Module:
    size = layer.num_features
    return ScaleShift(
        torch.zeros(size),
        torch.ones(size),
        torch.zeros(size),
        activation=getattr(layer, "activation", None),
        channels_last=getattr(layer, "channels_last", False),
    )


def _data(given: Any, seed: int) -> Dataset:
    if isinstance(given, Dataset):
        return given
    if isinstance(given, str):
        return _load(given, seed)
    return make_data(call_with_offered(given, {"seed": seed}, "data") if callable(given) else given, seed=seed)


@functools.lru_cache(maxsize=16)
def _load(spec: str, seed: int) -> Dataset:
    return load_data(spec, seed=seed)
