"""The rounds of RLHF on the town: each step is an artifact, made once.

`llama2_lite.rlhf.run_rounds` says in which order; `llama2_lite.runtime.versions` judges
what they have made.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama2_lite.chat import Dialog
from llama2_lite.generation import for_decoding
from llama2_lite.model import Llama
from llama2_lite.ppo import (
    PPOModule,
    PromptDataModule,
    PromptDataset,
    combine,
    model_scores,
)
from llama2_lite.rejection import Pick, Score, best_of_all_rounds, rejection_sample
from llama2_lite.reward import (
    PreferenceDataModule,
    PreferenceDataset,
    RewardModel,
    RewardModule,
    collect_preferences,
    draw_tasks,
    mix_pairs,
    written_preferences,
)
from llama2_lite.runtime.alignment import (
    CONTEXT,
    HARMLESS,
    AlignmentStages,
    PPORecipe,
    RejectionRecipe,
    RewardRecipe,
)
from llama2_lite.runtime.artifacts import Artifact, write_json
from llama2_lite.runtime.configs import read_recipe
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import Annotators, Oracle, Preference

AXES = ("helpfulness", "safety")
MIXED = (*["unsafe"] * len(HARMLESS), *HARMLESS)
OTHERS = 500  # added to the seed of a round: other requests, other annotators
MODULES = ("town", "chat", "generation", "runtime.rounds")


@dataclass(frozen=True)
class FreshRecipe:
    """What annotators see in each round.

    Attributes:
        helpful_requests: answered by the newest model, compared by helpfulness.
        safety_requests: the same by safety; half of them unsafe.
        written: unsafe requests with written answers, compared by safety.
        refusals: harmless requests with a written answer and a refusal.
        held_out_requests: of each axis, to measure accuracy on.
        temperatures: of the answers, evenly.
    """

    helpful_requests: int
    safety_requests: int
    written: int
    refusals: int
    held_out_requests: int
    temperatures: tuple[float, ...]


@dataclass(frozen=True)
class GeneralRecipe:
    """What the general reward model learns, which judges and trains nothing.

    Attributes:
        requests: answered by the fine-tuned model, half of them unsafe.
        written: requests with two written answers.
    """

    requests: int
    written: int


@dataclass(frozen=True)
class RoundsRecipe:
    """What each round makes; configs/rounds.yaml has the values.

    Attributes:
        all_from: first version that is tuned on the best answers of all rounds.
        ppo_from: first version with PPO.
    """

    all_from: int
    ppo_from: int
    preferences: FreshRecipe
    reward: RewardRecipe
    rejection: RejectionRecipe
    ppo: PPORecipe
    general: GeneralRecipe

    @classmethod
    def read(cls, path: str | Path | None = None) -> "RoundsRecipe":
        """Read a YAML file, by default the one of the package.

        Raises:
            ValueError: if it is not YAML, or a key is missing or unknown.
        """
        return read_recipe(cls, "rounds", path)


class RewardModels(NamedTuple):
    """The reward models of a round."""

    helpfulness: Artifact
    safety: Artifact


class Rounds:
    """The steps of `llama2_lite.rlhf.run_rounds`, each kept as an artifact.

    Args:
        stages: make artifacts, in whose folder these are kept.
        start: the fine-tuned model; reward models start from it too.
        recipe: what to make.
    """

    def __init__(self, stages: AlignmentStages, start: Artifact, recipe: RoundsRecipe):
        self.stages, self.start, self.recipe = stages, start, recipe
        self.town = stages.town
        self.tokenizer = Tokenizer(start.path / "tokenizer.model")
        self.tagged = {task.prompt for task in self.town.tasks("train", ["unsafe"])}

    def seed(self, number: int) -> int:
        """Of all that is drawn in a round."""
        return 1000 * self.stages.seed + number

    def collect(self, number: int, model: Artifact) -> Artifact:
        """``pairs1``: what annotators think of answers of a model."""
        recipe = asdict(self.recipe.preferences)
        config = {"recipe": recipe, "round": number}

        @self.stages.stage(f"pairs{number}", config, [model], "reward", *MODULES)
        def made(folder: Path) -> None:
            self.stages.stages.say(f"pairs{number}: what annotators prefer now")
            pairs = self._compare(number, Llama.from_pretrained(model.path))
            for name, some in pairs.items():
                write_json(folder / f"{name}.json", [asdict(pair) for pair in some])

        return made

    def _compare(self, number: int, model: Llama) -> dict[str, list[Preference]]:
        recipe, seed, town = self.recipe.preferences, self.seed(number), self.town
        annotators, fast = Annotators(Oracle(town), seed), for_decoding(model)
        found = {}
        kinds: Sequence[str]
        for split, axis, n_requests in (
            ("train", "helpfulness", recipe.helpful_requests),
            ("train", "safety", recipe.safety_requests),
            ("held_out", "helpfulness", recipe.held_out_requests),
            ("held_out", "safety", recipe.held_out_requests),
        ):
            kinds = HARMLESS if axis == "helpfulness" else MIXED
            found[f"{split}_{axis}"] = collect_preferences(
                [fast],
                self.tokenizer,
                draw_tasks(town, n_requests, kinds, seed, split),
                annotators,
                axis=axis,
                temperatures=recipe.temperatures,
                references=split == "train",
                seed=seed,
            )
        for name, axis, kinds, n_requests, flaws in (
            ("written", "safety", ["unsafe"], recipe.written, ["unsafe", "rude"]),
            ("refusals", "helpfulness", HARMLESS, recipe.refusals, ["refusal"]),
        ):
            tasks = draw_tasks(town, n_requests, kinds, seed + OTHERS)
            found[name] = written_preferences(
                town, tasks, annotators, axis=axis, flaws=flaws, seed=seed
            )
        return found

    def learn(self, number: int, pairs: Sequence[Artifact]) -> RewardModels:
        """``helpfulness1`` and ``safety1``: reward models of all pairs so far."""
        return RewardModels(*(self._learn(axis, number, pairs) for axis in AXES))

    def _learn(self, axis: str, number: int, pairs: Sequence[Artifact]) -> Artifact:
        recipe = self.recipe.reward
        inputs = [self.start, *pairs]

        @self.stages.stage(f"{axis}{number}", asdict(recipe), inputs, "reward")
        def made(folder: Path) -> None:
            own, weight = read_pairs(pairs, f"train_{axis}"), 0.0
            if axis == "safety":
                own += read_pairs(pairs, "written")
                weight = recipe.safety_weight
            # both have to know that declining a harmless request helps nobody
            own = mix_pairs(own, read_pairs(pairs, "refusals"), 0.9, self.seed(number))
            held_out = read_pairs(pairs[-1:], f"held_out_{axis}")
            self._train_reward(folder, f"{axis}{number}", own, held_out, weight)

        return made

    def _train_reward(
        self,
        folder: Path,
        label: str,
        pairs: Sequence[Preference],
        held_out: Sequence[Preference],
        safety_weight: float = 0.0,
    ) -> None:
        recipe = self.recipe.reward
        train, validation = (
            PreferenceDataset(
                some,
                self.tokenizer,
                CONTEXT,
                margins=recipe.margins,
                seed=self.stages.seed,
            )
            for some in (pairs, held_out)
        )
        data = PreferenceDataModule(train, validation, recipe.batch_size)
        module = RewardModule(
            self.start.path, recipe.peak_lr, safety_weight, recipe.token_weight
        )
        n_steps = data.count_steps(recipe.epochs)
        self.stages.train(folder, label, module, data, n_steps)

    def score(self, reward: RewardModels) -> Score:
        """Both reward models as one reward; unsafe requests are tagged."""
        helpfulness, safety = (RewardModel.from_pretrained(m.path) for m in reward)
        both = model_scores(helpfulness, safety, self.tokenizer)
        return combine(both, self.tagged)

    def requests(self, n_requests: int, seed: int) -> list[Dialog]:
        """Prompts of the training split, a quarter of them unsafe."""
        kinds = [*HARMLESS, *HARMLESS, *["unsafe"] * 5]
        return [t.dialog() for t in draw_tasks(self.town, n_requests, kinds, seed)]

    def sample(self, number: int, model: Artifact, reward: RewardModels) -> Artifact:
        """``picks1``: the best of several answers of a model to each request."""
        recipe, seed = self.recipe.rejection, self.seed(number)
        config = {"recipe": asdict(recipe), "round": number}
        modules = ("rejection", "ppo", "reward", *MODULES)

        @self.stages.stage(f"picks{number}", config, [model, *reward], *modules)
        def made(folder: Path) -> None:
            self.stages.stages.say(f"picks{number}: the best of several answers")
            fast = for_decoding(Llama.from_pretrained(model.path))
            requests, picks = self.requests(recipe.requests, seed + OTHERS), []
            score = self.score(reward)
            for how, is_unsafe in ((recipe.harmless, False), (recipe.unsafe, True)):
                picks += rejection_sample(
                    fast,
                    self.tokenizer,
                    [d for d in requests if self._is_tagged(d) == is_unsafe],
                    score,
                    how.k,
                    temperature=how.temperature,
                    seed=seed,
                    version=number - 1,
                )
            write_json(folder / "picks.json", picks)

        return made

    def _is_tagged(self, dialog: Dialog) -> bool:
        return dialog[-1]["content"] in self.tagged

    def tune(
        self,
        number: int,
        model: Artifact,
        picks: Sequence[Artifact],
        reward: RewardModels,
    ) -> Artifact:
        """``v1``: a model after the best answers of one round or of several."""
        recipe = self.recipe.rejection
        inputs = [model, *picks, *(reward if len(picks) > 1 else ())]
        config = {"recipe": asdict(recipe), "rounds": len(picks)}

        @self.stages.stage(f"v{number}", config, inputs, "sft", "rejection", "chat")
        def made(folder: Path) -> None:
            bags = [read_picks(bag) for bag in picks]
            kept = bags[0]
            if len(bags) > 1:
                kept = best_of_all_rounds(bags, self.score(reward))
            dialogs = [pick.dialog() for pick in kept]
            self.stages.fine_tune(folder, f"v{number}", model, dialogs, recipe)

        return made

    def reinforce(self, number: int, model: Artifact, reward: RewardModels) -> Artifact:
        """``ppo5``: a model after PPO."""
        recipe, seed = self.recipe.ppo, self.seed(number)
        inputs = [model, *reward]

        @self.stages.stage(f"ppo{number}", asdict(recipe), inputs, "ppo", *MODULES)
        def made(folder: Path) -> None:
            length = recipe.settings.max_new_tokens
            train, held_out = (
                PromptDataset(requests, self.tokenizer, CONTEXT, length, seed)
                for requests in (
                    self.requests(recipe.requests, seed + 2 * OTHERS),
                    self.requests(recipe.batch_size, seed + 3 * OTHERS),
                )
            )
            data = PromptDataModule(train, held_out, recipe.batch_size)
            module = PPOModule(model.path, self.score(reward), recipe.settings, seed)
            label, every = f"ppo{number}", min(10, recipe.iterations)
            self.stages.train(folder, label, module, data, recipe.iterations, every)

        return made

    def general(self) -> Artifact:
        """``general``: a reward model for both axes that is kept out of all rounds.

        Its pairs are answers of the fine-tuned model and written ones, compared by
        other annotators.
        """
        recipe, start = self.recipe.general, self.start
        config = {"recipe": asdict(recipe), "reward": asdict(self.recipe.reward)}

        @self.stages.stage("general", config, [start], "reward", *MODULES)
        def made(folder: Path) -> None:
            path = folder / "pairs.json"
            if not path.is_file():
                self.stages.stages.say("general: pairs of its own")
                write_json(path, [asdict(pair) for pair in self._general_pairs()])
            records: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
            pairs = [Preference(**record) for record in records]
            self._train_reward(folder, "general", pairs[100:], pairs[:100])

        return made

    def _general_pairs(self) -> list[Preference]:
        recipe, seed = self.recipe.general, self.seed(OTHERS)
        annotators = Annotators(Oracle(self.town), seed)
        fast = for_decoding(Llama.from_pretrained(self.start.path))
        pairs: list[Preference] = []
        for axis, kinds, flaws in (
            ("helpfulness", HARMLESS, ["wrong", "off_topic", "evasive", "refusal"]),
            ("safety", ["unsafe"], ["unsafe", "rude"]),
        ):
            tasks = draw_tasks(self.town, recipe.requests // 2, kinds, seed)
            pairs += collect_preferences(
                [fast],
                self.tokenizer,
                tasks,
                annotators,
                axis=axis,
                references=True,
                seed=seed,
            )
            tasks = draw_tasks(self.town, recipe.written // 2, kinds, seed + 1)
            pairs += written_preferences(
                self.town, tasks, annotators, axis=axis, flaws=flaws, seed=seed
            )
        return pairs


def read_pairs(artifacts: Sequence[Artifact], name: str) -> list[Preference]:
    """Pairs of one kind, of several rounds."""
    return [
        Preference(**pair)
        for made in artifacts
        for pair in json.loads((made.path / f"{name}.json").read_text("utf-8"))
    ]


def read_picks(made: Artifact) -> list[Pick]:
    """The answers that a round kept."""
    records = json.loads((made.path / "picks.json").read_text("utf-8"))
    return [Pick(*record) for record in records]
