import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from search.run.interrupts import interrupts_deferred
from search.storage.retry import Retry, StorageLostError


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Both signals as `run` has them, and as they were."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_pause(number: signal.Signals) -> None:
    before, done = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt), interrupts_deferred(Retry("db")) as pause:
        os.kill(os.getpid(), number)
        done.append("the transaction")
        pause(30)
        done.append("what comes after")
    assert done == ["the transaction"]
    assert signal.getsignal(number) is before


def test_a_signal_in_the_pause_ends_it_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_deferred(Retry("db")) as pause:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        pause(30)


def test_a_signal_without_a_pause_is_not_lost() -> None:
    def last_look() -> str:
        with interrupts_deferred(Retry("db")):
            os.kill(os.getpid(), signal.SIGINT)
            return "the budget is done"

    with pytest.raises(KeyboardInterrupt):
        last_look()


def test_without_a_signal_nothing_is_raised() -> None:
    with interrupts_deferred(Retry("db")) as pause:
        pause(0)
    with pytest.raises(StorageLostError), interrupts_deferred(Retry("db")):
        raise StorageLostError("away")


def test_who_is_asked_to_go_does_not_wait_for_the_database() -> None:
    outage = Retry("db")
    outage.limit = 600
    with pytest.raises(KeyboardInterrupt), interrupts_deferred(outage):
        os.kill(os.getpid(), signal.SIGINT)
        assert outage._leaving
        raise StorageLostError("away")


def test_what_a_shell_lets_ignore_ctrl_c_goes_on_ignoring_it() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_deferred(Retry("db")) as pause:
        os.kill(os.getpid(), signal.SIGINT)
        pause(0)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_takes_no_signals() -> None:
    seen = []

    def body() -> None:
        with interrupts_deferred(Retry("db")) as pause:
            pause(0)
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]
