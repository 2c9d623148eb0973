"""A setting of `train` is defined once, in `TrainConfig`: the command line shows that definition."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest

from batchnorm.cli.settings import describe
from batchnorm.cli.train import train
from batchnorm.errors import InputError
from batchnorm.training import config
from batchnorm.training.config import ResolvedConfig, TrainConfig

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def table(values, other=None):
    """Defaults by network or optimizer, as the text of a setting has them."""
    return ", ".join([f"{k}: {v}" for k, v in values.items()] + ([f"else {other}"] if other else []))


def test_every_setting_is_described_and_is_an_option():
    assert list(describe(TrainConfig)) == list(FIELDS)
    assert all(text.help for text in describe(TrainConfig).values())
    assert list(inspect.signature(train).parameters) == ["context", *FIELDS, "resume"]


def test_the_texts_name_the_defaults_that_are_filled_in():
    shown = {name: text.default for name, text in describe(TrainConfig).items()}
    assert shown["steps"] == table(config.STEPS, config.OTHER_STEPS)
    assert shown["momentum"] == table(config.MOMENTUM)
    assert shown["threads"] == table(config.THREADS, "torch's choice")
    filled_in = {n for n, field in FIELDS.items() if field.default is None} - {"labels"}
    assert {name for name, default in shown.items() if default} == filled_in


@pytest.mark.parametrize(
    ("name", "choices"),
    [("optimizer", config.OPTIMIZERS), ("placement", config.PLACEMENTS), ("method", config.METHODS)],
)
def test_the_texts_name_the_choices(name, choices):
    assert set(choices) <= set(re.findall(r"\w+", describe(TrainConfig)[name].help))


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [[], 1j, float("nan"), "", -1])
def test_every_setting_is_checked_by_kind_and_range(name, value):
    with pytest.raises(InputError, match=rf"{name}=.*, expected "):
        dataclasses.replace(TrainConfig(), **{name: value}).resolve()


def test_a_resolved_configuration_is_written_and_read_again():
    resolved = TrainConfig(network="convnet", lr=0.25, out="here", overwrite=True).resolve()
    assert (resolved.steps, resolved.baseline, resolved.baseline_lr, resolved.eval_every) == (500, True, 0.25, 5)
    written = resolved.to_dict()
    assert not {"out", "overwrite"} & set(written)
    again = ResolvedConfig.from_dict(written)
    assert again == dataclasses.replace(resolved, out=None, overwrite=False, eval_every_given=True)
    for damaged in ({**written, "other": 1}, {k: v for k, v in written.items() if k != "lr"}):
        with pytest.raises(ValueError, match=r"other|lr"):
            ResolvedConfig.from_dict(damaged)
