"""Heads that share keys, and ways to attend: `python benchmarks/attention_ablation.py`.

Chapter 06 shows the results beside Table 18 and Figure 24 of the paper: the loss of
multi-head, grouped-query and multi-query attention, the speed of decoding with their
caches, and the two ways to compute attention on a CPU.
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama2_lite.attention import attend_written_out, causal_mask
from llama2_lite.corpus import TokenDataset, write_shards
from llama2_lite.layers import feed_forward_size
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import (
    configure_optimizer,
    learning_rate,
    vocabulary_loss,
)
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.runtime.training import keep_memory
from llama2_lite.tokenizer import train_tokenizer
from llama2_lite.town import build_town

CONFIG: dict[str, Any] = {
    # key-value heads, and how much wider the feed-forward layer is made: by as much as
    # in the paper, or by as much as gives equally many parameters
    "variants": {
        "MHA": (8, 1.0),
        "MQA x1.33": (1, 1.33),
        "GQA x1.3": (2, 1.3),
        "MQA equal": (1, None),
        "GQA equal": (2, None),
    },
    "model": {"dim": 128, "n_layers": 4, "n_heads": 8, "vocab_size": 512},
    "documents": 60_000,
    "held_out_documents": 1500,
    "sequence_length": 128,
    "batch_size": 16,
    "steps": 600,
    "warmup": 40,
    "peak_lr": 4e-3,
    "decoding": {"dim": 256, "n_layers": 4, "n_heads": 8, "vocab_size": 512},
    "decoding_hidden_dim": 704,
    "contexts": [256, 2048],
    "batch_sizes": [1, 4, 16, 64],
    "new_tokens": 8,
    "row_lengths": [32, 64, 128, 256, 512, 1024],
}
SEEDS = [0, 1, 2]
OUTPUT = Path(__file__).parents[1] / "book" / "results" / "attention_ablation.json"


def hidden_dim(dim: int, n_heads: int, n_kv_heads: int, factor: float | None) -> int:
    """Width of the feed-forward layer: that of multi-head attention times a factor.

    Without a factor, so wide that a block has as many weights as with multi-head
    attention.
    """
    plain = feed_forward_size(dim, multiple_of=32)
    if factor is not None:
        return round(factor * plain)
    saved = 2 * dim * (n_heads - n_kv_heads) * (dim // n_heads)
    return plain + round(saved / (3 * dim))


def build(n_kv_heads: int, factor: float | None, seed: int) -> Llama:
    """A model of the ablation, with random weights."""
    shape = CONFIG["model"]
    torch.manual_seed(seed)
    width = hidden_dim(shape["dim"], shape["n_heads"], n_kv_heads, factor)
    return Llama(
        LlamaConfig(
            **shape,
            n_kv_heads=n_kv_heads,
            hidden_dim=width,
            max_seq_len=CONFIG["sequence_length"],
        )
    )


def prepare(folder: Path) -> None:
    """Write the town's documents as shards, and others to measure the loss on."""
    town = build_town()
    texts = [document.text for document in town.documents(CONFIG["documents"])]
    path = folder / "tokenizer.model"
    tokenizer = train_tokenizer(texts[:10_000], path, CONFIG["model"]["vocab_size"])
    write_shards(texts, tokenizer, folder / "train")
    others = town.documents(CONFIG["held_out_documents"], seed=1000)
    write_shards((d.text for d in others), tokenizer, folder / "held_out")


def loss_of(model: Llama, windows: Tensor) -> Tensor:
    hidden = model(windows[:, :-1], return_hidden=True)
    return vocabulary_loss(hidden, model.output.weight, windows[:, 1:])


def train(folder: Path, model: Llama, seed: int) -> float:
    """Train as chapter 09 does, in bf16; returns the loss on held-out text."""
    length, n_steps = CONFIG["sequence_length"], CONFIG["steps"]
    data = TokenDataset(folder / "train", length, seed=seed)
    optimizer = configure_optimizer(model, CONFIG["peak_lr"])
    for step in range(n_steps):
        lr = learning_rate(
            step, n_steps, peak=CONFIG["peak_lr"], warmup=CONFIG["warmup"]
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, data.batch(step, CONFIG["batch_size"]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    held_out = TokenDataset(folder / "held_out", length).batch(0, 256)
    with torch.no_grad():
        return float(loss_of(model, held_out))


def ablation() -> dict[str, Any]:
    """Losses of every variant and seed; a seed gives all variants the same text."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for variant, (n_kv_heads, factor) in CONFIG["variants"].items():
            losses = []
            for seed in SEEDS:
                model = build(n_kv_heads, factor, seed)
                losses.append(train(Path(name), model, seed))
                print(variant, seed, losses[-1], file=sys.stderr, flush=True)
            n_parameters = sum(p.numel() for p in model.parameters())
            results[variant] = {"losses": losses, "parameters": n_parameters}
    return results


def median_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median time of a call, after one that does not count."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def decoding_speed(n_kv_heads: int, context: int, batch_size: int) -> dict[str, float]:
    """Tokens per second with a context in the cache, and the bytes of that cache."""
    n_new = CONFIG["new_tokens"]
    config = LlamaConfig(
        **CONFIG["decoding"],
        n_kv_heads=n_kv_heads,
        hidden_dim=CONFIG["decoding_hidden_dim"],
        max_seq_len=context + n_new,
    )
    model = Llama(config).eval()
    caches = model.new_cache(batch_size, context + n_new)
    token = torch.zeros(batch_size, 1, dtype=torch.int64)

    def decode() -> None:
        for cache in caches:
            cache.length = context
        for _ in range(n_new):
            model(token, cache=caches)

    seconds = median_seconds(decode, repeats=3)
    n_bytes = sum(x.nbytes for cache in caches for x in (cache.keys, cache.values))
    return {"tokens_per_second": n_new * batch_size / seconds, "bytes": n_bytes}


def decoding() -> list[dict[str, Any]]:
    """Decoding speed by key-value heads, context and batch size."""
    return [
        {
            "n_kv_heads": n_kv_heads,
            "context": context,
            "batch_size": batch_size,
            **decoding_speed(n_kv_heads, context, batch_size),
        }
        for context in CONFIG["contexts"]
        for batch_size in CONFIG["batch_sizes"]
        for n_kv_heads in (8, 2, 1)
    ]


def built_in(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


def paths() -> list[dict[str, Any]]:
    """Seconds, forward and backward, of 4,096 tokens in rows of several lengths.

    With a mask, each row holds two texts that do not see each other.
    """
    results = []
    for dtype, masked, length in itertools.product(
        (torch.bfloat16, torch.float32), (False, True), CONFIG["row_lengths"]
    ):
        shape = (4096 // length, length, 8, 32)
        q, k, v = (
            torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_()
            for _ in range(3)
        )
        mask = None
        if masked:
            text = torch.arange(length) < torch.randint(1, length, (len(q), 1))
            same = text[:, :, None] == text[:, None]
            mask = (same & causal_mask(length, length))[:, None]  # (B, 1, T, T)
        record: dict[str, Any] = {"dtype": str(dtype)[6:], "length": length}
        record["masked"] = masked
        for attend in (built_in, attend_written_out):

            def run(attend: Any = attend, inputs: Any = (q, k, v, mask)) -> None:
                out = attend(*inputs)
                out.backward(torch.ones_like(out))

            record[attend.__name__] = median_seconds(run)
        print(record, file=sys.stderr, flush=True)
        results.append(record)
    return results


def main() -> None:
    keep_memory()
    results = {"paths": paths(), "decoding": decoding(), "ablation": ablation()}
    write_result(
        OUTPUT,
        config=CONFIG,
        seeds=SEEDS,
        modules=[
            *("town", "tokenizer", "corpus", "layers", "attention", "model"),
            "pretraining",
        ],
        script=__file__,
        results={"threads": torch.get_num_threads(), **results},
    )


if __name__ == "__main__":
    main()
