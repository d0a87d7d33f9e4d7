"""A pseudo-terminal with a program on it, as a person at a window has, and what that person sees."""
import codecs
import contextlib
import os
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import unicodedata

import pytest

fcntl, termios = map(pytest.importorskip, ("fcntl", "termios"))  # elsewhere there are no pseudo-terminals

# leader|job CONTROL COMMAND...: makes its standard input the controlling terminal of its session and becomes
# the command (leader), or runs it as a shell runs a foreground job and tells CONTROL what becomes of it.
TERMINAL = """\
import fcntl, os, signal, sys, termios
mode, control, argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if mode == "leader":
    os.close(control)
    os.execvp(argv[0], argv)
ignored = ("SIGTTOU", "SIGTTIN", "SIGTSTP", "SIGINT", "SIGQUIT", "SIGHUP")
for name in ignored:
    signal.signal(getattr(signal, name), signal.SIG_IGN)
pid = os.fork()
if pid == 0:
    os.close(control)
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpgrp())
    for name in ignored:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.execvp(argv[0], argv)
while True:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        os.write(control, b"stopped ")
        os.read(control, 1)
        os.tcsetpgrp(0, pid)
        os.killpg(pid, signal.SIGCONT)
    else:
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        os.write(control, b"exited %d " % code)
        sys.exit(code)
"""


class Screen:
    """What a terminal of that size shows after some output."""

    # One thing that a terminal does: a control sequence, a title or other setting, or a character.
    PIECE = re.compile(r"\x1b\[([?>=]?)([\d;]*)([@-~])|\x1b\].*?(?:\x07|\x1b\\)|\x1b[()#]?.|(.)", re.S)

    def __init__(self, data, columns=80, rows=24):
        self.columns, self.rows, self.row, self.column = columns, rows, 0, 0
        self.cells = [[" "] * columns for _ in range(rows)]
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(data)
        for private, numbers, name, character in self.PIECE.findall(text):
            if character:
                self.put(character)
            elif name and not private:
                self.control(name, [int(number or 0) for number in numbers.split(";")])

    def put(self, character):
        """Show a character, or do what it is for."""
        last = self.columns - 1
        if character == "\n" and self.row < self.rows - 1:
            self.row += 1
        elif character == "\n":
            self.cells = [*self.cells[1:], [" "] * self.columns]
        elif character in "\r\b\t":
            self.column = {"\r": 0, "\b": max(0, min(self.column, last) - 1),
                           "\t": min(last, self.column // 8 * 8 + 8)}[character]
        elif not unicodedata.category(character).startswith("C"):
            if self.column > last:  # a full line is left only when there is more to show
                self.put("\n")
                self.column = 0
            self.cells[self.row][self.column] = character
            self.column += 1

    def control(self, name, numbers):
        """Do what a control sequence asks for (ECMA-48)."""
        first, step, line = numbers[0], max(1, numbers[0]), self.cells[self.row]
        if name in "ABCD":
            self.row = max(0, min(self.rows - 1, self.row + {"A": -step, "B": step}.get(name, 0)))
            self.column = max(0, min(self.columns - 1, self.column + {"C": step, "D": -step}.get(name, 0)))
        elif name in "GH":
            self.column = min(self.columns, max(1, first if name == "G" else [*numbers, 1][1])) - 1
            self.row = self.row if name == "G" else min(self.rows, step) - 1
        elif name == "P":  # the rest of the line moves to the left
            line[:] = [*line[:self.column], *line[self.column + step:], *" " * step][:self.columns]
        elif name in "KJ":
            start, end = [(self.column, self.columns), (0, self.column + 1), (0, self.columns)][first]
            line[start:end] = [" "] * (end - start)
            others = (self.cells[self.row + 1:], self.cells[:self.row], self.cells)[first]
            for other in others if name == "J" else ():
                other[:] = [" "] * self.columns

    def __str__(self):
        return "\n".join("".join(line).rstrip() for line in self.cells).rstrip("\n") + "\n"


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, mode, argv, env, cwd, columns=80, rows=24):
        self.columns, self.rows, self.output = columns, rows, b""
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.control, other = socket.socketpair()
        self.control.settimeout(20)
        with other, open(slave, "rb") as tty:
            self.process = subprocess.Popen(
                [sys.executable, "-c", TERMINAL, mode, str(other.fileno()), *argv], env=env, cwd=str(cwd),
                start_new_session=True, pass_fds=[other.fileno()], stdin=tty, stdout=tty, stderr=tty)
        self._stop, self._stopper = os.pipe()  # a terminal is closed only when nobody reads it
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # EIO: the last one at the other end has gone
            while self._stop not in select.select([self.master, self._stop], [], [])[0]:
                self.output += os.read(self.master, 65536)

    def type(self, data):
        os.write(self.master, data)

    def wait_for(self, text, since=0, read=bytes):
        """Block until this is in the output, or in what read(output) makes of it; that."""
        end, seen = time.monotonic() + 20, read(self.output[since:])
        while text not in seen:
            assert time.monotonic() < end, "waited for %r: %s" % (text, seen)
            time.sleep(0.005)
            seen = read(self.output[since:])
        return seen

    def wait_for_screen(self, text, since=0, read=str):
        """Block until this is seen; the screen, read through a function."""
        return self.wait_for(text, since, lambda data: read(str(Screen(data, self.columns, self.rows))))

    def hang_up(self):
        """The window is closed."""
        os.write(self._stopper, b"x")
        self._reader.join()
        for descriptor in (self.master, self._stop, self._stopper):
            os.close(descriptor)
        self.master = None

    def told(self):
        """What the shell says next."""
        return self.control.recv(100).decode("ascii").split()

    def code(self):
        return self.process.wait(20)

    def last_screen(self):
        """Wait for the end, and until nobody has the terminal open; the screen."""
        self.code()
        self._reader.join(20 if sys.platform == "linux" else 1)  # elsewhere nothing says that all have gone
        return self.wait_for_screen("")

    def close(self):
        """End whatever is left: the foreground job is hung up when its shell dies."""
        self.process.kill()
        self.process.wait()
        self.control.close()
        if self.master is not None:
            self.hang_up()
