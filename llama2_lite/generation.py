"""Generation.

Exported from book/08_generation.md, which explains every part. Edit it there,
then `make export`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama2_lite.attention import causal_mask
from llama2_lite.model import Llama
from llama2_lite.tokenizer import Tokenizer


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Set the logits of unlikely tokens to minus infinity, (B, V) to (B, V).

    A token is dropped if the tokens more likely than it have more than ``top_p`` of
    the probability together, so that the most likely one always stays. Source:
    Holtzman et al., 2020, with the comparison of Meta's llama/generation.py.
    """
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    dropped = torch.zeros_like(logits, dtype=torch.bool)
    dropped.scatter_(-1, order, before > top_p)
    return logits.masked_fill(dropped, float("-inf"))


def gumbel_noise(seed: int, rows: Tensor, step: int, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, (B, V), that depends on seed, row, step and token alone.

    The same numbers on every device, in every batch and in every process: no
    generator has a state, each number is a hash of where it stands (the finaliser of
    SplitMix64; Steele et al., 2014).

    Args:
        rows: row numbers, (B,), int64.
    """
    key = _mix(_mix(rows + _signed(seed * GOLDEN)) + step)  # (B,)
    tokens = torch.arange(1, vocab_size + 1, device=rows.device) * GOLDEN
    bits = _mix(key[:, None] + tokens) >> 40 & 0xFFFFFF  # (B, V), 24 of them
    uniform = (bits.float() + 0.5) / 2**24
    return -torch.log(-torch.log(uniform))


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


GOLDEN = _signed(0x9E3779B97F4A7C15)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def next_tokens(
    logits: Tensor,
    temperature: float,
    top_p: float,
    noise: Tensor | None = None,
) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: (B, V).
        temperature: 0 takes the most likely token.
        top_p: the nucleus; 1 keeps every token.
        noise: from `gumbel_noise`, (B, V); not needed at temperature 0.

    Returns:
        Ids, (B,).
    """
    if temperature == 0 or noise is None:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    return (logits + noise).argmax(-1)


class Decoder:
    """Prompts in a cache, and one more token for each of them at a time.

    Prompts are aligned at their ends: shorter ones are padded in front, where nobody
    looks, and count their positions from their own first token.

    Args:
        model: its own device decides.
        prompts: of any lengths.
        n_new: how many tokens will follow at most.
    """

    def __init__(self, model: Llama, prompts: Sequence[Sequence[int]], n_new: int):
        self.model = model
        device = model.norm.weight.device
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        tokens = torch.tensor(
            [
                [0] * pad + list(prompt)
                for pad, prompt in zip(pads, prompts, strict=True)
            ]
        )  # (B, T)
        self.cache = model.new_cache(len(prompts), longest + n_new)
        self.pads = torch.tensor(pads)[:, None].to(device) if any(pads) else None
        positions = mask = None
        if self.pads is not None:
            slots = torch.arange(longest + n_new, device=device)
            self.visible = slots >= self.pads  # (B, room)
            positions = (slots[:longest] - self.pads).clamp(min=0)  # (B, T)
            mask = (
                causal_mask(longest, longest, device)
                & self.visible[:, None, None, :longest]
            )
            # a padding token sees itself: a row without any key would be NaN
            mask = mask | torch.eye(longest, dtype=torch.bool, device=device)
        hidden = model(
            tokens.to(device), positions, mask, self.cache, return_hidden=True
        )
        self.logits = model.output(hidden[:, -1])  # (B, V)

    def step(self, tokens: Tensor) -> None:
        """Feed one token for each row, (B,); ``logits`` are then those after it."""
        positions = mask = None
        if self.pads is not None:
            length = self.cache[0].length
            last = self.model.config.max_seq_len - 1
            positions = (length - self.pads).clamp(max=last)  # (B, 1)
            mask = self.visible[:, None, None, : length + 1]
        self.logits = self.model(tokens[:, None], positions, mask, self.cache)[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows only."""
        for cache in self.cache:
            cache.keys, cache.values = cache.keys[rows], cache.values[rows]
        self.logits = self.logits[rows]
        if self.pads is not None:
            self.pads, self.visible = self.pads[rows], self.visible[rows]


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
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    rows: Sequence[int] | None = None,
) -> Generation:
    """Continue prompts, of any lengths, in one batch.

    A row ends at a stop id, after ``max_new_tokens``, or where the context is full.

    Args:
        model: its device and its type are used.
        prompts: token ids, at least one for each prompt.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: only the most likely tokens with this much probability are drawn from.
        stop_ids: any of these ends a row.
        seed: of the noise; the same seed gives the same tokens.
        rows: a number for each prompt, which decides its noise together with the
            seed: a prompt gets the same tokens in any batch. 0, 1, 2, ... if left out.

    Raises:
        ValueError: if a prompt is empty or does not fit into the context, or if a
            setting makes no sense.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p, rows)
    if not prompts:
        return Generation([], [], [])
    context = model.config.max_seq_len
    limits = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    decoder = Decoder(model, prompts, max(limits))
    device = decoder.logits.device
    row_ids = torch.tensor(list(rows or range(len(prompts))), device=device)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    ends = torch.tensor(limits, device=device)
    alive = torch.arange(len(prompts), device=device)
    ids = torch.zeros(len(prompts), max(limits), dtype=torch.long, device=device)
    logprobs = torch.zeros(len(prompts), max(limits), device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    may_end_early = len(stop_ids) > 0 or min(limits) < max(limits)

    for step in range(max(limits)):
        logits = decoder.logits.float()
        noise = None
        if temperature > 0:
            noise = gumbel_noise(seed, row_ids[alive], step, logits.shape[1])
        tokens = next_tokens(logits, temperature, top_p, noise)  # (B,)
        chosen = logits.gather(1, tokens[:, None]).squeeze(1)
        ids[alive, step] = tokens
        logprobs[alive, step] = chosen - logits.logsumexp(-1)
        if may_end_early:
            done |= torch.isin(tokens, stops) | (ends[alive] == step + 1)
            n_done = int(done.sum())
            if n_done == len(alive):
                break
            if 4 * n_done >= len(alive):  # not at every row: it copies the cache
                kept = ~done
                decoder.keep(kept)
                alive, tokens, done = alive[kept], tokens[kept], done[kept]
        if step + 1 < max(limits):
            decoder.step(tokens)
    return _collect(ids.tolist(), logprobs.tolist(), limits, set(stop_ids))


def _collect(
    ids: list[list[int]],
    logprobs: list[list[float]],
    limits: list[int],
    stop_ids: set[int],
) -> Generation:
    """Cut each row where it ended."""
    result = Generation([], [], [])
    for row, scores, limit in zip(ids, logprobs, limits, strict=True):
        stops = (i for i, token in enumerate(row[:limit]) if token in stop_ids)
        stop = next(stops, None)
        end = limit if stop is None else stop + 1
        result.ids.append(row[:end])
        result.logprobs.append(scores[:end])
        result.finished.append(stop is not None)
    return result


def _check(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    rows: Sequence[int] | None,
) -> None:
    context = model.config.max_seq_len
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: it needs at least one token")
        if len(prompt) >= context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens: with the context of "
                f"{context} there is no room for a new one"
            )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, but is {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more, but is {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be over 0 and at most 1, but is {top_p}")
    if rows is not None and len(rows) != len(prompts):
        raise ValueError(f"{len(rows)} row numbers do not fit {len(prompts)} prompts")


def stream(
    model: Llama,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
) -> Iterator[int]:
    """Continue one prompt, token by token; the tokens are those of `generate`.

    The stop id, if there is one, comes last. The arguments are those of `generate`.
    """
    _check(model, [prompt], max_new_tokens, temperature, top_p, None)
    n_new = min(max_new_tokens, model.config.max_seq_len - len(prompt))
    row = torch.zeros(1, dtype=torch.long, device=model.norm.weight.device)
    with torch.inference_mode():
        decoder = Decoder(model, [prompt], n_new)
    for step in range(n_new):
        # not around the yield: the caller's own code would run in this mode
        with torch.inference_mode():
            logits = decoder.logits.float()
            noise = None
            if temperature > 0:
                noise = gumbel_noise(seed, row, step, logits.shape[1])
            token = next_tokens(logits, temperature, top_p, noise)
        yield int(token)
        if int(token) in stop_ids:
            return
        if step + 1 < n_new:
            with torch.inference_mode():
                decoder.step(token)


def stream_text(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterator[int]
) -> Iterator[str]:
    """Text pieces of tokens as they come, each a number of whole characters.

    A character that the vocabulary lacks is spelt in bytes, up to four tokens, and
    comes out with the last of them. The pieces together are what decoding the prompt
    with all tokens adds to the prompt.
    """
    ids = list(prompt)
    shown = tokenizer.decode(ids)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(ids)
    if text != shown:
        yield text[len(shown) :]
