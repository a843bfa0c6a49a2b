"""A signal has an effect even if the main thread is waiting for somebody else."""

import signal
import subprocess
import sys
import time

import pytest

WAITING = """
import sys
from datetime import timedelta
from torch.distributed import TCPStore
from llama2_lite.runtime.stopping import Watch, watch_signals

signal_handler = __import__("signal").signal
signal_handler(15, lambda *_: None)
Watch.seconds = float(sys.argv[1])
store = TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=100))
with watch_signals():
    print("waiting", flush=True)
    store.wait(["what nobody sets"])
"""


@pytest.mark.parametrize(
    ("seconds", "signals", "words"),
    [
        (0.5, [signal.SIGTERM], "not saved within 0.5 seconds; "),
        (60, [signal.SIGTERM, signal.SIGTERM], ""),
        (60, [signal.SIGTERM, signal.SIGINT], ""),
    ],
)
def test_a_process_that_waits_ends(
    seconds: float, signals: list[signal.Signals], words: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signals[-1]
    assert err.strip() == f"{words}the same command goes on from the last checkpoint"
