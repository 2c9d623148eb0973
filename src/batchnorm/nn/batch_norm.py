"""The layers: drop-in subclasses of torch.nn's, with explicit modes and fusions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from batchnorm import functional
from batchnorm.batch import Batch, batch_of, is_plain
from batchnorm.errors import InputError
from batchnorm.exchanges import agree
from batchnorm.moments import Moments
from batchnorm.nn import buffers as layer_buffers
from batchnorm.nn import options
from batchnorm.nn.configured import ConfiguredLayer
from batchnorm.nn.leaves import is_of_this_package, recorded_call
from batchnorm.nn.short_calls import at_once, batch_at_once, in_one_call, in_one_node, with_depthwise
from batchnorm.ops.context import is_compiled, is_recorded, is_traced_by_jit
from batchnorm.ops.fusion import Fusion
from batchnorm.pools import Pool, is_alone, process_group
from batchnorm.running import Estimator, Population
from batchnorm.sources import Given, OfBatch, Renormalized, Source, Weighed, by_step, measure, of_one_step


class BatchNorm(ConfiguredLayer):
    """What `BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` share; see there for options and shapes.

    ``forward`` makes a `Batch` of its input, and answers the three questions in turn: which values share statistics
    (`Pool`), which statistics normalize (`Source`), and how the population takes in the batch's (`Population`).

    Args:
        num_features: C. All others are those of `BatchNorm2d`.

    Raises:
        InputError: an option, or an input of `forward`, that does not fit; the text says which.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2.

    Examples:
        >>> isinstance(BatchNorm2d(3), BatchNorm)
        True
    """

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """activation(BN(input) + residual); see the class."""
        is_bare = weights is None and isinstance(input, Tensor) and not input.is_nested
        if is_bare and (y := at_once(self, input, residual, mask, lengths)) is not None:
            return y
        if isinstance(input, fx.Proxy) and is_of_this_package(type(self)):
            options = {"residual": residual, "mask": mask, "lengths": lengths, "weights": weights}
            if (recorded := recorded_call(self, (input,), options)) is not None:
                return recorded
        batch = self._batch(input, residual, mask, lengths, weights)
        tried = is_bare and self._call_size is not None
        y = None if tried else batch_at_once(self, batch)
        return self._normalize(batch) if y is None else batch.restore(y)  # type: ignore[no-any-return]

    def forward_parts(self, parts: list[Tensor]) -> Tensor | None:
        """`forward` of `torch.cat(parts, 1)`, which is not made; None, with nothing done, if it cannot do without."""
        return in_one_call(self, parts, None, 0) if self._is_simple() else None

    def forward_depthwise(
        self, conv: Any, padding: tuple[int, ...] | None, x: Tensor, before: BatchNorm | None = None
    ) -> Tensor | None:
        """`forward` of a depthwise convolution of x, or of ``before(x)``; None, with nothing done, if it cannot do so.

        What lies between them is in no memory.
        """
        weight = conv._parameters.get("weight")  # a parametrized one is not there
        if weight is None or not self._is_simple() or not (before is None or before._is_simple()):
            return None
        if before is self:  # whose second batch is another one than its first
            return None
        convolution = (conv._parameters.get("bias"), conv.stride, padding, conv.dilation)
        return with_depthwise(self, x, weight, convolution, before)

    def forward_pooled(self, x: Tensor, windows: tuple[Any, ...]) -> Tensor | None:
        """Windows of `forward` pooled, which lies in no memory; None, with nothing done, if it must.

        The windows: kernel size, stride and padding, each of two numbers; whether sizes are rounded up; whether means
        are asked, or else the largest values.
        """
        return in_one_call(self, (x, *windows), None, 0) if self._is_simple() else None

    def _is_simple(self) -> bool:
        return self._call_size == 0 and not self._varies and type(self).forward is BatchNorm.forward

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
        if is_plain(batch) and is_recorded(batch.x) and (y := in_one_node(self, batch.x, fusion)) is not None:
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
        if group is not None and (use_batch or updates):
            self._agree(batch.x)
        shared = (self.ghost_size, self.channel_groups, group, self._name(), self._place)
        batch, pool = functional.pools_of(batch, shared, use_batch or updates)
        if use_batch:
            functional.check_pools(batch, self.eps, pool, self._advice)
        population = self._population(updates)
        source = given or self._own_source(batch, population, use_batch)
        fusion = fusion.with_residual(batch.residual)
        if self.affine_by == "step":
            last = None if use_batch else population.last_row()
            y, measured = by_step(source, batch, pool, fusion, last)
        else:
            y, measured = source.normalize(batch, pool, fusion)
        if updates:
            population.take(measured or measure(batch, pool), pool)
            layer_buffers.look_at_times(self)
        return batch.restore(y)

    def _agree(self, x: Tensor) -> None:
        """Before the first exchange, compares the layer with those of the other ranks.

        Raises:
            SynchronizationError: they differ.
        """
        if self._place or is_compiled() or is_alone(self.process_group):
            return
        changed = (o for o in options.changed(self) if o.name != "process_group")
        told = [f"{self.num_features} channels of {x.dtype}", f"eps={self.eps}", f"momentum={self.momentum}"]
        told += [f"{o.spelled}={getattr(self, o.name)!r}" for o in changed]
        group = process_group(self.process_group)
        self.__dict__["_place"] = agree(group, self._name(), ", ".join(told), x.device)

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
        return is_plain(batch) and not parted

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


_BatchNorm = BatchNorm
"""The name of the base class in version 0.1."""


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
        "tanh", "elu" (of alpha 1), "mish", "gelu_tanh" (the approximation) or None.
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
