"""The harness: runs the program as a process in an empty environment and checks what holds for every run.

Environment of the test run
    PROGRAM_PYTHON   the interpreter that runs the program; default: the one that runs pytest
    PROGRAM_FORMS    "py", "pyz" or "py,pyz": which forms of the program are tested. Default: the .pyz, and in
                     tests marked `both_forms` the .py too
    PROGRAM_FLAGS    extra flags for the interpreter, such as "-X dev -W error"
    PROGRAM_ARCHIVE  an archive to test instead of one that is built for this session

Fixtures
    run(*argv, stdin=None, env={}, cwd=None, timeout=30, key=True, python_flags=(), server=None,
        allow_codes=None, secrets=(), redirect=None, **popen) -> Result
                     stdin: None (/dev/null), bytes, or a file. env: added to the empty environment; None as
                     a value removes the name. cwd: default tmp_path. key: True: PACKTRACK_API_KEY is KEY, a
                     string: that, False: not set. server: sets PACKTRACK_BASE_URL to its url. redirect:
                     shell redirections such as ">&-" or "2>/dev/full" (the program's process replaces the
                     shell). secrets: further texts that must be in no output. popen: for subprocess.Popen.
    start(...) -> Process
                     the same, but does not wait: .pid, .stdin (with stdin=subprocess.PIPE), .send_signal(),
                     .wait_for_err(text), .err_text(), .out_bytes(), .result(timeout) -> Result. Killed at the
                     end of the test.
    server           a StandIn whose `checks` must be empty at the end of the test
    program          the form under test, "py" or "pyz";  program_path  its path
    archive          the path of the archive, built once through build_zipapp.sh
    argv_of          argv_of(*argv, python_flags=()) -> the whole command line, for tests with their own shell

Result: code, out, err (text), out_bytes, err_bytes, seconds, summary (the --json line, or None), error (its
`error`)

Asserted for every run: the key (and `secrets`) in no output; no traceback, no warning of the interpreter; a
documented exit code (allow_codes: those; with a command after `--`: any); with --json a line that parses and
accounts for every record; done in time.
"""
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from standin import KEY, StandIn

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULE = ROOT / "packtrack_logger.py"
MARK = "m4rk-of-the-payload"
CODES = (0, 1, 2, 3, 4, 130, 143)
PYTHON = shutil.which(os.environ.get("PROGRAM_PYTHON") or sys.executable) or sys.executable
FLAGS_OF_PYTHON = shlex.split(os.environ.get("PROGRAM_FLAGS", ""))
GIVEN_FORMS = [form for form in os.environ.get("PROGRAM_FORMS", "").replace(" ", "").split(",") if form]
if set(GIVEN_FORMS) - {"py", "pyz"}:
    raise pytest.UsageError("PROGRAM_FORMS: only py and pyz are known")
FORMS = GIVEN_FORMS or (["pyz"] if shutil.which("sh") else ["py"])
BOTH_FORMS = GIVEN_FORMS or (["pyz", "py"] if shutil.which("sh") else ["py"])


# ---- events ----------------------------------------------------------------------------------------------

MISSING = object()


def event(**overrides):
    """A complete valid event; `source__env="x"` sets a nested field, MISSING removes one."""
    result = {
        "timestamp": "2025-01-01T00:00:00Z",
        "source": {"system": "shop"},
        "workflow": {"id": "wf-1"},
        "actor": {"type": "agent", "id": "a-1"},
        "severity": "info",
        "status": "ok",
        "message": "done",
    }
    for name, value in overrides.items():
        part = result
        *path, last = name.split("__")
        for step in path:
            part = part.setdefault(step, {})
        if value is MISSING:
            del part[last]
        else:
            part[last] = value
    return result


def events(number, **overrides):
    """`number` valid events that differ in their message: "event 1", "event 2", ..."""
    return [event(message="event %d" % n, **overrides) for n in range(1, number + 1)]


def ndjson(records):
    """The records as bytes, one a line."""
    return b"".join(json.dumps(one, separators=(",", ":"), ensure_ascii=False).encode("utf-8") + b"\n"
                    for one in records)


FLAGS = ["--timestamp", "2025-01-01T00:00:00Z", "--source-system", "shop", "--workflow-id", "wf-1",
         "--actor-type", "agent", "--actor-id", "a-1", "--severity", "info", "--status", "ok",
         "--message", "done"]


def flags(**overrides):
    """FLAGS with some replaced: flags(message="x", timestamp=None) (None: left out)."""
    pairs = dict(zip(FLAGS[::2], FLAGS[1::2]))
    for name, value in overrides.items():
        pairs["--" + name.replace("_", "-")] = value
    return [word for pair in pairs.items() if pair[1] is not None for word in pair]


# ---- the program as a process ----------------------------------------------------------------------------

class Result:
    """How a run ended."""

    def __init__(self, argv, code, out, err, seconds):
        self.argv = argv
        self.code = code
        self.out_bytes = out
        self.err_bytes = err
        self.out = out.decode("utf-8", "replace")
        self.err = err.decode("utf-8", "replace")
        self.seconds = seconds
        self.summary = None

    @property
    def error(self):
        """The `error` of the --json line."""
        return self.summary["error"]

    def __repr__(self):
        return "<%s\n exit %s after %.2f s\n out: %s\n err: %s>" % (
            shlex.join(map(str, self.argv)) if hasattr(shlex, "join") else self.argv, self.code, self.seconds,
            self.out[-2000:], self.err[-4000:])


def _own_words(argv):
    """argv up to the command after `--`."""
    return argv[:argv.index("--")] if "--" in argv else argv


def check_result(result, argv, allow_codes, secrets, whole_output):
    """Assert what holds for every run; parse the --json line."""
    for secret in (KEY, *secrets):
        for stream in (result.out_bytes, result.err_bytes):
            assert secret.encode("utf-8") not in stream, "a secret was printed: %r" % result
    for bad in ("Traceback (most recent call last)", "Exception ignored in", "ResourceWarning", "Warning:"):
        assert bad not in result.err, "%s: %r" % (bad, result)
    if allow_codes is not None:
        assert result.code in allow_codes, result
    elif "--" not in argv:
        assert result.code in CODES, result
    own = _own_words(argv)
    quiet = {"-h", "--help", "-V", "--version"} & set(own) or "--" in argv
    if "--json" in own and whole_output and not quiet:
        lines = result.out_bytes.splitlines()
        assert lines, "no --json line: %r" % result
        result.summary = summary = json.loads(lines[-1].decode("utf-8"))
        assert set(summary) == {"ok", "exit_code", "read", "delivered", "undelivered", "invalid", "requests",
                                "retries", "bytes_sent", "seconds", "error"}, result
        assert summary["read"] == summary["delivered"] + summary["undelivered"] + summary["invalid"], result
        assert summary["exit_code"] == result.code, result
        assert summary["ok"] is (result.code == 0), result
        assert (summary["error"] is None) is (result.code == 0), result
        if summary["error"] is not None:
            assert set(summary["error"]) == {"kind", "message", "status", "where"}, result


class Process:
    """A run under way."""

    def __init__(self, argv, popen, check, out, err):
        self.argv = argv
        self._check = check
        self._files = (out.name, err.name)
        self._began = time.monotonic()
        self._feeder = None
        self._result = None
        self.popen = subprocess.Popen(argv, **{"stdout": out, "stderr": err, **popen})
        self.pid = self.popen.pid
        self.stdin = self.popen.stdin

    def feed(self, data):
        """Write `data` to standard input and close it, without waiting."""
        self._feeder = threading.Thread(target=self._write, args=(data,), daemon=True)
        self._feeder.start()

    def _write(self, data):
        try:
            with self.stdin:
                self.stdin.write(data)
        except OSError:  # The program may end without reading it.
            pass

    def send_signal(self, number):
        """Send a signal."""
        self.popen.send_signal(number)

    def out_bytes(self):
        """Standard output so far."""
        return pathlib.Path(self._files[0]).read_bytes()

    def err_text(self):
        """Standard error so far."""
        return pathlib.Path(self._files[1]).read_bytes().decode("utf-8", "replace")

    def wait_for_err(self, text, timeout=10):
        """Block until standard error holds `text`."""
        end = time.monotonic() + timeout
        while text not in self.err_text():
            assert self.popen.poll() is None, "ended without %r: %s" % (text, self.err_text())
            assert time.monotonic() < end, "waited for %r: %s" % (text, self.err_text())
            time.sleep(0.01)

    def kill(self):
        """End it by force, if it has not ended."""
        if self.popen.poll() is None:
            self.popen.kill()
        self._reap()

    def _reap(self):
        self.popen.wait()
        if self._feeder:
            self._feeder.join()
        elif self.stdin and not self.stdin.closed:
            try:
                self.stdin.close()
            except OSError:
                pass

    def result(self, timeout=30):
        """Wait for the end; check and return the Result. Closes standard input first where it is a pipe."""
        if self._result is None:
            if self.stdin and not self._feeder and not self.stdin.closed:
                self.stdin.close()
            # Not wait(timeout): that polls, and is late by up to 50 ms.
            late = threading.Event()
            timer = threading.Timer(timeout, lambda: (late.set(), self.popen.kill()))
            timer.start()
            self._reap()
            timer.cancel()
            timer.join()
            seconds = time.monotonic() - self._began
            if late.is_set():
                pytest.fail("did not end in %g s: %s\n%s" % (timeout, self.argv, self.err_text()))
            self._result = Result(self.argv, self.popen.returncode, self.out_bytes(),
                                  pathlib.Path(self._files[1]).read_bytes(), seconds)
            self._check(self._result)
        return self._result


def _clean_environment(home, env, key, server):
    base = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": home}
    if "SYSTEMROOT" in os.environ:  # Windows opens no socket without it.
        base["SYSTEMROOT"] = os.environ["SYSTEMROOT"]
    if key:
        base["PACKTRACK_API_KEY"] = KEY if key is True else key
    if server is not None:
        base["PACKTRACK_BASE_URL"] = server.url
    base.update(env)
    return {name: value for name, value in base.items() if value is not None}


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """The archive under test, built once."""
    given = os.environ.get("PROGRAM_ARCHIVE")
    if given:
        return pathlib.Path(given).resolve()
    path = tmp_path_factory.mktemp("archive") / "packtrack-logger.pyz"
    built = subprocess.run([str(ROOT / "build_zipapp.sh"), "--python", PYTHON, "--output", str(path)],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
                           env={**os.environ, "PYTHON": sys.executable})
    assert built.returncode == 0, built.stdout.decode("utf-8", "replace")
    return path


def pytest_generate_tests(metafunc):
    """Tests marked both_forms run on every form."""
    if "program" in metafunc.fixturenames:
        both = metafunc.definition.get_closest_marker("both_forms") is not None
        metafunc.parametrize("program", BOTH_FORMS if both else FORMS[:1])


@pytest.fixture
def program_path(request, program):
    """The path of the program under test."""
    return MODULE if program == "py" else request.getfixturevalue("archive")


@pytest.fixture
def argv_of(program_path):
    """The whole command line of a run."""
    def build(*argv, python_flags=()):
        return [PYTHON, *FLAGS_OF_PYTHON, *python_flags, str(program_path), *map(os.fspath, argv)]
    return build


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """An empty HOME."""
    return str(tmp_path_factory.mktemp("home"))


@pytest.fixture
def start(argv_of, tmp_path, home):
    """Start the program; see the top of the file."""
    processes = []
    folder = tempfile.TemporaryDirectory()

    def begin(*argv, stdin=None, env=(), cwd=None, key=True, python_flags=(), server=None, allow_codes=None,
              secrets=(), redirect=None, **popen):
        whole = argv_of(*argv, python_flags=python_flags)
        if redirect:
            whole = ["/bin/sh", "-c", 'exec "$0" "$@" ' + redirect, *whole]
        full = not redirect and popen.get("stdout") is None

        def check(result):
            check_result(result, list(argv), allow_codes, secrets, full)

        number = len(processes)
        with open(os.path.join(folder.name, "out%d" % number), "wb") as out, \
                open(os.path.join(folder.name, "err%d" % number), "wb") as err:
            popen["stdin"] = (subprocess.PIPE if isinstance(stdin, bytes)
                              else subprocess.DEVNULL if stdin is None else stdin)
            popen.setdefault("cwd", str(cwd or tmp_path))
            popen.setdefault("env", _clean_environment(home, dict(env), key, server))
            process = Process(whole, popen, check, out, err)
        if isinstance(stdin, bytes):
            process.feed(stdin)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
    folder.cleanup()


@pytest.fixture
def run(start):
    """Run the program to its end; see the top of the file."""
    def whole(*argv, timeout=30, **options):
        return start(*argv, **options).result(timeout)
    return whole


@pytest.fixture
def server():
    """A stand-in that finds nothing to object to."""
    with StandIn() as stand_in:
        yield stand_in
    assert stand_in.checks == []
