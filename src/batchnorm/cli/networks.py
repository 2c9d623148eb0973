"""Networks that a command is given, and the files that it writes of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from batchnorm.cli.options import sizes_of
from batchnorm.errors import InputError
from batchnorm.training.config import SEED

if TYPE_CHECKING:
    from torch import Tensor, nn


def build(network: str, sample_shape: tuple[int, ...], num_classes: int | None, weights: Path | None) -> nn.Module:
    """The network of a factory, with the weights of a file where one is given."""
    from batchnorm.training.networks import build_network, load_weights

    net = build_network(network, sample_shape, num_classes)
    if weights is not None:
        load_weights(net, weights)
    return net


def build_with_example(network: str | None, shape: str | None, weights: Path | None) -> tuple[nn.Module, Tensor]:
    """The network, and a random example of `shape`."""
    assert network is not None
    assert shape is not None
    sizes = sizes_of("--shape", shape)
    net = build(network, tuple(sizes[1:]), None, weights)

    import torch

    return net, torch.randn(sizes, generator=torch.Generator().manual_seed(SEED))


def save(net: nn.Module, out: Path, example: Tensor | None = None) -> None:
    """Write a network (weights alone without an example), and say so."""
    from batchnorm.training.export import save_network, save_weights

    if example is None:
        save_weights(net, out)
    else:
        save_network(net, example, out)
    typer.echo(f"Written: {out}")


def write(out: Path, content: bytes) -> None:
    """Write a file under a temporary name first, and say so."""
    from batchnorm.training.files import write_atomically

    try:
        write_atomically(out, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        raise InputError(f"{out}: it cannot be written ({error}).") from error
    typer.echo(f"Written: {out}")
