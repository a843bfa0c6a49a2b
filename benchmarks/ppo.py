"""An iteration of PPO beside trl's: `python benchmarks/ppo.py`.

Both sides start from the same weights, answer the same number of prompts of the same
length, ask one reward model, learn a value model, and take as many gradient steps of
the same size. In "fixed" cases every answer has the same number of tokens; in the case
"chat" the tour's chat model answers the town's prompts, and answers end where they
end. The sides run in turn, several times; ratios are of medians of all iterations but
the first of each turn. `--compiled` adds both sides once more: ours with compiled
blocks, as by `llama2-lite ppo --layout.compile true`, and trl with torch_compile.

trl has to be there: in an environment of its own, `pip install trl==1.10.0` beside
what this package needs. (Later versions come without PPO.)
"""

import argparse
import contextlib
import json
import logging
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from lightning import Trainer
from lightning.pytorch import Callback
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from llama2_lite.chat import Dialog
from llama2_lite.generation import generate
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.ppo import (
    PPOModule,
    PPOSettings,
    Prompt,
    PromptDataModule,
    PromptDataset,
)
from llama2_lite.pretraining import LayOut, best_precision, on_one_device
from llama2_lite.reward import RewardModel, pad_rows
from llama2_lite.runtime.artifacts import machine_name, write_json
from llama2_lite.runtime.training import (
    TRAINER_DEFAULTS,
    compile_blocks,
    prepare_process,
)
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import build_town

BATCH, MINIBATCH, PROMPT, ANSWER, LR = 128, 64, 32, 64, 1e-5  # the tour's, but LR


class FixedLength(PPOModule):
    """Answers of equal length: EOS is a token like any other."""

    def sample(
        self, prompts: list[Prompt], seed: int, rows: Sequence[int] | None = None
    ) -> tuple[list[list[int]], list[str], Tensor]:
        """As `PPOModule.sample`, but none ends early, and all count as ended."""
        ids = [prompt.ids for prompt in prompts]
        no_autocast = torch.autocast(self.device.type, enabled=False)
        with self.sampler() as policy, no_autocast:
            drawn = generate(policy, ids, max_new_tokens=ANSWER, seed=seed, rows=rows)
        texts = [" ".join(map(str, row)) for row in drawn.ids]
        return drawn.ids, texts, torch.ones(len(ids), dtype=torch.bool)


class Clock:
    """Seconds of each iteration."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def start(self) -> None:
        """Where the first iteration begins."""
        self.last = time.perf_counter()

    def tick(self) -> None:
        """Where one ends and the next begins."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


class OurClock(Clock, Callback):
    """For Lightning."""

    def on_train_start(self, *args):
        self.start()

    def on_train_batch_end(self, *args):
        self.tick()


class TheirClock(Clock, TrainerCallback):
    """For transformers."""

    def on_train_begin(self, *args, **kwargs):
        self.start()

    def on_step_end(self, *args, **kwargs):
        self.tick()


def model_reward(model: RewardModel, tokenizer: Tokenizer, fixed: bool):
    """One reward model, asked about prompts and answers in one pass."""

    @torch.no_grad()
    def reward(prompts: list[Dialog], answers: list[str]) -> Tensor:
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if fixed:
                ids = prompt[0]["ids"] + [int(word) for word in answer.split()]
            else:
                text = f"[INST] {prompt[-1]['content']} [/INST] {answer} "
                ids = tokenizer.encode(text, bos=True, eos=True)
            rows.append(ids)
        starts = torch.ones(len(rows), dtype=torch.long)  # only for likelihoods
        return model(*pad_rows(rows), starts)[:, 0]

    return reward


def our_side(
    folder: Path,
    prompts: list[Prompt],
    precision: str,
    fixed: bool,
    lay_out: LayOut[Any] = on_one_device,
) -> Callable[[int], list[float]]:
    """Run so many iterations; returns their seconds."""
    tokenizer = Tokenizer(folder / "tokenizer.model")
    torch.manual_seed(1)
    judge = RewardModel.from_chat(folder)
    torch.nn.init.normal_(judge.head.weight)
    reward = model_reward(judge.eval(), tokenizer, fixed)
    kind = FixedLength if fixed else PPOModule
    settings = PPOSettings(
        minibatch_size=MINIBATCH, max_new_tokens=ANSWER, lr=LR, critic_lr=LR
    )
    data = PromptDataset.__new__(PromptDataset)
    data.prompts, data.seed, data.sequence_length = prompts, 0, 1024
    data.n_tokens = sum(len(prompt.ids) for prompt in prompts)

    def run(n_iterations: int) -> list[float]:
        clock = OurClock()
        trainer = Trainer(
            max_steps=n_iterations,
            precision=precision,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            limit_val_batches=0,
            accelerator="cpu",
            **TRAINER_DEFAULTS,
        )
        module = kind(folder, reward, settings, lay_out=lay_out)
        trainer.fit(module, PromptDataModule(data, data, BATCH))
        return clock.seconds

    return run


def their_side(
    folder: Path,
    prompts: list[Prompt],
    precision: str,
    fixed: bool,
    torch_compile: bool = False,
) -> Callable[[int], list[float]]:
    """The same with trl."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    # only pads: the prompts are ids already
    vocabulary = {
        str(i): i for i in range(Tokenizer(folder / "tokenizer.model").vocab_size)
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Backend(WordLevel(vocabulary, unk_token="0")),
        pad_token="0",
        eos_token="2",
        padding_side="left",
    )
    dataset = Dataset.from_dict({"input_ids": [prompt.ids for prompt in prompts]})

    def classifier() -> LlamaForSequenceClassification:
        return LlamaForSequenceClassification.from_pretrained(
            folder, num_labels=1, pad_token_id=0, dtype=torch.float32
        )

    def run(n_iterations: int) -> list[float]:
        clock = TheirClock()
        policy, reference = (
            LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
            for _ in range(2)
        )
        arguments = PPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=BATCH,
            local_rollout_forward_batch_size=BATCH,
            gradient_accumulation_steps=1,
            num_mini_batches=BATCH // MINIBATCH,
            num_ppo_epochs=1,
            total_episodes=BATCH * n_iterations,
            response_length=ANSWER,
            temperature=1.0,
            stop_token=None if fixed else "eos",
            learning_rate=LR,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=precision == "bf16-mixed",
            gradient_checkpointing=False,
            torch_compile=torch_compile,
        )
        with contextlib.redirect_stdout(None):
            trainer = PPOTrainer(
                arguments,
                tokenizer,
                policy,
                reference,
                classifier(),
                dataset,
                classifier(),
                callbacks=[clock],
            )
            trainer.train()
        return clock.seconds

    return run


def random_model(preset: str, folder: Path, like: Path) -> tuple[Path, list[Prompt]]:
    """A model with random weights and prompts of random tokens."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(like / "tokenizer.model")
    config = LlamaConfig.preset(preset, vocab_size=tokenizer.vocab_size)
    Llama(config).save_pretrained(folder, tokenizer)
    rows = torch.randint(3, tokenizer.vocab_size, (4 * BATCH, PROMPT)).tolist()
    prompts = [
        Prompt([{"role": "user", "content": "", "ids": ids}], ids)  # type: ignore
        for ids in rows
    ]
    return folder, prompts


def chat_prompts(folder: Path) -> list[Prompt]:
    """Requests of the town."""
    tasks = build_town().tasks("train")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    dialogs = [task.dialog() for task in Random(0).sample(tasks, 4 * BATCH)]
    return PromptDataset(dialogs, tokenizer, 1024, ANSWER).prompts


def measure(
    name: str, folder: Path, prompts: list[Prompt], precision: str, arguments
) -> dict[str, object]:
    """Both sides in turn."""
    fixed = name != "chat"
    make: dict[str, Callable[..., Any]] = {"ours": our_side, "trl": their_side}
    if arguments.compiled:
        make["ours, compiled"] = partial(our_side, lay_out=compile_blocks)
        make["trl, compiled"] = partial(their_side, torch_compile=True)
    sides = {n: m(folder, prompts, precision, fixed) for n, m in make.items()}
    seconds: dict[str, list[float]] = {n: [] for n in sides}
    for _ in range(arguments.turns):
        for side, run in sides.items():
            seconds[side] += run(arguments.iterations)[1:]
    median = {n: statistics.median(values) for n, values in seconds.items()}
    return {
        "case": name,
        "precision": precision,
        "seconds_per_iteration": {n: round(value, 3) for n, value in median.items()},
        "fastest": {n: round(min(values), 3) for n, values in seconds.items()},
        "iterations": len(seconds["ours"]),
        "ratios": {
            ours: round(median[ours.replace("ours", "trl")] / median[ours], 2)
            for ours in median
            if ours.startswith("ours")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help="of each side")
    parser.add_argument("--iterations", type=int, default=4, help="of each turn")
    parser.add_argument("--chat", type=Path, help="a chat model of the town")
    parser.add_argument("--presets", nargs="*", default=["town", "8m"])
    parser.add_argument("--compiled", action="store_true", help="both once more")
    parser.add_argument("--precisions", nargs="*", default=["32-true", "bf16-mixed"])
    slug = re.sub(r"\W+", "-", machine_name().lower())
    output = Path(__file__).parent / "results" / f"ppo-{slug}.json"
    parser.add_argument("--output", type=Path, default=output, help="a JSON file")
    arguments = parser.parse_args()
    prepare_process()
    logging.disable(logging.WARNING)
    if arguments.chat is None:
        from llama2_lite.runtime.alignment import aligned

        arguments.chat = aligned().sft().path
    results = []
    with tempfile.TemporaryDirectory() as name:
        cases = [
            (
                f"fixed, {preset}",
                *random_model(preset, Path(name) / preset, arguments.chat),
            )
            for preset in arguments.presets
        ]
        cases.append(("chat", arguments.chat, chat_prompts(arguments.chat)))
        for case in cases:
            for precision in arguments.precisions:
                results.append(measure(*case, precision, arguments))
                print(json.dumps(results[-1]), flush=True)
    record = {
        "machine": machine_name(),
        "fastest_precision": best_precision(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "trl": version("trl"),
        "batch": BATCH,
        "minibatch": MINIBATCH,
        "prompt_tokens": PROMPT,
        "answer_tokens": ANSWER,
        "results": results,
    }
    write_json(arguments.output, record)


if __name__ == "__main__":
    main()
