"""Choosing tokens: the rules, the noise, batches, the stream and the errors."""

import copy
import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM
from transformers.utils import logging

from llama2_lite.generation import (
    Decoder,
    for_decoding,
    generate,
    gumbel_noise,
    keep_top_p,
    next_tokens,
    stream,
    stream_text,
)
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.tokenizer import Tokenizer, train_tokenizer

logging.disable_progress_bar()
logging.set_verbosity_error()


def random_model(seed: int = 0, **changes) -> Llama:
    """Small, with logits far enough apart that a choice is not a tie."""
    torch.manual_seed(seed)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 61}
    model = Llama(
        LlamaConfig.from_params(
            sizes | {"multiple_of": 16, "max_seq_len": 64} | changes
        )
    )
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(n_kv_heads=2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = ["Ida feeds the goats.", "Once upon a time Otto met a snail."]
    return train_tokenizer(texts, path, vocab_size=300)


# Top-p

logits_lists = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


@given(values=logits_lists, top_p=st.floats(0.01, 1.0))
@example(values=[0.0, 0.0, 0.0, 0.0], top_p=0.5)
@example(values=[20.0, -20.0], top_p=0.01)
def test_top_p_keeps_the_smallest_prefix_by_the_rule(values, top_p):
    kept = keep_top_p(torch.tensor([values]), top_p)[0]
    exponentials = [math.exp(value) for value in values]
    total = math.fsum(exponentials)
    order = sorted(range(len(values)), key=lambda i: -values[i])
    before = 0.0
    is_kept = kept.isfinite().tolist()
    assert is_kept[order[0]]  # never empty
    for i in order:
        # not where rounding decides
        if abs(before / total - top_p) > 1e-5:
            assert is_kept[i] == (before / total <= top_p)
        before += exponentials[i]
    for i, stays in enumerate(is_kept):  # and what stays, stays as it was
        assert not stays or kept[i] == torch.tensor(values)[i]


@given(values=logits_lists, top_p=st.floats(0.01, 1.0))
def test_top_p_renormalises(values, top_p):
    logits = torch.tensor([values], dtype=torch.float64)
    kept = keep_top_p(logits, top_p)
    before, after = logits.softmax(-1)[0], kept.softmax(-1)[0]
    stays = kept[0].isfinite()
    assert after.sum().item() == pytest.approx(1)
    assert after[~stays].sum() == 0
    torch.testing.assert_close(after[stays], before[stays] / before[stays].sum())


@given(values=logits_lists)
def test_top_p_of_one_keeps_all(values):
    logits = torch.tensor([values])
    assert torch.equal(keep_top_p(logits, 1.0), logits)


def test_top_p_by_hand():
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    for top_p, stay in [(0.3, [1]), (0.4, [1, 3]), (0.6, [1, 3]), (0.75, [1, 2, 3])]:
        kept = keep_top_p(probabilities.double().log(), top_p + 1e-9)
        assert kept[0].isfinite().nonzero().flatten().tolist() == stay


# Noise


def test_noise_is_gumbel():
    noise = gumbel_noise(3, torch.arange(500), 7, 2000)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.std().item() == pytest.approx(math.pi / 6**0.5, abs=0.01)
    for point in (-1.0, 0.0, 1.0, 3.0, 8.0):
        expected = math.exp(-math.exp(-point))
        share = (noise <= point).double().mean().item()
        spread = (expected * (1 - expected) / noise.numel()) ** 0.5
        assert abs(share - expected) < 5 * spread


def test_noise_of_neighbours_is_unrelated():
    rows = torch.arange(300)
    base = gumbel_noise(1, rows, 5, 500)
    for other in (
        gumbel_noise(2, rows, 5, 500),
        gumbel_noise(1, rows + 1, 5, 500),
        gumbel_noise(1, rows, 6, 500),
        base.roll(1, dims=1),
    ):
        both = torch.stack([base.flatten(), other.flatten()])
        assert abs(torch.corrcoef(both)[0, 1].item()) < 5 / both.shape[1] ** 0.5


@given(
    seed=st.integers(-(2**70), 2**70),
    rows=st.lists(st.integers(0, 2**62), min_size=1, max_size=6),
    step=st.integers(0, 10**6),
)
def test_noise_depends_on_the_row_number_only(seed, rows, step):
    together = gumbel_noise(seed, torch.tensor(rows), step, 9)
    assert together.isfinite().all()
    for row, noise in zip(rows, together, strict=True):
        assert torch.equal(gumbel_noise(seed, torch.tensor([row]), step, 9)[0], noise)
    # a larger vocabulary adds numbers and changes none
    assert torch.equal(
        gumbel_noise(seed, torch.tensor(rows), step, 12)[:, :9], together
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_tokens_come_as_often_as_they_should(temperature, top_p):
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    n_draws = 100_000
    noise = gumbel_noise(11, torch.arange(n_draws), 3, 6)
    draws = next_tokens(logits.expand(n_draws, 6), temperature, top_p, noise)
    shares = torch.bincount(draws, minlength=6) / n_draws
    expected = keep_top_p(logits[None] / temperature, top_p)[0].softmax(-1)
    allowed = 4.5 * (expected * (1 - expected) / n_draws).sqrt()
    assert ((shares - expected).abs() <= allowed).all()
    assert (shares[expected == 0] == 0).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-5])
def test_tiny_temperature_is_greedy(model, temperature):
    prompts = [[5, 6, 7], [8]]
    greedy = generate(model, prompts, max_new_tokens=20, temperature=0)
    cold = generate(
        model, prompts, max_new_tokens=20, temperature=temperature, top_p=0.9
    )
    assert cold.ids == greedy.ids


# Batches


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"tie_embeddings": True}])
def test_greedy_tokens_are_those_of_transformers(changes, tmp_path):
    ours = random_model(**changes)
    ours.save_pretrained(tmp_path / "model")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    prompts = torch.randint(61, (5, 6))
    expected = theirs.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    found = generate(ours, prompts.tolist(), max_new_tokens=40, temperature=0)
    assert found.ids == expected[:, 6:].tolist()
    assert found.finished == [False] * 5


prompt_lists = st.lists(
    st.lists(st.integers(0, 60), min_size=1, max_size=20), min_size=1, max_size=6
)


@settings(max_examples=40, deadline=None)
@given(
    prompts=prompt_lists,
    temperature=st.sampled_from([0, 0.7, 1.0, 1.5]),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    stop_ids=st.sets(st.integers(0, 60), max_size=8),
    seed=st.integers(0, 1000),
)
def test_a_row_alone_is_the_row_in_a_batch(
    model, prompts, temperature, top_p, stop_ids, seed
):
    how = {"max_new_tokens": 12, "temperature": temperature, "top_p": top_p}
    how |= {"stop_ids": stop_ids, "seed": seed}
    together = generate(model, prompts, **how)
    numbers = list(range(len(prompts)))[::-1]
    backwards = generate(model, prompts[::-1], rows=numbers, **how)
    assert backwards.ids[::-1] == together.ids
    for number, prompt in enumerate(prompts):
        alone = generate(model, [prompt], rows=[number], **how)
        assert alone.ids[0] == together.ids[number]
        assert alone.finished[0] == together.finished[number]
        assert alone.logprobs[0] == pytest.approx(together.logprobs[number], abs=1e-4)
    assert list(stream(model, prompts[0], **how)) == together.ids[0]


@settings(max_examples=30, deadline=None)
@given(prompts=prompt_lists, stop_ids=st.sets(st.integers(0, 60), max_size=20))
def test_rows_end_at_the_first_stop_id(model, prompts, stop_ids):
    free = generate(model, prompts, max_new_tokens=15, seed=4)
    found = generate(model, prompts, max_new_tokens=15, seed=4, stop_ids=stop_ids)
    for whole, ids, logprobs, finished in zip(
        free.ids, found.ids, found.logprobs, found.finished, strict=True
    ):
        stops = [i for i, token in enumerate(whole) if token in stop_ids]
        assert ids == (whole[: stops[0] + 1] if stops else whole)
        assert finished == bool(stops)
        assert len(logprobs) == len(ids)


def test_rows_that_ended_cost_nothing(model, monkeypatch):
    """The batch that goes through the model shrinks as rows end."""
    sizes = []
    step = Decoder.step
    monkeypatch.setattr(
        Decoder,
        "step",
        lambda self, tokens: (sizes.append(len(tokens)), step(self, tokens))[1],
    )
    prompts = [[i] for i in range(32)]
    found = generate(model, prompts, max_new_tokens=40, stop_ids=range(6), seed=2)
    lengths = [len(ids) for ids in found.ids]
    for number, size in enumerate(sizes, 1):  # step k feeds the k-th token of each row
        alive = sum(length > number for length in lengths)
        assert alive <= size <= max(alive / 0.75 + 1, 1)
    assert len(sizes) == max(lengths) - 1


def test_log_probabilities_are_those_of_one_pass(model):
    prompts = [[1, 2, 3], [9], [4] * 10]
    found = generate(
        model, prompts, max_new_tokens=10, temperature=0.7, top_p=0.8, seed=5
    )
    for prompt, ids, logprobs in zip(prompts, found.ids, found.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)


def test_generation_stops_where_the_context_is_full(model):
    prompts = [[1] * 60, [2] * 10, [3] * 63]
    found = generate(model, prompts, max_new_tokens=100, temperature=0)
    assert [len(ids) for ids in found.ids] == [4, 54, 1]
    assert found.finished == [False] * 3
    for prompt, ids in zip(prompts, found.ids, strict=True):
        alone = generate(model, [prompt], max_new_tokens=100, temperature=0)
        assert alone.ids[0] == ids
        assert list(stream(model, prompt, max_new_tokens=100, temperature=0)) == ids


def test_seed_decides(model):
    prompts = [[1, 2]] * 3
    one, again, other = (
        generate(model, prompts, max_new_tokens=12, seed=seed).ids for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other
    assert one[0] != one[1]  # the same prompt in another row


def test_no_prompts(model):
    assert generate(model, [], max_new_tokens=3).ids == []


def test_compiled_step_changes_nothing():
    model = random_model(n_layers=1, n_kv_heads=2)
    prompts = [[1, 2, 3], [9], [4] * 20, [5] * 60]
    for how in ({"temperature": 0}, {"top_p": 0.9, "stop_ids": [7, 8], "seed": 6}):
        plain = generate(model, prompts, max_new_tokens=12, **how)
        compiled = generate(model, prompts, max_new_tokens=12, compiled=True, **how)
        assert compiled.ids == plain.ids
        assert compiled.finished == plain.finished


@pytest.mark.parametrize("sizes", [{"tie_embeddings": True}, {"n_kv_heads": 2}, {}])
def test_the_copy_for_decoding_writes_the_same(sizes):
    model = random_model(**sizes)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(50, (3, 9))
    copy = for_decoding(model)
    for compiled in (False, True):
        cached = copy(tokens, cache=copy.new_cache(3, 9))
        torch.testing.assert_close(cached, model(tokens), atol=1e-5, rtol=1e-5)
        for prompts in ([[1, 2, 3], [9]], [[4, 5]]):
            how = {"max_new_tokens": 12, "seed": 6, "compiled": compiled}
            found = generate(copy, prompts, **how)
            assert found.ids == generate(model, prompts, **how).ids
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    assert not any(
        weight.requires_grad for weight in copy.layers[0].attention.parameters()
    )


def test_a_copy_for_decoding_in_half_precision():
    model = random_model().bfloat16()
    tokens = torch.randint(50, (3, 9))
    copy = for_decoding(model)
    found, expected = copy(tokens, cache=copy.new_cache(3, 9)), model(tokens)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)


# The stream


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.text(max_size=12).filter(lambda text: "\u2581" not in text),
    text=st.text(max_size=30).filter(lambda text: "\u2581" not in text),
)
@example(prompt="Ida", text=" 🦉 owl")
@example(prompt="", text="  two  spaces ")
@example(prompt="a", text="\ufffd\ufffd")
def test_pieces_together_are_the_text(tokenizer, prompt, text):
    assume("\ufffd" not in prompt)
    start = tokenizer.encode(prompt, bos=True)
    rest = tokenizer.encode(text, eos=True)
    pieces = list(stream_text(tokenizer, start, rest))
    assert tokenizer.decode(start) + "".join(pieces) == tokenizer.decode(start + rest)
    assert all(pieces)


def test_characters_come_out_whole(tokenizer):
    start = tokenizer.encode("Ida", bos=True)
    rest = tokenizer.encode("Ida 🦉é", bos=True)[len(start) :]
    given_so_far, shown = 0, []

    def tokens():
        nonlocal given_so_far
        for token in rest:
            given_so_far += 1
            yield token

    for piece in stream_text(tokenizer, start, tokens()):
        shown.append((given_so_far, piece))
    text = "".join(piece for _, piece in shown)
    assert text.strip() == "🦉é"
    assert not any("\ufffd" in piece for _, piece in shown)
    owl = next(count for count, piece in shown if "🦉" in piece)
    assert rest[owl - 4 : owl] == [3 + byte for byte in "🦉".encode()]


def test_broken_bytes_come_out_at_the_end(tokenizer):
    start = tokenizer.encode("Ida", bos=True)
    pieces = list(stream_text(tokenizer, start, [3 + 0xF0, 3 + 0x9F]))
    assert set("".join(pieces)) == {"\ufffd"}


# Errors


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty; it needs at least one token"),
        ([[1] * 64], {}, "prompt 0 has 64 tokens, which leaves no room .* of 64"),
        ([[1, 61]], {}, "prompt 0 has an id outside the vocabulary of 61"),
        ([[-1]], {}, "prompt 0 has an id outside the vocabulary of 61"),
        ([[1]], {"temperature": -0.1}, r"temperature must be 0 or more, but is -0\.1"),
        ([[1]], {"temperature": math.nan}, "temperature must be 0 or more, but is nan"),
        ([[1]], {"top_p": 0.0}, r"top_p must be above 0 and at most 1, but is 0\.0"),
        ([[1]], {"top_p": 1.1}, r"top_p must be above 0 and at most 1, but is 1\.1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, but is 0"),
    ],
)
def test_what_makes_no_sense_is_refused(model, prompts, settings, message):
    settings = {"max_new_tokens": 5} | settings
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **settings)
    if len(prompts) == 1:
        with pytest.raises(ValueError, match=message):
            next(stream(model, prompts[0], **settings))


def test_broken_weights_are_named(model):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="gives NaN instead of numbers"):
        generate(broken, [[1, 2]], max_new_tokens=3)


def test_row_numbers_must_fit(model):
    with pytest.raises(ValueError, match="3 row numbers do not fit 1 prompts"):
        generate(model, [[1]], max_new_tokens=5, rows=[1, 2, 3])
