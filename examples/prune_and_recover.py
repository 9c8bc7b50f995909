"""Prune a trained network to a tenth of its weights with several scores, and recover its accuracy.

Trains a small network on scikit-learn's digits, prunes copies of it at random, by magnitude and by reconstruction,
distils the last copy from the dense network, and prints accuracies and an account. About fifteen seconds.
"""

from __future__ import annotations

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn

import karikomi as kk

SPARSITY = 0.9
Pair = tuple[torch.Tensor, torch.Tensor]


def digits() -> tuple[Pair, Pair]:
    """Return training images and classes, and 500 others for testing."""
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(classes)[order]
    return (x[500:], y[500:]), (x[:500], y[:500])


def batches(pair: Pair) -> list[Pair]:
    """Return a pair of tensors as batches of 64."""
    return list(zip(pair[0].split(64), pair[1].split(64), strict=True))


@torch.no_grad()
def accuracy(model: nn.Module, pair: Pair) -> float:
    """Return the share of correctly classified images."""
    return float((model(pair[0]).argmax(1) == pair[1]).float().mean())


def trained(train: Pair) -> nn.Module:
    """Return the dense network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU())
    model.append(nn.Linear(50, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    for _ in range(30):
        for inputs, classes in batches(train):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), classes).backward()
            optimizer.step()
    return model


def main() -> None:
    """Print the accuracy after each kind of pruning, and the account of the last."""
    train, test = digits()
    dense = trained(train)
    print(f"dense: {accuracy(dense, test):.1%} of the test images right")
    for score in ("random", "magnitude", "obc"):
        model = copy.deepcopy(dense)
        masks = kk.torch.prune_(model, SPARSITY, score=score, data=batches(train))
        print(f"{score}: {accuracy(model, test):.1%} with {masks.sparsity:.0%} of the weights gone")
    print(masks.account)
    validation, *training = batches(train)
    kk.torch.recover_(
        model,
        masks,
        training,
        loss=nn.functional.cross_entropy,
        teacher=dense,
        epochs=10,
        judge=lambda module: accuracy(module, validation),
        progress=False,
    )
    print(f"distilled from the dense network: {accuracy(model, test):.1%}")


if __name__ == "__main__":
    main()
