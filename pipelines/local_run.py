"""Run a compiled pipeline on this machine through KFP's local runner, showing one line a step.

KFP runs each step as a child process and copies all that it prints to stdout. Here that goes to a log file, and the screen gets the
steps, their times and, on a terminal, their progress bars. KFP has no hook for a step's process, so its one function that starts it
(`run_local_subprocess`, kfp pinned) is replaced for the time of the run; the rest of KFP's orchestration is used as it is.
"""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import tty
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
NAME_WIDTH = 13
GRACE_SECONDS = 15
"""How long an interrupted step may take to close its MLflow run before it is killed."""


@dataclass
class LocalRun:
    """One execution of a compiled pipeline: where its log and outputs are, and how its steps went."""

    log: Path
    outputs: Path
    screen: TextIO = field(default_factory=lambda: sys.stderr)
    pipeline_run_id: str = ""
    steps: dict[str, float] = field(default_factory=dict)
    """Seconds of each finished step, in order."""
    failed: str = ""
    """Name of the step that failed first."""

    def execute(self, compiled: Path) -> bool:
        """Run the compiled YAML to its end. False when a step failed; KeyboardInterrupt once the step's processes are gone."""
        from kfp import components, local

        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w", encoding="utf-8") as log, redirect_stdout(log), _steps_started_by(self._run_step):
            local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(self.outputs))
            try:
                components.load_component_from_file(str(compiled))()
            except RuntimeError:
                if not self.failed:
                    raise
        return not self.failed

    def _run_step(self, full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
        """Stands in for kfp.local.subprocess_task_handler.run_local_subprocess: run one step and return its exit code."""
        name = _argument(full_command, "--function_to_execute")
        inputs = json.loads(_argument(full_command, "--executor_input")).get("inputs", {}).get("parameterValues", {})
        self.pipeline_run_id = inputs.get("pipeline_run_id", self.pipeline_run_id)
        started = time.monotonic()
        display = StepDisplay(name, self.screen, sys.stdout)
        process, output = _start(full_command, env_vars or {}, terminal=self.screen.isatty())
        try:
            for text in _read(process, output):
                display.feed(text)
            code = process.wait()
        except KeyboardInterrupt:
            display.close("interrupted")
            raise
        finally:
            _end_group(process)
            os.close(output)
        seconds = time.monotonic() - started
        display.close(f"{seconds:7.1f} s" if code == 0 else f"failed after {seconds:.1f} s")
        self.steps[name] = seconds
        if code:
            self.failed = self.failed or name
        return code


class StepDisplay:
    """One step's line on the screen: its progress bar while it runs (terminals only), its time afterwards. Whole lines go to the log."""

    def __init__(self, name: str, screen: TextIO, log: TextIO):
        self.name, self.screen, self.log = name, screen, log
        self.terminal = screen.isatty()
        self.line, self.is_bar = "", False
        self._draw("…")

    def feed(self, text: str) -> None:
        """Take more of the step's output; a carriage return starts a progress bar, a newline ends a line."""
        for piece in re.split(r"(\r|\n)", text):
            if piece == "\n":
                self._end_line()
            elif piece == "\r":
                if not self.is_bar:
                    self._end_line()
                self.line, self.is_bar = "", True
            elif piece:
                self.line += piece
                if self.is_bar:
                    self._draw(self.line)

    def close(self, result: str) -> None:
        self._end_line()
        clear = "\r\x1b[K" if self.terminal else ""
        self.screen.write(f"{clear}{self.name:<{NAME_WIDTH}} {result}\n")
        self.screen.flush()

    def _end_line(self) -> None:
        if self.line.strip():
            self.log.write(self.line.rstrip() + "\n")
            self.log.flush()
        self.line, self.is_bar = "", False

    def _draw(self, text: str) -> None:
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            self.screen.write("\r" + f"{self.name:<{NAME_WIDTH}} {text}"[:width] + "\x1b[K")
            self.screen.flush()


@contextmanager
def _steps_started_by(function) -> Iterator[None]:
    from kfp.local import subprocess_task_handler

    original = subprocess_task_handler.run_local_subprocess
    subprocess_task_handler.run_local_subprocess = function
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="kfp")  # that images and pod settings are not used here
            yield
    finally:
        subprocess_task_handler.run_local_subprocess = original


def _argument(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def _start(command: list[str], env_vars: dict[str, str], terminal: bool) -> tuple[subprocess.Popen, int]:
    """Start a step in a process group of its own; returns it and the file descriptor of its output.

    A step behind a terminal gets a pseudo-terminal, so that its progress bars know that someone is watching.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **env_vars, "PYTHONPATH": path}
    reading, writing = pty.openpty() if terminal else os.pipe()
    if terminal:
        tty.setraw(writing)
        columns = max(20, shutil.get_terminal_size().columns - NAME_WIDTH - 2)
        fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))  # rows, columns, pixels
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, env=environment, start_new_session=True
        )
    finally:
        os.close(writing)
    return process, reading


def _read(process: subprocess.Popen, output: int) -> Iterator[str]:
    """Text as it arrives, until the step has ended and its output is drained (a stray child may hold the pipe open)."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while True:
        ended = process.poll() is not None
        if select.select([output], [], [], 0 if ended else 0.2)[0]:
            try:
                data = os.read(output, 65536)
            except OSError:  # EIO: how a pseudo-terminal says that its other end is closed
                return
            if not data:
                return
            yield decoder.decode(data)
        elif ended:
            return


def _end_group(process: subprocess.Popen) -> None:
    """Interrupt a step that still runs, as Ctrl-C would, then kill what is left of its process group."""
    try:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
