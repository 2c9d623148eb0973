"""Folding inside recurrent layers: W_ih takes in what normalizes its product over whole sequences."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from batchnorm.nn import recurrent
from batchnorm.nn.step_batch_norm import StepBatchNorm
from batchnorm.surgery.affine import affine_of, wide

BY_STEP = "its statistics are those of time steps, so it is another map at each step"


def normalizations(layer: nn.Module) -> dict[str, nn.Module]:
    """The batch normalizations of a recurrent layer or cell by their names in it; none for other modules."""
    if not isinstance(layer, recurrent._Normalized):
        return {}
    return {name: m for name, m in layer.named_children() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def obstacle(norm: nn.Module) -> str | None:
    """Why a normalization cannot become part of W_ih, or None."""
    if isinstance(norm, StepBatchNorm):
        return BY_STEP
    if not all(bool(value.isfinite().all()) for value in affine_of(norm)):
        return "its statistics or parameters are not finite, or running_var + eps is negative"
    return None


def folded(layer: Any, dtype: torch.dtype | None) -> nn.Module:
    """The layer with ``W_ih' = scale * W_ih``: torch.nn's, with biases, where nothing else in it is normalized.

    Otherwise the shift stays behind the product as `InputBias`, beside the normalizations by time step.
    """
    made: Any
    plain = not layer.options.recurrent
    like = next(iter(layer._parameters.values()))
    made = _without_normalization(layer, dtype or like.dtype) if plain else copy.deepcopy(layer).to(dtype)
    with torch.no_grad():
        for suffix in layer._suffixes():
            scale, shift = affine_of(getattr(layer, f"norm_ih{suffix}"))
            for name, value in layer._parameters.items():
                if name.endswith(suffix) and name in made._parameters:
                    made._parameters[name].copy_(value)
            weight = scale[:, None] * wide(getattr(layer, f"weight_ih{suffix}"))
            made._parameters[f"weight_ih{suffix}"].copy_(weight)
            if not plain:
                setattr(made, f"norm_ih{suffix}", recurrent.InputBias(shift.to(like.device, dtype or like.dtype)))
                continue
            made._parameters[f"bias_ih{suffix}"].copy_(shift)
            made._parameters[f"bias_hh{suffix}"].zero_()
            bias_hn = getattr(layer, f"bias_hn{suffix}", None)
            if bias_hn is not None:
                made._parameters[f"bias_hh{suffix}"][-layer.hidden_size :].copy_(bias_hn)
    for parameter in made.parameters():
        parameter.requires_grad_(like.requires_grad)
    result: nn.Module = made
    return result


def _without_normalization(layer: Any, dtype: torch.dtype) -> Any:
    """The same layer or cell with batch_norm=None, and biases."""
    like = next(iter(layer._parameters.values()))
    names = ("input_size", "hidden_size", "num_layers", "nonlinearity", "batch_first", "dropout", "bidirectional")
    options = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    if getattr(layer, "proj_size", 0):
        options["proj_size"] = layer.proj_size
    return type(layer)(**options, bias=True, device=like.device, dtype=dtype)
