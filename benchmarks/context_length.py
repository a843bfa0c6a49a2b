"""A short against a long window: `python benchmarks/context_length.py`.

Three models see equally many tokens of the town: in windows of 32 tokens, in windows of
256, and mostly short with every fourth batch long. Each is then asked about documents
that fit into a short window and about the rest of those that do not. Chapter 09 shows
the results.
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from lightning import Trainer

from llama2_lite.corpus import write_shards
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import (
    PretrainingModule,
    TokenDataModule,
    best_precision,
)
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.runtime.report import share_right
from llama2_lite.tokenizer import train_tokenizer
from llama2_lite.town import build_town

SHORT, LONG = 32, 256
CONFIG = {
    "model": {"dim": 64, "n_layers": 3, "n_heads": 2, "hidden_dim": 176},
    "vocab_size": 1024,
    "people": 16,
    "documents": 120_000,
    "test_documents": 400,
    "steps": 2000,
    "peak_lr": 1e-2,
    "warmup": 100,
    "lengths": {
        "short": [(1.0, SHORT, 64)],
        "long": [(1.0, LONG, 8)],
        "mixed": [(0.75, SHORT, 64), (0.25, LONG, 8)],
    },
}
SEEDS = [0, 1, 2]
OUTPUT = Path(__file__).parents[1] / "book" / "results" / "context_length.json"


def train(folder: Path, lengths: list[tuple[float, int, int]], seed: int) -> Llama:
    """One model."""
    config = LlamaConfig(
        n_kv_heads=CONFIG["model"]["n_heads"],
        vocab_size=CONFIG["vocab_size"],
        max_seq_len=LONG,
        **CONFIG["model"],
    )
    module = PretrainingModule(
        config, peak_lr=CONFIG["peak_lr"], warmup=CONFIG["warmup"], seed=seed
    )
    data = TokenDataModule(folder / "train", folder / "train", lengths, seed=seed)
    trainer = Trainer(
        max_epochs=-1,
        max_steps=CONFIG["steps"],
        accelerator="cpu",
        precision=best_precision(),
        use_distributed_sampler=False,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module.model.eval()


@torch.no_grad()
def losses(model: Llama, document: list[int], window: int) -> torch.Tensor:
    """Loss of each token of a document but the first, seeing ``window`` before it."""
    ids = torch.tensor(document)
    logits = model(ids[None, : min(window, len(ids) - 1)])[0]
    if len(ids) - 1 > window:  # each later token gets a window of its own
        later = model(ids[1:-1].unfold(0, window, 1))[:, -1]
        logits = torch.cat([logits, later])
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")


def evaluate(model: Llama, documents: list[list[int]], window: int) -> dict[str, float]:
    """Mean loss on short documents, and on long ones beyond the short window.

    The latter also if the model may see no more than the short window.
    """
    short = [losses(model, ids, window) for ids in documents if len(ids) - 1 <= SHORT]
    long = [ids for ids in documents if len(ids) - 1 > SHORT]
    beyond = [losses(model, ids, window)[SHORT:] for ids in long]
    blinkered = [losses(model, ids, SHORT)[SHORT:] for ids in long]
    return {
        "short": float(torch.cat(short).mean()),
        "beyond": float(torch.cat(beyond).mean()),
        "blinkered": float(torch.cat(blinkered).mean()),
    }


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    town = build_town(n_people=CONFIG["people"])
    probes = town.fact_probes("trained")
    texts = [document.text for document in town.documents(CONFIG["documents"])]
    held_out = town.documents(CONFIG["test_documents"], seed=1000)
    results: dict[str, list[dict[str, float]]] = {
        name: [] for name in CONFIG["lengths"]
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_tokenizer(
            texts[:10_000], folder / "tokenizer.model", CONFIG["vocab_size"]
        )
        write_shards(texts, tokenizer, folder / "train")
        documents = [
            tokenizer.encode(document.text, bos=True, eos=True)[: LONG + 1]
            for document in held_out
        ]
        for seed in SEEDS:
            for kind, lengths in CONFIG["lengths"].items():
                model = train(folder, lengths, seed)
                window = max(length for _, length, _ in lengths)
                figures = evaluate(model, documents, window)
                figures["facts"] = share_right(model, tokenizer, probes)
                print(seed, kind, figures, file=sys.stderr, flush=True)
                results[kind].append(figures)
    modules = ["town", "tokenizer", "corpus", "layers", "attention", "model"]
    n_long = sum(len(ids) - 1 > SHORT for ids in documents)
    write_result(
        OUTPUT,
        config=CONFIG,
        seeds=SEEDS,
        modules=[*modules, "generation", "pretraining", "runtime.report"],
        script=__file__,
        results={"long_documents": n_long, "runs": results},
    )


if __name__ == "__main__":
    main()
