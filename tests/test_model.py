"""The model: its sizes, its mathematics beside transformers', and its files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM
from transformers.utils import logging

from llama2_lite.model import (
    PRESETS,
    Llama,
    LlamaConfig,
    hugging_face_name,
    rotary_halves,
    rotary_pairs,
)

logging.disable_progress_bar()
logging.set_verbosity_error()

KINDS = {
    "multi-head": {},
    "grouped-query": {"n_kv_heads": 2},
    "multi-query": {"n_kv_heads": 1},
    "tied": {"tie_embeddings": True},
    "tied grouped-query": {"n_kv_heads": 2, "tie_embeddings": True},
    "other rotary base": {"rope_theta": 1e6, "norm_eps": 1e-6},
}


def random_model(seed: int = 0, **changes) -> Llama:
    """A small model whose every parameter is far from its first value."""
    torch.manual_seed(seed)
    sizes = {"dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 97}
    model = Llama(
        LlamaConfig.from_params(
            sizes | {"multiple_of": 16, "max_seq_len": 4096} | changes
        )
    )
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.08)
    return model.eval()


def saved(model: Llama, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def assert_same_weights(one: Llama, other: Llama) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# Sizes


def test_published_sizes():
    counts = {name: LlamaConfig.preset(name).parameter_count() for name in PRESETS}
    assert counts["7b"] == 6_738_415_616
    assert counts["13b"] == 13_015_864_320
    assert counts["34b"] == 33_743_970_304
    assert counts["70b"] == 68_976_648_192
    widths = [LlamaConfig.preset(name).hidden_dim for name in list(PRESETS)[:4]]
    assert widths == [11008, 13824, 22016, 28672]


@pytest.mark.parametrize("name", PRESETS)
def test_count_is_that_of_the_model(name):
    config = LlamaConfig.preset(name)
    with torch.device("meta"):
        model = Llama(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count()


def test_preset_with_other_entries():
    town = LlamaConfig.preset("town")
    assert (town.hidden_dim, town.max_seq_len, town.vocab_size) == (352, 1024, 1024)
    assert LlamaConfig.preset("town", dim=256).hidden_dim == 704  # follows the width
    assert LlamaConfig.preset("town", hidden_dim=100).hidden_dim == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "n_heads = 3 does not divide dim = 128"),
        ({"n_kv_heads": 3}, "n_kv_heads = 3 does not divide n_heads = 4"),
        ({"n_heads": 128, "n_kv_heads": 1}, "must be even, for rotary pairs, but is 1"),
        ({"n_layers": 0}, "n_layers must be positive, but is 0"),
        ({"norm_eps": -1.0}, "norm_eps must be positive, but is -1.0"),
        ({"n_leyers": 2}, "unexpected keyword argument 'n_leyers'"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.preset("town", **changes)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="no preset '8b'; there are 7b, 13b"):
        LlamaConfig.preset("8b")


# First weights


def test_same_seed_same_weights():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(Llama(LlamaConfig.preset("town-small")))
    assert_same_weights(models[0], models[1])
    assert not torch.equal(models[0].output.weight, models[2].output.weight)


def test_size_of_first_weights():
    torch.manual_seed(0)
    model = Llama(LlamaConfig.preset("town"))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        writes = name.endswith(("wo.weight", "w2.weight"))
        expected = 0.02 / 8**0.5 if writes else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


def test_each_matrix_depends_on_the_seed_and_its_name_alone():
    deep, shallow = (LlamaConfig(16, n, 2, 2, 40, hidden_dim=24) for n in (8, 2))
    one, other = Llama(deep), Llama(shallow)
    state = torch.random.get_rng_state()
    one.init_weights(seed=1)
    other.init_weights(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing drawn from it
    for name in ("layers.1.attention.wq.weight", "output.weight"):
        assert torch.equal(one.get_parameter(name), other.get_parameter(name)), name
    first, second = (one.layers[i].attention.wq.weight for i in (0, 1))
    assert not torch.equal(first, second)
    before = second.detach().clone()
    one.init_weights(seed=2)
    assert not torch.equal(second, before)
    torch.manual_seed(3)
    drawn, next_drawn = Llama(shallow), Llama(shallow)
    torch.manual_seed(3)
    assert_same_weights(Llama(shallow), drawn)
    assert not torch.equal(next_drawn.output.weight, drawn.output.weight)


@pytest.mark.parametrize("tie", [False, True])
def test_built_without_memory_then_filled(tie):
    config = LlamaConfig.preset("town-small", tie_embeddings=tie)
    expected = Llama(config)
    with torch.device("meta"):
        model = Llama(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    model.init_weights(seed=4)
    expected.init_weights(seed=4)
    assert_same_weights(model, expected)
    assert (model.output.weight is model.tok_embeddings.weight) == tie
    tokens = torch.arange(9)[None]
    assert torch.equal(model(tokens), expected(tokens))


# Mathematics


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_transformers(kind, tmp_path):
    ours = random_model(**KINDS[kind])
    theirs = LlamaForCausalLM.from_pretrained(saved(ours, tmp_path / "model"))
    tokens = torch.randint(97, (2, 40))
    logits, expected = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    for model_logits in (logits, expected):
        F.cross_entropy(
            model_logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        ).backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = gradients[hugging_face_name(name)].grad
        if name.endswith(("wq.weight", "wk.weight")):
            gradient = rotary_pairs(gradient, ours.config.head_dim)
        torch.testing.assert_close(
            parameter.grad, gradient, atol=1e-5, rtol=1e-5, msg=name
        )


@pytest.mark.parametrize("kind", ["multi-head", "grouped-query", "multi-query"])
def test_late_positions_are_those_of_transformers(kind, tmp_path):
    ours = random_model(**KINDS[kind])
    theirs = LlamaForCausalLM.from_pretrained(saved(ours, tmp_path / "model"))
    tokens = torch.randint(97, (1, 2300))
    with torch.no_grad():
        whole, expected = ours(tokens)[0, 2048:], theirs(tokens).logits[0, 2048:]
        torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
        # the same distances, further out
        far = torch.arange(4000, 4040)
        near = ours(tokens[:, :40])
        late = ours(tokens[:, :40], positions=far)
        expected = theirs(tokens[:, :40], position_ids=far[None]).logits
    torch.testing.assert_close(late, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(late, near, atol=1e-4, rtol=1e-4)


def test_future_changes_nothing():
    model = random_model(n_kv_heads=2)
    tokens = torch.randint(97, (1, 20))
    with torch.no_grad():
        before = model(tokens)
        for t in range(20):
            other = tokens.clone()
            other[0, t] = (other[0, t] + 1) % 97
            after = model(other)
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    model = random_model(**KINDS[kind])
    tokens = torch.arange(97)[None]
    F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    n_kv_heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_in_pieces_as_at_once(pieces, n_kv_heads, seed):
    model = random_model(seed, n_kv_heads=n_kv_heads)
    tokens = torch.randint(97, (2, sum(pieces)))
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache(2, sum(pieces))
        outs = [model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_padding_in_front_changes_nothing():
    model = random_model(n_kv_heads=2)
    tokens = torch.randint(97, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=1)
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4, 5]])
    real = torch.arange(9) >= 3
    mask = torch.ones(9, 9, dtype=torch.bool).tril() & real | torch.eye(9).bool()
    with torch.no_grad():
        shifted = model(padded, positions, mask[None, None])[:, 3:]
        torch.testing.assert_close(shifted, model(tokens), atol=1e-5, rtol=1e-5)


def test_hidden_states_times_output_are_logits():
    model = random_model()
    tokens = torch.arange(12)[None]
    hidden = model(tokens, return_hidden=True)
    assert hidden.shape == (1, 12, 48)
    torch.testing.assert_close(model.output(hidden), model(tokens))


def test_more_tokens_than_the_context():
    model = random_model(max_seq_len=16)
    with pytest.raises(ValueError, match="17 tokens do not fit into the context of 16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = model.new_cache(1, 16)
    model(torch.zeros(1, 16, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="17 tokens do not fit into the context of 16"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


@given(heads=st.integers(1, 5), pairs=st.integers(1, 8))
def test_rotary_order_is_undone(heads, pairs):
    weight = torch.arange(heads * pairs * 2.0)[:, None].repeat(1, 3)
    halves = rotary_halves(weight, 2 * pairs)
    assert torch.equal(rotary_pairs(halves, 2 * pairs), weight)
    first_head = halves[: 2 * pairs, 0].tolist()
    assert first_head == [*range(0, 2 * pairs, 2), *range(1, 2 * pairs, 2)]


# Files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_saved_and_loaded(kind, shard_bytes, tmp_path):
    model = random_model(**KINDS[kind])
    folder = saved(model, tmp_path / "model", shard_bytes=shard_bytes)
    several = (folder / "model.safetensors.index.json").exists()
    assert several == (shard_bytes == 20_000)
    again = Llama.from_pretrained(folder)
    assert_same_weights(model, again)
    assert again.config == model.config
    tied = again.output.weight is again.tok_embeddings.weight
    assert tied == model.config.tie_embeddings
    theirs = LlamaForCausalLM.from_pretrained(folder)
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            again(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_opens_what_transformers_wrote(kind, size, tmp_path):
    model = random_model(**KINDS[kind])
    theirs = LlamaForCausalLM.from_pretrained(saved(model, tmp_path / "ours"))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    again = Llama.from_pretrained(tmp_path / "theirs")
    assert_same_weights(model, again)
    assert again.config == model.config


def test_older_config_and_stored_wavelengths(tmp_path):
    model = random_model(rope_theta=5e4)
    folder = saved(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]  # transformers 4 had rope_theta and rope_scaling
    config |= {"rope_scaling": None, "pretraining_tp": 1}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, folder / "model.safetensors")
    again = Llama.from_pretrained(folder)
    assert again.config == model.config
    assert_same_weights(model, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_type_of_the_weights(dtype, tmp_path):
    model = random_model().to(dtype)
    folder = saved(model, tmp_path / "model")
    assert Llama.from_pretrained(folder).output.weight.dtype == dtype
    wide = Llama.from_pretrained(folder, dtype=torch.float64)
    assert wide.output.weight.dtype == torch.float64
    assert wide.cos.dtype == torch.float32


def test_rotary_tables_stay_fp32_when_the_weights_do_not():
    model = random_model()
    cos, sin = model.cos.clone(), model.sin.clone()
    model.bfloat16()
    assert torch.equal(model.cos, cos)
    assert torch.equal(model.sin, sin)
    assert model(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


def test_loaded_model_trains_and_does_not_touch_its_file(tmp_path):
    model = random_model()
    folder = saved(model, tmp_path / "model")
    again = Llama.from_pretrained(folder)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert_same_weights(model, Llama.from_pretrained(folder))
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_tokenizer_goes_along(tmp_path, shared_data):
    from transformers import AutoTokenizer, GenerationConfig

    from llama2_lite.tokenizer import Tokenizer

    tokenizer = Tokenizer(shared_data / "llama2_tokenizer.model")
    model = random_model(vocab_size=32000)
    folder = saved(model, tmp_path / "model", tokenizer=tokenizer)
    theirs = AutoTokenizer.from_pretrained(folder)
    text = "Ida feeds 17 goats."
    assert theirs(text).input_ids == tokenizer.encode(text, bos=True)
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.bos_token_id, settings.eos_token_id) == (1, 2)
    config = AutoConfig.from_pretrained(folder)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert Tokenizer(folder / "tokenizer.model").encode(text) == tokenizer.encode(text)


def write_meta(model: Llama, folder: Path, n_shards: int, extra: bool = True) -> None:
    """Write Meta's layout, from its description in llama/model.py."""
    folder.mkdir()
    rows = ("wq", "wk", "wv", "w1", "w3", "output")
    for number in range(n_shards):
        shard = {"rope.freqs": torch.ones(6)} if extra else {}
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 2:
                dim = 0 if name.split(".")[-2] in rows else 1
                tensor = tensor.chunk(n_shards, dim)[number].clone()
            shard[name] = tensor
        torch.save(shard, folder / f"consolidated.{number:02}.pth")
    sizes = {"dim": 48, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}
    sizes |= {"multiple_of": 16, "vocab_size": -1, "max_seq_len": 4096}
    if model.config.n_kv_heads != 4:
        sizes["n_kv_heads"] = model.config.n_kv_heads
    (folder / "params.json").write_text(json.dumps(sizes))


@pytest.mark.parametrize("n_shards", [1, 2])
@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_opens_metas_layout(n_shards, n_kv_heads, tmp_path):
    model = random_model(n_kv_heads=n_kv_heads, vocab_size=98)
    write_meta(model, tmp_path / "meta", n_shards)
    again = Llama.from_pretrained(tmp_path / "meta")
    assert_same_weights(model, again)
    assert again.config == model.config
    # and on to transformers
    theirs = LlamaForCausalLM.from_pretrained(saved(again, tmp_path / "hf"))
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5
        )


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickles_are_refused_and_not_run(tmp_path):
    model = random_model()
    sprung = tmp_path / "sprung"
    for name, sentence in [
        ("pytorch_model.bin", "is a pickle, which can run any program"),
        ("model.safetensors", "is not a whole safetensors file"),
    ]:
        folder = saved(model, tmp_path / name.partition(".")[2])
        (folder / "model.safetensors").unlink()
        torch.save({"weights": Trap(sprung)}, folder / name)
        with pytest.raises(ValueError, match=sentence) as caught:
            Llama.from_pretrained(folder)
        assert name in str(caught.value)
    write_meta(model, tmp_path / "meta", 1)
    torch.save({"weights": Trap(sprung)}, tmp_path / "meta" / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth is broken or"):
        Llama.from_pretrained(tmp_path / "meta")
    assert not sprung.exists()


@pytest.mark.parametrize("content", [{"layers": {}}, {"dim": 48}, torch.ones(2), None])
def test_pickles_of_other_things_than_named_tensors_are_refused(tmp_path, content):
    write_meta(random_model(), tmp_path / "meta", 1)
    torch.save(content, tmp_path / "meta" / "consolidated.00.pth")
    with pytest.raises(ValueError, match="other things than named tensors"):
        Llama.from_pretrained(tmp_path / "meta")


def test_truncated_file_is_refused(tmp_path):
    folder = saved(random_model(), tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        Llama.from_pretrained(folder)


def test_missing_folder_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        Llama.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor params"):
        Llama.from_pretrained(tmp_path)
    folder = saved(random_model(), tmp_path / "one")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        Llama.from_pretrained(folder)
    folder = saved(random_model(), tmp_path / "many", shard_bytes=20_000)
    first = min(folder.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"{first.name} is missing"):
        Llama.from_pretrained(folder)


def test_tensors_missing_misshapen_and_unexpected(tmp_path):
    folder = saved(random_model(), tmp_path / "model")
    path = folder / "model.safetensors"
    good = load_file(path)
    down = "model.layers.1.mlp.down_proj.weight"

    save_file({k: v for k, v in good.items() if k != down}, path)
    with pytest.raises(ValueError, match=f"tensor {down} is missing"):
        Llama.from_pretrained(folder)
    save_file(good | {down: good[down][:, :-1].contiguous()}, path)
    with pytest.raises(ValueError, match=rf"{down} has shape \(48, 127\), but .*128\)"):
        Llama.from_pretrained(folder)
    save_file(good | {"model.layers.2.extra": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.extra is not expected"):
        Llama.from_pretrained(folder)
    query = "model.layers.0.self_attn.q_proj.weight"
    save_file(good | {query: torch.ones(7)}, path)
    with pytest.raises(ValueError, match=rf"{query} has shape \(7,\)"):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', but a Llama 2 has"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_type is 'linear'",
        ),
        ({"head_dim": 16}, "head_dim is 16, but a Llama 2 has .* = 12"),
        ({"hidden_size": None, "vocab_size": None}, "lacks hidden_size, vocab_size"),
        ({"num_attention_heads": 5}, "n_heads = 5 does not divide dim = 48"),
    ],
)
def test_other_models_are_refused(changes, message, tmp_path):
    folder = saved(random_model(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message) as caught:
        Llama.from_pretrained(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "\0"])
def test_config_that_is_no_json_object(content, tmp_path):
    folder = saved(random_model(), tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json (is not JSON|holds no JSON)"):
        Llama.from_pretrained(folder)


def test_saving_keeps_what_is_there(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    first, second = random_model(1), random_model(2)
    first.save_pretrained(folder, shard_bytes=20_000)  # empty: nothing to lose
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        second.save_pretrained(folder)
    assert_same_weights(Llama.from_pretrained(folder), first)
    second.save_pretrained(folder, force=True)
    assert_same_weights(Llama.from_pretrained(folder), second)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not list(folder.glob("model-*"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(FileExistsError, match="is a file, not a folder"):
        first.save_pretrained(folder / "notes.txt", force=True)


KILLED = """
import os, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_model import random_model
steps = iter(range({at}))

def trace(event, arguments):
    # die at the n-th of the calls that touch files
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
        if str(arguments[0]).startswith({root!r}) and next(steps, None) is None:
            os._exit(9)

model = random_model(2)
sys.addaudithook(trace)
model.save_pretrained({folder!r}, force=True, shard_bytes=60_000)
"""


@pytest.mark.parametrize("exists", [False, True])
def test_killed_while_saving(exists, tmp_path):
    """At every step, what looks like a model is a whole one."""
    outcomes = set()
    for at in (0, 1, 4, 7, 8, 9, 10, 11, 12, 13, 14, 99):
        root = tmp_path / str(at)
        folder = root / "model"
        root.mkdir()
        if exists:
            random_model(1).save_pretrained(folder)
        code = KILLED.format(
            tests=str(Path(__file__).parent), at=at, root=str(root), folder=str(folder)
        )
        # a copy of this process, which has everything imported already
        child = os.fork()
        if not child:
            torch.set_num_threads(1)  # a copy has no other threads
            try:
                exec(code, {})
            finally:
                os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        if (folder / "config.json").exists():
            weights = Llama.from_pretrained(folder).output.weight
            old, new = (random_model(seed).output.weight for seed in (1, 2))
            assert torch.equal(weights, new) or (exists and torch.equal(weights, old))
            outcomes.add("new" if torch.equal(weights, new) else "old")
        else:
            outcomes.add("none")
        assert killed or torch.equal(Llama.from_pretrained(folder).output.weight, new)
        shutil.rmtree(root)
    assert outcomes == ({"old", "none", "new"} if exists else {"none", "new"})


def test_loading_holds_one_copy(tmp_path):
    """Peak of anonymous memory while loading a model of 137 MB stays under two."""
    torch.manual_seed(0)
    Llama(LlamaConfig.preset("34m")).save_pretrained(tmp_path / "model")
    code = (
        "import threading, time, torch\n"
        "from llama2_lite.model import Llama, LlamaConfig\n"
        "def anonymous():\n"
        "    text = open('/proc/self/status').read()\n"
        "    return int(text.split('RssAnon:')[1].split()[0]) * 1024\n"
        "with torch.device('meta'):  # imports much, once\n"
        "    Llama(LlamaConfig.preset('town'))\n"
        "before, peak = anonymous(), 0\n"
        "def watch():\n"
        "    global peak\n"
        "    while True:\n"
        "        peak = max(peak, anonymous()); time.sleep(0.0005)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        f"model = Llama.from_pretrained({str(tmp_path / 'model')!r})\n"
        "print(max(peak, anonymous()) - before)\n"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("reads /proc, which only Linux has")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.3 * 4 * LlamaConfig.preset("34m").parameter_count()
