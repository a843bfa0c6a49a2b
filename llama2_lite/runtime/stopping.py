"""Ctrl-C and SIGTERM end a command: soon, and a second one at once.

Python runs its handlers of signals between two instructions of the main thread, which
may be waiting for another process, or for a disk. So a thread reads the signals as well
and ends the process when the main thread does not do it in time.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Watch:
    """What is known of signals; there is one set of them in a process.

    Attributes:
        seconds: how long a signal may remain without effect; torchrun and SLURM kill
            after 30.
        signal: the first one that came, or 0.
    """

    seconds = 25.0
    signal = 0


@contextmanager
def watch_signals() -> Iterator[None]:
    """End the process at a second signal, or some time after the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    Watch.signal = 0
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_follow, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()


def _follow(reader: socket.socket) -> None:
    """Read signals until the other end is closed."""
    with reader:
        while True:
            try:
                numbers = reader.recv(16)
            except TimeoutError:
                _end(Watch.signal, f"not saved within {Watch.seconds:g} seconds; ")
            if not numbers:
                return
            for number in numbers:
                if number in STOPPING and Watch.signal:
                    _end(number)
                elif number in STOPPING:
                    Watch.signal = number
                    reader.settimeout(Watch.seconds)


def _end(number: int, reason: str = "") -> None:
    """End the process, whatever its other threads do."""
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # progress bars hide it
    line = f"{show_cursor}\n{reason}the same command goes on from the last checkpoint\n"
    os.write(2, line.encode())
    os._exit(128 + number)
