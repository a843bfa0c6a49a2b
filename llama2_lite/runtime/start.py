"""How the processes of a run find each other, and give up if one does not come."""

import os
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llama2_lite.runtime.stopping import Watch

START_SECONDS = "LLAMA2_LITE_START_SECONDS"
LOST = "error: process {} ended with code {} before all had met; it may say why\n"
WAITING = "waiting for the other processes"  # name of a thread


@contextmanager
def waiting_for_all(started: Sequence[subprocess.Popen[Any]] = ()) -> Iterator[None]:
    """End the process at a signal, or if the others have not come after five minutes.

    PyTorch would not notice the signal, would wait for half an hour, and then say that
    a key was not set.

    Args:
        started: other processes that this one has started; if one of them ends, all do.
    """
    seconds = float(os.environ.get(START_SECONDS, "300"))
    size, place = (os.environ.get(name, "?") for name in ("WORLD_SIZE", "MASTER_ADDR"))
    line = (
        f"error: {seconds:g} seconds after the start not all {size} processes have met "
        f"at {place}; one of them may have failed, see what it says, or cannot reach "
        f"this address. {START_SECONDS} changes how long they wait\n"
    )
    met = threading.Event()

    def give_up() -> None:
        deadline = time.monotonic() + seconds
        while not met.wait(0.2):
            if Watch.signal and not met.wait(2):  # nothing was begun that could be lost
                if os.environ.get("RANK", "0") == "0":
                    os.write(2, b"\nstopped; the same command goes on from here\n")
                os._exit(0)
            codes = enumerate((process.poll() for process in started), start=1)
            ended = [LOST.format(*found) for found in codes if found[1] is not None]
            if ended and not met.wait(1):
                for process in started:
                    process.kill()
                os.write(2, ended[0].encode())
                os._exit(2)
            if time.monotonic() > deadline:
                os.write(2, line.encode())
                os._exit(2)

    threading.Thread(target=give_up, name=WAITING, daemon=True).start()
    try:
        yield
    finally:
        met.set()


def join_attempt(backend: str, timeout: timedelta | None, device: torch.device) -> None:
    """Connect processes that torchrun has started, with what is left of others hidden.

    All attempts of one torchrun share a store. Processes that were started again would
    find there, and call, the addresses of those that are gone.
    """
    given = os.environ.get
    if given("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    if given("GROUP_WORLD_SIZE") != "1":  # hosts count their attempts differently
        if given("TORCHELASTIC_MAX_RESTARTS") != "0" and given("RANK") == "0":
            warnings.warn(
                "processes on several hosts can be started again only if "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set where torchrun is called",
                stacklevel=2,
            )
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    store = dist.TCPStore(address, port, is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(  # type: ignore[attr-defined]
            f"attempt {attempt}", store
        ),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
    )
