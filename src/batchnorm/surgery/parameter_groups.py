"""Parameter groups for optimizers: what weight decay is for, and what not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from batchnorm.errors import InputError
from batchnorm.surgery.layers import ScaleShift
from batchnorm.surgery.modules import unwrap

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, ScaleShift)
_TOWARD_ONE = "decay_toward_one"
_hooks: list[Any] = []


def param_groups(
    net: nn.Module,
    weight_decay: float = 5e-4,
    norm_weight_decay: float = 0.0,
    *,
    bias_weight_decay: float = 0.0,
    gamma_toward_one: bool = False,
) -> list[dict[str, Any]]:
    """Groups of the parameters of ``net`` for any optimizer of torch: weights, normalization, biases.

    A weight before batch normalization has no scale of its own, so decay acts on its effective learning rate; gamma
    and beta have one, and by default they and the biases are not decayed. Every parameter is in one group: a shared
    one once, as normalization's if any normalization layer uses it; those without ``requires_grad`` too, which
    optimizers pass over until they have a gradient.

    Args:
        net: the network.
        weight_decay: of all other parameters.
        norm_weight_decay: of gamma and beta of batch, layer, group, instance and RMS normalization.
        bias_weight_decay: of one-dimensional parameters called bias elsewhere.
        gamma_toward_one: let gamma decay toward 1, at which normalization has no effect of its own, and not toward 0
            (Summers & Dinneen 2020, section 3.4): before each step ``gamma -= lr * norm_weight_decay * (gamma - 1)``,
            decoupled as in AdamW; for plain SGD that is the L2 penalty around 1. A hook on every optimizer's step
            does it for groups with the key ``"decay_toward_one"``, once a step however many gradients were
            accumulated; layers without a gradient are left alone.

    Returns:
        The groups, for the first argument of an optimizer; groups without a parameter are there, too.

    Raises:
        InputError: when ``net`` is no module, or a decay is negative.

    Source: Summers & Dinneen 2020, Four things everyone should know to improve batch normalization, section 3.4.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        >>> optimizer = torch.optim.SGD(param_groups(net, weight_decay=1e-4), lr=0.1)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.0001), (2, 0.0), (1, 0.0)]
    """
    net = unwrap(net, "param_groups")
    decays = {"weight_decay": weight_decay, "norm_weight_decay": norm_weight_decay}
    for name, value in (decays | {"bias_weight_decay": bias_weight_decay}).items():
        if not 0 <= value < float("inf"):
            raise InputError(f"param_groups: {name} must be a number >= 0, got {value!r}")
    roles: dict[int, str] = {}
    for module in net.modules():
        for key, parameter in module.named_parameters(recurse=False):
            role = _role(module, key, parameter)
            if role in ("gamma", "beta") or id(parameter) not in roles or roles[id(parameter)] == "bias":
                roles[id(parameter)] = role
    groups: list[dict[str, Any]] = []
    toward_one = gamma_toward_one and norm_weight_decay > 0
    kinds = [({"weight"}, weight_decay), ({"gamma", "beta"}, norm_weight_decay), ({"bias"}, bias_weight_decay)]
    if toward_one:
        kinds[1:2] = [({"gamma"}, 0.0), ({"beta"}, norm_weight_decay)]
    for wanted, decay in kinds:
        params = [p for p in net.parameters() if roles[id(p)] in wanted]
        if params:
            extra = {_TOWARD_ONE: norm_weight_decay} if toward_one and wanted == {"gamma"} else {}
            groups.append({"params": params, "weight_decay": decay, **extra})
    if toward_one and not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_decay_toward_one))
    return groups


def _role(module: nn.Module, key: str, parameter: nn.Parameter) -> str:
    if isinstance(module, _NORMS):
        return "gamma" if key.startswith("weight") else "beta"
    return "bias" if parameter.dim() <= 1 and "bias" in key else "weight"


def _decay_toward_one(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            decay = group.get(_TOWARD_ONE, 0.0)
            for gamma in group["params"] if decay else ():
                if gamma.grad is not None:
                    gamma.sub_((gamma - 1) * (group["lr"] * decay))
