"""A callback for Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from batchnorm.errors import MissingDependencyError
from batchnorm.integrations.life import Life, options_of, warn_of_trap

try:
    import lightning.pytorch as trainer_package
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        import pytorch_lightning as trainer_package
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise MissingDependencyError(
            "batchnorm.integrations.lightning needs Lightning: pip install lightning"
        ) from error


class BatchNormCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Batch normalization through a training with Lightning: what `Life` does, at the trainer's own points.

    Micro-batches of ``accumulate_grad_batches`` update the running statistics once, as one batch. Checkpoints of the
    trainer hold the modes of the layers and the averaged network.

    Args:
        batches: for calibration; by default the trainer's training batches, moved to the network's device.
        forward: ``forward(module, batch)``; by default the module's own forward on the first element of a batch.
        calibrate_at_end, calibrate_before_validation, freeze_from_epoch, accumulate, ema, watch: as of `Life`.
        validation_loss: the logged name of the loss that evaluations are told by to the watch.

    Attributes:
        life: the `Life`, from the start of the fit.

    Warns:
        UserWarning: a trap of the trainer that was met, with its version.
    """

    def __init__(
        self,
        *,
        batches: Any = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        calibrate_at_end: bool = True,
        calibrate_before_validation: int = 0,
        freeze_from_epoch: int | None = None,
        accumulate: bool = True,
        ema: float | None = None,
        watch: Mapping[str, Any] | bool | None = None,
        validation_loss: str = "val_loss",
    ) -> None:
        super().__init__()
        self.options = options_of(locals())
        self.batches, self.forward, self.validation_loss = batches, forward, validation_loss
        self.life: Life | None = None
        self._loaded: dict[str, Any] | None = None
        self._loss: Tensor | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the `Life` of the module."""
        optimizers = list(getattr(trainer, "optimizers", None) or [])
        self.life = Life(
            pl_module,
            optimizers[0] if optimizers else None,
            batches=self.batches if self.batches is not None else lambda: _batches(trainer, pl_module),
            forward=self.forward,
            **self.options,
        )
        self.life.begin()
        if self._loaded is not None:
            self.life.load_state_dict(self._loaded)
        _warn_of_traps(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Freeze from the chosen epoch on."""
        if self.life is not None:
            self.life.epoch(int(trainer.current_epoch))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin an accumulation, if none is running."""
        if self.life is not None:
            self.life.step_begins()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Commit the statistics after the micro-batch with which the optimizer steps."""
        if self.life is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        # The number of batches of a stream without a length is infinite.
        last = batch_idx + 1 == trainer.num_training_batches or trainer.is_last_batch
        if last or (batch_idx + 1) % int(trainer.accumulate_grad_batches) == 0:
            self.life.step_ends(loss if isinstance(loss, Tensor) else None)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Calibrate on a budget; not before the sanity check."""
        if self.life is not None and not trainer.sanity_checking:
            self.life.validation()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell the watch the loss of the validation."""
        loss = trainer.callback_metrics.get(self.validation_loss)
        if self.life is not None and self.life.watch is not None and loss is not None and not trainer.sanity_checking:
            self.life.watch.evaluated(float(loss))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Calibrate, and end the watch."""
        if self.life is not None:
            self.life.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give up the statistics of the step that failed."""
        if self.life is not None:
            self.life.end(succeeded=False)

    def state_dict(self) -> dict[str, Any]:
        """For the trainer's checkpoint."""
        return {} if self.life is None else self.life.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the trainer's checkpoint."""
        self._loaded = dict(state_dict) or None
        if self.life is not None and self._loaded is not None:
            self.life.load_state_dict(self._loaded)


def _batches(trainer: Any, module: Any) -> Any:
    """The training batches on the module's device."""
    loader = trainer.train_dataloader
    for batch in loader:
        yield trainer.strategy.batch_to_device(batch, module.device)


def _warn_of_traps(trainer: Any) -> None:
    version = trainer_package.__version__
    if any(type(callback).__name__ == "StochasticWeightAveraging" for callback in trainer.callbacks):
        warn_of_trap(
            f"StochasticWeightAveraging (Lightning {version}; seen in 2.6.6) makes one optimizer step with an old "
            "gradient after it has averaged the weights and updated the statistics",
            "Use ema= of this callback, or torch.optim.swa_utils in a loop of your own",
        )
