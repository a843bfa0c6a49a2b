"""Ten steps of each stage, by one process or by several that share the work."""

import logging
import multiprocessing
import os
import socket
import warnings
from pathlib import Path
from typing import Any

STEPS = 10


def write_inputs(folder: Path) -> None:
    """A tokenizer, a model of random weights, and shards."""
    import torch

    from llama2_lite.corpus import write_shards
    from llama2_lite.model import Llama, LlamaConfig
    from llama2_lite.tokenizer import train_tokenizer
    from llama2_lite.town import build_town

    town = build_town(n_people=12)
    texts = [document.text for document in town.documents(300)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", 400)
    write_shards(texts, tokenizer, folder / "shards")
    torch.manual_seed(0)
    config = LlamaConfig(32, 2, 4, 2, 400, hidden_dim=48, max_seq_len=256)
    Llama(config).save_pretrained(folder / "chat", tokenizer)


def make_stage(name: str, folder: Path) -> tuple[Any, Any]:
    """Module and data of a stage."""
    from lightning import LightningDataModule

    from llama2_lite.chat import encode_dialog
    from llama2_lite.ghost_attention import (
        GhostAttentionModule,
        GhostDataset,
        GhostDialog,
    )
    from llama2_lite.model import read_config
    from llama2_lite.pretraining import (
        MixedLengthLoader,
        PretrainingModule,
        TokenDataModule,
        processes,
    )
    from llama2_lite.reward import PreferenceDataset, RewardModule
    from llama2_lite.sft import DialogDataset, SupervisedModule, sample_demonstrations
    from llama2_lite.tokenizer import Tokenizer
    from llama2_lite.town import Preference, build_town

    if name == "pretraining":
        config = read_config(folder / "chat" / "config.json")
        module = PretrainingModule(config, peak_lr=1e-3, warmup=2)
        lengths = [(0.5, 16, 16), (0.5, 64, 8)]
        return module, TokenDataModule(folder / "shards", folder / "shards", lengths)

    class Batches(LightningDataModule):
        def __init__(self, dataset: Any):
            super().__init__()
            self.dataset = dataset

        def train_dataloader(self) -> MixedLengthLoader:
            n_parts = self.trainer.accumulate_grad_batches
            place = processes(self.trainer)
            return MixedLengthLoader([self.dataset], [1.0], [8], *place, n_parts)

    tokenizer = Tokenizer(folder / "tokenizer.model")
    if name == "sft":
        dialogs = sample_demonstrations(build_town(n_people=12), 40)
        examples = [encode_dialog(dialog, tokenizer) for dialog in dialogs]
        module = SupervisedModule(folder / "chat", peak_lr=1e-3)
        return module, Batches(DialogDataset(examples, 200))
    if name == "reward":
        pairs = [
            Preference(
                [{"role": "user", "content": f"What is {i}?"}],
                f"It is {i}.",
                "No." * (1 + i % 3),
                ("significantly better", "slightly better")[i % 2],
                (None, None, "both safe", "chosen safe, other unsafe")[i % 4],
            )
            for i in range(20)
        ]
        weights = {"likelihood_weight": 1.0, "next_token_weight": 0.5}
        module = RewardModule(folder / "chat", 1e-3, safety_weight=0.5, **weights)
        return module, Batches(PreferenceDataset(pairs, tokenizer, 128))
    turns = [{"role": role, "content": "Who?"} for role in ("user", "assistant") * 3]
    ghosts = [
        GhostDialog("Shout.", turns, [f"HERE {i}!", None, "YES. " * (i % 4 + 1)])
        for i in range(12)
    ]
    module = GhostAttentionModule(folder / "chat", peak_lr=1e-3)
    return module, Batches(GhostDataset(ghosts, tokenizer, 128))


def train(name: str, folder: Path, layout: Any = None, **options: Any) -> Any:
    """Trainer and module after ten steps, and the loss of each step.

    Args:
        name: of the stage.
        folder: of its inputs.
        layout: for several processes, each of which calls this.
        options: of Lightning's trainer; ``run`` for the folder of checkpoints.
    """
    import torch
    from lightning.pytorch import Callback, Trainer

    from llama2_lite.runtime.checkpoints import Checkpoints, SafeCheckpointIO
    from llama2_lite.runtime.strategy import LayoutStrategy
    from llama2_lite.runtime.training import TRAINER_DEFAULTS

    for package in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{package}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    losses: dict[int, float] = {}

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            if "loss" in trainer.callback_metrics:  # not before all parts of a step
                losses[trainer.global_step] = float(trainer.callback_metrics["loss"])

    if layout is not None:
        options["strategy"] = LayoutStrategy(layout)
    callbacks: list[Any] = [Losses()]
    if run := options.pop("run", None):
        callbacks.append(Checkpoints(run, every=6))
    resume = options.pop("resume", None)
    quiet = {"logger": False, "accelerator": "cpu", "limit_val_batches": 0}
    quiet |= {
        "max_steps": STEPS,
        "plugins": [SafeCheckpointIO()],
        "val_check_interval": 9**9,
    }
    module, data = make_stage(name, folder)
    trainer = Trainer(callbacks=callbacks, **(TRAINER_DEFAULTS | quiet | options))
    trainer.fit(module, data, ckpt_path=resume)
    return trainer, module, losses


def outcome(name: str, folder: Path, layout: Any = None, **options: Any) -> Any:
    """Losses and whole weights after ten steps, as tensors."""
    import torch

    from llama2_lite.pretraining import whole

    _, module, losses = train(name, folder, layout, **options)
    weights = {
        name: whole(tensor.detach()) for name, tensor in module.named_parameters()
    }
    return weights | {"losses": torch.tensor(list(losses.values()))}


def work(rank: int, n_processes: int, port: int, folder: Path, cases: Any) -> None:
    """One process of several: run all cases and, if the first, write what came out."""
    from safetensors.torch import save_file

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
    }
    for case, (name, layout, options) in cases.items():
        found = outcome(name, folder, layout, devices=n_processes, **options)
        if rank == 0:
            save_file(found, folder / f"{case}.safetensors")


def run_cases(n_processes: int, folder: Path, cases: Any) -> dict[str, Any]:
    """What came out of each case, run by several processes together.

    Seen once, on a busy machine: gloo dies while it gathers weights, of a damaged heap
    ("malloc(): ..."). Only after such a death, by a signal, is there another try.
    """
    from safetensors.torch import load_file

    codes = start_workers(n_processes, folder, cases)
    if any(code is not None and code < 0 for code in codes):
        codes = start_workers(n_processes, folder, cases)
    assert codes == [0] * n_processes
    return {case: load_file(folder / f"{case}.safetensors") for case in cases}


def start_workers(n_processes: int, folder: Path, cases: Any) -> list[int | None]:
    """Run all cases by several processes; returns how these ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llama2_lite.runtime.strategy"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        context.Process(target=work, args=(rank, n_processes, port, folder, cases))
        for rank in range(n_processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(600)
    return [worker.exitcode for worker in workers]
