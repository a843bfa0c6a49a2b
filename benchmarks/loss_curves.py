"""Loss and recall by model size: `python benchmarks/loss_curves.py`.

Three sizes of Llama are pretrained on equally many tokens of the town. Chapter 09 shows
the curves beside Figure 5 of the paper.
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch import Callback

from llama2_lite.corpus import write_shards
from llama2_lite.model import LlamaConfig
from llama2_lite.pretraining import (
    PretrainingModule,
    TokenDataModule,
    best_precision,
)
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.runtime.report import share_right
from llama2_lite.tokenizer import Tokenizer, train_tokenizer
from llama2_lite.town import Town, build_town

CONFIG = {
    "sizes": {
        "0.1M": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 96},
        "0.3M": {"dim": 64, "n_layers": 3, "n_heads": 2, "hidden_dim": 176},
        "1.1M": {"dim": 128, "n_layers": 4, "n_heads": 4, "hidden_dim": 352},
    },
    "peak_lr": {"0.1M": 1.6e-2, "0.3M": 1e-2, "1.1M": 6e-3},
    "vocab_size": 1024,
    "people": 16,  # half as many as usual, so that minutes suffice for their facts
    "documents": 60_000,
    "validation_documents": 1000,
    "steps": 1000,
    "warmup": 50,
    "lengths": [(1.0, 128, 16)],
    "validate_every": 100,
}
SEEDS = [0, 1, 2]
OUTPUT = Path(__file__).parents[1] / "book" / "results" / "loss_curves.json"


def prepare(folder: Path, town: Town) -> tuple[Tokenizer, float]:
    """Write shards; return the tokenizer and the estimate in bits per character."""
    texts = [document.text for document in town.documents(CONFIG["documents"])]
    tokenizer = train_tokenizer(
        texts[:10_000], folder / "tokenizer.model", CONFIG["vocab_size"]
    )
    write_shards(texts, tokenizer, folder / "train")
    held_out = list(town.documents(CONFIG["validation_documents"], seed=1000))
    write_shards((d.text for d in held_out), tokenizer, folder / "validation")
    bits = sum(document.bits for document in held_out)
    return tokenizer, bits / sum(len(document.text) for document in held_out)


class Curve(Callback):
    """Notes loss and recall after each validation."""

    def __init__(self, tokenizer: Tokenizer, town: Town):
        self.tokenizer = tokenizer
        self.probes = {
            split: town.fact_probes(split) for split in ("trained", "unseen_wording")
        }
        self.points: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        point = {
            "step": trainer.global_step,
            "bits": float(trainer.callback_metrics["bits_per_character"]),
        }
        for split, probes in self.probes.items():
            point[split] = share_right(module.model, self.tokenizer, probes)
        self.points.append(point)


def train(folder: Path, size: str, seed: int, curve: Curve) -> None:
    """One model, watched by ``curve``."""
    shape = CONFIG["sizes"][size]
    config = LlamaConfig(
        n_kv_heads=shape["n_heads"],
        vocab_size=CONFIG["vocab_size"],
        max_seq_len=128,
        **shape,
    )
    module = PretrainingModule(
        config, peak_lr=CONFIG["peak_lr"][size], warmup=CONFIG["warmup"], seed=seed
    )
    data = TokenDataModule(
        folder / "train",
        folder / "validation",
        CONFIG["lengths"],
        validation_windows=256,
        seed=seed,
    )
    trainer = Trainer(
        max_epochs=-1,
        max_steps=CONFIG["steps"],
        precision=best_precision(),
        val_check_interval=CONFIG["validate_every"],
        callbacks=[curve],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    town = build_town(n_people=CONFIG["people"])
    results: dict[str, Any] = {size: [] for size in CONFIG["sizes"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer, estimate = prepare(folder, town)
        for size in CONFIG["sizes"]:
            for seed in SEEDS:
                curve = Curve(tokenizer, town)
                train(folder, size, seed, curve)
                print(size, seed, curve.points[-1], file=sys.stderr, flush=True)
                results[size].append(curve.points)
    modules = ["town", "tokenizer", "corpus", "layers", "attention", "model"]
    write_result(
        OUTPUT,
        config=CONFIG,
        seeds=SEEDS,
        modules=[*modules, "generation", "pretraining", "runtime.report"],
        script=__file__,
        results={"estimate": estimate, "curves": results},
    )


if __name__ == "__main__":
    main()
