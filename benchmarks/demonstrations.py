"""What fine-tuning on demonstrations depends on: `python benchmarks/demonstrations.py`.

The tour's base model is fine-tuned for equally many steps each time: on thousands of
demonstrations of which some are bad, with and without attention across the dialogues of
a window (chapter 11), and on fewer and fewer that are all good (chapter 12).
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer

from llama2_lite.chat import DialogBatch, answer, collate, encode_dialog
from llama2_lite.model import Llama
from llama2_lite.pretraining import best_precision
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.runtime.judge import Evaluation
from llama2_lite.runtime.tour import base_model
from llama2_lite.runtime.training import TRAINER_DEFAULTS, precision, prepare_process
from llama2_lite.sft import DialogDataModule, SupervisedModule, sample_demonstrations
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import build_town

NOISE = {"wrong": 0.22, "unsafe": 0.35}
CLEAN = {"wrong": 0.0, "unsafe": 0.0}
CONFIG: dict[str, Any] = {
    "arms": {
        "mixed": {"n": 4000, **NOISE},
        "mixed, attention across": {"n": 4000, **NOISE, "separate": False},
        "clean 4000": {"n": 4000, **CLEAN},
        "clean 1000": {"n": 1000, **CLEAN},
        "clean 250": {"n": 250, **CLEAN},
    },
    "steps": 88,
    "batch_size": 16,
    "sequence_length": 256,
    "peak_lr": 1e-3,
    "temperatures": [0.0, 1.0],
    "validation": 500,
}
SEEDS = [0, 1, 2]
OUTPUT = Path(__file__).parents[1] / "book" / "results" / "demonstrations.json"


class Study:
    """The tour's base model, and what its fine-tuned descendants are worth."""

    def __init__(self) -> None:
        self.base = base_model()
        self.tokenizer = Tokenizer(self.base / "tokenizer.model")
        self.town = build_town()
        self.evaluation = Evaluation(self.town)
        good = sample_demonstrations(
            self.town, CONFIG["validation"], seed=10**6, instructed=0, **CLEAN
        )
        # each dialogue in a window of its own, as a chat sees it
        self.alone: DialogBatch = collate(
            [[encode_dialog(dialog, self.tokenizer)] for dialog in good]
        )

    def run(
        self, seed: int, n: int, separate: bool = True, **shares: float
    ) -> dict[str, Any]:
        """Fine-tune and judge one model."""
        dialogs = sample_demonstrations(self.town, n, seed, instructed=0, **shares)
        examples = [encode_dialog(dialog, self.tokenizer) for dialog in dialogs]
        data = DialogDataModule(
            examples,
            examples[:1],
            CONFIG["sequence_length"],
            CONFIG["batch_size"],
            seed,
        )
        module = SupervisedModule(self.base, CONFIG["peak_lr"], separate=separate)
        trainer = Trainer(
            **TRAINER_DEFAULTS,
            max_steps=CONFIG["steps"],
            precision=best_precision(),
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            accelerator="cpu",
        )
        trainer.fit(module, datamodule=data)
        module.eval()
        with torch.no_grad(), precision():
            loss = float(module.loss(self.alone))
        epochs = CONFIG["steps"] * CONFIG["batch_size"] / len(data.dataset)
        judged = {
            str(temperature): self.judge(module.model, temperature)
            for temperature in CONFIG["temperatures"]
        }
        return {"validation_loss": loss, "epochs": epochs, "judged": judged}

    def judge(self, model: Llama, temperature: float) -> dict[str, Any]:
        """Shares of correct answers, by kind of request, and of violations."""
        tasks = self.evaluation.prompts.all()
        prompts = [task.dialog() for task in tasks]
        answers = answer(
            model, self.tokenizer, prompts, temperature=temperature, max_new_tokens=96
        )
        judged = self.evaluation.judge(answers)
        by_kind = defaultdict(list)
        for task, correct in zip(tasks, judged.correct, strict=True):
            by_kind[task.kind].append(correct)
        figures = self.evaluation.figures(judged)
        return {
            **{name: share.value for name, share in figures.items()},
            "by_kind": {
                kind: float(np.mean(hits))
                for kind, hits in by_kind.items()
                if kind != "unsafe"
            },
        }


def main() -> None:
    prepare_process()
    study = Study()
    base = Llama.from_pretrained(study.base)
    results: dict[str, Any] = {
        "base": {str(t): study.judge(base, t) for t in CONFIG["temperatures"]}
    }
    for name, arm in CONFIG["arms"].items():
        results[name] = []
        for seed in SEEDS:
            results[name].append(study.run(seed, **arm))
            print(name, seed, results[name][-1], file=sys.stderr, flush=True)
    modules = ["town", "tokenizer", "layers", "attention", "model", "generation"]
    write_result(
        OUTPUT,
        config=CONFIG,
        seeds=SEEDS,
        modules=[*modules, "pretraining", "chat", "sft", "runtime.judge"],
        script=__file__,
        results=results,
    )


if __name__ == "__main__":
    main()
