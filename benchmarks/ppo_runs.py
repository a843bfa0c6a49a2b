"""PPO with other leashes, rewards and advantages: `python benchmarks/ppo_runs.py`.

Each run starts from the tour's fine-tuned model and is measured on requests of the
training split that no run is trained on, by the oracle; prompts for evaluation are left
alone. Chapter 15 shows the curves.
"""

import argparse
import logging
import sys
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import torch
from lightning import Trainer
from lightning.pytorch import Callback
from torch import Tensor

from llama2_lite.chat import Dialog, answer, encode_dialog
from llama2_lite.model import Llama
from llama2_lite.ppo import (
    GATE,
    PPOModule,
    PPOSettings,
    PromptDataModule,
    PromptDataset,
    ScoreBoth,
    answer_logprobs,
    combine,
    model_scores,
    oracle_scores,
)
from llama2_lite.pretraining import best_precision
from llama2_lite.reward import (
    PreferenceDataModule,
    PreferenceDataset,
    RewardModel,
    RewardModule,
    collect_preferences,
    pad_rows,
    written_preferences,
)
from llama2_lite.runtime.alignment import aligned
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.runtime.judge import HARMLESS, judge, win_rate
from llama2_lite.runtime.training import TRAINER_DEFAULTS, prepare_process
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import Annotators, Oracle, Task, Town, build_town

CONFIG = {
    "iterations": 20,
    "batch_size": 128,
    "measure_every": 10,
    "unsafe_share": 0.3,
    "prompts": 4000,
    "test_harmless": 200,
    "test_unsafe": 100,
    "test_borderline": 50,
    "shown": 8,
    "settings": {},
    "arms": {
        "models": {},
        "oracle": {"reward": "oracle"},
        "likelihood alone": {"reward": "likelihood"},
        "row alone": {"reward": "row"},
        "beta 0": {"kl_weight": 0.0},
        "beta 0.1": {"kl_weight": 0.1},
        "no value model": {"critic": False},
        "beta 0.01": {"kl_weight": 0.01},
        "long steps": {"kl_weight": 0.0, "lr": 1e-3},
        "long steps, leash": {"kl_weight": 0.1, "lr": 1e-3},
    },
    "safety_pairs": 2500,
    "refusal_pairs": 500,
    "safety_models": {  # weight of the auxiliary loss, refusal pairs, zero, iterations
        "ranking only": [0.0, False, 0.0, 20],
        "auxiliary loss": [1.0, False, 0.0, 20],
        "refusal pairs": [0.0, True, 0.0, 20],
        "both": [1.0, True, 0.0, 20],
        "low zero, ranking only": [0.0, False, -9.0, 40],
        "low zero, auxiliary loss": [1.0, False, -9.0, 40],
        "low zero, refusal pairs": [0.0, True, -9.0, 40],
    },
    "safety_lr": 2e-3,
    "safety_margins": "small",
    "safety_settings": {"lr": 3e-4},
    "sure": 0.5,
}
AXES = ("helpfulness", "safety")
SEEDS = [0, 1, 2]
# What is kept apart from the rest, in a file of its own
GATE_STUDY = ("long steps", "low zero")
MODULES = [
    *("town", "layers", "attention", "model", "generation", "pretraining"),
    *("chat", "reward", "ppo"),
]
RESULTS = Path(__file__).parents[1] / "book" / "results"


class Displaced(RewardModel):
    """A reward model whose scores begin around another number than 0."""

    zero = 0.0

    def forward(self, *inputs) -> Tensor:
        """As `RewardModel.forward`."""
        return super().forward(*inputs) + torch.tensor([self.zero, 0.0])


class DisplacedModule(RewardModule):
    """Trains such a model."""

    zero = 0.0

    def build(self) -> RewardModel:
        """With its zero where this module says."""
        model = Displaced(self.config)
        model.zero = self.zero
        return model


class Requests:
    """Requests to learn from, and others to measure with."""

    def __init__(self, town: Town):
        random = Random("requests for PPO")
        self.pool: dict[str, list[Task]] = {}
        tests = {}
        for kind in town.items:
            tasks = town.tasks("train", [kind])
            random.shuffle(tasks)
            n_tests = len(tasks) // 6
            tests[kind], self.pool[kind] = tasks[:n_tests], tasks[n_tests:]
        self.harmless = [
            random.choice(tests[random.choice(HARMLESS)])
            for _ in range(CONFIG["test_harmless"])
        ]
        self.unsafe = random.sample(tests["unsafe"], CONFIG["test_unsafe"])
        self.borderline = random.sample(tests["borderline"], CONFIG["test_borderline"])
        self.tagged = {task.prompt for task in self.pool["unsafe"]}

    def draw(self, n_tasks: int, seed: int, unsafe: float) -> list[Task]:
        """Requests to learn from; of the harmless ones a thirteenth look unsafe."""
        random = Random(f"requests {seed}")
        kinds = [*HARMLESS, *HARMLESS, "borderline"]
        return [
            random.choice(
                self.pool[
                    "unsafe" if random.random() < unsafe else random.choice(kinds)
                ]
            )
            for _ in range(n_tasks)
        ]


class Measure:
    """What the oracle says of a model's answers."""

    def __init__(self, requests: Requests, oracle: Oracle, tokenizer: Tokenizer):
        self.answers: list[str] = []
        self.tests = [*requests.harmless, *requests.unsafe, *requests.borderline]
        self.ends = len(requests.harmless), len(requests.harmless + requests.unsafe)
        self.oracle, self.tokenizer = oracle, tokenizer
        self.start = None

    def __call__(self, model: Llama) -> dict[str, float]:
        """Means over the tests, and win rates against the first model measured."""
        dialogs = [task.dialog() for task in self.tests]
        self.answers = answer(model, self.tokenizer, dialogs, seed=1)
        found = judge(self.oracle, self.tests, self.answers)
        self.start = self.start or found
        n_harmless = self.ends[0]
        asked = dialogs[:n_harmless]
        greedy = answer(model, self.tokenizer, asked, temperature=0)
        at_best = judge(self.oracle, self.tests[:n_harmless], greedy)
        entropy, least = self.likelihoods(model, asked, self.answers[:n_harmless])
        first, second = self.ends
        safe, unsafe, borderline = (
            slice(first),
            slice(first, second),
            slice(second, None),
        )
        sure = least.exp().numpy() > CONFIG["sure"]
        helpful = win_rate(found.helpfulness[safe], self.start.helpfulness[safe])
        safer = win_rate(found.safety[unsafe], self.start.safety[unsafe])
        return {
            "correct": float(found.correct[safe].mean()),
            "greedy_correct": float(at_best.correct.mean()),
            "entropy": entropy,
            "sure": float(sure.mean()),
            "sure_and_wrong": float((sure & ~found.correct[safe]).mean()),
            "helpfulness": float(found.helpfulness[safe].mean()),
            "safety": float(found.safety[unsafe].mean()),
            "violations": float(found.violation[unsafe].mean()),
            "false_refusals": float(found.refusal[safe].mean()),
            "borderline_refusals": float(found.refusal[borderline].mean()),
            "helpful_wins": helpful.rate.value,
            "safe_wins": safer.rate.value,
        }

    @torch.no_grad()
    def likelihoods(
        self, model: Llama, dialogs: list[Dialog], texts: list[str]
    ) -> tuple[float, Tensor]:
        """What a model thinks of its answers.

        Returns:
            Minus the mean log-probability of a token, which estimates the entropy,
            and the log-probability of each answer's least likely token, (N,).
        """
        asked = [encode_dialog(dialog, self.tokenizer).ids for dialog in dialogs]
        pairs = list(zip(asked, texts, strict=True))
        encode = self.tokenizer.encode
        ids, lengths = pad_rows([a + encode(f"{b} ", eos=True) for a, b in pairs])
        places = torch.arange(ids.shape[1])
        starts = torch.tensor([len(a) for a in asked])
        mask = (places >= starts[:, None]) & (places < lengths[:, None])
        found = answer_logprobs(model, ids, mask)
        return -float(found[mask].mean()), found.amin(1)


class Scores:
    """Passes scores on, and notes their means for the prompts that they count for."""

    def __init__(self, score_both: ScoreBoth, tagged: set[str]):
        self.score_both, self.tagged = score_both, tagged
        self.means: dict[str, float] = {}

    def __call__(
        self, prompts: list[Dialog], answers: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Helpfulness and safety, both (B,)."""
        helpfulness, safety = self.score_both(prompts, answers)
        unsafe = torch.tensor([p[-1]["content"] in self.tagged for p in prompts])
        self.means = {
            "modelled_helpfulness": float(helpfulness.sigmoid()[~unsafe].mean()),
            "modelled_safety": float(safety.sigmoid()[unsafe].mean()),
            "gated": float((safety.sigmoid()[~unsafe] < GATE).float().mean()),
        }
        return helpfulness, safety


def part_of(model: RewardModel, part: str) -> RewardModel:
    """A reward model of whose score only the likelihood or only the row is left."""
    model = deepcopy(model)
    if part == "likelihood":
        torch.nn.init.zeros_(model.head.weight)
    else:
        model.config = replace(model.config, likelihood_weight=0.0)
    return model


class Watch(Callback):
    """Notes what is logged after each iteration, and the truth now and then."""

    def __init__(self, measure: Measure, scores: Scores, start: dict[str, float]):
        self.measure, self.scores = measure, scores
        self.iterations: list[dict[str, float]] = []
        self.truth: list[dict[str, float]] = []
        self._note(0, start)

    def on_train_batch_end(self, trainer, module, *rest):
        names = ("reward", "kl", "entropy", "answer_tokens")
        logged = {name: float(trainer.callback_metrics[name]) for name in names}
        logged |= self.scores.means
        self.iterations.append({name: round(logged[name], 4) for name in logged})
        step = trainer.global_step
        if step % CONFIG["measure_every"] == 0 or step == trainer.max_steps:
            self._note(step, self.measure(module.model))

    def _note(self, step: int, figures: dict[str, float]) -> None:
        rounded = {name: round(value, 4) for name, value in figures.items()}
        self.truth.append({"iteration": step, **rounded})


def train(module, data, max_steps: int, callbacks=()) -> None:
    """Without logs and checkpoints."""
    Trainer(
        max_steps=max_steps,
        precision=best_precision(),
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        **TRAINER_DEFAULTS,
    ).fit(module, data)


class Study:
    """What all runs share.

    Args:
        folder: of a chat model and two reward models; the tour's if left out.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            stages = aligned()
            folders = [stages.reward(axis).path for axis in AXES]
            self.chat = stages.sft().path
        else:
            folders = [folder / axis for axis in AXES]
            self.chat = folder / "sft"
        self.tokenizer = Tokenizer(self.chat / "tokenizer.model")
        self.town = build_town()
        self.oracle = Oracle(self.town)
        self.requests = Requests(self.town)
        self.measure = Measure(self.requests, self.oracle, self.tokenizer)
        start = Llama.from_pretrained(self.chat, torch.float32)
        self.at_start = self.measure(start.eval())
        self.tours = [RewardModel.from_pretrained(path) for path in folders]

    def run(self, both, seed: int, settings: dict, iterations: int) -> dict:
        """One run of PPO."""
        started = time.perf_counter()
        chosen = PPOSettings(**{**CONFIG["settings"], **settings})
        tasks = self.requests.draw(CONFIG["prompts"], seed, CONFIG["unsafe_share"])
        dialogs = [task.dialog() for task in tasks]
        prompts = PromptDataset(
            dialogs, self.tokenizer, 1024, chosen.max_new_tokens, seed
        )
        scores = Scores(both, self.requests.tagged)
        reward = combine(scores, self.requests.tagged)
        module = PPOModule(self.chat, reward, chosen, seed=seed)
        watch = Watch(self.measure, scores, self.at_start)
        data = PromptDataModule(prompts, prompts, CONFIG["batch_size"])
        train(module, data, iterations, [watch])
        seconds = time.perf_counter() - started
        figures = {"iterations": watch.iterations, "truth": watch.truth}
        figures["gated"] = watch.iterations[0]["gated"]  # type: ignore[assignment]
        asked = [task.prompt for task in self.requests.harmless[: CONFIG["shown"]]]
        figures["answers"] = list(zip(asked, self.measure.answers, strict=False))
        return {**figures, "seconds": round(seconds, 1)}

    def safety_model(
        self, weight: float, refusals: bool, zero: float, seed: int
    ) -> RewardModel:
        """A safety model that starts at some zero, with or without the two cures."""
        random = Random(f"safety {seed}")
        annotators = Annotators(self.oracle, seed)
        pool = self.requests.pool
        tasks = random.choices(pool["unsafe"], k=CONFIG["safety_pairs"])
        pairs = collect_preferences(
            [Llama.from_pretrained(self.chat)],
            self.tokenizer,
            tasks,
            annotators,
            axis="safety",
            seed=seed,
        )
        if refusals:
            harmless = [
                random.choice(pool[random.choice([*HARMLESS, "borderline"])])
                for _ in range(CONFIG["refusal_pairs"])
            ]
            pairs += written_preferences(
                self.town, harmless, annotators, flaws=["refusal"], seed=seed
            )
        margins = CONFIG["safety_margins"]
        data = PreferenceDataset(
            pairs, self.tokenizer, 1024, margins=margins, seed=seed
        )
        module = DisplacedModule(self.chat, CONFIG["safety_lr"], safety_weight=weight)
        module.zero = zero
        train(module, PreferenceDataModule(data, data, 64), len(data) // 64)
        return module.model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="some arms, for a trial")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--models", type=Path, help="sft, helpfulness and safety")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a folder")
    arguments = parser.parse_args()
    prepare_process()
    logging.disable(logging.WARNING)
    study = Study(arguments.models)
    helpfulness, safety = study.tours
    rewards = {
        "models": study.tours,
        "likelihood": [part_of(helpfulness, "likelihood"), safety],
        "row": [part_of(helpfulness, "row"), safety],
    }
    sources = {
        name: model_scores(*models, study.tokenizer) for name, models in rewards.items()
    }
    sources["oracle"] = oracle_scores(study.oracle)
    studies: dict[str, dict[str, list[dict]]] = {"ppo_runs": {}, "ppo_gate": {}}

    def note(arm: str, seed: int, made: dict) -> None:
        name = "ppo_gate" if arm.startswith(GATE_STUDY) else "ppo_runs"
        results = studies[name]
        results.setdefault(arm, []).append(made)
        write_result(  # after each run: what is there survives an interruption
            arguments.output / f"{name}.json",
            config={**CONFIG, "ppo": asdict(PPOSettings(**CONFIG["settings"]))},
            seeds=arguments.seeds[: max(map(len, results.values()))],
            modules=MODULES,
            script=__file__,
            results=results,
        )
        print(
            arm, seed, made["truth"][-1], made["seconds"], file=sys.stderr, flush=True
        )

    def is_wanted(arm: str) -> bool:
        return arguments.only is None or arm in arguments.only

    for seed in arguments.seeds:
        for arm, settings in CONFIG["arms"].items():
            if is_wanted(arm):
                others = {k: v for k, v in settings.items() if k != "reward"}
                scores = sources[settings.get("reward", "models")]
                note(arm, seed, study.run(scores, seed, others, CONFIG["iterations"]))
        for arm, (*kind, iterations) in CONFIG["safety_models"].items():
            if is_wanted(arm):
                trained = study.safety_model(*kind, seed)
                scores = model_scores(helpfulness, trained, study.tokenizer)
                settings = CONFIG["safety_settings"]
                note(arm, seed, study.run(scores, seed, settings, iterations))


if __name__ == "__main__":
    main()
