"""The callbacks in the real trainers, where these are installed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.errors import MissingDependencyError
from batchnorm.surgery.freezing import is_frozen

X = 3 * torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) + 1


def has(name):
    try:
        __import__(name)
    except Exception:  # torchvision that does not fit its torch, say
        return False
    return True


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_trainer_is_told(name):
    if has(name) or (name == "lightning" and has("pytorch_lightning")):
        pytest.skip("it is installed")
    with pytest.raises(MissingDependencyError, match=f"pip install {name}"):
        __import__(f"batchnorm.integrations.{name}")


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    if not has("lightning"):
        pytest.skip("lightning is not installed")
    import lightning.pytorch as pl

    from batchnorm.integrations.lightning import BatchNormCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.counts = network(), []

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            return self(batch[0]).square().mean()

        def validation_step(self, batch, index):
            self.counts.append((int(self.net[1].num_batches_tracked), self.net[1].running_mean.clone()))
            self.log("val_loss", self(batch[0]).square().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = DataLoader(TensorDataset(X), 4)
    callback = BatchNormCallback(
        calibrate_before_validation=8, freeze_from_epoch=1, ema=0.9, watch={"every": 1, "alerts": "gap > 100"}
    )
    module = Module()
    trainer = pl.Trainer(
        max_epochs=2, accumulate_grad_batches=2, accelerator="cpu", callbacks=[callback], logger=False,
        default_root_dir=tmp_path, enable_progress_bar=False, num_sanity_val_steps=1,
    )  # fmt: skip
    trainer.fit(module, loader, DataLoader(TensorDataset(X), 32))
    assert is_frozen(module.net[1])
    assert [count for count, _ in module.counts] == [0, 2, 2]  # the sanity check; then 8 samples are 2 batches
    assert len(callback.life.watch.readings) == 16
    assert len(callback.life.watch.evaluations) == 2
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["callbacks"]
    again, fresh = BatchNormCallback(ema=0.9), Module()
    other = pl.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[again], logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False,
    )  # fmt: skip
    other.fit(fresh, loader, ckpt_path=path)
    assert is_frozen(fresh.net[1])
    with torch.no_grad():
        z = again.life.ema.net[0](X)
    assert torch.allclose(again.life.ema.net[1].running_mean, z.mean(0), atol=1e-4) or is_frozen(again.life.ema.net[1])


@pytest.mark.filterwarnings("ignore")
def test_transformers(tmp_path):
    if not has("transformers"):
        pytest.skip("transformers is not installed")
    import transformers

    from batchnorm.integrations.transformers import EMA_FILE, MODES_FILE, BatchNormCallback

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, labels=None):
            y = self.net(x)
            return (
                {"loss": nn.functional.cross_entropy(y, labels), "logits": y} if labels is not None else {"logits": y}
            )

    data = [{"x": x, "labels": int(x[0] > 1)} for x in X]
    model = Model()
    before = copy.deepcopy(model)
    callback = BatchNormCallback(calibrate_before_validation=8, freeze_from_epoch=1, ema=0.9, watch={"every": 1})
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        eval_strategy="epoch", save_strategy="epoch", report_to="none", use_cpu=True,
        disable_tqdm=True, learning_rate=0.1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback])
    trainer.train()
    assert is_frozen(model.net[1])
    assert not torch.equal(model.net[0].weight, before.net[0].weight)
    assert len(callback.life.watch.evaluations) == 2
    assert len(callback.life.watch.readings) == 16
    assert (tmp_path / "checkpoint-8" / MODES_FILE).exists()
    average = torch.load(tmp_path / "checkpoint-8" / EMA_FILE, weights_only=True)
    fresh = Model()
    arguments.num_train_epochs = 3
    arguments.learning_rate = 0.0
    callbacks = [BatchNormCallback(ema=1 - 2**-20, calibrate_at_end=False)]
    again = transformers.Trainer(fresh, arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert is_frozen(fresh.net[1])
    assert not torch.allclose(average["net.0.weight"], fresh.net[0].weight)
    torch.testing.assert_close(callbacks[0].life.ema.net[0].weight, average["net.0.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_lightning_with_a_stream_of_unknown_length(tmp_path):
    """The last micro-batches of an epoch are a step of their own."""
    if not has("lightning"):
        pytest.skip("lightning is not installed")
    import lightning.pytorch as pl

    from batchnorm.integrations.lightning import BatchNormCallback

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(X[:12])

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.counts = network(), []

        def training_step(self, batch, index):
            return self.net(batch).square().mean()

        def on_train_epoch_end(self):
            self.counts.append(int(self.net[1].num_batches_tracked))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer = pl.Trainer(
        max_epochs=2, accumulate_grad_batches=2, accelerator="cpu", logger=False, default_root_dir=tmp_path,
        callbacks=[BatchNormCallback(calibrate_at_end=False)], enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Stream(), 4))
    assert module.counts == [2, 4]
