"""Bars in a log: whole lines, few of them, none for what is quick; in a terminal one line that moves."""

import fcntl
import os
import struct
import subprocess
import sys
import termios
import threading

from expert_merging.core.bars import bar

COUNT = """
import sys, time
from expert_merging.core import bars
bars.SECONDS_IN_A_LOG = float(sys.argv[1])
for step in bars.bar(range(40), "outer", unit="step"):
    for _ in bars.bar(range(3), "inner", leave=False):
        time.sleep(0.005)
"""


def test_quick_bars_leave_nothing_in_a_log():
    done = subprocess.run([sys.executable, "-c", COUNT, "30"], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_log_gets_whole_lines_and_few():
    done = subprocess.run([sys.executable, "-c", COUNT, "0.2"], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr and 1 <= len(lines) <= 6  # of 160 updates in a second
    assert all(line.startswith("outer: ") for line in lines)
    assert "40/40" in lines[-1]


def test_many_bars_share_one_thread():
    for _ in bar(range(2)):
        before = threading.active_count()
    for _ in range(5):
        assert list(bar(range(2))) == [0, 1]
    assert threading.active_count() == before


def test_a_terminal_gets_a_line_that_moves():
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    process = subprocess.Popen([sys.executable, "-c", COUNT, "30"], stderr=theirs)
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 4096):
            text += part
    except OSError:  # Linux: the other side has closed
        pass
    os.close(ours)
    assert process.wait() == 0
    assert text.count(b"\r") > 3 and b"40/40" in text
