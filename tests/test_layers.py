"""The layers beside references in double precision, PyTorch's own and transformers'."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from llama2_lite.layers import (
    FeedForward,
    RMSNorm,
    apply_rope,
    feed_forward_size,
    rope_table,
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# RMSNorm


def test_norm_by_hand() -> None:
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    expected = torch.tensor([3 / 12.5**0.5, 40 / 12.5**0.5])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), expected)


def test_norm_and_its_gradients_equal_pytorchs() -> None:
    ours, theirs = RMSNorm(48), nn.RMSNorm(48, eps=1e-5)
    ours.weight.data = random(48, seed=1)
    theirs.load_state_dict(ours.state_dict())
    x, y = (30 * random(2, 5, 48)).requires_grad_(), None
    y = x.detach().clone().requires_grad_()
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_bf16_norm_rounds_where_the_reference_does(scale: float) -> None:
    theirs = LlamaRMSNorm(256, eps=1e-5).bfloat16()
    theirs.weight.data = random(256, seed=2, dtype=torch.bfloat16)
    ours = RMSNorm(256).bfloat16()
    ours.load_state_dict(theirs.state_dict())
    x = (scale * random(4, 256)).bfloat16()
    got = ours(x)
    assert got.dtype == torch.bfloat16
    # both round twice, and may round a tie of the first differently
    torch.testing.assert_close(got, theirs(x), rtol=2**-7, atol=0)
    same = (got == theirs(x)).float().mean()
    assert same > 0.99


def test_norm_of_zeros_is_zero_and_eps_counts() -> None:
    assert torch.equal(RMSNorm(8)(torch.zeros(3, 8)), torch.zeros(3, 8))
    tiny = torch.full((4,), 1e-3)
    expected = 1e-3 / math.sqrt(1e-6 + 1e-2)
    torch.testing.assert_close(
        RMSNorm(4, eps=1e-2)(tiny), torch.full((4,), expected), rtol=1e-5, atol=0
    )


def test_norm_hands_over_the_type_of_autocast() -> None:
    norm, x = RMSNorm(16), random(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, norm(x).bfloat16())
    assert norm(x).dtype == torch.float32


def test_norm_knows_its_output_on_meta() -> None:
    with torch.device("meta"):
        assert RMSNorm(16)(torch.empty(3, 16)).shape == (3, 16)


# SwiGLU


def test_feed_forward_by_hand() -> None:
    layer = FeedForward(dim=1, hidden_dim=1)
    for name, value in (("w1", 2.0), ("w3", 3.0), ("w2", 5.0)):
        getattr(layer, name).weight.data.fill_(value)
    silu = 2 / (1 + math.exp(-2))
    torch.testing.assert_close(layer(torch.ones(1)), torch.tensor([5 * silu * 3]))


def test_feed_forward_equals_the_equation_in_double_precision() -> None:
    layer, x = FeedForward(24, 40), random(2, 3, 24)
    w1, w2, w3 = (getattr(layer, f"w{i}").weight.double().T for i in (1, 2, 3))
    gate = x.double() @ w1
    exact = (gate / (1 + (-gate).exp()) * (x.double() @ w3)) @ w2
    torch.testing.assert_close(layer(x).double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "expected"),
    [
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (8192, 256, 1.0, 22016),
        (8192, 4096, 1.3, 28672),
    ],
    ids=["7B", "13B", "34B", "70B"],
)
def test_sizes_of_the_family(
    dim: int, multiple_of: int, multiplier: float | None, expected: int
) -> None:
    assert feed_forward_size(dim, multiple_of, multiplier) == expected


@given(st.integers(1, 2**16), st.integers(1, 2**13))
def test_size_is_the_next_multiple(dim: int, multiple_of: int) -> None:
    size = feed_forward_size(dim, multiple_of)
    wanted = math.floor(Fraction(8 * dim, 3))
    assert size % multiple_of == 0
    assert wanted <= size < wanted + multiple_of


@pytest.mark.parametrize(("dim", "multiple_of"), [(0, 8), (8, 0), (-3, 8)])
def test_sizes_must_be_positive(dim: int, multiple_of: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        feed_forward_size(dim, multiple_of)


# Rotary embeddings


def rotate_double(x: Tensor, positions: np.ndarray, theta: float = 10000.0) -> Tensor:
    """Complex multiplication in double precision; x is (B, T, H, D)."""
    head_dim = x.shape[-1]
    speeds = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turn = np.exp(1j * positions[:, None] * speeds)[:, None]  # (T, 1, D/2)
    pairs = x.double().numpy().copy().view(np.complex128)
    return torch.from_numpy((pairs * turn).view(np.float64))


def test_rotation_by_hand() -> None:
    quarter = torch.tensor([[0.0]]), torch.tensor([[1.0]])  # cos, sin
    x = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    assert apply_rope(x, *quarter).flatten().tolist() == [-4.0, 3.0]


@pytest.mark.parametrize("theta", [10000.0, 1e6])
def test_rotation_equals_complex_multiplication(theta: float) -> None:
    x = random(2, 300, 3, 16)
    cos, sin = rope_table(300, 16, theta)
    exact = rotate_double(x, np.arange(300), theta)
    torch.testing.assert_close(
        apply_rope(x, cos, sin).double(), exact, rtol=0, atol=2e-4
    )


def test_table_equals_transformers_to_the_last_bit_at_far_positions() -> None:
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=512, num_attention_heads=8))
    positions = torch.arange(8192)[None]
    cos, sin = rope_table(8192, 64)
    for ours, theirs in zip((cos, sin), rotary(cos, positions), strict=True):
        assert torch.equal(ours, theirs[0, :, :32])


def test_pairs_are_transformers_halves_interleaved() -> None:
    x = random(1, 50, 2, 16)
    cos, sin = rope_table(50, 16)
    halves = x.unflatten(-1, (8, 2)).transpose(-1, -2).flatten(-2).transpose(1, 2)
    wide_cos, wide_sin = (torch.cat((t, t), dim=-1)[None] for t in (cos, sin))
    theirs, _ = apply_rotary_pos_emb(halves, halves, wide_cos, wide_sin)
    theirs = theirs.transpose(1, 2).unflatten(-1, (2, 8)).transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(apply_rope(x, cos, sin), theirs)


@given(
    distance=st.integers(0, 500),
    near=st.integers(0, 500),
    far=st.integers(0, 3500),
    seed=st.integers(0, 100),
)
def test_score_depends_on_distance_only(
    distance: int, near: int, far: int, seed: int
) -> None:
    q, k = random(2, 1, 1, 1, 32, seed=seed)
    cos, sin = rope_table(4096, 32)

    def score(position: int) -> Tensor:
        there = slice(position + distance, position + distance + 1)
        here = slice(position, position + 1)
        return (
            apply_rope(q, cos[there], sin[there]) * apply_rope(k, cos[here], sin[here])
        ).sum()

    torch.testing.assert_close(score(near), score(far), rtol=0, atol=2e-2)


def test_rotation_keeps_lengths() -> None:
    x = random(1, 40, 2, 8)
    turned = apply_rope(x, *rope_table(40, 8))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])  # position 0 is not turned


def test_each_row_may_have_its_own_positions() -> None:
    x = random(2, 3, 2, 8)
    cos, sin = rope_table(20, 8)
    positions = torch.tensor([[0, 1, 2], [7, 8, 9]])
    both = apply_rope(x, cos[positions], sin[positions])
    for row in range(2):
        alone = apply_rope(x[row, None], cos[positions[row]], sin[positions[row]])
        assert torch.equal(both[row], alone[0])


def test_bf16_rotation_is_rounded_once() -> None:
    x = random(1, 64, 2, 16, dtype=torch.bfloat16)
    cos, sin = rope_table(64, 16)
    out = apply_rope(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rope(x.float(), cos, sin).bfloat16())


def test_the_form_for_the_compiler_is_the_same_rotation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = random(2, 30, 3, 16).requires_grad_()
    table = rope_table(30, 16)
    eager = apply_rope(x, *table)
    (eager_gradient,) = torch.autograd.grad(eager.square().sum(), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    written_out = apply_rope(x, *table)
    (gradient,) = torch.autograd.grad(written_out.square().sum(), x)
    torch.testing.assert_close(written_out, eager)
    torch.testing.assert_close(gradient, eager_gradient)


def test_table_reaches_its_device_from_within_another() -> None:
    with torch.device("meta"):
        cos, _ = rope_table(4, 8, device="cpu")
        unplaced, _ = rope_table(4, 8)
    assert cos.device.type == unplaced.device.type == "cpu"
    assert rope_table(4, 8, device="meta")[0].is_meta


def test_odd_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="head_dim=7 is odd"):
        rope_table(10, 7)


def test_gradient_of_the_gate_reaches_all_matrices() -> None:
    layer = FeedForward(6, 10)
    F.mse_loss(layer(random(4, 6)), torch.zeros(4, 6)).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
