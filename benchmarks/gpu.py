"""Everything that wants a GPU, in one command: `python benchmarks/gpu.py`.

Pretraining at 1B and 7B beside transformers, decoding at 7B, an iteration of PPO at 1B,
and the tour. Each measurement has a process of its own, so that each starts with empty
memory. `--small` does all of it in miniature, without a GPU.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama2_lite.generation import generate
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import configure_optimizer, vocabulary_loss
from llama2_lite.runtime.artifacts import machine_name, write_json
from llama2_lite.runtime.training import prepare_process
from llama2_lite.scaling import (
    GPUS,
    Gpu,
    Layout,
    cache_bytes,
    flops_per_token,
    lay_out,
    make_mesh,
    training_memory,
)

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL: dict[str, list[dict[str, Any]]] = {
    "pretrain": [{"size": "1b", "length": 4096}, {"size": "7b", "length": 4096}],
    "decode": [{"size": "7b", "batch": batch, "new": 256} for batch in (1, 64)],
    "ppo": [{"size": "1b", "batch": 512, "minibatch": 64, "new": 128}],
    "tour": [{}],
}
SMALL: dict[str, list[dict[str, Any]]] = {
    "pretrain": [{"size": "town-small", "length": 64}],
    "decode": [{"size": "town-small", "batch": batch, "new": 32} for batch in (1, 3)],
    "ppo": [{"size": "town-small", "batch": 64, "minibatch": 32, "new": 32}],
    "tour": [{"small": True}],
}
TINY_TOUR = (
    "documents: 3000\nvalidation_documents: 200\nvocab_size: 400\nmodel: town-small\n"
    "max_steps: 4\nwarmup: 2\nlengths: [[1.0, 64, 4]]\nvalidate_every: 4\n"
    "peak_lr: 1.0e-3\ncheckpoint_every: 4\n"
)


def this_gpu() -> Gpu | None:
    """What the data sheet says about the GPU, if it is one of those known here."""
    if DEVICE == "cpu":
        return None
    found = torch.cuda.get_device_name().lower()
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    names = [
        name for name in GPUS if name.partition("-")[0].removeprefix("rtx") in found
    ]
    return (
        GPUS[min(names, key=lambda name: abs(GPUS[name].memory - gib))]
        if names
        else None
    )


def seconds_of(action: Callable[[], Any]) -> float:
    """How long something takes, to the end of what it started on the GPU."""
    start = time.perf_counter()
    action()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# Pretraining


def choose(config: LlamaConfig, length: int) -> tuple[Layout, int]:
    """As many windows as fit by the plan, with blocks computed again if need be."""
    room = torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else 2**30
    for again in (False, True):
        for windows in (8, 4, 2, 1):
            layout = Layout(checkpoint_activations=again, compile=DEVICE == "cuda")
            if training_memory(config, layout, 1, windows, length).total < 0.92 * room:
                return layout, windows
    raise ValueError(f"{config.parameter_count():,} parameters do not fit at all")


def ours(config: LlamaConfig, layout: Layout) -> tuple[Any, Callable[..., Any]]:
    """Our model, laid out as the engine does it, and its loss."""
    store = Path(tempfile.mkdtemp()) / "store"
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{store}", world_size=1, rank=0)
    mesh = make_mesh(DEVICE, layout.sizes(1, config))
    fill = partial(Llama.init_weights, seed=0)
    model = lay_out(partial(Llama, config), fill, mesh, layout, torch.bfloat16)

    def loss(windows: torch.Tensor) -> torch.Tensor:
        hidden = model(windows[:, :-1], return_hidden=True)
        return vocabulary_loss(hidden, model.output.weight, windows[:, 1:])

    return model, loss


def theirs(config: LlamaConfig, layout: Layout) -> tuple[Any, Callable[..., Any]]:
    """Transformers' model, with fp32 weights, under autocast, compiled."""
    import transformers

    made = transformers.LlamaConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        intermediate_size=config.hidden_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_seq_len,
        use_cache=False,
    )
    with torch.device(DEVICE):
        model = transformers.LlamaForCausalLM(made).train()
    if layout.checkpoint_activations:
        model.gradient_checkpointing_enable()

    def loss(windows: torch.Tensor) -> torch.Tensor:
        inputs = windows[:, :-1]  # they shift the labels themselves
        return model(input_ids=inputs, labels=inputs).loss

    return model, torch.compile(loss) if layout.compile else loss


def pretrain(size: str, length: int, side: str) -> dict[str, Any]:
    """Steps of training: pace, MFU, and memory beside the plan."""
    config = LlamaConfig.preset(size, max_seq_len=length)
    layout, windows = choose(config, length)
    model, loss_of = (ours if side == "ours" else theirs)(config, layout)
    optimizer = configure_optimizer(model, 1e-4)
    tokens = torch.randint(config.vocab_size, (windows, length + 1), device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    median = statistics.median(seconds_of(step) for _ in range(8))
    pace = windows * length / median
    gpu, plan = this_gpu(), training_memory(config, layout, 1, windows, length)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
    return {
        "windows": windows,
        "blocks_again": layout.checkpoint_activations,
        "tokens_per_second": round(pace, 1),
        "mfu": gpu and round(pace * flops_per_token(config, length) / gpu.flops, 4),
        "mfu_6n": gpu and round(pace * flops_per_token(config) / gpu.flops, 4),
        "peak_bytes": peak,
        "planned_bytes": plan.total,
    }


# Decoding, PPO, and the tour


@torch.no_grad()
def decode(size: str, batch: int, new: int) -> dict[str, Any]:
    """Tokens one after another: pace, and share of the memory's bandwidth."""
    config = LlamaConfig.preset(size)
    with torch.device(DEVICE):
        model = Llama(config).bfloat16().eval()
    prompt = 4 * new
    prompts = torch.randint(config.vocab_size, (batch, prompt)).tolist()
    run = partial(generate, model, prompts, temperature=0, compiled=DEVICE == "cuda")
    run(max_new_tokens=new)  # compiles
    first, all_of_them = (
        min(seconds_of(partial(run, max_new_tokens=n)) for _ in range(3))
        for n in (1, new)
    )
    step = (all_of_them - first) / (new - 1)  # without the prompt
    held = 2 * (config.parameter_count() - config.vocab_size * config.dim)
    n_bytes = held + cache_bytes(config, batch, prompt + new // 2)
    gpu = this_gpu()
    return {
        "tokens_per_second": round(batch / step, 1),
        "bytes_per_step": n_bytes,
        "share_of_bandwidth": gpu and round(n_bytes / step / gpu.bandwidth, 4),
    }


def ppo(size: str, batch: int, minibatch: int, new: int) -> dict[str, Any]:
    """Iterations of PPO with a reward that costs nothing."""
    from lightning.pytorch import Callback, Trainer

    from llama2_lite.ppo import PPOModule, PPOSettings, PromptDataModule, PromptDataset
    from llama2_lite.runtime.training import trainer_parts
    from llama2_lite.tokenizer import train_tokenizer
    from llama2_lite.town import build_town

    folder = Path(tempfile.mkdtemp())
    texts = [document.text for document in build_town().documents(3000)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", 512)
    config = LlamaConfig.preset(size, vocab_size=tokenizer.vocab_size)
    model = Llama(config)
    # so that an answer ends after some dozens of tokens, whatever they are
    model.output.weight.data[tokenizer.eos_id] += 2 / config.dim**0.5
    model.bfloat16().save_pretrained(folder / "chat", tokenizer)
    prompts = [[{"role": "user", "content": text[:40]}] for text in texts]

    def reward(prompts: Any, answers: list[str]) -> torch.Tensor:
        return torch.tensor([float(len(set(answer))) for answer in answers])

    class Laps(Callback):
        """When each iteration ended."""

        ends: list[float]

        def on_train_start(self, *_: Any) -> None:
            self.ends = [time.perf_counter()]

        def on_train_batch_end(self, *_: Any) -> None:
            self.ends.append(time.perf_counter())

    laps, context = Laps(), config.max_seq_len
    settings = PPOSettings(minibatch_size=minibatch, max_new_tokens=new, lr=1e-6)
    module = PPOModule(folder / "chat", reward, settings)
    train, held_out = (
        PromptDataset(part, tokenizer, context, new)
        for part in (prompts[batch:], prompts[:batch])
    )
    parts = trainer_parts(folder / "run", folder / "model", lambda: tokenizer)
    parts["callbacks"] = [laps]  # no checkpoints: they are not what is measured
    trainer = Trainer(**parts, max_steps=3, accelerator=DEVICE, precision="bf16-mixed")
    trainer.fit(module, PromptDataModule(train, held_out, batch))
    times = [b - a for a, b in zip(laps.ends, laps.ends[1:], strict=False)]
    return {
        "parameters": config.parameter_count(),
        "seconds_of_iteration": round(min(times[1:]), 3),
        "peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None,
    }


def tour(small: bool = False) -> dict[str, Any]:
    """The town's tour from an empty folder."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "llama2_lite.runtime.cli", "tour"]
    command += ["--folder", str(folder / "tour")]
    if small:
        recipe = folder / "recipe.yaml"
        recipe.write_text(TINY_TOUR)
        command += ["--base-only", "--config", str(recipe)]
    run = partial(subprocess.run, command, check=True, stdout=sys.stderr)
    return {"seconds": round(seconds_of(run), 1)}


# One process for each measurement


def work(name: str, keywords: dict[str, Any]) -> None:
    """Do one measurement; the last line that it prints are its figures."""
    prepare_process()
    measure: dict[str, Callable[..., dict[str, Any]]] = {
        "pretrain": pretrain,
        "decode": decode,
        "ppo": ppo,
        "tour": tour,
    }
    try:
        figures = measure[name](**keywords)
    except torch.cuda.OutOfMemoryError as error:
        figures = {"out_of_memory": str(error).partition("\n")[0]}
    print(json.dumps(figures), flush=True)


def measure_apart(name: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """A measurement in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve())]
    command += ["--work", json.dumps([name, keywords])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.splitlines()[-1:]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measure, print, and write down; 1 if something failed."""
    slug = re.sub(r"\W+", "-", machine_name().lower())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="in miniature, anywhere")
    parser.add_argument("--only", nargs="+", choices=list(FULL), default=list(FULL))
    parser.add_argument("--output", type=Path, help="JSON file; others of --only stay")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work)
        return 0
    if DEVICE == "cpu" and not arguments.small:
        print("error: there is no GPU; --small runs in miniature", file=sys.stderr)
        return 2
    cases = []
    for name in arguments.only:
        for keywords in (SMALL if arguments.small else FULL)[name]:
            sides = ("ours", "transformers") if name == "pretrain" else (None,)
            cases += [(name, keywords | ({"side": s} if s else {})) for s in sides]
    kind = "small" if arguments.small else "gpu"
    output = arguments.output or RESULTS / f"{kind}-{slug}.json"
    found: list[dict[str, Any]] = []
    record = {"machine": machine_name(), "torch": torch.__version__, "results": found}
    if output.is_file():
        earlier = json.loads(output.read_text("utf-8"))
        if {**earlier, "results": []} == record:  # of the same machine and torch
            found += [
                figures
                for figures in earlier["results"]
                if figures["what"] not in arguments.only
            ]
    for name, keywords in cases:
        figures = measure_apart(name, keywords)
        found.append({"what": name, **keywords, **figures})
        print(json.dumps(found[-1]), flush=True)
        write_json(output, record)
    return int(any("failed" in figures for figures in found))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
