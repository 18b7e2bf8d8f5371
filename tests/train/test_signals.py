"""Signals that ask a run to stop."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from jllama.errors import Stopped
from jllama.train.signals import noting_signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_is_noted_once_there_is_something_to_save(name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with noting_signals() as received:
        assert not received
        received.nothing_to_save = False
        os.kill(os.getpid(), number)
        assert received and received.signals == [number]
    assert signal.getsignal(number) is before


def test_a_signal_ends_the_work_where_there_is_nothing_to_save():
    with (
        pytest.raises(Stopped, match="SIGTERM: stopped with nothing to save"),
        noting_signals(),
    ):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_interrupt_interrupts_at_once():
    with noting_signals() as received:
        received.nothing_to_save = False
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with noting_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_may_train_and_leaves_signals_alone():
    handlers = []

    def work():
        with noting_signals() as received:
            handlers.append((signal.getsignal(signal.SIGTERM), bool(received)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [(signal.getsignal(signal.SIGTERM), False)]


# Hashing is one call of C, in which Python runs no handler, as when XLA compiles.
BUSY = """
import hashlib, sys
from jllama.cli import exit_status
from jllama.train import signals
signals._GRACE = 0.2

def work():
    with signals.noting_signals() as received:
        received.nothing_to_save = {nothing_to_save}
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", {rounds})
    print(received.signals[0].name)

sys.exit(exit_status(work))  # the signal may come before the call of C
"""


@pytest.mark.parametrize(
    ("nothing_to_save", "rounds", "status", "said"),
    [(True, 10**9, os.EX_TEMPFAIL, "SIGTERM: stopped with nothing"), (False, 10**6, 0, "SIGTERM")],
)
def test_busy_code_is_ended_only_where_there_is_nothing_to_save(
    nothing_to_save, rounds, status, said
):
    script = BUSY.format(nothing_to_save=nothing_to_save, rounds=rounds)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert (out + err).startswith(said)
