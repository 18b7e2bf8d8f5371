"""Signals ask a run to stop: SIGTERM, SIGINT, SIGHUP (a terminal that closes), and SIGUSR1, which
SLURM sends as a warning if it is asked to.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from jllama.errors import Stopped

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_GRACE = 5  # seconds until a process ends that is compiling, where Python's handlers do not run


class Received:
    """The signals that this process has received.

    Attributes:
      signals: in order of arrival.
      nothing_to_save: whether the process may end at once, because no step was taken yet.
    """

    def __init__(self):
        self.signals: list[signal.Signals] = []
        self.nothing_to_save = True

    def __bool__(self) -> bool:
        return bool(self.signals)

    def stopped(self) -> Stopped:
        """What to raise, or to say, where there is nothing to save."""
        return Stopped(f"{self.signals[0].name}: stopped with nothing to save; start it again")


@contextlib.contextmanager
def noting_signals() -> Iterator[Received]:
    """Gives the record in which each signal is noted; a SIGINT after another signal interrupts at
    once.

    While there is nothing to save, a signal raises `Stopped` in the main thread, and where that is
    compiling it ends the process after a few seconds, with the same status. A signal that the
    process was started to ignore, as nohup does, stays ignored. Outside the main thread Python
    takes no handlers: there the caller deals with signals.
    """
    received = Received()

    def note(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.signals.append(signal.Signals(number))
        if received.nothing_to_save:
            raise received.stopped()

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    wanted = [s for s in _STOPPING if signal.getsignal(s) != signal.SIG_IGN]
    handlers = {s: signal.signal(s, note) for s in wanted}
    with _watching(received):
        try:
            yield received
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _watching(received: Received) -> Iterator[None]:
    """Ends the process if a signal arrives that `received` does not note within `_GRACE` seconds,
    for as long as there is nothing to save.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    over = threading.Event()

    def watch():
        # Python's C handler writes a signal's number at once, whatever the main thread does.
        while number := os.read(reader, 1):
            over.wait(_GRACE)
            if number[0] in _STOPPING and received.nothing_to_save and not received:
                received.signals.append(signal.Signals(number[0]))
                stopped = received.stopped()
                os.write(2, f"{stopped}\n".encode())
                os._exit(stopped.status)
        os.close(reader)

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        os.close(writer)
        thread.join()
