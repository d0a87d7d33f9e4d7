"""The tests of packtrack-logger: how they are built, and how to add one.

A case is a row of a table wherever it can be: what goes in, and all that must come out.

    test_503 = rows(
        Case("once", "{fast} {event} --json", script=[503, 200], requests=2, json={"retries": 1}),
        Case("for ever", "{fast} {events:3} --undelivered left.ndjson", script=[503, 503], code=3,
             err="HTTP 503 Service Unavailable from {url}/api/ingest after 2 attempts; ...", requests=2,
             after={"left.ndjson": events(3)}),
    )

Tables: test_cli.py the command line, test_faults.py server and network, test_input.py what is read,
test_wrapper.py the command after `--`. What needs a sequence of steps is a function on the fixtures below.
promises.py lists which test holds which promise of the design; `make mutants` (mutants.py) shows what no test
notices. standin.py is the server, steps.py what it answers, cases.py compares a row.

A row, Case(id, argv, ...)
    argv      words, or one text that is split as a shell does. {event}: the flags of a valid event;
              {events:N}: `--file events.ndjson --ndjson` with N events in it; {fast}: short waits, one retry
    env, key  what is added to an empty environment; key: True: PACKTRACK_API_KEY is KEY, a text: that (the
              stand-in takes it), False: not set
    stdin     bytes, text or a list of events (as NDJSON); None: /dev/null. hold=True: it stays open
    files     name: bytes, text or events; made in the folder that the program runs in
    script    steps of the stand-in, default: what follows them (200), server: further arguments of it: tls
              ("good", "expired", "other_host", "self_signed" or one of TLS_FAULTS), prefix, host, strict,
              health, key. PACKTRACK_BASE_URL names it; server=False: there is none
    proxy     the script of a second stand-in, {proxy} in argv and env; proxied: its requests, as `requests`
    kill      (signal, moment), or several: the moment is a number of requests that have come, or a text on
              standard error, or a function(process, server) that waits for it
    redirect  shell redirections such as ">&-" or "2>/dev/full"
    python_flags, secrets (further texts that must be in no output), timeout (seconds; against hanging)
    code      the exit code, or the name of the signal that ended it: "TERM"
    err       standard error, whole: "" by default. Its lines begin with `packtrack-logger: `, left out here;
              a line that does not is written with "| " in front
    out       standard output, whole: "" by default; with --json it is not compared, but
    json      values of the --json line, which a row with --json has to give; "error" may be a part of it
    requests  how many the stand-in got: 0 by default. Or a list with one item for each: the number of its
              events, or a dict of events, method, path, status, body (bytes, or what is parsed of it),
              headers (lower case; None: not there). None: not compared
    sent      what the service took, in order: events, or their bytes. None: not compared
    after     name: what is in the file afterwards (None: there is none); no other file may have come
    both_forms: run on the .py and the .pyz. full: left to `make test-full`. marks: further marks

In argv, env and files {url}, {host} (HOST:PORT), {port}, {proxy}, {refused} (HOST:PORT where nobody listens),
{root} (the test authority, for SSL_CERT_FILE) and {tmp} (the folder) stand for what they name; in err, out
and the texts of json and requests too, and there <n> is a whole number, <s> one that may have a fraction,
<hash> hexadecimal digits, <time> an RFC 3339 time, <...> anything up to the end of the line.

ACCEPT=1 prints a failing row's actual values as source; ACCEPT=write puts them into the row: read the diff.

Asserted for every run: the key (and `secrets`) in no output, in any spelling; no traceback, no warning of the
interpreter; a documented exit code; with --json a line that accounts for every record and agrees with
standard error; an end in time. For a row also: what was delivered and what was kept cover the input.

Fixtures for functions
    run(*argv, stdin=None, env={}, cwd=None, timeout=30, key=True, python_flags=(), server=None,
        allow_codes=None, secrets=(), redirect=None, hold=False, **popen) -> Result
              code (negative: a signal), out, err, out_bytes, err_bytes, seconds, summary (the --json line or
              None), error (its `error`). cwd: default tmp_path. allow_codes: those and no others; with a
              command after `--` any. popen: for subprocess.Popen
    start(...) -> Process
              does not wait: .pid, .stdin (with stdin=subprocess.PIPE), .send_signal(), .wait_for_err(text),
              .err_text(), .out_bytes(), .result(timeout). Killed at the end of the test
    server    a StandIn whose `checks` must be empty at the end;  perform(case): runs a row
    program, program_path, archive, argv_of(*argv, python_flags=())
              the form under test, its path, the archive's path, the command line of a run

Environment
    PROGRAM_PYTHON   the interpreter that runs the program; default: the one that runs pytest
    PROGRAM_FORMS    "py", "pyz" or "py,pyz"; default: the .pyz, and both for what is marked both_forms
    PROGRAM_FLAGS    extra flags for the interpreter, such as "-X dev -W error"
    PROGRAM_ARCHIVE  an archive to test instead of one that is built for this session
"""
import contextlib
import functools
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

import accept
import certs
from cases import FAST, FLAGS, MISSING, Case, event, events, flags, ndjson, perform_row, rows  # noqa: F401
from standin import KEY, StandIn, spellings

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULE = ROOT / "packtrack_logger.py"
MARK = "m4rk-of-the-payload"
CODES = (0, 1, 2, 3, 4, *(code for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
                          for code in (-getattr(signal, name), 128 + getattr(signal, name))))
PYTHON = shutil.which(os.environ.get("PROGRAM_PYTHON") or sys.executable) or sys.executable
FLAGS_OF_PYTHON = shlex.split(os.environ.get("PROGRAM_FLAGS", ""))
GIVEN_FORMS = [form for form in os.environ.get("PROGRAM_FORMS", "").replace(" ", "").split(",") if form]
if set(GIVEN_FORMS) - {"py", "pyz"}:
    raise pytest.UsageError("PROGRAM_FORMS: only py and pyz are known")
FORMS = GIVEN_FORMS or (["pyz"] if shutil.which("sh") else ["py"])
BOTH_FORMS = GIVEN_FORMS or (["pyz", "py"] if shutil.which("sh") else ["py"])


# ---- the program as a process ----------------------------------------------------------------------------

class Result:
    """How a run ended."""

    def __init__(self, argv, code, out, err, seconds):
        self.argv, self.code, self.out_bytes, self.err_bytes, self.seconds = argv, code, out, err, seconds
        self.out = out.decode("utf-8", "replace")
        self.err = err.decode("utf-8", "replace")
        self.summary = None

    @property
    def error(self):
        """The `error` of the --json line."""
        return self.summary["error"]

    def __repr__(self):
        return "<%s\n exit %s after %.2f s\n out: %s\n err: %s>" % (
            " ".join(map(shlex.quote, self.argv)), self.code, self.seconds, self.out[-2000:],
            self.err[-4000:])


spellings_of = functools.lru_cache(maxsize=None)(spellings)


def check_result(result, argv, allow_codes, secrets, whole_output):
    """Assert what holds for every run; parse the --json line."""
    __tracebackhide__ = True
    for spelling in {form for secret in (KEY, *secrets) for form in spellings_of(secret)}:
        for stream in (result.out_bytes, result.err_bytes):
            assert spelling not in stream, "a secret was printed, as %r: %r" % (spelling, result)
    for bad in ("Traceback (most recent call last)", "Exception ignored in", "ResourceWarning", "Warning:"):
        assert bad not in result.err, "%s: %r" % (bad, result)
    own = argv[:argv.index("--")] if "--" in argv else argv
    if allow_codes is not None or "--" not in argv:
        assert result.code in (CODES if allow_codes is None else allow_codes), result
    if "--json" not in own or not whole_output or {"-h", "--help", "-V", "--version", "--"} & set(argv):
        return
    lines = result.out_bytes.splitlines()
    assert lines, "no --json line: %r" % result
    result.summary = summary = json.loads(lines[-1].decode("utf-8"))
    assert set(summary) == {"ok", "exit_code", "read", "delivered", "undelivered", "invalid", "requests",
                            "retries", "bytes_sent", "seconds", "error"}, result
    assert summary["read"] == summary["delivered"] + summary["undelivered"] + summary["invalid"], result
    assert summary["exit_code"] == (result.code if result.code >= 0 else 128 - result.code), result
    assert summary["ok"] is (result.code == 0), result
    assert (summary["error"] is None) is (result.code == 0), result
    if summary["error"] is not None:
        assert set(summary["error"]) == {"kind", "message", "status", "where"}, result
    last = result.err.split("\npacktrack-logger: ")[-1]
    for delivered, read in re.findall(r"\bdelivered (\d+) of (\d+)\b", last):
        assert (summary["delivered"], summary["read"]) == (int(delivered), int(read)), result


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
        self.pid, self.stdin = self.popen.pid, self.popen.stdin

    def feed(self, data, hold=False):
        """Write `data` to standard input and, unless it is to be held open, close it; does not wait."""
        self._feeder = threading.Thread(target=self._write, args=(data, hold), daemon=True)
        self._feeder.start()

    def _write(self, data, hold):
        with contextlib.suppress(OSError):  # the program may end without reading it
            self.stdin.write(data)
            self.stdin.flush()
        if not hold:
            self._close_stdin()

    def _close_stdin(self):
        if self.stdin and not self.stdin.closed:
            with contextlib.suppress(OSError):
                self.stdin.close()

    def send_signal(self, number):
        """Send a signal."""
        self.popen.send_signal(number)

    def out_bytes(self):
        """Standard output so far."""
        return pathlib.Path(self._files[0]).read_bytes()

    def err_text(self):
        """Standard error so far."""
        return pathlib.Path(self._files[1]).read_bytes().decode("utf-8", "replace")

    def wait_for_err(self, text, timeout=20):
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
        self._close_stdin()

    def result(self, timeout=30):
        """Wait for the end; check and return the Result. Closes standard input first where it is a pipe."""
        __tracebackhide__ = True
        if self._result is None:
            if not self._feeder:
                self._close_stdin()
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


# ---- fixtures --------------------------------------------------------------------------------------------

ALL_TESTS = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Note the ids of all that were collected, for promises.py."""
    config.stash[ALL_TESTS] = [item.nodeid for item in items]


def pytest_generate_tests(metafunc):
    """Rows, and the forms of what is marked both_forms."""
    cases = getattr(metafunc.function, "cases", None)
    if cases:
        metafunc.parametrize("case, program", indirect=["program"], argvalues=[
            pytest.param(case, form, id=case.id + ("" if form == FORMS[0] else "-" + form),
                         marks=[*case.marks, *[pytest.mark.full] * case.full])
            for case in cases for form in (BOTH_FORMS if case.both_forms else FORMS[:1])])
    elif "program" in metafunc.fixturenames and metafunc.definition.get_closest_marker("both_forms"):
        if len(BOTH_FORMS) > 1:
            metafunc.parametrize("program", BOTH_FORMS, indirect=True)


@pytest.fixture(scope="session")
def scratch():
    """A folder for the run of the tests."""
    with tempfile.TemporaryDirectory(prefix="packtrack-tests-") as folder:
        yield pathlib.Path(os.path.realpath(folder))


@pytest.fixture
def tmp_path(scratch):
    """An empty folder of the test's own."""
    folder = pathlib.Path(tempfile.mkdtemp(dir=str(scratch)))
    yield folder
    shutil.rmtree(str(folder), ignore_errors=True)


@pytest.fixture(scope="session")
def archive(scratch):
    """The archive under test, built once."""
    given = os.environ.get("PROGRAM_ARCHIVE")
    if given:
        return pathlib.Path(given).resolve()
    path = scratch / "archive" / "packtrack-logger.pyz"
    built = subprocess.run([str(ROOT / "build_zipapp.sh"), "--python", PYTHON, "--output", str(path)],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
                           env={**os.environ, "PYTHON": sys.executable})
    assert built.returncode == 0, built.stdout.decode("utf-8", "replace")
    return path


@pytest.fixture
def program(request):
    """The form under test, "py" or "pyz"."""
    return getattr(request, "param", FORMS[0])


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
def home(scratch):
    """An empty HOME."""
    (scratch / "home").mkdir()
    return str(scratch / "home")


def clean_environment(home, env, key, server):
    """The environment of a run: hardly anything, and env."""
    base = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": home}
    if "SYSTEMROOT" in os.environ:  # Windows opens no socket without it.
        base["SYSTEMROOT"] = os.environ["SYSTEMROOT"]
    if key:
        base["PACKTRACK_API_KEY"] = KEY if key is True else key
    if server is not None:
        base["PACKTRACK_BASE_URL"] = server.url
    base.update(env)
    return {name: value for name, value in base.items() if value is not None}


@pytest.fixture
def start(argv_of, tmp_path, home, scratch):
    """Start the program; see the top of the file."""
    processes = []
    streams = tempfile.mkdtemp(dir=str(scratch))

    def begin(*argv, stdin=None, hold=False, env=(), cwd=None, key=True, python_flags=(), server=None,
              allow_codes=None, secrets=(), redirect=None, **popen):
        whole = argv_of(*argv, python_flags=python_flags)
        if redirect:
            whole = ["/bin/sh", "-c", 'exec "$0" "$@" ' + redirect, *whole]
        full = not redirect and popen.get("stdout") is None

        def check(result):
            __tracebackhide__ = True
            check_result(result, list(argv), allow_codes, secrets, full)

        path = os.path.join(streams, "%s%d")
        number = len(processes)
        with open(path % ("out", number), "wb") as out, open(path % ("err", number), "wb") as err:
            popen["stdin"] = (subprocess.PIPE if isinstance(stdin, bytes)
                              else subprocess.DEVNULL if stdin is None else stdin)
            popen.setdefault("cwd", str(cwd or tmp_path))
            popen.setdefault("env", clean_environment(home, dict(env), key, server))
            process = Process(whole, popen, check, out, err)
        processes.append(process)
        if isinstance(stdin, bytes):
            process.feed(stdin, hold)
        return process

    yield begin
    for process in processes:
        process.kill()
    shutil.rmtree(streams, ignore_errors=True)


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


@pytest.fixture
def perform(start, stand_in, tmp_path):
    """Run a row and compare; see the top of the file."""
    def whole(case):
        __tracebackhide__ = True
        with contextlib.ExitStack() as stack:
            perform_row(case, start, stand_in, tmp_path, stack)
    return whole


@pytest.fixture(scope="session")
def stand_in():
    """stand_in(**arguments of StandIn): one that begins anew; it serves all rows that can share it."""
    pool = {}

    def get(tls=None, prefix="", host="127.0.0.1", **fresh):
        place = (tls, prefix, host)
        if place not in pool:
            authority = tls and certs.authority()
            pair = tls and (getattr(authority, tls, None) or (*authority.good, tls))
            pool[place] = StandIn(tls=pair, prefix=prefix, host=host).start()
        pool[place].renew(**fresh)
        return pool[place]

    yield get
    for one in pool.values():
        one.close()


def pytest_sessionfinish():
    """Write down what ACCEPT=write has accepted."""
    accept.write()
