"""`llama2-lite sft`, `reward`, `reject`, `ppo` and `gatt`: the road to a chat model.

Each starts from a model folder and files of one's own, and leaves a model folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from llama2_lite.chat import Dialog, answer
from llama2_lite.ghost_attention import GhostAttentionModule
from llama2_lite.model import Llama
from llama2_lite.ppo import PPOModule, PPOSettings
from llama2_lite.pretraining import LayOut, on_one_device
from llama2_lite.rejection import Score
from llama2_lite.reward import (
    UNKNOWN,
    RewardModel,
    RewardModule,
    count_right,
    score_pairs,
)
from llama2_lite.runtime.artifacts import write_json
from llama2_lite.runtime.command import TrainingCommand, as_texts
from llama2_lite.runtime.configs import check_ranges
from llama2_lite.runtime.dialogs import context_limit
from llama2_lite.runtime.file_data import (
    DialogFiles,
    FileData,
    PreferenceFiles,
    PromptFiles,
    folder_stamps,
)
from llama2_lite.runtime.rewards import (
    check_gate,
    check_reward_models,
    open_reward,
)
from llama2_lite.runtime.rollouts import unsharded
from llama2_lite.runtime.sampled_data import GhostData, RejectionData
from llama2_lite.runtime.talk import check_model_folder
from llama2_lite.runtime.training import TRAINER_DEFAULTS, KeepBest
from llama2_lite.sft import SupervisedModule


class AlignmentCommand(TrainingCommand):
    """A module that starts from a model folder, and data that goes with it.

    Attributes:
        start_key: the key of the module that takes the folder.
    """

    start_key: ClassVar[str] = "model.folder"
    trainer_defaults: ClassVar[dict[str, Any]] = TRAINER_DEFAULTS | {
        "val_check_interval": 100
    }
    not_decisive: ClassVar[tuple[str, ...]] = (
        "data.files",
        "data.start",
        "model.folder",
        "model.chat",
    )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What belongs to no class."""
        super().add_default_arguments_to_parser(parser)
        add = parser.add_argument
        add("--start", type=str, required=True, help="Folder of the model to train.")
        add("--skip-bad", action="store_true", help="Drop and count bad samples.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What follows from something else."""
        parser.link_arguments("start", self.start_key)
        parser.link_arguments("start", "data.start")
        parser.link_arguments("skip_bad", "data.skip_bad")
        parser.link_arguments("seed", "data.seed")

    def before_instantiate_classes(self) -> None:
        """Look for the model first: not every module could say where a run has it."""
        super().before_instantiate_classes()
        check_model_folder(Path(self.config.start))

    def run(self) -> None:
        """Say what was read, then train."""
        counts = ", ".join(
            f"{count:,} {name.replace('_', ' ')}"
            for name, count in self.datamodule.counts.items()
        )
        self.say(counts)
        if bad := self.datamodule.bad:
            self.say(f"dropped {len(bad):,} bad samples, the first: {bad[0]}")
        super().run()

    def say(self, text: str) -> None:
        """Print a line of any length, in one process."""
        if self.trainer.is_global_zero:
            self.console.print(text, soft_wrap=True, markup=False)

    def figures(self) -> dict[str, Any]:
        """What every result has."""
        best = next(
            call for call in self.trainer.callbacks if isinstance(call, KeepBest)
        )
        return {
            **self.datamodule.counts,
            "dropped": len(self.datamodule.bad),
            "steps": self.trainer.global_step,
            "best_step": best.best_step,
            "validation_loss": best.best_loss,
        }


class SupervisedCommand(AlignmentCommand):
    """`llama2-lite sft`."""

    name = "sft"
    module = SupervisedModule
    data: ClassVar[type[FileData]] = DialogFiles

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What belongs to no class."""
        super().add_default_arguments_to_parser(parser)
        add = parser.add_argument
        add("--prompts", type=str | list[str], default=[], help="What to answer last.")

    def prompts(self) -> list[Dialog]:
        """What to answer last."""
        texts = as_texts("prompts", self.config.prompts)
        return [[{"role": "user", "content": text}] for text in texts]

    def run(self) -> None:
        """Train, if the prompts can be answered: they are needed after all the work."""
        check = context_limit(self.tokenizer(), self.model.config.max_seq_len, 1)
        for dialog in self.prompts():
            try:
                check(dialog)
            except ValueError as error:
                text = dialog[0]["content"][:40]
                raise ValueError(f"prompts: {text!r}: {error}") from None
        super().run()

    def finish(self, folder: Path) -> None:
        """Answer the prompts, and say how well held-out answers are predicted."""
        if dialogs := self.prompts():
            model = Llama.from_pretrained(folder / "model")
            answers = answer(model, self.tokenizer(), dialogs, max_new_tokens=128)
            for dialog, text in zip(dialogs, answers, strict=True):
                print(f"\n{dialog[0]['content']}\n{text}")
        figures = self.figures()
        write_json(folder / "result.json", figures)
        print(
            f"\nvalidation loss {figures['validation_loss']:.4f} nats per token of the "
            f"answers; the model is in {folder / 'model'}"
        )


class RewardCommand(AlignmentCommand):
    """`llama2-lite reward`."""

    name = "reward"
    module = RewardModule
    data: ClassVar[type[FileData]] = PreferenceFiles
    start_key = "model.chat"

    def run(self) -> None:
        """Train, if there is something to learn of all that is weighed."""
        rated = set(chain.from_iterable(self.datamodule.dataset.is_safe))
        if self.model.safety_weight and rated == {UNKNOWN}:
            raise ValueError(
                "model.safety_weight has nothing to weigh: no pair of data.files has a "
                "safety_bin, which says whose answers are safe"
            )
        super().run()

    def finish(self, folder: Path) -> None:
        """Say how many held-out pairs the best model ranks as annotators did."""
        pairs = self.datamodule.held_out_pairs
        model = RewardModel.from_pretrained(folder / "model")
        scores = score_pairs(model, self.tokenizer(), pairs)
        right, total = count_right(*scores, [None] * len(pairs))[None]
        by_level = count_right(*scores, [pair.level for pair in pairs])
        figures = self.figures() | {
            "accuracy": right / total,
            "by_level": {
                str(level): {"right": counts[0], "pairs": counts[1]}
                for level, counts in by_level.items()
                if level is not None
            },
        }
        write_json(folder / "result.json", figures)
        for level, counts in figures["by_level"].items():
            print(f"{level}: {counts['right']} of {counts['pairs']} held-out pairs")
        print(
            f"accuracy {right / total:.3f} on {total} held-out pairs; the model is in "
            f"{folder / 'model'}"
        )


class RejectionCommand(SupervisedCommand):
    """`llama2-lite reject`."""

    name = "reject"
    data: ClassVar[type[FileData]] = RejectionData
    not_decisive: ClassVar[tuple[str, ...]] = (
        *AlignmentCommand.not_decisive,
        "data.folder",
        "data.sampler",
        "data.helpfulness",
        "data.safety",
        "data.safety_files",
        "data.earlier",
    )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What follows from something else."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("output", "data.folder")

    def finish(self, folder: Path) -> None:
        """Say also what was asked and what was chosen in vain."""
        super().finish(folder)
        if unanswered := self.datamodule.counts["unanswered"]:
            print(f"prompts without an answer of an end and content: {unanswered:,}")
        if too_long := self.datamodule.counts["too_long"]:
            longest = self.datamodule.sequence_length
            print(f"best answers left out, longer than {longest} tokens: {too_long:,}")


SETTINGS = PPOSettings()


class RewardedPPO(PPOModule):
    """PPO whose rewards come from reward models.

    Args:
        folder: of the chat model to start from.
        helpfulness, safety: folders of the reward models; one may be left out.
        settings: see `llama2_lite.ppo.PPOSettings`.
        seed: of the answers and of the order of the minibatches.
        rollout: what answers: a whole copy of the policy on each device, or, where
            that does not fit, unshard: the policy itself, see `unsharded`.
    """

    def __init__(
        self,
        folder: str,
        helpfulness: str | None = None,
        safety: str | None = None,
        settings: PPOSettings = SETTINGS,
        seed: int = 0,
        rollout: Literal["copy", "unshard"] = "copy",
    ):
        super().__init__(folder, self.no_reward, settings, seed)
        self.rollout = rollout
        self.reward_folders = check_reward_models(helpfulness, safety, folder)
        self.helpfulness, self.safety = helpfulness, safety

    def no_reward(self, prompts: list[Dialog], answers: list[str]) -> Tensor:
        """Stands for the reward until there is one."""
        raise RuntimeError("the reward models are opened when training starts")

    @contextmanager
    def sampler(self) -> Iterator[Llama]:
        """The policy to sample from, see `PPOModule.sampler`."""
        copied = self.rollout == "copy"
        with super().sampler() if copied else unsharded(self.model) as policy:
            yield policy

    def on_fit_start(self) -> None:
        """Open the reward models; in a function, they stay out of the checkpoints."""
        super().on_fit_start()
        self.reward = self.open_reward(self.lay_out)

    def open_reward(self, lay_out: LayOut[Any] = on_one_device) -> Score:
        """The reward, from models laid out so."""
        return open_reward(
            self.helpfulness,
            self.safety,
            self.folder,
            self.config,
            self.trainer.datamodule.safety_prompts,
            self.device,
            lay_out,
        )


class PPOCommand(AlignmentCommand):
    """`llama2-lite ppo`."""

    name = "ppo"
    module = RewardedPPO
    data: ClassVar[type[FileData]] = PromptFiles
    trainer_defaults: ClassVar[dict[str, Any]] = TRAINER_DEFAULTS | {
        "max_steps": 200,
        "val_check_interval": 10,
        "log_every_n_steps": 1,
    }
    not_decisive: ClassVar[tuple[str, ...]] = (
        *AlignmentCommand.not_decisive,
        "data.safety_files",
        "model.helpfulness",
        "model.safety",
    )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What follows from something else."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("seed", "model.seed")
        parser.link_arguments("model.settings.max_new_tokens", "data.max_new_tokens")

    def before_instantiate_classes(self) -> None:
        """Refuse what PPO has no use for."""
        super().before_instantiate_classes()
        model, files = self.config.model, self.config.data.safety_files
        check_gate(files, model.helpfulness, model.safety, "model.safety")
        settings, size = model.settings, self.config.data.batch_size
        check_ranges("model.settings", vars(settings))
        if size % settings.minibatch_size:
            raise ValueError(
                f"data.batch_size is {size}, but must be a multiple of "
                f"model.settings.minibatch_size, which is {settings.minibatch_size}"
            )
        for key in ("critic_lr", "lam"):
            if not settings.critic and settings[key] != getattr(SETTINGS, key):
                raise ValueError(
                    f"model.settings.{key} is of use to a value model only, and "
                    "model.settings.critic is false"
                )
        if self.config.device_batch is not None:
            raise ValueError(
                "ppo has no --device_batch: model.settings.minibatch_size says from "
                "how many answers it learns at a time, over all processes"
            )

    def describe(self) -> dict[str, Any]:
        """What decides the result, the reward models too."""
        stamps = [folder_stamps(path) for path in self.model.reward_folders]
        return super().describe() | {"source.rewards": stamps}

    def finish(self, folder: Path) -> None:
        """Compare the answers of the best model with those before."""
        module, prompts = self.model, self.datamodule.held_out.prompts
        reward = module.open_reward()  # whole: the other processes have gone
        rewards = []
        for path in (self.config.start, folder / "model"):
            module.model = Llama.from_pretrained(path).to(module.device)
            _, texts, _ = module.sample(prompts, seed=self.config.seed)
            dialogs = [prompt.dialog for prompt in prompts]
            rewards.append(reward(dialogs, texts).cpu())
        before, after = rewards
        figures = self.figures() | {
            "reward_before": before.mean().item(),
            "reward": after.mean().item(),
            "better": int((after > before).sum()),
            "worse": int((after < before).sum()),
        }
        write_json(folder / "result.json", figures)
        print(
            f"mean reward of {len(prompts)} held-out answers {before.mean():.3f} "
            f"before, {after.mean():.3f} after; {figures['better']} are better and "
            f"{figures['worse']} worse; the model is in {folder / 'model'}"
        )


class GhostCommand(AlignmentCommand):
    """`llama2-lite gatt`."""

    name = "gatt"
    module = GhostAttentionModule
    data: ClassVar[type[FileData]] = GhostData
    not_decisive: ClassVar[tuple[str, ...]] = (
        *AlignmentCommand.not_decisive,
        "data.folder",
        "data.sampler",
        "data.instructions",
    )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What follows from something else."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("output", "data.folder")

    def finish(self, folder: Path) -> None:
        """Say how many replies obeyed, and how well those held out are predicted."""
        figures = self.figures()
        write_json(folder / "result.json", figures)
        print(
            f"{figures['obeyed']:,} of {figures['replies']:,} sampled replies obeyed; "
            f"validation loss {figures['validation_loss']:.4f} nats per token of the "
            f"replies; the model is in {folder / 'model'}"
        )


COMMANDS: dict[str, type[AlignmentCommand]] = {
    command.name: command
    for command in (
        SupervisedCommand,
        RewardCommand,
        RejectionCommand,
        PPOCommand,
        GhostCommand,
    )
}
