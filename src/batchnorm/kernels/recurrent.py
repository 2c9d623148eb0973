"""Recurrences step by step on ATen: for every device, dtype and projection, and differentiable throughout.

Sequences lie one time step after another, the longest first, as in a `PackedSequence`: step t has ``sizes[t]`` rows,
those of the sequences that are not over. Dense sequences have the same size at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CELLS = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU")
"""By torch's names; gates are in torch's order: i, f, g, o and r, z, n."""

Normalize = Callable[[Tensor, int], Tensor]
"""The values (n, C) of a step, and its number, to the normalized ones."""


class Recurrence(NamedTuple):
    """What a recurrence is made of.

    Attributes:
        cell: of `CELLS`.
        gates: what the input adds to the gates, (frames, gates H).
        sizes: rows of each step.
        weight_hh: (gates H, H or the projection's size).
        bias_hn: (H), of a GRU's candidate.
        weight_hr: of an LSTM's projection.
        h0, c0: the first states (N, H).
    """

    cell: str
    gates: Tensor
    sizes: Sequence[int]
    weight_hh: Tensor
    bias_hn: Tensor | None
    weight_hr: Tensor | None
    h0: Tensor
    c0: Tensor | None


def recurrence(call: Recurrence, normalize_hh: Normalize, normalize_c: Normalize) -> tuple[Tensor, Tensor | None]:
    """Hidden states (frames, H) and, of an LSTM, cells (frames, H)."""
    cell, gates, sizes, weight_hh, bias_hn, weight_hr, h, c = call
    states, cells = [], []
    for t, of_input in enumerate(gates.split(list(sizes))):
        h, c = h[: len(of_input)], None if c is None else c[: len(of_input)]
        of_state = normalize_hh(h @ weight_hh.t(), t)
        if cell == "LSTM":
            assert c is not None
            i, f, g, o = (of_input + of_state).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(normalize_c(c, t))
            cells.append(c)
            if weight_hr is not None:
                h = h @ weight_hr.t()
        elif cell == "GRU":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = of_input.chunk(3, 1), of_state.chunk(3, 1)
            r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
            n = torch.tanh(x_n + r * (h_n if bias_hn is None else h_n + bias_hn))
            h = (1 - z) * n + z * h
        else:
            h = torch.tanh(of_input + of_state) if cell == "RNN_TANH" else torch.relu(of_input + of_state)
        states.append(h)
    return torch.cat(states), torch.cat(cells) if cells else None


def steps_of(sizes: Sequence[int], device: torch.device) -> Tensor:
    """The step of each row."""
    if sizes and all(size == sizes[0] for size in sizes):  # without repeat_interleave, which ONNX lacks
        return torch.arange(len(sizes), device=device)[:, None].expand(-1, sizes[0]).reshape(-1)
    counts = torch.tensor(sizes, device=device)
    return torch.repeat_interleave(torch.arange(len(sizes), device=device), counts, output_size=sum(sizes))
