"""Domains: which set of running statistics a network uses now."""

from __future__ import annotations

from typing import Any

from torch import nn

from batchnorm.errors import InputError
from batchnorm.nn.batch_norm import BatchNorm
from batchnorm.undo import Attributes


class use_domain:  # noqa: N801 - a function that is also a context manager
    """Use set ``index`` of the running statistics in every layer of ``net`` made with ``domains=``.

    It holds at once and until it is called again; as the expression of a ``with``, until the end of the body. Training
    updates the chosen domain's statistics, evaluation normalizes by them; gamma and beta are common. In training mode
    each forward is normalized by its own batch, so two forwards of different domains may come before one backward.

    Args:
        net: a network, also one wrapped in DistributedDataParallel or compiled; layers without domains are left alone.
        index: of the domain, from 0.

    Raises:
        InputError: no layer with domains, or one that has no such domain. Nothing is changed.

    Source: Chang et al. 2019, Domain-specific batch normalization.

    Examples:
        >>> import torch
        >>> from batchnorm import BatchNorm1d
        >>> net = nn.Sequential(BatchNorm1d(1, domains=2))
        >>> with use_domain(net, 1):
        ...     _ = net(torch.tensor([[1.0], [3.0]]))
        >>> net[0].domain, net[0].running_mean.flatten()
        (0, tensor([0.0000, 0.2000]))
    """

    def __init__(self, net: nn.Module, index: int) -> None:
        if not isinstance(net, nn.Module):
            raise InputError(f"use_domain: got a {type(net).__name__}; expected a torch.nn.Module")
        layers = {name: m for name, m in net.named_modules() if isinstance(m, BatchNorm) and m.domains}
        if not layers:
            raise InputError(
                f"use_domain: {type(net).__name__} has no layer with domains; make them with bn.convert(net, domains=2)"
            )
        for name, layer in layers.items():
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < layer.domains:
                raise InputError(
                    f"use_domain: layer {name!r} has domains 0 to {layer.domains - 1}, got {index!r}. "
                    "Nothing was changed"
                )
        self._before = Attributes(layers.values(), "domain")
        for layer in layers.values():
            layer.domain = index

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        self._before.restore()
