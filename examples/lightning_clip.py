"""Lightning: a learning rate that is too large, without and with clipping.

The trainer and the module do not change; one callback clips. Real digits, a few seconds.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import karikomi as kk

# Lightning's messages about devices and workers do not matter here.
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec).*")

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.data / 16, dtype=torch.float32)
LABELS = torch.tensor(DIGITS.target)
TRAIN, TEST = slice(0, 1_400), slice(1_400, None)


class Classifier(pl.LightningModule):
    """A plain network as a Lightning module."""

    def __init__(self) -> None:
        super().__init__()
        parts = [part for _ in range(4) for part in (nn.Linear(64, 64), nn.ReLU())]
        self.net = nn.Sequential(*parts, nn.Linear(64, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD, at a learning rate that is too large for it."""
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def accuracy(callback: pl.Callback) -> float:
    """Train for ten epochs and return the test accuracy in per cent."""
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    data = DataLoader(TensorDataset(IMAGES[TRAIN], LABELS[TRAIN]), batch_size=50, shuffle=True)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu"}
    pl.Trainer(max_epochs=10, callbacks=[callback], **quiet).fit(module, data)
    with torch.no_grad():
        found = module.net(IMAGES[TEST]).argmax(1)
    return 100 * float((found == LABELS[TEST]).float().mean())


def main() -> None:
    """Train without and with a clip and print accuracy, share of clipped steps and largest norm."""
    # Without a rule the callback measures, and skips non-finite steps.
    rules = {"no clip": None, "norm <= 1": kk.clip.ByGlobalNorm(1.0)}
    print("           test digits right %   steps clipped %   largest norm")
    with tempfile.TemporaryDirectory() as folder:
        for name, rule in rules.items():
            path = Path(folder) / name
            with kk.record.Recorder(path) as record:
                right = accuracy(kk.plugins.LightningCallback(clip=rule, record=record))
            steps = [row for row in kk.record.read(path) if row["event"] == "step"]
            clipped = 100 * sum(row["clipped"] for row in steps) / len(steps)
            largest = max(row["norm"] for row in steps)
            print(f"{name:9} {right:20.1f} {clipped:17.1f} {largest:14.3g}")


if __name__ == "__main__":
    main()
