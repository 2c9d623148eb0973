"""`batchnorm summary`: a table of the batch norm layers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.cli import options
from batchnorm.cli.networks import Given, write
from batchnorm.errors import InputError

EXAMPLES = """**Examples**

`batchnorm summary --network mymodels:resnet --shape 2,3,32,32 --html layers.html`

`batchnorm summary model.pt2 --json`

`batchnorm summary model.keras`
"""


def summary(
    file: Annotated[
        Path | None, typer.Argument(help="A torch.export archive (.pt2), or a file that another framework wrote.")
    ] = None,
    network: options.FactoryOrFile = None,
    shape: options.Shape = None,
    weights: options.Weights = None,
    html: Annotated[Path | None, typer.Option(help="Also write the table as a page.")] = None,
    as_json: options.Json = False,
    run: options.Run = None,
    arguments: options.Arguments = None,
) -> None:
    """Show a network's batch norm layers: four vectors a layer, two trained, two not.

    Also what feeds each layer, where it stands, biases that it makes redundant, how many values share statistics on
    an input of --shape, and all parameters as trained and not trained.
    """
    from batchnorm import summary as summarize

    if file is not None and file.suffix != ".pt2" and network is None and run is None:
        _foreign(file, html, as_json)
        return
    if options.is_file("summary", file, (".pt2",), network, shape, weights, run=run):
        from batchnorm.surgery.archives import open_archive, quiet

        assert file is not None
        archive = open_archive(file)
        with quiet():
            found = summarize(archive.net, archive.example)
    else:
        found = summarize(*Given("summary", network, run, weights, arguments).with_example(shape))
    if html is not None:
        write(html, found.to_html().encode())
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(found)
    else:
        typer.echo(str(found))


def _foreign(file: Path, html: Path | None, as_json: bool) -> None:
    """The batch normalizations of another framework's file, which needs no network."""
    from batchnorm import read_statistics
    from batchnorm.diagnosis.tables import text_table
    from batchnorm.population.formats.conventions import CONVENTIONS

    if html is not None:
        raise InputError(f"summary: --html goes with a network or an archive; {file} has a table alone.")
    found = read_statistics(file)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    typer.echo(f"{file}: {CONVENTIONS[found.framework].title}, {found.kind}")
    typer.echo("\n".join([*text_table(found.rows()), *found.notes]))


def register(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command(epilog=EXAMPLES)(summary)
