"""`batchnorm info`: versions and optional parts."""

from __future__ import annotations

import typer


def info() -> None:
    """Show versions, kernels and optional parts: what is there, and why something is not."""
    from batchnorm import show_config

    show_config()


def register(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command()(info)
