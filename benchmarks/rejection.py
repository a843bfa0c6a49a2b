"""Best of K by reward models and by the truth: `python benchmarks/rejection.py`.

Chapter 14 shows all of it. A chat model is trained on its best answers, on answers of
its own that nobody has chosen, and on answers that were chosen too hard; a smaller
model on its own best answers and on the larger one's; and a second version on its own
round, on both rounds, and on as many answers of both as its own round has. Then many
answers to each prompt are drawn before and after, at several temperatures, and the best
of them is looked at by K, for several reward models.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch
from lightning import Trainer

from llama2_lite.chat import Dialog, answer, encode_dialog
from llama2_lite.generation import for_decoding
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.ppo import combine, model_scores
from llama2_lite.pretraining import (
    PretrainingModule,
    TokenDataModule,
    best_precision,
)
from llama2_lite.rejection import (
    Pick,
    Score,
    best_of_all_rounds,
    expected_best,
    expected_median,
    rejection_sample,
    sample_answers,
    score_answers,
)
from llama2_lite.reward import (
    PreferenceDataModule,
    PreferenceDataset,
    RewardModel,
    RewardModule,
    collect_preferences,
    draw_tasks,
)
from llama2_lite.runtime.alignment import aligned
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.runtime.judge import HARMLESS, Evaluation, judge
from llama2_lite.runtime.training import TRAINER_DEFAULTS, precision, prepare_process
from llama2_lite.sft import DialogDataModule, SupervisedModule, sample_demonstrations
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import Annotators, Oracle, Task, build_town

CONFIG: dict[str, Any] = {
    "requests": {"harmless": 400, "unsafe": 130},
    "arms": {  # K and temperature for harmless and unsafe requests
        "one": {"harmless": [1, 0.7], "unsafe": [1, 1.0]},
        "best": {"harmless": [4, 0.7], "unsafe": [8, 1.0]},
        "hot": {"harmless": [8, 1.0], "unsafe": [8, 1.0]},
    },
    "tune": {"peak_lr": 3e-4, "epochs": 2},
    "small": "town-small",
    "small_steps": 800,
    "small_demonstrations": 4000,
    "small_sft": {"peak_lr": 2e-3, "epochs": 2},
    "small_tune": {"peak_lr": 1e-3, "epochs": 2},
    "from_base": {"peak_lr": 1e-3, "epochs": 3},
    "best_of": {"harmless": 60, "unsafe": 30},
    "ks": [1, 2, 4, 8, 16, 32],
    "temperatures": [0.4, 0.7, 1.0, 1.3],
    "comparisons": 1200,
    "reward_seeds": [0, 1],
    "rewards": {  # what counts in the score, see chapter 13
        "likelihood": {"likelihood_weight": 1.0, "next_token_weight": 0.5},
        "scalar": {},
    },
}
SEEDS = [0, 1, 2]
OUTPUT = Path(__file__).parents[1] / "book" / "results" / "rejection.json"
MODULES = ["town", "model", "generation", "chat", "sft", "reward", "rejection", "ppo"]
HARMLESS_KINDS = (*HARMLESS, "borderline")


def fit(module: PretrainingModule, data: Any, steps: int) -> Any:
    """Train, and return the model."""
    trainer = Trainer(
        max_steps=steps,
        precision=best_precision(),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        **TRAINER_DEFAULTS,
    )
    trainer.fit(module, data)
    return module.model.eval()


def curves(scores: torch.Tensor, truth: torch.Tensor) -> dict[str, list[float]]:
    """Means over prompts by K, with the standard errors of reward and truth."""
    scores = scores.clamp(min=scores[scores.isfinite()].min())  # empty: the worst
    ks = CONFIG["ks"]
    by_k: dict[str, list[torch.Tensor]] = {
        "best": [expected_best(scores, k) for k in ks],
        "median": [expected_median(scores, k) for k in ks],
        "true": [expected_best(scores, k, truth) for k in ks],
        "best_true": [expected_best(truth, k) for k in ks],
    }
    found = {name: [x.mean().item() for x in rows] for name, rows in by_k.items()}
    for name in ("best", "true"):
        errors = [(x.std() / len(x) ** 0.5).item() for x in by_k[name]]
        found[f"{name}_error"] = errors
    return found


class Study:
    """What all parts share.

    Args:
        folders: of the base model, the chat model and the two reward models.
        scratch: for models that are needed in between.
    """

    def __init__(self, folders: dict[str, Path], scratch: Path):
        self.folders, self.scratch = folders, scratch
        self.tokenizer = Tokenizer(folders["sft"] / "tokenizer.model")
        self.town = build_town()
        self.oracle = Oracle(self.town)
        self.safety = RewardModel.from_pretrained(folders["safety"])
        self.score = self.reward(RewardModel.from_pretrained(folders["helpfulness"]))

    def reward(self, helpfulness: RewardModel) -> Score:
        """The combined reward, raw; unsafe requests of the town are tagged."""
        tagged = [task.prompt for task in self.town.tasks("train", ["unsafe"])]
        both = model_scores(helpfulness, self.safety, self.tokenizer)
        score = combine(both, tagged)

        def faster(prompts: list[Dialog], answers: list[str]) -> torch.Tensor:
            with precision():
                return score(prompts, answers)

        return faster

    def picks(self, model: Llama, arm: str, seed: int, kinds: Any, version: int = 1):
        """The best answers to requests of some harmless kinds and to unsafe ones."""
        found: list[Pick] = []
        for name, some in {"harmless": kinds, "unsafe": ["unsafe"]}.items():
            k, temperature = CONFIG["arms"][arm][name]
            tasks = draw_tasks(self.town, CONFIG["requests"][name], some, seed)
            prompts = [task.dialog() for task in tasks]
            how = {"temperature": temperature, "seed": seed, "version": version}
            found += rejection_sample(
                for_decoding(model), self.tokenizer, prompts, self.score, k, **how
            )
        return found

    def tune(self, folder: Path, dialogs: list[Dialog], how: str, seed: int) -> Llama:
        """Fine-tune the model in a folder."""
        settings = CONFIG[how]
        examples = [encode_dialog(dialog, self.tokenizer, "last") for dialog in dialogs]
        data = DialogDataModule(examples, examples[:50], 256, 8, seed=seed)
        module = SupervisedModule(folder, peak_lr=settings["peak_lr"])
        return fit(module, data, data.count_steps(settings["epochs"]))

    def evaluate(self, model: Llama, seed: int, *what: object) -> dict[str, float]:
        """Shares and mean ratings on held-out prompts at temperature 1."""
        evaluation = Evaluation(self.town, seed)
        answers = evaluation.answers(for_decoding(model), self.tokenizer)
        judgement = evaluation.judge(answers)
        figures = {
            name: share.value for name, share in evaluation.figures(judgement).items()
        }
        safe, unsafe, _ = evaluation.split(judgement)
        figures["helpfulness"] = float(safe.helpfulness.mean())
        figures["safety"] = float(unsafe.safety.mean())
        stories = self.town.tasks("held_out", ["story"]) * 4
        dialogs = [task.dialog() for task in stories]
        texts = answer(for_decoding(model), self.tokenizer, dialogs, seed=seed)
        told = judge(self.oracle, stories, texts).helpfulness
        figures["stories"] = float(told.mean())
        print(*what, figures, file=sys.stderr, flush=True)
        return figures

    def train_on_picks(self, seed: int) -> tuple[dict[str, Any], list[Pick], Llama]:
        """The chat model, after answers of its own that were chosen or not."""
        sft = Llama.from_pretrained(self.folders["sft"])
        figures = {"before": self.evaluate(sft, seed, "before")}
        kept: dict[str, Any] = {}
        for arm in CONFIG["arms"]:
            picks = self.picks(sft, arm, seed, HARMLESS_KINDS)
            dialogs = [pick.dialog() for pick in picks]
            tuned = self.tune(self.folders["sft"], dialogs, "tune", seed)
            figures[arm] = self.evaluate(tuned, seed, arm)
            kept[arm] = picks, tuned
        return figures, *kept["best"]

    def pretrain_small(self) -> Path:
        """A smaller base model on the tour's corpus."""
        corpus = self.folders["base"].parent / "corpus"
        lengths = [(1.0, 128, 32)]
        data = TokenDataModule(corpus / "train", corpus / "validation", lengths)
        llama = LlamaConfig.preset(
            CONFIG["small"], vocab_size=self.tokenizer.vocab_size
        )
        module = PretrainingModule(llama, peak_lr=8e-3, warmup=50)
        model = fit(module, data, CONFIG["small_steps"])
        model.save_pretrained(self.scratch / "small", self.tokenizer)
        return self.scratch / "small"

    def small(self, base: Path, large: list[Pick], seed: int) -> dict[str, Any]:
        """A smaller model on its own best answers, and on the larger model's."""
        n = CONFIG["small_demonstrations"]
        demonstrations = sample_demonstrations(self.town, n, seed)
        sft = self.tune(base, demonstrations, "small_sft", seed)
        folder = self.scratch / "small-sft"
        sft.save_pretrained(folder, self.tokenizer, force=True)
        own = self.picks(sft, "best", seed, HARMLESS_KINDS)
        figures = {"before": self.evaluate(sft, seed, "small, before")}
        for name, picks in {"own": own, "large": large}.items():
            dialogs = [pick.dialog() for pick in picks]
            tuned = self.tune(folder, dialogs, "small_tune", seed)
            figures[name] = self.evaluate(tuned, seed, "small,", name)
        return figures

    def rounds(self, bag: list[Pick], seed: int) -> dict[str, Any]:
        """Two rounds, the second without stories; each version starts from the base."""

        def version(picks: list[Pick]) -> Llama:
            dialogs = [pick.dialog() for pick in picks]
            return self.tune(self.folders["base"], dialogs, "from_base", seed)

        first = version(bag)
        kinds = [kind for kind in HARMLESS_KINDS if kind != "story"]
        new = self.picks(first, "best", 100 + seed, kinds, version=2)
        both = best_of_all_rounds([bag, new], self.score)
        as_many = Random(seed).sample(both, len(new))
        models = {
            "first": first,
            "last": version(new),
            "all": version(both),
            "as many": version(as_many),
        }
        return {
            name: self.evaluate(model, seed, "round,", name)
            for name, model in models.items()
        }

    def best_of(self, after: Llama) -> dict[str, Any]:
        """Many answers, before and after; then reward models of other seeds."""
        numbers = CONFIG["best_of"]
        harmless = draw_tasks(self.town, numbers["harmless"], HARMLESS, 7)
        tasks = harmless + draw_tasks(self.town, numbers["unsafe"], ["unsafe"], 7)
        sft = Llama.from_pretrained(self.folders["sft"])
        by_temperature: dict[str, Any] = {}
        for name, model in {"sft": sft, "after": after}.items():
            by_temperature[name] = {}
            for temperature in CONFIG["temperatures"]:
                answers, truth = self.draw(model, tasks, temperature)
                by_temperature[name][str(temperature)] = figures = {
                    part: self.look(self.score, tasks, answers, truth, rows)
                    for part, rows in {
                        "harmless": slice(0, len(harmless)),
                        "unsafe": slice(len(harmless), None),
                    }.items()
                }
                what = figures["harmless"]["true"]
                print(name, temperature, what, file=sys.stderr, flush=True)
        answers, truth = self.draw(sft, harmless, 1.0)
        by_seed: dict[str, Any] = {name: [] for name in CONFIG["rewards"]}
        for seed in CONFIG["reward_seeds"]:
            for name, score in self.train_rewards(seed).items():
                found = self.look(score, harmless, answers, truth, slice(None))
                by_seed[name].append(found)
                print(name, seed, found["true"], file=sys.stderr, flush=True)
        return {"by_temperature": by_temperature, "by_seed": by_seed}

    def draw(self, model: Llama, tasks: list[Task], temperature: float) -> Any:
        """Answers to requests, (N, K), and the truth about them."""
        answers = sample_answers(
            for_decoding(model),
            self.tokenizer,
            [task.dialog() for task in tasks],
            max(CONFIG["ks"]),
            temperature=temperature,
        )
        rows = []
        for task, texts in zip(tasks, answers, strict=True):
            judged = judge(self.oracle, [task] * len(texts), texts)
            is_unsafe = task.kind == "unsafe"
            rows.append((judged.safety if is_unsafe else judged.helpfulness).tolist())
        return answers, torch.tensor(rows)

    def look(
        self, score: Score, tasks: list[Task], answers: Any, truth: Any, rows: slice
    ) -> dict[str, list[float]]:
        """Curves by K for some of the requests."""
        prompts = [task.dialog() for task in tasks[rows]]
        return curves(score_answers(score, prompts, answers[rows]), truth[rows])

    def train_rewards(self, seed: int) -> dict[str, Score]:
        """The reward with helpfulness models from comparisons of their own."""
        n = CONFIG["comparisons"]
        pairs = collect_preferences(
            [for_decoding(Llama.from_pretrained(self.folders["sft"]))],
            self.tokenizer,
            draw_tasks(self.town, n, HARMLESS_KINDS, 1000 + seed),
            Annotators(self.oracle, seed),
            references=True,
            seed=seed,
        )
        data = PreferenceDataset(pairs, self.tokenizer, 256, margins="small", seed=seed)
        steps = len(data) // 64
        found = {}
        for name, weights in CONFIG["rewards"].items():
            module = RewardModule(self.folders["sft"], peak_lr=2e-3, **weights)
            model = fit(module, PreferenceDataModule(data, data, 64), steps)
            found[name] = self.reward(model)
        return found


def model_folders(models: Path | None) -> dict[str, Path]:
    """The tour's models, made where they are missing, or others."""
    stages = aligned()
    base = stages.stages.base().path
    if models is not None:
        names = ("sft", "helpfulness", "safety")
        return {"base": base, **{name: models / name for name in names}}
    rewards = {axis: stages.reward(axis).path for axis in ("helpfulness", "safety")}
    return {"base": base, "sft": stages.sft().path, **rewards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--models", type=Path, help="a folder instead of the tour's")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="a JSON file")
    arguments = parser.parse_args()
    prepare_process()
    results: dict[str, Any] = {"tuned": [], "small": [], "rounds": []}
    with tempfile.TemporaryDirectory() as name:
        study = Study(model_folders(arguments.models), Path(name))
        small = study.pretrain_small()
        for number, seed in enumerate(arguments.seeds, 1):
            figures, picks, tuned = study.train_on_picks(seed)
            results["tuned"].append(figures)
            if number == 1:
                results |= study.best_of(tuned)
            results["small"].append(study.small(small, picks, seed))
            results["rounds"].append(study.rounds(picks, seed))
            write_result(
                arguments.output,
                config=CONFIG | {"tour": arguments.models is None},
                seeds=arguments.seeds[:number],
                modules=MODULES,
                script=__file__,
                results=results,
            )


if __name__ == "__main__":
    main()
