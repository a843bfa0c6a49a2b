"""A short against a long window: `python benchmarks/context_length.py`.

Three models see equally many tokens of the town, half of them ledgers, in which what is
brought in the morning is taken home in the evening, hundreds of tokens later. One is
trained on windows of 128 tokens, one on windows of 1,024, and one on short windows
first and long ones at the end. Chapter 09 shows the results.
"""

import logging
import re
import sys
import tempfile
import warnings
from pathlib import Path
from random import Random

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
from llama2_lite.tokenizer import Tokenizer, train_tokenizer
from llama2_lite.town import Town, build_town

CONFIG = {
    "model": {"dim": 64, "n_layers": 3, "n_heads": 2, "hidden_dim": 176},
    "vocab_size": 1024,
    "characters": 8_000_000,
    "steps": 1200,
    "peak_lr": 8e-3,
    "warmup": 60,
    "windows": {
        "128": [(1.0, 128, 32)],
        "1,024": [(1.0, 1024, 4)],
        "mixed": [(0.75, 128, 32), (0.25, 1024, 4)],
    },
    "test_ledgers": 40,
}
SEEDS = [0, 1, 2]
OUTPUT = Path(__file__).parents[1] / "book" / "results" / "context_length.json"


def half_ledgers(town: Town, n_characters: int, seed: int) -> list[str]:
    """Documents of which ledgers are half, in characters, and the rest as usual."""
    kinds = {"ledger": ["ledger"], "other": None}
    documents: list[str] = []
    for kind in kinds.values():
        length = 0
        for document in town.documents(10**9, seed, kind):
            documents.append(document.text)
            length += len(document.text)
            if length >= n_characters / 2:
                break
    Random(seed).shuffle(documents)
    return documents


def evening_lines(ledger: str) -> list[tuple[str, str]]:
    """What comes before each thing taken home, and the thing, without its period.

    The period is left out because it may share a token with the line end after it.
    """
    evening = ledger.index("In the evening")
    matches = re.finditer(r"(\w+ takes home)( .*)\.", ledger[evening:])
    return [(ledger[: evening + m.end(1)], m[2]) for m in matches]


@torch.no_grad()
def recall(
    model: Llama, tokenizer: Tokenizer, ledgers: list[str], window: int
) -> dict[str, float]:
    """Things named right, and the loss on their tokens, seeing ``window`` tokens.

    Greedy decoding gives the answer exactly if each of its tokens is the most likely
    one after those before it, so one pass over prompt and answer decides.
    """
    right, losses, n_lines = 0, [], 0
    for ledger in ledgers:
        for before, answer in evening_lines(ledger):
            start = len(tokenizer.encode(before, bos=True))
            ids = torch.tensor(tokenizer.encode(before + answer, bos=True))
            first = max(0, len(ids) - 1 - window)
            logits = model(ids[None, first:-1])[0, start - 1 - first :].float()
            answer_ids = ids[start:]
            right += bool((logits.argmax(-1) == answer_ids).all())
            losses.append(torch.nn.functional.cross_entropy(logits, answer_ids))
            n_lines += 1
    return {"right": right / n_lines, "loss": float(torch.stack(losses).mean())}


@torch.no_grad()
def usual_loss(
    model: Llama, tokenizer: Tokenizer, documents: list[str], window: int
) -> float:
    """Mean loss per token of documents on their own, at most ``window`` tokens."""
    total, n_tokens = 0.0, 0
    for document in documents:
        ids = torch.tensor(tokenizer.encode(document, bos=True, eos=True))[: window + 1]
        logits = model(ids[None, :-1])[0].float()
        total += float(
            torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
        )
        n_tokens += len(ids) - 1
    return total / n_tokens


def train(folder: Path, lengths: list[tuple[float, int, int]], seed: int) -> Llama:
    """One model."""
    config = LlamaConfig(
        n_kv_heads=CONFIG["model"]["n_heads"],
        vocab_size=CONFIG["vocab_size"],
        max_seq_len=1024,
        **CONFIG["model"],
    )
    module = PretrainingModule(
        config, peak_lr=CONFIG["peak_lr"], warmup=CONFIG["warmup"], seed=seed
    )
    data = TokenDataModule(folder / "train", folder / "train", lengths, seed=seed)
    trainer = Trainer(
        max_epochs=-1,
        max_steps=CONFIG["steps"],
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


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    town = build_town()
    results = {name: [] for name in CONFIG["windows"]}
    ledgers = [
        document.text
        for document in town.documents(CONFIG["test_ledgers"], 1000, ["ledger"])
    ]
    others = [
        document.text
        for document in town.documents(400, 1000)
        if document.kind != "ledger"
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = half_ledgers(town, CONFIG["characters"], seed=0)
        tokenizer = train_tokenizer(
            documents[:5000], folder / "tokenizer.model", CONFIG["vocab_size"]
        )
        write_shards(documents, tokenizer, folder / "train")
        for seed in SEEDS:
            for name, lengths in CONFIG["windows"].items():
                model = train(folder, lengths, seed)
                window = max(length for _, length, _ in lengths)
                figures = {
                    "ledgers": recall(model, tokenizer, ledgers, window),
                    "other_loss": usual_loss(model, tokenizer, others, window),
                }
                print(seed, name, figures, file=sys.stderr, flush=True)
                results[name].append(figures)
    modules = ["town", "tokenizer", "corpus", "layers", "attention", "model"]
    write_result(
        OUTPUT,
        config=CONFIG,
        seeds=SEEDS,
        modules=[*modules, "pretraining"],
        script=__file__,
        results=results,
    )


if __name__ == "__main__":
    main()
