"""The same weights get the same codes in Keras and in torch, by the nearest values and with compensated errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
torch = pytest.importorskip("torch")
layers, nn = keras.layers, torch.nn

import karikomi as kk  # noqa: E402
from keras_backends import sampled  # noqa: E402

RNG = np.random.default_rng(8)
COMMON = RNG.normal(size=(300, 7, 7, 1)).astype("float32")
IMAGES = COMMON + 0.2 * RNG.normal(size=(300, 7, 7, 3)).astype("float32")


class Flat(nn.Module):
    """Channels last, as Keras flattens them."""

    def forward(self, x: Any) -> Any:
        return x.permute(0, 2, 3, 1).flatten(1)


def both() -> tuple[Any, Any]:
    torch.manual_seed(4)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.ReLU(),
        Flat(),
        nn.Linear(36, 8),
        nn.ReLU(),
        nn.Linear(8, 5),
    ).eval()
    model = keras.Sequential(
        [
            keras.Input((7, 7, 3)),
            layers.Conv2D(4, 3, strides=2, activation="relu"),
            layers.Flatten(),
            layers.Dense(8, activation="relu"),
            layers.Dense(5),
        ]
    )
    for variable, parameter in zip(model.weights, module.parameters(), strict=True):
        variable.assign(turned(parameter.detach().numpy()))
    return model, module


def pairs(model: Any, mine: Any, module: Any, other: Any) -> Any:
    """Yield the codes of a variable, and those of the parameter that it came from."""
    names = zip(model.weights, dict(module.named_parameters()), strict=True)
    return [(mine[variable.path], other[name]) for variable, name in names]


def turned(array: np.ndarray) -> np.ndarray:
    """Return a weight of torch as Keras has it."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim]
    return array.transpose(axes)


@pytest.mark.parametrize(
    "options",
    sampled([{"bits": 4}, {"entries": 5}, {"bits": 3, "symmetric": False, "group": 6}], "options"),
    ids=str,
)
def test_the_nearest_codes_are_those_of_torch(options: dict[str, Any]) -> None:
    model, module = both()
    grouped = "group" in options
    mine = kk.keras.quantize_(model, **options)
    other = kk.torch.quantize_(module, **options)
    for tensor, peer in pairs(model, mine, module, other):
        assert type(tensor.grid) is type(peer.grid) and tensor.grid.bits == peer.grid.bits
        # Groups of consecutive weights are others where the weights lie in another order.
        if not grouped or peer.codes.ndim < 3:
            assert np.array_equal(tensor.codes, turned(peer.codes))
            assert np.array_equal(tensor.decode(), turned(peer.decode()))


def test_compensated_codes_are_those_of_torch_nearly_all() -> None:
    model, module = both()
    before = np.asarray(keras.ops.convert_to_numpy(model(IMAGES)))
    channels_first = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())
    options = {"bits": 3, "method": "gptq", "progress": False}
    mine = kk.keras.quantize_(model, data=[IMAGES[:200], IMAGES[200:]], **options)
    other = kk.torch.quantize_(module, data=[channels_first[:200], channels_first[200:]], **options)
    assert not mine.notes
    for tensor, peer in pairs(model, mine, module, other):
        assert np.allclose(tensor.grid.numbers, peer.grid.numbers)
        assert (tensor.codes == turned(peer.codes)).mean() > 0.9
    with torch.no_grad():
        theirs = module(channels_first).numpy()
    outputs = np.asarray(keras.ops.convert_to_numpy(model(IMAGES)))
    errors = [float(np.square(array - before).sum()) for array in (outputs, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)
