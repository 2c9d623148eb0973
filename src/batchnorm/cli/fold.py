"""`batchnorm fold`: batch norm into its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from batchnorm.cli import options
from batchnorm.cli.networks import Given, save
from batchnorm.errors import InputError

EXAMPLES = """**Examples**

`batchnorm fold --network mymodels:resnet --weights net.safetensors --shape 2,3,32,32 --out folded.onnx`

`batchnorm fold model.onnx --out folded.onnx --inputs samples.npz`

`batchnorm fold model.pt2 --out folded.pt2`
"""


def fold(
    out: options.NetworkOut,
    file: Annotated[Path | None, typer.Argument(help="An .onnx file or a torch.export archive (.pt2).")] = None,
    network: options.FactoryOrFile = None,
    shape: options.Shape = None,
    weights: options.Weights = None,
    inputs: Annotated[
        Path | None,
        typer.Option(help="With an .onnx file: arrays by input name (.npz) to compare on.", show_default="random ones"),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest accepted difference, as a share of an output's largest value.", show_default="1e-5 in float32"
        ),
    ] = None,
    run: options.Run = None,
    arguments: options.Arguments = None,
) -> None:
    """Fold batch norm into the layers around it, prove the result, and write it.

    The certificate says what was folded into what, what stayed and why, and how far the outputs of the folded network
    are from those of the unfolded one. A layer that cannot be folded exactly stays. Nothing is
    written if the outputs differ.
    """
    kinds = (".onnx", ".pt2")
    if inputs is not None and (file is None or file.suffix != ".onnx"):
        raise InputError(
            "fold: --inputs goes with an .onnx file; an archive holds an example, --network takes --shape."
        )
    if options.is_file("fold", file, kinds, network, shape, weights, out, run):
        assert file is not None
        typer.echo(str(_fold_file(file, out, inputs, tolerance)))
        return
    from batchnorm import fold as fold_into
    from batchnorm.undo import in_mode

    net, example = Given("fold", network, run, weights, arguments).with_example(shape)
    folded = fold_into(in_mode(net, False), example, tolerance=tolerance)
    save(folded.model, out, example)
    typer.echo(str(folded.certificate))


def _fold_file(file: Path, out: Path, inputs: Path | None, tolerance: float | None) -> Any:
    """Fold an ONNX file or an archive into `out`, of the same kind; the certificate."""
    from batchnorm.surgery.files import fold_archive, fold_onnx, save_archive, save_onnx

    if file.suffix == ".onnx":
        model, certificate = fold_onnx(file, None if inputs is None else _arrays(inputs), tolerance=tolerance)
        save_onnx(model, out)
    else:
        program, certificate = fold_archive(file, tolerance=tolerance)
        save_archive(program, out)
    typer.echo(f"Written: {out}")
    return certificate


def _arrays(path: Path) -> dict[str, Any]:
    from batchnorm.training.datasets import read_arrays

    return read_arrays(path)


def register(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command(epilog=EXAMPLES)(fold)
