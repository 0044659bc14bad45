"""A pool of processes that check answers (`worker`), with a hard limit on the time of each answer.

An answer whose check takes too long, raises or kills its process scores 0, and is counted. Processes start on first use and end with
this one, however it ends: each reads from a pipe that only this process holds open. They are started fresh, not forked from here, so
threads, CUDA and an unguarded main module do no harm. Any thread may score, one at a time; a forked child starts workers of its own.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from typing import Any

from dfpo_core.config import RewardsConfig

_START_SECONDS = 120.0  # to import the checker, on a busy machine
_STARTING = -1
_MOST_FAILED_STARTS = 5
_GRACE_SECONDS = 30.0  # beyond the time limit, for a worker that does not even report a kill

_pools: dict[tuple[str, RewardsConfig], Pool] = {}
_failures: Counter[str] = Counter()
_lock = threading.Lock()
_logger = logging.getLogger(__name__)


def check_all(function: str, arguments: list[list[Any]], limits: RewardsConfig) -> list[float]:
    """`function` ("package.module:name") of each list of JSON arguments, in the workers; 0.0 where a check failed.

    The module has the hooks that `worker` names. Raises RuntimeError when the workers do not start.
    """
    if not arguments:
        return []
    with _lock:
        pool = _pools.get((function, limits))
        if pool is None:
            pool = _pools[function, limits] = Pool(function, limits)
        values, failures = pool.run(arguments)
        _failures.update(failures)
    if failures:
        what = ", ".join(f"{count} {reason}" for reason, count in sorted(failures.items()))
        _logger.warning("answers that scored 0 because checking them failed: %s", what)
    return values


def take_failures() -> dict[str, int]:
    """How many checks failed since the last call, by reason: `time limit`, `crashed` or `raised`. Empty when none did."""
    with _lock:
        counts = dict(_failures)
        _failures.clear()
    return counts


def close() -> None:
    """End all workers and wait for them. Called when the interpreter exits; the next check starts new ones."""
    while _pools:
        _pools.popitem()[1].close()


def _forget() -> None:
    """In a forked child: the workers are the parent's, so let go of their pipes."""
    global _lock
    _lock = threading.Lock()
    for pool in _pools.values():
        for worker in pool.workers:
            worker.close_pipes()
            worker.process.returncode = 0  # not ours to wait for
    _pools.clear()
    _failures.clear()


atexit.register(close)
os.register_at_fork(after_in_child=_forget)


class _Worker:
    """One worker process, and the number of the task it works on: None when idle, _STARTING at first."""

    def __init__(self, function: str, limits: RewardsConfig):
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        command = [sys.executable, "-m", "dfpo_core.rewards.worker", function, str(limits.time_limit_seconds)]
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.task: int | None = _STARTING
        self.unread = b""
        self.deadline = time.monotonic() + _START_SECONDS

    def send(self, task: int, arguments: list[Any], seconds: float) -> None:
        self.task, self.deadline = task, time.monotonic() + seconds
        request = memoryview(json.dumps({"id": task, "arguments": arguments}).encode() + b"\n")
        try:
            while request:
                request = request[self.process.stdin.write(request) :]
        except BrokenPipeError:
            self.process.kill()  # then its output ends too, and that is where a lost worker is dealt with

    def replies(self) -> list[dict[str, Any]] | None:
        """What has arrived (waits if nothing has); None when there will be no more."""
        data = self.process.stdout.read(1 << 16)
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def close_pipes(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()

    def end(self) -> None:
        """Close its input, which ends it, and wait; kill it when that takes too long."""
        self.close_pipes()
        try:
            self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Pool:
    """Workers for one function. `check_all` sees to it that one thread at a time uses it."""

    def __init__(self, function: str, limits: RewardsConfig):
        self.function, self.limits = function, limits
        self.size = limits.workers or _cores()
        self.workers: list[_Worker] = []
        self.next_task = 0
        self.failed_starts = 0

    def run(self, arguments: list[list[Any]]) -> tuple[list[float], Counter[str]]:
        """The values, 0.0 for failed checks, and how many failed by reason. What crashes its process is tried once more."""
        values, failures, waiting = [0.0] * len(arguments), Counter(), deque(range(len(arguments)))
        first = self.next_task  # numbers are never used twice, so that a late reply is known as such
        self.next_task += len(arguments)
        left, crashed_once = len(arguments), set()
        with selectors.DefaultSelector() as selector:
            for worker in [worker for worker in self.workers if worker.process.poll() is not None]:
                self._remove(worker)
            for worker in self.workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            while left:
                while len(self.workers) < min(self.size, left):
                    self.workers.append(_Worker(self.function, self.limits))
                    selector.register(self.workers[-1].process.stdout, selectors.EVENT_READ, self.workers[-1])
                for worker in self.workers:
                    if worker.task is None and waiting:
                        index = waiting.popleft()
                        worker.send(first + index, arguments[index], self.limits.time_limit_seconds + _GRACE_SECONDS)
                for key, _ in selector.select(timeout=1.0):
                    for task, reply in self._finished(key.data):
                        if task >= first and reply.get("failure") == "crashed" and task not in crashed_once:
                            crashed_once.add(task)  # perhaps no fault of the answer: the system may have killed the process
                            waiting.append(task - first)
                        elif task >= first:
                            left -= 1
                            values[task - first] = reply.get("value", 0.0)
                            failures.update([reply["failure"]] if "failure" in reply else [])
                    if key.fileobj.closed:
                        selector.unregister(key.fileobj)
                for worker in self.workers:
                    if worker.task is not None and time.monotonic() > worker.deadline:
                        worker.process.kill()  # its output ends, which _finished deals with
        return values, failures

    def _finished(self, worker: _Worker) -> list[tuple[int, dict[str, Any]]]:
        """(task, reply) of what a worker has finished. One that is gone has lost its task, and is removed."""
        replies = worker.replies()
        if replies is None:
            self._remove(worker)
            if worker.task == _STARTING:
                self.failed_starts += 1
                # Killed at its start (returncode below 0) it is tried again; an error of its own would only repeat.
                if worker.process.returncode >= 0 or self.failed_starts == _MOST_FAILED_STARTS:
                    self.close()
                    raise RuntimeError(f"a process to check answers with {self.function} does not start; its error is above")
            return [(worker.task, {"failure": "crashed"})] if worker.task is not None else []
        finished = []
        for reply in replies:
            if worker.task is not None and reply.get("id", worker.task) == worker.task:
                finished.append((worker.task, reply))
                worker.task = None
        return finished

    def _remove(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.process.kill()
        worker.end()

    def close(self) -> None:
        for worker in self.workers:
            worker.close_pipes()  # all of them first: they end side by side
        while self.workers:
            self.workers.pop().end()


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
