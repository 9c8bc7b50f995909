"""The training of the built-in search, against a loop written out here; its rows; the facts of its runner."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import karikomi as kk  # noqa: E402
from karikomi.errors import InvalidArgument  # noqa: E402
from karikomi.quantize import kmeans  # noqa: E402
from karikomi.tasks import Data, Phase, Recipe, Split, Task  # noqa: E402
from karikomi.torch.tasks import losses, networks, training  # noqa: E402
from karikomi.torch.tasks.runner import runner_for  # noqa: E402
from karikomi.torch.tracing.batches import Batch  # noqa: E402

EPOCHS, SIZE = 3, 12


class Rows:
    """A recorder that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def step(self, step: int, outcome: Any, facts: dict[str, Any]) -> None:
        self.write(
            {
                "event": "step",
                "step": step,
                **({} if outcome is None else outcome.as_row()),
                **facts,
            }
        )

    def describe(self, facts: dict[str, Any]) -> None:
        self.write({"event": "run", "loss": 0.0, **facts})


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def split(size: int, seed: int) -> Split:
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(size, 4)).astype(np.float32)
    return Split(inputs, generator.integers(0, 3, size))


DATA = Data(split(SIZE, 0), split(7, 1), split(9, 2))


def runner_of(model: Any = plain, seed: int = 0, **recipe: Any) -> Any:
    known = {"batch_size": SIZE, "distill": 0.25, "temperature": 2.0, "threads": 1}
    task = Task(name="t", model=model, data=lambda: DATA, recipe=Recipe(**{**known, **recipe}))
    return runner_for(task, DATA, seed=seed)


def trained(runner: Any, phase: Phase) -> tuple[Any, list[dict[str, Any]]]:
    made, rows = runner.train(runner.fresh(), phase), Rows()
    for _ in range(phase.epochs):
        made.run_epoch(rows)
    return made, rows.rows


@pytest.mark.parametrize("distils", [False, True])
def test_a_phase_is_the_loop_by_hand(distils: bool) -> None:
    """One batch an epoch, so that the order of the examples is no matter."""
    runner, teacher = runner_of(), runner_of(seed=1).fresh()
    phase = {"stage": "s", "epochs": EPOCHS, "learning_rate": 0.1, "weight_decay": 0.2}
    clip = kk.clip.ByGlobalNorm(0.05)
    how = Phase(**phase, clip=clip, teacher=teacher if distils else None)
    made, rows = trained(runner, how)
    model, above = kk.torch.fill_(plain(), runner.fresh()), kk.torch.fill_(plain(), teacher)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.2)
    inputs, targets = torch.from_numpy(DATA.train.inputs), torch.from_numpy(DATA.train.targets)
    losses, norms, metrics = [], [], []
    for step in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / EPOCHS))
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = nn.functional.cross_entropy(outputs, targets)
        if distils:
            soft = (above(inputs) / 2).softmax(1).detach()
            apart = nn.functional.kl_div((outputs / 2).log_softmax(1), soft, reduction="batchmean")
            loss = 0.75 * loss + 0.25 * 4 * apart
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            right = model(torch.from_numpy(DATA.validation.inputs)).argmax(1).numpy()
        metrics.append(np.mean(right == DATA.validation.targets))
    for name, tensor in model.state_dict().items():
        assert made.arrays()[name] == pytest.approx(tensor.numpy(), abs=1e-4), name
    steps = [row for row in rows if row["event"] == "step"]
    epochs = [row for row in rows if row["event"] == "epoch"]
    assert [row["loss"] for row in steps] == pytest.approx(losses, rel=1e-4)
    assert [row["norm"] for row in steps] == pytest.approx(norms, rel=1e-3)
    assert [row["validation"] for row in epochs] == metrics
    assert [(row["stage"], row["epoch"], row["step"]) for row in epochs] == [
        ("s", 0, 1),
        ("s", 1, 2),
        ("s", 2, 3),
    ]


def test_an_epoch_takes_whole_batches_of_different_examples() -> None:
    runner = runner_of(batch_size=5)
    made, rows = trained(runner, Phase(stage="s", epochs=2, learning_rate=1e-3))
    steps = [row for row in rows if row["event"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4], "two whole batches of 5 of 12 examples"
    first, second = (row["loss"] for row in rows if row["event"] == "epoch")
    assert first == pytest.approx((steps[0]["loss"] + steps[1]["loss"]) / 2)
    assert second == pytest.approx((steps[2]["loss"] + steps[3]["loss"]) / 2)
    batches = [*made._minibatches(np.random.default_rng(0))]
    inputs = [tuple(row) for batch in batches for row in batch.positional[0].tolist()]
    targets = [target for batch in batches for target in batch.targets.tolist()]
    assert len({*inputs}) == 10
    pairs = zip(map(tuple, DATA.train.inputs.tolist()), DATA.train.targets, strict=True)
    label = dict(pairs)
    assert [label[row] for row in inputs] == targets


def test_outputs_are_those_of_evaluation_in_any_number_of_batches() -> None:
    torch.manual_seed(0)
    model = network().train()
    found = training.outputs(model, DATA.train.inputs, batch=5)
    assert model.training
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(DATA.train.inputs)).numpy()
    assert found == pytest.approx(expected, abs=1e-6)
    assert found.shape == (SIZE, 3)


def test_masks_stay_and_the_ramp_ends_half_way() -> None:
    runner = runner_of(batch_size=3)
    phase = Phase(stage="s", epochs=4, learning_rate=0.1, sparsity=0.5)
    made, rows = trained(runner, phase)
    sparsities = [row["sparsity"] for row in rows if row["event"] == "step"]
    total = 35
    assert sparsities[-1] == pytest.approx(0.5, abs=1 / total)
    # 16 steps: a ramp over the first 8, and nothing is pruned after it.
    assert len({*sparsities[7:]}) == 1 and len({*sparsities[:8]}) > 4
    masks = made.masks()
    assert {*masks} == {"0.weight", "2.weight"}
    for name, mask in masks.items():
        assert np.array_equal(made.arrays()[name] != 0, mask)
    again = Phase(stage="next", epochs=2, learning_rate=0.1, sparsity=0.8, initial=0.5, masks=masks)
    further, rows = runner.train(made.arrays(), again), Rows()
    for _ in range(2):
        further.run_epoch(rows)
    first = next(row for row in rows.rows if row["event"] == "step")
    assert first["sparsity"] >= 0.5 - 1 / total
    for name, mask in further.masks().items():
        assert not np.any(mask & ~masks[name]), "what was pruned stays pruned"
    tuned, _ = trained(runner, Phase(stage="tune", epochs=1, learning_rate=0.1, masks=masks))
    for name, mask in masks.items():
        assert np.array_equal(tuned.arrays()[name] != 0, mask)


def test_shared_weights_stay_shared_and_are_stored_as_trained() -> None:
    runner = runner_of(batch_size=4)
    arrays = runner.fresh()
    coded = {"0.weight": kmeans(arrays["0.weight"], entries=3)}
    phase = Phase(stage="s", epochs=2, learning_rate=0.1, coded=coded)
    made = runner.train(arrays, phase)
    for _ in range(2):
        made.run_epoch(Rows())
    after = made.coded()["0.weight"]
    assert np.array_equal(after.codes, coded["0.weight"].codes)
    assert not np.allclose(after.grid.values[1:], coded["0.weight"].grid.values[1:], atol=1e-3)
    assert np.array_equal(made.arrays()["0.weight"], after.decode())
    assert {*made.arrays()} == {*arrays}
    assert not np.array_equal(made.arrays()["2.weight"], arrays["2.weight"])


def test_the_facts_of_a_network() -> None:
    runner = runner_of(network)
    assert runner.describe() == "4-5-3, 53 parameters"
    assert runner.prunable() == ["0.weight", "3.weight"]
    assert runner.biases() == ["0.bias", "3.bias"]
    assert {*runner.left_alone()} == {"2.weight"}
    assert {name: units.axis for name, units in runner.output_units().items()} == {
        "0.weight": 0,
        "3.weight": 0,
    }
    assert runner.environment()["threads"] == 1
    assert runner.fingerprint() != runner_of(network, seed=1).fingerprint()
    assert np.array_equal(runner.fresh()["0.weight"], runner_of(network).fresh()["0.weight"])


def test_the_threads_are_those_of_the_recipe_or_else_of_torch() -> None:
    other = torch.get_num_threads() + 2
    assert runner_of(threads=other).environment()["threads"] == other
    assert runner_of(threads=0).environment()["threads"] == torch.get_num_threads()


def test_the_gradient_of_the_inputs_is_that_of_the_loss() -> None:
    runner = runner_of(network)
    arrays, inputs = runner.fresh(), DATA.train.inputs.astype(np.float64)
    targets = DATA.train.targets

    def loss(inputs: np.ndarray) -> float:
        outputs = runner.outputs(arrays, inputs.astype(np.float32)).astype(np.float64)
        shares = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
        return -np.log(shares[np.arange(len(targets)), targets]).mean()

    found = runner.input_gradients(arrays, DATA.train.inputs, targets)
    for row, column in ((0, 0), (3, 2), (11, 3)):
        nudge = np.zeros_like(inputs)
        nudge[row, column] = 1e-2
        slope = (loss(inputs + nudge) - loss(inputs - nudge)) / 2e-2
        assert found[row, column] == pytest.approx(slope, abs=2e-4)


@pytest.mark.parametrize(
    ("name", "parameters", "shape"),
    [
        ("digits-mlp", 50_826, (64,)),
        ("lenet300", 266_610, (1, 28, 28)),
        ("lenet5", 431_080, (1, 28, 28)),
    ],
)
def test_the_networks_are_as_large_as_the_papers_say(
    name: str, parameters: int, shape: tuple[int, ...]
) -> None:
    model = networks.NETWORKS[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.zeros(2, *shape)).shape == (2, 10)
    kinds = [type(layer).__name__ for layer in model]
    assert kinds.count("ReLU") == (1 if name == "lenet5" else 2) and kinds[-1] == "Linear"


class Images(nn.Module):
    """A network of images, with a parameter of its own and its own way to flatten."""

    def __init__(self, kind: Any, own: int, view: bool) -> None:
        super().__init__()
        self.conv = kind(3, 4, 2) if kind else nn.Identity()
        self.own = nn.Parameter(torch.ones([1] * own))
        self.view, self.head = view, nn.LazyLinear(3)
        self(torch.zeros(2, 3, *[3] * (3 if kind is nn.Conv3d else 2)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(inputs)
        flat = hidden.view(len(inputs), -1) if self.view else hidden.flatten(1)
        return self.head(flat * self.own.flatten())


@pytest.mark.parametrize(
    ("kind", "own", "view", "converted"),
    [
        (nn.Conv2d, 5, False, True),
        (nn.Conv2d, 4, False, True),
        (nn.Conv3d, 4, False, False),
        (nn.Conv2d, 1, True, False),
        (None, 1, True, False),
    ],
)
def test_only_what_the_format_is_for_is_channels_last(
    kind: Any, own: int, view: bool, converted: bool
) -> None:
    shape = (3, *[3] * (3 if kind is nn.Conv3d else 2))
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(SIZE, *shape)).astype(np.float32)
    data = Data(*[Split(inputs, generator.integers(0, 3, SIZE))] * 3)
    model = lambda: Images(kind, own, view)  # noqa: E731
    runner = runner_for(Task(name="t", model=model, data=lambda: data), data, seed=0)
    made, rows = trained(runner, Phase(stage="dense", epochs=1, learning_rate=0.01))
    assert all(math.isfinite(row["loss"]) for row in rows)
    arrays = made.arrays()
    kept = runner._model(arrays).eval()
    with torch.no_grad():
        expected = kept(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(runner.outputs(arrays, inputs), expected, atol=1e-6)
    gradients = runner.input_gradients(arrays, inputs, data.test.targets)
    assert gradients.shape == inputs.shape and np.abs(gradients).max() > 0
    own_weights = dict(made._model.named_parameters())
    assert own_weights["own"].is_contiguous()
    if kind is nn.Conv2d:
        weight = own_weights["conv.weight"]
        assert weight.is_contiguous(memory_format=torch.channels_last) is converted


@pytest.mark.parametrize("class_axis", [1, -1])
@pytest.mark.parametrize("distil", [0.0, 0.25, 1.0])
def test_loss_and_teacher_share_the_class_axis_and_the_ignored_targets(
    class_axis: int, distil: float
) -> None:
    """Against the same rows without the ignored ones, as (rows, classes)."""
    torch.manual_seed(0)
    shape = (2, 3, 4) if class_axis == 1 else (2, 4, 3)
    inputs, taught = torch.randn(shape), torch.randn(shape)
    targets = torch.tensor([[0, -100, 2, 1], [1, 1, -100, 0]])
    task = Task(
        name="t", model=dict, data=dict, class_axis=class_axis, recipe=Recipe(distill=distil)
    )

    class Fixed(nn.Module):
        def __init__(self, values: torch.Tensor) -> None:
            super().__init__()
            self.values = nn.Parameter(values.clone())

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.values

    made = losses.criterion_of(task, lambda: Fixed(taught), lambda model: model)
    found = made.of(Fixed(inputs), Batch((inputs,), targets=targets))
    nothing = made.of(Fixed(inputs), Batch((inputs,), targets=torch.full_like(targets, -100)))
    assert nothing.item() == 0.0, "a batch without a target that counts"
    counts = targets != -100
    rows, soft = (item.movedim(class_axis, -1)[counts] for item in (inputs, taught))
    own = nn.functional.cross_entropy(rows, targets[counts])
    kinds = {"reduction": "batchmean"}
    apart = nn.functional.kl_div((rows / 2).log_softmax(1), (soft / 2).softmax(1), **kinds)
    expected = (1 - distil) * own + distil * 4 * apart
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


class Several(nn.Module):
    """A network of two inputs that returns several outputs, in a form of choice."""

    def __init__(self, form: str = "dict") -> None:
        super().__init__()
        self.form, self.left, self.right = form, nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> Any:
        logits = self.left(left) + self.right(right)
        if self.form == "tuple":
            return (left, logits) if self.training else logits
        if self.form == "nested":
            return ({"logits": logits},)
        return {"hidden": left, "logits" if self.form == "dict" else "scores": logits}


@pytest.mark.parametrize(
    ("form", "output", "named"),
    [("dict", None, True), ("tuple", 1, False), ("other", "scores", False)],
)
def test_several_inputs_and_outputs_train_as_one(
    form: str, output: str | int | None, named: bool
) -> None:
    left = [split(size, seed) for size, seed in ((SIZE, 0), (7, 1), (9, 2))]

    def inputs(part: Split) -> Any:
        assert isinstance(part.inputs, np.ndarray)
        both = (part.inputs.astype(np.float64), part.inputs[:, :2].astype(np.float16))
        return dict(zip(("left", "right"), both, strict=True)) if named else both

    data = Data(*(Split(inputs(part), part.targets.astype(np.int32)) for part in left))
    made = runner_for(
        Task(name="t", model=lambda: Several(form), data=lambda: data, output=output), data, seed=0
    )
    arrays = made.fresh()
    found = made.outputs(arrays, data.test.inputs)
    first = left[2].inputs
    assert isinstance(first, np.ndarray)
    by_hand = first @ arrays["left.weight"].T + arrays["left.bias"] + arrays["right.bias"]
    by_hand += first[:, :2].astype(np.float16).astype(np.float32) @ arrays["right.weight"].T
    assert found == pytest.approx(by_hand, abs=1e-5)
    trained_, rows = trained(made, Phase(stage="s", epochs=1, learning_rate=1e-2, sparsity=0.5))
    assert rows[-1]["validation"] >= 0
    small, report = made.shrink(trained_.arrays())
    assert report["removed"] == 0 and report["macs_before"] == 4 * 3 + 2 * 3
    assert set(report["left_alone"].values()) == {"its units are outputs of the network"}


@pytest.mark.parametrize(("form", "said"), [("nested", "tuple of dict"), ("x", "'scores'")])
def test_outputs_without_a_choice_are_refused_with_their_form(form: str, said: str) -> None:
    data = Data(*[Split((np.zeros((4, 4)), np.zeros((4, 2))), np.zeros(4, int))] * 3)
    task = Task(name="t", model=lambda: Several(form), data=lambda: data)
    made = runner_for(task, data, seed=0)
    with pytest.raises(InvalidArgument, match=f"no single tensor; got .*{said}.*output="):
        made.outputs(made.fresh(), data.test.inputs)


def test_a_lazy_network_takes_its_shapes_from_the_data() -> None:
    made = runner_of(lambda: nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 3)))
    first, second = made.fresh(), made.fresh()
    assert first["0.weight"].shape == (5, 4)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert first["1.num_batches_tracked"] == 0


def test_inputs_that_are_mapped_read_only_are_taken(tmp_path: Path) -> None:
    inputs = DATA.test.inputs
    assert isinstance(inputs, np.ndarray)
    np.save(tmp_path / "x.npy", inputs.astype(">f4"))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    made = runner_of()
    assert np.array_equal(
        made.outputs(made.fresh(), mapped), made.outputs(made.fresh(), DATA.test.inputs)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_shared_weights_of_any_float_type_are_trained(dtype: Any) -> None:
    made = runner_of(lambda: plain().to(dtype))
    arrays = made.fresh()
    coded = {"0.weight": kmeans(arrays["0.weight"], entries=4)}
    tuned, _ = trained(made, Phase(stage="s", epochs=1, learning_rate=0.1, coded=coded))
    values = tuned.coded()["0.weight"].grid.values
    assert values.dtype == np.float32 and len(values) == 5
    assert np.array_equal(np.unique(tuned.arrays()["0.weight"]), np.unique(values[1:]))
