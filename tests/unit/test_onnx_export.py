"""Networks as ONNX files: the integers of the codes, what onnxruntime runs in integers, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import karikomi as kk
from karikomi.errors import InvalidArgument, NonFinite, Unavailable, UnknownName, Unsupported

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
runtime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
pytest.importorskip("onnxscript", reason="needs the onnx extra")
nn, F = torch.nn, torch.nn.functional


class Convolutions(nn.Module):
    """What a residual network is made of, on one small image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 16, 3, 2, 1)
        self.linear = nn.Linear(16, 5)
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Any) -> Any:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)) + x)
        y = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = F.max_pool2d(F.relu6(self.conv3(x)) + y, 2)
        return self.linear(x.mean((2, 3)))


class Words(nn.Module):
    """An embedding, a gated layer and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.inner, self.norm = nn.Linear(16, 32), nn.LayerNorm(32)
        self.back = nn.Linear(32, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Any, mask: Any) -> Any:
        hidden = F.gelu(self.norm(self.inner(self.embedding(ids)))) * mask[..., None]
        return self.head(self.back(hidden))


def run(path: Path, *inputs: Any) -> np.ndarray:
    options = runtime.SessionOptions()
    # By default onnxruntime rounds the inputs of decoded matrices too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})[0]


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


def seeded(kind: type, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return kind().eval()


@pytest.fixture(scope="module")
def images() -> Any:
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def integers(images: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A quantized network, its codes, its file for integer kernels, and the report."""
    network = seeded(Convolutions)
    codes = kk.torch.quantize_(network, bits=8)
    path = tmp_path_factory.mktemp("onnx") / "integers.onnx"
    given = {"activations": "int8", "data": [images[:8], images[8:]], "progress": False}
    return network, codes, path, kk.torch.export_onnx(network, images[:2], path, **given)


def test_the_file_has_the_integers_of_the_codes_up_to_folded_signs(integers):
    _, codes, path, report = integers
    stored = arrays(path)
    # A batch norm with a negative scale turns the signs of a channel; a fourth input channel is zero.
    for name, coded in codes.items():
        if coded.codes.ndim < 2:
            continue
        found = stored[f"{name}_codes"]
        assert found.dtype == np.int8 and name in report.weights
        found = found[:, : coded.shape[1]] if found.ndim == 4 else found
        assert np.array_equal(np.abs(found), np.abs(coded.codes))
    assert np.array_equal(stored["linear.weight_codes"], codes["linear.weight"].codes)
    assert np.array_equal(stored["linear.weight_scale"], codes["linear.weight"].grid.scale)
    factor = np.abs(stored["conv1.weight_scale"] / codes["conv1.weight"].grid.scale)
    network = integers[0]
    wanted = network.bn1.weight / torch.sqrt(network.bn1.running_var + network.bn1.eps)
    assert np.allclose(factor, wanted.detach().abs().numpy(), rtol=1e-6)


def test_every_layer_runs_in_integers_and_near_the_module(integers, images):
    network, _, path, report = integers
    assert {row.runs for row in report.layers} == {"int8"} and len(report.layers) == 4
    assert report.macs_float == 0.0 and not report.fell_back
    assert report.macs == 16 * 16 * (8 * 27 + 8 * 72) + 8 * 8 * 16 * 72 + 16 * 5
    expected = network(images).detach().numpy()
    got = run(path, images)
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()
    assert report.cosine > 0.999 and "4 of 4 layers in int8" in str(report)


def test_outputs_are_those_of_the_affine_arithmetic(integers, images):
    """The first layer by hand: rounded inputs times codes, saturated at zero where the module has a ReLU."""
    _, codes, path, _ = integers
    model = onnx.load(path)
    quantize = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    constants = arrays(path)

    def scales(node: Any) -> tuple[float, int]:
        return float(constants[node.input[1]]), int(constants[node.input[2]])

    (step, zero), (step_out, zero_out) = scales(quantize[0]), scales(quantize[1])
    x = np.clip(np.rint(images[:2].numpy() / step) + zero, 0, 255) - zero
    weight = constants["conv1.weight_codes"][:, :3].astype(np.float64)
    product = F.conv2d(torch.from_numpy(x).double(), torch.from_numpy(weight), padding=1)
    bias = constants["conv1.weight_bias_codes"].reshape(-1, 1, 1)
    scale = constants["conv1.weight_scale"].reshape(-1, 1, 1).astype(np.float64) * step
    wanted = np.clip(np.rint((product.numpy() + bias) * scale / step_out) + zero_out, 0, 255)
    assert zero_out == 0
    name = quantize[1].output[0]
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    options = runtime.SessionOptions()
    session = runtime.InferenceSession(model.SerializeToString(), options)
    (got,) = session.run([name], {session.get_inputs()[0].name: images[:2].numpy()})
    assert np.abs(got.astype(int) - wanted).max() <= 1 and np.mean(got != wanted) < 0.01


def test_any_batch_runs(integers, images):
    _, _, path, report = integers
    assert report.open_axes[0] == "batch"
    whole = run(path, images[:5])
    assert np.array_equal(run(path, images[3:4]), whole[3:4])


def test_codes_without_integer_activations_lose_nothing(tmp_path):
    network = seeded(Words)
    codes = kk.torch.quantize_(network, bits=4)
    ids, mask = torch.randint(0, 20, (2, 7)), torch.ones(2, 7)
    report = kk.torch.export_onnx(network, (ids, mask), tmp_path / "a.onnx", dynamic="all")
    assert set(report.weights) >= {name for name in codes if codes[name].codes.ndim > 1}
    assert report.max_difference < 1e-6
    assert all("a vector" in reason for reason in report.float_weights.values())
    stored = arrays(tmp_path / "a.onnx")
    inner = codes["inner.weight"]
    found = stored["inner.weight_codes"]
    assert np.array_equal(found if found.shape == inner.shape else found.T, inner.codes)
    ids, mask = torch.randint(0, 20, (3, 4)), torch.ones(3, 4)
    expected = network(ids, mask).detach().numpy()
    assert np.allclose(run(tmp_path / "a.onnx", ids, mask), expected, atol=1e-5)


def test_a_transformers_layers_run_in_integers_by_named_inputs(tmp_path):
    network = seeded(Words)
    torch.manual_seed(1)
    data = [{"mask": torch.ones(4, 6), "ids": torch.randint(0, 20, (4, 6))} for _ in range(2)]
    example = {"ids": data[0]["ids"], "mask": data[0]["mask"]}
    report = kk.torch.export_onnx(
        network, example, tmp_path / "a.onnx", activations="int8", data=data, exclude="back.*"
    )
    assert {row.name: row.runs for row in report.layers} == {
        "inner.weight": "int8",
        "back.weight": "float32",
        "embedding.weight": "int8",
    }
    assert report.fell_back == {"back.weight": "not selected"}
    assert report.macs_float == pytest.approx(32 * 16 / (2 * 32 * 16 + 16 * 20))
    assert report.cosine > 0.999


def test_codebooks_stay_and_fall_back_by_name(tmp_path, images):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    codes = kk.torch.quantize_(network, entries=15)
    data = [images]
    report = kk.torch.export_onnx(
        network, images[:1], tmp_path / "a.onnx", activations="int8", data=data
    )
    assert set(report.fell_back) == {"0.weight", "2.weight"} and report.macs_float == 1.0
    assert all("no scale per unit" in reason for reason in report.fell_back.values())
    assert report.max_difference < 1e-5
    stored = arrays(tmp_path / "a.onnx")
    assert np.array_equal(stored["2.weight_codes"], codes["2.weight"].codes)
    assert np.array_equal(stored["2.weight_values"], codes["2.weight"].grid.values)


@pytest.mark.parametrize("size", [{"entries": 15}, {"rate": 3.0}])
def test_codes_that_kernels_lack_are_rounded_again_where_bits_are_given(tmp_path, images, size):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    with torch.no_grad():
        # One unit with an outlier: its codes are wider than a byte.
        network[2].weight[3, 0, 0, 0] = 40.0
    held = kk.torch.quantize_(network, **size, data=[images], progress=False)
    given = {"activations": "int8", "data": [images], "bits": 8, "progress": False}
    report = kk.torch.export_onnx(network, images[:2], tmp_path / "a.onnx", **given)
    assert not report.fell_back and report.macs_float == 0.0 and report.cosine > 0.999
    wide = {"2.weight"} if "rate" in size else {"0.weight", "2.weight"}
    assert set(report.rounded_again) == wide and "rounded again" in str(report)
    stored, coded = arrays(tmp_path / "a.onnx"), held["2.weight"]
    codes, scale = stored["2.weight_codes"], stored["2.weight_scale"]
    assert codes.dtype == np.int8
    values = codes * scale.reshape(-1, 1, 1, 1)
    if "rate" in size:
        others = np.arange(8) != 3
        assert np.array_equal(codes[others], coded.codes[others]) and coded.codes[3].max() > 127
    assert np.abs(values - coded.decode()).max() <= 40 / 127


class Attention(nn.Module):
    """Fused attention with a mask of one kind, beside what the mask is made of."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.back, self.kind = nn.Linear(8, 24), nn.Linear(8, 4), kind

    def forward(self, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        count, steps, _ = x.shape
        query, key, value = self.inner(x).view(count, steps, 3, 2, 4).permute(2, 0, 3, 1, 4)
        keys = kept[:, None, None, :].bool()
        masks: dict[str, dict[str, Any]] = {
            "none": {},
            "causal": {"is_causal": True},
            "truth": {"attn_mask": keys},
            "truth and order": {"attn_mask": keys & torch.ones(steps, steps).tril().bool()},
            "infinite": {"attn_mask": torch.where(keys, 0.0, -torch.inf)},
            "least": {"attn_mask": torch.where(keys, 0.0, torch.finfo(torch.float32).min)},
        }
        found = nn.functional.scaled_dot_product_attention(query, key, value, **masks[self.kind])
        return self.back(found.transpose(1, 2).reshape(count, steps, 8)) + 0 * kept[..., None]


def test_attention_may_be_an_output_itself(tmp_path):
    class Bare(nn.Module):
        def forward(self, x: Any, kept: Any) -> Any:
            keys = kept[:, None, None, :].bool()
            return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=keys)

    x, kept = torch.randn(2, 2, 5, 4), torch.ones(2, 5, dtype=torch.long)
    kept[1] = 0
    report = kk.torch.export_onnx(Bare(), {"x": x, "kept": kept}, tmp_path / "a.onnx")
    assert report.max_difference < 1e-6
    (output,) = runtime.InferenceSession(tmp_path / "a.onnx").get_outputs()
    assert output.name == "scaled_dot_product_attention" and output.shape[0] == "batch"


@pytest.mark.parametrize("dynamic", ["batch", "all"])
@pytest.mark.parametrize(
    "kind", ["none", "causal", "truth", "truth and order", "infinite", "least"]
)
def test_rows_without_keys_are_what_they_are_in_torch(tmp_path, kind, dynamic):
    torch.manual_seed(0)
    network = Attention(kind).eval()

    def given(count: int, steps: int) -> dict[str, torch.Tensor]:
        kept = torch.ones(count, steps, dtype=torch.long)
        kept[1, 3:], kept[2], kept[0, 0] = 0, 0, 0
        return {"x": torch.randn(count, steps, 8), "kept": kept}

    report = kk.torch.export_onnx(network, given(3, 6), tmp_path / "a.onnx", dynamic=dynamic)
    assert report.max_difference < 1e-5
    other = given(5, 6 if dynamic == "batch" else 9)
    session = runtime.InferenceSession(tmp_path / "a.onnx")
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in other.items()})
    assert np.allclose(found, network(**other).detach().numpy(), atol=1e-6)
    kinds = [node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node]
    assert "IsNaN" not in kinds


def test_pruned_and_tiny_channels_break_nothing(tmp_path, images):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    with torch.no_grad():
        network[0].weight[0] = 0.0
        network[0].bias[0] = 0.37
        network[0].weight[1] = 1e-30
    given = {"activations": "int8", "data": [images], "progress": False}
    report = kk.torch.export_onnx(network, images[:2], tmp_path / "a.onnx", **given)
    # One channel's bias is 1e30 times its scale: such a layer is not left to overflow.
    assert report.fell_back == {
        "0.weight": "its bias does not fit in 32 bits at the scale of its weight"
    }
    with torch.no_grad():
        network[0].weight[1] = 0.01
    report = kk.torch.export_onnx(network, images[:2], tmp_path / "a.onnx", **given)
    assert not report.fell_back and report.cosine > 0.999


def test_half_precision_is_widened_and_the_module_is_left_as_it_was(tmp_path, images):
    network = seeded(Convolutions).to(torch.bfloat16).train()
    before = copy.deepcopy(network.state_dict())
    report = kk.torch.export_onnx(network, images[:2].bfloat16(), tmp_path / "a.onnx")
    assert report.max_difference < 0.05 and network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_recurrent_layer_falls_back_by_name(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            return self.head(self.inner(x)[0])

    x = torch.randn(2, 5, 8)
    report = kk.torch.export_onnx(
        seeded(Net), x, tmp_path / "a.onnx", activations="int8", data=[x], progress=False
    )
    (reason,) = report.fell_back.values()
    assert "no integer kernel of LSTM" in reason
    assert report.macs_float == pytest.approx(2 * 32 * 8 / (2 * 32 * 8 + 24))


def test_what_is_missing_or_unknown_is_named(tmp_path, images, monkeypatch):
    network, path = seeded(Convolutions), tmp_path / "a.onnx"

    def export(**given: Any) -> Any:
        return kk.torch.export_onnx(network, images[:2], path, **given)

    with pytest.raises(InvalidArgument, match="measured on data"):
        export(activations="int8")
    with pytest.raises(InvalidArgument, match="'int8'"):
        export(activations="int4", data=[images])
    with pytest.raises(UnknownName, match="percentile"):
        export(activations="int8", data=[images], calibration="percentil")
    with pytest.raises(InvalidArgument, match="iterable of batches"):
        export(activations="int8", data=images)
    with pytest.raises(InvalidArgument, match="activations='int8'"):
        export(bits=8)
    with pytest.raises(UnknownName, match="batch"):
        export(dynamic="first")
    codes = kk.torch.quantize_(copy.deepcopy(network), bits=8)
    with pytest.raises(InvalidArgument, match="another shape"):
        export(codes={"linear.weight": codes["conv1.weight"]})
    with pytest.raises(NonFinite, match="NaN"):
        export(activations="int8", data=[images * float("nan")])
    quantized = copy.deepcopy(network)
    kk.torch.quantize_(quantized, bits=8)
    quantized.linear.weight.data.add_(1)
    with pytest.raises(Unsupported, match="changed since"):
        kk.torch.export_onnx(quantized, images[:2], path)
    assert not path.exists()
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(Unavailable, match=r"pip install '\.\[onnx\]'"):
        export()


def test_padding_of_signed_values_is_zero(tmp_path):
    """Values with a zero point other than 0 are moved and padded as codes."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Any) -> Any:
            return self.second(F.pad(self.first(x)[:, :, ::2], (3, 3, 3, 3)))

    network, x = seeded(Net), torch.randn(4, 4, 12, 12)
    given = {"activations": "int8", "data": [x], "progress": False}
    report = kk.torch.export_onnx(network, x, tmp_path / "a.onnx", **given)
    kinds = [node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node]
    assert "MaxPool" in kinds and "Slice" not in kinds and report.macs_float == 0.0
    expected = network(x).detach().numpy()
    apart = np.abs(run(tmp_path / "a.onnx", x) - expected)
    assert apart.max() < 0.05 * np.abs(expected).max()


def test_a_shortcut_with_channels_of_zeros_is_a_kernel_that_keeps_the_codes(tmp_path, monkeypatch):
    """Strides and channels of zeros beside a block become one convolution; a wide one stays two nodes."""
    from karikomi.torch.onnx_export import kernel_fitting

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 9, 3, 2, 1)

        def forward(self, x: Any) -> Any:
            x = self.first(x)
            return self.second(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 3))

    network, x = seeded(Net), torch.randn(4, 4, 12, 12)
    given = {"activations": "int8", "data": [x], "progress": False}
    outputs = []
    for most, extra in ((4096, {"Conv"}), (4 * 9 - 1, {"MaxPool", "Pad"})):
        monkeypatch.setattr(kernel_fitting, "MOST_ONES", most)
        report = kk.torch.export_onnx(network, x, tmp_path / "a.onnx", **given)
        kinds = [node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node]
        assert {"MaxPool", "Pad", "Conv"} & set(kinds) == extra | {"Conv"}
        assert kinds.count("Conv") == 3 - len(extra - {"Conv"}) // 2
        assert report.macs_float == 0.0 and [row.name for row in report.layers] == [
            "first.weight",
            "second.weight",
        ]
        outputs.append(run(tmp_path / "a.onnx", x[:3]))
    assert np.array_equal(*outputs)
    expected = network(x[:3]).detach().numpy()
    assert np.abs(outputs[0] - expected).max() < 0.05 * np.abs(expected).max()


def test_products_of_activations_stay_float(tmp_path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Any) -> Any:
            x = self.norm(x)
            return self.inner(x) @ x.mT + x.sum(-1, keepdim=True)

    network, x = seeded(Net), torch.randn(2, 6, 8)
    given = {"activations": "int8", "data": [x], "progress": False}
    report = kk.torch.export_onnx(network, x, tmp_path / "a.onnx", **given)
    assert list(report.fell_back.values()) == ["a product of two activations"]
    graph = onnx.load(tmp_path / "a.onnx").graph
    (normed,) = [node.output[0] for node in graph.node if node.op_type == "LayerNormalization"]
    readers = {node.op_type for node in graph.node if normed in node.input}
    # The residual stream is read as it is; only the layer, as a matrix, reads it rounded.
    assert {"Reshape", "Transpose"} <= readers and "DequantizeLinear" not in readers
    assert not readers & {"QuantizeLinear", "Gemm"}


def test_what_the_engine_does_not_fuse_is_named(tmp_path, monkeypatch):
    from karikomi.torch.onnx_export import to_file

    kinds = to_file.optimized_kinds
    monkeypatch.setattr(to_file, "optimized_kinds", lambda s: dict.fromkeys(kinds(s), "FusedConv"))
    network, x = nn.Sequential(nn.Conv2d(4, 4, 3)).eval(), torch.randn(2, 4, 8, 8)
    given = {"activations": "int8", "data": [x], "progress": False}
    report = kk.torch.export_onnx(network, x, tmp_path / "a.onnx", **given)
    assert report.macs_float == 1.0 and "runs it as FusedConv" in report.fell_back["0.weight"]


def test_latency_is_measured_in_turns(integers, tmp_path):
    _, _, path, _ = integers
    rows = kk.torch.measure_onnx({"a": path, "b": path}, batches=(1, 2), seconds=0.05)
    assert [(row.name, row.batch) for row in rows] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert all(row.runs >= 5 and row.ms_least > 0 and row.engine for row in rows)
    assert 0.2 < rows[1].ratio < 5 and rows[0].ratio == 1.0
    with pytest.raises(InvalidArgument, match="no file"):
        kk.torch.measure_onnx({})


@pytest.mark.parametrize("kind", [nn.GELU, nn.ReLU, nn.Tanh])
def test_a_bias_is_part_of_an_integer_product(tmp_path, kind):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), kind(), nn.Linear(16, 4)).eval()
    x, other = torch.randn(3, 5, 8), torch.randn(2, 7, 8)
    given = {"activations": "int8", "data": [x, other], "progress": False, "dynamic": "all"}
    report = kk.torch.export_onnx(network, x, tmp_path / "a.onnx", **given)
    assert [(row.name, row.kind) for row in report.layers] == [
        ("0.weight", "Gemm"),
        ("2.weight", "Gemm"),
    ]
    assert not report.fell_back and report.macs == 5 * (8 * 16 + 16 * 4)
    expected = network(other).detach().numpy()
    assert np.abs(run(tmp_path / "a.onnx", other) - expected).max() < 0.05 * np.abs(expected).max()


class WithToken(nn.Module):
    """A token before the others, made for ``len(x)`` examples, as vision transformers do, and fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.encoder(x)[:, 0])


@pytest.mark.parametrize("count", [1, 4])
def test_the_number_of_examples_stays_open_where_the_code_takes_their_len(
    count: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network, x = WithToken().eval(), torch.randn(5, 6, 8)
    kk.torch.export_onnx(network, x[:count], tmp_path / "open.onnx")
    session = runtime.InferenceSession(tmp_path / "open.onnx")
    for rows in (1, 2, 5):
        (found,) = session.run(None, {session.get_inputs()[0].name: x[:rows].numpy()})
        np.testing.assert_allclose(found, network(x[:rows]).detach(), atol=1e-5)
    assert "len" not in globals()


class ForSomany(nn.Module):
    """It makes a number of the first size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.linear(x[row]) for row in range(int(x.shape[0]))])


def test_a_network_for_so_many_examples_is_exported_only_as_that(tmp_path: Path) -> None:
    network, x = ForSomany().eval(), torch.randn(3, 4)
    with pytest.raises(Unsupported, match="fixes the number of examples; got 3 in the exported"):
        kk.torch.export_onnx(network, x, tmp_path / "x.onnx")
    kk.torch.export_onnx(network, x, tmp_path / "x.onnx", dynamic="none")
