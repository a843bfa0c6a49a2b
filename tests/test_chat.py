"""Dialogues as tokens: the format, masks, packing, attention and answers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2_lite.chat import (
    TAGS,
    DialogDataset,
    Example,
    answer,
    check_dialog,
    collate,
    encode_dialog,
    pack,
    separate_samples,
    weigh_part,
)
from llama2_lite.generation import generate
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import MixedLengthLoader
from llama2_lite.tokenizer import Tokenizer, train_tokenizer


def say(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A dialogue that the user begins."""
    dialog = [] if system is None else [{"role": "system", "content": system}]
    for i, content in enumerate(contents):
        role = ("user", "assistant")[i % 2]
        dialog.append({"role": role, "content": content})
    return dialog


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = ["Ida feeds the goats. [INST] What? [/INST] Yes.", "Otto met a snail."]
    return train_tokenizer(texts, path, vocab_size=310)


@pytest.fixture(scope="module")
def meta_tokenizer(shared_data) -> Tokenizer:
    return Tokenizer(shared_data / "llama2_tokenizer.model")


# The format


def reference_ids(dialog: list[dict[str, str]], tokenizer: Tokenizer) -> list[int]:
    """What Meta's chat_completion feeds its model, written down anew, turn by turn."""
    if dialog[0]["role"] == "system":
        first = "<<SYS>>\n" + dialog[0]["content"] + "\n<</SYS>>\n\n"
        first += dialog[1]["content"]
        dialog = [{"role": "user", "content": first}, *dialog[2:]]
    ids = []
    for i in range(0, len(dialog) - 1, 2):
        request, reply = dialog[i]["content"], dialog[i + 1]["content"]
        text = "[INST] " + request.strip() + " [/INST] " + reply.strip() + " "
        ids += [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    if len(dialog) % 2 == 1:
        text = "[INST] " + dialog[-1]["content"].strip() + " [/INST]"
        ids += [tokenizer.bos_id, *tokenizer.encode(text)]
    return ids


contents = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(
    lambda text: text.strip() and not any(tag in text for tag in TAGS)
)


@pytest.mark.parametrize("name", ["meta_tokenizer", "tokenizer"])
@given(
    texts=st.lists(contents, min_size=1, max_size=6),
    system=st.none() | contents,
    train_on=st.sampled_from(["all", "last"]),
)
def test_ids_are_those_of_the_reference_code(name, request, texts, system, train_on):
    tokenizer = request.getfixturevalue(name)
    dialog = say(*texts, system=system)
    ids, mask = encode_dialog(dialog, tokenizer, train_on)
    assert ids == reference_ids(dialog, tokenizer)
    assert len(mask) == len(ids)
    ends = [i for i, id in enumerate(ids) if id == tokenizer.eos_id]
    learnt = [i for i in ends if mask[i]]
    if len(texts) % 2:
        assert not any(mask)
    else:
        assert learnt == (ends if train_on == "all" else ends[-1:])


def test_a_dialogue_by_hand(meta_tokenizer):
    ids, mask = encode_dialog(say(" Hi ", "Hello\n", "Bye"), meta_tokenizer)
    pieces = [meta_tokenizer.piece(id) for id in ids]
    request = ["<s>", "▁[", "INST", "]", "▁Hi", "▁[", "/", "INST", "]"]
    assert pieces[:9] == request
    assert pieces[9:12] == ["▁Hello", "▁", "</s>"]
    assert pieces[12:14] == ["<s>", "▁["]
    assert pieces[-1] == "]"
    assert not any(mask)  # a prompt: nothing to learn
    finished = encode_dialog(say("Hi", "Hello"), meta_tokenizer)
    assert finished.ids == ids[:12]
    assert finished.loss_mask == [False] * 9 + [True] * 3


def test_answers_are_what_is_learnt(tokenizer):
    dialog = say("What?", "Ida feeds.", "Who?", "Otto.", system="Be brief.")
    for train_on, expected in (("all", "Ida feeds. Otto."), ("last", "Otto.")):
        ids, mask = encode_dialog(dialog, tokenizer, train_on)
        learnt = [id for id, learn in zip(ids, mask, strict=True) if learn]
        assert " ".join(tokenizer.decode(learnt).split()) == expected


@given(st.lists(contents, min_size=2, max_size=2), contents)
def test_the_prompt_does_not_change_what_is_learnt(tokenizer, texts, other):
    learnt = []
    for request in (texts[0], other):
        ids, mask = encode_dialog(say(request, texts[1]), tokenizer)
        learnt.append([id for id, learn in zip(ids, mask, strict=True) if learn])
    assert learnt[0] == learnt[1]


@given(st.lists(contents, min_size=2, max_size=2))
def test_a_prompt_is_the_beginning_of_the_finished_dialogue(tokenizer, texts):
    prompt = encode_dialog(say(texts[0]), tokenizer).ids
    ids, mask = encode_dialog(say(*texts), tokenizer)
    assert ids[: len(prompt)] == prompt
    assert mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


BAD = [
    ([], "no message of the user"),
    (say(system="Be brief."), "no message of the user"),
    (say("a", "b")[1:], "message 1 is from 'assistant', where 'user'"),
    (say("a") + say("b"), "message 2 is from 'user', where 'assistant'"),
    (say("a", "b") + say("c", system="d"), "message 3 is from 'system'"),
    ([{"role": "bot", "content": "a"}], "message 1 is from 'bot'"),
    (say("a", " \n"), r"message 2 \(assistant\) is empty"),
    (say("a", system=""), r"message 1 \(system\) is empty"),
    *[(say("a", f"b {tag} c"), r"message 2 \(assistant\) contains") for tag in TAGS],
]


@pytest.mark.parametrize(("dialog", "reason"), BAD)
def test_bad_dialogues_are_refused(tokenizer, dialog, reason):
    with pytest.raises(ValueError, match=reason):
        check_dialog(dialog)
    with pytest.raises(ValueError, match=reason):
        encode_dialog(dialog, tokenizer)


def test_the_tags_are_those_of_the_paper():
    assert set(TAGS) == {"[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"}


def test_an_unknown_choice_of_answers_is_refused(tokenizer):
    with pytest.raises(ValueError, match="train_on is 'first'"):
        encode_dialog(say("a", "b"), tokenizer, train_on="first")


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused(tokenizer):
    class Joining(Tokenizer):
        def encode(self, text, bos=False, eos=False):
            return [len(text)]

    with pytest.raises(ValueError, match="joins the end of a prompt"):
        encode_dialog(say("a", "b"), Joining(tokenizer.path))


# Packing


def example_of(size: int, first: int = 0) -> Example:
    """Tokens with numbers of their own; all but the first are to learn."""
    return Example(list(range(first, first + size)), [False] + [True] * (size - 1))


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 50))
def test_packing_loses_nothing_and_fills_windows(sizes, length):
    examples = [example_of(size, 100 * i) for i, size in enumerate(sizes)]
    windows = pack(examples, length)
    assert sorted(x.ids[0] for w in windows for x in w) == [x.ids[0] for x in examples]
    fills = [sum(len(example.ids) for example in window) for window in windows]
    assert all(0 < fill <= length for fill in fills)
    # two half empty windows would have been one
    assert len(fills) < 2 or sorted(fills)[0] + sorted(fills)[1] > length


def test_packing_by_hand():
    sizes = [5, 6, 4, 3, 2]
    windows = pack([example_of(size) for size in sizes], 10)
    found = [[len(example.ids) for example in window] for window in windows]
    assert found == [[5, 3, 2], [6, 4]]


def test_an_example_longer_than_the_window_is_refused():
    with pytest.raises(ValueError, match=r"dialogue 1 has 11 tokens.*fit into 10"):
        pack([example_of(10), example_of(11)], 10)


def test_a_batch_by_hand():
    windows = [[example_of(2, 10), example_of(3, 20)], [example_of(2, 30)]]
    batch = collate(windows)
    assert batch.tokens.tolist() == [[10, 11, 20, 21, 22], [30, 31, 0, 0, 0]]
    assert batch.samples.tolist() == [[0, 0, 1, 1, 1], [0, 0, -1, -1, -1]]
    expected = [[0, 1, 0, 1, 1], [0, 1, 0, 0, 0]]
    assert batch.loss_mask.int().tolist() == expected


@pytest.fixture(scope="module")
def dataset() -> DialogDataset:
    sizes = [3 + i % 7 for i in range(50)]
    examples = [example_of(size, 10 * i) for i, size in enumerate(sizes)]
    return DialogDataset(examples, 20, seed=1)


def ids_of(batch) -> list[int]:
    return batch.tokens[batch.samples >= 0].tolist()


def test_an_epoch_holds_every_token_once(dataset):
    seen = [id for step in range(len(dataset)) for id in ids_of(dataset.batch(step, 1))]
    assert len(seen) == dataset.n_tokens
    assert sorted(seen) == sorted(
        id for window in dataset.windows for example in window for id in example.ids
    )
    second = [
        id
        for step in range(len(dataset), 2 * len(dataset))
        for id in ids_of(dataset.batch(step, 1))
    ]
    assert second != seen
    assert sorted(second) == sorted(seen)


def test_processes_share_a_step(dataset):
    for step in (0, 1, 7):
        whole = ids_of(dataset.batch(step, 4))
        parts = [
            id for rank in range(2) for id in ids_of(dataset.batch(step, 2, rank, 2))
        ]
        assert parts == whole


def test_the_loader_goes_on_where_it_was(dataset):
    loader = MixedLengthLoader([dataset], [1.0], [4])
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state = loader.state_dict()
    resumed = MixedLengthLoader([dataset], [1.0], [4])
    resumed.load_state_dict(state)
    again = iter(resumed)
    for _ in range(15):  # into the next epochs
        ours, theirs = next(batches), next(again)
        assert all(map(torch.equal, ours[:3], theirs[:3]))


def test_parts_weigh_what_they_have_to_learn():
    counts = [3, 1, 0, 4, 8, 0]
    weights = [weigh_part(counts, part, 3) for part in range(3)]
    assert weights == [3 * 4 / 16, 3 * 4 / 16, 3 * 8 / 16]
    assert weigh_part(counts, 0, 1) == 1.0
    assert weigh_part([0, 0], 1, 2) == 1.0


def test_nothing_to_learn_is_refused():
    with pytest.raises(ValueError, match="dialogue 1 has no answer to learn"):
        DialogDataset([example_of(3), Example([1, 2], [False, False])], 10)
    with pytest.raises(ValueError, match="there are no dialogues"):
        DialogDataset([], 10)


# Attention


@pytest.fixture(scope="module")
def model(tokenizer) -> Llama:
    torch.manual_seed(0)
    model = Llama(LlamaConfig(32, 2, 4, 2, tokenizer.vocab_size, 48, max_seq_len=256))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def test_separated_samples_are_as_if_alone(model):
    torch.manual_seed(1)
    examples = [
        Example(torch.randint(3, 300, (size,)).tolist(), [True] * size)
        for size in (7, 3, 12, 5, 9)
    ]
    batch = collate(pack(examples, 20))
    assert (batch.samples.max(1).values > 0).any()
    assert (batch.samples < 0).any()
    positions, mask = separate_samples(batch.samples)
    logits = model(batch.tokens, positions, mask)
    assert logits.isfinite().all()
    together = model(batch.tokens)
    n_changed = 0
    for row, samples in enumerate(batch.samples):
        for number in range(int(samples.max()) + 1):
            mine = samples == number
            alone = model(batch.tokens[row, mine][None])[0]
            torch.testing.assert_close(logits[row, mine], alone, atol=2e-4, rtol=0)
            n_changed += not torch.allclose(together[row, mine], alone, atol=1e-2)
    assert n_changed == sum(int(samples.max()) for samples in batch.samples)


def test_positions_by_hand():
    positions, mask = separate_samples(torch.tensor([[0, 0, 1, 1, 1, -1]]))
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0]]
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert mask[0, 0].int().tolist() == expected


# Answers


def test_answers_do_not_depend_on_the_batch(model, tokenizer):
    dialogs = [
        say("What?"),
        say("Ida feeds the goats. Otto met a snail."),
        say("What?", "Otto.", "Who?", system="Be brief."),
        say("What?"),
    ]
    how = {"max_new_tokens": 12, "seed": 3}
    together = answer(model, tokenizer, dialogs, **how)
    assert together == answer(model, tokenizer, dialogs, batch_size=1, **how)
    assert together[0] != together[3]  # another row, other noise
    for row, dialog in enumerate(dialogs):
        ids = generate(
            model,
            [encode_dialog(dialog, tokenizer).ids],
            stop_ids=[tokenizer.eos_id],
            rows=[row],
            **how,
        ).ids[0]
        assert together[row] == tokenizer.decode(ids).strip()
    assert answer(model, tokenizer, []) == []


def test_answers_that_were_cut_can_be_left_out(model, tokenizer):
    dialogs, how = [say("What?")] * 300, {"max_new_tokens": 12, "seed": 3}
    kept = answer(model, tokenizer, dialogs, **how)
    whole = answer(model, tokenizer, dialogs, keep_cut=False, **how)
    drawn = generate(
        model,
        [encode_dialog(dialog, tokenizer).ids for dialog in dialogs],
        stop_ids=[tokenizer.eos_id],
        **how,
    )
    assert 0 < sum(drawn.finished) < 300
    for text, found, ended in zip(kept, whole, drawn.finished, strict=True):
        assert found == (text if ended else "")


def test_what_cannot_be_answered_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="dialogue 1 does not end with the user"):
        answer(model, tokenizer, [say("a"), say("a", "b")])
    with pytest.raises(ValueError, match="context of 256"):
        answer(model, tokenizer, [say("goats " * 200)])
