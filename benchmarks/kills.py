"""Kill training again and again: `python benchmarks/kills.py --stage sft --kills 3`.

Each stage is run as the real command on data and a model of a few thousand weights,
killed (SIGKILL) at random moments, half of them aimed into a save, and started again
until it is done; then the next run begins, until there were enough kills. One more run
is killed after each step, at the boundaries of the data's epochs too. What every run
leaves, the last checkpoint with weights and optimizer, the model folder, sampled data
and figures, has to be the same, bit for bit, as what a run leaves that nobody killed.
With `--processes 2` the model is sharded over two of them, one of which is killed; the
other has to end by itself. With `--signal TERM` or `INT` all are asked to stop instead,
which has to be exit code 0. With `--torchrun` that has to start the two processes of a
run again when one of them is killed.

Processes are forked from one that has imported PyTorch, so that a start costs a second.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from llama2_lite.runtime.artifacts import machine_name, write_json

STAGES = ("pretrain", "sft", "reward", "reject", "ppo", "gatt")
STEPS = 12
IMPORTS = 8  # seconds that a process needs before it begins
PATIENCE = 60  # seconds for the processes that are left when one was killed
PARTS = ("model", "sampled", "result.json")  # what is compared beside checkpoints
CONTEXT = multiprocessing.get_context("forkserver")


def make_world(folder: Path) -> None:
    """Text, pairs, dialogues, a chat model and two reward models, all tiny."""
    import torch

    from llama2_lite.model import Llama, LlamaConfig
    from llama2_lite.reward import RewardConfig, RewardModel
    from llama2_lite.tokenizer import train_tokenizer

    records = [
        {
            "prompt": f"What is {a} + {b}?",
            "chosen": f"It is {a + b}.",
            "rejected": f"No, {a}!",
        }
        for a in range(1, 9)
        for b in range(1, 9)
    ]
    turns = [
        {"role": role, "content": record[key]}
        for record in records
        for role, key in (("user", "prompt"), ("assistant", "chosen"))
    ]
    dialogs = [{"dialog": turns[i : i + 4]} for i in range(0, len(turns), 4)]
    told = [{"text": "Be kind."}, {"text": "Be it."}]
    for name, lines in (("pairs", records), ("dialogs", dialogs), ("told", told)):
        content = "\n".join(map(json.dumps, lines))
        (folder / f"{name}.jsonl").write_text(content, "utf-8")
    texts = [f"[INST] {r['prompt']} [/INST] {r['chosen']}" for r in records]
    (folder / "text.txt").write_text("\n".join(texts), "utf-8")
    rest = [" ".join(r["rejected"] for r in records), "<<SYS>> Be kind. <</SYS>>"]
    tokenizer = train_tokenizer([*texts, *rest], folder / "t.model", 320)
    torch.manual_seed(0)
    config = LlamaConfig(32, 2, 2, 2, 320, 64, max_seq_len=64)
    Llama(config).save_pretrained(folder / "start", tokenizer)
    for name in ("helpful", "safe"):
        reward = RewardModel(RewardConfig(**vars(config)))
        torch.nn.init.normal_(reward.head.weight)
        reward.save_pretrained(folder / name, tokenizer)


def arguments(world: Path, stage: str, output: Path) -> list[str]:
    """The command line of a stage: twelve steps, a checkpoint after every second."""
    shared = [
        stage,
        f"--output={output}",
        f"--trainer.max_steps={STEPS}",
        "--trainer.val_check_interval=4",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        "--checkpoint_every=2",
    ]
    rewards = [f"helpfulness={world}/helpful", f"safety={world}/safe"]
    more = {
        "pretrain": [
            *(f"--data.files={world}/text.txt", "--data.vocab_size=300"),
            *("--data.lengths=[[1.0, 32, 4]]", "--model.warmup=2"),
            *("--model.config.dim=32", "--model.config.n_layers=2"),
            *("--model.config.n_heads=2", "--model.config.n_kv_heads=2"),
            *("--model.config.hidden_dim=64", "--model.config.max_seq_len=32"),
            "--sample_tokens=8",
        ],
        "sft": ["--data.batch_size=4", "--model.peak_lr=0.01"],
        "reward": ["--data.batch_size=8", "--model.peak_lr=0.01"],
        "reject": [
            *(f"--data.{reward}" for reward in rewards),
            *("--data.k=3", "--data.max_new_tokens=8", "--data.batch_size=4"),
        ],
        "ppo": [
            *(f"--model.{reward}" for reward in rewards),
            *("--data.validation_prompts=8", "--data.batch_size=8"),
            *("--model.settings.minibatch_size=4", "--model.settings.lr=0.001"),
            "--model.settings.max_new_tokens=24",
        ],
        "gatt": [
            *(f"--data.instructions={world}/told.jsonl", "--data.batch_size=4"),
            *("--data.max_new_tokens=12", "--data.plain=0.3", "--data.context=1"),
        ],
    }
    if stage != "pretrain":
        file = "dialogs" if stage == "gatt" else "pairs"
        start = "start" if stage in ("sft", "reward") else "sft/model"
        shared += [f"--start={world}/{start}", f"--data.files={world}/{file}.jsonl"]
    return shared + more[stage]


def run_command(arguments: list[str], log: Path, rank: dict[str, str]) -> None:
    """Run a command in this process as a user does; what it prints goes to a file."""
    os.environ.update(rank)
    from llama2_lite.runtime.cli import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    ready(log, rank).touch()  # now it listens to signals, or will within microseconds
    sys.exit(main(arguments))


def ready(log: Path, rank: dict[str, str]) -> Path:
    """The file that a process touches when it has begun."""
    return log.with_suffix(f".{rank.get('RANK', 0)}.ready")


class Campaign:
    """Runs of one stage that are killed, and what became of them.

    Args:
        world: folder of `make_world`.
        folder: for the runs.
        stage: which command.
        seed: of the moments.
        number: of the signal.
        processes: of each run.
    """

    def __init__(
        self,
        world: Path,
        folder: Path,
        stage: str,
        seed: int,
        number: int,
        processes: int = 1,
    ):
        self.world, self.folder, self.stage = world, folder, stage
        self.random = random.Random(f"{seed} {stage}")
        self.signal, self.processes = number, processes
        self.hit: dict[str, int] = {}
        self.left_waiting = 0
        self.starts: list[int] = []
        self.different: list[str] = []
        self.slowest = self.save_seconds = 0.0

    def start(self, output: Path, *more: str) -> list[BaseProcess]:
        """Start the command, or continue what it began."""
        self.output, self.began = output, time.time() - 0.01  # clocks of files lag
        self.left_over = {path: _stamp(path) for path in self._partial()}
        command = [*arguments(self.world, self.stage, output), *more]
        ranks: list[dict[str, str]] = [{}]
        if self.processes > 1:
            command.append(f"--trainer.devices={self.processes}")
            ranks = as_torchrun_does(self.processes)
        log = output.with_suffix(".log")
        started: list[BaseProcess] = [
            CONTEXT.Process(target=run_command, args=(command, log, rank))
            for rank in ranks
        ]
        for process in started:
            process.start()
        for rank, process in zip(ranks, started, strict=True):
            file = ready(log, rank)
            while (_stamp(file) or 0) < self.began * 1e9 and process.is_alive():
                time.sleep(0.001)
        time.sleep(0.02)
        return started

    def _partial(self) -> list[Path]:
        return list(self.output.glob("checkpoints/*.partial"))

    def _saving(self) -> bool:
        """Whether a checkpoint is being written by the present process."""
        return any(
            _stamp(path) not in (None, self.left_over.get(path))
            for path in self._partial()
        )

    def undisturbed(self) -> dict[str, str]:
        """What a run leaves that nobody kills; notes how long it and its saves take."""
        started = self.start(self.folder / f"{self.stage}-whole")
        seconds, saves = 0.0, []
        while started[0].is_alive():
            if self._saving():
                if not seconds:
                    seconds = time.perf_counter()
            elif seconds:
                saves.append(time.perf_counter() - seconds)
                seconds = 0.0
            time.sleep(0.0005)
        self.check_exits(started)
        self.seconds = time.time() - self.began
        self.save_seconds = sum(saves) / max(1, len(saves))
        return outcome(self.output)

    def check_exits(self, started: list[BaseProcess]) -> None:
        """Make sure that a command ended well."""
        for process in started:
            process.join()
        codes = [process.exitcode for process in started]
        if any(codes):
            log = self.output.with_suffix(".log").read_text("utf-8", "replace")
            raise SystemExit(f"{self.stage} ended with {codes}:\n{log}")

    def wait(self, process: BaseProcess) -> bool:
        """Wait for the moment of the next kill; False if the run ends before."""
        aims = self.random.random() < 0.5
        if not aims:
            process.join(self.random.uniform(0, self.seconds))
            return process.is_alive()
        skipped = self.random.randrange(STEPS // 2)
        within = self.random.uniform(0, self.save_seconds)
        while process.is_alive():
            if self._saving():
                if not skipped:
                    time.sleep(within)
                    return process.is_alive()
                skipped -= 1
                while self._saving() and process.is_alive():
                    time.sleep(0.0005)
            time.sleep(0.0005)
        return False

    def phase(self) -> str:
        """What a run did when it was killed, as its folder tells."""
        if self._saving():
            return "in a save"
        log = self.output / "logs" / "metrics.csv"
        if (_stamp(log) or 0) < self.began * 1e9:
            return "before its first step"
        if (self.output / "checkpoints" / f"step-{STEPS:08}").exists():
            return "after its last step"
        return "between saves"

    def stop(self, started: list[BaseProcess]) -> None:
        """Send the signal, wait for the end, and note what it interrupted."""
        phase, since = self.phase(), time.perf_counter()
        if self.signal == signal.SIGKILL:
            victim = self.random.choice(started)
            victim.kill()
            victim.join()
            phase = self.phase()
            for process in started:
                process.join(PATIENCE)
                if process.is_alive():
                    self.left_waiting += 1
                    process.kill()
                    process.join()
        else:
            for process in started:
                assert process.pid
                with suppress(ProcessLookupError):  # it may have ended this moment
                    os.kill(process.pid, self.signal)
            self.check_exits(started)
        self.slowest = max(self.slowest, time.perf_counter() - since)
        self.hit[phase] = self.hit.get(phase, 0) + 1

    def compare(self, starts: int) -> None:
        """Note what the run that has just ended left otherwise than it should."""
        self.starts.append(starts)
        found = outcome(self.output)
        self.different += [
            f"{self.output.name}: {name}"
            for name in {**self.expected, **found}
            if self.expected.get(name) != found.get(name)
        ]
        if not self.different:
            shutil.rmtree(self.output)

    def kill_at_random(self, kills: int) -> None:
        """Runs that are killed so often, all together."""
        while kills:
            output, starts = self.folder / f"{self.stage}-{len(self.starts)}", 0
            while True:
                starts += 1
                started = self.start(output)
                if not kills or not self.wait(started[0]):
                    break
                self.stop(started)
                kills -= 1
            self.check_exits(started)
            self.compare(starts)

    def kill_after_each_step(self) -> None:
        """A run each of whose processes makes a step, or two if it is too quick."""
        output, starts, seen = self.folder / f"{self.stage}-steps", 0, ""
        while True:
            starts += 1
            started = self.start(output, "--checkpoint_every=1")
            while started[0].is_alive() and newest(output) <= seen:
                time.sleep(0.0005)
            if newest(output) <= seen:
                break
            seen = newest(output)
            self.stop(started)
        self.check_exits(started)
        self.compare(starts)

    def kill_under_torchrun(self, kills: int) -> None:
        """Runs of torchrun, of each of which one process is killed."""
        while kills:
            self.output = self.folder / f"{self.stage}-{len(self.starts)}"
            self.began, self.left_over = time.time() - 0.01, {}
            command = [
                *(sys.executable, "-m", "torch.distributed.run"),
                *(f"--nproc-per-node={self.processes}", "--max-restarts=20"),
                *(
                    f"--master-port={free_port()}",
                    "-m",
                    "--",
                    "llama2_lite.runtime.cli",
                ),
                *arguments(self.world, self.stage, self.output),
            ]
            log = self.output.with_suffix(".log")
            with log.open("wb") as file:
                agent = subprocess.Popen(command, stdout=file, stderr=file)
            self.wait_for_torchrun(agent)
            workers = children(agent.pid)
            if workers:
                os.kill(self.random.choice(workers), signal.SIGKILL)
                phase = self.phase()
                self.hit[phase] = self.hit.get(phase, 0) + 1
                kills -= 1
            since = time.perf_counter()
            if agent.wait():
                text = log.read_text("utf-8", "replace")
                raise SystemExit(f"torchrun ended with {agent.returncode}:\n{text}")
            self.slowest = max(self.slowest, time.perf_counter() - since)
            self.compare(2 if workers else 1)

    def wait_for_torchrun(self, agent: "subprocess.Popen[bytes]") -> None:
        """Wait for the moment of the kill, or the end of the run."""
        while agent.poll() is None and len(children(agent.pid)) < self.processes:
            time.sleep(0.01)
        aims = self.random.random() < 0.5
        until = time.time() + self.random.uniform(0, IMPORTS + self.seconds)
        skipped = self.random.randrange(STEPS // 2)
        while agent.poll() is None:
            if not aims and time.time() > until:
                return
            if aims and self._saving():
                if not skipped:
                    time.sleep(self.random.uniform(0, self.save_seconds))
                    return
                skipped -= 1
                while self._saving() and agent.poll() is None:
                    time.sleep(0.0005)
            time.sleep(0.0005)

    def run(self, kills: int, torchrun: bool, steps: bool) -> dict[str, Any]:
        """Do it all; what happened as a dictionary."""
        self.expected, since = self.undisturbed(), time.time()
        if steps and not torchrun:
            self.kill_after_each_step()
        after_steps = sum(self.hit.values())
        self.hit.clear()
        (self.kill_under_torchrun if torchrun else self.kill_at_random)(kills)
        return {
            "killed after a step": after_steps,
            "killed at random": dict(sorted(self.hit.items())),
            "runs": len(self.starts),
            "most starts of a run": max(self.starts),
            "files compared": len(self.expected),
            "different": self.different,
            "processes left waiting": self.left_waiting,
            "slowest end in seconds": round(self.slowest, 2),
            "seconds of a run": round(self.seconds, 2),
            "minutes": round((time.time() - since) / 60, 1),
        }


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def children(number: int) -> list[int]:
    """The processes that a process has started."""
    command = ["ps", "-A", "-o", "pid=,ppid="]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = (map(int, line.split()) for line in lines.splitlines())
    return [child for child, parent in pairs if parent == number]


def as_torchrun_does(processes: int) -> list[dict[str, str]]:
    """Environments for the processes of one run."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "kills",
        "LLAMA2_LITE_START_SECONDS": str(PATIENCE / 3),
    }
    return [
        {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        for rank in range(processes)
    ]


def newest(output: Path) -> str:
    """Name of the newest checkpoint of a run."""
    paths = output.glob("checkpoints/step-*")
    return max((path.name for path in paths if not path.suffix), default="")


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def outcome(folder: Path) -> dict[str, str]:
    """A checksum of what is in each file that a run leaves.

    Logs, the configuration and the list of checksums only have to be there.
    """
    last = max((folder / "checkpoints").glob("step-*"))
    places = [last, *(folder / part for part in PARTS)]
    files = [f for place in places for f in (place, *place.rglob("*")) if f.is_file()]
    names = (path.name for path in folder.iterdir())
    return dict.fromkeys(names, "") | {
        str(file.relative_to(folder)): checksum(file) for file in files
    }


def checksum(file: Path) -> str:
    """Of the bytes of a file; the keys of JSON may be in any order."""
    data, header = file.read_bytes(), b""
    if file.name == "complete.json":
        return ""
    if file.suffix == ".safetensors":  # its format: length, JSON, tensors
        length = 8 + int.from_bytes(data[:8], "little")
        names = json.loads(data[8:length])
        header, data = json.dumps(names, sort_keys=True).encode(), data[length:]
    return hashlib.sha256(header + data).hexdigest()


def in_process(function: Any, *values: Any) -> None:
    """Run a function where PyTorch is imported already."""
    process = CONTEXT.Process(target=function, args=values)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def main() -> None:
    """Run the campaigns that are asked for and store what they found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--stage", action="append", choices=STAGES, help="(all of them)")
    add("--kills", type=int, default=50, help="of each stage (%(default)s)")
    add("--seed", type=int, default=0, help="of the moments (%(default)s)")
    add("--processes", type=int, default=1, help="of each run (1)")
    add("--torchrun", action="store_true", help="kill processes of torchrun")
    steps = argparse.BooleanOptionalAction
    add("--steps", action=steps, default=True, help="kill after each step too")
    add("--signal", choices=("KILL", "TERM", "INT"), default="KILL", help="(KILL)")
    add("--output", type=Path, help="JSON file; other stages in it stay")
    options = parser.parse_args()
    processes = 2 if options.torchrun else options.processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    CONTEXT.set_forkserver_preload(
        ["llama2_lite.runtime.pretrain", "llama2_lite.runtime.align"]
    )
    result: dict[str, Any] = {
        "machine": machine_name(),
        "signal": options.signal,
        "processes": processes,
        "torchrun": options.torchrun,
        "seed": options.seed,
        "stages": {},
    }
    found = result["stages"]
    if options.output and options.output.is_file():
        earlier = json.loads(options.output.read_text("utf-8"))
        if {**earlier, "stages": {}} == result:
            found |= earlier["stages"]
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        world.mkdir()
        in_process(make_world, world)
        # What samples starts from a model whose answers end.
        longer = [f"--trainer.max_steps={10 * STEPS}", "--checkpoint_every=1000"]
        start = [*arguments(world, "sft", world / "sft"), *longer]
        in_process(run_command, start, world / "log", {})
        for stage in options.stage or STAGES:
            number = signal.Signals[f"SIG{options.signal}"]
            place, seed = Path(folder), options.seed
            campaign = Campaign(world, place, stage, seed, number, processes)
            found[stage] = campaign.run(options.kills, options.torchrun, options.steps)
            print(stage, json.dumps(found[stage]), flush=True)
            if options.output:
                write_json(options.output, result)
    if any(figures["different"] for figures in found.values()):
        raise SystemExit("not every run came to the same result")
    if any(figures["processes left waiting"] for figures in found.values()):
        raise SystemExit("processes waited for one that was killed")


if __name__ == "__main__":
    main()
