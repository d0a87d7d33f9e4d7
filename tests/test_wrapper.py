"""A command after `--`: it runs as if it were alone, and how it ended is reported."""
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import KEY, PYTHON, Case, clean_environment, rows
from standin import Reply, StandIn
from steps import RESET_AFTER, SILENT

if os.name != "posix":
    pytest.skip("signals, descriptors and terminals are tested as POSIX has them", allow_module_level=True)
from terminal import Terminal

full = pytest.mark.full
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
WHO = ["--source-system", "shop", "--workflow-id", "wf-1", "--actor-type", "agent", "--actor-id", "a-1"]
OURS = [*WHO, "--"]
SH = [*OURS, "sh", "-c"]
LOOP = "echo ready >&2; while :; do sleep 0.02; done"
LOST = "error: could not report the result of sh: "
ANYWAY = "; running the command without reporting"

# The command writes the name of each signal that comes, none merged; it ends 0.6 s after the first USR2.
COUNT = [sys.executable, "-c", """\
import os, signal, sys
sys.argv[1:] and os.setpgid(0, 0)
numbers, seconds = {signal.SIGINT, 15, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, 14}, 20
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
os.write(2, b"ready %d\\n" % os.getpid())
while True:
    came = signal.sigtimedwait(numbers, seconds) or sys.exit(5)
    seconds = 0.6 if came.si_signo == signal.SIGUSR2 else seconds
    os.write(2, signal.Signals(came.si_signo).name.encode() + b"\\n")
"""]


def told(message, status="failed", severity="error", **metadata):
    return [{"path": "/api/ingest", "headers": {"x-packtrack-key": KEY}, "body": {
        "source": {"system": "shop"}, "workflow": {"id": "wf-1"}, "actor": {"type": "agent", "id": "a-1"},
        "message": message, "status": status, "severity": severity, "metadata": metadata}}]


def ended(line, code=0, *argv, id=None, **fields):
    """A row: a line of sh, the exit code or signal, flags of ours; the report on it."""
    name = "SIG" + code if isinstance(code, str) else None
    how = "was terminated by " + name if name else "exited with %d" % code
    requests = told("sh %s after <s>s" % how, *(() if code else ("ok", "info")), command="sh", signal=name,
                    exit_code=None if name else code)
    return Case(id or line, [*WHO, *argv, *SH[-3:], line], code=code, **{"requests": requests, **fields})


def only(server):
    assert len(server.records) == 1, server.records
    return server.records[0]


@pytest.fixture
def call(home, server, tmp_path):
    return lambda argv, env=(): subprocess.run(
        argv, env=clean_environment(home, dict(env), True, server), cwd=str(tmp_path), timeout=60,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


PROBE = r"""
d=/proc/$$
for n in 0 1 2 3 4 5 6 7 8 9 10 11 12 63; do readlink $d/fd/$n >>"$TARGET" || echo $n - >>"$TARGET"; done
exec >>"$TARGET" 2>&1; tr '\0' '\n' <$d/environ | grep -av ^_=
grep -E '^(SigIgn|Umask|Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp|Threads)' $d/status
cut -d ' ' -f 5-8,18,19 $d/stat; cat $d/limits; readlink $d/cwd; echo end; exit 3
"""


@linux
@pytest.mark.parametrize("around, env, shows", [
    ('"$@"', {}, ""),
    ("trap '' PIPE; \"$@\"", {"LC_ALL": "C", "LC_CTYPE": ""}, "\nLC_CTYPE=\n"),
    ("trap '' XFSZ TERM USR1 40; \"$@\" 9>lock 8<&0", {"LANG": "C", "LC_CTYPE": "C"}, "\nLC_CTYPE=C\n"),
    ('umask 027; ulimit -S -c 0; cd /; nice -n 3 "$@" <&-', {"LC_CTYPE": "C.UTF-8"}, "\nLC_CTYPE=C.UTF-8\n"),
    ("trap '' CHLD INT QUIT; \"$@\" >&- 2>&-", {"LC_ALL": "C", "ODD": "\udcff\n=="}, "\nODD=\udcff\n==\n"),
    ('"$@" <&- >&- 2>&-', {"LANG": "en_US.UTF-8"}, "\nLANG=en_US.UTF-8\n"),
    ('env -i TARGET="$TARGET" "$@"', {}, ""),
], ids="plain PIPE XFSZ folder CHLD no_streams empty_environment".split())
def test_as_if_alone(around, env, shows, call, argv_of, server, tmp_path):
    target, seen = tmp_path / "target", []
    for argv in (["/bin/sh", "-c", PROBE], argv_of(*OURS, "/bin/sh", "-c", PROBE)):
        call(["sh", "-c", "%s; exit $?" % around, "sh", *argv], {"TARGET": str(target), **env})
        seen.append(re.sub(r"(pipe|socket):\S+", "", target.read_bytes().decode("utf-8", "surrogateescape")))
        target.unlink()
    assert seen[0].endswith("\nend\n") and shows in seen[0] and seen[1] == seen[0]
    assert [event["metadata"]["exit_code"] for event in server.records] == [3] * ("env -i" not in around)


@linux
def test_blocked_signals(run, server):
    result = run(*OURS, "grep", "^Sig[BI]", "/proc/self/status", server=server, preexec_fn=lambda: [
        signal.pthread_sigmask(signal.SIG_BLOCK, {10, 15}), signal.signal(signal.SIGCHLD, signal.SIG_IGN)])
    masks = [int(line.split()[1], 16) & 0x7fffffff for line in result.out.splitlines()]  # not the C library's
    assert masks == [0x4200, 0x10000], result


@linux
def test_dies_of_a_blocked_signal(run):
    code = "import os, signal; signal.pthread_sigmask(signal.SIG_UNBLOCK, [15]); os.kill(os.getpid(), 15)"
    run(*OURS, sys.executable, "-c", code, key=False, server=None, allow_codes=[-15],
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {15}))


@linux
def test_pending_signal(run, server):
    """What came before the command ran is passed on to it."""
    def pend():
        signal.pthread_sigmask(signal.SIG_BLOCK, {10})
        os.kill(os.getpid(), 10)

    result = run(*OURS, sys.executable, "-c", "import signal; print(+signal.sigwait([10]))", server=server,
                 preexec_fn=pend)
    assert (result.out, result.err, len(server.records)) == ("10\n", "", 1)


test_streams = rows(
    Case("standard input and output", [*SH, "cat; echo told >&2"], stdin="line\n" * 60000,
         out="line\n" * 60000, err="| told", requests=1),
    *[Case(locale, [*OURS, "printf", "%s|", "--version", "--", "-h", "", "a b", "\udcff\u00e9"], requests=1,
           env={"LC_ALL": locale}, out="--version|--|-h||a b|\ufffd\u00e9|") for locale in ("C", "C.UTF-8")],
    Case("a pipe that is closed", [*OURS, "yes"], redirect="| head -n 1", out="y\n", both_forms=True,
         requests=told("yes was terminated by SIGPIPE after <s>s", command="yes", signal="SIGPIPE")),
)


@pytest.mark.skipif(not subprocess.run([PYTHON, "-X", "importtime", "-c", ""], stderr=subprocess.PIPE).stderr,
                    reason="-X importtime came with Python 3.7")
def test_sends_late(start, server):
    process = start(*SH, "echo ready >&2; read line", server=server, env={"PACKTRACK_HEALTH_ENABLE": "1"},
                    stdin=subprocess.PIPE, python_flags=["-X", "importtime"])
    process.wait_for_err("ready")
    assert not re.search(r"\| +(urllib.request|http.client|ssl|socket)\n", process.err_text())
    assert server.connections == 0 and re.search(r"\| +http.client\n", process.result().err)
    assert (len(server.requests), len(server.records)) == (2, 1)


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock here")
@pytest.mark.parametrize("argv, end, code", [
    ([], "read x; exit 5", 5), pytest.param(["--command-timeout", "1s"], "exec sleep 20", 124, marks=full)])
def test_inherited_lock(argv, end, code, start, call, server, tmp_path):
    line = "flock 9; (until [ -e go ]; do sleep 0.02; done) >/dev/null 2>&1 & echo ready >&2; " + end
    try:  # what the command leaves behind keeps its lock, and is neither ended nor waited for
        process = start(*WHO, *argv, *SH[-3:], line, server=server, redirect="9>lock", stdin=subprocess.PIPE)
        process.wait_for_err("ready")
        assert process.result().code == code and call(["flock", "-n", "lock", "true"]).returncode == 1
    finally:
        (tmp_path / "go").write_text("")
    assert call(["flock", "lock", "true"]).returncode == 0


test_exit = rows(
    *[ended("exit %d" % code, code, both_forms=code in (0, 3)) for code in (0, 1, 3, 124, 126, 127, 255)],
    *[ended("ulimit -c 0; kill -%s $$" % name, name, id=name, both_forms=name == "TERM")
      for name in ("INT", "TERM", "HUP", "KILL", "SEGV", "QUIT", "USR1")],
)


@linux
@pytest.mark.parametrize("most", ['"$(ulimit -H -c)"', "0"])
def test_no_core(most, argv_of, home, server):
    line, argv = 'ulimit -c %s; exec "$@"' % most, argv_of(*SH, "ulimit -c 0; kill -SEGV $$")
    env = clean_environment(home, {}, True, server)
    status = os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", line, "sh", *argv], env), 0)[1]
    assert (os.WTERMSIG(status), os.WCOREDUMP(status)) == (signal.SIGSEGV, False)


@linux
@pytest.mark.parametrize("name, code", [("TERM", 143), ("KILL", 137)])
def test_pid_1(name, code, argv_of, call, server):
    unshare = ["unshare", "-pf", "--kill-child"]
    if os.geteuid() or not shutil.which("unshare") or call([*unshare, "true"]).returncode:
        pytest.skip("no PID namespaces here")
    assert call([*unshare, *argv_of(*SH, "kill -%s $$" % name)]).returncode == code
    assert only(server)["metadata"]["signal"] == "SIG" + name


def test_event(run, server, tmp_path):
    path, before = tmp_path / "backup.sh", time.time()
    path.write_text("#!/bin/sh\nsleep 0.3\nexit 3\n")
    path.chmod(0o755)
    result = run(*WHO, "-v", "--", path, "-pwd=hunter2", env={"PASSWORD": "correct-horse"}, server=server)
    assert result.code == 3
    assert re.fullmatch(r"packtrack-logger: record 1: \d+ bytes to %s\n"
                        r"packtrack-logger: attempt 1/4: HTTP 200 \(\d+ ms\)\n" % server.url, result.err)
    for secret in ("hunter2", "correct-horse", KEY, str(tmp_path)):
        assert secret not in server.requests[0].body.decode()
    event = only(server)
    metadata, stamp, message = event.pop("metadata"), event.pop("timestamp"), event.pop("message")
    duration, start = metadata.pop("duration_ms"), metadata.pop("started_at")
    assert metadata == {"command": "backup.sh", "exit_code": 3, "host": os.uname().nodename}
    assert type(duration) is int and 300 <= duration <= (time.time() - before) * 1000
    assert re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z){2}", start + stamp) and start < stamp
    assert message in ["backup.sh exited with 3 after %.1fs" % (ms / 1000) for ms in (duration, duration + 1)]
    assert event == {"source": {"system": "shop"}, "workflow": {"id": "wf-1"}, "severity": "error",
                     "status": "failed", "actor": {"type": "agent", "id": "a-1"}}


EVENT = '{"timestamp":"<time>",<...>,"started_at":"<time>","host":"<...>","exit_code":4}}\n'
SITE = {"PYTHONPATH": "{tmp}/site", "PYTHONDONTWRITEBYTECODE": "1"}
LACKS = {
    "room for one process": "import os\nforks = iter([os.fork, lambda: os.open('', 0), os.fork])\n"
                            "os.fork = lambda: next(forks)()\n",
    "no cat": "import os\nexecve = os.execve\nos.execve = lambda path, *more: (\n"
              "    os._exit(1) if path == '/bin/cat' else execve(path, *more))\n"}
test_report = rows(
    *[ended("exit 5", 5, id=id, env=SITE, files={"site/sitecustomize.py": LACKS[id]}) for id in LACKS],
    ended("exit 1", 1, id="variables of other uses", env={"PACKTRACK_" + name: value for value, names in [
        ("ok", "STATUS MESSAGE FILE"), ("x", "SEVERITY"), ("1", "NDJSON JSON HEALTH ASYNC NO_FLUSH")]
        for name in names.split()}),
    ended("exit 1", 1, "--metadata", '{"team":"data","exit_code":0}', "--meta", "region=eu", "--message",
          "-skipped-", id="flags", requests=told("-skipped-", team="data", region="eu", exit_code=1)),
    ended("exit 1", 1, "--backoff-initial", "1ms", id="attempts", requests=3, script=[503, RESET_AFTER]),
    ended("sleep 1.5; exit 2", 2, "--deadline", "1s", id="--deadline is the report's", full=True),
    ended("exit 4", 4, "--output", "/dev/stdout", id="--output", key=False, requests=0, out=EVENT),
)

NO_FILE, DENIED = "no such file or directory", "permission denied"
test_cannot_run = rows(
    *[Case(shown, [*OURS, name, "--full"], code=code, both_forms=base == "no-such",
           err="error: cannot run %s: %s" % (shown, why), requests=told(
               "%s could not be run: %s after 0.0s" % (base, why), command=base, exit_code=code, signal=None))
      for name, shown, base, code, why in (
          ("no-such", "no-such", "no-such", 127, NO_FILE), ("", "''", "''", 127, NO_FILE),
          ("/etc/passwd/x", "/etc/passwd/x", "x", 127, NO_FILE),
          ("./job-\udcff", "./job-\ufffd", "job-\ufffd", 127, NO_FILE),
          ("/dev", "/dev", "dev", 126, DENIED), ("/etc/passwd", "/etc/passwd", "passwd", 126, DENIED))],
)


def test_search(call, run, server, tmp_path):
    for path, mode in ("a.sh", 0o755), ("second/a.sh", 0o755), ("first/a.sh", 0o644), ("first/only", 0o644):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("echo %s $0 $1; exit 4\n" % path)  # without a first line
        (tmp_path / path).chmod(mode)
    paths = ["", ".", "first:second", "first::second", "none:/etc/passwd:second", "first:", "first",
             str(tmp_path / "second"), ":second", "x" * 300 + ":second"]
    for name, path in [("only", "first:second"), ("ls", None), ("ls", ""), *[("a.sh", one) for one in paths]]:
        alone = call(["/usr/bin/env", *(["-u", "PATH"] if path is None else ["PATH=" + path]), name, "word"])
        result = run(*OURS, name, "word", server=server, env={"PATH": path})
        assert (result.code, result.out_bytes) == (alone.returncode, alone.stdout), (name, path, result)
        assert server.records[-1]["metadata"]["exit_code"] == result.code


@linux
def test_removed_folder(argv_of, call, server):
    done = call(["sh", "-c", 'mkdir x; cd x; rmdir ../x; exec "$@"', "sh", *argv_of(*OURS, "echo", "ran")])
    assert (done.returncode, done.stdout, done.stderr, len(server.records)) == (0, b"ran\n", b"", 1)


PARENT = """import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # what is left behind becomes its child
subprocess.call(sys.argv[1:])
print(open("/proc/self/task/%d/children" % os.getpid()).read())"""


@linux
@pytest.mark.parametrize("command", [["true"], ["no-such"], ["sh", "-c", "kill -TERM 0"]])
def test_leaves_no_process(command, argv_of, call):
    assert call([sys.executable, "-c", PARENT, "setsid", "-w", *argv_of(*OURS, *command)]).stdout == b"\n"


test_usage = rows(
    *[Case(argv, [*WHO, *argv.split(), "--", "touch", "ran"], code=1, err="error: " + why) for argv, why in (
        ("--status ok", "--status cannot be combined with a command, whose outcome sets it"),
        ("--severity=info", "--severity cannot be combined with a command, whose outcome sets it"),
        *[(flag, flag.replace("=", " ") + " cannot be combined with a command")
          for flag in ("--json", "--dry-run", "--output=-")])],
    Case("no command", OURS, code=1, err="error: --: a command must follow"),
)

NO_KEY = "error: no API key: set PACKTRACK_API_KEY, or use --api-key-file or --api-key" + ANYWAY
BUSY = "HTTP 503 Service Unavailable, after 1 attempt"
NO_DIR = "cannot write none/left: its directory does not exist"
test_runs_anyway = rows(
    *[Case(name, [*SH, "echo ran; exit 9"], {"PACKTRACK_" + name: text}, key=False, code=9, out="ran\n",
           err="error: PACKTRACK_" + name + why + ANYWAY) for name, text, why in (
        ("API_KEY", "two\nlines", ": contains characters not allowed in a header (value not shown)"),
        ("API_KEY_FILE", "/dev/stdin", " cannot be standard input: the command reads it"),
        ("DRY_RUN", "1", " cannot be combined with a command"), ("STRICT", "x", ": must be true or false"),
        ("OUTPUT", "-", " - cannot be combined with a command"))],
    Case("the first of two", [*SH, "echo ran"], env={"PACKTRACK_GZIP": "x", "PACKTRACK_STRICT": "x"},
         out="ran\n", err="error: PACKTRACK_GZIP: must be true or false" + ANYWAY),
    *[Case(id, [*argv, *SH[-3:], "echo ran; exit 9"], key=False, code=9, out="ran\n", err=err)
      for id, argv, err in (
        ("no key", WHO, NO_KEY), ("no fields", WHO[:6], "error: missing required --actor-id "
                                                        "(or PACKTRACK_ACTOR_ID)" + ANYWAY),
        ("no file", [*WHO, "--api-key-file", "x"], LOST + "--api-key-file: cannot read x: " + NO_FILE))],
    Case("no file, kept", [*WHO, "--api-key-file", "x", "--undelivered", "/dev/null", *SH[-3:], "true"],
         err=LOST + "--api-key-file: cannot read x: " + NO_FILE + "; event kept in /dev/null", key=False),
    Case("no key, kept", [*WHO, "--undelivered", "/dev/null", *SH[-3:], "true"], key=False,
         err=LOST + NO_KEY[len("error: "):-len(ANYWAY)] + "; event kept in /dev/null"),
    Case("127", [*OURS, "x/y"], key=False, code=127, err=NO_KEY + "\nerror: cannot run x/y: " + NO_FILE),
    Case("a signal", [*SH, "kill -TERM $$"], key=False, code="TERM", err=NO_KEY),
)


def lost(id, own, code, *argv, why=BUSY, **fields):
    return Case(id, [*WHO, "--retries", "0", "--timeout", "1s", *argv, *SH[-3:], "exit %d" % own], code=code,
                **{"script": [Reply(503, body=b"")], "requests": 1, "err": LOST + why, **fields})


test_delivery_fails = rows(
    lost("0", 0, 0), lost("7", 7, 7),
    lost("kept", 4, 4, "--undelivered", "/dev/stdout", out=EVENT, why=BUSY + "; event kept in /dev/stdout"),
    lost("not saved", 7, 7, "--undelivered", "/dev/full", marks=[linux],
         why=BUSY + "; event could not be saved to /dev/full: no space left on device"),
    *[lost("nowhere, " + flag, 9, 9, flag, "none/left", requests=0, why=flag + ": " + NO_DIR)
      for flag in ("--undelivered", "--output")],
    *[lost(redirect, 9, 9, redirect=redirect, marks=[linux], err="" if "2" in redirect else LOST + BUSY)
      for redirect in ("2>&-", "2>/dev/full", "<&- >&- 2>&-", ">&-")],
    lost("--deadline", 9, 9, "--deadline", "1s", "--timeout", "1m", script=[SILENT], why="deadline exceeded"),
)
test_strict = rows(
    lost("retries exhausted", 0, 3, "--strict"), lost("the command's own", 9, 9, "--strict"),
    lost("refused", 0, 2, "--strict", script=[Reply(400, body=b"")], why="HTTP 400 Bad Request"),
    ended("exit 0", 0, "--strict", id="delivered"),
    Case("no key", [*WHO, "--strict", "--", "true"], key=False, code=1, err=NO_KEY),
    lost("file", 0, 1, "--strict", "--undelivered", "none/left", requests=0, why="--undelivered: " + NO_DIR),
    lost("--no-strict", 0, 0, "--no-strict", env={"PACKTRACK_STRICT": "1"}),
)

test_command_timeout = rows(*[
    Case(id, [*WHO, "--command-timeout", limit, *SH[-3:], line], code=124, requests=told(
        "sh timed out after <s>s", "timeout", command="sh", **metadata)) for id, limit, line, metadata in (
            ("TERM", "300ms", "exec sleep 20", {"signal": "SIGTERM", "exit_code": None}),
            ("stopped", "500ms", "kill -STOP $$", {"signal": "SIGTERM"}),
            ("ends well", "1s", "trap 'exit 0' TERM; while :; do sleep 0.02; done", {}))],
    ended("exit 3", 3, "--command-timeout", "20s"),
)


@full
def test_durations(start):
    with StandIn(default=SILENT) as silent, StandIn(script=[SILENT]) as stalled, StandIn() as server:
        slow = start(*WHO, "--timeout", "1m", *SH[-3:], "exit 1", server=silent)
        killed = start(*WHO, "--command-timeout", "300ms", *SH[-3:], "trap '' TERM; " + LOOP, server=server)
        hurried = start(*WHO, "--undelivered", "/dev/stdout", *SH[-3:], "exit 4", server=stalled)
        stalled.wait_for_requests(1)
        began = time.monotonic()
        hurried.send_signal(signal.SIGTERM)
        assert hurried.result().code == 4 and hurried.result().out.endswith('"exit_code":4}}\n')
        assert 4.9 <= time.monotonic() - began < 20
        assert killed.result().code == 124 and only(server)["metadata"]["signal"] == "SIGKILL"
        assert 5300 <= only(server)["metadata"]["duration_ms"] < 20000
        assert slow.result(60).code == 1 and 30 <= slow.result().seconds < 45
        late = "packtrack-logger: %sdeadline exceeded%%s\n" % LOST
        assert slow.result().err == late % "" and hurried.result().err == late % "; event kept in /dev/stdout"


test_passed_on = rows(
    *[ended("ulimit -c 0; echo ready >&2; exec sleep 20", name, id=name, kill=(name, "ready"), err="| ready")
      for name in ("INT", "TERM", "HUP", "QUIT", "USR1")],
    ended("trap 'exit 7' TERM; " + LOOP, 7, kill=("TERM", "ready"), err="| ready", id="trapped"),
    *[ended("exit 3", 3, id=text + " late", kill=[(name, 1) for name in text.split()],
            script=[Reply(delay=1)]) for text in ("TERM", "INT HUP TERM TERM")],
)


@linux
@pytest.mark.parametrize("group, closed", [
    (False, []), (True, []), (True, [1]), *[pytest.param(True, [], marks=full)] * 9])
def test_signals(group, closed, start, server):
    process = start(*OURS, *COUNT, server=server, start_new_session=True,
                    preexec_fn=lambda: [os.close(descriptor) for descriptor in closed])
    process.wait_for_err("\n")
    came = process.err_text()
    for name in "INT TERM HUP QUIT USR1 ALRM TERM TERM INT USR2".split():
        (os.killpg if group else os.kill)(process.pid, getattr(signal, "SIG" + name))
        came += "SIG%s\n" % name
        process.wait_for_err(came)
    assert (process.result().code, process.err_text(), only(server)["metadata"]["exit_code"]) == (5, came, 5)


def test_ignored_signals(start, server):
    ignored = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGCHLD]
    process = start(*SH, "echo $$ ready >&2; read line; exit 5", server=server, stdin=subprocess.PIPE,
                    preexec_fn=lambda: [signal.signal(number, signal.SIG_IGN) for number in ignored])
    process.wait_for_err("ready")
    for number in ignored:
        process.send_signal(number)
        os.kill(int(process.err_text().split()[0]), number)
    assert (process.result().code, only(server)["metadata"]["exit_code"]) == (5, 5)


@linux
def test_none_is_blocked_while_it_reports(start):
    with StandIn([SILENT]) as server:
        process = start(*SH, "exit 3", server=server)
        server.wait_for_requests(1)
        with open("/proc/%d/status" % process.pid) as status:
            assert int(status.read().split("SigBlk:")[1].split()[0], 16) == 0


@full
def test_at_any_moment(start, server):
    for moment in range(40):
        process = start(*SH, "echo ran; sleep 0.02; exit 3", server=server)
        time.sleep(0.005 * moment)  # a moment, not a wait: any is right
        process.send_signal(signal.SIGTERM)
        result = process.result()
        early = result.code == -signal.SIGTERM and not result.out  # Python had not started
        assert early or result.code in (3, -signal.SIGTERM) and len(server.records) == 1, result
        assert result.err == ""
        server.renew()


@pytest.mark.skipif(not shutil.which("timeout"), reason="no timeout here")
@pytest.mark.parametrize("times", [3, pytest.param(40, marks=full)])
def test_under_timeout(times, run, call, argv_of, server):
    limit = max(0.3, 4 * run(*OURS, "true", server=server).seconds)
    for _ in range(times):
        assert call(["timeout", str(limit), *argv_of(*OURS, "sleep", "20")]).returncode == 124
    assert [event["metadata"].get("signal") for event in server.records] == [None] + ["SIGTERM"] * times


@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_setuid(start, server):
    # The wrapper, as root that lacks CAP_KILL, may not signal the command, which becomes another user's.
    command = "import os; os.setuid(65534); os.write(2, b'ready'); os.read(0, 1); os._exit(5)"
    process = start(*WHO, "--command-timeout", "1s", "--", sys.executable, "-c", command, server=server,
                    stdin=subprocess.PIPE, preexec_fn=lambda: ctypes.CDLL(None).prctl(24, 5, 0, 0, 0))
    process.wait_for_err("ready")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)  # past the limit
    assert process.popen.poll() is None
    assert (process.result().code, process.result().err, only(server)["status"]) == (124, "ready", "timeout")


@pytest.fixture
def terminal(argv_of, home, server, tmp_path):
    made = []

    def begin(mode, *words, around=()):
        env = clean_environment(home, {"TERM": "dumb"}, True, server)
        made.append(Terminal(mode, [*around, *argv_of(*OURS, *words)], env, tmp_path))
        made[-1].wait_for(b"ready")
        return made[-1]
    yield begin
    for one in made:
        one.close()
        one.control.close()


@linux
@pytest.mark.parametrize("mode, more", [("job", []), ("leader", []), ("job", ["setpgid"])])
def test_keys(mode, more, terminal, server):
    one = terminal(mode, *COUNT, *more)
    one.wait_for(b"\r\n")
    for key, name in [(b"\x03", b"SIGINT"), (b"\x1c", b"SIGQUIT"), (b"\x03", b"SIGINT")]:
        seen = len(one.output)
        one.type(key)
        one.wait_for(name, seen)
    os.kill(int(one.output.split()[1]), signal.SIGUSR2)
    assert (one.code(), only(server)["metadata"]["exit_code"]) == (5, 5)
    assert re.findall(rb"SIG\w+", one.output) == [b"SIGINT", b"SIGQUIT", b"SIGINT", b"SIGUSR2"]


def test_stop_and_continue(terminal, server):
    one = terminal("job", *SH[-2:], "test -t 0 && test -t 1 && test -t 2 && echo ready && read line; exit 5")
    one.type(b"\x1a")
    assert one.told() == ["stopped"]
    one.control.send(b"c")
    one.type(b"\n")
    assert (one.told(), only(server)["metadata"]["exit_code"]) == (["exited", "5"], 5)
    assert one.last_screen() == "ready\n^Z\n"


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_shell_loop(terminal, server):
    around = ["bash", "-c", 'for n in 1 2 3; do "$@"; echo next; done; echo end', "bash"]
    one = terminal("leader", "sh", "-c", "echo ready; exec sleep 20", around=around)
    one.type(b"\x03")
    assert (one.code(), one.last_screen()) == (-signal.SIGINT, "ready\n^C\n")
    assert only(server)["metadata"]["signal"] == "SIGINT"


def test_hang_up(terminal, server):
    one = terminal("leader", *SH[-2:], "trap 'exit 7' HUP; echo ready; while :; do sleep 0.02; done")
    one.hang_up()  # the kernel tells only the leader of the session
    assert (one.code(), only(server)["metadata"]["exit_code"]) == (7, 7)
