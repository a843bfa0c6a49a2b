"""Facts shown more often than they occur: `python benchmarks/upsampling.py`.

A small Llama reads equally many characters of the town each time, of which a growing
share comes from a fixed set of factual documents, repeated as often as needed. Chapter
04 shows what it then knows, and what the other text loses.
"""

import math
import sys
import tempfile
from pathlib import Path

import torch

from llama2_lite.corpus import TokenDataset, mix, write_shards
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import (
    best_precision,
    configure_optimizer,
    learning_rate,
    vocabulary_loss,
)
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.runtime.report import share_right
from llama2_lite.tokenizer import train_tokenizer
from llama2_lite.town import Town, build_town

CONFIG = {
    "people": 12,
    "preset": "town-small",
    "factual": ["biography", "question"],
    "factual_documents": 1000,
    "other_documents": 40_000,
    "shares": [0.05, 0.15, 0.45],
    "characters": 6_000_000,
    "steps": 500,
    "batch_size": 32,
    "sequence_length": 128,
    "peak_lr": 8e-3,
    "warmup": 30,
}
SEEDS = [0, 1, 2]
OUTPUT = Path(__file__).parents[1] / "book" / "results" / "upsampling.json"


def sources(town: Town, seed: int = 0, part: float = 1.0) -> dict[str, list[str]]:
    """Factual documents and the others."""
    factual = CONFIG["factual"]
    kinds = {document.kind for document in town.documents(1000)}
    numbers = (CONFIG["factual_documents"], CONFIG["other_documents"])
    return {
        name: [d.text for d in town.documents(round(number * part), seed, sorted(own))]
        for name, number, own in zip(
            ("factual", "other"), numbers, (factual, kinds - set(factual)), strict=True
        )
    }


def train(data: TokenDataset, seed: int) -> Llama:
    """One model."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig.preset(CONFIG["preset"]))
    optimizer = configure_optimizer(model, lr=CONFIG["peak_lr"])
    autocast = best_precision() == "bf16-mixed"
    for step in range(CONFIG["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, CONFIG["steps"], peak=CONFIG["peak_lr"], warmup=CONFIG["warmup"]
            )
        windows = data.batch(step, CONFIG["batch_size"])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model(windows[:, :-1], return_hidden=True)
            loss = vocabulary_loss(hidden, model.output.weight, windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def bits_per_character(model: Llama, data: TokenDataset) -> float:
    """Of the text behind a dataset."""
    losses = []
    for start in range(0, len(data), 32):
        rows = range(start, min(start + 32, len(data)))
        windows = torch.stack([data[i] for i in rows])
        hidden = model(windows[:, :-1], return_hidden=True)
        loss = vocabulary_loss(hidden, model.output.weight, windows[:, 1:])
        losses += [float(loss)] * len(rows)
    mean = sum(losses) / len(losses)
    return mean / math.log(2) * data.n_tokens / data.n_characters


def main() -> None:
    town = build_town(n_people=CONFIG["people"])
    training = sources(town)
    probes = town.fact_probes("trained")
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [text for documents in training.values() for text in documents[:5000]]
        tokenizer = train_tokenizer(texts, folder / "tokenizer.model", 1024)
        held_out = {}
        for source, documents in sources(town, seed=1000, part=0.05).items():
            write_shards(documents, tokenizer, folder / f"held-out-{source}")
            held_out[source] = TokenDataset(
                folder / f"held-out-{source}", CONFIG["sequence_length"]
            )
        for share in CONFIG["shares"]:
            shares = {"factual": share, "other": 1 - share}
            shards = folder / f"share-{share}"
            write_shards(mix(training, shares, CONFIG["characters"]), tokenizer, shards)
            results[str(share)] = []
            for seed in SEEDS:
                data = TokenDataset(shards, CONFIG["sequence_length"], seed=seed)
                model = train(data, seed)
                figures = {
                    "recall": share_right(model, tokenizer, probes),
                    **{
                        f"{source}_bits": bits_per_character(model, own)
                        for source, own in held_out.items()
                    },
                }
                print(share, seed, figures, file=sys.stderr, flush=True)
                results[str(share)].append(figures)
    modules = ["town", "tokenizer", "corpus", "layers", "attention", "model"]
    write_result(
        OUTPUT,
        config=CONFIG,
        seeds=SEEDS,
        modules=[*modules, "generation", "pretraining", "runtime.report"],
        script=__file__,
        results=results,
    )


if __name__ == "__main__":
    main()
