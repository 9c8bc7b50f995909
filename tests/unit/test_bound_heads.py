"""QK-clip on torch modules: where heads lie, who supplies their logits, what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import karikomi as kk
from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported
from karikomi.torch.bounding.attention_logits import note_logits, watch_logits
from karikomi.torch.modules.attention import attentions, declare_attention

RULE = kk.bound.QKClip(1.0)


class Grouped(nn.Module):
    """A user's attention with fewer key heads, that notes its logits."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, *, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.fused = heads, kv_heads, fused
        if fused:
            self.qkv = nn.Linear(8, 3 * (heads + 2 * kv_heads))
            declare_attention(self, heads=heads, kv_heads=kv_heads, qkv="qkv")
        else:
            self.q, self.k = nn.Linear(8, 3 * heads), nn.Linear(8, 3 * kv_heads)
            declare_attention(self, heads=heads, kv_heads=kv_heads, q="q", k="k")

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.fused:
            q, k = self.qkv(inputs).split([3 * self.heads, 6 * self.kv_heads], dim=1)
            k = k[:, : 3 * self.kv_heads]
        else:
            q, k = self.q(inputs), self.k(inputs)
        q = q.unflatten(1, (self.heads, 3))
        k = k.unflatten(1, (self.kv_heads, 3)).repeat_interleave(self.heads // self.kv_heads, 1)
        return torch.einsum("ihd,jhd->hij", q, k).amax((1, 2)) / math.sqrt(3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        largest = self.logits(inputs)
        note_logits(self, largest)
        return largest.sum()


def by_hand(layer: nn.MultiheadAttention, query: Any, key: Any, hidden: Any = None) -> torch.Tensor:
    """Return the largest logit per head of batch-first inputs, the long way."""
    width, heads = layer.embed_dim, layer.num_heads
    if layer.in_proj_weight is None:
        weights: Any = (layer.q_proj_weight, layer.k_proj_weight)
    else:
        weights = layer.in_proj_weight[:width], layer.in_proj_weight[width : 2 * width]
    bias = layer.in_proj_bias
    q = functional.linear(query, weights[0], None if bias is None else bias[:width])
    k = functional.linear(key, weights[1], None if bias is None else bias[width : 2 * width])
    if layer.bias_k is not None:
        k = torch.cat([k, layer.bias_k.expand(len(k), 1, -1)], 1)
    q, k = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (q, k))
    logits = q @ k.mT / math.sqrt(width // heads)
    if hidden is not None:
        logits = logits.masked_fill(hidden, -math.inf)
    return logits.amax((0, 2, 3))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 5, "vdim": 3},
        {"add_bias_kv": True},
        {"kdim": 5, "add_bias_kv": True},
    ],
    ids=str,
)
def test_every_head_pays_for_itself_alone(options: dict[str, Any], alpha: float) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, batch_first=True, **options)
    for parameter in layer.parameters():
        parameter.data.normal_()
    query, key = torch.randn(2, 6, 12), torch.randn(2, 7, layer.kdim)
    before = by_hand(layer, query, key).detach()
    rest = {n: p.clone() for n, p in layer.named_parameters() if "out_proj" in n or "v" in n}
    rule = kk.bound.QKClip(float(before.median()), alpha=alpha)
    outcome, _ = kk.torch.bound_(layer, rule, logits={"": before})
    expected = before.clamp_max(rule.limit)
    torch.testing.assert_close(by_hand(layer, query, key).detach(), expected)
    assert outcome.share_at_bound == pytest.approx(2 / 3) and outcome.post == pytest.approx(
        rule.limit, rel=1e-12
    )
    assert outcome.names == ("",) * 3 and outcome.pre == float(before.max())
    assert all(torch.equal(layer.get_parameter(name), value) for name, value in rest.items())
    if layer.in_proj_weight is not None:
        assert set(outcome.left_alone) == {"out_proj.weight", "out_proj.bias", "bias_v"} & set(
            dict(layer.named_parameters())
        )


def test_the_values_of_a_packed_projection_keep_their_bits() -> None:
    layer = nn.MultiheadAttention(8, 2)
    weight, bias = layer.in_proj_weight[16:].clone(), layer.in_proj_bias[16:].clone()
    kk.torch.bound_(layer, RULE, logits={"": [9.0, 9.0]})
    assert torch.equal(layer.in_proj_weight[16:], weight)
    assert torch.equal(layer.in_proj_bias[16:], bias)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_declared_layers_follow_the_same_law(heads: int, kv_heads: int, fused: bool) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), Grouped(heads, kv_heads, fused=fused))
    attention: Any = model[1]
    for parameter in attention.parameters():
        parameter.data.normal_()
    inputs = torch.randn(20, 8)
    attention(inputs)
    before = attention.logits(inputs).detach()
    rule = kk.bound.QKClip(float(before.median()))
    key = attention.qkv if fused else attention.k
    first = 3 * heads if fused else 0
    kept = key.weight[first : first + 3 * kv_heads].clone()
    outcome, _ = kk.torch.bound_(model, rule)
    expected = before.clamp_max(rule.limit)
    torch.testing.assert_close(attention.logits(inputs).detach(), expected)
    assert outcome.names == ("1",) * heads
    # A key head that several query heads share stays as it is.
    assert torch.equal(key.weight[first : first + 3 * kv_heads], kept) == (kv_heads < heads)


def test_a_declaration_goes_with_copies() -> None:
    model = copy.deepcopy(nn.Sequential(Grouped()))
    outcome, _ = kk.torch.bound_(model, RULE, logits={"0": torch.full((4,), 2.0)})
    assert outcome.post == 1.0


class TestWatch:
    """The hook on nn.MultiheadAttention."""

    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("options", [{}, {"kdim": 5}, {"add_bias_kv": True}], ids=str)
    def test_it_finds_the_largest_logit_of_each_head(
        self, options: dict[str, Any], batch_first: bool
    ) -> None:
        torch.manual_seed(2)
        layer = nn.MultiheadAttention(12, 3, batch_first=batch_first, **options)
        query, key, value = torch.randn(2, 6, 12), torch.randn(2, 7, layer.kdim), None
        value = torch.randn(2, 7, layer.vdim)
        watch_logits(layer)
        swap = (lambda one: one) if batch_first else (lambda one: one.transpose(0, 1))
        layer(swap(query), key=swap(key), value=swap(value))
        outcome, _ = kk.torch.bound_(layer, kk.bound.QKClip())
        assert outcome.norms == pytest.approx(by_hand(layer, query, key).clamp_min(0).tolist())

    def test_masked_pairs_do_not_count(self) -> None:
        torch.manual_seed(3)
        layer = nn.MultiheadAttention(8, 2, batch_first=True)
        inputs = torch.randn(3, 5, 8)
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[1, 3:] = True
        own = torch.rand(6, 5, 5) < 0.3
        own[..., 0] = False
        additive = torch.zeros(5, 5).masked_fill(causal, -math.inf)
        watch_logits(layer)
        for arguments, hidden in [
            ({"attn_mask": causal}, causal),
            ({"attn_mask": additive, "is_causal": True}, causal),
            ({"attn_mask": own}, own.reshape(3, 2, 5, 5)),
            ({"attn_mask": causal, "key_padding_mask": padding}, causal | padding[:, None, None]),
        ]:
            layer(inputs, inputs, inputs, **arguments)
            outcome, _ = kk.torch.bound_(layer, kk.bound.QKClip())
            expected = by_hand(layer, inputs, inputs, hidden).clamp_min(0)
            assert outcome.norms == pytest.approx(expected.tolist())

    def test_passes_join_until_a_bound_has_read_them(self) -> None:
        torch.manual_seed(4)
        layer = nn.MultiheadAttention(8, 2, batch_first=True)
        small, large = torch.randn(1, 5, 8), 3.0 * torch.randn(1, 5, 8)
        watch_logits(layer)
        for inputs in (small, large, small):
            layer(inputs, inputs, inputs)
        layer.eval()(*[100.0 * large] * 3)
        outcome, _ = kk.torch.bound_(layer, kk.bound.QKClip())
        expected = torch.stack([by_hand(layer, x, x) for x in (small, large)]).amax(0)
        assert outcome.norms == pytest.approx(expected.tolist())
        outcome, _ = kk.torch.bound_(layer, kk.bound.QKClip())
        assert outcome.names == () and outcome.share_at_bound == 0.0
        assert outcome.left_alone["in_proj_weight"] == "no finite logits were supplied for it"

    def test_large_batches_are_read_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("karikomi.torch.bounding.attention_logits._ENTRIES", 60)
        layer = nn.MultiheadAttention(8, 2, batch_first=True)
        inputs = torch.randn(7, 5, 8)
        padding = torch.rand(7, 5) < 0.3
        padding[:, 0] = False
        watch_logits(layer)
        layer(inputs, inputs, inputs, key_padding_mask=padding)
        outcome, _ = kk.torch.bound_(layer, kk.bound.QKClip())
        expected = by_hand(layer, inputs, inputs, padding[:, None, None]).clamp_min(0)
        assert outcome.norms == pytest.approx(expected.tolist())

    def test_an_encoder_is_watched_through_and_let_go(self) -> None:
        block = nn.TransformerEncoderLayer(8, 2, dim_feedforward=8, batch_first=True)
        model = nn.TransformerEncoder(block, 2)
        watch = watch_logits(model)
        assert watch.names == ("layers.0.self_attn", "layers.1.self_attn")
        model(torch.randn(2, 4, 8))
        outcome, _ = kk.torch.bound_(model, RULE)
        assert outcome.names == ("layers.0.self_attn",) * 2 + ("layers.1.self_attn",) * 2
        watch.remove()
        model(torch.randn(2, 4, 8))
        with pytest.raises(Unsupported, match="QKClip needs the largest logit of every head"):
            kk.torch.bound_(model, RULE)

    def test_a_pass_that_gave_nan_bounds_nothing(self) -> None:
        layer = nn.MultiheadAttention(8, 2)
        before = layer.in_proj_weight.clone()
        watch_logits(layer)
        layer(*[torch.full((3, 1, 8), math.nan)] * 3)
        outcome, _ = kk.torch.bound_(layer, RULE)
        assert torch.equal(layer.in_proj_weight, before) and outcome.names == ()

    def test_gradients_do_not_see_the_watch(self) -> None:
        torch.manual_seed(6)
        layer = nn.MultiheadAttention(8, 2)
        inputs = torch.randn(4, 1, 8, requires_grad=True)
        grads = []
        for watched in (False, True):
            if watched:
                watch_logits(layer)
            layer(inputs, inputs, inputs)[0].sum().backward()
            grads.append(inputs.grad)
            inputs.grad = None
        assert torch.equal(grads[0], grads[1])

    def test_nothing_to_watch_is_refused(self) -> None:
        with pytest.raises(
            Unsupported, match="no nn.MultiheadAttention to watch; declare your layers"
        ):
            watch_logits(Grouped())


@pytest.mark.parametrize(
    ("logits", "error", "text"),
    [
        (None, Unsupported, "QKClip needs the largest logit of every head, .*; got none for a"),
        ({}, InvalidArgument, "logits are a mapping from attention"),
        ([1.0], InvalidArgument, "logits are a mapping from attention"),
        ({"b": [1.0, 2.0]}, UnknownName, "there is no such attention; got 'b'; known: a"),
        ({"a": [1.0]}, InvalidArgument, r"a: one largest logit per query head; got shape \(1,\)"),
        ({"a": "high"}, InvalidArgument, "a: one largest logit per query head"),
        ({"a": [1.0, math.nan]}, NonFinite, "non-finite logits in a"),
        ({"a": torch.tensor([1.0, math.inf])}, NonFinite, "non-finite logits in a"),
    ],
)
def test_logits_that_do_not_fit_are_refused(logits: Any, error: type, text: str) -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=text):
        kk.torch.bound_(model, RULE, logits=logits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_only_whole_layers_are_meant() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2)})
    logits = {"a": [9.0, 9.0]}
    outcome, _ = kk.torch.bound_(model, RULE, only="a.*", logits=logits)
    assert outcome.names == ("a", "a")
    with pytest.raises(Unsupported, match="no attention has all its query and key projections sel"):
        kk.torch.bound_(model, RULE, only="a.in_proj_weight", logits=logits)
    with pytest.raises(
        Unsupported, match="the module has no attention that is known here; declare"
    ):
        kk.torch.bound_(nn.Linear(2, 2), RULE, logits=logits)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"heads": 0, "q": "q", "k": "k"}, "must be a multiple of the key heads"),
        ({"heads": 4, "kv_heads": 3, "q": "q", "k": "k"}, "must be a multiple of the key heads"),
        ({"heads": 4, "q": "q"}, "name two layers, or one"),
        ({"heads": 4, "q": "q", "k": "q"}, "name two layers, or one"),
        ({"heads": 4, "q": "q", "k": "k", "qkv": "q"}, "name two layers, or one"),
        ({"heads": 4, "q": "q", "k": "x"}, "not an nn.Linear of the module; got 'x'"),
        ({"heads": 5, "q": "q", "k": "k"}, "the outputs do not divide into these heads"),
        ({"heads": 4, "q": "q", "k": "k"}, "the outputs do not divide; got 12 and 6"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused(arguments: Any, text: str) -> None:
    module = nn.ModuleDict({"q": nn.Linear(8, 12), "k": nn.Linear(8, 6)})
    text = text.replace("divide; got", "divide into these heads; got")
    with pytest.raises(InvalidArgument, match=f"^torch.declare_attention.*{text}"):
        declare_attention(module, **arguments)
    assert attentions(module) == {}


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_logits_that_overflowed_leave_their_layer_alone(bad: float) -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2)})
    note_logits(model["a"], torch.tensor([bad, 9.0]))
    note_logits(model["b"], torch.tensor([-math.inf, 9.0]))  # a head that saw nothing
    before = model["a"].in_proj_weight.clone()
    outcome, _ = kk.torch.bound_(model, RULE)
    assert outcome.names == ("b", "b") and outcome.norms.tolist() == [0.0, 9.0]
    assert torch.equal(model["a"].in_proj_weight, before)
    assert outcome.left_alone["a.in_proj_weight"] == "no finite logits were supplied for it"


@pytest.mark.parametrize("largest", [[1.0], torch.tensor(1.0), torch.empty(0, 2)])
def test_what_is_no_vector_of_heads_is_not_noted(largest: Any) -> None:
    with pytest.raises(InvalidArgument, match="the largest logits are a tensor with one entry per"):
        note_logits(nn.Linear(1, 1), largest)


def test_the_number_of_heads_does_not_change() -> None:
    layer = nn.MultiheadAttention(8, 2)
    note_logits(layer, torch.ones(3, 2))
    with pytest.raises(InvalidArgument, match="another number of heads than before; got 4"):
        note_logits(layer, torch.ones(4))
