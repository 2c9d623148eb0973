"""Options of the command line that are settings of a configuration: their help, type and default are read off it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import typer

from batchnorm.training.config import TrainConfig

Command = TypeVar("Command", bound=Callable[..., Any])


class Described(NamedTuple):
    """The help of a setting, and the default that its text names, if it names one."""

    help: str
    default: str | None


def describe(config: type) -> dict[str, Described]:
    """The settings that the `Args:` of a configuration's docstring describe.

    The last sentence of an entry may name the default of a setting that is None, as in "Default: that of lr."
    """
    text = (inspect.getdoc(config) or "").partition("Args:\n")[2]
    found = {}
    for entry in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE):
        help_text, separator, default = re.sub(r"\s+", " ", entry[1]).partition(" Default: ")
        found[entry[0]] = Described(help_text, default.rstrip(".") if separator else None)
    return found


def setting(name: str, *flags: str, more: str = "", config: type = TrainConfig, show_default: str | None = None) -> Any:
    """The option of a setting; `more` is added to its help."""
    text = describe(config).get(name, Described("", None))  # nothing where docstrings are stripped
    default = show_default or text.default
    shown: Any = {} if default is None else {"show_default": default}
    return typer.Option(*flags, help=f"{text.help} {more}".rstrip(), **shown)


def with_settings(config: type) -> Callable[[Command], Command]:
    """Give a command that takes `**settings` an option for each field of `config`, before its own options."""

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        context = [p for p in own if p.annotation is typer.Context]
        rest = [p for p in own if p.kind is not p.VAR_KEYWORD and p not in context]
        parameters = [*context, *_parameters(config), *rest]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _parameters(config: type) -> list[inspect.Parameter]:
    """The fields as parameters of a typer command, in their order."""
    types = get_type_hints(config)
    found = []
    for field in dataclasses.fields(config):
        flags = (f"--{field.name.replace('_', '-')}",) if field.default is False else ()  # without a --no- form
        kind = _plain(types[field.name])
        if _is_mapping(kind):
            kind, flags = list[str] | None, ("--set",)
        annotation: Any = Annotated[kind, setting(field.name, *flags, config=config)]
        found.append(
            inspect.Parameter(
                field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=field.default, annotation=annotation
            )
        )
    return found


def _is_mapping(annotation: Any) -> bool:
    return any(get_origin(one) is Mapping for one in (annotation, *get_args(annotation)))


def _plain(annotation: Any) -> Any:
    """Texts instead of literal types: the configuration checks them, with a message of its own."""
    return type(get_args(annotation)[0]) if get_origin(annotation) is Literal else annotation


def text_of(name: str) -> str:
    """The help of a setting of `TrainConfig`."""
    return describe(TrainConfig).get(name, Described("", None)).help
