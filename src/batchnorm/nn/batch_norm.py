"""The layers: drop-in subclasses of torch.nn's, with explicit modes and fusions."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from batchnorm import functional
from batchnorm.errors import InputError
from batchnorm.functional import Measured
from batchnorm.moments import Moments
from batchnorm.nn import saved_modes
from batchnorm.nn.example_weighing import by_example
from batchnorm.nn.renormalization import Renorm, by_measured, effective
from batchnorm.nn.running_statistics import ESTIMATORS, NONFINITE, VARIANCES, Accumulator, debiased, recomputing, update
from batchnorm.ops import autograd
from batchnorm.ops.schemas import ACTIVATIONS
from batchnorm.pools import Pool, is_alone
from batchnorm.views import POOLS, View, equal_steps, is_traced, plain, view

SOURCES = ("auto", "batch", "running")
UPDATES = ("auto", "never", "always")

# The options of a layer beyond torch's, and their defaults.
OPTIONS: dict[str, Any] = {
    "activation": None,
    "negative_slope": 0.01,
    "source": "auto",
    "update": "auto",
    "trains_affine": True,
    "running": "ema",
    "running_var_kind": "unbiased",
    "nonfinite": "propagate",
    "renorm": None,
    "example_weight": 0.0,
    "pool": None,
    "batch_first": True,
    "max_steps": 0,
    "ghost_size": 0,
    "ghost_update": "merge",
    "channel_groups": 0,
    "process_group": None,
    "domains": 0,
}
# Those of them (and the accumulator of `accumulate`) that the short path through `forward` does not know.
_SPECIAL = ("trains_affine", "running", "running_var_kind", "nonfinite", "renorm", "example_weight", "_accumulator")
_POOLED = ("pool", "ghost_size", "channel_groups", "process_group", "domains")
FLAGS = ("_special", "_pooled", "_ghosts")  # made of them


class _Default(float):
    """A default that can be told from the same number given by hand."""


_MOMENTUM = _Default(0.1)
_warned = False


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What `BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` share."""

    activation: str | None
    negative_slope: float
    source: str
    update: str
    trains_affine: bool
    running: str
    running_var_kind: str
    nonfinite: str
    renorm: Renorm | None
    example_weight: float
    pool: str | None
    batch_first: bool
    max_steps: int
    ghost_size: int
    ghost_update: str
    channel_groups: int
    process_group: Any
    domains: int
    domain: int = 0
    label: str = ""  # the layer's name in its network, for errors of synchronization
    num_batches_skipped: Tensor
    renorm_r: Tensor
    renorm_d: Tensor
    _accumulator: Accumulator | None = None
    _special: bool = False
    _pooled: bool = False
    _ghosts: bool = False  # whether ghost batches are all that is pooled, and nothing is special

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = _MOMENTUM,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        negative_slope: float = 0.01,
        source: str = "auto",
        update: str = "auto",
        decay: float | None = None,
        running: str = "ema",
        running_var: str = "unbiased",
        nonfinite: str = "propagate",
        renorm: Renorm | None = None,
        example_weight: float = 0.0,
        pool: str | None = None,
        batch_first: bool = True,
        max_steps: int = 0,
        ghost_size: int = 0,
        ghost_update: str = "merge",
        channel_groups: int = 0,
        process_group: Any = None,
        domains: int = 0,
    ) -> None:
        options = {
            **OPTIONS,
            "activation": activation,
            "negative_slope": negative_slope,
            "source": source,
            "update": update,
            "running": running,
            "running_var_kind": running_var,
            "nonfinite": nonfinite,
            "renorm": renorm,
            "example_weight": example_weight,
            "pool": pool,
            "batch_first": batch_first,
            "max_steps": max_steps,
            "ghost_size": ghost_size,
            "ghost_update": ghost_update,
            "channel_groups": channel_groups,
            "process_group": process_group,
            "domains": domains,
        }
        momentum = _momentum(momentum, decay)
        _check_numbers(num_features, eps, momentum)
        for name, value in options.items():
            _check_option(name, value)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        check_together(options, self, momentum)
        if affine and not bias:
            self.register_parameter("bias", None)
        for name, value in options.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPTIONS:
            _check_option(name, value)
        super().__setattr__(name, value)
        if name in OPTIONS or name == "_accumulator":
            self._prepare(name)

    def _prepare(self, option: str) -> None:
        """Makes what an option needs: its buffers, and the flag that the short path is left by."""
        at = None if self.running_mean is None else self.running_mean.device
        if option == "nonfinite" and self.nonfinite != "propagate":
            batches = self._buffers.get("num_batches_tracked")
            shape = () if batches is None else tuple(batches.shape)
            shape = (*shape, self.num_features) if self.nonfinite == "skip_channel" else shape
            if "num_batches_skipped" not in self._buffers or self.num_batches_skipped.shape != shape:
                self.register_buffer("num_batches_skipped", torch.zeros(shape, dtype=torch.long, device=at))
        elif option == "nonfinite":
            self._buffers.pop("num_batches_skipped", None)
        if option == "renorm" and self.renorm is not None:
            for name, value in (("renorm_r", torch.ones), ("renorm_d", torch.zeros)):
                dtype = None if self.running_mean is None else self.running_mean.dtype
                self.register_buffer(name, value(self.num_features, dtype=dtype, device=at), persistent=False)
        elif option == "renorm":
            for name in ("renorm_r", "renorm_d"):
                self._buffers.pop(name, None)
                self._non_persistent_buffers_set.discard(name)
        if option in ("pool", "max_steps", "domains"):
            self._shape_statistics(option)
        options = self.__dict__
        options["_pooled"] = any(options.get(key, OPTIONS[key]) != OPTIONS[key] for key in _POOLED)
        options["_special"] = any(options.get(key, OPTIONS.get(key)) != OPTIONS.get(key) for key in _SPECIAL)
        others = {"ghost_update", *_POOLED} - {"ghost_size"}
        alone = all(options.get(key, OPTIONS[key]) == OPTIONS[key] for key in others)
        options["_ghosts"] = bool(options.get("ghost_size")) and alone and not options["_special"]

    def _shape_statistics(self, option: str) -> None:
        """Rows of running statistics for each domain and time step; what is added takes the current domain's."""
        options = self.__dict__
        domains, steps = rows(options)
        shape = tuple(filter(None, (domains, steps)))
        for name, own in (("running_mean", 1), ("running_var", 1), ("num_batches_tracked", 0)):
            buffer = self._buffers.get(name)
            if buffer is None:
                continue
            lead, tail = buffer.shape[: buffer.ndim - own], buffer.shape[buffer.ndim - own :]
            if lead == shape:
                continue
            # A single axis of rows is of what this option is not about, where the layer has that.
            by_domain = not steps if option == "domains" else bool(domains)
            before = tuple(lead) if len(lead) == 2 else (*lead, 1) if by_domain else (1, *lead)
            kept = buffer.reshape(*before, *tail) if lead else buffer[None, None]
            if len(kept) != max(domains, 1):
                kept = kept[min(self.domain, len(kept) - 1)][None]
            if kept.shape[1] != max(steps, 1):
                kept = kept[:, :1]
            self._buffers[name] = kept.expand(max(domains, 1), max(steps, 1), *tail).reshape((*shape, *tail)).clone()
        if self.domain >= max(domains, 1):
            self.domain = 0
        if "nonfinite" in options:
            self._prepare("nonfinite")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**OPTIONS, **state})

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None and not isinstance(self.process_group, str):
            raise InputError(
                f"{self._name()} cannot be pickled, because its process_group is a handle of this process; set it to "
                "'world' or None before, or save net.state_dict()"
            )
        return dict(self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy in the same process group, which is a handle and is not copied."""
        memo[id(self.process_group)] = self.process_group
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    @property
    def decay(self) -> float | None:
        """1 - momentum, as Keras, Flax and ONNX call it; None where the average is cumulative."""
        return None if self.momentum is None else 1 - self.momentum

    @property
    def channels_last(self) -> bool:
        """Whether the channels are the last axis of the input, and not the second."""
        return self.pool is not None

    @property
    def normalizes_by_batch(self) -> bool:
        """Whether the batch's statistics normalize, or else the running ones."""
        if self.source == "auto":
            return self.training or (self.running_mean is None and self.running_var is None)
        return self.source == "batch"

    @property
    def updates_statistics(self) -> bool:
        """Whether a forward changes the running statistics; not while a backward runs, which recomputes."""
        if self.update == "auto":
            wanted = self.training and self.track_running_stats
        else:
            wanted = self.update == "always" and self.running_mean is not None
        return wanted and not recomputing()

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """activation(BN(input) + residual); see the class."""
        if not isinstance(input, (Tensor, PackedSequence)):  # a proxy of torch.fx
            return self._traced(input, residual)
        if (
            self._pooled
            or mask is not None
            or lengths is not None
            or weights is not None
            or isinstance(input, PackedSequence)
            or input.is_nested
        ):
            y = None
            if self._ghosts and mask is None and lengths is None and weights is None and isinstance(input, Tensor):
                y = self._at_once_in_ghosts(input, residual)
            return self._by_view(input, residual, mask, lengths, weights) if y is None else y
        self._check_input_dim(input)
        return self._by_channel(input, residual)

    def _at_once_in_ghosts(self, input: Tensor, residual: Tensor | None) -> Tensor | None:
        if input.is_nested or input.ndim < 2 or input.shape[1] != self.num_features:
            return None
        self._check_input_dim(input)
        return self._at_once(input, residual, self.ghost_size)

    def _at_once(self, input: Tensor, residual: Tensor | None, pool_size: int = 0) -> Tensor | None:
        """`forward` in one call of C++, or None where this is not for it."""
        # Straight from the dictionaries: Module's own look-up costs as much as a small kernel. A parametrized weight is
        # in none of them.
        parameters, buffers = self._parameters, self._buffers
        use_batch, updates = self.normalizes_by_batch, self.updates_statistics
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        mean = var = None
        if updates or not use_batch:
            mean = buffers["running_mean"] if "running_mean" in buffers else self.running_mean  # noqa: SIM401
            var = buffers["running_var"] if "running_var" in buffers else self.running_var  # noqa: SIM401
        return autograd.at_once(
            input, residual, weight, bias, mean, var, buffers.get("num_batches_tracked"), self.momentum, self.eps,
            self.activation, self.negative_slope, use_batch, updates, pool_size,
        )  # fmt: skip

    def _by_channel(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """`forward` where a channel is one pool, as in torch."""
        if not self._special:
            y = self._at_once(input, residual)
            if y is not None:
                return y
        use_batch, updates = self.normalizes_by_batch, self.updates_statistics
        mean, var, weight, bias, eps = self.running_mean, self.running_var, self.weight, self.bias, self.eps
        tracked = updates or not use_batch
        functional.check(
            input,
            mean if tracked else None,
            var if tracked else None,
            weight,
            bias,
            residual,
            self.activation,
            eps,
            use_batch,
        )
        if is_traced(input):
            return self._traced(input, residual)
        if self._special:
            return self._by_options(plain(input, residual), use_batch, updates)
        if not use_batch:
            if mean is None or var is None:
                raise InputError(
                    f"{type(self).__name__}: source='running', but the layer tracks no running statistics; "
                    "construct it with track_running_stats=True, or set source='auto'"
                )
            y = functional.by_population(
                input, mean, var, weight, bias, residual, eps, self.activation, self.negative_slope
            )
            if updates:
                self._update(mean, var, input, *functional.batch_statistics(input))
            return y
        y, batch_mean, batch_var = functional.by_batch(
            input, weight, bias, residual, eps, self.activation, self.negative_slope
        )
        if updates:
            self._update(mean, var, input, batch_mean, batch_var)
        return y

    def _update(
        self,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        pool_size: int = 0,
        count: int | None = None,
    ) -> None:
        counter, momentum = self._buffers.get("num_batches_tracked"), self.momentum
        if self.running == "cumulative":
            momentum = None
        if momentum is None and counter is None:
            momentum = 0.0
        if self.running == "debiased" and momentum and counter is not None:
            momentum = min(1.0, debiased(momentum, int(counter) + 1))
        unbiased = self.running_var_kind == "unbiased"
        functional.update(running_mean, running_var, counter, mean, var, x, momentum, unbiased, pool_size, count)

    def _by_view(
        self, input: Any, residual: Any, mask: Tensor | None, lengths: Tensor | None, weights: Tensor | None
    ) -> Any:
        """`forward` where the values of a channel are not simply one pool."""
        seen = view(input, residual, mask, lengths, weights, self.pool, self.batch_first, bool(self.ghost_size))
        if self.pool is None and isinstance(input, Tensor) and not input.is_nested:
            self._check_input_dim(input)
        return self._viewed(seen)

    def _viewed(self, seen: View) -> Any:
        """`forward` of the view of an input."""
        x = seen.x
        self._check_channels(x)
        parted = self.ghost_size or self.channel_groups or self.domains or not is_alone(self.process_group)
        if self.pool == "frame" and not seen.steps:  # sequences of no steps
            return seen.back(x.clone())
        if seen.mask is None and seen.weights is None and not seen.steps and not parted:
            return seen.back(self._by_channel(x, seen.residual))
        use_batch, updates = self.normalizes_by_batch, self.updates_statistics
        functional.check(x, None, None, self.weight, self.bias, seen.residual, self.activation, self.eps, False)
        return seen.back(self._by_options(seen, use_batch, updates))

    def _check_channels(self, x: Tensor) -> None:
        if x.shape[1] != self.num_features:
            raise InputError(
                f"{type(self).__name__}: expected {self.num_features} channels, got {x.shape[1]}"
                + (f"; with pool={self.pool!r} they are the last axis" if self.pool else "")
            )

    def _name(self) -> str:
        return f"layer '{self.label}'" if self.label else f"{type(self).__name__}({self.num_features})"

    def _pool(self, seen: View) -> Pool:
        """The pool that the layer's options and the view of its input make."""
        return functional.pool_of(seen, self.ghost_size, self.channel_groups, self.process_group, self._name())

    def _rows(self, steps: int, first: int) -> tuple[int, int]:
        """The rows of the running statistics that an input of so many steps updates: the first, and their number."""
        if not steps:
            return self.domain, 1
        first = min(first, self.max_steps)
        return self.domain * self.max_steps + first, min(steps, self.max_steps - first)

    def _population(self, steps: int = 0, first: int = 0) -> tuple[Tensor, Tensor]:
        """Running mean and variance of the domain, (C,), or of so many steps from the ``first`` on, (steps, C)."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            raise InputError(
                f"{type(self).__name__}: source='running', but the layer tracks no running statistics; "
                "construct it with track_running_stats=True, or set source='auto'"
            )
        if self.domains:
            mean, var = mean[self.domain], var[self.domain]
        if steps:
            batches = self.num_batches_tracked
            assert batches is not None
            reached = ((batches[self.domain] if self.domains else batches) > 0).sum()
            row = torch.arange(first, first + steps, device=mean.device).minimum(reached - 1).clamp(min=0)
            mean, var = mean[row], var[row]
        return mean, var

    def _by_options(self, seen: View, use_batch: bool, updates: bool) -> Tensor:
        """`forward` for all that is not torch's: pools, renormalization, example weighing, other estimates."""
        x, residual = seen.x, seen.residual
        weight, bias = self._affine()
        settings = (self.eps, self.activation, self.negative_slope)
        pool, frames = self._pool(seen), x.shape[0]
        if seen.steps and pool.process_group is not None and (use_batch or updates):
            seen = equal_steps(seen, pool)
            x, residual, pool = seen.x, seen.residual, self._pool(seen)
        measured = None
        if use_batch:
            functional.check_pools(x, self.eps, pool, seen.mask)
            if self.renorm is not None and self.running_mean is not None:
                measured, weight, bias = self._renormalized(seen, pool, weight, bias)
            apart = pool.is_merged or seen.mask is not None or seen.weights is not None or is_traced(x)
            if measured is not None and not apart:  # measured once is enough
                kind, slope = self.activation or "identity", self.negative_slope
                y = by_measured(x, weight, bias, residual, measured.mean, measured.var, 0, self.eps, kind, slope)
            else:
                y, measured = functional.by_pools(x, weight, bias, residual, *settings, pool, seen.mask, seen.weights)
        elif self.example_weight and x.numel():
            if seen.mask is not None:
                raise InputError("example_weight does not go with a mask, lengths or packed sequences yet")
            mean, var = self._population(seen.steps, seen.first)
            y = by_example(x, mean, var, weight, bias, residual, *settings, self.example_weight)
        else:
            size = pool.size if seen.steps else 0
            mean, var = self._population(seen.steps, seen.first)
            y = functional.by_population(x, mean, var, weight, bias, residual, *settings, size, seen.mask)
        if updates:
            self._take_in(seen, pool, measured or functional.measure(x, pool, seen.mask, seen.weights))
        return y[:frames] if seen.steps else y

    @torch.no_grad()
    def input_moments(
        self,
        input: Any,
        residual: Any = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Moments:
        """The moments of an input that `forward` takes, as the running statistics know them: (C,), or (max_steps, C).

        Those of ghost batches are merged, and those of channels that share statistics; of this process alone.
        """
        return self._moments(view(input, residual, mask, lengths, weights, self.pool, self.batch_first, False))

    def _moments(self, seen: View) -> Moments:
        """`input_moments` of the view of an input."""
        self._check_channels(seen.x)
        size = seen.x.shape[0] // seen.steps if seen.steps else 0
        counts, mean, var = functional.measure(seen.x, Pool(size, self.channel_groups), seen.mask, seen.weights)
        if self.pool != "frame":
            return Moments(counts[0, 0], mean[0], (var * counts)[0])
        first = min(seen.first, self.max_steps)
        kept = min(seen.steps, self.max_steps - first)
        missing = (0, 0, first, self.max_steps - first - kept)
        parts = (F.pad(each[:kept], missing) for each in (counts[:, :1], mean, var * counts))
        return Moments(*parts)

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """gamma and beta, as constants where they do not train."""
        weight, bias = self.weight, self.bias
        if self.trains_affine:
            return weight, bias
        return None if weight is None else weight.detach(), None if bias is None else bias.detach()

    def _renormalized(
        self, seen: View, pool: Pool, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Measured, Tensor, Tensor]:
        """The statistics of this batch, gamma r, and gamma d + beta."""
        if pool.size or seen.steps:
            raise InputError("renorm corrects one pool a channel; it does not go with ghost_size or pool='frame'")
        measured = functional.measure(seen.x, pool, seen.mask, seen.weights)
        dtype = seen.x.dtype if weight is None else weight.dtype
        r, d = self._corrections(measured.mean[0], measured.var[0], seen)
        return measured, *effective(weight, bias, r, d, dtype)

    def _corrections(self, mean: Tensor, var: Tensor, seen: View) -> tuple[Tensor, Tensor]:
        """r and d for this batch; a recomputation takes those of the forward that it repeats."""
        assert self.renorm is not None
        with torch.no_grad():
            if not recomputing():
                batches = self.num_batches_tracked
                assert batches is not None
                batches = batches[self.domain] if self.domains else batches
                r, d = self.renorm.corrections(mean, var, *self._population(), self.eps, batches)
                self.renorm_r.copy_(r)
                self.renorm_d.copy_(d)
            return self.renorm_r.to(mean.dtype, copy=True), self.renorm_d.to(mean.dtype, copy=True)

    @torch.no_grad()
    def _take_in(self, seen: View, pool: Pool, measured: Measured) -> None:
        """Updates the running statistics, or what `accumulate` collects for them."""
        if not self._pooled and seen.x.numel() == 0 and seen.mask is None:
            # Nothing to mix in; torch counts the batch all the same.
            if self.num_batches_tracked is not None and self._accumulator is None:
                self.num_batches_tracked.add_(1)
            return
        values = self._simple_count(seen, pool, measured)
        if values is not None:
            if values > 1 or seen.mask is None:
                self._update(self.running_mean, self.running_var, seen.x, *measured[1:], pool.size, values)
            return
        row, rows = self._rows(seen.steps, seen.first)
        if seen.steps:
            count, mean, var = (each[:rows] for each in measured)
        elif self.ghost_update == "decay" and len(measured.mean) > 1 and self._accumulator is None:
            self._take_in_turn(measured, row)
            return
        else:
            ghosts = self.process_group if pool.size and not is_alone(self.process_group) else None
            count, mean, var = functional.merged(measured, pool, ghosts)
        if (seen.mask is not None or seen.steps) and seen.weights is None:
            count = torch.where(count > 1, count, 0.0)  # what one value is left of tells nothing of the variance
        self._mix(Measured(count[:, :1], mean, var), row)

    def _mix(self, measured: Measured, row: int) -> None:
        """Mixes statistics into the rows from ``row`` on, or into what `accumulate` collects for them."""
        count, mean, var = measured
        if self._accumulator is not None:
            self._accumulator.add(mean, var, count, row)
        else:
            update(self, mean, var, count, row)

    def _simple_count(self, seen: View, pool: Pool, measured: Measured) -> int | None:
        """Values of a channel's statistics where one operator can mix them in, else None."""
        options = self.domains or seen.steps or seen.weights is not None or self.ghost_update != "merge"
        grouped = pool.groups and (pool.size or seen.mask is not None)
        refusing = self.nonfinite != "propagate" or self._accumulator is not None
        if options or grouped or refusing or self.process_group is not None:
            return None
        compiling = torch.compiler.is_compiling()
        if not compiling and autograd.is_transformed():  # the operator has no vmap
            return None
        # Reading a value back would wait for the device, or break the graph.
        unread = compiling or seen.x.device.type != "cpu"
        if self.running == "debiased" and unread:
            return None
        if seen.mask is None:
            channels = seen.x.shape[1] // pool.groups if pool.groups else 1
            return seen.x.shape[0] * math.prod(seen.x.shape[2:]) * channels
        return None if unread or len(measured.mean) > 1 else int(measured.counts[0, 0])

    def _take_in_turn(self, measured: Measured, row: int) -> None:
        """Each ghost batch as a batch of its own, k of them decaying as one: momentum 1 - (1 - p)^(1/k)."""
        momentum, batches = self.momentum, self.num_batches_tracked
        before = None if batches is None else batches.clone()
        assert momentum is not None
        self.momentum = 1 - (1 - momentum) ** (1 / len(measured.mean))
        try:
            for k in range(len(measured.mean)):
                count, mean, var = (each[k : k + 1] for each in measured)
                update(self, mean, var, count[:, :1], row)
        finally:
            self.momentum = momentum
        if batches is not None and before is not None:  # one batch
            batches.copy_(torch.where(batches > before, before + 1, before))

    def _traced(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The same on ATen's own operators, for other runtimes and for torch.fx."""
        use_batch, updates = self.normalizes_by_batch, self.updates_statistics
        if self._special or self._pooled or (updates and (self.momentum is None or not use_batch)):
            return self._by_options(plain(x, residual), use_batch, updates)
        tracked = updates or not use_batch
        momentum = 0.0 if self.momentum is None else self.momentum
        if updates and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            use_batch,
            momentum,
            self.eps,
        )
        return functional.finish(y, residual, self.activation, self.negative_slope)

    def _check_input_dim(self, input: Tensor) -> None:
        try:
            super()._check_input_dim(input)
        except ValueError as error:
            raise InputError(*error.args) from None

    # Modes in the state: in the metadata of a state_dict, so that its keys stay torch's

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and (mode := saved_modes.save(self)):
            metadata[prefix[:-1]]["batchnorm"] = mode

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any) -> None:
        key = prefix + "num_batches_skipped"
        if "num_batches_skipped" in self._buffers and key not in state_dict:
            state_dict[key] = self.num_batches_skipped
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            own, given = self._buffers.get(name), state_dict.get(prefix + name)
            if (
                own is not None
                and given is not None
                and own.ndim > given.ndim
                and own.shape[own.ndim - given.ndim :] == given.shape
            ):
                state_dict[prefix + name] = given.expand(own.shape)  # torch's one row serves all domains or steps
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        saved_modes.load(self, local_metadata.get("batchnorm"))

    def extra_repr(self) -> str:
        shown = {"running_var_kind": "running_var"}
        changed = [
            f"{shown.get(name, name)}={getattr(self, name)!r}"
            for name, default in OPTIONS.items()
            if getattr(self, name) != default
        ]
        return ", ".join([super().extra_repr(), *changed])


def rows(options: dict[str, Any]) -> tuple[int, int]:
    """The numbers of domains and time steps that have running statistics of their own; 0: they are not told apart."""
    return options.get("domains", 0), options.get("max_steps", 0) if options.get("pool") == "frame" else 0


def _momentum(momentum: float | None, decay: float | None) -> float | None:
    """The momentum of `momentum=` or `decay=`; warns once of what looks like the other convention."""
    global _warned
    if decay is not None:
        if momentum is not _MOMENTUM:
            raise InputError(f"got momentum={momentum} and decay={decay}, two names for one number; give one of them")
        if not 0 <= decay <= 1:
            raise InputError(f"decay must be in [0, 1], got {decay}")
        return 1 - decay
    if momentum is None:
        return None
    if 0.5 < momentum < 1 and not _warned:
        _warned = True
        warnings.warn(
            f"momentum={momentum}: torch's momentum is the share of the *new* batch. If TensorFlow's convention was "
            f"meant (the share of the old), write decay={momentum}",
            stacklevel=3,
        )
    return float(momentum)


def _check_numbers(num_features: int, eps: float, momentum: float | None) -> None:
    if num_features < 0:
        raise InputError(f"num_features must not be negative, got {num_features}")
    if not math.isfinite(eps):
        raise InputError(f"eps must be finite, got {eps}")
    if momentum is not None and not math.isfinite(momentum):
        raise InputError(f"momentum must be finite or None, got {momentum}")


_CHOICES: dict[str, tuple[Any, ...]] = {
    "activation": (None, *ACTIVATIONS),
    "source": SOURCES,
    "update": UPDATES,
    "trains_affine": (True, False),
    "running": ESTIMATORS,
    "running_var_kind": VARIANCES,
    "nonfinite": NONFINITE,
    "pool": POOLS,
    "batch_first": (True, False),
    "ghost_update": ("merge", "decay"),
}
_NUMBERS = ("max_steps", "ghost_size", "channel_groups", "domains")


def _check_option(name: str, value: Any) -> None:
    """Raises unless an option can be this."""
    if name in _CHOICES and value not in _CHOICES[name]:
        shown = "running_var" if name == "running_var_kind" else name
        raise InputError(f"unknown {shown} {value!r}; choose one of {', '.join(map(str, _CHOICES[name]))}")
    if name in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise InputError(f"{name} must be an integer of at least 0, got {value!r}")
    if name == "process_group" and isinstance(value, str) and value != "world":
        raise InputError(f"process_group must be None, 'world' or a group of torch.distributed, got {value!r}")
    if name == "renorm" and not (value is None or isinstance(value, Renorm)):
        raise InputError(f"renorm must be a Renorm or None, got {value!r}")
    if name == "example_weight" and not (isinstance(value, (int, float)) and 0 <= value <= 1):
        raise InputError(f"example_weight must be a number in [0, 1], got {value!r}")


def check_together(options: dict[str, Any], layer: Any, momentum: float | None) -> None:
    """Raises where options, each of them possible, do not go together."""
    pool, steps, ghosts = options["pool"], options["max_steps"], options["ghost_size"]
    groups, channels = options["channel_groups"], layer.num_features
    if pool is not None and not isinstance(layer, nn.BatchNorm1d):
        raise InputError(f"pool={pool!r} is for sequences (batch, time, channels), so for BatchNorm1d alone")
    if pool == "frame" and not steps:
        raise InputError("pool='frame' needs max_steps, the number of time steps with statistics of their own")
    if pool != "frame" and steps:
        raise InputError(f"max_steps={steps} goes with pool='frame' alone")
    if pool is None and not options["batch_first"]:
        raise InputError("batch_first=False goes with pool='sequence' or 'frame'; (N, C, L) has its batch first")
    if ghosts and pool == "frame":
        raise InputError("ghost_size does not go with pool='frame', whose pools are the time steps")
    if options["ghost_update"] == "decay" and (momentum is None or options["running"] != "ema" or not ghosts):
        raise InputError("ghost_update='decay' needs ghost_size, running='ema' and a momentum")
    if options["ghost_update"] == "decay" and options["process_group"] is not None:
        raise InputError("ghost_update='decay' takes in this rank's ghosts alone; with process_group= give 'merge'")
    if groups and channels % groups:
        raise InputError(f"channel_groups={groups} does not divide {channels} channels into equal groups")
    if options["running"] == "debiased" and momentum is None:
        raise InputError("running='debiased' corrects a moving average and needs a momentum, got None")
    if options["renorm"] is not None and not layer.track_running_stats:
        raise InputError("renorm= needs running statistics, got track_running_stats=False")
    if options["renorm"] is not None and (ghosts or pool == "frame"):
        raise InputError("renorm corrects one pool a channel; it does not go with ghost_size or pool='frame'")
    if (options["domains"] or pool == "frame") and not layer.track_running_stats:
        raise InputError("domains= and pool='frame' keep running statistics, got track_running_stats=False")


_DOC = """Batch normalization over {axes}, a drop-in for `torch.nn.{name}`.

``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``; ``var`` is the *biased* variance, the
running variance kept for inference the *unbiased* one, as in torch. Constructor, state_dict, errors and hooks are
torch's; what is new is keyword-only.

Args:
    num_features: C.
    eps: added to the variance, inside the root.
    momentum: share of the *new* statistics in the running ones; None for the cumulative average.
    affine: whether gamma (``weight``) and beta (``bias``) are learned.
    track_running_stats: whether running statistics are kept.
    bias: whether beta is learned where gamma is.
    activation: fused into the layer: "relu", "relu6", "leaky_relu", "silu", "gelu" (exact), "hardswish", "sigmoid",
        "tanh" or None.
    negative_slope: of "leaky_relu".
    source: which statistics normalize: "auto" (the batch's in training, the running ones in evaluation, as torch),
        "batch" or "running".
    update: whether the running statistics are updated: "auto" (in training, as torch), "never" or "always".
    decay: 1 - momentum, the share of the *old* statistics; give one of the two.
    running: the estimate: "ema" (a moving average), "debiased" (divided by 1 - decay^t) or "cumulative" (the plain
        average over batches; momentum is not used).
    running_var: the variance kept for inference: "unbiased" (as torch) or "biased" (as Keras and Flax); attribute
        ``running_var_kind``.
    nonfinite: what a batch with infinite or NaN statistics does: "propagate" (as torch), "skip" (the update is
        refused) or "skip_channel" (in the channels concerned); counted in the buffer ``num_batches_skipped``.
    renorm: batch renormalization in training; see `Renorm`. r and d of the last batch: ``renorm_r``, ``renorm_d``.
    pool: of `BatchNorm1d`: "sequence" or "frame" make the input (batch, time, channels): all valid frames are one pool,
        or those of each time step are. None: (N, C) or (N, C, L), pooled over N and L.
    batch_first: of sequences; False for (time, batch, channels).
    max_steps: time steps that have running statistics of their own with ``pool="frame"``. In evaluation later steps,
        and those that training never reached, use the last one's.
    ghost_size: samples of a ghost batch, each normalized by its own statistics in training; the last may be smaller
        (of one value: the output is beta). 0: none.
    ghost_update: what the running statistics take in: "merge", the statistics of the whole batch, or "decay", one
        ghost batch after the other with momentum 1 - (1 - momentum)^(1/k), so that k of them decay as one batch.
    channel_groups: number of groups of adjacent channels that share statistics in training ("batch and group"); 0:
        each channel for itself.
    process_group: "world" or a group of torch.distributed, whose ranks share statistics in training: one collective
        forward, one backward. Ghost batches stay on their rank; the running statistics alone are then shared.
    domains: number of sets of running statistics over the same gamma and beta; `use_domain` chooses. 0: one set.
    example_weight: alpha in [0, 1], how much an example's own statistics count when the running ones normalize;
        see `tune_example_weight`.

Shape:
    input {shape}, residual and output the same. ``forward(x, residual, mask, lengths, weights)``: mask, boolean, True =
    valid, (N, *space) or what broadcasts to it; lengths, integers (N,), valid lengths of the last axis (of time, for
    sequences); weights as mask, >= 0, for mean and variance in training. Invalid values reach nothing, and the output
    is zero there. A ``PackedSequence`` (frames of C channels), or a jagged nested tensor (N, *, C) or (N, C, *), comes
    out as it went in. A pool without values changes nothing.

Raises:
    InputError: options or shapes that do not fit, one value per channel in training.
    DtypeError: dtypes or devices that do not fit.
    SynchronizationError: ranks of the process group that do not take part in time.

Source: Ioffe & Szegedy 2015, Algorithms 1 and 2; Ioffe 2017 (renorm); Summers & Dinneen 2020 (example_weight,
channel_groups); Hoffer et al. 2017 (ghost_size); Laurent et al. 2016 (pool).

Example:
    >>> import torch
    >>> layer = {name}(4, activation="relu")
    >>> layer(torch.randn({example})).shape
    torch.Size([{example}])
"""


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    __doc__ = _DOC.format(
        axes="the batch (and length)",
        name="BatchNorm1d",
        shape="(N, C) or (N, C, L)",
        example="8, 4",
    )


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(axes="batch and image", name="BatchNorm2d", shape="(N, C, H, W)", example="8, 4, 5, 5")


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    __doc__ = _DOC.format(
        axes="batch and volume",
        name="BatchNorm3d",
        shape="(N, C, D, H, W)",
        example="8, 4, 3, 3, 3",
    )


BY_RANK: dict[int, type[_BatchNorm]] = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}
"""The layer for so many axes of space (1 also for none)."""
