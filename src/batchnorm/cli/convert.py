"""`batchnorm convert`: other options or another class for every layer."""

from __future__ import annotations

from typing import Annotated

import typer

from batchnorm.cli import options
from batchnorm.cli.networks import build_with_example, save

EXAMPLES = """**Examples**

`batchnorm convert --network mymodels:resnet --shape 2,3,32,32 --set nonfinite=skip --out net.safetensors`

`batchnorm convert model.pt2 --set example_weight=0.02 --out weighed.pt2`
"""


def convert(
    out: options.NetworkOut,
    file: options.Archive = None,
    network: options.FactoryOrFile = None,
    shape: options.Shape = None,
    weights: options.Weights = None,
    to: Annotated[
        str,
        typer.Option(help="batchnorm, torch, sync, or, of layers that normalize each sample, group_norm, layer_norm."),
    ] = "batchnorm",
    of: Annotated[str, typer.Option(help="Which layers: batch_norm, group_norm or layer_norm.")] = "batch_norm",
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="An option of every layer, NAME=VALUE; may be repeated.")
    ] = None,
) -> None:
    """Give every batch norm layer the same options or class, check the network, and write its weights.

    Without --set the network's output has to stay the same. Of an archive the options count that matter in evaluation.
    """
    values = dict(options.assignment(text) for text in assignments or ())
    if options.is_file("convert", file, (".pt2",), network, shape, weights, out):
        from batchnorm.surgery.files import convert_archive, save_archive

        assert file is not None
        save_archive(convert_archive(file, to=to, of=of, **values), out)
        typer.echo(f"Written: {out}")
        return
    from batchnorm import convert as convert_all

    net, example = build_with_example(network, shape, weights)
    convert_all(net, example, to=to, of=of, **values)
    save(net, out, example)
    typer.echo(str(net))


def register(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command(epilog=EXAMPLES)(convert)
