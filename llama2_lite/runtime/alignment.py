"""The second half of the tour: from the base model to a chat model, stage by stage.

Each stage is an artifact beside the base model, made once and found again by the
chapters; `llama2_lite.runtime.judge` says what it is worth.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from llama2_lite.chat import Dialog, encode_dialog
from llama2_lite.generation import for_decoding
from llama2_lite.ghost_attention import GhostAttentionModule
from llama2_lite.model import Llama
from llama2_lite.ppo import (
    PPOModule,
    PPOSettings,
    PromptDataModule,
    PromptDataset,
    ScoreBoth,
    combine,
    model_scores,
)
from llama2_lite.pretraining import best_precision
from llama2_lite.rejection import Pick, Score, rejection_sample
from llama2_lite.reward import (
    PreferenceDataModule,
    PreferenceDataset,
    RewardModel,
    RewardModule,
    collect_preferences,
    count_right,
    draw_tasks,
    mix_pairs,
    score_pairs,
    written_preferences,
)
from llama2_lite.runtime.artifacts import RECORD, Artifact, artifact, write_json
from llama2_lite.runtime.batches import Rows, Served
from llama2_lite.runtime.configs import read_recipe
from llama2_lite.runtime.gains import print_gains
from llama2_lite.runtime.ghost import (
    DIALOGS,
    GhostRecipe,
    adherence,
    drop_unsafe,
    ghost_data,
    read_ghosts,
    sample_ghosts,
)
from llama2_lite.runtime.judge import Evaluation, Share, share
from llama2_lite.runtime.progress import TrainingProgress
from llama2_lite.runtime.tour import (
    Recipe,
    Stages,
    default_folder,
    note_seconds,
    read_seconds,
)
from llama2_lite.runtime.training import fit, prepare_process, trainer_parts
from llama2_lite.sft import SupervisedModule, sample_demonstrations
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import LEVELS, Annotators, Oracle, Preference

HARMLESS = ("fact", "sum", "opposite", "list", "story", "howto", "borderline")
ASKED = (*HARMLESS, *HARMLESS, *("unsafe",) * 5)  # kinds that policies are asked
STAGES = ("sft", "preferences", "helpfulness", "safety", "rejection", "ppo", "chat")
CONTEXT = 256  # more than any prompt of the town with its answer


@dataclass(frozen=True)
class SupervisedRecipe:
    """Numbers of supervised fine-tuning, see `sample_demonstrations`.

    Attributes:
        batch_size: dialogues, of like length and not packed.
    """

    demonstrations: int
    wrong: float
    unsafe: float
    instructed: float
    peak_lr: float
    epochs: float
    batch_size: int


@dataclass(frozen=True)
class PreferenceRecipe:
    """How many requests annotators see, by what is asked of them.

    Attributes:
        helpful_requests: answered by the model, compared by helpfulness.
        safety_requests: answered by the model, compared by safety.
        written: unsafe requests with written answers, compared by safety.
        refusals: harmless requests with a written answer and a refusal.
        held_out_requests: of each axis, to measure accuracy on.
    """

    helpful_requests: int
    safety_requests: int
    written: int
    refusals: int
    held_out_requests: int


@dataclass(frozen=True)
class RewardRecipe:
    """Numbers of a reward model, see `RewardModule`."""

    margins: str
    safety_weight: float
    likelihood_weight: float
    next_token_weight: float
    peak_lr: float
    epochs: float
    batch_size: int


@dataclass(frozen=True)
class RewardRecipes:
    """Numbers of both reward models."""

    helpfulness: RewardRecipe
    safety: RewardRecipe


@dataclass(frozen=True)
class Drawing:
    """How many answers are drawn to each prompt, and at which temperature."""

    k: int
    temperature: float


@dataclass(frozen=True)
class RejectionRecipe:
    """Numbers of rejection sampling, see `rejection_sample`.

    Attributes:
        requests: prompts of all kinds.
        harmless, unsafe: how their answers are drawn.
        batch_size: as in `SupervisedRecipe`.
    """

    requests: int
    harmless: Drawing
    unsafe: Drawing
    peak_lr: float
    epochs: float
    batch_size: int


@dataclass(frozen=True)
class PPORecipe:
    """Numbers of PPO.

    Attributes:
        requests: prompts to learn from.
        held_out_requests: prompts to choose the best iteration by, none of which is
            learned from; rewards differ so much that the mean of a hundred chooses by
            chance.
    """

    iterations: int
    batch_size: int
    requests: int
    held_out_requests: int
    settings: PPOSettings


@dataclass(frozen=True)
class AlignmentRecipe:
    """What the stages make; configs/alignment.yaml has the values."""

    sft: SupervisedRecipe
    preferences: PreferenceRecipe
    reward: RewardRecipes
    rejection: RejectionRecipe
    ppo: PPORecipe
    chat: GhostRecipe

    @classmethod
    def read(cls, path: str | Path | None = None) -> "AlignmentRecipe":
        """Read a YAML file, by default the one of the package.

        Raises:
            ValueError: if it is not YAML, or a key is missing or unknown.
        """
        return read_recipe(cls, "alignment", path)

    def context(self) -> int:
        """Tokens that the base model must be able to read for these stages."""
        return max(CONTEXT, *(length for _, length, _ in self.chat.lengths))


class AlignmentStages:
    """The stages after the base model, each made when it is asked for and not there.

    Args:
        stages: of the base model.
        recipe: what to make.
        seed: of the data and the samples of these stages.
    """

    def __init__(self, stages: Stages, recipe: AlignmentRecipe, seed: int = 0):
        self.stages, self.recipe, self.seed = stages, recipe, seed
        self.town, self.folder = stages.town, stages.folder

    def stage(
        self, name: str, config: dict[str, Any], inputs: list[Artifact], *modules: str
    ) -> Any:
        """A decorator that makes an artifact of a build function."""
        config = {**config, "seed": self.seed}

        def make(build: Any) -> Artifact:
            def timed(folder: Path) -> None:
                started = time.perf_counter()
                build(folder)
                note_seconds(folder, time.perf_counter() - started)

            return artifact(self.folder, name, config, inputs, modules, timed)

        return make

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all stages."""
        return Tokenizer(self.stages.tokenizer().path / "tokenizer.model")

    def train(
        self,
        folder: Path,
        label: str,
        module: LightningModule,
        data: LightningDataModule,
        max_steps: int,
        validate_every: int | None = None,
    ) -> None:
        """Train in a folder and leave the model there."""
        tokenizer = self.tokenizer()
        parts = trainer_parts(
            folder,
            folder,
            lambda: tokenizer,
            checkpoint_every=max(1, max_steps // 5),
            callbacks=[TrainingProgress(label, self.stages.console)],
        )
        trainer = Trainer(
            **parts,
            max_steps=max_steps,
            val_check_interval=validate_every or max_steps,
            log_every_n_steps=1,
            precision=best_precision(),
        )
        self.stages.say(f"{label}: {max_steps} steps")
        fit(trainer, module, data, folder, self.stages.say)
        shutil.rmtree(folder / "checkpoints")

    def sft(self) -> Artifact:
        """``sft``: the base model after demonstrations, good and bad."""
        base, recipe = self.stages.base(), self.recipe.sft

        modules = ("town", "chat", "sft", "runtime.batches")

        @self.stage("sft", asdict(recipe), [base], *modules)
        def made(folder: Path) -> None:
            dialogs = sample_demonstrations(
                self.town,
                recipe.demonstrations,
                self.seed,
                recipe.wrong,
                recipe.unsafe,
                recipe.instructed,
            )
            self.fine_tune(folder, "sft", base, dialogs, recipe)

        return made

    def fine_tune(
        self,
        folder: Path,
        label: str,
        start: Artifact,
        dialogs: Sequence[Dialog],
        recipe: SupervisedRecipe | RejectionRecipe,
    ) -> None:
        """Train on dialogues; the first of a hundred are held out."""
        tokenizer, size = self.tokenizer(), recipe.batch_size
        examples = [encode_dialog(dialog, tokenizer) for dialog in dialogs]
        n_held_out = max(size, len(examples) // 100)
        held_out = Rows(examples[:n_held_out])
        batches = [held_out.batch(step, size) for step in range(n_held_out // size)]
        rows = Rows(examples[n_held_out:], self.seed)
        n_steps = max(1, round(recipe.epochs * len(rows) / size))
        # a row holds one dialogue, so there are none to keep apart
        module = SupervisedModule(start.path, recipe.peak_lr, separate=False)
        data = Served([rows], [1.0], [size], batches)
        self.train(folder, label, module, data, n_steps)

    def preferences(self) -> Artifact:
        """``preferences``: what annotators think of answers of the ``sft`` model."""
        sft, recipe = self.sft(), self.recipe.preferences

        @self.stage("preferences", asdict(recipe), [sft], "reward", "generation")
        def made(folder: Path) -> None:
            self.stages.say("preferences: answers, and what annotators think of them")
            model = Llama.from_pretrained(sft.path)
            self.collect(folder, model, recipe, self.seed, self.seed + 1)

        return made

    def collect(
        self,
        folder: Path,
        model: Llama,
        recipe: PreferenceRecipe,
        seed: int,
        seed_of_written: int,
        **how: Any,
    ) -> None:
        """Write pairs, by what they are for: answers of a model, and written ones.

        Args:
            folder: gets a file for each purpose.
            model: whose answers annotators compare.
            recipe: how many.
            seed: of requests, answers and annotators.
            seed_of_written: of the requests with written answers.
            how: more for `collect_preferences`.
        """
        town, fast = self.town, for_decoding(model)
        annotators = Annotators(Oracle(town), seed)
        kinds: dict[str, Sequence[str]] = {
            "helpfulness": HARMLESS,
            "safety": (*["unsafe"] * len(HARMLESS), *HARMLESS),
        }
        found = {}
        for split, axis, n_requests in (
            ("train", "helpfulness", recipe.helpful_requests),
            ("train", "safety", recipe.safety_requests),
            ("held_out", "helpfulness", recipe.held_out_requests),
            ("held_out", "safety", recipe.held_out_requests),
        ):
            tasks = draw_tasks(town, n_requests, kinds[axis], seed, split)
            found[f"{split}_{axis}"] = collect_preferences(
                [fast],
                self.tokenizer(),
                tasks,
                annotators,
                axis=axis,
                references=split == "train",
                seed=seed,
                **how,
            )
        unsafe = draw_tasks(town, recipe.written, ["unsafe"], seed_of_written)
        harmless = draw_tasks(town, recipe.refusals, HARMLESS, seed_of_written)
        found["written_safety"] = written_preferences(
            town, unsafe, annotators, axis="safety", flaws=["unsafe", "rude"], seed=seed
        )
        found["refusals"] = written_preferences(
            town, harmless, annotators, flaws=["refusal"], seed=seed
        )
        for name, some in found.items():
            write_json(folder / f"{name}.json", [asdict(pair) for pair in some])

    def read_pairs(self, name: str) -> list[Preference]:
        """Pairs of the stage ``preferences``."""
        return read_pairs([self.preferences()], name)

    def reward(self, axis: str) -> Artifact:
        """``helpfulness`` or ``safety``: a reward model of what annotators prefer."""
        sft, pairs = self.sft(), self.preferences()
        recipe: RewardRecipe = getattr(self.recipe.reward, axis)
        config = {"axis": axis, **asdict(recipe)}

        @self.stage(axis, config, [sft, pairs], "reward")
        def made(folder: Path) -> None:
            own = pairs_of_axis([pairs], axis, self.seed)
            held_out = self.read_pairs(f"held_out_{axis}")
            self.train_reward(folder, axis, sft, own, held_out, recipe)

        return made

    def train_reward(
        self,
        folder: Path,
        label: str,
        start: Artifact,
        pairs: Sequence[Preference],
        held_out: Sequence[Preference],
        recipe: RewardRecipe,
    ) -> None:
        """Train a reward model that starts from a chat model."""
        train, validation = (
            PreferenceDataset(
                some,
                self.tokenizer(),
                CONTEXT,
                margins=recipe.margins,
                seed=self.seed,
            )
            for some in (pairs, held_out)
        )
        data = PreferenceDataModule(train, validation, recipe.batch_size)
        module = RewardModule(
            start.path,
            recipe.peak_lr,
            recipe.safety_weight,
            recipe.likelihood_weight,
            recipe.next_token_weight,
        )
        n_steps = data.count_steps(recipe.epochs)
        self.train(folder, label, module, data, n_steps)

    def score(self, rewards: Sequence[Artifact] | None = None) -> Score:
        """Both reward models as one reward; unsafe requests are tagged.

        Args:
            rewards: of helpfulness and of safety; those of the tour if left out.
        """
        return combine(self.score_both(rewards), self._unsafe_prompts())

    def score_both(self, rewards: Sequence[Artifact] | None = None) -> ScoreBoth:
        """Both reward models."""
        found = rewards or [self.reward(axis) for axis in ("helpfulness", "safety")]
        models = [RewardModel.from_pretrained(made.path) for made in found]
        return model_scores(models[0], models[1], self.tokenizer())

    def _unsafe_prompts(self) -> set[str]:
        """What users say in the requests that are tagged as unsafe."""
        return {task.prompt for task in self.town.tasks("train", ["unsafe"])}

    def rejection(self) -> Artifact:
        """``rejection``: the ``sft`` model after its own best answers."""
        sft, recipe = self.sft(), self.recipe.rejection
        inputs = [sft, self.reward("helpfulness"), self.reward("safety")]

        modules = ("rejection", "ppo", "sft", "generation", "runtime.batches")

        @self.stage("rejection", asdict(recipe), inputs, *modules)
        def made(folder: Path) -> None:
            self.stages.say("rejection: the best of several answers")
            picks = self.pick_best(sft, self.score(), recipe, self.seed, self.seed)
            dialogs = [pick.dialog() for pick in picks]
            self.fine_tune(folder, "rejection", sft, dialogs, recipe)

        return made

    def pick_best(
        self,
        model: Artifact,
        score: Score,
        recipe: RejectionRecipe,
        seed: int,
        seed_of_requests: int,
        version: int = 0,
    ) -> list[Pick]:
        """The best answers of a model; unsafe requests have settings of their own."""
        fast = for_decoding(Llama.from_pretrained(model.path))
        requests = self.requests(recipe.requests, seed_of_requests)
        tagged, picks = self._unsafe_prompts(), []
        for how, is_unsafe in ((recipe.harmless, False), (recipe.unsafe, True)):
            picks += rejection_sample(
                fast,
                self.tokenizer(),
                [d for d in requests if (d[-1]["content"] in tagged) == is_unsafe],
                score,
                how.k,
                temperature=how.temperature,
                seed=seed,
                version=version,
            )
        return picks

    def requests(self, n_requests: int, seed: int) -> list[Dialog]:
        """Prompts of the training split, a quarter of them unsafe."""
        tasks = draw_tasks(self.town, n_requests, ASKED, seed)
        return [task.dialog() for task in tasks]

    def other_requests(
        self, learned: Sequence[Dialog], n_requests: int, seed: int
    ) -> list[Dialog]:
        """As `requests`, but none of those that are learned from.

        Of kinds with few requests, such as how-to, few are left, and come often.
        """
        random = Random(f"other requests {seed}")
        known = {dialog[-1]["content"] for dialog in learned}
        left = {
            kind: [
                task
                for task in self.town.tasks("train", [kind])
                if task.prompt not in known
            ]
            for kind in ASKED
        }
        kinds = [kind for kind in ASKED if left[kind]]
        return [
            random.choice(left[random.choice(kinds)]).dialog()
            for _ in range(n_requests)
        ]

    def ppo(self) -> Artifact:
        """``ppo``: the model of ``rejection`` after learning from rewards."""
        start, recipe = self.rejection(), self.recipe.ppo
        inputs = [start, self.reward("helpfulness"), self.reward("safety")]

        @self.stage("ppo", asdict(recipe), inputs, "ppo", "generation")
        def made(folder: Path) -> None:
            seeds = self.seed, self.seed + 2, self.seed + 3
            self.reinforce(folder, "ppo", start, self.score(), recipe, seeds)

        return made

    def reinforce(
        self,
        folder: Path,
        label: str,
        start: Artifact,
        score: Score,
        recipe: PPORecipe,
        seeds: tuple[int, int, int],
    ) -> None:
        """Train a model by PPO.

        Args:
            folder: of the model.
            label: for the progress bar.
            start: the model before.
            score: the reward.
            recipe: the numbers.
            seeds: of the answers, of the requests, and of those to validate on.
        """
        seed, seed_of_requests, seed_of_others = seeds
        learned = self.requests(recipe.requests, seed_of_requests)
        others = self.other_requests(learned, recipe.held_out_requests, seed_of_others)
        length = recipe.settings.max_new_tokens
        train, held_out = (
            PromptDataset(dialogs, self.tokenizer(), CONTEXT, length, seed)
            for dialogs in (learned, others)
        )
        data = PromptDataModule(train, held_out, recipe.batch_size)
        module = PPOModule(start.path, score, recipe.settings, seed)
        every = min(10, recipe.iterations)
        self.train(folder, label, module, data, recipe.iterations, every)

    def chat(self) -> Artifact:
        """``chat``: the model of ``ppo`` after Ghost Attention, the last stage."""
        start, recipe = self.ppo(), self.recipe.chat
        inputs = [start, self.reward("helpfulness"), self.reward("safety")]
        modules = (
            *("town", "chat", "generation", "sft", "ghost_attention", "ppo"),
            *("runtime.ghost", "runtime.batches"),
        )

        @self.stage("chat", asdict(recipe), inputs, *modules)
        def made(folder: Path) -> None:
            tokenizer = self.tokenizer()
            self.stages.say("chat: dialogues, and replies that obey")
            if not (folder / DIALOGS).is_file():
                model = for_decoding(Llama.from_pretrained(start.path))
                sampled = sample_ghosts(model, tokenizer, self.town, recipe, self.seed)
                kept = drop_unsafe(sampled, self.score_both())
                write_json(folder / DIALOGS, kept)
            data = ghost_data(read_ghosts(folder), tokenizer, recipe, self.seed)
            module = GhostAttentionModule(start.path, recipe.lr, recipe.warmup)
            self.train(folder, "chat", module, data, recipe.steps)

        return made

    def judgement(self) -> Artifact:
        """``judgement/stages.json``: what each stage won, by the oracle."""
        models = {
            "base": self.stages.base(),
            "sft": self.sft(),
            "rejection": self.rejection(),
            "ppo": self.ppo(),
            "chat": self.chat(),
        }
        rewards = [self.reward(axis) for axis in ("helpfulness", "safety")]

        @self.stage(
            "judgement",
            {},
            [*models.values(), *rewards],
            *("chat", "generation", "town", "reward", "ghost_attention"),
            *("runtime.judge", "runtime.ghost"),
        )
        def made(folder: Path) -> None:
            self.stages.say("judgement: what each stage won")
            evaluation, found = Evaluation(self.town, self.seed), {}
            obeyed, tokenizer = {}, self.tokenizer()
            for name, stage in models.items():
                model = for_decoding(Llama.from_pretrained(stage.path))
                answers = evaluation.answers(model, tokenizer)
                found[name] = evaluation.judge(answers)
                if name in ("ppo", "chat"):  # before and after Ghost Attention
                    obeyed[name] = adherence(
                        model, tokenizer, self.town, seed=self.seed
                    )
            stages: dict[str, Any] = {
                name: {"shares": evaluation.figures(judgement)}
                for name, judgement in found.items()
            }
            for name in ("rejection", "ppo", "chat"):
                against = evaluation.compare(found[name], found["sft"])
                stages[name]["against sft"] = against
            accuracy = {
                axis: self._accuracy(axis) for axis in ("helpfulness", "safety")
            }
            content = {"stages": stages, "accuracy": accuracy, "adherence": obeyed}
            write_json(folder / "stages.json", content)

        return made

    def _accuracy(self, axis: str) -> dict[str, Share]:
        """How many held-out pairs a reward model ranks right, by level that occurs."""
        pairs = self.read_pairs(f"held_out_{axis}")
        model = RewardModel.from_pretrained(self.reward(axis).path)
        scores = score_pairs(model, self.tokenizer(), pairs)
        counts = count_right(*scores, [pair.level for pair in pairs])
        return {level: share(*counts[level]) for level in LEVELS if level in counts}


def read_pairs(artifacts: Sequence[Artifact], name: str) -> list[Preference]:
    """Pairs for one purpose, of one collection or several."""
    return [
        Preference(**pair)
        for made in artifacts
        for pair in json.loads((made.path / f"{name}.json").read_text("utf-8"))
    ]


def pairs_of_axis(
    artifacts: Sequence[Artifact], axis: str, seed: int
) -> list[Preference]:
    """What the reward model of an axis is trained on."""
    own = read_pairs(artifacts, f"train_{axis}")
    if axis == "safety":
        own += read_pairs(artifacts, "written_safety")
    # both have to know that declining a harmless request helps nobody
    return mix_pairs(own, read_pairs(artifacts, "refusals"), 0.9, seed)


def finish_tour(
    folder: str | Path, seed: int = 0, base_recipe: str | Path | None = None
) -> dict[str, Any]:
    """Make the stages after the base model, print what each won, and note it.

    The figures are added to ``report.json``.
    """
    stages = Stages(folder, Recipe.read(base_recipe), seed)
    alignment = AlignmentStages(stages, AlignmentRecipe.read(), seed)
    alignment.judgement()
    report, seconds = note_gains(stages.folder)
    print_gains(report, seconds)
    return report


def note_gains(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Add to ``report.json`` what the stages after the base model won and took."""
    found = json.loads((folder / "judgement" / "stages.json").read_text("utf-8"))
    report: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    made = [name for name in STAGES if (folder / name).is_dir()]
    seconds = {name: read_seconds(folder / name) for name in made}
    report["minutes"] |= {name: value / 60 for name, value in seconds.items()}
    report |= found
    write_json(folder / "report.json", report)
    return report, seconds


def keep_gains(folder: str | Path) -> None:
    """The same, if there is a judgement, and it is of the base model that is there.

    `tour` has written a report of the base model alone.
    """
    folder = Path(folder)
    try:
        base, judgement = (
            json.loads((folder / name / RECORD).read_text("utf-8"))
            for name in ("base", "judgement")
        )
        is_of_this = judgement["inputs"]["base"] == base["key"]
    except (OSError, ValueError, KeyError):  # nothing was judged, or it is broken
        return
    if is_of_this:
        note_gains(folder)


def aligned(
    folder: str | Path | None = None, seed: int = 0, recipe: str | Path | None = None
) -> AlignmentStages:
    """The stages of the repository's tour, for chapters: each is made when asked for.

    Args:
        folder: of the tour; the repository's ``runs/tour`` if left out.
        seed: of these stages.
        recipe: a YAML file; configs/alignment.yaml if left out.
    """
    prepare_process()
    stages = Stages(folder or default_folder(), Recipe.read())
    return AlignmentStages(stages, AlignmentRecipe.read(recipe), seed)
