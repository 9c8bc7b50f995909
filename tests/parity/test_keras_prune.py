"""The same weights give the same masks in Keras and in torch, whatever the score, allocation and pattern."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
torch = pytest.importorskip("torch")
layers, nn = keras.layers, torch.nn

import karikomi as kk  # noqa: E402
from keras_backends import sampled, slow_on  # noqa: E402

RNG = np.random.default_rng(3)
IMAGES = RNG.normal(size=(10, 9, 9, 4)).astype("float32")
CLASSES = RNG.integers(5, size=10)
ORDER = ["0.weight", "3.weight", "5.weight", "8.weight"]
PATHS = ["net/one/kernel", "net/two/kernel", "net/up/kernel", "net/head/kernel"]
BY_WEIGHTS: list[dict[str, Any]] = [
    {"sparsity": 0.9},
    {"sparsity": 0.5, "allocation": "uniform"},
    {"sparsity": 0.7, "allocation": "erk"},
    {"sparsity": 0.7, "score": "lamp"},
    {"pattern": kk.prune.NofM(keep=1, of=4)},
    {"width": 0.5, "pattern": "units"},
    {"sparsity": 0.5, "pattern": kk.prune.Blocks(4, 2)},
    {"parameters": 0.4},
    {"bytes": 0.4},
]
BY_DATA: list[dict[str, Any]] = [
    {"sparsity": 0.8, "score": "snip"},
    {"sparsity": 0.8, "score": "taylor"},
    {"sparsity": 0.8, "score": "fisher"},
    {"sparsity": 0.8, "score": "wanda"},
    {"sparsity": 0.6, "allocation": "owl"},
    {"width": 0.5, "pattern": "units", "score": "activation"},
    {"width": 0.5, "pattern": "units", "score": "fisher"},
    {"macs": 0.5},
]


def in_torch() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def in_keras(source: Any) -> Any:
    """Return the same network with the weights of the one in torch."""
    model = keras.Sequential(
        [
            keras.Input((9, 9, 4)),
            layers.ZeroPadding2D(1),
            layers.Conv2D(8, 3, strides=2, name="one"),
            layers.BatchNormalization(epsilon=1e-5, name="norm"),
            layers.ReLU(),
            layers.Conv2D(12, 3, groups=2, activation="relu", name="two"),
            layers.Conv2DTranspose(4, 2, activation="relu", name="up"),
            layers.Permute((3, 1, 2)),
            layers.Flatten(),
            layers.Dense(5, name="head"),
        ],
        name="net",
    )
    turned = {"one": (0, (2, 3, 1, 0)), "two": (3, (2, 3, 1, 0)), "up": (5, (2, 3, 1, 0))}
    for name, (place, axes) in {**turned, "head": (8, (1, 0))}.items():
        layer = model.get_layer(name)
        # Copies: JAX would share the memory, which is then pruned in place.
        layer.kernel.assign(source[place].weight.detach().numpy().transpose(axes).copy())
        layer.bias.assign(source[place].bias.detach().numpy().copy())
    return model


def as_torch(path: str, mask: np.ndarray) -> np.ndarray:
    return mask.T if mask.ndim == 2 else mask.transpose(3, 2, 0, 1)


def both(ties: bool = False, used: bool = False, **options: Any) -> tuple[Any, Any]:
    """Return the masks of both."""
    module = in_torch().eval()
    if ties:
        for place in (0, 3, 5, 8):
            module[place].weight.data = torch.round(module[place].weight.data * 8) / 8
    model = in_keras(module)
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2))
    if used:
        module.train()
        module(images)
        module.eval()
        norm = model.get_layer("norm")
        norm.moving_mean.assign(module[1].running_mean.numpy())
        norm.moving_variance.assign(module[1].running_var.numpy())
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(model(IMAGES)), module(images).detach().numpy(), atol=1e-4
    )
    # Keras does not measure what a transposed convolution reads.
    unseen = {"wanda", "owl"} & {options.get("score"), options.get("allocation")}
    skip: list[dict[str, Any]] = [
        {"exclude": pattern} if unseen else {} for pattern in ("5.*", "*up*")
    ]
    data = {"data": [(images, torch.from_numpy(CLASSES))]} if options.pop("data", False) else {}
    loss = {"loss": nn.functional.cross_entropy} if data else {}
    expected = kk.torch.prune_(module, **options, **data, **loss, **skip[0])
    own = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    given = {"data": [(IMAGES, CLASSES)], "loss": own} if data else {}
    return kk.keras.prune_(model, **options, **given, **skip[1]), expected


def check_the_same(found: Any, expected: Any, *, share: float = 1.0) -> None:
    same = total = 0
    for path, name in zip(PATHS, ORDER, strict=True):
        if name not in expected:
            assert path not in found
            continue
        one, other = as_torch(path, found[path]), expected[name].numpy()
        same, total = same + int((one == other).sum()), total + one.size
    assert total and same >= share * total


@slow_on("jax")
@pytest.mark.parametrize("ties", sampled([False, True], "ties"))
@pytest.mark.parametrize("options", sampled(BY_WEIGHTS, "by weights", most=4), ids=repr)
def test_by_weights_the_masks_are_the_same_ties_included(
    options: dict[str, Any], ties: bool
) -> None:
    check_the_same(*both(ties, **options))


@pytest.mark.parametrize("used", sampled([False, True], "used"))
@pytest.mark.parametrize("options", sampled(BY_DATA, "by data", most=4), ids=repr)
def test_by_data_the_masks_are_the_same_up_to_rounding(options: dict[str, Any], used: bool) -> None:
    """A normalisation that never saw data normalises by the batch, in both."""
    check_the_same(*both(**options, used=used, data=True), share=0.998)


def test_the_same_training_at_90_percent_ends_at_the_same_accuracy() -> None:
    """Equal weights at first, data, batches, epochs and schedule: digits, 90 % of the weights gone."""
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, classes = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    pixels, classes = pixels[order].astype(np.float32) / 16, classes[order]
    schedule = kk.prune.Gradual(0.9, steps=(40, 240), every=20)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    model = keras.Sequential(
        [keras.Input((64,)), layers.Dense(100, activation="relu"), layers.Dense(10)]
    )
    model.set_weights([one.detach().numpy().T.copy() for one in module.parameters()])
    optimizer = torch.optim.Adam(module.parameters(), 3e-3, eps=1e-7)
    handle = kk.torch.attach(optimizer, module, prune=schedule)
    for _ in range(20):
        for start in range(400, len(pixels), 100):
            own = slice(start, start + 100)
            optimizer.zero_grad()
            outputs = module(torch.from_numpy(pixels[own]))
            nn.functional.cross_entropy(outputs, torch.from_numpy(classes[own])).backward()
            optimizer.step()
    model.compile(
        keras.optimizers.Adam(3e-3, epsilon=1e-7),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    pruning = kk.keras.Pruning(schedule)
    settings: dict[str, Any] = {"batch_size": 100, "epochs": 20, "shuffle": False, "verbose": 0}
    model.fit(pixels[400:], classes[400:], callbacks=[pruning], **settings)
    held: Any = handle.masks
    assert pruning.masks.sparsity == held.sparsity == pytest.approx(0.9, abs=1e-3)
    in_torch_right = (
        module(torch.from_numpy(pixels[:400])).argmax(1).numpy() == classes[:400]
    ).mean()
    right = (model.predict(pixels[:400], verbose=0).argmax(1) == classes[:400]).mean()
    assert in_torch_right > 0.93 and abs(right - in_torch_right) <= 0.015
