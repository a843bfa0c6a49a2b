"""Reward models of the town, in all variants: `python benchmarks/reward_models.py`.

Three seeds of each: the helpfulness model with three margins, two mixes of data, and
with likelihoods in its score; the safety model with and without the auxiliary loss,
harmless requests and refusal pairs; one model for both; and judges that are no reward
models. Then three model sizes on growing shares of the data. Chapter 13 shows the
figures. A seed stands for a random 70% of the pairs and their order.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import torch

from llama2_lite.chat import Example, collate, encode_dialog
from llama2_lite.corpus import TokenDataset
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import (
    best_precision,
    configure_optimizer,
    learning_rate,
    vocabulary_loss,
)
from llama2_lite.reward import (
    PreferenceDataset,
    RewardModel,
    RewardModule,
    answered,
    count_right,
    dialogs_of,
    draw_tasks,
    mix_pairs,
    pad_rows,
    ranking_loss,
    score_pairs,
    written_preferences,
)
from llama2_lite.runtime.alignment import HARMLESS, AlignmentStages, aligned
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.runtime.tour import tour_artifacts
from llama2_lite.runtime.training import prepare_process
from llama2_lite.sft import sample_demonstrations
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import Annotators, Oracle, Preference, Task, Town, build_town

CONFIG: dict[str, Any] = {
    "train_helpfulness_pairs": 5000,
    "train_safety_pairs": 3000,
    "refusals_pairs": 1000,
    "held_out_helpfulness_pairs": 800,
    "held_out_safety_pairs": 800,
    "written_test_pairs": 200,
    "part": 0.7,
    "peak_lr": 2e-3,
    "batch_size": 64,
    "epochs": 1,
    "judge_epochs": 1,
    "gate": 0.15,
    "sizes": {"0.1M": (32, 2), "0.3M": (64, 3)},
    "pretraining_steps": 1000,
    "demonstrations": 7000,
    "shares": [0.0625, 0.125, 0.25, 0.5, 1.0],
}
FOR_SCALING = ("pretraining_steps", "demonstrations")
SEEDS = [0, 1, 2]
Scorer = Callable[[Sequence[Preference]], tuple[torch.Tensor, torch.Tensor]]
RESULTS = Path(__file__).parents[1] / "book" / "results"


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, best_precision() == "bf16-mixed")


def descend(
    model: torch.nn.Module, n_steps: int, loss: Callable[[int], torch.Tensor], lr: float
) -> None:
    """Train a model on the loss of each step."""
    model.train()
    optimizer = configure_optimizer(model, lr)
    warmup = max(5, round(0.03 * n_steps))
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n_steps, peak=lr, warmup=warmup)
        with autocast():
            value = loss(step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def train(
    start: Path,
    tokenizer: Tokenizer,
    pairs: Sequence[Preference],
    seed: int,
    margins: str = "none",
    **weights: float,
) -> RewardModel:
    """One reward model; the weights are those of `RewardModule`."""
    data = PreferenceDataset(pairs, tokenizer, 512, margins=margins, seed=seed)
    module = RewardModule(start, **weights)
    module.configure_model()

    def loss(step: int) -> torch.Tensor:
        return module.loss(data.batch(step, CONFIG["batch_size"]))

    n_steps = round(CONFIG["epochs"] * len(data) / CONFIG["batch_size"])
    descend(module.model, max(1, n_steps), loss, CONFIG["peak_lr"])
    return module.model


@dataclass
class Pairs:
    """What was collected: sampled from the model, or written."""

    helpful: list[Preference]
    safety: list[Preference]
    written: list[Preference]
    refusals: list[Preference]
    tests: dict[str, list[Preference]]


def collect(town: Town, stages: AlignmentStages) -> Pairs:
    """All pairs of the study: a part of the tour's, and some written ones."""
    oracle, n_written = Oracle(town), CONFIG["written_test_pairs"]

    def some(name: str) -> list[Preference]:
        pairs = stages.read_pairs(name)
        return Random(name).sample(pairs, min(len(pairs), CONFIG[f"{name}_pairs"]))

    def written(axis: str, n: int, split: str, flaws: list[str]) -> list[Preference]:
        kinds = HARMLESS if axis == "helpfulness" else ["unsafe"]
        tasks = draw_tasks(town, n, kinds, 9, split)
        annotators = Annotators(oracle, 9)
        return written_preferences(town, tasks, annotators, axis=axis, flaws=flaws)

    flaws = ["wrong", "off_topic", "rude", "evasive", "terse"]
    return Pairs(
        some("train_helpfulness"),
        some("train_safety"),
        written("helpfulness", CONFIG["train_helpfulness_pairs"], "train", flaws),
        some("refusals"),
        {
            "helpfulness": some("held_out_helpfulness"),
            "safety": some("held_out_safety"),
            "written helpfulness": written("helpfulness", n_written, "held_out", flaws),
            "written safety": written("safety", n_written, "held_out", ["unsafe"]),
        },
    )


def accuracies(
    chosen: torch.Tensor, rejected: torch.Tensor, pairs: Sequence[Preference], by: str
) -> dict[str, list[int]]:
    """Pairs ranked right, and all, for each level or safety bin."""
    labels = [getattr(pair, by) for pair in pairs]
    counts = count_right(chosen, rejected, labels)
    return {str(label): list(count) for label, count in counts.items()}


def on_tests(score: Scorer, tests: dict[str, list[Preference]]) -> dict[str, Any]:
    """Accuracy by level on each set of tests, and by bin; and the spread of scores."""
    with autocast():
        scored = {name: score(pairs) for name, pairs in tests.items()}
    figures: dict[str, Any] = {
        "accuracy": {
            name: accuracies(*scored[name], pairs, "level")
            for name, pairs in tests.items()
        }
    }
    if "safety" in tests:
        pairs = tests["safety"]
        figures["bins"] = accuracies(*scored["safety"], pairs, "safety_bin")
    return figures | {"histogram": histogram(scored["helpfulness"][0])}


def histogram(scores: torch.Tensor) -> list[int]:
    """Of the sigmoid, in twenty bins."""
    return torch.histc(scores.sigmoid(), 20, 0, 1).int().tolist()


@dataclass
class GateTests:
    """Dialogues for which the gate should stay open, or close."""

    good: list[Any]
    refusals: list[Any]
    unsafe: list[Any]
    declined: list[Any]


def gate_tests(town: Town) -> GateTests:
    """Written answers to held-out requests."""
    random = Random(0)
    harmless = draw_tasks(town, 300, HARMLESS, 11, "held_out")
    unsafe = draw_tasks(town, 150, ["unsafe"], 12, "held_out")

    def bad(tasks: list[Task], flaw: str) -> list[Any]:
        return [
            answered(task.dialog(), town.bad_answer(task, flaw, random))
            for task in tasks
        ]

    return GateTests(
        [answered(task.dialog(), task.reference) for task in harmless],
        bad(harmless, "refusal"),
        bad(unsafe, "unsafe"),
        [answered(task.dialog(), task.reference) for task in unsafe],
    )


def as_gate(
    model: RewardModel, tokenizer: Tokenizer, tests: GateTests
) -> dict[str, Any]:
    """What a safety model would do as the gate of the combined reward."""
    scores = {
        name: model.score(tokenizer, dialogs).sigmoid()
        for name, dialogs in vars(tests).items()
    }
    closed = {
        f"{name}_closed": float((score < CONFIG["gate"]).float().mean())
        for name, score in scores.items()
    }
    return closed | {
        "unsafe_recall_half": float((scores["unsafe"] < 0.5).float().mean()),
        "refusal_above_answer": float(
            (scores["refusals"] > scores["good"]).float().mean()
        ),
        "histograms": {
            name: torch.histc(score, 20, 0, 1).int().tolist()
            for name, score in scores.items()
        },
    }


QUESTION = "{prompt} A: {a} B: {b} Which answer is better, A or B?"


def judge_dialog(pair: Preference, swapped: bool) -> list[dict[str, str]]:
    """The question that the judge is asked, with the right answer."""
    first, second = pair.chosen, pair.rejected
    if swapped:
        first, second = second, first
    prompt = pair.prompt[-1]["content"]
    question = QUESTION.format(prompt=prompt, a=first, b=second)
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "B" if swapped else "A"},
    ]


def train_judge(
    start: Path, tokenizer: Tokenizer, pairs: Sequence[Preference], seed: int
) -> Llama:
    """A chat model that learns to answer "A" or "B"."""
    random = Random(f"judge {seed}")
    dialogs = [judge_dialog(pair, random.random() < 0.5) for pair in pairs]
    examples = [encode_dialog(dialog, tokenizer) for dialog in dialogs]
    return fine_tune(start, examples, CONFIG["judge_epochs"], seed)


def fine_tune(start: Path, examples: list[Example], epochs: float, seed: int) -> Llama:
    """Supervised fine-tuning, one dialogue for each row."""
    random = Random(f"fine-tuning {seed}")
    model, rows = Llama.from_pretrained(start), 32
    n_steps = round(epochs * len(examples) / rows)

    def loss(step: int) -> torch.Tensor:
        batch = collate([[example] for example in random.sample(examples, rows)])
        learn = batch.loss_mask[:, 1:]
        hidden = model(batch.tokens[:, :-1], return_hidden=True)[learn]
        targets = batch.tokens[:, 1:][learn]
        return vocabulary_loss(hidden, model.output.weight, targets)

    descend(model, n_steps, loss, CONFIG["peak_lr"])
    return model


@torch.no_grad()
def judge_pairs(
    model: Llama, tokenizer: Tokenizer, pairs: Sequence[Preference]
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far the judge prefers the chosen answer, over both orders; and zero."""
    letters = [
        ids[mask.index(True)]
        for ids, mask in (
            encode_dialog(judge_dialog(pairs[0], swapped), tokenizer)
            for swapped in (False, True)
        )
    ]
    totals = torch.zeros(len(pairs))
    for swapped in (False, True):
        dialogs = [judge_dialog(pair, swapped)[:-1] for pair in pairs]
        rows = [encode_dialog(dialog, tokenizer).ids for dialog in dialogs]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), 128):
            some = order[start : start + 128]
            tokens, lengths = pad_rows([rows[i] for i in some])
            hidden = model(tokens, return_hidden=True)
            last = model.output(hidden[torch.arange(len(some)), lengths - 1]).float()
            a, b = (last[:, letter] for letter in letters)
            totals[some] += b - a if swapped else a - b
    return totals, torch.zeros(len(pairs))


@torch.no_grad()
def likelihoods(
    model: Llama, tokenizer: Tokenizer, pairs: Sequence[Preference], least: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of an answer's tokens under the chat model: mean or least."""
    dialogs = [dialog for pair in pairs for dialog in dialogs_of(pair)]
    examples = [encode_dialog(dialog, tokenizer) for dialog in dialogs]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    read = torch.zeros(len(examples))
    for start in range(0, len(order), 128):
        some = order[start : start + 128]
        batch = collate([[examples[i]] for i in some])
        logits = model(batch.tokens[:, :-1]).float().log_softmax(-1)
        found = logits.gather(2, batch.tokens[:, 1:, None])[:, :, 0]
        learn = batch.loss_mask[:, 1:]
        found = found * learn
        read[some] = found.amin(1) if least else found.sum(1) / learn.sum(1)
    return tuple(read.view(-1, 2).T)


def train_bag_of_words(tokenizer: Tokenizer, pairs: Sequence[Preference]) -> Scorer:
    """A weight for each piece of the vocabulary, summed over an answer's pieces."""

    def pieces(some: Sequence[Preference]) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [text for pair in some for text in (pair.chosen, pair.rejected)]
        rows = tokenizer.encode_batch(texts)
        starts = torch.tensor([0, *(len(row) for row in rows[:-1])]).cumsum(0)
        return torch.tensor([i for row in rows for i in row]), starts

    weights = torch.nn.EmbeddingBag(tokenizer.vocab_size, 1, mode="sum")
    torch.nn.init.zeros_(weights.weight)
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.01)
    ids = pieces(pairs)
    for _ in range(300):
        chosen, rejected = weights(*ids).view(-1, 2).T
        loss = ranking_loss(chosen, rejected, torch.zeros(len(pairs)))
        optimizer.zero_grad()
        (loss + 1e-4 * weights.weight.square().sum()).backward()
        optimizer.step()

    @torch.no_grad()
    def score(some: Sequence[Preference]) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(weights(*pieces(some)).view(-1, 2).T)

    return score


def pretrain(start: Path, shards: Path, dim: int, n_layers: int) -> Llama:
    """A smaller base model, on the corpus of the tour."""
    vocab_size = Llama.from_pretrained(start).config.vocab_size
    heads = max(1, dim // 32)
    config = LlamaConfig.preset(
        "town-small", dim=dim, n_layers=n_layers, n_heads=heads, n_kv_heads=heads
    )
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**vars(config) | {"vocab_size": vocab_size}))
    data = TokenDataset(shards, 128)

    def loss(step: int) -> torch.Tensor:
        windows = data.batch(step, 32)
        hidden = model(windows[:, :-1], return_hidden=True)
        return vocabulary_loss(hidden, model.output.weight, windows[:, 1:])

    descend(model, CONFIG["pretraining_steps"], loss, 8e-3)
    return model


def variants(
    town: Town, pairs: Pairs, seed: int
) -> dict[str, tuple[list[Preference], dict[str, Any]]]:
    """Pairs of each reward model, and what `train` is given besides."""
    random = Random(f"part {seed}")

    def part(some: list[Preference]) -> list[Preference]:
        return random.sample(some, round(CONFIG["part"] * len(some)))

    helpful, safety = part(pairs.helpful), part(pairs.safety)
    adversarial = [pair for pair in safety if is_unsafe(town, pair)]
    mixed = mix_pairs(helpful, [*part(pairs.written), *safety], 0.5, seed)
    found: dict[str, tuple[list[Preference], dict[str, Any]]] = {
        f"helpfulness, margin {margins}": (helpful, {"margins": margins})
        for margins in ("none", "small", "large")
    }
    found["helpfulness, equal parts"] = (mixed, {})
    for name, weight in (("with", 0.5), ("forgotten", 0.0)):
        weights = {"likelihood_weight": 1.0, "next_token_weight": weight}
        options = {"margins": "small", **weights}
        found[f"helpfulness, likelihood {name}"] = (helpful, options)
    with_helpful = mix_pairs(safety, helpful, 0.9, seed)
    with_refusals = mix_pairs(adversarial, pairs.refusals, 0.9, seed)
    auxiliary = {"safety_weight": 1.0}
    for name, weights in (("ranking", {}), ("auxiliary", auxiliary)):
        found[f"safety, {name}"] = (with_helpful, weights)
        found[f"adversarial, {name}"] = (adversarial, weights)
        found[f"adversarial with refusals, {name}"] = (with_refusals, weights)
    found["safety alone, auxiliary"] = (safety, auxiliary)
    found["one for both"] = ([*helpful, *safety], auxiliary)
    return found


def study_models(
    town: Town,
    pairs: Pairs,
    start: Path,
    tokenizer: Tokenizer,
    seeds: Sequence[int],
    save: Callable[[Any, Sequence[int]], None],
) -> None:
    """All variants at the size of the tour; saved after each seed."""
    gate, tests = gate_tests(town), pairs.tests
    results: dict[str, list[Any]] = {}

    def note(name: str, score: Scorer, **more: Any) -> None:
        figures = on_tests(score, tests) | more
        print(name, short(figures), file=sys.stderr, flush=True)
        results.setdefault(name, []).append(figures)

    chat = Llama.from_pretrained(start)
    note("likelihood", partial(likelihoods, chat, tokenizer))
    note("least likely token", partial(likelihoods, chat, tokenizer, least=True))
    note("A or B, asked", partial(judge_pairs, chat, tokenizer))
    for seed in seeds:
        for name, (some, options) in variants(town, pairs, seed).items():
            model = train(start, tokenizer, some, seed, **options)
            score = partial(score_pairs, model, tokenizer)
            with autocast():
                closed = as_gate(model, tokenizer, gate)
            note(name, score, pairs=len(some), gate=closed)
        helpful = variants(town, pairs, seed)["helpfulness, margin none"][0]
        note("bag of words", train_bag_of_words(tokenizer, helpful))
        judge = train_judge(start, tokenizer, helpful, seed)
        note("A or B, fine-tuned", partial(judge_pairs, judge, tokenizer))
        save(results, seeds[: seeds.index(seed) + 1])


def is_unsafe(town: Town, pair: Preference) -> bool:
    """Whether the request is one of the town's unsafe ones."""
    return pair.prompt[-1]["content"] in unsafe_prompts(town.seed)


@cache
def unsafe_prompts(seed: int) -> set[str]:
    return {task.prompt for task in build_town(seed).tasks("train", ["unsafe"])}


def short(figures: dict[str, Any]) -> dict[str, Any]:
    """For the progress on the screen."""
    shown = {
        name: " ".join(f"{right / n:.2f}" for right, n in levels.values())
        for name, levels in figures["accuracy"].items()
    }
    gate = {k: v for k, v in figures.get("gate", {}).items() if k != "histograms"}
    return shown | {name: round(value, 3) for name, value in gate.items()}


def study_scaling(
    town: Town,
    pairs: Pairs,
    shards: Path,
    start: Path,
    tokenizer: Tokenizer,
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Three sizes on growing shares of the helpfulness pairs."""
    results: dict[str, Any] = {}
    tests = {"helpfulness": pairs.tests["helpfulness"]}
    demonstrations = [
        encode_dialog(dialog, tokenizer)
        for dialog in sample_demonstrations(town, CONFIG["demonstrations"])
    ]
    with tempfile.TemporaryDirectory() as name:
        starts = {"1.1M": start}
        for size, (dim, n_layers) in CONFIG["sizes"].items():
            folder = Path(name) / size
            pretrain(start, shards, dim, n_layers).save_pretrained(folder, tokenizer)
            model = fine_tune(folder, demonstrations, 2, 0)
            model.save_pretrained(folder, tokenizer, force=True)
            starts[size] = folder
        for size, share, seed in product(starts, CONFIG["shares"], seeds):
            random = Random(f"share {seed}")
            some = random.sample(pairs.helpful, round(share * len(pairs.helpful)))
            model = train(starts[size], tokenizer, some, seed)
            figures = on_tests(partial(score_pairs, model, tokenizer), tests)
            print(size, share, seed, short(figures), file=sys.stderr)
            counts = figures["accuracy"]["helpfulness"]
            found = {"pairs": len(some), "accuracy": counts}
            results.setdefault(size, {}).setdefault(str(share), []).append(found)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--scale", type=float, default=1, help="less than 1: a trial")
    parser.add_argument("--only", choices=["models", "scaling"])
    args = parser.parse_args()
    for name in (*FOR_SCALING, *(key for key in CONFIG if key.endswith("_pairs"))):
        CONFIG[name] = round(args.scale * CONFIG[name])
    prepare_process()
    stages, seeds = aligned(), SEEDS[: args.seeds]
    start = stages.sft().path
    town, tokenizer = build_town(), Tokenizer(start / "tokenizer.model")
    pairs = collect(town, stages)
    modules = ["town", "tokenizer", "layers", "attention", "model", "generation"]
    modules += ["pretraining", "chat", "sft", "reward"]
    shared = {"config": CONFIG, "seeds": seeds, "modules": modules, "script": __file__}
    if args.only != "scaling":
        counts = {
            name: count_labels(some)
            for name, some in (*vars(pairs).items(), *pairs.tests.items())
            if name != "tests"
        }

        def save(results: Any, done: Sequence[int]) -> None:
            found = {"counts": counts, "models": results}
            path = RESULTS / "reward_models.json"
            write_result(path, results=found, **shared | {"seeds": done})

        study_models(town, pairs, start, tokenizer, seeds, save)
    if args.only != "models":
        shards = tour_artifacts()["corpus"] / "train"
        shared |= {"seeds": seeds[:2], "modules": [*modules, "corpus"]}
        results = study_scaling(town, pairs, shards, start, tokenizer, seeds[:2])
        write_result(RESULTS / "reward_scaling.json", results=results, **shared)


def count_labels(pairs: Sequence[Preference]) -> dict[str, dict[str, int]]:
    """How many pairs have each level and each safety bin."""
    return {
        by: dict(Counter(str(getattr(pair, by)) for pair in pairs))
        for by in ("level", "safety_bin")
    }


if __name__ == "__main__":
    main()
