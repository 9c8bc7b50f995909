"""Batches as data loaders and collators make them: read by every function that takes data, or refused with the form."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_sequence  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset, TensorDataset  # noqa: E402

import karikomi as kk  # noqa: E402
from karikomi.errors import InvalidArgument, Unsupported  # noqa: E402
from karikomi.torch.facts.measure import measure  # noqa: E402
from karikomi.torch.tracing.batches import batch_of, cut, leaves, length_of  # noqa: E402

X, S, Y = torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[5.0]])


class Output(dict):
    """A mapping whose entries are attributes, as of transformers."""

    __getattr__ = dict.__getitem__


class Shifted(nn.Module):
    """``w x + s``, for w = 2."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 2.0)

    def forward(self, inputs: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) + shift


class OwnLoss(Shifted):
    """It takes labels, and returns its loss."""

    def forward(self, inputs: Any, shift: Any, labels: Any = None) -> Any:
        outputs = super().forward(inputs, shift)
        loss = None if labels is None else F.mse_loss(outputs, labels)
        return Output(loss=loss, logits=outputs)


class OneArgument(Shifted):
    """It takes its inputs as one value."""

    def forward(self, pair: Any) -> torch.Tensor:
        return super().forward(*pair)


class FromMapping(Shifted):
    """It takes a mapping."""

    def forward(self, batch: Any) -> torch.Tensor:
        return super().forward(batch["inputs"], batch["shift"])


class Anything(Shifted):
    """It may take the last entry of a batch as well."""

    def forward(self, inputs: torch.Tensor, shift: Any, scale: Any = None) -> torch.Tensor:
        return super().forward(inputs, shift)


Pair = namedtuple("Pair", "inputs shift")
Odd = namedtuple("Odd", "first second")
Triple = namedtuple("Triple", "inputs shift labels")
Backwards = namedtuple("Backwards", "target inputs")
ReadBy = namedtuple("ReadBy", "module given loss", defaults=[F.mse_loss])
BATCHES = {
    "a pair": ReadBy(Shifted, ((X, S), Y)),
    "a list of lists": ReadBy(Shifted, [[X, S], Y]),
    "inputs and targets in one tuple": ReadBy(Shifted, (X, S, Y)),
    "inputs and targets in one list": ReadBy(Shifted, [X, S, Y]),
    "a mapping and targets": ReadBy(Shifted, ({"shift": S, "inputs": X}, Y)),
    "a mapping with labels": ReadBy(Shifted, {"labels": Y, "shift": S, "inputs": X}),
    "a mapping that is no dict": ReadBy(Shifted, UserDict(label=Y, shift=S, inputs=X)),
    "labels for a network with a loss": ReadBy(
        OwnLoss, {"labels": Y, "shift": S, "inputs": X}, lambda outputs, _: outputs.loss
    ),
    "labels for the user's loss": ReadBy(
        OwnLoss,
        {"labels": Y, "shift": S, "inputs": X},
        lambda outputs, y: F.mse_loss(outputs.logits, y),
    ),
    "a named tuple and targets": ReadBy(Shifted, (Pair(shift=S, inputs=X), Y)),
    "other names": ReadBy(Shifted, (Odd(X, S), Y)),
    "a named tuple with labels": ReadBy(Shifted, Triple(X, S, Y)),
    "one argument": ReadBy(OneArgument, ((X, S), Y)),
    "a mapping as one argument": ReadBy(FromMapping, (({"inputs": X, "shift": S},), Y)),
    "a named tuple as one argument": ReadBy(OneArgument, (Odd(X, S), Y)),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_are_read_as_they_are(case: str) -> None:
    make, given, loss = BATCHES[case]
    found = measure(make(), {"gradient"}, ["layer.weight"], data=[given], loss=loss)
    # L = (w x + s - y)^2, so that L' = 2 x (w x + s - y) = 6 (6 + 1 - 5).
    assert found["gradient"]["layer.weight"].item() == pytest.approx(12.0)
    norms = measure(make(), {"input_norm"}, ["layer.weight"], data=[given, given])
    assert norms["input_norm"]["layer.weight"].item() == pytest.approx(18.0**0.5)


@pytest.mark.parametrize(
    ("module", "given", "error"),
    [
        (Shifted, {"x": X, "shift": S, "labels": Y}, "takes inputs, shift, .*got x, shift"),
        (
            Shifted,
            {"inputs": X, "shift": S, "idx": Y},
            "takes inputs, shift, .*got .*idx.*'labels'",
        ),
        (Shifted, (X, Y), "takes inputs, shift, .*got 1 without names; allowed: .inputs, targets."),
        (Shifted, ((X, S, S), Y), "takes inputs, shift, .*got 3 without names"),
        (
            Shifted,
            (X, S, S, Y),
            "a pair or inputs alone; got tuple of 4; allowed: .inputs, targets.",
        ),
        (Anything, (X, S, Y), "a pair or inputs alone; got tuple of 3; allowed: .inputs, targets."),
        (Shifted, {"inputs": X, "shift": S}, "a loss takes targets, and this batch has none"),
    ],
)
def test_other_batches_are_refused_with_the_form(module: Any, given: Any, error: str) -> None:
    with pytest.raises(InvalidArgument, match=error):
        measure(module(), {"gradient"}, ["layer.weight"], data=[given], loss=F.mse_loss)


class Line(nn.Module):
    """``w x``, with w = 2."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 2.0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


def test_a_named_tuple_whose_target_comes_first_goes_by_name() -> None:
    """By place it would train x to predict y from y, without a word where both have one shape."""
    given = Backwards(target=Y, inputs=X)
    found = measure(Line(), {"gradient"}, ["layer.weight"], data=[given], loss=F.mse_loss)
    # L = (w x - y)^2, so that L' = 2 x (w x - y) = 6 (6 - 5).
    assert found["gradient"]["layer.weight"].item() == pytest.approx(6.0)
    with pytest.raises(InvalidArgument, match="takes input, .*got inputs"):
        measure(nn.Linear(1, 1), {"gradient"}, ["weight"], data=[given], loss=F.mse_loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_of_numpy_are_cast_to_the_type_of_the_network(dtype: torch.dtype) -> None:
    """NumPy makes float64, which torch's layers refuse."""
    given = (X.double().numpy(), Y.double().numpy())
    net = Line().to(dtype)
    found = measure(net, {"gradient"}, ["layer.weight"], data=[given], loss=F.mse_loss)
    assert found["gradient"]["layer.weight"].item() == pytest.approx(6.0)
    batch = batch_of(
        ({"inputs": given[0]}, np.array([1])), torch.device("cpu"), module=net, where="data"
    )
    assert batch.named["inputs"].dtype == dtype and batch.targets.dtype == torch.int64


class Recurrent(nn.Module):
    """A layer over the entries of packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.RNN(2, 3), nn.Linear(3, 1, bias=False)

    def forward(self, sequences: PackedSequence) -> torch.Tensor:
        return self.head(self.cells(sequences)[0].data).mean(0, keepdim=True)


def test_packed_sequences_are_one_argument() -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    model = Recurrent()
    hidden = model.cells(packed)[0].data
    for given in (packed, (packed, Y)):
        found = measure(model, {"input_norm"}, ["head.weight"], data=[given])["input_norm"]
        torch.testing.assert_close(found["head.weight"][0].float(), hidden.norm(dim=0))
    macs = measure(model, {"macs"}, ["head.weight"], data=[packed])["macs"]["head.weight"]
    assert float(macs) == 3 * 4 / 2  # four entries of three numbers, of two sequences
    with pytest.raises(Unsupported, match="a packed sequence has no single example; pad it"):
        measure(model, {"flow"}, ["head.weight"], data=[packed])


class Stream(IterableDataset):
    """Pairs without a length."""

    def __iter__(self) -> Iterator[Any]:
        for number in range(4):
            yield torch.full((3,), float(number)), torch.tensor(number % 2)


class Unmeasured(Stream):
    def __len__(self) -> int:
        raise NotImplementedError


@pytest.mark.parametrize("stream", [Stream, Unmeasured])
def test_a_loader_without_a_length_is_read_by_every_function(stream: Any) -> None:
    loader, known = DataLoader(stream(), batch_size=2), list(DataLoader(Stream(), batch_size=2))

    def trained(data: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        loss = F.cross_entropy
        curves = kk.torch.sensitivity(
            model, judge=lambda _: 1.0, sparsities=[0.5], score="taylor", data=data, loss=loss
        )
        assert curves.dense == 1.0
        masks = kk.torch.prune_(model, 0.5, score="taylor", data=data, loss=loss)
        kk.torch.recalibrate_(model, data, judge=data, loss=loss)
        kk.torch.recover_(model, masks, data, loss=loss, epochs=2, rate=0.1, progress=False)
        return model.state_dict()

    expected = trained(known)
    for name, tensor in trained(loader).items():
        assert torch.equal(tensor, expected[name]), name


def test_distillation_is_of_the_logits_of_an_output() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, inputs: torch.Tensor, labels: Any = None) -> Any:
            return Output(logits=self.layer(inputs))

    def trained(make: Any, data: Any) -> list[float]:
        torch.manual_seed(0)
        model, teacher = make(), make()
        masks = kk.torch.prune_(model, 0.5)
        how = {"weight": 1.0, "rate": 0.1, "progress": False}
        kk.torch.recover_(model, masks, data, teacher=teacher, **how)
        return [number for p in model.parameters() for number in p.flatten().tolist()]

    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    assert trained(Classifier, [{"inputs": inputs, "labels": torch.zeros(4)}]) == trained(
        lambda: nn.Sequential(nn.Linear(3, 2)), [inputs]
    )


X40, Y40 = torch.randn(130, 4), torch.arange(130) % 3


@pytest.mark.parametrize(
    "whole",
    [
        (X40, Y40),
        (X40.numpy(), Y40.numpy()),
        ((X40, X40), Y40),
        ({"a": X40}, Y40),
        (X40, X40),
        (X40, X40[:, :1]),
        TensorDataset(X40, Y40),
        [(x, y) for x, y in zip(X40.split(64), Y40.split(64), strict=True)],
    ],
    ids=["pair", "arrays", "several", "named", "itself", "regression", "dataset", "batches"],
)
def test_examples_that_are_given_at_once_are_cut_into_batches(whole: Any) -> None:
    found = list(cut(whole))
    assert [len(targets) for _, targets in found] == [64, 64, 2]
    inputs = [next(iter(leaves(x)), None) for x, _ in map(tuple, found)]
    if inputs[0] is not None:
        assert torch.equal(torch.cat(inputs), X40)
    assert length_of(whole) == 3


@pytest.mark.parametrize(
    "batches",
    [
        (X40, X40 + 1),
        (Y40[:, None], Y40[:, None].repeat(1, 2)),
        ((X40, Y40), (X40, Y40)),
        [X40, Y40],
        (X40, Y40[:9]),
    ],
    ids=["two", "texts", "pairs", "list", "lengths"],
)
def test_two_batches_are_no_pair(batches: Any) -> None:
    assert list(cut(batches)) is not batches and len(list(cut(batches))) == 2
    assert all(found is given for found, given in zip(cut(batches), batches, strict=True))


def test_what_forward_does_not_take_is_left_out_by_name_where_there_are_labels() -> None:
    batch = {"inputs": X, "shift": S, "id": ["row 7"], "weight": Y, "labels": Y}
    with pytest.warns(UserWarning, match="does not take them: id, weight$"):
        found = batch_of(batch, torch.device("cpu"), module=Shifted(), where="data")
    assert sorted(found.named) == ["inputs", "shift"] and found.targets is Y
    for missing in ("labels", "shift"):
        fewer = {name: value for name, value in batch.items() if name != missing}
        with pytest.raises(InvalidArgument, match="and not the inputs of this batch"):
            batch_of(fewer, torch.device("cpu"), module=Shifted(), where="data")


def test_a_dataset_and_arrays_are_pruned_by_as_their_batches_are() -> None:
    nets = []
    for data in (
        [(X40[k : k + 64], Y40[k : k + 64]) for k in (0, 64, 128)],
        (X40.numpy(), Y40.numpy()),
        TensorDataset(X40, Y40),
    ):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        kk.torch.prune_(net, 0.5, score="wanda", data=data)
        nets.append(net[0].weight.detach())
    assert torch.equal(nets[0], nets[1]) and torch.equal(nets[0], nets[2])
