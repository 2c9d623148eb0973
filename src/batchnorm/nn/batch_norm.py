"""The layers: drop-in subclasses of torch.nn's, with explicit modes and fusions."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from batchnorm import functional
from batchnorm.batch import Batch, batch_of
from batchnorm.errors import InputError, SurgeryError
from batchnorm.moments import Moments
from batchnorm.nn import buffers as layer_buffers
from batchnorm.nn import options, outside, saved_modes
from batchnorm.nn.leaves import is_of_this_package, recorded_call
from batchnorm.nn.options import DEFAULTS
from batchnorm.nn.outside import Swappable
from batchnorm.ops import normalization as ops
from batchnorm.ops.context import Way, is_compiled, is_mapped, is_recomputing, is_recorded, is_traced_by_jit, way
from batchnorm.ops.fusion import Fusion
from batchnorm.ops.schemas import carry_dtype
from batchnorm.pools import Pool, is_alone
from batchnorm.running import Accumulator, Estimator, Population, debiased
from batchnorm.sources import Given, OfBatch, Renorm, Renormalized, Source, Weighed, by_step, measure, of_one_step


class _Default(float):
    """A default that can be told from the same number given by hand."""


_MOMENTUM = _Default(0.1)
_warned = False


class BatchNorm(Swappable, nn.modules.batchnorm._BatchNorm):
    """What `BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` share; see there for options and shapes.

    ``forward`` makes a `Batch` of its input, and answers the three questions in turn: which values share statistics
    (`Pool`), which statistics normalize (`Source`), and how the population takes in the batch's (`Population`).
    """

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
    affine_by: str
    domain: int = 0
    reads_sizes: bool = False  # whether forward takes frames and the sizes of steps, and not sequences
    keeps_output: bool = False  # whether the output is kept for the backward in `recompute_outputs`, too
    label: str = ""  # the layer's name in its network, for errors of synchronization
    num_batches_skipped: Tensor
    renorm_r: Tensor
    renorm_d: Tensor
    running_carry: Tensor | None = None  # what rounding left of the running statistics; see `buffers.carry`
    _source: Source | None = None  # normalizes in place of the layer's own, which then takes in nothing
    _accumulator: Accumulator | None = None  # takes in statistics in place of the buffers
    _padding: Any = None  # tells the valid frames of an input that comes without them; see `padding.mask_padding`
    _call_size: int | None = None  # samples of a pool in the C++ call on the input itself; None: there is none
    _estimates: bool = False  # whether the running statistics are other than torch's
    _is_special: bool = True  # whether that call cannot compute the layer whatever its pools are

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = _MOMENTUM,
        affine: bool | str = True,
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
        affine_by: str = "shared",
    ) -> None:
        if isinstance(affine, str):
            affine_by = _agreed(affine, affine_by)
            affine = True
        given = dict(locals())  # by the names of the arguments
        values = {**DEFAULTS, **{name: given[argument] for argument, name in options.ATTRIBUTES.items()}}
        momentum = _momentum(momentum, decay)
        _check_numbers(num_features, eps, momentum)
        for name, value in values.items():
            options.check(name, value)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        options.check_together(values, self, momentum)
        if affine and not bias:
            self.register_parameter("bias", None)
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in DEFAULTS:
            options.check(name, value)
        super().__setattr__(name, value)
        if name in DEFAULTS or name in layer_buffers.HANDED_IN:
            layer_buffers.prepare(self, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        old = ("_special", "_pooled", "_ghosts")  # flags of pickles made before
        super().__setstate__({**DEFAULTS, **{name: value for name, value in state.items() if name not in old}})
        layer_buffers.set_flags(self)

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

    def train(self, mode: bool = True) -> Any:
        """Sets the mode; warns if evaluation would use running statistics that are not finite."""
        super().train(mode)
        if not mode:
            layer_buffers.warn_of_overflow(self)
        return self

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for key, parameter in self._parameters.items():
            if parameter is not None and self.__dict__.get("affine_by", "shared") != "shared":
                nn.init.constant_(parameter, float(key.startswith("weight")))

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        layer_buffers.forget_carry(self)
        layer_buffers.forget_refusals(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What ``.to()``, ``.half()`` and their like do; running statistics that are wide stay so."""
        with layer_buffers.wide_statistics(self):
            return super()._apply(fn, recurse)

    @property
    def decay(self) -> float | None:
        """1 - momentum, as Keras, Flax and ONNX call it; None where the average is cumulative."""
        return None if self.momentum is None else 1 - self.momentum

    @property
    def channels_last(self) -> bool:
        """Whether the channels are the last axis of the input, and not the second."""
        return self.__dict__.get("pool") is not None

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
        return wanted and not is_recomputing()

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """activation(BN(input) + residual); see the class."""
        size = self._call_size
        is_bare = mask is None and lengths is None and weights is None
        if size is not None and is_bare and isinstance(input, Tensor) and not input.is_nested:
            self._check_input_dim(input)
            y = self._in_one_call(input, residual, size)
            if y is None and not size:
                y = self._in_two_calls(input, residual)
            if y is not None:
                return y
            return self._normalize(Batch(input, residual))  # type: ignore[no-any-return]
        if isinstance(input, fx.Proxy) and is_of_this_package(type(self)):
            options = {"residual": residual, "mask": mask, "lengths": lengths, "weights": weights}
            if (recorded := recorded_call(self, (input,), options)) is not None:
                return recorded
        batch = self._batch(input, residual, mask, lengths, weights)
        if not self._is_special and self._is_whole(batch) and isinstance(batch.x, Tensor):
            y = self._in_one_call(batch.x, batch.residual, 0)
            if y is not None:
                return batch.restore(y)  # type: ignore[no-any-return]
        return self._normalize(batch)  # type: ignore[no-any-return]

    def forward_parts(self, parts: list[Tensor]) -> Tensor | None:
        """`forward` of `torch.cat(parts, 1)`, which is not made; None, with nothing done, if it cannot do without."""
        if self._call_size != 0 or type(self).forward is not BatchNorm.forward:
            return None
        return self._in_one_call(parts, None, 0)

    def _in_one_call(self, x: Tensor | list[Tensor], residual: Tensor | None, pool_size: int) -> Tensor | None:
        """`forward` in one call of C++, or None where there is none for it."""
        if pool_size and isinstance(x, Tensor) and (x.ndim < 2 or x.shape[1] != self.num_features):
            return None
        # Straight from the dictionaries: Module's own look-up costs as much as a small kernel. A parametrized weight is
        # in none of them.
        parameters, buffers = self._parameters, self._buffers
        use_batch, updates = self.normalizes_by_batch, self.updates_statistics
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        mean = var = carry = None
        if updates and (carry := self.running_carry) is None:
            carry = layer_buffers.carry(self)
        if updates or not use_batch:
            mean = buffers["running_mean"] if "running_mean" in buffers else self.running_mean  # noqa: SIM401
            var = buffers["running_var"] if "running_var" in buffers else self.running_var  # noqa: SIM401
        if self._estimates:
            return self._in_one_call_with(x, residual, weight, bias, mean, var, carry, use_batch, updates, pool_size)
        y = ops.in_one_call(
            x, residual, weight, bias, mean, var, buffers.get("num_batches_tracked"), self.momentum, self.eps,
            self.activation, self.negative_slope, use_batch, updates, pool_size, carry, self.keeps_output,
        )  # fmt: skip
        if updates and y is not None:
            layer_buffers.look_at_times(self)
        return y

    def _in_one_call_with(
        self,
        x: Tensor | list[Tensor],
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        carry: Tensor | None,
        use_batch: bool,
        updates: bool,
        pool_size: int,
    ) -> Tensor | None:
        """`_in_one_call` of a layer whose running statistics are estimated in another way than torch's."""
        batches, skipped = self._buffers.get("num_batches_tracked"), self._buffers.get("num_batches_skipped")
        if is_compiled() or self.affine_by != "shared" or (mean is not None and mean.device.type != "cpu"):
            return None
        if self.domains and mean is not None and var is not None:
            row = self.domain
            mean, var, carry = mean[row], var[row], None if carry is None else carry[:, row]
            batches, skipped = (None if each is None else each[row] for each in (batches, skipped))
        momentum = self.momentum
        if self.running == "cumulative":
            momentum = None
        elif updates and self.running == "debiased" and momentum and batches is not None:
            momentum = debiased(momentum, int(batches) + 1)
        y = ops.in_one_call(
            x, residual, weight, bias, mean, var, batches, momentum, self.eps, self.activation, self.negative_slope,
            use_batch, updates, pool_size, carry, self.keeps_output, self.running_var_kind == "unbiased", skipped,
        )  # fmt: skip
        if updates and y is not None:
            layer_buffers.look_at_times(self)
        return y

    def _in_two_calls(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """The same through Python, or None for a recorder, for vmap and for a layer without the statistics it needs."""
        if self._estimates:
            return None
        use_batch, updates, how = self.normalizes_by_batch, self.updates_statistics, way(x)
        mean, var, fusion = self.running_mean, self.running_var, self._fusion(residual)
        lacks_statistics = not use_batch and (mean is None or var is None)
        if lacks_statistics or how is Way.RECORDED or (how is Way.TRANSFORMED and is_mapped()):
            return None
        tracked = updates or not use_batch
        functional.check(x, mean if tracked else None, var if tracked else None, fusion, use_batch, self._advice)
        batches, carry = self._buffers.get("num_batches_tracked"), None
        if updates and how is Way.EAGER and mean is not None:
            carry = self.running_carry
            if carry is None or carry.shape[1:] != mean.shape or carry.dtype is not carry_dtype(mean.dtype):
                carry = layer_buffers.carry(self)
        return ops.in_two_calls(x, fusion, mean, var, batches, self.momentum, use_batch, updates, carry)

    def _normalize(self, batch: Batch) -> Any:
        """The output that belongs to the input: the pool, the source and the population, one after the other."""
        given = self._source
        use_batch = given is None and self.normalizes_by_batch
        updates = given is None and self.updates_statistics
        fusion = self._fusion(batch.residual)
        if isinstance(batch.x, Tensor):  # and no proxy of torch.fx
            if self.pool == "frame" and not batch.steps:  # sequences of no steps
                return batch.restore(batch.x.clone())
            self._check(batch, fusion, use_batch, updates)
        if batch.is_plain and is_recorded(batch.x) and (y := self._in_one_node(batch.x, fusion)) is not None:
            return batch.restore(y)
        if (use_batch or updates) and is_traced_by_jit():
            raise InputError(
                f"{self._name()}: torch.jit.trace would record the size of this batch as a constant of its statistics, "
                "which are wrong for another; call .eval() first, or use torch.export"
            )
        if isinstance(batch.x, fx.Proxy):
            raise InputError(
                f"{self._name()}: torch.fx cannot record its options inside a forward that is not this package's; let "
                "your tracer keep the layer as a leaf (is_leaf_module), or use torch.export"
            )
        group = self.process_group if given is None else None
        shared = (self.ghost_size, self.channel_groups, group, self._name())
        batch, pool = functional.pools_of(batch, shared, use_batch or updates)
        if use_batch:
            functional.check_pools(batch, self.eps, pool, self._advice)
        population = self._population(updates)
        source = given or self._own_source(batch, population, use_batch)
        fusion = fusion._replace(residual=batch.residual)
        if self.affine_by == "step":
            last = None if use_batch else population.last_row()
            y, measured = by_step(source, batch, pool, fusion, last)
        else:
            y, measured = source.normalize(batch, pool, fusion)
        if updates:
            population.take(measured or measure(batch, pool), pool)
            layer_buffers.look_at_times(self)
        return batch.restore(y)

    def _own_source(self, batch: Batch, population: Population, use_batch: bool) -> Source:
        """The statistics that normalize by the layer's options and mode."""
        if use_batch and self.renorm is not None and self.running_mean is not None:
            return Renormalized(self.renorm, population, self.renorm_r, self.renorm_d)
        if use_batch:
            return OfBatch()
        known = population.read(batch.steps, batch.first)
        return Weighed(*known, self.example_weight) if self.example_weight else Given(*known)

    def _population(self, updates: bool = True) -> Population:
        """The running statistics of the domain in use, and how they take in a batch."""
        layer_buffers.check_shapes(self)
        in_turn = self.ghost_update == "decay"
        buffers, domain = self._buffers, self.domain if self.domains else None
        return Population(
            self.running_mean,
            self.running_var,
            Estimator(self.momentum, self.running, self.running_var_kind, self.nonfinite, in_turn),
            buffers.get("num_batches_tracked"),
            buffers.get("num_batches_skipped"),
            domain,
            self.max_steps,
            self._accumulator,
            type(self).__name__,
            layer_buffers.carry(self) if updates else None,
        )

    def _fusion(self, residual: Tensor | None) -> Fusion:
        """The part after the statistics; gamma and beta are constants where they do not train."""
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        if self.domain and self.affine_by == "domain":
            weight, bias = self._parameters.get(f"weight_{self.domain}"), self._parameters.get(f"bias_{self.domain}")
        if not self.trains_affine:
            weight = None if weight is None else weight.detach()
            bias = None if bias is None else bias.detach()
        return Fusion(weight, bias, residual, self.eps, self.activation, self.negative_slope)

    def _as_batch(
        self, input: Any, residual: Any, mask: Tensor | None, lengths: Tensor | None, weights: Tensor | None
    ) -> Batch:
        """The batch of an input. Layers that take other inputs override this method and no other."""
        ghosts = bool(self.ghost_size)
        return batch_of(input, residual, mask, lengths, weights, self.pool, self.batch_first, ghosts)

    def _batch(self, input: Any, *given: Any) -> Batch:
        """`_as_batch`, after checks of the input's axes."""
        batch = self._as_batch(input, *self._told(input, *given))
        if batch.x is input and isinstance(input, Tensor):
            self._check_input_dim(input)
        if batch.x is not input or self.process_group is not None:
            self._check_channels(batch.x)
        return batch

    def _told(
        self, input: Any, residual: Any, mask: Tensor | None, lengths: Tensor | None, weights: Tensor | None
    ) -> tuple[Any, ...]:
        """What was given beside an input, with the mask that `mask_padding` knows where none was."""
        if self._padding is not None and mask is None and lengths is None:
            mask = self._padding.mask_of(self, input)
        return residual, mask, lengths, weights

    def _is_whole(self, batch: Batch) -> bool:
        """Whether a channel is one pool with one set of statistics, as in torch."""
        parted = self.ghost_size or self.channel_groups or self.domains or not is_alone(self.process_group)
        return batch.is_plain and not parted

    def _check(self, batch: Batch, fusion: Fusion, use_batch: bool, updates: bool) -> None:
        """Raises for a batch that the layer cannot take."""
        if not self._is_whole(batch):
            self._check_channels(batch.x)
            fusion = of_one_step(fusion)
            functional.check(batch.x, None, None, fusion, False)
            return
        tracked = updates or not use_batch
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        functional.check(batch.x, mean, var, fusion, use_batch, self._advice)

    def _advice(self) -> str:
        """How to mend a batch of too few values."""
        if self.running_mean is None:
            return (
                f"{self._name()} keeps no running statistics (track_running_stats=False), so batches normalize in "
                "evaluation as well: use a larger batch, or give it some by "
                "bn.calibrate(net, batches, track_running_stats=True)"
            )
        if self.source == "batch":
            return f"{self._name()} has source='batch': use a larger batch, or bn.set_mode(net, source='auto')"
        return functional.evaluate()

    def _check_channels(self, x: Tensor) -> None:
        if x.shape[1] != self.num_features:
            raise InputError(
                f"{type(self).__name__}: expected {self.num_features} channels, got {x.shape[1]}"
                + (f"; with pool={self.pool!r} they are the last axis" if self.pool else "")
            )

    def _check_input_dim(self, input: Tensor) -> None:
        try:
            super()._check_input_dim(input)
        except ValueError as error:
            raise InputError(*error.args) from None

    def _name(self) -> str:
        return f"layer '{self.label}'" if self.label else f"{type(self).__name__}({self.num_features})"

    def _lost_in_a_swap(self, caller: str) -> str | None:
        kept = {"process_group", *(("activation", "negative_slope") if outside.GUARDED in self.__dict__ else ())}
        lost = [o for o in options.changed(self) if o.name not in kept]
        return ", ".join(f"{o.spelled}={getattr(self, o.name)!r}" for o in lost) or None

    def _lost_in_evaluation(self) -> str | None:
        guarded = outside.GUARDED in self.__dict__
        if self.source == "batch" or self.update == "always":
            return f"source={self.source!r}, update={self.update!r}"
        lost = [o for o in options.changed(self) if not o.affine or (o.name == "activation" and not guarded)]
        return ", ".join(f"{o.spelled}={getattr(self, o.name)!r}" for o in lost) or None

    def _in_one_node(self, x: Tensor, fusion: Fusion) -> Tensor | None:
        """`forward` for a recorder as one batch norm of ATen's, or None where there is none for it."""
        use_batch, updates = self.normalizes_by_batch, self.updates_statistics
        if self._call_size != 0 or self._estimates or (updates and (self.momentum is None or not use_batch)):
            return None
        if updates and self.num_batches_tracked is not None:
            ops.count_one(self.num_batches_tracked, x)
        tracked = updates or not use_batch
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        return ops.in_one_node(x, fusion, mean, var, use_batch, 0.0 if self.momentum is None else self.momentum)

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
        return self._moments(self._as_batch(input, *self._told(input, residual, mask, lengths, weights)))

    def _moments(self, batch: Batch) -> Moments:
        """`input_moments` of a batch."""
        self._check_channels(batch.x)
        size = batch.x.shape[0] // batch.steps if batch.steps else 0
        measured = measure(batch, Pool(size, self.channel_groups))
        counts, mean, var = measured.counts, measured.mean, measured.var
        if self.pool != "frame":
            return Moments(counts[0, 0], mean[0], (var * counts)[0])
        first = min(batch.first, self.max_steps)
        kept = min(batch.steps, self.max_steps - first)
        missing = (0, 0, first, self.max_steps - first - kept)
        return Moments(*(F.pad(each[:kept], missing) for each in (counts[:, :1], mean, var * counts)))

    # Modes in the state: in the metadata of a state_dict, so that its keys stay torch's

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and (mode := saved_modes.save(self)):
            metadata[prefix[:-1]]["batchnorm"] = mode

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any) -> None:
        layer_buffers.fill_in(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        layer_buffers.settle(self)
        layer_buffers.forget_carry(self)
        saved_modes.load(self, local_metadata.get("batchnorm"))

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *options.shown(self)])


_BatchNorm = BatchNorm
"""The name of the base class in version 0.1."""


def _agreed(affine: str, affine_by: str) -> str:
    """``affine_by`` of a constructor's ``affine=`` that is a word."""
    if affine_by not in ("shared", affine):
        raise InputError(
            f"got affine={affine!r} and affine_by={affine_by!r}, two words for one thing; give one of them"
        )
    return affine


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


_DOC = """Batch normalization over {axes}, a drop-in for `torch.nn.{name}`.

``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)``; ``var`` is the *biased* variance, the
running variance kept for inference the *unbiased* one, as in torch. Constructor, state_dict, errors and hooks are
torch's; what is new is keyword-only.

Args:
    num_features: C.
    eps: added to the variance, inside the root.
    momentum: share of the *new* statistics in the running ones; None for the cumulative average.
    affine: whether gamma (``weight``) and beta (``bias``) are learned; "domain" and "step" are True with that
        ``affine_by``.
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
    domains: number of sets of running statistics; `use_domain` chooses. 0: one set.
    affine_by: what has a gamma and beta of its own: "shared" (all values of a channel have the same), "domain" (each
        of ``domains``: ``weight`` and ``bias`` are those of domain 0, ``weight_1`` and ``bias_1`` of domain 1, ...) or
        "step" (each time step of ``pool="frame"``: (max_steps, C)).
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
channel_groups); Hoffer et al. 2017 (ghost_size); Laurent et al. 2016 (pool); Xie et al. 2020, Adversarial examples
improve image recognition, and Antoniou et al. 2019, How to train your MAML (affine_by).

Examples:
    >>> import torch
    >>> layer = {name}(4, activation="relu")
    >>> layer(torch.randn({example})).shape
    torch.Size([{example}])
"""


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    __doc__ = _DOC.format(
        axes="the batch (and length)",
        name="BatchNorm1d",
        shape="(N, C) or (N, C, L)",
        example="8, 4",
    )


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(axes="batch and image", name="BatchNorm2d", shape="(N, C, H, W)", example="8, 4, 5, 5")


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    __doc__ = _DOC.format(
        axes="batch and volume",
        name="BatchNorm3d",
        shape="(N, C, D, H, W)",
        example="8, 4, 3, 3, 3",
    )


BY_RANK: dict[int, type[BatchNorm]] = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}
"""The layer for so many axes of space (1 also for none)."""


def as_torch(layer: BatchNorm) -> nn.Module:
    """The layer of torch.nn that holds the same tensors and computes the same.

    Raises:
        SurgeryError: if the layer is more than torch's.
    """
    kind = next((theirs for theirs in _TORCH if isinstance(layer, theirs)), None)
    changed = [option for option in options.changed(layer) if option.name != "negative_slope"]
    if kind is None or changed or not is_of_this_package(type(layer)):
        what = f"has {changed[0].spelled}={getattr(layer, changed[0].name)!r}" if changed else "is of another class"
        raise SurgeryError(
            f"{layer._name()} {what}, which torch.nn's layers lack; bn.revert(net) after bn.accelerate, or "
            "bn.convert(net, to='torch'), gives torch's layers back"
        )
    layer_buffers.widen_parameters(layer)
    plain = kind(layer.num_features, layer.eps, layer.momentum, device="meta")
    names = plain.__dict__.keys() | {"affine", "track_running_stats"}
    plain.__dict__.update({name: value for name, value in layer.__dict__.items() if name in names})
    return plain


_TORCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
outside.teach_fusers(dict(zip(_TORCH, BY_RANK.values(), strict=True)), as_torch)
