"""A pseudo-terminal with a program on it, as a person at a window has."""

import contextlib
import os
import pathlib
import select
import socket
import subprocess
import sys
import threading
import time

# terminal.py leader|job TTY CONTROL COMMAND...: makes TTY the controlling terminal of its session and becomes
# the command (leader), or runs it as a shell runs a foreground job and tells CONTROL what becomes of it.
TERMINAL = """\
import fcntl, os, signal, sys, termios
mode, fd, control, argv = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
for stream in (0, 1, 2):
    os.dup2(fd, stream)
if fd > 2:
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


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, mode, argv, env, cwd):
        path = os.path.join(str(cwd), "terminal.py")
        pathlib.Path(path).write_text(TERMINAL)
        self.master, slave = os.openpty()
        self.control, other = socket.socketpair()
        self.control.settimeout(20)
        self.output = b""
        try:
            self.process = subprocess.Popen(
                [sys.executable, path, mode, str(slave), str(other.fileno()), *argv],
                env=env,
                cwd=str(cwd),
                start_new_session=True,
                pass_fds=[slave, other.fileno()],
                stdin=subprocess.DEVNULL,
            )
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

    def wait_for(self, text, since=0, timeout=20):
        """Block until this is on the screen; what came up to it."""
        end = time.monotonic() + timeout
        while text not in self.output[since:]:
            assert time.monotonic() < end, "waited for %r: %r" % (text, self.output[since:])
            time.sleep(0.005)
        return self.output[since : self.output.index(text, since)]

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

    def close(self):
        """Whatever is left, end it: the foreground job is hung up when its shell dies."""
        if self.master is None:
            return
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.control.close()
        self.hang_up()
