"""Layouts, memory, operations and carbon, by arithmetic and counted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2_lite.model import PRESETS, Llama, LlamaConfig
from llama2_lite.pretraining import best_precision, vocabulary_loss
from llama2_lite.scaling import (
    GPUS,
    Layout,
    accumulation,
    block_activations,
    cache_bytes,
    carbon_tonnes,
    flops_per_token,
    held_parameters,
    training_memory,
    utilisation,
)

ROOT = Path(__file__).resolve().parents[1]
SMALL = LlamaConfig(64, 3, 4, 2, vocab_size=96, hidden_dim=160, max_seq_len=1024)


@pytest.mark.parametrize(
    ("layout", "n_processes", "sizes"),
    [
        (Layout(), 1, (1, 1, 1)),
        (Layout(), 8, (1, 8, 1)),
        (Layout(shard=1), 8, (8, 1, 1)),
        (Layout(shard=2), 8, (4, 2, 1)),
        (Layout(tensor=2), 8, (1, 4, 2)),
        (Layout(shard=2, tensor=2), 8, (2, 2, 2)),
    ],
)
def test_processes_are_a_grid(layout, n_processes, sizes):
    assert layout.sizes(n_processes, SMALL) == sizes


@pytest.mark.parametrize(
    ("layout", "n_processes", "words"),
    [
        (Layout(tensor=0), 4, "layout.tensor = 0"),
        (Layout(shard=-1), 4, "layout.shard = -1"),
        (Layout(tensor=2), 3, "3 processes cannot be divided"),
        (Layout(tensor=4), 4, "does not divide n_kv_heads = 2"),
        (Layout(shard=3), 8, "layout.shard = 3 does not divide"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(layout, n_processes, words):
    with pytest.raises(ValueError, match=words):
        layout.sizes(n_processes, SMALL)


@pytest.mark.parametrize("name", PRESETS)
def test_one_process_holds_all_parameters(name):
    config = LlamaConfig.preset(name)
    assert held_parameters(config) == config.parameter_count()


@pytest.mark.parametrize("shard", [2, 3, 7])
def test_the_fullest_process_holds_the_first_rows(shard):
    parameters = Llama(SMALL).parameters()
    first = sum(parameter.chunk(shard)[0].numel() for parameter in parameters)
    assert held_parameters(SMALL, shard) == first


def test_tensor_parallel_divides_all_matrices():
    norms = (2 * SMALL.n_layers + 1) * SMALL.dim
    matrices = SMALL.parameter_count() - norms
    assert held_parameters(SMALL, 1, 2) == norms + matrices // 2


def kept_bytes(function, parameters) -> int:
    """Bytes that a computation keeps for its backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    assert result.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("sequence", [64, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_of_a_block_are_counted_to_the_byte(n_kv_heads, sequence, dtype):
    config = LlamaConfig(64, 1, 4, n_kv_heads, 96, 160, max_seq_len=1024)
    model = Llama(config).to(dtype)
    x = torch.randn(2, sequence, 64, dtype=dtype, requires_grad=True)
    block, tables = model.layers[0], (model.cos[:sequence], model.sin[:sequence])
    counted = kept_bytes(lambda: block(x, *tables), model.parameters())
    short = dtype == torch.bfloat16 and sequence <= 512
    predicted = block_activations(config, 2, sequence, 1, dtype.itemsize, short)
    assert counted == predicted


def test_activations_of_a_model_are_its_blocks_and_its_loss():
    model = Llama(SMALL).bfloat16()
    windows = torch.randint(96, (2, 1025))

    def loss():
        hidden = model(windows[:, :-1], return_hidden=True)
        return vocabulary_loss(hidden, model.output.weight, windows[:, 1:])

    counted = kept_bytes(loss, model.parameters())
    kept = training_memory(SMALL, Layout(), 1, 2, 1024).activations
    # the last norm and the gradient of what it gives, and that of the output matrix
    kept += 2048 * (64 * (4 + 2 + 2) + 4) + 4 * 96 * 64
    assert 0 <= counted - kept <= windows.nbytes  # the embedding keeps the tokens


def test_checkpointing_keeps_the_inputs_of_blocks():
    layout = Layout(checkpoint_activations=True)
    memory = training_memory(SMALL, layout, 1, 2, 1024)
    assert memory.activations == 3 * 2 * 1024 * 64 * 2  # blocks, tokens, width, bf16
    assert memory.weights == training_memory(SMALL, Layout(), 1, 2, 1024).weights


def test_sixteen_bytes_fall_with_the_processes_that_share_a_copy():
    config = LlamaConfig.preset("7b")
    one, eight, copies = (
        training_memory(config, layout, n, 1, 4096)
        for layout, n in ((Layout(), 1), (Layout(), 8), (Layout(shard=1), 8))
    )
    stay = one.weights + one.gradients + one.optimizer
    assert stay == 16 * config.parameter_count()
    assert eight.weights + eight.gradients + eight.optimizer == stay / 8
    assert copies == one


def test_prediction_holds_in_two_processes(tmp_path):
    """The short form of benchmarks/memory.py."""
    output = tmp_path / "memory.json"
    case = "1" if best_precision() == "bf16-mixed" else "8"  # emulated, bf16 takes long
    command = [sys.executable, ROOT / "benchmarks" / "memory.py", "--cases", case]
    command += ["--layers", "4", f"--output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [case] = json.loads(output.read_text())["results"]
    predicted, measured = case["predicted"], case["measured"]
    for kind in ("weights", "gradients", "optimizer"):
        assert measured[kind] == predicted[kind] > 0
    assert measured["total"] == pytest.approx(predicted["total"], rel=0.1)


# Table 2: GPU hours, watts, tonnes of CO2eq; and the MFU by 6 N that the hours imply
TABLE_2 = {
    "7b": (184_320, 400, 31.22, 0.391),
    "13b": (368_640, 400, 62.44, 0.377),
    "34b": (1_038_336, 350, 153.90, 0.347),
    "70b": (1_720_320, 400, 291.42, 0.428),
}


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2(name):
    hours, watts, tonnes, share = TABLE_2[name]
    assert carbon_tonnes(hours, watts) == pytest.approx(tonnes, rel=5e-4)
    flops = 2e12 * flops_per_token(LlamaConfig.preset(name))
    assert round(utilisation(flops, hours, GPUS["a100-80gb"]), 3) == share


def test_attention_is_two_products_over_half_a_window():
    config = LlamaConfig.preset("7b")
    more = flops_per_token(config, 4096) - flops_per_token(config)
    # 32 blocks, 2 products, 2 operations, width 4,096, 2,048 tokens; and twice backward
    assert more == 32 * 2 * 2 * 4096 * 2048 * 3


def test_the_cache_is_the_one_that_models_make():
    caches = Llama(SMALL).bfloat16().new_cache(batch_size=3, room=50)
    counted = sum(c.keys.nbytes + c.values.nbytes for c in caches)
    assert cache_bytes(SMALL, 3, 50) == counted


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 40))
def test_parts_of_a_batch_are_the_fewest_that_fit(share, groups, at_most):
    parts = accumulation(share * groups, groups, at_most)
    assert share % parts == 0
    assert share // parts <= at_most
    assert all(share % n or share // n > at_most for n in range(1, parts))


@pytest.mark.parametrize(
    ("batch", "groups", "at_most", "words"),
    [
        (1024, 12, 1, "1,024 windows / 12 .* = 85.33 windows .* 1,020 would do"),
        (4, 8, 1, "= 0.50 windows for each; a batch of 8 would do"),
        (8, 8, 0, "at least 1 window"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(batch, groups, at_most, words):
    with pytest.raises(ValueError, match=words):
        accumulation(batch, groups, at_most)
