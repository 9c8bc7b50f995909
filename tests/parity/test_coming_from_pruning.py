"""Each row of the pruning tables of docs/coming-from.md: the peer's call beside ours.

torch.nn.utils.prune, Torch-Pruning and Lightning are run; of the TensorFlow Model Optimization Toolkit and JaxPruner,
which do not run with today's frameworks, the published formulas stand here in plain NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import karikomi as kk
from contract.namespaces import load_quietly
from parity.table_rows import table_rows

TORCH, TFMOT, JAX, TORCH_PRUNING, LIGHTNING = (
    [row.calls for row in table_rows(section)]
    for section in (
        "torch.nn.utils.prune",
        "TensorFlow Model Optimization Toolkit",
        "JaxPruner",
        "Torch-Pruning's importances",
        "Lightning's ModelPruning",
    )
)


# --- torch.nn.utils.prune ---


def names() -> dict[str, Any]:
    torch.manual_seed(0)
    layer = nn.Linear(5, 6)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    scores, mask = torch.randn(6, 5), (torch.rand(6, 5) > 0.3).float()
    return {"layer": layer, "net": net, "scores": scores, "mask": mask, "prune": prune, "kk": kk}


def zeros(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return name -> what is zero, of weights as the forward pass sees them."""
    found = {}
    for path, layer in module.named_modules():
        for leaf in ("weight", "bias"):
            if isinstance(value := getattr(layer, leaf, None), torch.Tensor):
                found[f"{path}.{leaf}"] = value == 0
    return found


@pytest.mark.parametrize(("theirs", "ours"), TORCH)
def test_torchs_calls(theirs: str, ours: str) -> None:
    first, second = names(), names()
    result, own = eval(theirs, first), eval(ours, second)
    if isinstance(result, bool):
        assert result is own is True
        return
    for which in ("layer", "net"):
        expected, found = zeros(first[which]), zeros(second[which])
        assert expected.keys() == found.keys()
        for name in expected:
            if "random" in theirs:
                assert expected[name].sum() == found[name].sum()
            else:
                assert torch.equal(expected[name], found[name])


# --- TensorFlow Model Optimization Toolkit ---

SHAPES = {"first": (8, 12), "second": (12, 6)}


def _magnitudes_kept(magnitudes: np.ndarray, sparsity: float) -> np.ndarray:
    kept = max(round(magnitudes.size * (1 - sparsity)), 1)
    return magnitudes >= np.sort(magnitudes, axis=None)[::-1][kept - 1]


def _blocks_kept(pool: Callable[..., Any]) -> Callable[[np.ndarray], np.ndarray]:
    def kept(kernel: np.ndarray) -> np.ndarray:
        high, wide = (-(-size // block) for size, block in zip(kernel.shape, (4, 2), strict=True))
        pooled = np.array(
            [
                [pool(np.abs(kernel[4 * i : 4 * i + 4, 2 * j : 2 * j + 2])) for j in range(wide)]
                for i in range(high)
            ]
        )
        found = _magnitudes_kept(pooled, 0.5).repeat(4, 0).repeat(2, 1)
        return found[: kernel.shape[0], : kernel.shape[1]]

    return kept


def _m_by_n(kernel: np.ndarray) -> np.ndarray:
    rows_of = np.abs(kernel.T)
    padded = np.pad(rows_of, ((0, 0), (0, -rows_of.shape[1] % 4))).reshape(-1, 4)
    mask = np.zeros(padded.shape, bool)
    np.put_along_axis(mask, np.argsort(-padded, axis=1, kind="stable")[:, :2], True, axis=1)
    return mask.reshape(len(rows_of), -1)[:, : rows_of.shape[1]].T


KEPT = {
    "ConstantSparsity": lambda kernel: _magnitudes_kept(np.abs(kernel), 0.5),
    "AVG": _blocks_kept(np.mean),
    "MAX": _blocks_kept(np.max),
    "m_by_n": _m_by_n,
    "PrunableLayer": lambda kernel: _magnitudes_kept(np.abs(kernel), 0.5),
}
OTHERS = ("strip_pruning", "PruningSummaries", "prune_scope")


def keras_names() -> dict[str, Any]:
    keras = load_quietly("keras")
    keras.utils.set_random_seed(0)

    class Speaking(keras.layers.Layer):
        def build(self, shape: Any) -> None:
            self.table = self.add_weight(
                shape=(shape[-1], 6), initializer="glorot_uniform", name="kernel"
            )

        def call(self, inputs: Any) -> Any:
            return keras.ops.matmul(inputs, self.table)

        def get_prunable_weights(self) -> list[Any]:
            return [self.table]

    def model(layers: list[Any]) -> Any:
        return keras.Sequential([keras.Input((9,)), *layers])

    dense = [keras.layers.Dense(7, activation="relu"), keras.layers.Dense(6)]
    return {"model": model(dense), "speaking": model([Speaking()]), "kk": kk, "keras": keras}


@pytest.mark.parametrize(("theirs", "ours"), TFMOT)
def test_tfmots_calls(theirs: str, ours: str) -> None:
    pytest.importorskip("keras")
    known = keras_names()
    model = known["speaking" if "speaking" in ours else "model"]
    before = {v.path: known["keras"].ops.convert_to_numpy(v) for v in model.weights}
    result = eval(ours, known)
    (kind,) = [name for name in (*KEPT, *OTHERS) if name in theirs]
    if kind == "PruningSummaries":
        assert "sparsity" in result and "kernel" in result
        return
    if kind == "strip_pruning":
        return
    if kind == "prune_scope":
        assert isinstance(result, kk.keras.Masks) and result.sparsity == pytest.approx(
            0.5, abs=0.01
        )
        return
    assert len(result) == sum(path.endswith("kernel") for path in before)
    for path, mask in result.items():
        expected = KEPT[kind](before[path])
        if kind in ("m_by_n", "AVG", "MAX"):
            # Totals over layers are exact here: the share of one layer may differ by one block.
            assert abs(int(mask.sum()) - int(expected.sum())) <= (0 if kind == "m_by_n" else 8)
        if kind == "m_by_n":
            assert (mask == expected).all()
        else:
            # Nested: what one keeps and the other does not are the next in order, at most one item.
            assert (mask & expected).sum() == min(mask.sum(), expected.sum())


# --- JaxPruner ---

PARAMS = {
    "stem": np.random.default_rng(1).normal(size=(3, 3, 4, 8)).astype("float32"),
    "body": np.random.default_rng(2).normal(size=(8, 24)).astype("float32"),
    "head": np.random.default_rng(3).normal(size=(24, 12)).astype("float32"),
}
GRADS = {
    n: np.random.default_rng(7).normal(size=w.shape).astype("float32") for n, w in PARAMS.items()
}
FLAT = ("NByM", "Block")


def _top(scores: np.ndarray, sparsity: float) -> np.ndarray:
    kept = max(round(scores.size * (1 - sparsity)), 1)
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores, axis=None, kind="stable")[:kept]] = True
    return mask.reshape(scores.shape)


def _erk(sparsity: float, *, power: float = 1.0, kernel: bool = True, custom: Any = None) -> Any:
    """Return the shares of the published solution: what would be denser than dense leaves the equation."""
    custom, dense = custom or {}, set()
    while True:
        raw, divisor, stays = {}, 0.0, 0.0
        for name, weight in PARAMS.items():
            zeros_of = math.floor(sparsity * weight.size)
            if name in dense:
                stays -= zeros_of
            elif name not in custom:
                stays += weight.size - zeros_of
                sides = weight.shape if kernel else weight.shape[-2:]
                raw[name] = (sum(sides) / math.prod(sides)) ** (power if kernel else 1.0)
                divisor += raw[name] * weight.size
        eps = stays / divisor
        if max(raw.values()) * eps <= 1.0:
            shares = {name: 1.0 - eps * ratio for name, ratio in raw.items()}
            return shares | dict.fromkeys(dense, 0.0) | custom
        dense |= {name for name, ratio in raw.items() if ratio == max(raw.values())}


def _n_by_m(weight: np.ndarray) -> np.ndarray:
    groups = np.abs(weight).reshape(-1, 4)
    return (groups.argsort(1).argsort(1) >= 2).reshape(weight.shape)


def _block(weight: np.ndarray) -> np.ndarray:
    pooled = np.abs(weight).reshape(weight.shape[0] // 2, 2, weight.shape[1] // 3, 3).mean((1, 3))
    return _top(pooled, 0.5).repeat(2, 0).repeat(3, 1)


def _global(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    order = sorted(scores)
    mask = _top(np.concatenate([scores[name].reshape(-1) for name in order]), 0.8)
    parts = np.split(mask, np.cumsum([scores[name].size for name in order])[:-1])
    return {n: part.reshape(scores[n].shape) for n, part in zip(order, parts, strict=True)}


def _by_shares(shares: Any, scores: Any = None) -> dict[str, np.ndarray]:
    scores = scores or {name: np.abs(weight) for name, weight in PARAMS.items()}
    return {name: _top(scores[name], shares[name]) for name in PARAMS}


ABS = {name: np.abs(weight) for name, weight in PARAMS.items()}
FOUND: dict[str, Callable[[], dict[str, np.ndarray]]] = {
    "MagnitudePruning(sparsity_distribution_fn=partial(uniform": lambda: _by_shares(
        dict.fromkeys(PARAMS, 0.8)
    ),
    "GlobalMagnitudePruning(sparsity=0.8, use_normalization=False)": lambda: _global(ABS),
    "GlobalMagnitudePruning(sparsity=0.8).": lambda: _global(
        {n: w / np.linalg.norm(w) for n, w in ABS.items()}
    ),
    "SaliencyPruning(": lambda: _by_shares(
        dict.fromkeys(PARAMS, 0.8), {n: np.abs(w * GRADS[n]) for n, w in PARAMS.items()}
    ),
    "MagnitudePruning().calculate_scores": lambda: ABS,
    "MagnitudePruning(sparsity_distribution_fn=partial(erk": lambda: _by_shares(_erk(0.6)),
    "get_sparsities_erdos_renyi(shapes, 0.6, erk_power_scale": lambda: _by_shares(
        _erk(0.6, power=0.5)
    ),
    "get_sparsities_erdos_renyi(shapes, 0.6, include_kernel": lambda: _by_shares(
        _erk(0.6, kernel=False)
    ),
    "get_sparsities_erdos_renyi(shapes, 0.6, custom": lambda: _by_shares(
        _erk(0.6, custom={"head": 0.25})
    ),
    "MagnitudePruning(sparsity_type=NByM": lambda: {
        n: _n_by_m(PARAMS[n]) for n in ("body", "head")
    },
    "MagnitudePruning(sparsity_type=Block": lambda: {
        n: _block(PARAMS[n]) for n in ("body", "head")
    },
}


@pytest.mark.parametrize(("theirs", "ours"), JAX)
def test_jaxpruners_calls(theirs: str, ours: str) -> None:
    jnp = pytest.importorskip("jax").numpy
    flat = any(name in theirs for name in FLAT)
    params = {n: jnp.asarray(w) for n, w in PARAMS.items() if not (flat and w.ndim > 2)}
    layouts = {name: kk.prune.Layout(units=-1, inputs=-2) for name in params}
    known = {"kk": kk, "jnp": jnp, "params": params, "rows": layouts, "grads": GRADS}
    result = eval(ours, known)
    (kind,) = [name for name in FOUND if theirs.startswith(name)]
    expected = FOUND[kind]()
    if "calculate_scores" in kind:
        assert all(np.array_equal(np.asarray(result[name]), expected[name]) for name in PARAMS)
        return
    pruned, masks = result
    for name, mask in masks.items():
        found = np.asarray(mask)
        assert (np.asarray(pruned[name])[~found] == 0).all()
        # Rounding differs by a weight (a block) where totals are exact; what is kept is nested.
        assert abs(int(found.sum()) - int(expected[name].sum())) <= (6 if "Block" in kind else 2)
        assert (found & expected[name]).sum() == min(found.sum(), expected[name].sum())


# --- Torch-Pruning ---


@pytest.mark.skipif(find_spec("torch_pruning") is None, reason="no Torch-Pruning installed")
@pytest.mark.parametrize(("theirs", "ours"), TORCH_PRUNING)
def test_importances_of_torch_pruning(theirs: str, ours: str) -> None:
    library = load_quietly("torch_pruning")
    torch.manual_seed(0)
    layer, data = nn.Linear(6, 9), [(torch.randn(16, 6), torch.randint(0, 9, (16,)))]
    loss = nn.CrossEntropyLoss()
    known = {"kk": kk, "layer": layer, "data": data, "loss": loss, "imp": library.importance}
    ranked = eval(ours, known)["weight"]
    loss(layer(data[0][0]), data[0][1]).backward()
    graph = library.DependencyGraph().build_dependency(layer, example_inputs=data[0][0])
    group = graph.get_pruning_group(layer, library.prune_linear_out_channels, list(range(9)))
    importance = eval(theirs, known)(group)
    assert len(importance) == len(ranked) == 9
    if "Random" not in theirs and "FPGM" not in theirs:
        assert torch.equal(importance.argsort(), ranked.argsort())


# --- Lightning ---


@pytest.mark.skipif(find_spec("lightning") is None, reason="no Lightning installed")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize(("theirs", "ours"), LIGHTNING)
def test_lightnings_pruning(theirs: str, ours: str) -> None:
    lightning = load_quietly("lightning.pytorch")
    callbacks = load_quietly("lightning.pytorch.callbacks")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(16, 8, bias=False)

        def training_step(self, batch: Any, _: int) -> Any:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    def trained(callback: Any, epochs: int) -> nn.Module:
        module = Module()
        data = torch.utils.data.DataLoader(torch.ones(8, 16), batch_size=2)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
        return module.layer

    schedule = eval(ours.partition("prune=")[2].removesuffix(")"), {"kk": kk})
    if "random" in theirs or "ln_" in theirs:
        theirs = theirs.removesuffix(")") + ", parameter_names=['weight'])"
    epochs = schedule.rounds if isinstance(schedule, kk.prune.Iterative) else 1
    first = trained(eval(theirs, {"ModelPruning": callbacks.ModelPruning}), epochs)
    second = trained(eval(ours, {"kk": kk}), epochs)
    # Units of 16 weights: the least that is no less.
    assert int((first.weight == 0).sum()) == int((second.weight == 0).sum())
    if "random" not in theirs:
        assert torch.equal(first.weight == 0, second.weight == 0)
