"""Rejection sampling.

Exported from book/14_rejection.md, which explains every part. Edit it there,
then `make export`.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from math import comb, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from llama2_lite.chat import Dialog, answer, check_dialog
from llama2_lite.model import Llama
from llama2_lite.tokenizer import Tokenizer


def expected_best(scores: Tensor, n: int, values: Tensor | None = None) -> Tensor:
    """Expected score of the best of n of N samples, drawn without replacement.

    Exact: no draws are made. Where samples share a score, each of them is the best one
    equally often.

    Args:
        scores: (..., N); the last dimension is the samples of one prompt.
        n: from 1 to N.
        values: (..., N), of which to expect that of the sample with the best score;
            the scores themselves if left out.

    Returns:
        (...), float64.
    """
    scores = scores.double()
    n_samples = scores.shape[-1]
    _check_n(n, n_samples)
    # chance that all n drawn are among the lowest i of N
    chance = [comb(i, n) / comb(n_samples, n) for i in range(n_samples + 1)]
    table = torch.tensor(chance, dtype=torch.double, device=scores.device)
    ordered = scores.sort(-1).values
    below = torch.searchsorted(ordered, scores)
    up_to = torch.searchsorted(ordered, scores, right=True)
    weights = (table[up_to] - table[below]) / (up_to - below)
    values = scores if values is None else values.double()
    return torch.where(weights > 0, weights * values, 0).sum(-1)


def expected_median(scores: Tensor, n: int) -> Tensor:
    """Expected median of n of N samples, drawn without replacement; exact.

    Args:
        scores: (..., N).
        n: from 1 to N; where it is even, the mean of the two in the middle counts.

    Returns:
        (...), float64.
    """
    n_samples = scores.shape[-1]
    _check_n(n, n_samples)
    weights = [0.0] * n_samples
    for rank in ((n - 1) // 2, n // 2):  # how many of the n are lower
        for i in range(n_samples):  # the lowest but i of all N has this rank
            ways = comb(i, rank) * comb(n_samples - 1 - i, n - 1 - rank)
            weights[i] += ways / comb(n_samples, n) / 2
    table = torch.tensor(weights, dtype=torch.double, device=scores.device)
    ordered = scores.double().sort(-1).values
    return torch.where(table > 0, table * ordered, 0).sum(-1)


def _check_n(n: int, n_samples: int) -> None:
    if not 1 <= n <= n_samples:
        raise ValueError(
            f"cannot draw {n} of {n_samples} samples; choose 1 to {n_samples}"
        )


Score = Callable[[list[Dialog], list[str]], Tensor]  # prompts and answers to (B,)


def sample_answers(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Dialog],
    k: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 256,
    keep_cut: bool = True,
) -> list[list[str]]:
    """Draw K answers to each prompt.

    With a larger K the first answers stay what they were. Arguments are those of
    `llama2_lite.chat.answer`.

    Returns:
        For each prompt its K answers.

    Raises:
        ValueError: if K is below 1, or a prompt is none.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, but is {k}")
    drawn = answer(
        model,
        tokenizer,
        list(prompts) * k,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        keep_cut=keep_cut,
    )
    return [drawn[i :: len(prompts)] for i in range(len(prompts))]


def score_in_batches(
    score: Score, prompts: Sequence[Dialog], answers: Sequence[str], batch_size: int
) -> Tensor:
    """Score one answer to each prompt, (N,), those of like length together.

    Raises:
        ValueError: if a score is not finite, or there is not one for each answer.
    """
    sizes = [
        len(prompt[-1]["content"]) + len(text)
        for prompt, text in zip(prompts, answers, strict=True)
    ]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    scores = torch.empty(len(sizes))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        found = score([prompts[i] for i in rows], [answers[i] for i in rows])
        if found.shape != (len(rows),):
            raise ValueError(
                f"{len(rows)} answers got scores of shape {tuple(found.shape)}"
            )
        scores[rows] = found.float().cpu()
    for i in (~scores.isfinite()).nonzero().flatten().tolist():
        asked = prompts[i][-1]["content"]
        raise ValueError(
            f"the answer {answers[i]!r} to {asked!r} has the score {scores[i]:g}, "
            "which is no finite number"
        )
    return scores


def score_answers(
    score: Score,
    prompts: Sequence[Dialog],
    answers: Sequence[Sequence[str]],
    batch_size: int = 256,
) -> Tensor:
    """Score K answers to each of N prompts, (N, K).

    An answer that was drawn several times is scored once. One that is empty or contains
    a tag of the dialogue format has no place in a dialogue: minus infinity.

    Args:
        batch_size: answers scored at a time.

    Raises:
        ValueError: if there are no prompts, the numbers of their answers differ, or a
            score is not finite.
    """
    if not prompts:
        raise ValueError("there are no prompts whose answers could be scored")
    if len({len(texts) for texts in answers}) > 1 or len(answers) != len(prompts):
        raise ValueError("every prompt needs the same number of answers")
    drawn = [(i, text) for i, texts in enumerate(answers) for text in texts]
    pairs = [(i, text) for i, text in dict.fromkeys(drawn) if fits(prompts[i], text)]
    asked, texts = [prompts[i] for i, _ in pairs], [text for _, text in pairs]
    scores = score_in_batches(score, asked, texts, batch_size).tolist()
    found = dict(zip(pairs, scores, strict=True))
    values = [found.get(pair, float("-inf")) for pair in drawn]
    return torch.tensor(values).view(len(prompts), -1)


def fits(prompt: Dialog, text: str) -> bool:
    """Whether a text can stand in a dialogue as the answer to a prompt."""
    try:
        check_dialog([*prompt, {"role": "assistant", "content": text}])
    except ValueError:
        return False
    return True


class Pick(NamedTuple):
    """The answer to a prompt that was kept, and why.

    Attributes:
        prompt: ends with a message of the user.
        answer: of the assistant.
        score: that the reward model gave it.
        version: which version of the model wrote it.
    """

    prompt: Dialog
    answer: str
    score: float
    version: int = 0

    def dialog(self) -> Dialog:
        """Prompt and answer, to train on."""
        return [*self.prompt, {"role": "assistant", "content": self.answer}]


def best_of(
    prompts: Sequence[Dialog],
    answers: Sequence[Sequence[str]],
    scores: Tensor,
    version: int = 0,
) -> list[Pick]:
    """Keep the answer with the highest score, for each prompt.

    A prompt is left out if none of its answers can be trained on.

    Args:
        scores: from `score_answers`, (N, K).
        version: of the model that wrote the answers.

    Raises:
        ValueError: if all scores are the same, so that there is nothing to choose.
    """
    finite = scores[scores.isfinite()]
    if len(finite) > 1 and bool((finite == finite[0]).all()):
        raise ValueError(
            f"all {len(finite)} answers have the score {finite[0]:g}: there is no best "
            "one"
        )
    highest, places = scores.max(-1)
    return [
        Pick(prompt, texts[place], value, version)
        for prompt, texts, place, value in zip(
            prompts, answers, places.tolist(), highest.tolist(), strict=True
        )
        if isfinite(value)
    ]


def rejection_sample(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Dialog],
    score: Score,
    k: int,
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    version: int = 0,
) -> list[Pick]:
    """Draw K answers to each prompt, score those that end, and keep the best.

    Args:
        prompts: each ends with a message of the user.
        score: from prompts and answers to scores, (B,); higher is better.
        k: answers to each prompt.
        seed: of the answers; take another one in each round.
        version: of the model, noted in the picks.
    """
    answers = sample_answers(
        model,
        tokenizer,
        prompts,
        k,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        keep_cut=False,
    )
    return best_of(prompts, answers, score_answers(score, prompts, answers), version)


def best_temperature(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Dialog],
    score: Score,
    k: int,
    temperatures: Iterable[float],
    seed: int = 0,
) -> float:
    """The temperature at which the best of K answers scores highest on average.

    The paper finds it anew for each version (§3.2.3, Figure 8).
    """

    def reward(temperature: float) -> float:
        answers = sample_answers(
            model, tokenizer, prompts, k, temperature=temperature, seed=seed
        )
        return score_answers(score, prompts, answers).amax(-1).mean().item()

    return max(temperatures, key=reward)


def best_of_all_rounds(
    rounds: Iterable[Iterable[Pick]], score: Score, batch_size: int = 256
) -> list[Pick]:
    """Keep the best pick of each prompt from all rounds so far.

    Reward models of different rounds are not comparable, so that the newest one scores
    all of them again. Source: paper §3.2.3, for the versions after V3.
    """
    picks = [pick for picks in rounds for pick in picks]
    prompts, answers = [pick.prompt for pick in picks], [pick.answer for pick in picks]
    scores = score_in_batches(score, prompts, answers, batch_size)
    best: dict[str, Pick] = {}
    for pick, value in zip(picks, scores.tolist(), strict=True):
        key = json.dumps(pick.prompt)
        if key not in best or value > best[key].score:
            best[key] = pick._replace(score=value)
    return list(best.values())
