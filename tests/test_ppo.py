"""PPO: its formulas by hand and by loops, its rollouts, and its runs."""

import csv
import math
import socket
from dataclasses import fields, replace
from itertools import product
from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from safetensors.torch import load_file
from tiny_ppo import (
    dialogs,
    make_training,
    reward,
    train,
    train_and_die,
    train_as_one_of,
    weights,
    write_model,
)
from tiny_training import KILLED, in_process

from llama2_lite.chat import encode_dialog
from llama2_lite.generation import generate
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.ppo import (
    PPOModule,
    PPOSettings,
    PromptDataset,
    answer_logprobs,
    combine,
    combined_reward,
    generalized_advantages,
    hidden_states,
    lengths_of,
    model_scores,
    oracle_scores,
    policy_loss,
    rollout_copy,
    value_loss,
    whiten,
)
from llama2_lite.reward import RewardModel, pad_rows
from llama2_lite.scaling import Layout
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import Oracle, build_town

Tensor = torch.Tensor


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def draw_mask(seed: int, n_rows: int, n_tokens: int) -> Tensor:
    """Answers of one token or more, anywhere in their rows but at the start."""
    random = torch.Generator().manual_seed(seed)
    ends = torch.randint(2, n_tokens + 1, (n_rows,), generator=random)
    starts = (torch.rand(n_rows, generator=random) * (ends - 1)).long() + 1
    places = torch.arange(n_tokens)
    return (places >= starts[:, None]) & (places < ends[:, None])


SIZES = {
    "seed": st.integers(0, 10**6),
    "n_rows": st.integers(1, 5),
    "n_tokens": st.integers(2, 9),
}


# The combined reward


def test_safety_counts_where_it_is_at_stake():
    gate = math.log(0.15 / 0.85)
    helpfulness = torch.tensor([3.0, 3.0, 3.0, -4.0])
    safety = torch.tensor([gate - 0.01, gate + 0.01, 5.0, 5.0])
    tagged = torch.tensor([False, False, True, False])
    expected = torch.tensor([gate - 0.01, 3.0, 5.0, -4.0])
    assert torch.equal(combined_reward(helpfulness, safety, tagged), expected)


@given(seed=SIZES["seed"], n=st.integers(1, 8))
def test_combined_reward_is_the_formula_of_the_paper(seed, n):
    helpfulness, safety, tags = draw(seed, 3, n) * 3
    for h, s, tag, found in zip(
        helpfulness,
        safety,
        tags > 0,
        combined_reward(helpfulness, safety, tags > 0),
        strict=True,
    ):
        r_h, r_s = 1 / (1 + math.exp(-h)), 1 / (1 + math.exp(-s))
        r_c = r_s if tag or r_s < 0.15 else r_h
        assert math.isclose(
            math.log(r_c / (1 - r_c)), found, rel_tol=1e-6, abs_tol=1e-9
        )


def test_whitening_by_hand():
    scores = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, variance (4 + 1 + 0 + 9) / 4
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / 3.5**0.5
    torch.testing.assert_close(whiten(scores), expected)
    mask = torch.tensor([True, True, True, False])
    expected = torch.tensor([-1.0, 0.0, 1.0, 0.0]) / (2 / 3) ** 0.5
    torch.testing.assert_close(whiten(scores, mask), expected)


@given(seed=SIZES["seed"], n=st.integers(2, 50), shift=st.floats(-100, 100))
def test_whitening_has_mean_0_and_variance_1(seed, n, shift):
    white = whiten(draw(seed, n) * 7 + shift)
    assert abs(white.mean()) < 1e-4
    assert abs(white.square().mean() - 1) < 1e-4


@given(**SIZES)
def test_whitening_token_by_token(seed, n_rows, n_tokens):
    mask = draw_mask(seed, n_rows, n_tokens)
    scores = draw(seed, n_rows, n_tokens) * 7 + 3
    places = [tuple(place) for place in mask.nonzero().tolist()]
    assume(len(places) > 1)
    mean = sum(scores[place].item() for place in places) / len(places)
    squares = [(scores[place].item() - mean) ** 2 for place in places]
    deviation = math.sqrt(sum(squares) / len(places))
    white = whiten(scores, mask)
    for place in product(range(n_rows), range(n_tokens)):
        inside = place in places
        expected = (scores[place].item() - mean) / deviation if inside else 0.0
        assert white[place].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, math.nan, 2.0], "1 of 3 rewards are not finite"),
        ([1.0, math.inf, -math.inf], "2 of 3 rewards are not finite"),
        ([2.0, 2.0], "all 2 rewards are equal"),
        ([], "all 0 rewards are equal"),
    ],
)
def test_rewards_without_information_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        whiten(torch.tensor(scores))


# Advantages


def test_advantages_by_hand():
    # Two tokens with gamma 0.5 and lambda 0.5; the last one is rewarded with 4.
    rewards = torch.tensor([[0.0, 1.0, 4.0, 9.0]])
    values = torch.tensor([[7.0, 2.0, 3.0, 8.0]])
    mask = torch.tensor([[False, True, True, False]])
    # last: 4 - 3 = 1; first: 1 + 0.5 * 3 - 2 = 0.5, plus 0.25 * 1
    advantages, returns = generalized_advantages(
        rewards, values, mask, gamma=0.5, lam=0.5
    )
    assert advantages.tolist() == [[0, 0.75, 1, 0]]
    assert returns.tolist() == [[0, 2.75, 4, 0]]
    # a value of 2 beyond the end: 4 + 0.5 * 2 - 3 = 2; 0.5 + 0.25 * 2 = 1
    advantages, _ = generalized_advantages(
        rewards, values, mask, gamma=0.5, lam=0.5, bootstrap=torch.tensor([2.0])
    )
    assert advantages.tolist() == [[0, 1, 2, 0]]


@given(**SIZES, gamma=st.floats(0, 1), lam=st.floats(0, 1))
def test_advantages_are_sums_of_surprises(seed, n_rows, n_tokens, gamma, lam):
    rewards, values = draw(seed, 2, n_rows, n_tokens)
    mask, bootstrap = draw_mask(seed, n_rows, n_tokens), draw(seed + 1, n_rows)
    advantages, returns = generalized_advantages(
        rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap
    )
    for row in range(n_rows):
        places = mask[row].nonzero()[:, 0].tolist()
        surprises = []
        for t in places:
            after = bootstrap[row] if t == places[-1] else values[row, t + 1]
            surprises.append(rewards[row, t] + gamma * after - values[row, t])
        for i, t in enumerate(places):
            expected = sum(
                (gamma * lam) ** k * surprise
                for k, surprise in enumerate(surprises[i:])
            )
            assert math.isclose(advantages[row, t], expected, abs_tol=1e-9)
            assert math.isclose(
                returns[row, t], expected + values[row, t], abs_tol=1e-9
            )
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


@given(**SIZES, padding=st.integers(1, 4))
def test_padding_changes_no_advantage(seed, n_rows, n_tokens, padding):
    rewards, values = draw(seed, 2, n_rows, n_tokens)
    mask = draw_mask(seed, n_rows, n_tokens)
    bare = generalized_advantages(rewards, values, mask)
    noise = draw(seed + 2, 2, n_rows, padding)
    wide = generalized_advantages(
        torch.cat([rewards, noise[0]], 1),
        torch.cat([values, noise[1]], 1),
        torch.cat([mask, torch.zeros(n_rows, padding, dtype=torch.bool)], 1),
    )
    for one, other in zip(bare, wide, strict=True):
        assert torch.equal(one, other[:, :n_tokens])


# Losses


def test_policy_loss_by_hand():
    # ratios 1, 1.5 and 0.5, once with a gain and once with a loss each
    old = torch.zeros(1, 6)
    now = torch.tensor([[1.0, 1.5, 0.5, 1.0, 1.5, 0.5]]).log()
    gains = torch.tensor([[1.0, 1, 1, -1, -1, -1]])
    # 1, 1.2 (clipped), 0.5, -1, -1.5, -0.8 (clipped): the lower of the two each time
    mask = torch.ones(1, 6, dtype=torch.bool)
    loss = policy_loss(now, old, gains, mask, clip=0.2)
    assert math.isclose(loss, -(1 + 1.2 + 0.5 - 1 - 1.5 - 0.8) / 6, rel_tol=1e-6)


@given(**SIZES)
def test_losses_are_those_of_loops(seed, n_rows, n_tokens):
    now, old, gains, wanted = draw(seed, 4, n_rows, n_tokens)
    mask = draw_mask(seed, n_rows, n_tokens)
    policy, value = [], []
    for row, t in mask.nonzero().tolist():
        ratio = math.exp(now[row, t] - old[row, t])
        gain = float(gains[row, t])
        policy.append(-min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain))
        near = float(old[row, t]) + min(
            max(float(now[row, t] - old[row, t]), -0.2), 0.2
        )
        value.append(
            max((now[row, t] - wanted[row, t]) ** 2, (near - wanted[row, t]) ** 2)
        )
    found = policy_loss(now, old, gains, mask)
    assert math.isclose(found, sum(policy) / len(policy), rel_tol=1e-9)
    found = value_loss(now, old, wanted, mask)
    assert math.isclose(found, sum(value) / len(value) / 2, rel_tol=1e-9)


def test_gradient_of_the_policy_loss():
    old = torch.zeros(1, 5)
    now = torch.tensor([[1.0, 1.5, 1.5, 0.5, 0.5]]).log().requires_grad_()
    gains = torch.tensor([[2.0, 1, -1, 1, -1]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    policy_loss(now, old, gains, mask).backward()
    # at ratio 1 the policy gradient; beyond the clip only what leads back
    expected = torch.tensor([[-2.0, 0, 1.5, -0.5, 0]]) / 5
    torch.testing.assert_close(now.grad, expected)


def test_zero_advantages_give_a_zero_gradient():
    now, old = draw(0, 2, 3, 4)
    now.requires_grad_()
    mask = torch.ones(3, 4, dtype=torch.bool)
    policy_loss(now, old, torch.zeros(3, 4).double(), mask).backward()
    assert not now.grad.any()


def test_value_loss_by_hand():
    # wanted 1; from 0 the value moved to 0.1, to 0.5 and to 3
    now, old = torch.tensor([[0.1, 0.5, 3.0]]), torch.zeros(1, 3)
    mask = torch.ones(1, 3, dtype=torch.bool)
    # 0.9^2; clipped at 0.2, 0.8^2 is worse than 0.5^2; 2^2 is worse than 0.8^2
    loss = value_loss(now, old, torch.ones(1, 3), mask)
    assert math.isclose(loss, (0.81 + 0.64 + 4) / 6, rel_tol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda flat, column: combined_reward(flat, column, flat > 0),
        lambda flat, column: combined_reward(flat, flat, column > 0),
        lambda flat, column: whiten(flat, column > 0),
        lambda flat, column: generalized_advantages(
            column, column, column > 0, bootstrap=column
        ),
        lambda flat, column: generalized_advantages(column, column, column.T > 0),
        lambda flat, column: policy_loss(flat, column, flat, flat > 0),
        lambda flat, column: policy_loss(flat, flat, flat, column > 0),
        lambda flat, column: value_loss(flat, flat, column, flat > 0),
        lambda flat, column: value_loss(flat, flat, flat, column > 0),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call):
    flat = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"must have one shape, but are .*\(3, 1\)"):
        call(flat, flat[:, None])


# Rollouts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("ppo"))


@pytest.fixture
def module(folder):
    module = PPOModule(folder, reward, PPOSettings(max_new_tokens=24), seed=3)
    module.configure_model()
    torch.manual_seed(1)
    torch.nn.init.normal_(module.critic.head.weight)
    return module


def make_prompts(folder, n=16):
    tokenizer = Tokenizer(folder / "tokenizer.model")
    return PromptDataset(dialogs(n), tokenizer, 96, 24).prompts


def test_rollout_holds_what_was_sampled(module, folder):
    prompts = make_prompts(folder)
    rollout = module.collect(prompts, seed=5)
    ids = [prompt.ids for prompt in prompts]
    eos = module.tokenizer.eos_id
    drawn = generate(module.model, ids, max_new_tokens=24, stop_ids=[eos], seed=5)
    assert rollout.finished.tolist() == drawn.finished
    assert rollout.finished.any()
    assert not rollout.finished.all()
    for row, mask in enumerate(rollout.response_mask):
        assert rollout.ids[row][mask].tolist() == drawn.ids[row]
        start = int(mask.nonzero()[0])
        assert rollout.ids[row, :start].tolist() == ids[row]
        torch.testing.assert_close(
            rollout.logprobs[row][mask],
            torch.tensor(drawn.logprobs[row]),
            atol=1e-5,
            rtol=0,
        )


def test_first_minibatch_has_ratios_of_one_and_no_divergence(module, folder):
    rollout = module.collect(make_prompts(folder), seed=5)
    assert torch.equal(rollout.logprobs, rollout.reference_logprobs)
    part = rollout.rows(torch.tensor([7, 2, 11, 0]))
    now = answer_logprobs(module.model, part.ids, part.response_mask)
    torch.testing.assert_close(now, part.logprobs, atol=1e-5, rtol=0)
    loss, _ = module.losses(part)
    expected = -part.advantages[part.response_mask].mean()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)


def test_the_end_of_an_answer_is_rewarded_and_a_cut_one_goes_on(module, folder):
    prompts = make_prompts(folder)
    rollout = module.collect(prompts, seed=5)
    finished, mask = rollout.finished, rollout.response_mask
    texts = [
        text for text, ended in zip(module.answers, finished, strict=True) if ended
    ]
    asked = [p.dialog for p, ended in zip(prompts, finished, strict=True) if ended]
    torch.testing.assert_close(rollout.scores[finished], reward(asked, texts))
    assert rollout.scores[~finished].isnan().all()
    last = torch.arange(len(mask)), mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    white = (
        rollout.scores[finished] - rollout.scores[finished].mean()
    ) / rollout.scores[finished].std(correction=0)
    torch.testing.assert_close(rollout.rewards[last][finished], white)
    assert (rollout.rewards[last][~finished] == -1).all()
    after = module.critic(rollout.ids, lengths_of(mask))[last].detach()
    expected = rollout.rewards[last] + after * ~finished - rollout.values[last]
    torch.testing.assert_close(rollout.advantages[last], expected)
    assert (rollout.ids[last] == module.tokenizer.eos_id).equal(finished)


def test_divergence_from_the_reference_costs(module, folder):
    for parameter in module.model.parameters():
        parameter.data *= 1.3
    rollout = module.collect(make_prompts(folder), seed=5)
    mask = rollout.response_mask.clone()
    assert not torch.equal(rollout.logprobs, rollout.reference_logprobs)
    last = torch.arange(len(mask)), mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    mask[last] = False
    penalty = -0.05 * (rollout.logprobs - rollout.reference_logprobs)
    torch.testing.assert_close(rollout.rewards[mask], penalty[mask])


def test_what_is_logged_is_of_answer_tokens_alone(module, folder):
    for parameter in module.model.parameters():
        parameter.data *= 1.3
    rollout = module.collect(make_prompts(folder), seed=5)
    wide = {
        field.name: F.pad(value, (0, 9))
        for field in fields(rollout)
        if (value := getattr(rollout, field.name)).ndim == 2
    }
    wider = replace(rollout, **wide)
    found: list[dict[str, Tensor]] = []
    module.log_dict = found.append
    for one in (rollout, wider):
        module.log_iteration(one, torch.zeros(4))
    rows = list(zip(rollout.logprobs, rollout.reference_logprobs, strict=True))
    each = [
        [(a - b).double()[mask].sum(), a.double()[mask].sum(), mask.sum()]
        for (a, b), mask in zip(rows, rollout.response_mask, strict=True)
    ]
    divergence, logprobs, tokens = torch.tensor(each).double().sum(0)
    assert abs(divergence) > 0.1
    expected = {
        "kl": divergence / len(rows),
        "entropy": -logprobs / tokens,
        "answer_tokens": tokens / len(rows),
    }
    for logged in found:
        for name, value in expected.items():
            torch.testing.assert_close(logged[name].double(), value, rtol=1e-4, atol=0)


def test_padding_and_neighbours_change_nothing(module, folder):
    prompts = make_prompts(folder)
    rollout = module.collect(prompts, seed=5)
    mask, ids = rollout.response_mask, rollout.ids
    assert (~mask[:, -1]).any()
    lengths = lengths_of(mask)
    padding = torch.arange(ids.shape[1]) >= lengths[:, None]
    other = ids.masked_fill(padding, 7)
    for ours, theirs in (
        (answer_logprobs(module.model, other, mask), rollout.logprobs),
        (
            module.critic(other, lengths)[~padding],
            module.critic(ids, lengths)[~padding],
        ),
    ):
        assert torch.equal(ours, theirs)
    for row in range(4):
        alone = rollout.rows(torch.tensor([row]))
        assert alone.ids.shape[1] == lengths[row]
        found = answer_logprobs(module.model, alone.ids, alone.response_mask)
        torch.testing.assert_close(found, alone.logprobs, atol=1e-5, rtol=0)


def test_prompt_tokens_are_never_learnt(module, folder):
    prompts = make_prompts(folder)
    rollout = module.collect(prompts, seed=5)
    mask_before = rollout.response_mask.clone()
    for prompt, mask in zip(prompts, rollout.response_mask, strict=True):
        assert not mask[: len(prompt.ids)].any()
        assert mask[len(prompt.ids)]
    for name in ("logprobs", "reference_logprobs", "values", "rewards", "advantages"):
        assert not getattr(rollout, name)[~rollout.response_mask].any(), name
    # the same answers to prompts that differ in a token
    drawn = module.sample(prompts, seed=5)
    module.sample = lambda prompts, seed, rows: drawn
    changed = [p._replace(ids=[*p.ids[:3], 9, *p.ids[4:]]) for p in prompts]
    again = module.collect(changed, seed=5)
    assert torch.equal(again.response_mask, mask_before)
    assert not torch.equal(again.ids, rollout.ids)


def test_a_single_ended_answer_has_nothing_to_be_compared_with(module, folder):
    rollout = module.collect(make_prompts(folder), seed=5)
    parts = [
        getattr(rollout, name)
        for name in ("ids", "response_mask", "logprobs", "reference_logprobs")
    ]
    finished = torch.zeros_like(rollout.finished)
    finished[2] = True
    values = torch.zeros_like(rollout.values)
    with pytest.raises(ValueError, match="1 of 16 answers ended within 24 tokens"):
        module.judge(*parts, values, rollout.scores, finished)


def test_a_copy_in_half_precision_leaves_the_policy_as_it_is(module, folder):
    prompts = [prompt.ids for prompt in make_prompts(folder)]
    before = {name: p.clone() for name, p in module.model.named_parameters()}
    copy = rollout_copy(module.model, torch.bfloat16)
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16}
    drawn = generate(copy, prompts, max_new_tokens=24, seed=5)
    rows = [prompt + ids for prompt, ids in zip(prompts, drawn.ids, strict=True)]
    ids, lengths = pad_rows(rows)
    places = torch.arange(ids.shape[1])
    starts = torch.tensor([[len(prompt)] for prompt in prompts])
    mask = (places >= starts) & (places < lengths[:, None])
    with torch.no_grad():
        exact = answer_logprobs(module.model, ids, mask)[mask]
    found = torch.tensor([p for row in drawn.logprobs for p in row])
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0)
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_under_autocast_ratios_are_one_and_near_what_was_sampled(module, folder):
    prompts = make_prompts(folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollout = module.collect(prompts, seed=5)
        part = rollout.rows(torch.tensor([7, 2, 11, 0]))
        now = answer_logprobs(module.model, part.ids, part.response_mask).detach()
    ratio = (now - part.logprobs)[part.response_mask].exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=0.02, rtol=0)
    ids, eos = [prompt.ids for prompt in prompts], [module.tokenizer.eos_id]
    drawn = generate(module.model, ids, max_new_tokens=24, stop_ids=eos, seed=5)
    sampled = torch.tensor([p for row in drawn.logprobs for p in row])
    apart = (rollout.logprobs[rollout.response_mask] - sampled).abs()
    assert 0 < apart.mean() < 0.01


def test_on_a_cpu_answers_are_sampled_exactly(module):
    with torch.autocast("cpu", dtype=torch.bfloat16), module.sampler() as policy:
        assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_rows_keep_every_field(module, folder):
    rollout = module.collect(make_prompts(folder), seed=5)
    part = rollout.rows(torch.tensor([3, 1]))
    for field in fields(rollout):
        whole, some = getattr(rollout, field.name), getattr(part, field.name)
        cut = whole[[3, 1]][:, : some.shape[1]] if some.dim() > 1 else whole[[3, 1]]
        assert torch.equal(some.nan_to_num(), cut.nan_to_num()), field.name


def test_without_a_critic_the_return_is_the_advantage(folder):
    settings = PPOSettings(max_new_tokens=24, critic=False)
    module = PPOModule(folder, reward, settings)
    module.configure_model()
    rollout = module.collect(make_prompts(folder), seed=5)
    to_go = rollout.rewards.flip(1).cumsum(1).flip(1)
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.advantages[mask], to_go[mask])
    assert not hasattr(module, "critic")


# Rows that share windows


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 10**6))
@settings(max_examples=30)
def test_hidden_states_and_gradients_are_those_of_padded_rows(lengths, seed):
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(16, 2, 4, 2, 50, 24, max_seq_len=64)).double()
    ids = torch.randint(50, (len(lengths), max(lengths)))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    weights = torch.randn(*ids.shape, 16).double()
    found = {}
    for name, hidden in (
        ("padded", model(ids, return_hidden=True)),
        ("shared", hidden_states(model, ids, torch.tensor(lengths))),
    ):
        (hidden * weights)[real].sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if n[:3] != "out"}
        found[name] = hidden[real].detach(), gradients
        model.zero_grad()
    torch.testing.assert_close(found["shared"], found["padded"])


@pytest.mark.parametrize("full", [False, True])
def test_little_is_computed_for_padding(full):
    model = Llama(LlamaConfig(16, 2, 4, 2, 50, 24, max_seq_len=96))
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(85 if full else 10, 91, (64,), generator=random)
    ids = torch.randint(50, (64, 90), generator=random)
    computed = []
    model.layers[0].register_forward_pre_hook(
        lambda layer, given: computed.append(given[0].shape[0] * given[0].shape[1])
    )
    hidden_states(model, ids, lengths)
    assert computed[0] < 1.1 * lengths.sum()
    assert (computed[0] == ids.numel()) == full


def test_lengths_are_those_up_to_the_ends_of_answers():
    mask = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]]).bool()
    assert lengths_of(mask).tolist() == [2, 4, 3]


# Rewards


def test_two_reward_models_score_as_they_do_alone(folder):
    tokenizer = Tokenizer(folder / "tokenizer.model")
    helpful, safe = (RewardModel.from_chat(folder, weight) for weight in (1.0, 0.0))
    torch.manual_seed(2)
    for model in (helpful, safe):
        torch.nn.init.normal_(model.head.weight)
    asked = dialogs(5)
    answers = ["It is 1.", "It is 22, or so.", "No", "It", "It is 3. It is 4."]
    found = model_scores(helpful, safe, tokenizer)(asked, answers)
    whole = [
        [*dialog, {"role": "assistant", "content": text}]
        for dialog, text in zip(asked, answers, strict=True)
    ]
    for scores, model in zip(found, (helpful, safe), strict=True):
        torch.testing.assert_close(
            scores, model.score(tokenizer, whole), atol=1e-5, rtol=0
        )
    assert (
        model_scores(helpful, safe, tokenizer)(asked[:2], ["", "[INST]"])[0]
        .isfinite()
        .all()
    )
    tagged = [asked[1][0]["content"]]
    rewards = combine(model_scores(helpful, safe, tokenizer), tagged)(asked, answers)
    is_safety = torch.tensor([False, True, False, False, False])
    torch.testing.assert_close(rewards, combined_reward(*found, is_safety))


def test_the_oracle_as_reward_knows_good_from_bad():
    town = build_town(n_people=12)
    unsafe = town.tasks("train", ["unsafe"])[0]
    fact = town.tasks("train", ["fact"])[0]
    bad = [
        town.bad_answer(unsafe, "unsafe", Random(0)),
        town.bad_answer(fact, "wrong", Random(0)),
    ]
    score = combine(oracle_scores(Oracle(town)), [unsafe.prompt])
    asked = [unsafe.dialog(), fact.dialog()]
    good = score(asked, [unsafe.reference, fact.reference])
    assert (good > score(asked, bad)).all()


# Runs


def final_state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_reward_rises_and_the_reference_stays(folder, tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.rewards, self.divergences = [], []

        def on_train_batch_end(self, trainer, module, *rest):
            self.rewards.append(float(trainer.callback_metrics["reward"]))
            self.divergences.append(float(trainer.callback_metrics["kl"]))

    watch = Watch()
    sizes = {"iterations": 5, "batch_size": 60, "minibatch_size": 20}
    trainer, module, _ = train(folder, tmp_path, [watch], lr=3e-3, **sizes)
    assert trainer.global_step == 5 == len(watch.rewards)
    assert watch.rewards[-1] > watch.rewards[0] + 5
    assert watch.divergences[0] == 0 < watch.divergences[-1]
    start = Llama.from_pretrained(folder)
    for name, tensor in module.frozen[0].state_dict().items():
        assert torch.equal(tensor, start.state_dict()[name])
    assert not any(name.startswith("frozen") for name in module.state_dict())
    assert not torch.equal(module.model.output.weight, start.output.weight)


@pytest.mark.parametrize("iteration", [1, 3])
def test_killed_and_resumed_is_never_killed(folder, tmp_path, iteration):
    _, whole, _ = train(folder, tmp_path / "whole")
    assert in_process(train_and_die, folder, tmp_path / "killed", iteration) == KILLED
    _, resumed, _ = train(folder, tmp_path / "killed")
    expected, found = final_state(whole), final_state(resumed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    logs = [tmp_path / name / "logs" / "metrics.csv" for name in ("whole", "killed")]
    assert logs[0].read_text() == logs[1].read_text()


def test_two_processes_do_what_one_does(folder, tmp_path):
    settings = {"iterations": 4, "critic_lr": 1e-3}
    _, module, _ = train(folder, tmp_path / "one", **settings)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    layouts = {"copies": Layout(shard=1), "shards": Layout(), "tensor": Layout(0, 2)}
    layouts["compiled"] = Layout(checkpoint_activations=True, compile=True)
    cases = {name: (layout, settings) for name, layout in layouts.items()}
    torch.multiprocessing.spawn(
        train_as_one_of, (2, port, folder, tmp_path, cases), nprocs=2
    )
    expected = weights(module)
    start = Llama.from_pretrained(folder)
    assert not torch.equal(expected["model.output.weight"], start.output.weight)
    one = read_log(tmp_path / "one")
    assert len(one) == 6  # two of them of validation
    for name in cases:
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, atol=2e-6, rtol=0, msg=key)
        torch.testing.assert_close(read_log(tmp_path / name), one, atol=2e-5, rtol=1e-4)


def read_log(folder) -> list[dict[str, float]]:
    """The figures of each step."""
    with (folder / "logs" / "metrics.csv").open() as file:
        return [
            {key: float(value) for key, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def test_a_run_without_progress_on_held_out_prompts_stops_early(folder, tmp_path):
    stop = EarlyStopping("validation_reward", patience=1, mode="max")
    trainer, _, _ = train(folder, tmp_path, [stop], lr=0.0)
    assert trainer.global_step == 4  # validated after 2 and 4


# Bad input


def test_bad_rewards_stop_the_run(folder, tmp_path):
    for value, message in ((math.nan, "not finite"), (1.0, "are equal")):
        trainer, module, data = make_training(folder, tmp_path / str(value))
        module.reward = lambda prompts, answers, v=value: torch.full((len(answers),), v)
        with pytest.raises(ValueError, match=message):
            trainer.fit(module, data)


def test_answers_that_never_end_stop_the_run(folder, tmp_path):
    trainer, module, data = make_training(folder, tmp_path)
    module.configure_model()
    module.model.output.weight.data[module.tokenizer.eos_id] = 0
    module.model.norm.weight.data[:] *= 100
    module.model.output.weight.data[9] *= 100
    with pytest.raises(ValueError, match="0 of 12 answers ended within 24 tokens"):
        trainer.fit(module, data)


def test_minibatches_must_divide_the_batch(folder, tmp_path):
    trainer, module, data = make_training(folder, tmp_path, minibatch_size=5)
    with pytest.raises(ValueError, match="a batch of 12 prompts, minibatches of 5 and"):
        trainer.fit(module, data)


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path):
    trainer, module, data = make_training(folder, tmp_path)
    module.losses = lambda part: (
        module.model.norm.weight.sum() * math.inf,
        module.critic.head.weight.sum(),
    )
    with pytest.raises(FloatingPointError, match="in iteration 0 a loss"):
        trainer.fit(module, data)


def test_prompts_that_cannot_be_answered_are_refused(folder):
    tokenizer = Tokenizer(folder / "tokenizer.model")
    answered = [*dialogs(1)[0], {"role": "assistant", "content": "It is 1."}]
    with pytest.raises(ValueError, match="prompt 1 does not end with the user"):
        PromptDataset([*dialogs(1), answered], tokenizer, 96, 24)
    with pytest.raises(ValueError, match=r"prompt 0 has .* no room for 90 more"):
        PromptDataset(dialogs(1), tokenizer, 96, 90)
    with pytest.raises(ValueError, match="there are no prompts"):
        PromptDataset([], tokenizer, 96, 24)
    with pytest.raises(ValueError, match="is empty"):
        PromptDataset([[{"role": "user", "content": " "}]], tokenizer, 96, 24)


@given(
    n=st.integers(1, 20), batch_size=st.integers(1, 12), world_size=st.integers(1, 3)
)
def test_every_prompt_comes_once_in_an_epoch(folder, n, batch_size, world_size):
    data = PromptDataset(dialogs(n), Tokenizer(folder / "tokenizer.model"), 96, 24)
    seen: list[str] = []
    step = 0
    while len(seen) < 2 * n:
        for rank in range(world_size):
            batch = data.batch(step, batch_size, rank, world_size)
            assert len(batch) == batch_size
            seen += [prompt.dialog[0]["content"] for prompt in batch]
        step += 1
    assert len(set(seen[:n])) == len(set(seen[n : 2 * n])) == n
    assert data.prompts[0].ids == encode_dialog(dialogs(1)[0], data.tokenizer).ids
