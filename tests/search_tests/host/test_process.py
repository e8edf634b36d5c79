"""Which process is which, signals, and counting the kernel's kills."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.host import process
from search.host.process import is_dead, pid_namespace, this_process
from search.host.resources import oom_kills
from search.storage.retry import Retry, StorageLostError
from search.worker.stop import StoppedError, StopRequest

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


def test_a_process_lives_then_is_a_zombie_then_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    key = f"{child.pid}@{process._started(child.pid)}"
    assert not is_dead(pid_namespace(), key)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, but nobody has asked for its status
    assert is_dead(pid_namespace(), key)
    child.communicate()
    assert is_dead(pid_namespace(), key)


def test_a_number_that_was_given_out_again_is_another_process() -> None:
    me = this_process()
    assert not is_dead(me.pid_namespace, me.key)
    assert is_dead(me.pid_namespace, f"{me.pid}@1")


def test_nothing_is_known_of_processes_elsewhere() -> None:
    assert not is_dead("another boot/another namespace", "1@1")


def test_where_the_kernel_does_not_say_nobody_is_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "readlink", lambda _: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setattr(process, "_started", lambda _: None)
    pid_namespace.cache_clear()
    try:
        me = this_process()
        assert me.pid_namespace.startswith("unknown/")
        assert not is_dead(me.pid_namespace, me.key)
        assert not is_dead(me.pid_namespace.rpartition("/")[0] + "/1", "1@")
    finally:
        pid_namespace.cache_clear()


def test_a_name_with_brackets_and_blanks_is_read_rightly(tmp_path: Path) -> None:
    program = tmp_path / "a) Z (b"
    program.symlink_to(sys.executable)
    child = subprocess.Popen([program, "-c", "input()"], stdin=subprocess.PIPE)
    assert not is_dead(pid_namespace(), f"{child.pid}@{process._started(child.pid)}")
    child.communicate(b"\n")


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    """One that hears signals; what was there before comes back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop = StopRequest()
    for number in before:
        signal.signal(number, stop._handle)
    yield stop
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_leaves_a_note_and_interrupts_training_alone(stop: StopRequest) -> None:
    signal.raise_signal(signal.SIGTERM)
    assert stop.cause == "preempted: the worker got SIGTERM"
    with pytest.raises(StoppedError, match="SIGTERM"):
        stop.check()
    with pytest.raises(StoppedError, match="SIGTERM"), stop.interrupting():
        raise AssertionError


def test_a_second_signal_does_not_hit_the_handing_back(stop: StopRequest) -> None:
    with pytest.raises(StoppedError, match="SIGINT"), stop.interrupting():
        try:
            signal.raise_signal(signal.SIGINT)
        except StoppedError:
            signal.raise_signal(signal.SIGTERM)  # on the way out, before the context is left
            raise
    signal.raise_signal(signal.SIGTERM)
    assert stop.cause == "preempted: the worker got SIGINT"


def test_who_is_asked_to_go_waits_for_no_database(stop: StopRequest) -> None:
    outage = Retry("a database")
    outage.limit = 600
    stop.also_ends(outage)
    signal.raise_signal(signal.SIGTERM)

    def fail() -> None:
        import sqlalchemy as sa

        raise sa.exc.OperationalError("select", {}, Exception("away"))

    with pytest.raises(StorageLostError):
        outage.call(fail)


def test_kills_for_memory_are_counted_where_somebody_counts(tmp_path: Path) -> None:
    container, machine = tmp_path / "memory.events", tmp_path / "vmstat"
    assert oom_kills((container, machine)) == 0
    machine.write_text("nr_free_pages 12\noom_kill 3\n")
    assert oom_kills((container, machine)) == 3
    container.write_text("low 0\noom 9\noom_kill 1\noom_group_kill 0\n")
    assert oom_kills((container, machine)) == 1
