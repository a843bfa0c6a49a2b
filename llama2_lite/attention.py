"""Grouped-query attention.

Exported from book/06_attention.md, which explains every part. Edit it there,
then `make export`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2_lite.layers import apply_rope


class KVCache:
    """The keys and values of all tokens seen so far, for one attention layer.

    Args:
        shape: (B, K, room, D), where ``room`` is the number of tokens that fit.
        dtype: of the keys and values; the model's compute type.
        device: where to keep them.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ):
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of T new tokens, both (B, K, T, D).

        Returns:
            The keys and values of all S tokens so far, both (B, K, S, D).

        Raises:
            ValueError: if the new tokens do not fit.
        """
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            room = self.keys.shape[2]
            raise ValueError(
                f"the cache has room for {room} tokens, not for {end}; "
                "make one with more"
            )
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


# Up to so many tokens, in bf16 on a CPU, the two products written out beat the built-in
# function, forward and backward together; benchmarks/attention_ablation.py measures it.
WRITTEN_OUT_UP_TO = 512


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend from T new tokens to S tokens so far: chooses how to compute it.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, S, D), where K divides H and the last T of S tokens are the new.
        mask: (B or 1, 1, T, S), True where a token may look; causal if left out.

    Returns:
        (B, H, T, D).
    """
    n_heads, n_new = q.shape[1:3]
    n_total = k.shape[2]
    if n_new == 1:
        groups = q.reshape(*k.shape[:2], -1, q.shape[3])  # (B, K, G, D)
        if q.device.type == "cpu" and len(q) > 1 and q.dtype == torch.float32:
            scores = (groups * q.shape[3] ** -0.5) @ k.mT  # (B, K, G, S)
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            return (scores.softmax(-1) @ v).reshape(q.shape)
        return F.scaled_dot_product_attention(groups, k, v, mask).reshape(q.shape)
    is_bf16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if is_bf16_on_cpu and n_new == n_total <= WRITTEN_OUT_UP_TO:
        return attend_written_out(q, k, v, mask)
    shared = k.shape[1] != n_heads
    if mask is None and n_new == n_total:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=shared
        )
    if mask is None:
        mask = causal_mask(n_new, n_total, q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=shared)


def attend_written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    """`attend` by two matrix products; all T tokens are new."""
    n_heads, n_tokens, head_dim = q.shape[1:]
    if k.shape[1] != n_heads:
        k, v = (x.repeat_interleave(n_heads // x.shape[1], dim=1) for x in (k, v))
    if mask is None:
        hidden = q.new_full((n_tokens, n_tokens), float("-inf")).triu(1)
    else:
        hidden = q.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
        hidden = hidden.expand(*q.shape[:2], -1, -1).flatten(0, 1)  # (B H, T, T)
    rows, keys, values = (x.flatten(0, 1) for x in (q, k, v))  # (B H, T, D)
    scores = torch.baddbmm(hidden, rows, keys.mT, alpha=head_dim**-0.5)  # (B H, T, T)
    return torch.bmm(scores.softmax(-1), values).view(q.shape)


def causal_mask(
    n_new: int, n_total: int, device: torch.device | str | None = None
) -> Tensor:
    """Who may look at whom, the last T of S tokens being new: bool, (T, S)."""
    everyone = torch.ones(n_new, n_total, dtype=torch.bool, device=device)
    return everyone.tril(n_total - n_new)


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share one key-value head.

    ``n_kv_heads == n_heads`` is multi-head attention (Llama 2 7B and 13B),
    ``n_kv_heads == 1`` multi-query attention, and anything between is
    grouped-query attention (34B and 70B). Source: paper §2.2; Ainslie et al., 2023.

    Args:
        dim: model width, C.
        n_heads: number of query heads, H; must divide ``dim``.
        n_kv_heads: number of key-value heads, K; must divide ``n_heads``.
    """

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int):
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"{n_heads=} does not divide {dim=}")
        if n_heads % n_kv_heads:
            raise ValueError(f"{n_kv_heads=} does not divide {n_heads=}")
        self.head_dim = dim // n_heads
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend from each of T new tokens to all S tokens so far that it may see.

        Args:
            x: (B, T, C).
            cos, sin: rotary tables for the positions of the new tokens,
                (T, D/2) or (B, T, D/2).
            mask: (B or 1, 1, T, S), True where a token may look; causal if left out.
            cache: what came before, S - T tokens; the new ones are added to it.

        Returns:
            (B, T, C).

        Raises:
            ValueError: if the new tokens do not fit into the cache.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        q = apply_rope(self.wq(x).view(heads), cos, sin).transpose(1, 2)  # (B, H, T, D)
        k = apply_rope(self.wk(x).view(heads), cos, sin).transpose(1, 2)  # (B, K, T, D)
        v = self.wv(x).view(heads).transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D)
        out = attend(q, k, v, mask)  # (B, H, T, D)
        return self.wo(out.transpose(1, 2).flatten(2))
