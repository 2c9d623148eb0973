"""The application with all its commands."""

from __future__ import annotations

from batchnorm.cli import adapt, bench, calibrate, convert, diagnose, fold, info, lab, summary, train
from batchnorm.cli.application import app

__all__ = ["app"]

for command in (
    train,
    summary,
    diagnose,
    calibrate,
    adapt,
    fold,
    convert,
    lab,
    bench,
    info,
):  # in the order of the help
    command.register(app)
