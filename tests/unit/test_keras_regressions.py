"""What layers of Keras multiply, on each backend: the sums must give the energy of the layer's own outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
layers = keras.layers

from karikomi.keras.layers.unit_axes import weights_of  # noqa: E402
from karikomi.keras.reconstruction.calibration import Regressions  # noqa: E402
from keras_backends import sampled  # noqa: E402

RNG = np.random.default_rng(11)

# Layer without bias and activation, shape of an example.
LINEAR: dict[str, tuple[Any, tuple[int, ...]]] = {
    "dense": (lambda: layers.Dense(3, use_bias=False), (5, 4)),
    "einsum": (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (5, 4)),
    "einsum, two summed": (lambda: layers.EinsumDense("abcd,cde->abe", (None, 3)), (5, 4, 2)),
    "einsum of groups": (lambda: layers.EinsumDense("...cd,cde->...ce", (2, 3)), (5, 2, 4)),
    "einsum, summed before": (lambda: layers.EinsumDense("abc,cd->ad", (3,)), (5, 4)),
    "conv1d": (
        lambda: layers.Conv1D(3, 3, padding="causal", dilation_rate=2, use_bias=False),
        (9, 4),
    ),
    "conv2d": (
        lambda: layers.Conv2D(4, (3, 2), strides=2, padding="same", use_bias=False),
        (7, 6, 3),
    ),
    "conv2d of groups": (lambda: layers.Conv2D(6, 3, groups=2, use_bias=False), (6, 6, 4)),
    "conv3d": (lambda: layers.Conv3D(2, 2, use_bias=False), (4, 3, 3, 2)),
    "depthwise": (
        lambda: layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, use_bias=False),
        (5, 5, 3),
    ),
    "separable": (lambda: layers.SeparableConv2D(4, 3, strides=2, use_bias=False), (7, 7, 3)),
    "separable of one axis": (lambda: layers.SeparableConv1D(4, 3, use_bias=False), (7, 3)),
    "transposed": (lambda: layers.Conv2DTranspose(3, 3, strides=2, use_bias=False), (4, 5, 2)),
    "transposed, same": (
        lambda: layers.Conv2DTranspose(3, (3, 4), strides=(2, 3), padding="same", use_bias=False),
        (4, 5, 2),
    ),
    "transposed, dilated": (
        lambda: layers.Conv1DTranspose(3, 3, dilation_rate=2, use_bias=False),
        (6, 2),
    ),
}


def array(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable), dtype=np.float32)


def regressions(model: Any, data: Any, *leaves: str) -> tuple[Regressions, dict[str, Any]]:
    weights = {w.variable.path: w for w in weights_of(model, where="") if w.axes is not None}
    chosen = {n: w for n, w in weights.items() if not leaves or n.endswith(leaves)}
    return Regressions(model, chosen, data, where="test"), chosen


@pytest.mark.parametrize("kind", sampled(LINEAR, "linear", most=5))
def test_the_sums_give_the_energy_of_the_outputs(kind: str) -> None:
    make, shape = LINEAR[kind]
    keras.utils.set_random_seed(2)
    layer = make()
    model = keras.Sequential([keras.Input(shape), layer])
    data = [RNG.normal(size=(size, *shape)).astype("float32") for size in (3, 2)]
    found, weights = regressions(model, data)
    energy = sum(float(np.square(array(model(x))).sum()) for x in data)
    name = [n for n in found.order if "depthwise_kernel" not in n][-1]
    assert not found.unread and set(found.order) == set(weights)
    problem, matrix = found.problem(name), found.sites[name].matrix
    kernel = array(weights[name].variable)
    rows = matrix.of(kernel)
    assert problem.energy == pytest.approx(energy, rel=1e-4)
    assert problem.error(rows) < 1e-3
    assert problem.error(np.zeros_like(rows)) == pytest.approx(1.0)
    assert np.array_equal(matrix.restored(rows, kernel.shape), kernel)
    # A changed kernel has the error of the changed layer.
    before = [array(model(x)) for x in data]
    other = kernel + 0.1 * RNG.normal(size=kernel.shape).astype("float32")
    weights[name].variable.assign(other)
    lost = sum(
        float(np.square(array(model(x)) - y).sum()) for x, y in zip(data, before, strict=True)
    )
    assert problem.error(matrix.of(other)) == pytest.approx(np.sqrt(lost / energy), rel=1e-3)


def test_the_first_kernel_of_a_separable_convolution_reads_each_channel() -> None:
    keras.utils.set_random_seed(2)
    layer = layers.SeparableConv2D(2, 3, depth_multiplier=2, use_bias=False)
    model = keras.Sequential([keras.Input((5, 5, 2)), layer])
    data = [RNG.normal(size=(3, 5, 5, 2)).astype("float32")]
    problem = regressions(model, data)[0].problem(layer.depthwise_kernel.path)
    middle = keras.ops.depthwise_conv(data[0], layer.depthwise_kernel)
    assert problem.gram.shape == (2, 9, 9)
    assert problem.energy == pytest.approx(float(np.square(array(middle)).sum()), rel=1e-4)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("make", [layers.LSTM, layers.GRU, layers.SimpleRNN])
def test_states_are_the_outputs_of_the_step_before(make: Any, backwards: bool) -> None:
    keras.utils.set_random_seed(2)
    layer = make(4, return_sequences=True, go_backwards=backwards, name="rnn")
    model = keras.Sequential([keras.Input((5, 3)), layer])
    x = RNG.normal(size=(6, 5, 3)).astype("float32")
    found, weights = regressions(model, [x])
    assert len(found.order) == 2
    outputs = array(model(x))
    before = np.concatenate([np.zeros((6, 1, 4), np.float32), outputs[:, :-1]], axis=1).reshape(
        -1, 4
    )
    grams = {n.rpartition("/")[2]: found.problem(n).gram[0] for n in found.order}
    assert np.allclose(grams["recurrent_kernel"], before.T @ before, atol=1e-3)
    assert np.allclose(grams["kernel"], np.einsum("abi,abj->ij", x, x), atol=1e-3)


def test_masked_steps_do_not_count_and_keep_their_state() -> None:
    keras.utils.set_random_seed(2)
    words = np.array([[3, 1, 2], [1, 2, 0]])
    inner = layers.SimpleRNN(2, return_sequences=True, name="rnn")
    model = keras.Sequential(
        [keras.Input((3,), dtype="int32"), layers.Embedding(4, 3, mask_zero=True), inner]
    )
    found, _ = regressions(model, [words])
    assert list(found.unread.values()) == ["the inputs of Embedding are not read"]
    outputs, table = array(model(words)), array(model.layers[0].embeddings)
    seen = table[[3, 1, 2, 1, 2]]
    states = np.concatenate([np.zeros((2, 2)), outputs[0, :2], outputs[1, :1]])
    for name, rows in zip(found.order, (seen, states), strict=True):
        assert np.allclose(found.problem(name).gram[0], rows.T @ rows, atol=1e-5)


def test_layers_that_keep_a_state_have_that_of_before() -> None:
    keras.utils.set_random_seed(2)
    layer = layers.SimpleRNN(2, stateful=True, name="rnn")
    model = keras.Sequential([keras.Input(batch_shape=(3, 4, 2)), layer])
    x = RNG.normal(size=(3, 4, 2)).astype("float32")
    model(x)
    before = array(layer.states[0])
    found, _ = regressions(model, [x])
    gram = found.problem(layer.cell.recurrent_kernel.path).gram[0]
    assert np.array_equal(array(layer.states[0]), before) and before.any()
    # The first state is the one that was kept, and not zero.
    outputs = layers.SimpleRNN(2, return_sequences=True)
    outputs.build((3, 4, 2))
    outputs.set_weights([array(v) for v in layer.cell.trainable_variables])
    states = array(outputs(x, initial_state=before))[:, :-1]
    rows = np.concatenate([before[:, None], states], axis=1).reshape(-1, 2)
    assert np.allclose(gram, rows.T @ rows, atol=1e-4)


def test_targets_are_the_outputs_of_the_dense_network_and_it_is_restored() -> None:
    keras.utils.set_random_seed(2)
    shared = layers.Dense(4, activation="relu", name="shared")
    inputs = keras.Input((4,))
    head = layers.Dense(2, use_bias=False, name="head")
    model = keras.Model(inputs, head(shared(shared(inputs))))
    x = RNG.normal(size=(16, 4)).astype("float32")
    found, weights = regressions(model, [x])
    assert found.order == ["shared/kernel", "head/kernel"]
    # Both uses of the shared layer are seen.
    first = x.T @ x + (h := array(shared(x))).T @ h
    assert np.allclose(found.problem("shared/kernel").gram[0], first, rtol=1e-4)
    dense, targets = array(shared(h)), array(model(x))
    changed = array(shared.kernel) + 0.2
    shared.kernel.assign(changed)
    problem = found.problem("head/kernel")
    assert np.array_equal(array(shared.kernel), changed)
    now = array(shared(shared(x)))
    assert not np.allclose(now, dense, atol=0.1)
    assert np.allclose(problem.gram[0], now.T @ now, rtol=1e-4)
    assert np.allclose(problem.cross[0], targets.T @ now, rtol=1e-3, atol=1e-3)


def test_what_is_not_read_is_named_with_the_reason() -> None:
    class Own(layers.Dense):
        def call(self, inputs: Any) -> Any:
            return super().call(inputs * 2)

    keras.utils.set_random_seed(2)
    inputs = keras.Input((3, 4))
    outputs = layers.TimeDistributed(layers.Dense(2, name="inner"), name="steps")(inputs)
    model = keras.Model(inputs, Own(2, name="own")(outputs))
    found, _ = regressions(model, [RNG.normal(size=(2, 3, 4)).astype("float32")])
    assert found.order == [] and sorted(found.unread.values()) == [
        "inside of TimeDistributed",
        "the inputs of Own are not read",
    ]


def test_attention_is_read_by_its_projections() -> None:
    keras.utils.set_random_seed(2)
    layer = layers.MultiHeadAttention(2, 3, name="attention")
    queries, values = keras.Input((4, 5)), keras.Input((6, 7))
    model = keras.Model([queries, values], layer(queries, values))
    q, v = (RNG.normal(size=(2, *shape)).astype("float32") for shape in ((4, 5), (6, 7)))
    found, _ = regressions(model, [([q, v],)])
    grams = {n.split("/")[-2]: found.problem(n).gram for n in found.order}
    assert {name: gram.shape for name, gram in grams.items()} == {
        "query": (1, 5, 5),
        "key": (1, 7, 7),
        "value": (1, 7, 7),
        "attention_output": (1, 6, 6),
    }
    assert np.allclose(grams["query"][0], np.einsum("bti,btj->ij", q, q), atol=1e-4)


def test_a_weight_that_reads_fewer_examples_now_is_fitted_to_those() -> None:
    class Cut(layers.Layer):
        """Passes as many examples as its weight says."""

        def build(self, shape: Any) -> None:
            self.kernel = self.add_weight(shape=(1, 2), name="kernel")

        def call(self, inputs: Any) -> Any:
            return inputs[: int(keras.ops.convert_to_numpy(self.kernel)[0, 0])]

    cut, head = Cut(), layers.Dense(2, name="head")
    cut.build((None, 4))
    head.build((None, 4))

    class Both(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.head = cut, head

        def call(self, inputs: Any) -> Any:
            return self.head(self.cut(inputs))

    cut.kernel.assign([[3.0, 0.0]])
    model = Both()
    weights = {w.variable.name + w.layer.name: w for w in weights_of(head, where="")[:1]}
    weights["cut"] = weights_of(cut, where="")[0]
    data = np.random.default_rng(0).standard_normal((4, 4)).astype("float32")
    found = Regressions(model, weights, [data], where="test")
    cut.kernel.assign([[2.0, 0.0]])
    (name,) = found.order
    problem = found.problem(name)
    rows, kernel = data[:2].astype(np.float64), keras.ops.convert_to_numpy(head.kernel)
    np.testing.assert_allclose(problem.gram[0], rows.T @ rows, rtol=1e-5)
    np.testing.assert_allclose(problem.cross[0], kernel.T @ rows.T @ rows, rtol=1e-4, atol=1e-6)
