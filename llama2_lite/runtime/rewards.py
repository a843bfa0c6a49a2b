"""Reward models from folders, as one function of prompts and answers."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llama2_lite.chat import Dialog
from llama2_lite.model import LlamaConfig
from llama2_lite.ppo import ScoreBoth, combine, model_scores
from llama2_lite.pretraining import LayOut, on_one_device
from llama2_lite.rejection import Score
from llama2_lite.reward import RewardConfig, RewardModel
from llama2_lite.runtime.talk import check_model_folder
from llama2_lite.tokenizer import Tokenizer


def check_reward_models(
    helpfulness: str | None, safety: str | None, start: str | Path
) -> list[Path]:
    """The folders of the reward models, if they fit a policy.

    Raises:
        FileNotFoundError: if there is no model in a folder.
        ValueError: if there is none, or one has another tokenizer.
    """
    folders = [Path(folder) for folder in (helpfulness, safety) if folder]
    if not folders:
        raise ValueError("there is no reward model: give helpfulness, safety or both")
    wanted = Tokenizer(Path(start) / "tokenizer.model").sha256
    for folder in folders:
        check_model_folder(folder, is_reward=True)
        if Tokenizer(folder / "tokenizer.model").sha256 != wanted:
            raise ValueError(
                f"the reward model {folder} has another tokenizer than the policy "
                f"{start}; train it from a model with the same one"
            )
    return folders


def check_gate(
    safety_files: Any, helpfulness: str | None, safety: str | None, key: str
) -> None:
    """Refuse prompts for which safety should decide where only helpfulness can.

    Args:
        key: that names a safety model.
    """
    if safety_files and helpfulness and not safety:
        raise ValueError(
            "data.safety_files holds prompts for which safety decides, but there is no "
            f"safety model: give {key}, or name the files in data.files"
        )


def open_frozen(folder: Path, lay_out: LayOut[Any]) -> RewardModel:
    """A reward model that does not learn, where a layout puts it."""
    config = RewardConfig.read(folder)

    def fill(model: RewardModel) -> None:
        head, place = model.head, model.head.weight
        # a single row cannot be divided evenly, which copying into its parts needs
        model.head = nn.Linear(config.dim, 1, bias=False, device=place.device)
        model.load_weights(folder)
        row = model.head.weight.detach()
        model.head = head
        if isinstance(place, DTensor):
            row = distribute_tensor(row, place.device_mesh, place.placements).to_local()
        part = place.to_local() if isinstance(place, DTensor) else place
        part.detach().copy_(row)

    model: RewardModel = lay_out(lambda: RewardModel(config), fill)
    return model.eval().requires_grad_(False)


def open_reward(
    helpfulness: str | None,
    safety: str | None,
    start: str | Path,
    policy: LlamaConfig,
    safety_prompts: Collection[str],
    device: torch.device,
    lay_out: LayOut[Any] = on_one_device,
) -> Score:
    """The reward for an answer: of both models, see `llama2_lite.ppo`, or of one.

    Args:
        helpfulness, safety: folders of reward models; one may be None.
        start: folder of the policy, whose tokenizer they must have.
        policy: its sizes.
        safety_prompts: what users say in the tagged prompts.
        device: where to compute.
        lay_out: how the models are divided among processes.

    Raises:
        FileNotFoundError, ValueError: see `check_reward_models`; also if a context is
            shorter than the policy's. The reward raises what `finite_scores` does.
    """
    models: list[Any] = []
    folders = check_reward_models(helpfulness, safety, start)
    for folder in folders:
        model = open_frozen(folder, lay_out).to(device)
        if model.config.max_seq_len < policy.max_seq_len:
            raise ValueError(
                f"the reward model {folder} has a context of "
                f"{model.config.max_seq_len}, shorter than {policy.max_seq_len}, which "
                "the policy may fill"
            )
        models.append(model)
    tokenizer = Tokenizer(Path(start) / "tokenizer.model")
    first, second = (*models, nothing)[:2]
    both = finite_scores(model_scores(first, second, tokenizer), folders)
    if len(models) == 2:
        return combine(both, safety_prompts)
    return lambda prompts, answers: both(prompts, answers)[0]


def nothing(tokens: Tensor, *rest: Tensor) -> Tensor:
    """Stands for a second reward model where there is none: zeros, (N, T)."""
    return torch.zeros_like(tokens)


def finite_scores(score_both: ScoreBoth, folders: list[Path]) -> ScoreBoth:
    """Scores of reward models, (N,) each, which end the run if one is of no use.

    Not a number is never below the gate, so that safety would no longer be asked for.

    Raises:
        ValueError: if a score is not finite; the sentence names the model's folder.
    """

    def score(prompts: list[Dialog], answers: list[str]) -> tuple[Tensor, Tensor]:
        found = score_both(prompts, answers)
        for folder, scores in zip(folders, found, strict=False):
            if not scores.isfinite().all():
                bad = scores[~scores.isfinite()]
                raise ValueError(
                    f"the reward model {folder} gives {len(bad)} of {len(scores)} "
                    f"answers a score such as {bad[0]:g}, which is no finite number; "
                    "train it anew"
                )
        return found

    return score
