"""Attention: every path beside the equation, the cache, and transformers' layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from llama2_lite import attention as attention_module
from llama2_lite.attention import (
    WRITTEN_OUT_UP_TO,
    Attention,
    KVCache,
    attend,
    attend_written_out,
    causal_mask,
)
from llama2_lite.layers import rope_table

HEADS = [(8, 8), (8, 2), (8, 1)]  # multi-head, grouped-query, multi-query


def heads(
    n_heads: int,
    n_kv_heads: int,
    n_new: int,
    n_total: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, laid out in memory as the layer hands them over."""
    generator = torch.Generator().manual_seed(n_new)
    return tuple(
        torch.randn(2, length, n, 8, generator=generator)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for n, length in (
            (n_heads, n_new),
            (n_kv_heads, n_total),
            (n_kv_heads, n_total),
        )
    )  # type: ignore[return-value]


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The equation in double precision, with keys and values copied to each head."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if mask is None:
        new, total = torch.arange(q.shape[2]), torch.arange(k.shape[2])
        mask = total <= new[:, None] + len(total) - len(new)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


@pytest.fixture
def written_out_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the queries with which the path written out was taken."""
    calls = []

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        calls.append(q.shape)
        return attend_written_out(q, k, v, mask)

    monkeypatch.setattr(attention_module, "attend_written_out", spy)
    return calls


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
@pytest.mark.parametrize(("n_new", "n_total"), [(7, 7), (3, 7), (1, 7), (1, 1)])
def test_attend_equals_the_equation(
    n_heads: int, n_kv_heads: int, n_new: int, n_total: int
) -> None:
    q, k, v = heads(n_heads, n_kv_heads, n_new, n_total)
    out, reference = attend(q, k, v), exact(q, k, v)
    torch.testing.assert_close(out.double(), reference, rtol=1e-5, atol=1e-6)
    inputs = (q, k, v)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(reference.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
@pytest.mark.parametrize("n_new", [1, 5])
def test_attend_keeps_to_a_mask(n_heads: int, n_kv_heads: int, n_new: int) -> None:
    q, k, v = heads(n_heads, n_kv_heads, n_new, 5)
    mask = torch.rand(2, 1, n_new, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 0] = True  # nobody looks at nothing
    out = attend(q, k, v, mask)
    torch.testing.assert_close(out.double(), exact(q, k, v, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
def test_both_paths_and_their_gradients_agree(n_heads: int, n_kv_heads: int) -> None:
    inputs = heads(n_heads, n_kv_heads, 33, 33)
    built_in, written_out = attend(*inputs), attend_written_out(*inputs)
    torch.testing.assert_close(written_out, built_in)
    weights = torch.randn(built_in.shape, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad((written_out * weights).sum(), inputs),
        torch.autograd.grad((built_in * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
def test_bf16_is_written_out_and_close(
    n_heads: int, n_kv_heads: int, written_out_calls: list[torch.Size]
) -> None:
    q, k, v = heads(n_heads, n_kv_heads, 64, 64, torch.bfloat16)
    out = attend(q, k, v)
    assert written_out_calls == [q.shape]
    assert out.dtype == torch.bfloat16
    error = (out.double() - exact(q, k, v)).abs().max()
    assert error < 0.03  # a few units in the last of eight bits


def test_what_the_choice_depends_on(written_out_calls: list[torch.Size]) -> None:
    bf16 = torch.bfloat16
    limit = WRITTEN_OUT_UP_TO
    attend(*heads(2, 1, 16, 16))  # fp32
    attend(*heads(2, 1, limit + 1, limit + 1, bf16))  # long
    attend(*heads(2, 1, 16, 20, bf16))  # something came before
    attend(*heads(2, 1, 1, 16, bf16))  # generating
    attend(*heads(2, 1, 16, 16), causal_mask(16, 16))  # fp32 with a mask
    assert not written_out_calls
    attend(*heads(2, 1, limit, limit, bf16))
    attend(*heads(2, 1, limit, limit, bf16), causal_mask(limit, limit))
    assert len(written_out_calls) == 2


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
@pytest.mark.parametrize("n_masks", [1, 2])
def test_both_paths_keep_to_a_mask(n_heads: int, n_kv_heads: int, n_masks: int) -> None:
    inputs = heads(n_heads, n_kv_heads, 33, 33)
    mask = torch.rand(n_masks, 1, 33, 33, generator=torch.Generator().manual_seed(0))
    mask = (mask < 0.5) | torch.eye(33, dtype=torch.bool)  # nobody looks at nothing
    built_in, written_out = attend(*inputs, mask), attend_written_out(*inputs, mask)
    torch.testing.assert_close(written_out, built_in)
    weights = torch.randn(built_in.shape, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad((written_out * weights).sum(), inputs),
        torch.autograd.grad((built_in * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bf16_softmax_computes_in_fp32() -> None:
    scores = 8 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    scores = scores.bfloat16()
    assert torch.equal(scores.softmax(-1), scores.float().softmax(-1).bfloat16())


@pytest.mark.parametrize(("n_new", "n_total"), [(4, 4), (2, 5), (1, 3)])
def test_causal_mask(n_new: int, n_total: int) -> None:
    mask = causal_mask(n_new, n_total)
    for t in range(n_new):
        for s in range(n_total):
            assert mask[t, s] == (s <= n_total - n_new + t)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), HEADS)
def test_layer_equals_transformers(n_heads: int, n_kv_heads: int) -> None:
    torch.manual_seed(0)
    dim, n_tokens, first = 64, 12, 3000
    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        attn_implementation="eager",
    )
    theirs, ours = (
        LlamaAttention(config, layer_idx=0),
        Attention(dim, n_heads, n_kv_heads),
    )
    head_dim = dim // n_heads
    for name in ("wq", "wk"):  # interleaved pairs here, halves there
        weight = getattr(theirs, f"{name[1]}_proj").weight
        pairs = weight.detach().unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)
        getattr(ours, name).weight.data = pairs.reshape(weight.shape)
    ours.wv.weight.data = theirs.v_proj.weight.detach()
    ours.wo.weight.data = theirs.o_proj.weight.detach()

    x = torch.randn(2, n_tokens, dim)
    cos, sin = (t[first:] for t in rope_table(first + n_tokens, head_dim))
    wide = tuple(torch.cat((t, t), dim=-1)[None] for t in (cos, sin))
    hidden = torch.zeros(n_tokens, n_tokens)
    hidden = hidden.masked_fill(~causal_mask(n_tokens, n_tokens), float("-inf"))
    expected, _ = theirs(x, wide, hidden[None, None])
    torch.testing.assert_close(ours(x, cos, sin), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    pieces=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    n_kv_heads=st.sampled_from([1, 2, 4]),
)
def test_cached_in_pieces_equals_all_at_once(
    pieces: list[int], n_kv_heads: int
) -> None:
    torch.manual_seed(0)
    n_tokens = sum(pieces)
    layer = Attention(32, 4, n_kv_heads)
    cos, sin = rope_table(n_tokens, 8)
    x = torch.randn(2, n_tokens, 32)
    cache = KVCache((2, n_kv_heads, n_tokens, 8), x.dtype)
    with torch.no_grad():
        whole = layer(x, cos, sin)
        outs = [
            layer(x[:, new], cos[new], sin[new], cache=cache)
            for new in torch.arange(n_tokens).split(pieces)
        ]
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, rtol=1e-5, atol=1e-6)
    assert cache.length == n_tokens


def test_the_future_does_not_change_the_past() -> None:
    torch.manual_seed(0)
    layer, x = Attention(32, 4, 2), torch.randn(1, 9, 32)
    table = rope_table(9, 8)
    changed = x.clone()
    changed[:, 5:] += 1
    before, after = layer(x, *table), layer(changed, *table)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(dim=-1).all()


def test_every_parameter_receives_a_gradient() -> None:
    torch.manual_seed(0)
    layer, x = Attention(32, 4, 2), torch.randn(2, 6, 32)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, *rope_table(6, 8)).square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_cache_says_when_it_is_full_and_keeps_what_it_had() -> None:
    cache = KVCache((1, 2, 3, 4), torch.float32)
    new = torch.ones(1, 2, 2, 4)
    keys, values = cache.append(new, 2 * new)
    assert keys.shape == (1, 2, 2, 4)
    assert torch.equal(values, 2 * new)
    with pytest.raises(ValueError, match="room for 3 tokens, not for 4"):
        cache.append(new, new)
    assert cache.length == 2
    assert torch.equal(cache.keys[:, :, :2], new)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((30, 4, 2), "n_heads=4 does not divide dim=30"),
        ((32, 4, 3), "n_kv_heads=3 does not divide n_heads=4"),
    ],
)
def test_sizes_that_do_not_divide(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(*sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [1, 16])
def test_compiles_as_one_graph(dtype: torch.dtype, n_tokens: int) -> None:
    torch.manual_seed(0)
    layer, x = Attention(32, 4, 2).to(dtype), torch.randn(2, n_tokens, 32, dtype=dtype)
    table = rope_table(n_tokens, 8)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(compiled(x, *table), layer(x, *table), **tolerance)


def test_compiles_once_for_all_lengths() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = Attention(32, 4, 2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for n_tokens in (16, 24, 40):
        x, table = torch.randn(2, n_tokens, 32), rope_table(n_tokens, 8)
        torch.testing.assert_close(compiled(x, *table), layer(x, *table))
