"""Networks that a command is given, and the files that it writes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from batchnorm.cli.options import assignments, sizes_of
from batchnorm.errors import BatchNormError, InputError, message_of
from batchnorm.memory import is_exhausted
from batchnorm.training.config import SEED
from batchnorm.writing import write_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from batchnorm.training.datasets import Inputs


@dataclass(frozen=True)
class Given:
    """Which network a command is given: a factory with weights and arguments, or a run.

    Raises:
        InputError: neither of them, or both.
    """

    command: str
    network: str | None
    run: Path | None
    weights: Path | None = None
    arguments: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if (self.network is None) == (self.run is None):
            raise InputError(f"{self.command}: give either --network or --run.")
        if self.run is not None and (self.weights is not None or self.arguments):
            raise InputError(f"{self.command}: --weights and --set go with --network; a run has its own.")

    def with_inputs_of(
        self, data: str | None, labels: str | None, seed: int, *, any_labels: bool = False
    ) -> tuple[nn.Module, Inputs]:
        """The network, and the samples of the data, or those of the run; other data is prepared as that of the run.

        What was done to the data is told. `any_labels`: as of `load_inputs`.
        """
        if self.run is None:
            from batchnorm.training.datasets import load_inputs

            if data is None:
                raise InputError(f"{self.command}: --network needs --data.")
            inputs = load_inputs(data, seed=seed, labels=labels, any_labels=any_labels)
            network = self.build(inputs.input_shape, inputs.num_classes)
        else:
            from batchnorm.training import load_run

            held = load_run(self.run)
            chosen: dict[str, Any] = {} if data is None else {"labels": labels, "seed": seed}
            inputs = held.load_inputs(data, any_labels=any_labels, **chosen)
            network = held.network
            if inputs.input_shape != tuple(held.example.shape[1:]):
                raise InputError(
                    f"{self.command}: the samples have shape {inputs.input_shape}, those of the run "
                    f"{tuple(held.example.shape[1:])}."
                )
        import torch

        from batchnorm.training.networks import outline

        output = self.tried(network, inputs.x[torch.arange(min(2, len(inputs.x)))])
        if inputs.y is not None and self.command == "diagnose" and not isinstance(output, torch.Tensor):
            typer.echo(f"Loss and accuracy are left out: the network returns {outline(output)}, no tensor.", err=True)
        for note in inputs.notes:
            typer.echo(note, err=True)
        return network, inputs

    def build(self, sample_shape: tuple[int, ...], num_classes: int | None) -> nn.Module:
        """The network of the factory, with the weights of a file where one is given."""
        from batchnorm.training.networks import build_for_weights

        assert self.network is not None
        chosen = assignments(self.arguments) or {}
        return build_for_weights(self.network, sample_shape, num_classes, self.weights, chosen)

    def with_example(self, shape: str | None) -> tuple[nn.Module, Tensor]:
        """The network, and a random example of `shape`, or of the run's samples."""
        if self.run is not None:
            from batchnorm.training import load_run

            held = load_run(self.run)
            return held.network, held.example
        assert shape is not None
        sizes = sizes_of("--shape", shape)
        net = self.build(tuple(sizes[1:]), None)

        import torch

        example = torch.randn(sizes, generator=torch.Generator().manual_seed(SEED))
        self.tried(net, example)
        return net, example

    def tried(self, network: nn.Module, example: Tensor) -> Any:
        """The output in evaluation mode of a network that is about to be used.

        Raises:
            InputError: it does not take the example.
        """
        import torch

        from batchnorm.training.networks import ONE_TENSOR
        from batchnorm.undo import evaluating

        try:
            with evaluating(network), torch.no_grad():
                return network(example)
        except Exception as error:  # the user's own code raises anything
            if isinstance(error, BatchNormError) or is_exhausted(error):
                raise
            raise InputError(
                f"{self.command}: {self.network or self.run}: the network fails on samples of shape "
                f"{tuple(example.shape)} in {example.dtype} ({type(error).__name__}: {message_of(error)}). {ONE_TENSOR}"
            ) from error


def names_argument(network: str, name: str) -> bool:
    """Whether a factory has an argument of that name, which is no option of the layers, too."""
    import inspect

    from batchnorm import BatchNorm2d

    return name not in inspect.signature(BatchNorm2d).parameters and has_argument(network, name)


def has_argument(network: str, name: str) -> bool:
    """Whether a factory takes an argument of that name."""
    import inspect

    from batchnorm.training.networks import load_callable

    if ":" not in network:
        return False
    factory = load_callable(network, "network", "package.module:factory")
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


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
    write_bytes(out, content)
    typer.echo(f"Written: {out}")
