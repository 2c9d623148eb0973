"""Instruments in anyone's training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from batchnorm.errors import InputError


class Recorder:
    """Reads instruments every so many steps of a training loop, and keeps what they returned.

    Args:
        net: the network in training.
        instruments: by name, functions of (net, batch), such as ``gradient_norms`` or
            ``lambda net, batch: descent(net, batch, 0.1)``.
        every: steps between two readings; the first is at step 0.

    Attributes:
        records: by name, a list of (step, reading).

    Examples:
        >>> import torch
        >>> from batchnorm.lab.instruments import gradient_norms
        >>> net = nn.Linear(3, 2)
        >>> recorder = Recorder(net, {"gradients": gradient_norms}, every=2)
        >>> for _ in range(4):
        ...     batch = torch.randn(8, 3), torch.randint(2, (8,))
        ...     recorder(batch)  # then the step of the training itself
        >>> [step for step, _ in recorder.records["gradients"]]
        [0, 2]
    """

    def __init__(
        self, net: nn.Module, instruments: Mapping[str, Callable[[nn.Module, Any], Any]], *, every: int = 100
    ) -> None:
        if every < 1:
            raise InputError(f"Recorder: every={every}, expected a number of steps, 1 or more")
        self.net, self.instruments, self.every = net, dict(instruments), every
        self.step = 0
        self.records: dict[str, list[tuple[int, Any]]] = {name: [] for name in self.instruments}

    def __call__(self, batch: Any) -> None:
        """Reads what is due on the batch of this step; to be called once a step, before the update."""
        if self.step % self.every == 0:
            for name, instrument in self.instruments.items():
                self.records[name].append((self.step, instrument(self.net, batch)))
        self.step += 1
