"""Options that several commands have, and what is read out of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from batchnorm.cli.settings import setting
from batchnorm.errors import InputError

Weights = Annotated[
    Path | None,
    typer.Option(help="Weights of the network: .safetensors, .npz, or a .pt state dict (weights_only)."),
]
OFFERED = (
    "It is called with those of num_features, in_channels, input_shape, num_classes and num_outputs that it names; the "
    "number of classes comes from the data or the weights."
)
Factory = Annotated[str | None, typer.Option(help=f"package.module:factory of the network. {OFFERED}")]
FactoryOrFile = Annotated[
    str | None, typer.Option(help=f"package.module:factory of the network, instead of a file. {OFFERED}")
]
Run = Annotated[
    Path | None,
    typer.Option(help="The folder of a run of `batchnorm train`, instead of --network: its network, weights and data."),
]
Arguments = Annotated[
    list[str] | None, typer.Option("--set", help="An argument of the factory, NAME=VALUE; may be repeated.")
]
Shape = Annotated[
    str | None, typer.Option(help="With --network: shape of an example input, the batch first, as in 2,3,32,32.")
]
TrainingData = Annotated[
    str | None, setting("data", more="Of data with labels the training part is used.", show_default="that of --run")
]
Labels = Annotated[str | None, setting("labels")]
BatchSize = Annotated[int, typer.Option(help="Samples a batch.")]
WeightsOut = Annotated[Path, typer.Option(help="The .safetensors file to write.")]
NetworkOut = Annotated[
    Path,
    typer.Option(help="The file to write: weights (.safetensors) or the network (.pt2, .onnx); a file's own kind."),
]
Archive = Annotated[Path | None, typer.Argument(help="A torch.export archive (.pt2).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")]


def sizes_of(what: str, text: str) -> list[int]:
    """The sizes that "2,3,32,32" names, the batch first."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) < 2 or min(sizes) < 1:
        raise InputError(f"{what} {text!r}: expected sizes like 2,3,32,32, the batch first.")
    return sizes


def assignment(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value a number, true, false, null or text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InputError(f"--set {text!r}: expected NAME=VALUE, as in nonfinite=skip.")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def assignments(texts: Sequence[str] | None) -> dict[str, Any] | None:
    """All of "NAME=VALUE"; None without any."""
    return dict(map(assignment, texts)) if texts else None


def at_least_one(command: str, option: str, value: int) -> None:
    """Complain about a count below 1."""
    if value < 1:
        raise InputError(f"{command}: {option} {value}; expected 1 or more.")


def is_file(
    verb: str,
    file: Path | None,
    kinds: tuple[str, ...],
    network: str | None,
    shape: str | None,
    weights: Path | None,
    out: Path | None = None,
    run: Path | None = None,
) -> bool:
    """Whether a file was given instead of --network or --run; complains about several, none, or another kind."""
    known = " or ".join(kinds)
    if sum(given is not None for given in (file, network, run)) != 1:
        raise InputError(f"{verb}: give either a file ({known}) or --network, or --run.")
    if run is not None and (shape is not None or weights is not None):
        raise InputError(f"{verb}: --shape and --weights go with --network; a run has its own.")
    if file is None:
        if shape is None and run is None:
            raise InputError(f"{verb}: --network needs --shape, the shape of an example input.")
        return False
    if shape is not None or weights is not None:
        raise InputError(f"{verb}: --shape and --weights go with --network; a file has its own.")
    if file.suffix not in kinds or (out is not None and out.suffix != file.suffix):
        raise InputError(
            f"{verb}: {file}: expected {known}" + (f", and --out of the same kind, got {out}." * bool(out))
        )
    return True
