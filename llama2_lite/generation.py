"""Generation.

Exported from book/08_generation.md, which explains every part. Edit it there,
then `make export`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import mkldnn

from llama2_lite.attention import Attention, KVCache, attend, causal_mask
from llama2_lite.layers import FeedForward, RMSNorm, apply_rope
from llama2_lite.model import Llama
from llama2_lite.tokenizer import Tokenizer


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Set the logits of unlikely tokens to minus infinity, (B, V) to (B, V).

    A token is dropped if the tokens before it, in the order of their probability, have
    more than ``top_p`` together; the first one always stays. Source: Holtzman et al.,
    2020, with the comparison in Meta's llama/generation.py.
    """
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    dropped = torch.zeros_like(logits, dtype=torch.bool)
    dropped.scatter_(-1, order, before.clamp(max=1) > top_p)
    return logits.masked_fill(dropped, float("-inf"))


GOLDEN = 0x9E3779B97F4A7C15


def gumbel_noise(seed: int, rows: Tensor, step: int, vocab_size: int) -> Tensor:
    """Standard Gumbel noise that depends on seed, row, step and token alone, (B, V).

    A hash (the finaliser of SplitMix64; Steele et al., 2014) instead of a generator:
    the same noise in every batch and process and on every device.

    Args:
        rows: row numbers, (B,), int64.
    """
    key = _mix(_mix(rows + _signed(seed * GOLDEN)) + step)  # (B,)
    tokens = torch.arange(1, vocab_size + 1, device=rows.device) * _signed(GOLDEN)
    bits = _mix(key[:, None] + tokens) >> 24 & (2**40 - 1)  # (B, V)
    # from the top, 1 - u: float32 is fine near 0 and coarse near 1, where it hardly
    # matters
    from_top = ((bits.float() + 0.5) / 2**40).clamp(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-from_top))


def _signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """Make every bit of the result depend on every bit of an int64."""
    # torch shifts signed numbers, so that copies of the sign have to be masked away
    x = (x ^ (x >> 30 & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & (2**33 - 1))


def next_tokens(
    logits: Tensor, temperature: float, top_p: float, noise: Tensor | None
) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: (B, V).
        temperature: 0 takes the most likely token.
        top_p: see `keep_top_p`; 1 keeps every token.
        noise: from `gumbel_noise`, (B, V); None at temperature 0.

    Returns:
        Ids, (B,).
    """
    if noise is None:
        return logits.argmax(-1)
    # less their maximum, so that no temperature makes them infinite
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    return (logits + noise).argmax(-1)


def decode_step(
    model: Llama,
    tokens: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
    caches: list[KVCache],
) -> Tensor:
    """Logits after one more token for each row, from (B,) to (B, V)."""
    return model(tokens[:, None], positions, mask, caches)[:, -1]


@cache
def compiled_step() -> Any:
    """`decode_step`, compiled when it is first called, half a minute on a CPU.

    It is compiled once for one row and once for more, for any number of tokens.
    """
    return torch.compile(decode_step, dynamic=True)


class Decoder:
    """Prompts in a cache, and one more token for each of them at a time.

    Prompts are aligned at their ends; what stands in front of the shorter ones is
    hidden, and positions count from a prompt's own first token.

    Args:
        model: its device and type are used.
        prompts: ids, of any lengths.
        n_new: how many tokens will follow at most.
        compiled: compile the step; worth it for many thousand steps.

    Raises:
        ValueError: if the model gives NaN.
    """

    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],
        n_new: int,
        compiled: bool = False,
    ):
        device = model.norm.weight.device
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[0] * n + list(p) for n, p in zip(padding, prompts, strict=True)]
        tokens = torch.tensor(rows, device=device)  # (B, T)
        self.model, self.compiled, self.padded = model, compiled, any(padding)
        self.pads = torch.tensor(padding, device=device)[:, None]  # (B, 1)
        room = longest + n_new
        self.caches = model.new_cache(len(prompts), room)
        positions = mask = None
        slots = torch.arange(room, device=device)
        self.real = slots >= self.pads  # (B, room)
        if self.padded:
            positions = (slots[:longest] - self.pads).clamp(min=0)  # (B, T)
            # padding sees itself: a softmax over nothing would be NaN
            itself = torch.eye(longest, dtype=torch.bool, device=device)
            mask = causal_mask(longest, longest, device) & self.real[:, None, :longest]
            mask = (mask | itself)[:, None]  # (B, 1, T, T)
        hidden = model(tokens, positions, mask, self.caches, return_hidden=True)
        self.logits = model.output(hidden[:, -1])  # (B, V)
        if self.logits.isnan().any():
            raise ValueError(
                "the model gives NaN instead of numbers, so its weights are broken; "
                "take an earlier checkpoint or train it again"
            )

    def step(self, tokens: Tensor) -> None:
        """Feed one token for each row, (B,); ``logits`` are then those after it."""
        positions = mask = None
        if self.padded:
            length = self.caches[0].length
            last = self.model.config.max_seq_len - 1
            positions = (length - self.pads).clamp(max=last)  # (B, 1)
            mask = self.real[:, None, None, : length + 1]
        step = compiled_step() if self.compiled else decode_step
        self.logits = step(self.model, tokens, positions, mask, self.caches)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows only: a mask, (B,)."""
        for layer in self.caches:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.logits, self.pads = self.logits[rows], self.pads[rows]
        self.real = self.real[rows]


@dataclass
class Generation:
    """What `generate` returns, one entry for each prompt.

    Attributes:
        ids: new tokens only, with the stop id if there was one.
        logprobs: of these tokens, under the model as it is (temperature 1, all tokens).
        finished: whether the row ended with a stop id.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]
    finished: list[bool]


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Iterable[int] = (),
    seed: int = 0,
    rows: Sequence[int] | None = None,
    compiled: bool = False,
) -> Generation:
    """Continue prompts, of any lengths, in one batch.

    A row ends at a stop id, after ``max_new_tokens``, or where the context is full.

    Args:
        prompts: token ids, at least one for each prompt.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: see `keep_top_p`; 1 keeps every token.
        stop_ids: any of these ends a row.
        seed: of the noise; the same seed gives the same tokens.
        rows: a number for each prompt, which decides its noise together with the
            seed: it gets the same tokens in any batch; 0, 1, 2, ... if left out.
        compiled: compile the step of one token; worth it for many thousand steps.

    Raises:
        ValueError: if a prompt is empty or does not fit into the context, or if a
            setting makes no sense.
    """
    rows = range(len(prompts)) if rows is None else rows
    limits = _limits(model, prompts, max_new_tokens, temperature, top_p)
    if len(rows) != len(prompts):
        raise ValueError(f"{len(rows)} row numbers do not fit {len(prompts)} prompts")
    if not prompts:
        return Generation([], [], [])
    n_steps, stop_ids = max(limits), set(stop_ids)
    decoder = Decoder(model, prompts, n_steps, compiled)
    device = decoder.logits.device
    alive = torch.arange(len(prompts), device=device)
    numbers, ends = torch.tensor([list(rows), limits], device=device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    done = torch.zeros_like(alive, dtype=torch.bool)
    history = []

    for step in range(n_steps):
        tokens, scores = _choose(
            decoder.logits, temperature, top_p, seed, numbers, step
        )
        history.append((alive, tokens, scores))
        if stop_ids or min(limits) < n_steps:
            done |= torch.isin(tokens, stops) | (ends == step + 1)
            n_done = int(done.sum())
            if n_done == len(alive):
                break
            if 4 * n_done >= len(alive) and not compiled:
                kept = ~done
                decoder.keep(kept)
                alive, numbers, ends = alive[kept], numbers[kept], ends[kept]
                tokens, done = tokens[kept], done[kept]
        if step + 1 < n_steps:
            decoder.step(tokens)
    return _collect(history, limits, stop_ids)


def _choose(
    logits: Tensor, temperature: float, top_p: float, seed: int, rows: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """Next tokens and their log-probabilities, both (B,)."""
    logits, noise = logits.float(), None
    if temperature > 0:
        noise = gumbel_noise(seed, rows, step, logits.shape[1])
    tokens = next_tokens(logits, temperature, top_p, noise)
    return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def _collect(
    history: list[tuple[Tensor, Tensor, Tensor]], limits: list[int], stop_ids: set[int]
) -> Generation:
    """Sort what the steps brought by rows, each up to its own end."""
    n_rows = len(limits)
    result = Generation(
        [[] for _ in range(n_rows)], [[] for _ in range(n_rows)], [False] * n_rows
    )
    for alive, tokens, scores in history:
        columns = alive.tolist(), tokens.tolist(), scores.tolist()
        for row, token, score in zip(*columns, strict=True):
            if result.finished[row] or len(result.ids[row]) == limits[row]:
                continue  # it ended, but has not left the batch yet
            result.ids[row].append(token)
            result.logprobs[row].append(score)
            result.finished[row] = token in stop_ids
    return result


def _limits(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> list[int]:
    """How many tokens each row may get; refuses what makes no sense."""
    context, vocab_size = model.config.max_seq_len, model.config.vocab_size
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, but is {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more, but is {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, but is {top_p}")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; it needs at least one token")
        if len(prompt) >= context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, which leaves no room in "
                f"the context of {context}; shorten it"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"prompt {number} has an id outside the vocabulary of {vocab_size}"
            )
    return [min(max_new_tokens, context - len(prompt)) for prompt in prompts]


def stream(
    model: Llama,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Iterable[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """Continue one prompt, token by token, as `generate` does for row 0.

    The stop id, if there is one, comes last. Arguments and errors are those of
    `generate`.
    """
    (limit,) = _limits(model, [prompt], max_new_tokens, temperature, top_p)
    stop_ids = set(stop_ids)
    with torch.inference_mode():
        decoder = Decoder(model, [prompt], limit)
        row = torch.zeros(1, dtype=torch.long, device=decoder.logits.device)
        token = row
    for step in range(limit):
        # not around the yield: what the caller does meanwhile is not inference
        with torch.inference_mode():
            if step > 0:
                decoder.step(token)
            token, _ = _choose(decoder.logits, temperature, top_p, seed, row, step)
        yield int(token)
        if int(token) in stop_ids:
            return


def stream_text(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]
) -> Iterator[str]:
    """Text of tokens as they come, in pieces of whole characters.

    The pieces together are what the tokens add to the decoded prompt.
    """
    ids = list(prompt)
    start, shown = 0, len(ids)  # ids[start:shown] is text that stands already
    for token in tokens:
        ids.append(token)
        before, now = tokenizer.decode(ids[start:shown]), tokenizer.decode(ids[start:])
        if now != before and not now.endswith("\ufffd"):  # a character is incomplete
            yield now[len(before) :]
            start, shown = shown, len(ids)
    before, now = tokenizer.decode(ids[start:shown]), tokenizer.decode(ids[start:])
    if now != before:
        yield now[len(before) :]


class DecodingLinear(nn.Linear):
    """Several linear layers of one input, joined; without gradients."""

    def __init__(self, *layers: nn.Linear):
        nn.Module.__init__(self)
        weights = torch.cat([layer.weight.detach() for layer in layers])
        self.out_features, self.in_features = weights.shape
        self.weight = nn.Parameter(weights, requires_grad=False)
        self.register_parameter("bias", None)
        self.packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """From (..., C) to the outputs of all layers, side by side."""
        if torch.compiler.is_compiling():
            if x.numel() == x.shape[-1]:
                # compiled, the sum reads the matrix faster than a product does
                return (x.flatten() * self.weight).sum(-1).view(*x.shape[:-1], -1)
        elif x.is_cpu and x.dtype == torch.float32 and mkldnn.is_available():
            if self.packed is None:
                self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            return torch.ops.mkldnn._linear_pointwise(
                x, self.packed, None, "none", [], ""
            )
        return super().forward(x)


class DecodingAttention(nn.Module):
    """An `Attention` with one matrix for queries, keys and values."""

    def __init__(self, layer: Attention):
        super().__init__()
        self.head_dim = layer.head_dim
        sizes = [w.out_features // layer.head_dim for w in (layer.wq, layer.wk)]
        self.n_heads, self.n_kv_heads = sizes
        self.wqkv = DecodingLinear(layer.wq, layer.wk, layer.wv)
        self.wo = DecodingLinear(layer.wo)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache
    ) -> Tensor:
        """See `Attention`."""
        heads = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2K, D)
        turned, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], 2)
        turned = apply_rope(turned, cos, sin).transpose(1, 2)  # (B, H + K, T, D)
        q, k = turned.split([self.n_heads, self.n_kv_heads], 1)
        out = attend(q, *cache.append(k, v.transpose(1, 2)), mask)
        return self.wo(out.transpose(1, 2).flatten(2))


class DecodingFeedForward(nn.Module):
    """A `FeedForward` with one matrix for gate and signal."""

    def __init__(self, layer: FeedForward):
        super().__init__()
        self.w13 = DecodingLinear(layer.w1, layer.w3)
        self.w2 = DecodingLinear(layer.w2)

    def forward(self, x: Tensor) -> Tensor:
        """See `FeedForward`."""
        gate, signal = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * signal)


def decoding_norm(layer: RMSNorm) -> nn.RMSNorm:
    """PyTorch's own norm, which starts fewer operations, with a layer's weights."""
    norm = nn.RMSNorm(layer.weight.shape[0], eps=layer.eps, device="meta")
    norm.weight = layer.weight
    return norm


def for_decoding(model: Llama) -> Llama:
    """A copy of a model that decodes faster; it cannot be trained or saved.

    Embedding and norms are those of the model; later changes of its other weights do
    not reach the copy.
    """
    with torch.device("meta"):
        copy: Any = Llama(model.config)
    copy.tok_embeddings, copy.norm = model.tok_embeddings, decoding_norm(model.norm)
    copy.output = DecodingLinear(model.output)
    copy.cos, copy.sin = model.cos, model.sin
    layers: Any = model.layers
    for block, source in zip(copy.layers, layers, strict=True):
        block.attention = DecodingAttention(source.attention)
        block.feed_forward = DecodingFeedForward(source.feed_forward)
        block.attention_norm = decoding_norm(source.attention_norm)
        block.ffn_norm = decoding_norm(source.ffn_norm)
    return copy.eval()
