"""How every page is made: a template, the values it shows, and one self-contained file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from batchnorm.errors import InputError, WriteError
from batchnorm.writing import folders_for, write_text


def render(template: str, **values: Any) -> str:
    """The page of `templates/TEMPLATE.html.j2`; a value that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("batchnorm.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(number=number, code=with_code, name=as_name, breakable=breakable)
    return environment.get_template(f"{template}.html.j2").render(**values)


def write_page(verb: str, path: str | Path, page: str) -> Path:
    """Write it, and the folders to it.

    Raises:
        InputError: it cannot be written.
    """
    path = Path(path)
    try:
        with folders_for(path):
            write_text(path, page)
    except WriteError:
        raise
    except OSError as error:
        raise InputError(f"{verb} {path}: it cannot be written ({error.strerror or error}).") from error
    return path


def number(value: float) -> str:
    """Four significant digits, with a true minus."""
    text = f"{value:.4g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"
    return text.replace("-", "\N{MINUS SIGN}")


def with_code(text: str) -> Markup:
    """The text, escaped, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def as_name(text: str) -> Markup:
    """A module's path, escaped, as code that may be broken behind each dot."""
    return Markup("<code>{}</code>").format(Markup(".<wbr>").join(text.split(".")))


def breakable(title: str) -> Markup:
    """A title, escaped, that may be broken behind each stroke."""
    return Markup("/<wbr>").join(title.split("/"))
