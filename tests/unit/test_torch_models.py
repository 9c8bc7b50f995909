"""Models through arrays, quantization and packed files and back: every kind of layer and type."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax  # noqa: E402

import karikomi as kk  # noqa: E402
from karikomi import pack, registry  # noqa: E402
from karikomi.errors import InvalidArgument, UnknownName, Unsupported  # noqa: E402
from karikomi.quantize import Coded, OutputUnits, UniformGrid  # noqa: E402
from karikomi.search.candidates import eight_bits  # noqa: E402
from karikomi.torch.tasks.runner import runner_for  # noqa: E402


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = torch.nn.Linear(6, 4), torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.scale * self.body(inputs)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(48, 48), torch.nn.Linear(48, 48)
        self.second.weight = self.first.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(inputs))


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(20, 60), torch.nn.ReLU(), torch.nn.Linear(60, 30), torch.nn.Linear(30, 5)
    )


def conv() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(512, 4),
    )


def upward() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 5, 2), torch.nn.Conv2d(5, 2, 1))


MODELS = {"mlp": mlp, "conv": conv, "tied": Tied, "scaled": Scaled, "upward": upward}
DTYPES = (torch.float32, torch.float16, torch.float64)


def fresh(make: Callable[[], torch.nn.Module], seed: int, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(seed)
    return make().to(dtype)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("how", ["plain", "pruned", "bits", "entries"])
def test_save_and_load_into_a_fresh_model(
    tmp_path: Path, how: str, make: Callable[[], torch.nn.Module], dtype: torch.dtype
) -> None:
    model = fresh(make, 0, dtype)
    if how == "pruned":
        kk.torch.prune_(model, sparsity=0.7)
    if how == "bits":
        kk.torch.quantize_(model, bits=5)
    if how == "entries":
        kk.torch.quantize_(model, entries=6)
    path = kk.save(model, tmp_path / "model.karikomi")
    into = kk.load(path, into=fresh(make, 1, dtype))
    assert same(model, into)
    # What was loaded can be saved again without losing its codes.
    assert kk.save(into, tmp_path / "again.karikomi").read_bytes() == path.read_bytes()


def test_quantized_weights_are_stored_as_codes_under_every_name(tmp_path: Path) -> None:
    model = fresh(Tied, 0, torch.float32)
    coded = kk.torch.quantize_(model, bits=4)
    stored = pack.load_coded(kk.save(model, tmp_path / "tied.karikomi"))
    assert list(coded) == ["first.weight", "first.bias", "second.bias"]
    assert set(stored) == {*coded, "second.weight"}
    assert all(isinstance(tensor, Coded) for tensor in stored.values())


def test_layers_quantized_one_after_the_other_are_all_stored_as_codes(tmp_path: Path) -> None:
    model = mlp()
    kk.torch.quantize_(model, bits=4, only="0.weight")
    kk.torch.quantize_(model, entries=3, only="2.weight")
    seen = pack.inspect(kk.save(model, tmp_path / "model.karikomi")).entries
    quantizers = {entry.name: entry.quantizer for entry in seen}
    assert quantizers["0.weight"] == "uniform 4 bits, axis 0"
    assert (quantizers["2.weight"], quantizers["3.weight"]) == ("codebook 3", "none")


def test_codes_survive_parts_copies_and_pickles(tmp_path: Path) -> None:
    model = mlp()
    kk.torch.quantize_(model, bits=8)
    whole = kk.save(model, tmp_path / "whole").read_bytes()
    parts = mlp()
    parts.load_state_dict(fresh(mlp, 0, torch.float32).state_dict())
    again = copy.deepcopy(model)
    assert kk.save(again, tmp_path / "copy").read_bytes() == whole
    assert kk.save(pickle.loads(pickle.dumps(model)), tmp_path / "pickle").read_bytes() == whole
    for layer in (parts[0], parts[2], parts[3]):
        kk.torch.quantize_(layer, bits=8)
    assert all(
        isinstance(one, Coded)
        for name, one in kk.torch.to_stored(parts).items()
        if name.endswith("weight")
    )


def test_units_of_transposed_convolutions_have_their_own_scales() -> None:
    coded = kk.torch.quantize_(upward(), bits=8)
    assert coded["0.weight"].grid.axis == 1 and coded["0.weight"].grid.scale.size == 5
    assert coded["1.weight"].grid.axis == 0 and coded["1.weight"].grid.scale.size == 2


def grouped() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.ConvTranspose2d(4, 6, 3, groups=2), torch.nn.ConvTranspose2d(6, 4, 2)
    )


def by_output_channel(layer: torch.nn.ConvTranspose2d, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale of each output channel and the rounded weight, channel by channel."""
    weight, limit = layer.weight.detach().numpy().copy(), 2 ** (bits - 1) - 1
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    scales = []
    for channel in range(layer.out_channels):
        group, column = divmod(channel, outputs)
        unit = weight[group * inputs : (group + 1) * inputs, column]
        scale = np.float32(np.abs(unit).max().astype(np.float64) / limit)
        unit[...] = np.rint(unit / np.float64(scale)).astype(np.float32) * scale
        scales.append(scale)
    return np.float32(scales), weight


def test_grouped_transposed_convolutions_have_a_scale_per_output_channel(tmp_path: Path) -> None:
    model = grouped()
    wanted = [by_output_channel(layer, 4) for layer in model]
    coded = kk.torch.quantize_(model, bits=4)
    for index, (scales, weight) in enumerate(wanted):
        assert np.array_equal(coded[f"{index}.weight"].grid.scale, scales)
        assert np.array_equal(model[index].weight.detach().numpy(), weight)
    path = kk.save(model, tmp_path / "grouped.karikomi")
    assert same(kk.load(path, into=grouped()), model)
    texts = {entry.name: entry.quantizer for entry in pack.inspect(path).entries}
    assert texts["0.weight"] == "uniform 4 bits, axis 1 of 2 groups"
    assert texts["1.weight"] == "uniform 4 bits, axis 1"


def test_candidates_of_compress_have_a_scale_per_output_channel() -> None:
    inputs = np.zeros((4, 4, 3, 3), np.float32)
    split = kk.tasks.Split(inputs, np.zeros(4, np.int64))
    data = kk.tasks.Data(train=split, validation=split, test=split)
    task = kk.tasks.Task(name="upward", model=grouped, data=lambda: data)
    runner = runner_for(task, data, seed=0)
    arrays, units = runner.fresh(), runner.output_units()
    coded = eight_bits(arrays, [*runner.prunable(), *runner.biases()], units)
    model = kk.torch.fill_(grouped(), arrays)
    for index in (0, 1):
        scales, weight = by_output_channel(model[index], 8)
        assert np.array_equal(coded[f"{index}.weight"].grid.scale, scales)
        assert np.array_equal(coded[f"{index}.weight"].decode(), weight)
        assert coded[f"{index}.bias"].grid.axis is None


class Signs:
    """Toy: the sign times the mean magnitude of the tensor."""

    argument = "bits"

    def quantize(
        self, weights: np.ndarray, size: int, *, units: OutputUnits, name: str = "weights"
    ) -> Coded:
        scale = np.float32([np.abs(weights).mean()])
        return Coded(np.sign(weights).astype(np.int8), UniformGrid(scale, None, size))


def test_a_registered_quantizer_is_usable_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.entries()
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    registry.register("quantizer", name="toy", formula="sign(w) * mean|w|", source="a test")(Signs)
    model = mlp()
    coded = kk.torch.quantize_(model, bits=2, method="toy", only="*weight")
    assert all(np.unique(np.abs(tensor.codes)).tolist() == [1] for tensor in coded.values())
    path = kk.save(model, tmp_path / "toy.karikomi")
    assert same(kk.load(path, into=fresh(mlp, 1, torch.float32)), model)
    grids = {entry.name: entry.quantizer for entry in pack.inspect(path).entries}
    assert grids["0.weight"] == "uniform 2 bits"
    with pytest.raises(
        InvalidArgument, match="quantize_: the quantizer 'toy' takes bits; got entr"
    ):
        kk.torch.quantize_(model, entries=2, method="toy")
    with pytest.raises(UnknownName, match="unknown quantizer; got 'tyo'; did you mean 'toy'"):
        kk.torch.quantize_(model, bits=2, method="tyo")


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    model = mlp()
    kk.torch.quantize_(model, bits=8)
    with torch.no_grad():
        model[2].weight[0, 0] += 1.0
    with pytest.raises(Unsupported, match="2.weight: the weights have changed since quantize_"):
        kk.save(model, tmp_path / "model.karikomi")
    kk.torch.quantize_(model, bits=8)
    kk.save(model, tmp_path / "model.karikomi")


def test_shrink_comes_before_quantize() -> None:
    model = mlp()
    kk.torch.quantize_(model, bits=8)
    with pytest.raises(Unsupported, match="shrink before quantize_"):
        kk.torch.shrink(model, torch.zeros(2, 20))


def test_a_shrunk_network_with_batch_norm_fills_a_fresh_one(tmp_path: Path) -> None:
    model = fresh(conv, 0, torch.float32).eval()
    with torch.no_grad():
        for dead in (1, 4):
            model[0].weight[dead], model[0].bias[dead] = 0.0, 0.0
            model[4].weight[:, 64 * dead : 64 * (dead + 1)] = 0.0
    small, report = kk.torch.shrink(model, torch.randn(2, 3, 8, 8))
    assert report.removed == 2
    path = kk.save(small, tmp_path / "small.karikomi")
    into = kk.load(path, into=fresh(conv, 1, torch.float32).eval())
    inputs = torch.randn(5, 3, 8, 8)
    assert into[0].out_channels == 6 and into[1].num_features == 6
    assert torch.equal(into(inputs), small(inputs))


def test_a_file_of_another_network_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    path = kk.save(
        torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 3)), tmp_path / "f"
    )
    into = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Linear(32, 10))
    before = copy.deepcopy(into)
    with pytest.raises(Unsupported, match="other outputs"):
        kk.load(path, into=into)
    with pytest.raises(Unsupported, match="other inputs"):
        kk.load(path, into=torch.nn.Sequential(torch.nn.Linear(9, 32), torch.nn.Linear(32, 3)))
    names = "only in the file: 0.bias, 0.weight, 1.bias and 1 more.*in the module: bias, weight"
    with pytest.raises(InvalidArgument, match=f"different networks; got {names}"):
        kk.load(path, into=torch.nn.Linear(8, 16))
    one_more = torch.nn.Sequential(*into, torch.nn.Linear(10, 2))
    with pytest.raises(
        InvalidArgument, match=r"file: nothing.*module: 2\.bias, 2\.weight; 4 names"
    ):
        kk.load(path, into=one_more)
    assert same(into, before)


def test_values_that_the_model_cannot_hold_are_refused() -> None:
    arrays = {"weight": np.full((1, 2), 1e300), "bias": np.zeros(1)}
    with pytest.raises(InvalidArgument, match="weight: values too large"):
        kk.torch.fill_(torch.nn.Linear(2, 1), arrays)


DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_floats_are_saved_and_filled_in_bit_for_bit(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    def layer(of: torch.dtype) -> torch.nn.Module:
        made = torch.nn.Linear(3, 2).requires_grad_(False)
        made.weight.data = made.weight.data.abs().to(of)
        return made

    model = layer(dtype)
    path = kk.save(model, tmp_path / "f")
    wide = kk.load(path, into=layer(torch.float32))
    assert torch.equal(wide.weight, model.weight.float())
    narrow = kk.load(path, into=layer(dtype))
    assert torch.equal(narrow.weight.view(torch.uint8), model.weight.view(torch.uint8))
    weight = jax.numpy.asarray(kk.load(path)["weight"])
    assert str(weight.dtype) == str(dtype).removeprefix("torch.")
    assert weight.astype("float32").tolist() == wide.weight.tolist()


def test_pairs_of_float4_come_as_single_numbers_and_go_back(tmp_path: Path) -> None:
    pairs = torch.arange(16, dtype=torch.uint8).view(2, 8).view(torch.float4_e2m1fn_x2)
    path = kk.save({"x": pairs}, tmp_path / "f")
    # The first is in the lower half: 0x02 is 1.0 (exponent 1) before 0.0.
    assert kk.load(path)["x"].astype("f4")[0, :6].tolist() == [0, 0, 0.5, 0, 1, 0]
    into = torch.nn.Module()
    into.register_buffer("x", torch.zeros_like(pairs.view(torch.uint8)).view(pairs.dtype))
    kk.load(path, into=into)
    assert torch.equal(into.x.view(torch.uint8), pairs.view(torch.uint8))
    into.register_buffer("x", torch.zeros(2, 16))
    with pytest.raises(InvalidArgument, match="x: another kind of number"):
        kk.load(path, into=into)


def test_mappings_of_tensors_are_saved_as_they_are(tmp_path: Path) -> None:
    model = mlp()
    state = model.state_dict()
    arrays = {"jax": jax.numpy.ones(2, "bfloat16"), "torch": torch.ones(1, requires_grad=True)}
    loaded = kk.load(kk.save({**state, **arrays}, tmp_path / "f"))
    assert sorted(loaded) == sorted([*state, *arrays])
    assert all(torch.equal(torch.from_numpy(loaded[name]), state[name]) for name in state)
    assert loaded["jax"].dtype.name == "bfloat16"
    with pytest.raises(InvalidArgument, match="tensor 'param_groups.*only NumPy arrays.*got int"):
        kk.save(torch.optim.SGD(model.parameters()).state_dict(), tmp_path / "g")


class TiedHead(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = torch.nn.Embedding(50, 8), torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, 50, bias=False)
        self.head.weight = self.inner.weight


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = TiedHead()
    path = kk.save(model, tmp_path / "f")
    assert path.stat().st_size < model.inner.weight.nbytes + 1000
    into = kk.load(path, into=TiedHead())
    assert into.head.weight is into.inner.weight
    assert torch.equal(into.head.weight, model.head.weight)


def test_a_module_on_the_meta_device_is_filled_ties_included(tmp_path: Path) -> None:
    model = TiedHead().requires_grad_(False)
    path = kk.save(model, tmp_path / "f")
    with torch.device("meta"):
        into = TiedHead().requires_grad_(False)
    kk.load(path, into=into)
    assert same(into, model)
    assert into.head.weight is into.inner.weight and not into.head.weight.requires_grad
    assert int(into.norm.num_batches_tracked) == 0


def test_a_buffer_on_the_meta_device_that_no_file_has_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(3), persistent=False)
    path = kk.save(model, tmp_path / "f")
    with pytest.raises(Unsupported, match="scale: a buffer on the meta device"):
        kk.load(path, into=model.to("meta"))
    assert model.weight.is_meta


def gradients(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    return module


@pytest.mark.parametrize(
    "act",
    [
        lambda m: kk.save(m, "never"),
        lambda m: kk.save(m.state_dict(), "never"),
        kk.torch.to_arrays,
        lambda m: kk.torch.bound_(m, kk.bound.Clamp(0.1)),
        lambda m: kk.torch.shrink(m, torch.ones(1, 4)),
        lambda m: kk.torch.shrink(m, torch.ones(1, 4, device="meta")),
        lambda m: kk.torch.quantize_(m, bits=8),
        lambda m: kk.torch.clip_(gradients(m), kk.clip.ByGlobalNorm(1.0), None),
        lambda m: kk.torch.prune_(m, sparsity=0.5),
        lambda m: kk.torch.attach(torch.optim.SGD(m.parameters()), m, clip=kk.clip.ByGlobalNorm(1)),
        lambda m: kk.torch.Masks({"0.weight": torch.zeros(8, 4) > 0}).apply_(m),
        lambda m: kk.torch.reconstruct_(m, {"0.weight": 16}, [torch.ones(1, 4)]),
        lambda m: kk.torch.recover_(m, kk.torch.Masks(), [(torch.ones(1, 4), None)], loss=len),
        lambda m: kk.torch.recalibrate_(
            m.append(torch.nn.BatchNorm1d(2)), [torch.ones(2, 4)], judge=lambda _: 1.0
        ),
    ],
)
def test_tensors_without_values_are_refused(act: Callable) -> None:
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    with pytest.raises(Unsupported, match=r"0\.weight.*no values"):
        act(module)


def test_both_or_none_of_bits_and_entries() -> None:
    with pytest.raises(InvalidArgument, match="exactly one"):
        kk.torch.quantize_(mlp())
    with pytest.raises(InvalidArgument, match="exactly one"):
        kk.torch.quantize_(mlp(), bits=8, entries=16)


def test_a_network_without_anything_to_quantize_is_refused_with_the_reasons() -> None:
    wave = torch.nn.Module()
    wave.register_parameter("spin", torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    wave.register_buffer("turns", torch.zeros(3, dtype=torch.int64))
    reasons = "spin: its dtype is complex64; turns: its dtype is int64"
    with pytest.raises(Unsupported, match=f"^torch.quantize_: nothing .* got {reasons}") as found:
        kk.torch.quantize_(wave, bits=8)
    assert "only=" not in str(found.value)
    with pytest.raises(Unsupported, match="got a module without parameters"):
        kk.torch.quantize_(torch.nn.ReLU(), bits=8)
    with pytest.raises(UnknownName, match="leaves no tensor; got exclude='\\*'$"):
        kk.torch.quantize_(torch.nn.Linear(2, 2), bits=8, exclude="*")


def test_the_hint_for_a_tensor_that_is_no_array_works(tmp_path: Path) -> None:
    tensor = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(InvalidArgument, match=r"or tensor.detach\(\).cpu\(\).numpy\(\)"):
        pack.save({"w": tensor}, tmp_path / "a.karikomi")
    kk.save({"w": tensor.detach().cpu().numpy()}, tmp_path / "a.karikomi")
    assert kk.load(tmp_path / "a.karikomi")["w"].tolist() == [1.0, 1.0]
