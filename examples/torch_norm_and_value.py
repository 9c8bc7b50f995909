"""PyTorch: gradients clipped by norm or by value, weights clipped as well, in an ordinary loop.

One `attach` per optimizer; the loop does not change. Real digits, a few seconds.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import karikomi as kk

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.data / 16, dtype=torch.float32)
LABELS = torch.tensor(DIGITS.target)
TRAIN, TEST = slice(0, 1_400), slice(1_400, None)


def train(clip: object, bound: object) -> tuple[float, float, float]:
    """Return the test accuracy and the share of clipped steps in per cent, and the largest weight."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    handle = kk.torch.attach(optimizer, model, clip=clip, bound=bound)
    clipped = 0
    for _ in range(10):
        for batch in torch.randperm(1_400).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(IMAGES[batch]), LABELS[batch]).backward()
            optimizer.step()
            clipped += handle.last.engaged
    right = (model(IMAGES[TEST]).argmax(1) == LABELS[TEST]).float().mean()
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    return 100 * float(right), 100 * clipped / handle.steps, largest


def main() -> None:
    """Print the results of each kind of clipping, at a learning rate that is too large without clipping."""
    ways = {
        "nothing": (None, None),
        "gradients by norm": (kk.clip.ByGlobalNorm(1.0), None),
        "gradients by value": (kk.clip.ByValue(0.01), None),
        "by norm, weights by value": (kk.clip.ByGlobalNorm(1.0), kk.bound.Clamp(0.5)),
        "by value, weights by norm": (kk.clip.ByValue(0.01), kk.bound.MaxNorm(3.0)),
    }
    print(f"{'':27} test digits right %   steps clipped %   largest weight")
    for name, (clip, bound) in ways.items():
        right, clipped, largest = train(clip, bound)
        print(f"{name:27} {right:19.1f} {clipped:17.1f} {largest:16.2f}")


if __name__ == "__main__":
    main()
