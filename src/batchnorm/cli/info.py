"""`batchnorm info`: versions and optional parts."""

from __future__ import annotations

import platform
import sys

import typer

from batchnorm import installation
from batchnorm.errors import InstallationError


def info() -> None:
    """Show versions, kernels and optional parts: what is there, and why something is not."""
    import batchnorm

    try:
        batchnorm.show_config()
    except InstallationError:  # without torch nothing else runs: say at least what is here
        print(f"batchnorm         {installation.described()}")
        print(f"files             {installation.condition()}")
        print(f"python            {platform.python_version()} ({sys.executable})")
        raise


def register(app: typer.Typer) -> None:
    """Make it a command of the application."""
    app.command()(info)
