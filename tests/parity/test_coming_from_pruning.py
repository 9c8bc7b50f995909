"""Each row of the pruning tables of docs/coming-from.md: the peer's call beside ours.

torch.nn.utils.prune, Torch-Pruning and Lightning are run; of the TensorFlow Model Optimization Toolkit and JaxPruner,
which do not run with today's frameworks, the published formulas stand here in plain NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao import pruning as ao
from torch.nn.utils import prune

import karikomi as kk
from contract.namespaces import load_quietly
from parity import jaxpruner_formulas, tfmot_clustering
from parity.table_rows import TableRow, table_rows

JAX = table_rows("JaxPruner")
CLUSTERING = table_rows("TensorFlow's weight clustering")
TORCH, TFMOT, TORCH_PRUNING, LIGHTNING = (
    [row.calls for row in table_rows(section)]
    for section in (
        "torch.nn.utils.prune",
        "TensorFlow Model Optimization Toolkit",
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
    given = {"layer": layer, "net": net, "scores": scores, "mask": mask, "sparsified": sparsified}
    return {**given, "prune": prune, "ao": ao, "kk": kk, "torch": torch, "copy": deepcopy}


def sparsified(model: nn.Module, sparsifier: Any) -> None:
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()


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
        if "random" in theirs.lower():
            assert sum(map(torch.sum, expected.values())) == sum(map(torch.sum, found.values()))
        else:
            assert all(torch.equal(expected[name], found[name]) for name in expected)


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
OTHERS = ("strip_pruning", "PruningSummaries", "prune_scope", "UpdatePruningStep")


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
    if kind == "UpdatePruningStep":
        assert isinstance(result, known["keras"].callbacks.Callback)
        return
    if kind == "prune_scope":
        assert isinstance(result, kk.keras.Masks) and result.sparsity == pytest.approx(
            0.5, abs=0.01
        )
        return
    assert len(result) == (1 if "layers[0]" in ours else sum(n.endswith("kernel") for n in before))
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


@pytest.mark.parametrize("row", CLUSTERING, ids=str)
def test_clusterings_calls(row: TableRow) -> None:
    pytest.importorskip("keras")
    theirs, ours = row.calls
    first, second = keras_names(), keras_names()
    for known in (first, second):
        known["sparse"] = known["model"]
        if "sparse" in theirs:
            for layer in known["model"].layers:
                kernel = np.asarray(layer.kernel.numpy())
                layer.kernel.assign(np.where(np.abs(kernel) < np.median(np.abs(kernel)), 0, kernel))
    peer = {"clustering": tfmot_clustering.clustering, "Start": tfmot_clustering.Start}
    expected = [*eval(theirs, first | peer).values()]
    found = [coded.decode() for coded in eval(ours, second).values()]
    for their, our in zip(expected, found, strict=True):
        counts = len(np.unique(their)), len(np.unique(our))
        assert 1 < counts[1] <= 4 and counts[0] <= 4
        if not row.difference.startswith("as many"):
            np.testing.assert_allclose(our, their, rtol=1e-6)
        if "sparse" in theirs:
            assert (our == 0).any() and (their[our == 0] == 0).all()


# --- JaxPruner ---

PARAMS = {
    "stem": np.random.default_rng(1).normal(size=(3, 3, 4, 8)).astype("float32"),
    "body": np.random.default_rng(2).normal(size=(8, 24)).astype("float32"),
    "head": np.random.default_rng(3).normal(size=(24, 12)).astype("float32"),
}
GRADS = {
    n: np.random.default_rng(7).normal(size=w.shape).astype("float32") for n, w in PARAMS.items()
}
MATRICES = ("NByM", "Block")
"""Patterns of matrices, for which the convolution is left out."""
MOVED_AT = 2
"""The step at which `SET` and `RigL` move weights for the first time; masks are made at the first."""


def masked_state() -> Any:
    """Return a state of their sparse trainers with the masks that one threshold for each tensor gives."""
    masks = {name: jaxpruner_formulas.top(np.abs(w), 0.8) for name, w in PARAMS.items()}
    return SimpleNamespace(masks=masks, count=MOVED_AT)


def moved(rule: Any) -> Any:
    """Return the masks after one move of these weights, which take no step."""
    jax, optax = load_quietly("jax"), load_quietly("optax")
    tx = kk.jax.pruned(optax.sgd(0.0), rule)
    weights = {name: jax.numpy.asarray(w) for name, w in PARAMS.items()}
    state = tx.init(weights)
    update = jax.jit(tx.update)
    for _ in range(MOVED_AT):
        _, state = update(GRADS, state, weights)
    return dict(state.masks)


def masks_of(result: Any, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return what is kept: of masks, of shares, or of what they make of the weights."""
    result = result[1] if isinstance(result, tuple) else result
    found = {}
    for name, weight in params.items():
        own = result.get(name)
        if own is None:
            found[name] = np.ones(weight.shape, bool)
        elif isinstance(own, float):
            found[name] = jaxpruner_formulas.top(np.abs(np.asarray(weight)), own)
        else:
            found[name] = np.asarray(own) != 0
    return found


@pytest.mark.parametrize("row", JAX, ids=str)
def test_jaxpruners_calls(row: TableRow) -> None:
    jnp = pytest.importorskip("jax").numpy
    theirs, ours = row.calls
    matrices = any(name in theirs for name in MATRICES)
    params = {n: w for n, w in PARAMS.items() if not (matrices and w.ndim > 2)}
    layouts = {name: kk.prune.Layout(units=-1, inputs=-2) for name in params}
    masks = {name: np.abs(weight) > 0.5 for name, weight in params.items()}
    peer = {**vars(jaxpruner_formulas), "partial": partial, "state": masked_state(), "tx": None}
    peer |= {"shapes": {n: w.shape for n, w in params.items()}}
    peer |= {"packed": {n: np.packbits(mask) for n, mask in masks.items()}}
    own = {
        "kk": kk,
        "jnp": jnp,
        "rows": layouts,
        "moved": moved,
        "tx": load_quietly("optax").sgd(0.1),
    }
    both = {"grads": GRADS, "masks": masks, "pruned": {n: w * masks[n] for n, w in params.items()}}
    expected = eval(theirs, peer | both | {"params": params})
    result = eval(ours, own | both | {"params": {n: jnp.asarray(w) for n, w in params.items()}})
    if isinstance(result, float):
        assert result == pytest.approx(expected)
        return
    if "calculate_scores" in theirs or "apply_masks" in theirs:
        assert all(np.array_equal(np.asarray(result[name]), expected[name]) for name in params)
        return
    first, second = masks_of(expected, params), masks_of(result, params)
    for name in params:
        # Rounding differs by a weight (a block) where totals are exact; what is kept is nested.
        counts = int(first[name].sum()), int(second[name].sum())
        assert abs(counts[0] - counts[1]) <= (6 if "Block" in theirs else 2)
        if not row.difference.startswith("as many"):
            assert (first[name] & second[name]).sum() == min(counts)


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
