"""RLHF, round after round.

Exported from book/17_rlhf.md, which explains every part. Edit it there,
then `make export`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from llama2_lite.town import Preference


class Round(NamedTuple):
    """What is done for one version of the model.

    Attributes:
        number: of the version, from 1.
        all_rounds: fine-tune on the best answers of all rounds, not of this one alone.
        ppo: go on with PPO afterwards.
    """

    number: int
    all_rounds: bool
    ppo: bool


def plan_rounds(n_rounds: int, all_from: int = 4, ppo_from: int = 5) -> list[Round]:
    """The rounds of the paper: best answers of all rounds after V3, PPO after V4.

    Source: paper §3.2.3.

    Args:
        n_rounds: how many versions to make.
        all_from: first version that is tuned on the best answers of all rounds.
        ppo_from: first version with PPO.

    Raises:
        ValueError: if there are no rounds.
    """
    if n_rounds < 1:
        raise ValueError(f"there must be at least one round, not {n_rounds}")
    numbers = range(1, n_rounds + 1)
    return [Round(i, i >= all_from, i >= ppo_from) for i in numbers]


Model = TypeVar("Model")
Reward = TypeVar("Reward")
Pairs = TypeVar("Pairs")
Picks = TypeVar("Picks")


class Steps(Protocol[Model, Reward, Pairs, Picks]):
    """What a round is made of; `run_rounds` says in which order."""

    def collect(self, number: int, model: Model) -> Pairs:
        """Let annotators compare answers of a model."""

    def learn(self, number: int, pairs: Sequence[Pairs]) -> Reward:
        """Train reward models on the pairs of all rounds so far."""

    def sample(self, number: int, model: Model, reward: Reward) -> Picks:
        """Draw answers of a model and keep the best."""

    def tune(
        self, number: int, model: Model, picks: Sequence[Picks], reward: Reward
    ) -> Model:
        """Fine-tune a model on the best answers of one round or of several."""

    def reinforce(self, number: int, model: Model, reward: Reward) -> Model:
        """Train a model by PPO."""


class Version(NamedTuple, Generic[Model, Reward]):
    """What a round has made.

    Attributes:
        number: of the round.
        tuned: the model after rejection sampling.
        reward: the reward models that chose its answers.
        model: the model at the end of the round: after PPO if there was any.
    """

    number: int
    tuned: Model
    reward: Reward
    model: Model


def run_rounds(
    start: Model, steps: Steps[Model, Reward, Pairs, Picks], rounds: Sequence[Round]
) -> Iterator[Version[Model, Reward]]:
    """Improve a chat model round after round (paper §3.2).

    Args:
        start: the model after supervised fine-tuning.
        steps: how each step is done.
        rounds: from `plan_rounds`.

    Yields:
        One version for each round.
    """
    model = start
    pairs: list[Pairs] = []
    bags: list[Picks] = []
    for number, all_rounds, ppo in rounds:
        pairs.append(steps.collect(number, model))
        reward = steps.learn(number, pairs)
        bags.append(steps.sample(number, model, reward))
        bag = bags if all_rounds else bags[-1:]
        tuned = steps.tune(number, model, bag, reward)
        model = steps.reinforce(number, tuned, reward) if ppo else tuned
        yield Version(number, tuned, reward, model)


ScorePairs = Callable[[Sequence[Preference]], tuple[Tensor, Tensor]]


def accuracy_by_round(
    reward_models: Sequence[ScorePairs], rounds: Sequence[Sequence[Preference]]
) -> Tensor:
    """How many pairs of each round each reward model ranks as annotators did.

    Args:
        reward_models: from pairs to the scores of chosen and rejected answers, (N,).
        rounds: for each round pairs of its model's answers, which no reward model has
            been trained on.

    Returns:
        Shares, (reward models, rounds).

    Raises:
        ValueError: if a round has no pairs.
    """
    if not all(rounds):
        raise ValueError("a round without pairs has no accuracy")
    table = torch.empty(len(reward_models), len(rounds))
    for row, score in enumerate(reward_models):
        for column, pairs in enumerate(rounds):
            chosen, rejected = score(pairs)
            table[row, column] = (chosen > rejected).float().mean()
    return table
