"""Reward models from folders, as one function of prompts and answers."""

from collections.abc import Collection
from pathlib import Path

import torch

from llama2_lite.model import LlamaConfig
from llama2_lite.ppo import combine, model_scores
from llama2_lite.rejection import Score
from llama2_lite.reward import RewardModel
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
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} is no model folder: no config.json in it"
            )
        if Tokenizer(folder / "tokenizer.model").sha256 != wanted:
            raise ValueError(
                f"the reward model {folder} has another tokenizer than the policy "
                f"{start}; train it from a model with the same one"
            )
    return folders


def open_reward(
    helpfulness: str | None,
    safety: str | None,
    start: str | Path,
    policy: LlamaConfig,
    safety_prompts: Collection[str],
    device: torch.device,
) -> Score:
    """The reward for an answer: of both models, see `llama2_lite.ppo`, or of one.

    Args:
        helpfulness, safety: folders of reward models; one may be None.
        start: folder of the policy, whose tokenizer they must have.
        policy: its sizes.
        safety_prompts: what users say in the tagged prompts.
        device: where to compute.

    Raises:
        FileNotFoundError, ValueError: see `check_reward_models`; also if a context is
            shorter than the policy's.
    """
    models = []
    for folder in check_reward_models(helpfulness, safety, start):
        model = RewardModel.from_pretrained(folder).to(device).eval()
        if model.config.max_seq_len < policy.max_seq_len:
            raise ValueError(
                f"the reward model {folder} has a context of "
                f"{model.config.max_seq_len}, shorter than {policy.max_seq_len}, which "
                "the policy may fill"
            )
        models.append(model)
    tokenizer = Tokenizer(Path(start) / "tokenizer.model")
    both = model_scores(models[0], models[-1], tokenizer)
    if len(models) == 2:
        return combine(both, safety_prompts)
    return lambda prompts, answers: both(prompts, answers)[0]
