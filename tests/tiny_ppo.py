"""A PPO run of a second, in processes that are killed on purpose."""

import os
import signal
from pathlib import Path

ITERATIONS = 6


def write_model(folder: Path, vocab_size: int = 300) -> Path:
    """A chat model of a few thousand random weights, with its tokenizer."""
    import torch

    from llama2_lite.model import Llama, LlamaConfig
    from llama2_lite.tokenizer import train_tokenizer

    texts = [
        f"[INST] Name {i}. [/INST] It is {j}." for i in range(20) for j in range(9)
    ]
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", vocab_size)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(16, 2, 2, 2, vocab_size, 32, max_seq_len=96))
    model.output.weight.data[tokenizer.eos_id] += 0.6  # so that some answers end
    model.save_pretrained(folder / "chat", tokenizer)
    return folder / "chat"


def dialogs(n: int, start: int = 0) -> list[list[dict[str, str]]]:
    """Prompts of several lengths."""
    return [
        [{"role": "user", "content": f"Name {i}{' please' * (i % 3)}."}]
        for i in range(start, start + n)
    ]


def reward(prompts, answers):
    """Short answers are good, and no two alike."""
    import torch

    lengths = [
        len(a) + len(p[0]["content"]) / 9 for p, a in zip(prompts, answers, strict=True)
    ]
    return -torch.tensor(lengths, dtype=torch.float)


def make_training(
    model_folder: Path,
    folder: Path,
    callbacks=(),
    iterations=ITERATIONS,
    batch_size=12,
    trainer=None,
    **settings,
):
    """Trainer, module and data of the run; ``trainer`` has more of its arguments."""
    from lightning.pytorch import Trainer

    from llama2_lite.ppo import PPOModule, PPOSettings, PromptDataModule, PromptDataset
    from llama2_lite.runtime.training import prepare_process, trainer_parts
    from llama2_lite.tokenizer import Tokenizer

    prepare_process()
    tokenizer = Tokenizer(model_folder / "tokenizer.model")
    settings = {"minibatch_size": 4, "max_new_tokens": 24, "lr": 1e-3, **settings}
    module = PPOModule(model_folder, reward, PPOSettings(**settings), seed=1)
    train, held_out = (
        PromptDataset(dialogs(n, start), tokenizer, 96, settings["max_new_tokens"])
        for n, start in ((20, 0), (6, 20))
    )
    data = PromptDataModule(train, held_out, batch_size)
    parts = trainer_parts(
        folder,
        folder / "model",
        lambda: tokenizer,
        checkpoint_every=2,
        callbacks=list(callbacks),
    )
    usual = {"max_steps": iterations, "val_check_interval": 2, "log_every_n_steps": 1}
    return (
        Trainer(**parts, **usual, accelerator="cpu", **(trainer or {})),
        module,
        data,
    )


def train(model_folder: Path, folder: Path, callbacks=(), **settings):
    """Run to the end, from where an earlier process was killed."""
    from llama2_lite.runtime.training import fit

    made = make_training(model_folder, folder, callbacks, **settings)
    fit(*made, folder, print)
    return made


def train_and_die(model_folder: Path, folder: Path, iteration: int) -> None:
    """Be killed between two gradient steps of an iteration."""
    from llama2_lite.ppo import PPOModule

    original = PPOModule.losses
    calls = 0

    def losses(self, part):
        nonlocal calls
        calls += 1
        if calls == 3 * iteration + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, part)

    PPOModule.losses = losses
    train(model_folder, folder)


def weights(module) -> dict:
    """All parameters that learn, put together."""
    from llama2_lite.pretraining import whole

    return {name: whole(p.detach()).clone() for name, p in module.named_parameters()}


def train_as_one_of(
    rank: int, size: int, port: int, model_folder: Path, folder: Path, cases: dict
) -> None:
    """Be one of several processes of some runs; the first notes what came out.

    Args:
        cases: layout and settings of each run.
    """
    import torch
    from safetensors.torch import save_file

    from llama2_lite.runtime.strategy import LayoutStrategy

    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
    }
    for name, (layout, settings) in cases.items():
        processes = {"strategy": LayoutStrategy(layout), "devices": size}
        _, module, _ = train(model_folder, folder / name, trainer=processes, **settings)
        found = weights(module)
        if rank == 0:
            save_file(found, folder / f"{name}.safetensors")
