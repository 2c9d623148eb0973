"""The application that the commands register with."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="batchnorm",
    help="Batch normalization for a network's whole life: insert, train, calibrate, fold, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
