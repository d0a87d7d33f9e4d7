"""A pseudo-terminal with a program on it, as a person at a window has, and what that person sees."""
import codecs
import contextlib
import fcntl
import os
import re
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import unicodedata

# leader|job TTY CONTROL COMMAND...: makes TTY the controlling terminal of its session and becomes
# the command (leader), or runs it as a shell runs a foreground job and tells CONTROL what becomes of it.
TERMINAL = """\
import fcntl, os, signal, sys, termios
mode, fd, control, argv = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
for stream in (0, 1, 2):
    os.dup2(fd, stream)
os.close(fd)
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
        if character == "\n":
            self.row += 1
        elif character in "\r\b\t":
            self.column = {"\r": 0, "\b": max(0, min(self.column, last) - 1),
                           "\t": min(last, self.column // 8 * 8 + 8)}[character]
        elif not unicodedata.category(character).startswith("C"):
            if self.column > last:  # a full line is left only when there is more to show
                self.put("\n")
                self.column = 0
            self.cells[self.row][self.column] = character
            self.column += 1
        while self.row >= self.rows:
            self.cells = [*self.cells[1:], [" "] * self.columns]
            self.row -= 1

    def control(self, name, numbers):
        """Do what a control sequence asks for (ECMA-48)."""
        first, line = numbers[0], self.cells[self.row]
        if name in "ABCD":
            step = max(1, first)
            self.row = max(0, min(self.rows - 1, self.row + {"A": -step, "B": step}.get(name, 0)))
            self.column = max(0, min(self.columns - 1, self.column + {"C": step, "D": -step}.get(name, 0)))
        elif name in "GH":
            self.column = min(self.columns, max(1, first if name == "G" else [*numbers, 1][1])) - 1
            self.row = self.row if name == "G" else min(self.rows, max(1, first)) - 1
        elif name == "P":  # the rest of the line moves to the left
            self.cells[self.row] = (line[:self.column] + line[self.column + max(1, first):]
                                    + [" "] * max(1, first))[:self.columns]
        elif name in "KJ":
            start, end = [(self.column, self.columns), (0, self.column + 1), (0, self.columns)][first]
            line[start:end] = [" "] * (end - start)
            others = (self.cells[self.row + 1:], self.cells[:self.row], self.cells)[first]
            for other in others if name == "J" else ():
                other[:] = [" "] * self.columns

    def __str__(self):
        lines = ["".join(line).rstrip() for line in self.cells]
        return "\n".join(lines).rstrip("\n") + "\n"


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, mode, argv, env, cwd, columns=80, rows=24):
        self.columns, self.rows = columns, rows
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.control, other = socket.socketpair()
        self.control.settimeout(20)
        self.output = b""
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", TERMINAL, mode, str(slave), str(other.fileno()), *argv],
                env=env, cwd=str(cwd), start_new_session=True, pass_fds=[slave, other.fileno()],
                stdin=subprocess.DEVNULL)
        finally:
            os.close(slave)
            other.close()
        # A terminal is closed only when nobody reads it.
        self._stop, self._stopper = os.pipe()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # EIO: the last one at the other end has gone
            while self._stop not in select.select([self.master, self._stop], [], [])[0]:
                self.output += os.read(self.master, 65536)

    def type(self, data):
        """Press keys."""
        os.write(self.master, data)

    def screen(self):
        """What is seen of the output."""
        return self.wait_for_screen("")

    def wait_for(self, text, since=0, read=None, timeout=20):
        """Block until this is in the output, or in what read(output) makes of it; that."""
        end = time.monotonic() + timeout
        while True:
            seen = read(self.output[since:]) if read else self.output[since:]
            if text in seen:
                return seen
            assert time.monotonic() < end, "waited for %r: %s" % (text, seen)
            time.sleep(0.005)

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
        """Wait for the end."""
        return self.process.wait(20)

    def last_screen(self):
        """Wait for the end, and until nobody has the terminal open; the screen."""
        self.code()
        self._reader.join(20 if sys.platform == "linux" else 1)  # elsewhere nothing says that all have gone
        return self.screen()

    def close(self):
        """End whatever is left: the foreground job is hung up when its shell dies."""
        self.process.kill()
        self.process.wait()
        self.control.close()
        if self.master is not None:
            self.hang_up()
