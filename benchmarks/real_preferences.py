"""Reward models on real pairs: `python benchmarks/real_preferences.py [FOLDER]`.

The folder holds `hh_harmless_1500.jsonl.gz` (transcripts of HH-RLHF) and
`instructions_with_preference_900.json`; it is ../shared/data beside the repository if
left out, and where that is not there, nothing is done. For each of five folds, the
commands `pretrain`, `sft` and `reward` make a small reward model from the other four
and nothing else. It ranks the pairs of the fold, and so do a logistic regression on
bags of words, which saw the same pairs, and the rule that the longer answer is better.
"""

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from llama2_lite.reward import RewardModel, score_pairs
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.runtime.cli import main as command
from llama2_lite.runtime.dialogs import answered, read_preferences
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import Preference, words_of

CONFIG = {
    "files": {
        "transcripts": ["hh_harmless_1500.jsonl.gz", "safety"],
        "instructions": ["instructions_with_preference_900.json", "helpfulness"],
    },
    "folds": 5,
    "longest_answer_and_prompt": 1600,  # characters
    "pretrain": [
        "--model.config={dim: 64, n_layers: 2, n_heads: 4, n_kv_heads: 4, "
        "hidden_dim: 176, max_seq_len: 1024}",
        "--model.peak_lr=4e-3",
        "--model.warmup=20",
        "--data.vocab_size=2048",
        "--data.lengths=[[1.0, 256, 16]]",
        "--trainer.max_steps=200",
        "--trainer.val_check_interval=100",
        "--prompts=[]",  # what transcripts of attacks teach to say is not shown
    ],
    "sft": ["--data.epochs=2", "--data.sequence_length=1024", "--data.batch_size=4"],
    "reward": ["--data.epochs=2", "--trainer.val_check_interval=10"],
    "strengths": [0.001, 0.01, 0.1, 1.0],  # of the regression's L2 penalty
}
SEED = 0
SOURCE = Path(__file__).resolve().parents[2] / "shared" / "data"
OUTPUT = Path(__file__).parent / "results" / "real_preferences.json"


def split_folds(pairs: list[Preference]) -> list[list[Preference]]:
    """Folds of about the same size that share no first message."""
    groups: dict[str, list[Preference]] = {}
    for pair in pairs:
        groups.setdefault(pair.prompt[0]["content"], []).append(pair)
    keys = sorted(groups)
    Random(SEED).shuffle(keys)
    folds: list[list[Preference]] = [[] for _ in range(CONFIG["folds"])]
    for key in keys:
        min(folds, key=len).extend(groups[key])
    return folds


def train_reward_model(pairs: list[Preference], axis: str, folder: Path) -> Path:
    """A reward model from pairs alone, by the commands; returns its folder."""
    texts = [
        "\n\n".join(message["content"] for message in answered(pair, answer))
        for pair in pairs
        for answer in (pair.chosen, pair.rejected)
    ]
    tags = {"text": "[INST] <<SYS>> <</SYS>> [/INST]"}
    records = [{"text": text} for text in texts] + [tags] * 50
    Random(SEED).shuffle(records)
    write_lines(folder / "texts.jsonl", records)
    fields = ("prompt", "chosen", "rejected")
    write_lines(
        folder / "pairs.jsonl",
        [{name: getattr(pair, name) for name in fields} for pair in pairs],
    )
    start = None
    for name in ("pretrain", "sft", "reward"):
        file = "texts.jsonl" if name == "pretrain" else "pairs.jsonl"
        arguments = [f"--data.files={folder / file}", f"--output={folder / name}"]
        arguments += [f"--seed={SEED}", *CONFIG[name]]
        if name != "pretrain":
            arguments = [f"--config={name}", f"--start={start}", *arguments]
        if name == "reward":
            arguments.append(f"--data.axis={axis}")
        assert command([name, *arguments]) == 0
        start = folder / name / "model"
    return start


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")


def word_differences(pairs: list[Preference], words: dict[str, int]) -> Tensor:
    """How much more often the chosen answer has each word, by log(1 + n), (N, W)."""
    rows = torch.zeros(len(pairs), len(words))
    for row, pair in zip(rows, pairs, strict=True):
        for answer, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            for word, n in Counter(words_of(answer)).items():
                if word in words:
                    row[words[word]] += sign * math.log1p(n)
    return rows


def fit_regression(differences: Tensor, strength: float) -> Tensor:
    """Weights of words that maximise the penalised likelihood of the choices."""
    weights = torch.zeros(differences.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = differences @ weights
        loss = -torch.nn.functional.logsigmoid(scores).mean()
        loss = loss + strength * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def rank_by_words(train: list[Preference], held_out: list[Preference]) -> list[bool]:
    """By a regression on words, its penalty chosen on a tenth of the training pairs."""
    counts = Counter(
        word for p in train for word in {*words_of(p.chosen), *words_of(p.rejected)}
    )
    common = [word for word, n in counts.items() if n > 1]
    words = {word: i for i, word in enumerate(common)}
    rows = word_differences(train, words)
    border = len(rows) // 10

    def accuracy(strength: float) -> float:
        weights = fit_regression(rows[border:], strength)
        return float((rows[:border] @ weights > 0).float().mean())

    weights = fit_regression(rows, max(CONFIG["strengths"], key=accuracy))
    return (word_differences(held_out, words) @ weights > 0).tolist()


def interval(right: int, total: int) -> tuple[float, float]:
    """95% interval of a share (Wilson, 1927)."""
    z, share = 1.96, right / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    half *= z / (1 + z**2 / total)
    return middle - half, middle + half


def fits(pair: Preference) -> bool:
    """Whether prompt and answers are short enough for the context."""
    before = sum(len(message["content"]) for message in pair.prompt)
    longest = max(len(pair.chosen), len(pair.rejected))
    return before + longest <= CONFIG["longest_answer_and_prompt"]


def study(source: Path, n_folds: int) -> None:
    results = {}
    for name, (file, axis) in CONFIG["files"].items():
        read = read_preferences([str(source / file)], axis=axis, skip_bad=True)
        pairs = [pair for pair in read.items if fits(pair)]
        folds = split_folds(pairs)
        found: dict[str, list[list[bool]]] = {"reward": [], "words": [], "longer": []}
        for number, held_out in enumerate(folds[:n_folds]):
            train = [p for fold in folds if fold is not held_out for p in fold]
            Random(SEED).shuffle(train)
            with tempfile.TemporaryDirectory() as folder:
                path = train_reward_model(train, axis, Path(folder))
                model = RewardModel.from_pretrained(path)
                tokenizer = Tokenizer(path / "tokenizer.model")
                chosen, rejected = score_pairs(model, tokenizer, held_out)
            found["reward"].append((chosen > rejected).tolist())
            found["words"].append(rank_by_words(train, held_out))
            longer = [len(pair.chosen) > len(pair.rejected) for pair in held_out]
            found["longer"].append(longer)
            shares = {k: round(sum(v[-1]) / len(v[-1]), 3) for k, v in found.items()}
            print(name, number, shares, file=sys.stderr, flush=True)
        results[name] = {
            "pairs": len(pairs),
            "bad": len(read.bad),
            "too_long": len(read.items) - len(pairs),
        }
        for who, right in found.items():
            n_right, total = sum(map(sum, right)), sum(map(len, right))
            results[name][who] = {
                "folds": [sum(fold) / len(fold) for fold in right],
                "accuracy": n_right / total,
                "interval": interval(n_right, total),
            }
    print(json.dumps(results, indent=1))
    if n_folds == CONFIG["folds"]:
        write_result(
            OUTPUT,
            config=CONFIG,
            seeds=[SEED],
            modules=[
                *("corpus", "tokenizer", "layers", "attention", "model", "pretraining"),
                *("chat", "sft", "reward", "runtime.dialogs", "runtime.file_data"),
            ],
            script=__file__,
            results=results,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SOURCE)
    parser.add_argument("folds", nargs="?", type=int, default=CONFIG["folds"])
    options = parser.parse_args()
    if options.folder == SOURCE and not SOURCE.is_dir():
        print(f"skipped: real pairs ({SOURCE}) are not on this machine")
        return
    study(options.folder, options.folds)


if __name__ == "__main__":
    main()
