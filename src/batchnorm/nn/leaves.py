"""One node for one layer when torch.fx records a network.

``torch.fx.Tracer`` walks into every layer whose class is not of torch.nn, and so into those of this package; their
``forward`` asks for sizes and values that a recorder does not have. A layer that is given a proxy therefore writes the
node that the recorder would have written, had it known the class: one ``call_module``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn
from torch.fx.node import map_aggregate


def is_of_this_package(kind: type[nn.Module]) -> bool:
    """Whether a class computes by a forward of this package, and not by one of its own around that.

    Its calls may then be one node. A node for a layer inside the layer's own forward would do that forward twice.
    """
    return str(kind.forward.__module__).partition(".")[0] == __name__.partition(".")[0]


def recorded_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> fx.Proxy | None:
    """The result of a call as one node of the graph that torch.fx is recording; None where none is recorded.

    Args:
        module: the layer that is called.
        args: its positional arguments, and
        kwargs: its named ones, of which those that are None are left out.

    Returns:
        A proxy, if any argument is one and ``module`` is a part of the recorded network, not the whole.
    """
    named = {key: value for key, value in (kwargs or {}).items() if value is not None}
    proxies: list[fx.Proxy] = []
    map_aggregate((args, named), lambda x: proxies.append(x) if isinstance(x, fx.Proxy) else x)
    if not proxies:
        return None
    tracer = proxies[0].tracer
    path = tracer.path_of_module(module) if isinstance(tracer, fx.Tracer) else ""
    if not path:
        return None
    made: fx.Proxy = tracer.create_proxy("call_module", path, args, named)
    return made
