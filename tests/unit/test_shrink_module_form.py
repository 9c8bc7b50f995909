"""``form="module"``: units that a number in the code counts stay, others go, and the class stays the same."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import karikomi as kk  # noqa: E402
from karikomi.errors import UnknownName, Unsupported  # noqa: E402
from karikomi.torch.tasks.networks import CifarResNet  # noqa: E402

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Viewed(torch.nn.Module):
    """Layers of 8, 12 and 10 units, of which the code counts the 12 where `counted`."""

    def __init__(self, *, counted: bool = True, asserts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(6, 8), torch.nn.Linear(8, 12)
        self.third, self.last = torch.nn.Linear(12, 10), torch.nn.Linear(10, 3)
        self.counted, self.asserts = counted, asserts

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found = torch.relu(self.second(torch.relu(self.first(inputs))))
        if self.counted:
            found = found.view(-1, 3, 4).tanh().view(-1, 12)
        if self.asserts:
            assert len(self.first.weight) == 8
        return self.last(torch.relu(self.third(found)))


def test_the_units_that_a_number_counts_stay_and_others_go() -> None:
    module = Viewed()
    small, report = kk.torch.shrink(module, X, width=0.5, form="module")
    assert type(small) is Viewed and report.form == "module" and not report.literals
    assert report.widths_after == {"first": 4, "second": 12, "third": 5, "last": 3}
    assert "a number in the code counts them: view at" in report.frozen["second"]
    assert kk.torch.shrink(module, X, width=0.5)[1].form == "graph", "unless it is asked for"


def test_a_budget_is_met_by_the_units_that_may_go() -> None:
    _, report = kk.torch.shrink(Viewed(), X, parameters=0.7, form="module")
    assert report.widths_after["second"] == 12
    assert 0.6 < report.parameters_after / report.parameters_before <= 0.7


def test_dead_units_that_a_number_counts_stay_too() -> None:
    module = Viewed()
    with torch.no_grad():
        for layer in (module.second, module.third):
            layer.weight[:2] = 0.0
    small, report = kk.torch.shrink(module, X, form="module")
    assert report.widths_after == {"first": 8, "second": 12, "third": 8, "last": 3}
    assert torch.allclose(small(X), module(X), atol=1e-6)


def test_a_residual_network_with_padded_shortcuts_loses_inner_channels() -> None:
    torch.manual_seed(0)
    module = CifarResNet(1).eval()
    images = torch.randn(2, 3, 32, 32)
    small, report = kk.torch.shrink(module, images, width=0.75, form="module")
    assert type(small) is CifarResNet and report.max_difference < 1e-5
    widths = report.widths_after
    assert [widths[f"layer{k}.0.conv1"] for k in (1, 2, 3)] == [12, 24, 48]
    assert [widths[name] for name in ("conv1", "layer1.0.conv2", "layer2.0.conv2")] == [16, 16, 32]
    assert "pad at" in report.frozen["conv1"]


def test_where_no_number_is_found_the_error_names_the_other_form() -> None:
    with pytest.raises(Unsupported, match='form="any" returns the exported graph'):
        kk.torch.shrink(Viewed(counted=False, asserts=True), X, width=0.5, form="module")
    with pytest.raises(UnknownName, match="unknown form"):
        kk.torch.shrink(Viewed(), X, width=0.5, form="graph")


def test_where_all_are_counted_nothing_can_go() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Unflatten(1, (3, 4)))

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = module, torch.nn.Linear(12, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.last(self.inner(inputs).sin().view(-1, 12))

    with pytest.raises(Unsupported, match="no unit can go.*a number in the code counts them"):
        kk.torch.shrink(Whole(), X, width=0.5, form="module")


def test_a_copy_that_differs_after_its_layers_were_fitted_is_no_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from karikomi.torch.shrinking import smaller_copy

    plain, calls = smaller_copy.in_module_form, list[int]()

    def once(*given: object) -> object:
        calls.append(1)
        return plain(*given) if len(calls) == 1 else None  # type: ignore[arg-type]

    monkeypatch.setattr(smaller_copy, "in_module_form", once)
    with pytest.raises(Unsupported, match=r"does not run with smaller tensors.*form=\"any\""):
        kk.torch.shrink(Viewed(counted=False), X, width=0.5, form="module")
    assert len(calls) == 2
