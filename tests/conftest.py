"""The tests of packtrack-logger: how they are built, and how to add one.

A case is a row of a table wherever it can be: what goes in, and all that must come out.

    test_503 = rows(
        Case("once", "{fast} {event} --json", script=[503, 200], requests=2, json={"retries": 1}), ...)

What needs a sequence of steps is a function on the fixtures below. promises.py lists which test holds which
promise of the design; `make mutants` shows what no test notices. standin.py is the server.

A row, Case(id, argv, ...)
    argv      words, or one text that is split as a shell does. {event}: the flags of a valid event;
              {events:N}: `--file events.ndjson --ndjson` with N events in it; {fast}: short waits, one retry
    env, key  what is added to an empty environment; key: True: PACKTRACK_API_KEY is KEY, a text: that (the
              stand-in takes it), False: not set
    stdin     bytes, text or a list of events (as NDJSON); None: /dev/null. hold=True: it stays open
    files     name: bytes, text or events; made in the folder that the program runs in
    script    steps of the stand-in, default: what follows them (200), server: further arguments of it: tls
              ("good", "expired", "other_host", "self_signed" or one of TLS_FAULTS), prefix, host,
              health, key. PACKTRACK_BASE_URL names it; server=False: there is none
    proxy     the script of a second stand-in, {proxy} in argv and env; proxied: its requests, as `requests`
    kill      (signal, moment): the moment is a number of requests that have come, or a text on standard
              error, or a function(process, server) that waits for it; or several of these
    redirect  shell redirections such as ">&-" or "2>/dev/full"
    secrets   further texts that must be in no output;  timeout  seconds, against hanging
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
<time> an RFC 3339 time, <...> anything up to the end of the line.

Asserted for every run: the key (and `secrets`) in no output, in any spelling; no traceback, no warning of the
interpreter; a documented exit code; with --json a line that accounts for every record and agrees with
standard error; an end in time. For a row also: what was delivered and what was kept cover the input.

Fixtures for functions
    start(*argv, stdin=None, env={}, cwd=tmp_path, key=True, python_flags=(), server=None, secrets=(),
          allow_codes=None, redirect=None, hold=False, **popen) -> Process, killed at the end of the test
    run(..., timeout=30) -> Result: code (negative: a signal), out, err, seconds, summary (the --json line)
    server    a StandIn whose `checks` must be empty at the end;  perform(case): runs a row
    archive   its path;  argv_of(*argv, python_flags=()): the command line of a run

Environment
    PROGRAM_PYTHON   the interpreter that runs the program; default: the one that runs pytest
    PROGRAM_FORMS    "py", "pyz" or "py,pyz"; default: the .pyz, and both for what is marked both_forms
    PROGRAM_FLAGS    extra flags for the interpreter, such as "-X dev -W error"
    PROGRAM_ARCHIVE  an archive to test instead of one that is built for this session
"""
import collections
import contextlib
import difflib
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

import certs
from standin import KEY, RefusedPort, StandIn
from steps import spellings

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODULE = ROOT / "packtrack_logger.py"
CODES = (0, 1, 2, 3, 4, *(code for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
                          for code in (-getattr(signal, name), 128 + getattr(signal, name))))
PYTHON = shutil.which(os.environ.get("PROGRAM_PYTHON") or sys.executable) or sys.executable
FLAGS_OF_PYTHON = shlex.split(os.environ.get("PROGRAM_FLAGS", ""))
GIVEN_FORMS = os.environ.get("PROGRAM_FORMS", "").replace(",", " ").split()
if set(GIVEN_FORMS) - {"py", "pyz"}:
    raise pytest.UsageError("PROGRAM_FORMS: only py and pyz are known")
BOTH_FORMS = GIVEN_FORMS or (["pyz", "py"] if shutil.which("sh") else ["py"])
FORMS = GIVEN_FORMS or BOTH_FORMS[:1]
FAST = "--timeout 400ms --retries 1 --backoff-initial 1ms --backoff-max 2ms".split()
FLAGS = ("--timestamp 2025-01-01T00:00:00Z --source-system shop --workflow-id wf-1 --actor-type agent "
         "--actor-id a-1 --severity info --status ok --message done").split()
MISSING = object()
# Reads YAML from standard input and prints it as JSON; keys such as `on` become text.
TO_JSON = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(sys.stdin)), default=str))"


def parse_yaml(text):
    """The documents of a YAML text, or None where no interpreter here has a parser."""
    for python in dict.fromkeys([sys.executable, shutil.which("python3"), "/usr/bin/python3"]):
        if python and os.path.exists(python):
            done = subprocess.run([python, "-c", TO_JSON], input=text.encode("utf-8"), stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, timeout=60)
            if done.returncode == 0:
                return json.loads(done.stdout.decode("utf-8"))
            assert b"No module named" in done.stderr, done.stderr.decode("utf-8", "replace")
    return None


# ---- events ----------------------------------------------------------------------------------------------

def event(**overrides):
    """A complete valid event; `source__env="x"` sets a nested field, MISSING removes one."""
    result = {"timestamp": "2025-01-01T00:00:00Z", "source": {"system": "shop"}, "workflow": {"id": "wf-1"},
              "actor": {"type": "agent", "id": "a-1"}, "severity": "info", "status": "ok", "message": "done"}
    for name, value in overrides.items():
        part = result
        *path, last = name.split("__")
        for step in path:
            part = part.setdefault(step, {})
        part[last] = value
        if value is MISSING:
            del part[last]
    return result


def events(number, **overrides):
    """`number` valid events that differ in their message: "event 1", "event 2", ..."""
    return [event(message="event %d" % n, **overrides) for n in range(1, number + 1)]


def ndjson(records):
    """The records as bytes, one a line."""
    return b"".join(json.dumps(one, separators=(",", ":"), ensure_ascii=False).encode("utf-8") + b"\n"
                    for one in records)


def flags(**overrides):
    """FLAGS with some replaced: flags(message="x", timestamp=None) (None: left out)."""
    pairs = dict(zip(FLAGS[::2], FLAGS[1::2]))
    pairs.update(("--" + name.replace("_", "-"), value) for name, value in overrides.items())
    return [word for pair in pairs.items() if pair[1] is not None for word in pair]


# ---- the program as a process ----------------------------------------------------------------------------

class Result:
    """How a run ended."""

    def __init__(self, argv, code, out, err, seconds):
        self.argv, self.code, self.out_bytes, self.err_bytes, self.seconds = argv, code, out, err, seconds
        self.out, self.err = out.decode("utf-8", "replace"), err.decode("utf-8", "replace")
        self.summary = None

    def __repr__(self):
        return "<%s\n exit %s after %.2f s\n out: %s\n err: %s>" % (
            shlex.join(self.argv), self.code, self.seconds, self.out[-2000:], self.err[-4000:])


def check_result(result, argv, allow_codes, secrets, whole_output):
    """Assert what holds for every run; parse the --json line."""
    __tracebackhide__ = True
    for spelling in {form for secret in (KEY, *secrets) for form in spellings(secret)}:
        assert spelling not in result.out_bytes + b"\0" + result.err_bytes, "a secret: %r: %r" % (
            spelling, result)
    for bad in ("Traceback (most recent call last)", "Exception ignored in", "ResourceWarning", "Warning:"):
        assert bad not in result.err, "%s: %r" % (bad, result)
    if allow_codes is not None or "--" not in argv:
        assert result.code in (CODES if allow_codes is None else allow_codes), result
    if "--json" not in argv or not whole_output or {"-h", "--help", "-V", "--version", "--"} & set(argv):
        return
    lines = result.out_bytes.splitlines()
    assert lines, "no --json line: %r" % result
    result.summary = summary = json.loads(lines[-1].decode("utf-8"))
    assert set(summary) == {"ok", "exit_code", "read", "delivered", "undelivered", "invalid", "requests",
                            "retries", "bytes_sent", "seconds", "error"}, result
    assert summary["read"] == summary["delivered"] + summary["undelivered"] + summary["invalid"], result
    assert summary["exit_code"] == (result.code if result.code >= 0 else 128 - result.code), result
    assert summary["seconds"] == round(summary["seconds"], 3), result
    assert summary["ok"] is (summary["error"] is None) is (result.code == 0), result
    if summary["error"] is not None:
        assert set(summary["error"]) == {"kind", "message", "status", "where"}, result
    last = result.err.split("\npacktrack-logger: ")[-1]
    for delivered, read in re.findall(r"\bdelivered (\d+) of (\d+)\b", last):
        assert (summary["delivered"], summary["read"]) == (int(delivered), int(read)), result


class Process:
    """A run under way."""

    def __init__(self, argv, popen, check, out, err):
        self.argv, self._check, self._feeder, self._result = argv, check, None, None
        self._out, self._err, self._began = pathlib.Path(out.name), pathlib.Path(err.name), time.monotonic()
        self.popen = subprocess.Popen(argv, **{"stdout": out, "stderr": err, **popen})
        self.pid, self.stdin, self.send_signal = self.popen.pid, self.popen.stdin, self.popen.send_signal
        self.out_bytes = self._out.read_bytes

    def feed(self, data, hold=False):
        """Write `data` to standard input and, unless it is to be held open, close it; does not wait."""
        def write():
            with contextlib.suppress(OSError):  # the program may end without reading it
                self.stdin.write(data)
                self.stdin.flush()
            if not hold:
                self._close_stdin()
        self._feeder = threading.Thread(target=write, daemon=True)
        self._feeder.start()

    def _close_stdin(self):
        with contextlib.suppress(OSError, AttributeError):
            self.stdin.close()

    def err_text(self):
        """Standard error so far."""
        return self._err.read_bytes().decode("utf-8", "replace")

    def wait_for_err(self, text, timeout=20):
        """Block until standard error holds `text`."""
        end = time.monotonic() + timeout
        while text not in self.err_text():
            assert self.popen.poll() is None, "ended without %r: %s" % (text, self.err_text())
            assert time.monotonic() < end, "waited for %r: %s" % (text, self.err_text())
            time.sleep(0.01)

    def kill(self):
        """End it by force, if it has not ended."""
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
            if late.is_set():
                pytest.fail("did not end in %g s: %s\n%s" % (timeout, self.argv, self.err_text()))
            self._result = Result(self.argv, self.popen.returncode, self.out_bytes(), self._err.read_bytes(),
                                  time.monotonic() - self._began)
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
    elif metafunc.definition.get_closest_marker("both_forms") and len(BOTH_FORMS) > 1:
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
def argv_of(request, program):
    """The whole command line of a run."""
    path = MODULE if program == "py" else request.getfixturevalue("archive")
    return lambda *argv, python_flags=(): [
        PYTHON, *FLAGS_OF_PYTHON, *python_flags, str(path), *map(os.fspath, argv)]


@pytest.fixture(scope="session")
def home(scratch):
    """An empty HOME."""
    (scratch / "home").mkdir()
    return str(scratch / "home")


def clean_environment(home, env, key, server):
    """The environment of a run: hardly anything, and env."""
    base = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": home,
            "SYSTEMROOT": os.environ.get("SYSTEMROOT"),  # Windows opens no socket without it
            "PACKTRACK_API_KEY": KEY if key is True else key or None,
            "PACKTRACK_BASE_URL": server and server.url}
    return {name: value for name, value in {**base, **env}.items() if value is not None}


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

        path = os.path.join(streams, str(len(processes)))
        with open(path + "out", "wb") as out, open(path + "err", "wb") as err:
            popen["stdin"] = (subprocess.PIPE if isinstance(stdin, bytes)
                              else subprocess.DEVNULL if stdin is None else stdin)
            popen.setdefault("cwd", str(cwd or tmp_path))
            popen.setdefault("env", clean_environment(home, dict(env), key, server))
            processes.append(Process(whole, popen, check, out, err))
        if isinstance(stdin, bytes):
            processes[-1].feed(stdin, hold)
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
    shutil.rmtree(streams, ignore_errors=True)


@pytest.fixture
def run(start):
    """Run the program to its end; see the top of the file."""
    return lambda *argv, timeout=30, **options: start(*argv, **options).result(timeout)


@pytest.fixture
def server():
    """A stand-in that finds nothing to object to."""
    with StandIn() as stand_in:
        yield stand_in
    assert stand_in.checks == []


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


@pytest.fixture
def perform(start, stand_in, tmp_path):
    """perform(case): run a row and compare."""
    with contextlib.ExitStack() as stack:
        yield lambda case: perform_row(case, start, stand_in, tmp_path, stack)


# ---- rows ------------------------------------------------------------------------------------------------

class Case:
    """A row; see the top of the file."""

    FIELDS = dict.fromkeys("stdin proxy proxied redirect json sent".split())
    FIELDS.update(dict.fromkeys("files script server kill python_flags secrets after marks".split(), ()),
                  key=True, default=200, code=0, requests=0, err="", out="", hold=False, full=False,
                  both_forms=False, timeout=30)

    def __init__(self, id, argv="", env=(), **fields):
        assert set(fields) <= set(self.FIELDS), sorted(set(fields) - set(self.FIELDS))
        self.__dict__.update(self.FIELDS, id=id, env=env, **fields)
        self.argv = shlex.split(argv) if isinstance(argv, str) else list(map(os.fspath, argv))


def rows(*cases):
    """A test for each of the cases."""
    def test(case, perform):
        perform(case)
    assert len({case.id for case in cases}) == len(cases), "two rows of one id"
    test.cases = cases
    return test


def as_bytes(content, names):
    """What is to be in a file: bytes, text with names in it, or a list of events."""
    if isinstance(content, str):
        return substitute(content, names).encode("utf-8")
    return content if content is None or isinstance(content, bytes) else ndjson(content)


def substitute(text, names):
    """The text with {url} and its like replaced; some are functions, which say it when it is needed."""
    def value(match):
        known = names[match.group(1)]
        return str(known() if callable(known) else known)
    return re.sub(r"\{(url|host|port|proxy|refused|root|tmp)\}", value, text)


WILD = {"<n>": r"\d+", "<s>": r"\d+(?:\.\d+)?", "<...>": ".*",
        "<time>": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)"}


def matches(expected, actual, names):
    """Whether the text is what the template says."""
    parts = re.split("(%s)" % "|".join(map(re.escape, WILD)), substitute(expected, names))
    return re.fullmatch("".join(WILD.get(part) or re.escape(part) for part in parts), actual) is not None


def equal(expected, actual, names):
    """Whether the values are equal, the texts in them taken as templates."""
    if isinstance(expected, str) and isinstance(actual, str):
        return matches(expected, actual, names)
    if isinstance(expected, dict) and isinstance(actual, dict):
        return all(equal(value, actual.get(name), names) for name, value in expected.items())
    return expected == actual and isinstance(expected, bool) == isinstance(actual, bool)


def without_prefix(text):
    """Standard error as rows write it."""
    prefix = "packtrack-logger: "
    return "\n".join(line[len(prefix):] if line.startswith(prefix) else "| " + line
                     for line in text[:-1].split("\n")) if text.endswith("\n") else text and "| " + text


def same_requests(expected, requests, names):
    """Whether the requests are as many as expected, or what each is said to be."""
    if expected is None or isinstance(expected, int):
        return expected in (None, len(requests))
    wanted = [{"events": one} if isinstance(one, int) else one for one in expected]
    return len(wanted) == len(requests) and all(
        equal(one, {**vars(request), "events": len(request.events), "body": request.body if isinstance(
            one.get("body"), bytes) else request.json}, names) for one, request in zip(wanted, requests))


def perform_row(case, start, stand_in, folder, stack):
    """Run a row and compare all of it."""
    __tracebackhide__ = True
    server = proxy = None
    names = {"tmp": folder, "root": lambda: certs.authority().root,
             "refused": stack.enter_context(RefusedPort()).host}
    if case.server is not False:
        key = case.key if isinstance(case.key, str) else KEY
        server = stand_in(script=case.script, default=case.default, **{"key": key, **dict(case.server)})
        names.update(url=server.url, port=server.port, host=server.url.split("/")[2])
    if case.proxy is not None:
        proxy = stack.enter_context(StandIn(case.proxy, strict=False))
        names["proxy"] = "127.0.0.1:%d" % proxy.port
    files = dict(case.files)
    argv = []
    for word in case.argv:
        many = re.fullmatch(r"\{events:(\d+)\}", word)
        if many:
            files["events.ndjson"] = events(int(many.group(1)))
            argv += ["--file", "events.ndjson", "--ndjson"]
        else:
            argv += {"{event}": FLAGS, "{fast}": FAST}.get(word) or [substitute(word, names)]
    made = {name: as_bytes(content, names) for name, content in files.items()}
    for name, content in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    process = start(*argv, stdin=as_bytes(case.stdin, names), hold=case.hold, key=case.key, server=server,
                    env={name: value and substitute(value, names) for name, value in dict(case.env).items()},
                    secrets=case.secrets, redirect=case.redirect, python_flags=case.python_flags, cwd=folder)
    for number, moment in [case.kill] if case.kill and isinstance(case.kill[0], str) else case.kill:
        if isinstance(moment, int):
            server.wait_for_requests(moment)
        elif isinstance(moment, str):
            process.wait_for_err(substitute(moment, names))
        else:
            moment(process, server)
        process.send_signal(getattr(signal, "SIG" + number))
    result = process.result(case.timeout)
    left = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}
    after = {**made, **{name: as_bytes(content, names) for name, content in dict(case.after).items()}}
    found = {name: left.get(name) for name in {**left, **after}}
    code = result.code if result.code >= 0 else signal.Signals(-result.code).name[3:]
    err, proxied = without_prefix(result.err), proxy.requests if proxy else []
    requests = server.requests if server else []
    raw = case.sent and isinstance(case.sent[0], bytes)
    sent = server and (server.raw_records if raw else server.records)
    differ = [show(name, getattr(case, name), actual, names) for name, actual, holds in (
        ("code", code, case.code == code),
        ("err", err, case.err is None or matches(case.err, err, names)),
        ("out", result.out, case.out is None or (result.summary is not None and not case.out)
         or matches(case.out, result.out, names)),
        ("json", result.summary, case.json is result.summary or equal(case.json, result.summary, names)),
        ("requests", requests, same_requests(case.requests, requests, names)),
        ("proxied", proxied, same_requests(case.proxied, proxied, names)),
        ("sent", sent, case.sent is None or case.sent == sent),
        ("after", found, found == after)) if not holds]
    if differ:
        pytest.fail("\n".join([*differ, repr(result)]), pytrace=False)
    if server:
        assert server.checks == [], result
        check_cover(case, argv, files, server, left, result)


def show(name, expected, actual, names):
    """What a row says and what it should, as it would be written; texts that are long as a diff too."""
    actual = [len(one.events) for one in actual] if name in ("requests", "proxied") and actual else actual
    source = repr(actual)
    for known in ("url", "host", "proxy", "refused", "tmp"):
        source = source.replace(str(names.get(known, "\0")), "{%s}" % known)
    lines = ["%s differs:" % name, "  expected %r" % (expected,), "  actual   " + source]
    if isinstance(expected, str) and isinstance(actual, str) and "\n" in expected:
        lines += [line for line in difflib.ndiff(expected.split("\n"), actual.split("\n")) if line[0] in "-+"]
    return "\n".join(lines)


def check_cover(case, argv, files, server, left, result):
    """Each record was delivered or kept, where the row says what was read and where to keep it."""
    given = [content for content in [*files.values(), case.stdin] if isinstance(content, list)]
    nothing_sent = result.code in (1, 4) and not server.requests and case.stdin is None
    if "--undelivered" not in argv or len(given) != 1 or nothing_sent:
        return
    count = collections.Counter(ndjson([one]) for one in given[0])
    count.subtract(ndjson([one]) for one in server.records)
    count.subtract(left.get(argv[argv.index("--undelivered") + 1], b"").splitlines(True))
    assert not +count, "neither delivered nor kept: %s\n%r" % (list(+count), result)
