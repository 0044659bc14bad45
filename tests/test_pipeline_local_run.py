"""The local runner's processes and screen: progress bars on terminals only, nothing left running, steps that find the package."""

from __future__ import annotations

import io
import os
import sys
import time

import psutil

from pipelines.local_run import StepDisplay, _end_group, _read, _start

BAR = "from tqdm import tqdm\nfor _ in tqdm(range(3), desc='sums', disable=None): pass\nprint('whole line')"


class Screen(io.StringIO):
    """A text stream that says whether it is a terminal."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def show(code: str, terminal: bool) -> tuple[str, str]:
    """(screen, log) of a Python step."""
    screen, log = Screen(terminal), io.StringIO()
    display = StepDisplay("train", screen, log)
    process, output = _start([sys.executable, "-c", code], {}, terminal)
    for text in _read(process, output):
        display.feed(text)
    assert process.wait() == 0
    display.close("1.0 s")
    _end_group(process)
    os.close(output)
    return screen.getvalue(), log.getvalue()


def test_a_terminal_shows_the_steps_bar_and_the_log_keeps_its_last_state():
    screen, log = show(BAR, terminal=True)
    assert "train         sums:   0%" in screen and "sums: 100%" in screen
    assert "whole line" not in screen
    assert screen.endswith("\r\x1b[Ktrain         1.0 s\n")
    assert log.count("sums: ") == 1 and "sums: 100%" in log
    assert log.endswith("whole line\n")


def test_a_pipe_shows_no_bar():
    screen, log = show(BAR, terminal=False)
    assert screen == "train         1.0 s\n"
    assert log == "whole line\n"


def test_a_step_finds_the_package_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    _, log = show("import os, dfpo_core, components\nprint(os.getcwd())", terminal=False)
    assert log.strip() == str(tmp_path)


def test_bytes_that_are_no_text_do_not_stop_a_step():
    _, log = show("import sys\nsys.stdout.buffer.write(b'\\xff\\xfe ok\\n')", terminal=False)
    assert log == "\ufffd\ufffd ok\n"


def test_a_process_that_a_step_left_behind_is_ended_and_not_waited_for():
    started = time.monotonic()
    _, log = show("import subprocess\nprint(subprocess.Popen(['sleep', '60']).pid)", terminal=False)
    assert time.monotonic() - started < 20
    deadline = time.monotonic() + 10
    while is_alive(int(log)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie that its adoptive parent has not collected yet does not."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_step_that_ignores_ctrl_c_is_killed(monkeypatch):
    monkeypatch.setattr("pipelines.local_run.GRACE_SECONDS", 1)
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(60)"
    process, output = _start([sys.executable, "-c", code], {}, terminal=False)
    assert next(_read(process, output)).startswith("ready")
    _end_group(process)
    os.close(output)
    assert process.returncode == -9
