"""What runs of a network on an example show without its graph: calls, and whose code draws random numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from batchnorm.errors import InputError
from batchnorm.surgery.comparison import Draws, Example, copy_of, random_state_kept, seed_all
from batchnorm.surgery.modules import is_leaf
from batchnorm.surgery.own_state import own_state

DRAWS = 3
"""So many seeds are tried of a network whose forward draws random numbers in Python."""


@dataclass(frozen=True)
class Runs:
    """What runs of a network show without its graph.

    Attributes:
        calls: how often each module is called: in evaluation, and in training for each of several seeds.
        drawing: the modules whose own code draws random numbers in training, by name.
        changing: the modules of which a run in training changes a number or a generator of random numbers, by name:
            the next one may decide otherwise.
        callers: the modules in whose forwards each module is called, by name; None where one calls it twice in one go.
    """

    calls: list[Counter[str]]
    drawing: set[str]
    changing: set[str]
    callers: dict[str, set[str | None]]

    @classmethod
    def of(cls, net: nn.Module, example: Example) -> Runs:
        counts, drawing, changing = [], set[str](), set[str]()
        callers: dict[str, set[str | None]] = {}
        for training in (False, True):
            counted = _Counted(net, training)
            for seed in range(DRAWS if training else 1):
                before = counted.own_states() if seed else {}  # the first run may fill what is kept from then on
                counts.append(counted.run(example, seed))
                if seed:
                    after = counted.own_states()
                    changing |= {name for name in before if before[name] != after[name]}
                if seed and not counted.drawing | changing:
                    break
            drawing |= counted.drawing
            for name, found in counted.callers.items():
                callers.setdefault(name, set()).update(found)
        return cls(counts, drawing, changing, callers)

    def once(self, name: str) -> bool:
        """Whether a module is called once in evaluation, and never twice."""
        return self.calls[0][name] == 1 and all(count[name] <= 1 for count in self.calls)

    def as_often(self, name: str, other: str) -> bool:
        """Whether a module is called once, or in every run as often as another one."""
        return self.once(name) or all(count[name] == count[other] for count in self.calls)

    def in_step(self, name: str) -> bool:
        """Whether a module is called in evaluation, and as often as one other module, by each call of that."""
        (caller, *others) = self.callers.get(name, {None})
        if others or caller is None or not self.calls[0][name]:
            return False
        return all(count[name] == count[caller] for count in self.calls)

    def together(self, *names: str) -> bool:
        """Whether these are called equally often in every run: in evaluation once, or all in step with the last one."""
        equally = all(len({count[name] for name in names}) == 1 for count in self.calls)
        if self.once(names[0]):
            return equally
        return equally and all(self.in_step(name) and self.callers[name] == {names[-1]} for name in names[:-1])


class _Counted:
    """A copy of a network that counts the calls of its modules, and notes whose own code draws random numbers."""

    def __init__(self, net: nn.Module, training: bool) -> None:
        self.net = copy_of(net, training=training)
        self.counts = Counter[str]()
        self.drawing = set[str]()
        self.running: list[str] = []
        self.called: list[set[str]] = [set()]  # by each of the running modules, and by nobody
        self.callers: dict[str, set[str | None]] = {}
        self.draws = Draws(net)
        for name, module in self.net.named_modules():
            module.register_forward_pre_hook(partial(self._enters, name))
            module.register_forward_hook(self._leaves, always_call=True)

    def run(self, example: Example, seed: int) -> Counter[str]:
        self.counts, self.running, self.called = Counter(), [], [set()]
        fresh = example.map(lambda x: x.detach().clone())
        with random_state_kept(self.net), torch.no_grad():
            seed_all(seed)
            self.draws.moved()
            try:
                self.net(*fresh.args, **fresh.kwargs)
            except Exception as error:
                mode = "training" if self.net.training else "evaluation"
                raise InputError(
                    f"accelerate: the network fails on the example in {mode} mode ({example.describe()}): {error}. "
                    "Give a batch that it can be trained on."
                ) from error
        return self.counts

    def own_states(self) -> dict[str, Hashable]:
        """Of each module that is not torch's."""
        return {name: own_state(module) for name, module in self.net.named_modules() if not is_leaf(module)}

    def _enters(self, name: str, module: nn.Module, args: Any) -> None:
        self._look()
        again = name in self.called[-1] or not self.running
        self.callers.setdefault(name, set()).add(None if again else self.running[-1])
        self.called[-1].add(name)
        self.called.append(set())
        self.running.append(name)
        self.counts[name] += 1

    def _leaves(self, module: nn.Module, args: Any, output: Any) -> None:
        self._look()
        self.called.pop()
        self.running.pop()

    def _look(self) -> None:
        if self.draws.moved() and self.running and not is_leaf(self.net.get_submodule(self.running[-1])):
            self.drawing.add(self.running[-1])
