"""Rules in words, such as ``gap > 1 nat for 3 evaluations``, and how often in a row each holds."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from batchnorm.errors import InputError

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_RULE = re.compile(
    r"\s*(?P<metric>[A-Za-z_][\w ]*?)\s*(?P<sign>>=|<=|>|<)\s*(?P<limit>[-+]?[\d.]+(?:e[-+]?\d+)?)\s*"
    r"(?P<unit>nats?|%|percent)?\s*(?:for\s+(?P<times>\d+)\s+(?P<what>evaluations?|readings?))?\s*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Rule:
    """One rule: it holds where ``metric`` compares so with ``limit`` ``times`` times in a row.

    Attributes:
        text: as it was written.
        metric: the name of a value: one of a reading's totals, or one that an evaluation gave.
        sign: ``">"``, ``">="``, ``"<"`` or ``"<="``.
        limit: the number; percents are shares.
        times: how many readings or evaluations in a row.
    """

    text: str
    metric: str
    sign: str
    limit: float
    times: int = 1

    def holds(self, value: float) -> bool:
        """Whether the comparison is true. A value that is not a number breaks each limit from above."""
        if value != value:
            return self.sign in (">", ">=")
        return _COMPARISONS[self.sign](value, self.limit)


@dataclass(frozen=True)
class Alert:
    """A rule that held often enough: at which step, with which value."""

    step: int
    rule: Rule
    value: float

    def __str__(self) -> str:
        return f"step {self.step}: {self.rule.text} ({self.rule.metric} is {self.value:.3g})"


def parse_rule(text: str, metrics: tuple[str, ...] | None = None) -> Rule:
    """Read a rule.

    Raises:
        InputError: the text is no rule, or names none of ``metrics``, if those are given.

    Examples:
        >>> parse_rule("gap > 1 nat for 3 evaluations").times
        3
    """
    found = _RULE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise InputError(
            f"watch: {text!r} is no rule; expected a metric, >, >=, < or <=, and a number, such as "
            "'gap > 1 nat for 3 evaluations' or 'dead > 0'"
        )
    metric = found["metric"].strip().lower().replace(" ", "_")
    if metrics is not None and metric not in metrics:
        raise InputError(f"watch: the rule {text!r} is about {metric!r}; there are {', '.join(metrics)}")
    try:
        limit = float(found["limit"]) / (100 if found["unit"] in ("%", "percent") else 1)
    except ValueError:
        raise InputError(f"watch: {found['limit']!r} in the rule {text!r} is no number") from None
    times = int(found["times"] or 1)
    if times < 1:
        raise InputError(f"watch: the rule {text!r} has to hold at least once")
    return Rule(text.strip(), metric, found["sign"], limit, times)


class Rules:
    """Rules, and how often in a row each has held."""

    def __init__(self, rules: list[Rule]) -> None:
        self.rules = rules
        self._held = dict.fromkeys(rules, 0)

    def see(self, step: int, values: Mapping[str, float]) -> list[Alert]:
        """The alerts of these values: one when a rule has held often enough, and again after it has been broken."""
        alerts = []
        for rule in self.rules:
            if rule.metric not in values:
                continue
            value = values[rule.metric]
            self._held[rule] = self._held[rule] + 1 if rule.holds(value) else 0
            if self._held[rule] == rule.times:
                alerts.append(Alert(step, rule, value))
        return alerts
