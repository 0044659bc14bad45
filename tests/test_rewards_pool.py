"""Processes that check answers: killed when an answer hangs or crashes them, replaced, closed with their parent, usable from anywhere."""

import json
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from dfpo_core.config import RewardsConfig
from dfpo_core.rewards import pool, score

CHECKER = """
import os, time, signal
from pathlib import Path

def warm_up():
    pass

def prepare(what, *rest):
    if what == "slow to prepare":
        time.sleep(1.0)

def check(what, value=0.0):
    if what == "hang":
        while True:
            pass
    if what == "hang in C":
        sum(range(10**12))
    if what == "ignore signals":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        while True:
            pass
    if what == "exit":
        os._exit(int(value))
    if what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "raise":
        raise RuntimeError("no")
    if what == "leave":
        raise SystemExit(0)
    if what == "memory":
        bytearray(1 << 40)
    if what == "write":
        Path(value).write_text("was here")
    if what == "print":
        print("{}", flush=True)
    if what == "sleep":
        time.sleep(value)
    return value if isinstance(value, float) else 1.0
"""
LIMITS = RewardsConfig(time_limit_seconds=0.3, workers=2)


@pytest.fixture(autouse=True)
def checker(tmp_path, monkeypatch):
    (tmp_path / "checker_of_tests.py").write_text(CHECKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    pool.close()
    pool.take_failures()
    others = {child.pid for child in psutil.Process().children(recursive=True)}  # of tests in other files
    yield
    pool.close()
    assert [child for child in workers() if child.pid not in others] == []


def run(*tasks, limits=LIMITS):
    return pool.check_all("checker_of_tests:check", [list(task) for task in tasks], limits)


def workers():
    """Worker processes of this one and their children, running or not waited for."""
    return [child for child in psutil.Process().children(recursive=True) if not is_tracker(child)]


def is_tracker(process):
    """Whether it is multiprocessing's own, which lives as long as this process. A zombie has no command line, and counts."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except psutil.ZombieProcess:
        return False


def test_values_come_back_in_order():
    assert run(*(["ok", float(i)] for i in range(200))) == [float(i) for i in range(200)]
    assert pool.take_failures() == {}


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (["hang"], "time limit"), (["hang in C"], "time limit"), (["ignore signals"], "time limit"), (["exit", 0], "crashed"),
        (["exit", 64], "crashed"), (["segfault"], "crashed"), (["raise"], "raised"),
        (["leave"], "raised"), (["memory"], "raised"),
    ],
)  # fmt: skip
def test_a_failed_check_scores_0_is_counted_and_costs_its_neighbours_nothing(task, reason):
    assert run(["ok", 0.25], task, ["ok", 0.5], task, ["ok", 0.75]) == [0.25, 0.0, 0.5, 0.0, 0.75]
    assert pool.take_failures() == {reason: 2}
    assert pool.take_failures() == {}


def test_a_checker_can_neither_write_files_nor_speak_for_the_worker(tmp_path):
    assert run(["write", str(tmp_path / "file")], ["print", 0.5]) == [0.0, 0.5]
    assert not (tmp_path / "file").exists() or (tmp_path / "file").read_text() == ""


def test_preparing_does_not_count_against_the_limit():
    assert run(["slow to prepare", 0.5]) == [0.5]


@pytest.mark.parametrize("victim", ["worker", "its child"])
def test_what_the_system_kills_is_replaced_between_and_during_batches(victim):
    """As the kernel does when memory runs out. The answers in hand are checked again: it was no fault of theirs."""
    patient = RewardsConfig(time_limit_seconds=20, workers=2)

    def kill():
        parents = [child for child in psutil.Process().children() if "dfpo_core.rewards.worker" in child.cmdline()]
        for process in parents if victim == "worker" else [child for parent in parents for child in parent.children()]:
            process.kill()

    assert run(["ok", 1.0], ["ok", 1.0], limits=patient) == [1.0, 1.0]
    kill()
    assert run(*[["ok", 0.5]] * 4, limits=patient) == [0.5] * 4
    assert run(["ok", 1.0], ["ok", 1.0], limits=patient) == [1.0, 1.0]
    killer = threading.Timer(0.2, kill)
    killer.start()
    assert run(["sleep", 0.6], ["sleep", 0.7], ["ok", 0.5], limits=patient) == [0.6, 0.7, 0.5]
    killer.join()
    assert pool.take_failures() == {}


def test_a_checker_that_cannot_be_imported_is_an_error_and_not_a_score():
    with pytest.raises(RuntimeError, match="no_such_module:check does not start"):
        pool.check_all("no_such_module:check", [["x"]], LIMITS)


def math_scores():
    """Of two answers, one of which only math-verify can tell to be right."""
    row = {"reward": "math", "answer": "\\frac{\\sqrt{3}}{3}"}
    return score([row] * 2, ["\\boxed{\\frac{1}{\\sqrt{3}}}", "\\boxed{3}"])


def test_math_verify_works_from_threads():
    with ThreadPoolExecutor(4) as threads:
        assert [future.result() for future in [threads.submit(math_scores) for _ in range(8)]] == [[1.0, 0.0]] * 8


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_math_verify_works_in_a_worker_process_of_the_trainer(method):
    """Also in a fork of a process whose own pool is running; the parent's pool goes on working."""
    assert math_scores() == [1.0, 0.0]
    with multiprocessing.get_context(method).Pool(1) as processes:
        assert [result.get() for result in [processes.apply_async(math_scores) for _ in range(2)]] == [[1.0, 0.0]] * 2
        processes.close()
        processes.join()
    assert math_scores() == [1.0, 0.0]


SCRIPT = """
import sys
from dfpo_core.rewards import score
print(score([{"reward": "math", "answer": "\\\\sqrt{2}"}], ["\\\\boxed{\\\\frac{2}{\\\\sqrt{2}}}"]), flush=True)
import psutil
print([child.pid for child in psutil.Process().children(recursive=True)], flush=True)
LAST
"""


@pytest.mark.parametrize("last", ["", "import time; time.sleep(60)", "import os; os._exit(0)"])
def test_workers_end_with_the_process_that_started_them(last):
    """An unguarded script: it is not run again in the workers. It ends by itself, without clean-up, or (asleep) by SIGKILL."""
    script = SCRIPT.replace("LAST", last)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "[1.0]\n"
    pids = json.loads(process.stdout.readline())
    assert len(pids) >= 2  # a worker and its child
    if "sleep" in last:
        process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in pids if alive(pid)] == []


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_workers_of_this_process_leave_no_zombie():
    pool.close()
    others = workers()  # of tests in other files
    assert run(["hang"], ["segfault"], ["ok", 1.0]) == [0.0, 0.0, 1.0]
    assert all(child.status() != psutil.STATUS_ZOMBIE for child in workers() if child not in others)
    pool.close()
    assert [child for child in workers() if child not in others] == []
