"""Signals that end a command whose work is on disk already."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ogdm_jax.cluster import end_at_once


@contextmanager
def leaving(say: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process at once, after one line, with exit code 128 + signal.

    At once means while a device computes, too: a thread ends the process, since Python answers no
    signal before the device is done. So what is inside has to stand being killed at any moment.

    Args:
      say: the line, asked when a signal comes.
    """
    ours = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():  # signals go to that one
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def wait() -> None:
        while number := os.read(reading, 1):
            if number[0] in ours:
                name = "Ctrl-C" if number[0] == signal.SIGINT else "SIGTERM"
                print(f"stopped by {name}: {say()}", file=sys.stderr, flush=True)
                end_at_once(128 + number[0])

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in ours}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)
