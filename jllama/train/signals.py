"""SIGTERM and SIGINT ask a run to stop after a step."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def noting_signals(received: list[signal.Signals]) -> Iterator[None]:
    """Appends each SIGTERM and SIGINT to `received`; a SIGINT after another signal interrupts
    at once.

    Outside the main thread Python takes no handlers: there the caller deals with signals.
    """

    def note(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    try:
        handlers = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
