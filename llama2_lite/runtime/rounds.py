"""The rounds of RLHF on the town: each step is an artifact, made once.

`llama2_lite.rlhf.run_rounds` says in which order; `llama2_lite.runtime.versions` judges
what they have made.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama2_lite.generation import for_decoding
from llama2_lite.model import Llama
from llama2_lite.rejection import Pick, best_of_all_rounds
from llama2_lite.reward import collect_preferences, draw_tasks, written_preferences
from llama2_lite.runtime.alignment import (
    HARMLESS,
    AlignmentStages,
    PPORecipe,
    PreferenceRecipe,
    RejectionRecipe,
    RewardRecipe,
    RewardRecipes,
    pairs_of_axis,
    read_pairs,
)
from llama2_lite.runtime.artifacts import Artifact, write_json
from llama2_lite.runtime.configs import read_recipe
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import Annotators, Oracle, Preference

AXES = ("helpfulness", "safety")
OTHERS = 500  # added to the seed of a round: other requests, other annotators
MODULES = ("town", "chat", "generation", "runtime.rounds")


@dataclass(frozen=True)
class FreshRecipe(PreferenceRecipe):
    """What annotators see in each round, of answers of the newest model.

    Attributes:
        temperatures: of the answers, evenly.
    """

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
    reward: RewardRecipes
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

    def seed(self, number: int) -> int:
        """Of all that is drawn in a round."""
        return 1000 * self.stages.seed + number

    def collect(self, number: int, model: Artifact) -> Artifact:
        """``pairs1``: what annotators think of answers of a model."""
        recipe, seed = self.recipe.preferences, self.seed(number)
        config = {"recipe": asdict(recipe), "round": number}

        @self.stages.stage(f"pairs{number}", config, [model], "reward", *MODULES)
        def made(folder: Path) -> None:
            self.stages.stages.say(f"pairs{number}: what annotators prefer now")
            writer = Llama.from_pretrained(model.path)
            how = {"temperatures": recipe.temperatures}
            self.stages.collect(folder, writer, recipe, seed, seed + OTHERS, **how)

        return made

    def learn(self, number: int, pairs: Sequence[Artifact]) -> RewardModels:
        """``helpfulness1`` and ``safety1``: reward models of all pairs so far."""
        return RewardModels(*(self._learn(axis, number, pairs) for axis in AXES))

    def _learn(self, axis: str, number: int, pairs: Sequence[Artifact]) -> Artifact:
        recipe: RewardRecipe = getattr(self.recipe.reward, axis)
        inputs = [self.start, *pairs]

        @self.stages.stage(f"{axis}{number}", asdict(recipe), inputs, "reward")
        def made(folder: Path) -> None:
            own = pairs_of_axis(pairs, axis, self.seed(number))
            held_out = read_pairs(pairs[-1:], f"held_out_{axis}")
            label = f"{axis}{number}"
            self.stages.train_reward(folder, label, self.start, own, held_out, recipe)

        return made

    def sample(self, number: int, model: Artifact, reward: RewardModels) -> Artifact:
        """``picks1``: the best of several answers of a model to each request."""
        recipe, seed = self.recipe.rejection, self.seed(number)
        config = {"recipe": asdict(recipe), "round": number}
        modules = ("rejection", "ppo", "reward", *MODULES)

        @self.stages.stage(f"picks{number}", config, [model, *reward], *modules)
        def made(folder: Path) -> None:
            self.stages.stages.say(f"picks{number}: the best of several answers")
            seeds = seed, seed + OTHERS
            score = self.stages.score(reward)
            picks = self.stages.pick_best(model, score, recipe, *seeds, number - 1)
            write_json(folder / "picks.json", picks)

        return made

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
                kept = best_of_all_rounds(bags, self.stages.score(reward))
            dialogs = [pick.dialog() for pick in kept]
            self.stages.fine_tune(folder, f"v{number}", model, dialogs, recipe)

        return made

    def reinforce(self, number: int, model: Artifact, reward: RewardModels) -> Artifact:
        """``ppo5``: a model after PPO."""
        recipe, seed = self.recipe.ppo, self.seed(number)
        inputs = [model, *reward]

        @self.stages.stage(f"ppo{number}", asdict(recipe), inputs, "ppo", *MODULES)
        def made(folder: Path) -> None:
            seeds = seed, seed + 2 * OTHERS, seed + 3 * OTHERS
            score = self.stages.score(reward)
            label = f"ppo{number}"
            self.stages.reinforce(folder, label, model, score, recipe, seeds)

        return made

    def general(self) -> Artifact:
        """``general``: a reward model for both axes that is kept out of all rounds.

        Its pairs are answers of the fine-tuned model and written ones, compared by
        other annotators.
        """
        recipe, start = self.recipe.general, self.start
        how = self.recipe.reward.helpfulness
        config = {"recipe": asdict(recipe), "reward": asdict(how)}

        @self.stages.stage("general", config, [start], "reward", *MODULES)
        def made(folder: Path) -> None:
            path = folder / "pairs.json"
            if not path.is_file():
                self.stages.stages.say("general: pairs of its own")
                write_json(path, [asdict(pair) for pair in self._general_pairs()])
            records: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
            pairs = [Preference(**record) for record in records]
            own, held_out = pairs[100:], pairs[:100]
            self.stages.train_reward(folder, "general", start, own, held_out, how)

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


def read_picks(made: Artifact) -> list[Pick]:
    """The answers that a round kept."""
    records = json.loads((made.path / "picks.json").read_text("utf-8"))
    return [Pick(*record) for record in records]
