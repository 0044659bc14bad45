"""A process that checks answers with one function, one at a time, and that no answer can hang, crash or fill up.

Run as `python -m dfpo_core.rewards.worker MODULE:FUNCTION TIME_LIMIT`; `pool` is the other end. This process imports the function,
warms it up and forks: a child reads requests and writes replies, one JSON line each. The kernel's timer kills the child in the middle
of an answer that takes too long, whatever it is doing; this process then says so and forks the next child, which costs milliseconds
because everything is imported. Only this process forks, and it has one thread. The function's module has a `warm_up()`, called once, and
a `prepare(*arguments)`, called before each answer and outside its time limit for what does not depend on the answer.

Lines: out `{"ready": true}` once; in `{"id": n, "arguments": [...]}`; out `{"id": n, "value": x}`, or `{"id": n, "failure": "raised"}`,
or from this process, which cannot know n, `{"failure": "time limit"}` or `{"failure": "crashed"}`. A request is only sent when the
reply to the one before has come: unread requests would die with the child.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable

MEMORY_LIMIT_BYTES = 4 << 30  # of address space
_FINISHED = 64  # exit status of a child whose input ended


def main(function_path: str, time_limit: float) -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes our input
    requests, replies, nothing = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # what a checker prints must not look like a reply
    module_name, _, name = function_path.partition(":")
    module = importlib.import_module(module_name)
    module.warm_up()
    message: dict = {"ready": True}
    while True:
        try:
            _send(replies, message)
        except BrokenPipeError:
            return
        child = os.fork()
        if child == 0:
            os.dup2(nothing, 2)
            _serve(getattr(module, name), module.prepare, time_limit, requests, replies)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _FINISHED:
            return
        timed_out = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        message = {"failure": "time limit" if timed_out else "crashed"}


def _serve(function: Callable, prepare: Callable, time_limit: float, requests: int, replies: int) -> None:
    """The child: answer requests until they end. Leaves by os._exit, so that it never returns into the loop that forks."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # a checker has no file to write
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in os.fdopen(requests, "rb"):
        request = json.loads(line)
        prepare(*request["arguments"])
        signal.setitimer(signal.ITIMER_REAL, time_limit)
        try:
            reply = {"value": float(function(*request["arguments"]))}
        except (Exception, SystemExit):
            reply = {"failure": "raised"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            _send(replies, {"id": request["id"], **reply})
        except BrokenPipeError:
            break
    os._exit(_FINISHED)


def _send(replies: int, reply: dict) -> None:
    os.write(replies, json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
