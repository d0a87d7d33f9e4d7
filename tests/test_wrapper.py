"""A command after `--`: it runs as if nobody stood before it, and how it ended is reported."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from conftest import KEY, PYTHON
from standin import RESET_AFTER, SILENT, RefusedPort, Reply, StandIn
from terminal import Terminal

if os.name != "posix":
    pytest.skip("signals, descriptors and terminals are tested as POSIX has them", allow_module_level=True)

WHO = ["--source-system", "cron", "--workflow-id", "nightly", "--actor-type", "job", "--actor-id", "backup"]
ONCE = ["--retries", "0", "--timeout", "2s"]
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
COUNTS_SIGNALS = pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="no sigtimedwait here")

# Counts how often a signal arrives, none merged: counter.py NAME EXIT_CODE SECONDS [setpgid]
# Ends when none came for SECONDS after the first.
COUNTER = """\
import os, signal, sys
number = getattr(signal, sys.argv[1])
if "setpgid" in sys.argv:
    os.setpgid(0, 0)
signal.pthread_sigmask(signal.SIG_BLOCK, {number})
with open("ready.new", "w") as file:
    file.write(str(os.getpid()))
os.rename("ready.new", "ready")
count = 0
while signal.sigtimedwait({number}, float(sys.argv[3]) if count else 20) is not None:
    count += 1
    with open("count.new", "w") as file:
        file.write(str(count))
    os.rename("count.new", "count")
sys.exit(int(sys.argv[2]))
"""

# Says that it runs, then waits for the file "go"; then exits with argv[1].
WAITER = """\
import os, sys, time
with open("ready.new", "w") as file:
    file.write(str(os.getpid()))
os.rename("ready.new", "ready")
end = time.monotonic() + 20
while not os.path.exists("go") and time.monotonic() < end:
    time.sleep(0.005)
sys.exit(int(sys.argv[1]) if os.path.exists("go") else 99)
"""


def wait_for(condition, what, timeout=15):
    """Block until condition() is true."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited for %s" % what
        time.sleep(0.005)


def wait_for_file(path, timeout=15):
    """Block until the file is there; its text."""
    wait_for(path.exists, path, timeout)
    return path.read_text()


def is_running(pid):
    """Whether the process is there, and no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def command(tmp_path):
    """command("counter", ...) -> words that run one of the scripts above."""
    scripts = {"counter": COUNTER, "waiter": WAITER}

    def words(name, *argv):
        path = tmp_path / (name + ".py")
        path.write_text(scripts[name])
        return [sys.executable, str(path), *map(str, argv)]

    return words


def script(folder, text, name="backup.sh"):
    """An executable shell script."""
    path = folder / name
    path.write_text("#!/bin/sh\n" + text + "\n")
    path.chmod(0o755)
    return str(path)


def only_event(server):
    """The one event that the server has."""
    assert len(server.requests) == 1
    assert len(server.records) == 1
    return server.records[0]


def one_line(result):
    """Standard error is one line of the program's."""
    assert result.err.count("\n") == 1, result
    assert result.err.startswith("packtrack-logger: "), result
    return result.err


# ---- how the command ended -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, code, key, values",
    [
        ("exit 0", 0, "exit_code", (0,)),
        ("exit 1", 1, "exit_code", (1,)),
        ("exit 3", 3, "exit_code", (3,)),
        ("exit 126", 126, "exit_code", (126,)),
        ("exit 127", 127, "exit_code", (127,)),
        ("exit 137", 137, "exit_code", (137,)),
        ("exit 143", 143, "exit_code", (143,)),
        ("exit 255", 255, "exit_code", (255,)),
        ("kill -KILL $$", 137, "signal", (9, "KILL", "SIGKILL")),
        ("kill -TERM $$", 143, "signal", (15, "TERM", "SIGTERM")),
        ("kill -INT $$", 130, "signal", (2, "INT", "SIGINT")),
        ("kill -USR1 $$", 128 + signal.SIGUSR1, "signal", (int(signal.SIGUSR1), "USR1", "SIGUSR1")),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_the_exit_code_is_the_commands_own_and_the_event_tells_it(
    text, code, key, values, run, server, tmp_path
):
    result = run(*WHO, "--", script(tmp_path, text), server=server)
    assert (result.code, result.out, result.err) == (code, "", "")
    event = only_event(server)
    assert event["status"] == ("ok" if code == 0 else "failed")
    assert event["severity"] == ("info" if code == 0 else "error")
    assert event["message"].startswith("backup.sh ")
    assert re.search(r"\d(\.\d+)?m?s$", event["message"])
    assert str(values[0]) in event["message"] or str(values[-1]) in event["message"]
    metadata = event["metadata"]
    assert "backup.sh" in metadata.values()
    assert metadata[key] in values
    assert ("signal" in metadata) is (key == "signal")
    assert 0 <= metadata["duration_ms"] < 30000
    assert re.match(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)$", metadata["started_at"])
    assert metadata["host"] == socket.gethostname()
    assert event["source"] == {"system": "cron"}
    assert event["workflow"] == {"id": "nightly"}
    assert event["actor"] == {"type": "job", "id": "backup"}


def test_the_message_reads_as_a_sentence(run, server, tmp_path):
    run(*WHO, "--", script(tmp_path, "exit 3"), server=server)
    assert re.match(r"^backup\.sh exited with 3 after \d+(\.\d+)?(ms|s)$", only_event(server)["message"])


def test_a_command_that_is_not_there_is_127_and_reported_as_failed(run, server):
    result = run(*WHO, "--", "no-such-command-here", "--full", server=server)
    assert result.code == 127
    assert "no-such-command-here" in one_line(result)
    event = only_event(server)
    assert (event["status"], event["severity"]) == ("failed", "error")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_command_that_is_not_executable_is_126_and_reported_as_failed(kind, run, server, tmp_path):
    path = tmp_path / "plain"
    if kind == "file":
        path.write_text("#!/bin/sh\n")
        path.chmod(0o644)
    else:
        path.mkdir()
    result = run(*WHO, "--", path, server=server)
    assert result.code == 126
    assert "plain" in one_line(result)
    event = only_event(server)
    assert (event["status"], event["severity"]) == ("failed", "error")


def test_arguments_and_environment_are_not_sent(run, server, tmp_path):
    result = run(
        *WHO,
        "--",
        script(tmp_path, "exit 0"),
        "--password=hunter2",
        server=server,
        env={"DATABASE_PASSWORD": "correct-horse"},
    )
    assert result.code == 0
    for secret in (b"hunter2", b"correct-horse", KEY.encode("ascii"), str(tmp_path).encode("ascii")):
        assert secret not in server.requests[0].body


def test_the_event_has_the_duration_and_the_time_of_the_start(run, server, tmp_path):
    before = time.time()
    run(*WHO, "--", script(tmp_path, "sleep 0.3"), server=server)
    event = only_event(server)
    assert 300 <= event["metadata"]["duration_ms"] < (time.time() - before) * 1000
    assert event["metadata"]["started_at"] < event["timestamp"]


@pytest.mark.parametrize("name, value", [("status", "ok"), ("severity", "debug"), ("message", "all is well")])
def test_what_is_left_over_in_the_environment_does_not_hide_a_failure(name, value, run, server, tmp_path):
    result = run(
        *WHO, "--", script(tmp_path, "exit 1"), server=server, env={"PACKTRACK_" + name.upper(): value}
    )
    assert result.code == 1
    event = only_event(server)
    assert (event["status"], event["severity"]) == ("failed", "error")
    assert event["message"].startswith("backup.sh exited with 1")


def test_status_severity_and_message_of_the_command_line_are_used(run, server, tmp_path):
    result = run(
        *WHO,
        "--status",
        "skipped",
        "--severity",
        "warn",
        "--message",
        "-skipped-",
        "--",
        script(tmp_path, "exit 1"),
        server=server,
    )
    assert result.code == 1
    event = only_event(server)
    assert (event["status"], event["severity"], event["message"]) == ("skipped", "warn", "-skipped-")


def test_metadata_of_the_command_line_is_kept_beside_that_of_the_command(run, server, tmp_path):
    run(
        *WHO,
        "--metadata",
        '{"team": "data"}',
        "--run-id",
        "r-7",
        "--",
        script(tmp_path, "exit 0"),
        server=server,
    )
    event = only_event(server)
    assert event["metadata"]["team"] == "data"
    assert event["metadata"]["exit_code"] == 0
    assert event["workflow"]["run_id"] == "r-7"


# ---- what the command is given ---------------------------------------------------------------------------


def test_the_command_reads_standard_input_to_its_end_and_writes_to_the_same_streams(run, server):
    data = os.urandom(300000)
    result = run(*WHO, "--", "sh", "-c", "cat; echo to stderr >&2", stdin=data, server=server)
    assert result.code == 0
    assert result.out_bytes == data
    assert result.err == "to stderr\n"
    only_event(server)


def test_everything_after_the_dashes_is_the_commands(run, server):
    result = run(*WHO, "--", "printf", "%s|", "--version", "--", "--no-such-flag", "-h", "", server=server)
    assert result.code == 0
    assert result.out == "--version|--|--no-such-flag|-h||"
    only_event(server)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_arguments_that_are_not_text_reach_the_command_unchanged(locale, run, server):
    odd = b"\xff\xfe\xc3\xa9 \x80"
    result = run(*WHO, "--", "printf", "%s", os.fsdecode(odd), server=server, env={"LC_ALL": locale})
    assert result.code == 0
    assert result.out_bytes == odd
    only_event(server)


def test_a_name_that_is_not_text_is_reported_in_valid_json(run, server, tmp_path):
    path = os.path.join(os.fsencode(str(tmp_path)), b"job-\xff.sh")
    try:
        with open(path, "wb") as file:
            file.write(b"#!/bin/sh\nexit 4\n")
    except OSError:
        pytest.skip("no such names on this file system")
    os.chmod(path, 0o755)
    result = run(*WHO, "--", os.fsdecode(path), server=server, env={"LC_ALL": "C"})
    assert result.code == 4
    assert only_event(server)["message"].startswith("job-")


@pytest.fixture
def surroundings(server, home):
    """The environment of a program that a test starts itself."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": home,
        "PACKTRACK_API_KEY": KEY,
        "PACKTRACK_BASE_URL": server.url,
    }


@pytest.fixture
def alike(argv_of, surroundings, tmp_path):
    """alike(shell, around): what the shell command prints is the same directly and behind the program.

    around: a shell line in which "$@" is the command.
    """

    def compare(shell, around='"$@"'):
        target = tmp_path / "printed"
        env = {**surroundings, "LC_ALL": "C.UTF-8", "TARGET": str(target)}
        inner = ["sh", "-c", '{ %s; } 2>/dev/null >"$TARGET"' % shell]
        texts = []
        for words in (inner, argv_of(*WHO, "--", *inner)):
            subprocess.run(
                ["sh", "-c", around, "sh", *words],
                env=env,
                cwd=str(tmp_path),
                timeout=30,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            texts.append(target.read_text())
            target.unlink()
        assert texts[0] != ""
        assert texts[1] == texts[0]
        return texts[0]

    return compare


def test_environment_folder_and_umask_are_the_commands_too(alike):
    text = alike('env | grep -v "^_=" | sort; pwd; umask', 'cd /tmp; umask 027; EXTRA="a b" "$@"')
    assert "EXTRA=a b" in text
    assert text.endswith("/tmp\n0027\n")


@LINUX
@pytest.mark.parametrize(
    "around",
    [
        '"$@"',
        "trap '' HUP; \"$@\"",
        "trap '' INT QUIT; \"$@\"",
        "trap '' TERM USR1; \"$@\"",
    ],
    ids=["none", "HUP", "INT_QUIT", "TERM_USR1"],
)
def test_ignored_and_blocked_signals_are_as_they_were(around, alike):
    text = alike("grep -E '^Sig(Blk|Ign)' /proc/self/status", around)
    assert text.count("\n") == 2


@LINUX
@pytest.mark.parametrize(
    "around",
    [
        '"$@"',
        '"$@" 9>lock 8<&0',
        '"$@" <&-',
        '"$@" >&-',
        '"$@" <&- >&- 2>&-',
    ],
    ids=["none", "8_and_9", "no_stdin", "no_stdout", "no_streams"],
)
def test_the_command_has_the_descriptors_that_were_inherited_and_no_others(around, alike):
    # The shell's own redirections are opened after its list was made: 1 and 2 are looked at last.
    alike("for n in 0 3 4 5 6 7 8 9 10 11 12; do [ -e /proc/$$/fd/$n ] && echo $n; done; echo end", around)


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock here")
def test_a_lock_on_descriptor_9_is_held_while_the_command_runs(
    argv_of, server, surroundings, tmp_path, command
):
    process = subprocess.Popen(
        [
            "sh",
            "-c",
            '( flock -n 9 || exit 77; "$@" ) 9>lock',
            "sh",
            *argv_of(*WHO, "--", *command("waiter", 5)),
        ],
        env=surroundings,
        cwd=str(tmp_path),
    )
    try:
        wait_for_file(tmp_path / "ready")
        assert subprocess.run(["flock", "-n", "lock", "true"], cwd=str(tmp_path)).returncode == 1
        (tmp_path / "go").write_text("")
        assert process.wait(20) == 5
    finally:
        process.kill()
        process.wait()
    assert subprocess.run(["flock", "-n", "lock", "true"], cwd=str(tmp_path)).returncode == 0
    assert only_event(server)["metadata"]["exit_code"] == 5


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock here")
def test_a_lock_that_a_daemon_of_the_command_inherited_outlives_the_wrapper(run, server, tmp_path):
    line = "flock 9; (until [ -e go ]; do sleep 0.02; done; echo >ended) >/dev/null 2>&1 & exit 0"
    take = ["flock", "-n", "lock", "true"]
    try:
        assert run(*WHO, "--", "sh", "-c", line, server=server, redirect="9>lock").code == 0
        assert subprocess.run(take, cwd=str(tmp_path)).returncode == 1
    finally:
        (tmp_path / "go").write_text("")
    wait_for_file(tmp_path / "ended")


def test_a_command_that_leaves_a_daemon_behind_is_not_waited_for(run, server, tmp_path):
    line = "sh -c 'echo $$ >daemon.new; mv daemon.new daemon; until [ -e go ]; do sleep 0.02; done' & exit 6"
    try:
        result = run(*WHO, "--", "sh", "-c", line, server=server)
        assert result.code == 6
        only_event(server)
        assert is_running(int(wait_for_file(tmp_path / "daemon")))
    finally:
        (tmp_path / "go").write_text("")


def test_a_command_dies_of_a_closed_pipe_as_it_would_alone(argv_of, server, surroundings, tmp_path):
    done = subprocess.run(
        ["sh", "-c", '{ "$@"; echo $? >code; } | head -n 1', "sh", *argv_of(*WHO, "--", "yes")],
        env=surroundings,
        cwd=str(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=30,
    )
    assert (done.stdout, done.stderr) == (b"y\n", b"")
    assert (tmp_path / "code").read_text() == "141\n"
    assert only_event(server)["metadata"]["signal"] in (13, "PIPE", "SIGPIPE")


def test_a_parent_that_ignores_its_children_does_not_turn_failure_into_success(
    argv_of, server, surroundings, tmp_path
):
    starter = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", starter, *argv_of(*WHO, "--", script(tmp_path, "exit 3"))],
        env=surroundings,
        cwd=str(tmp_path),
        stdin=subprocess.DEVNULL,
        timeout=30,
    )
    assert done.returncode == 3
    assert only_event(server)["status"] == "failed"


def test_the_command_is_a_child_in_the_same_process_group(start, server, tmp_path):
    process = start(
        *WHO,
        "--",
        sys.executable,
        "-c",
        "import os; print(os.getppid(), os.getpgrp(), os.getsid(0))",
        server=server,
    )
    result = process.result()
    assert result.out.split() == [str(process.pid), str(os.getpgrp()), str(os.getsid(0))]


def test_the_command_starts_before_anything_is_sent_or_imported_for_sending(start, server, tmp_path, command):
    process = start(*WHO, "--", *command("waiter", 0), server=server, env={"PACKTRACK_HEALTH_ENABLE": "true"})
    wait_for_file(tmp_path / "ready")
    assert server.connections == 0
    (tmp_path / "go").write_text("")
    assert process.result().code == 0
    assert len(server.records) == 1


def test_urllib_is_imported_after_the_command_ended(run, server):
    version = subprocess.run(
        [PYTHON, "-c", "import sys; print(sys.version_info >= (3, 7))"], stdout=subprocess.PIPE
    )
    if version.stdout.strip() != b"True":
        pytest.skip("-X importtime came with 3.7")
    result = run(
        *WHO, "--", "sh", "-c", "echo THE COMMAND >&2", server=server, python_flags=("-X", "importtime")
    )
    before, after = result.err.split("THE COMMAND")
    for module in ("urllib.request", "http.client", "ssl"):
        assert module not in before
    assert "urllib.request" in after or "http.client" in after


# ---- wrong command lines, wrong surroundings -------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--timeout", "soon"],
        ["--no-such-flag"],
        ["--severity", "loud"],
        ["--json"],
        ["--output", "-"],
        ["--dry-run"],
        ["--file", "events.json"],
        ["--stdin"],
        ["--ndjson"],
        ["--health"],
        ["stray"],
    ],
    ids="_".join,
)
def test_a_bad_command_line_is_1_and_the_command_does_not_run(words, run, server, tmp_path):
    result = run(*WHO, *words, "--", script(tmp_path, "touch ran"), server=server)
    assert result.code == 1, result
    assert result.err.startswith("packtrack-logger: ")
    assert not (tmp_path / "ran").exists()
    assert server.connections == 0


def test_dashes_without_a_command_are_1(run, server):
    result = run(*WHO, "--", server=server)
    assert result.code == 1
    assert server.connections == 0


@pytest.mark.parametrize(
    "env",
    [
        {"PACKTRACK_TIMEOUT": "soon"},
        {"PACKTRACK_SEVERITY": "loud"},
        {"PACKTRACK_DEADLINE": "-1s"},
        {"PACKTRACK_STRICT": "perhaps"},
        {"PACKTRACK_COMMAND_TIMEOUT": "never"},
        {"PACKTRACK_BASE_URL": "ftp://example.com"},
        {"PACKTRACK_METADATA": "{"},
        {"PACKTRACK_API_KEY": "two\nlines"},
        {"PACKTRACK_API_KEY": None, "PACKTRACK_API_KEY_FILE": "/nonexistent/key"},
        {"PACKTRACK_API_KEY": None},
        {"PACKTRACK_USER_AGENT": "caf\u00e9"},
        {"PACKTRACK_RETRIES": "1_0"},
    ],
    ids=lambda env: "_and_".join(env),
)
def test_what_is_wrong_in_the_environment_is_one_line_and_the_command_runs(env, run, server, tmp_path):
    result = run(*WHO, "--", script(tmp_path, "touch ran; exit 9"), server=server, env=env)
    assert result.code == 9, result
    assert (tmp_path / "ran").exists()
    if env != {"PACKTRACK_SEVERITY": "loud"}:  # which is not used with a command
        one_line(result)
    else:
        assert result.err.count("\n") <= 1


@pytest.mark.parametrize(
    "words",
    [
        ["--api-key-file", "/nonexistent/key"],
        ["--undelivered", "/nonexistent/folder/file"],
        ["--output", "/nonexistent/folder/file"],
    ],
    ids=lambda words: words[0],
)
def test_a_file_that_cannot_be_used_is_one_line_and_the_command_runs(words, run, server, tmp_path):
    result = run(*WHO, *words, "--", script(tmp_path, "touch ran; exit 9"), server=server, key=False)
    assert result.code == 9, result
    assert (tmp_path / "ran").exists()
    one_line(result)


@pytest.mark.parametrize("missing", ["--source-system", "--workflow-id", "--actor-type", "--actor-id"])
def test_a_missing_field_is_one_line_and_the_command_runs(missing, run, server, tmp_path):
    at = WHO.index(missing)
    result = run(*WHO[:at], *WHO[at + 2 :], "--", script(tmp_path, "touch ran; exit 9"), server=server)
    assert result.code == 9, result
    assert (tmp_path / "ran").exists()
    assert missing in one_line(result)
    assert server.records == []


@pytest.mark.parametrize(
    "env",
    [
        {"PACKTRACK_FILE": "events.json"},
        {"PACKTRACK_STDIN": "true"},
        {"PACKTRACK_STDIN": "true", "PACKTRACK_NDJSON": "true"},
        {"PACKTRACK_JSON": "true"},
        {"PACKTRACK_DRY_RUN": "true"},
        {"PACKTRACK_OUTPUT": "-"},
        {"PACKTRACK_HEALTH": "true"},
        {"PACKTRACK_ASYNC": "true"},
    ],
    ids=lambda env: "_and_".join(env),
)
def test_other_ways_to_use_the_program_in_the_environment_do_not_stop_the_command(env, run, server, tmp_path):
    result = run(*WHO, "--", script(tmp_path, "touch ran; exit 9"), server=server, env=env)
    assert result.code == 9, result
    assert (tmp_path / "ran").exists()
    assert result.err.count("\n") <= 1


# ---- delivery that fails ---------------------------------------------------------------------------------

FAILURES = {
    "down": (None, 3),
    "resets": ([RESET_AFTER], 3),
    "hangs": ([SILENT], 3),
    "unavailable": ([503], 3),
    "refuses": ([401], 2),
    "objects": ([400], 2),
    "too_large": ([413], 2),
}


@pytest.fixture(params=sorted(FAILURES))
def failing(request):
    """A server that takes no event, and the exit code that stands for it."""
    steps, code = FAILURES[request.param]
    if steps is None:
        with RefusedPort() as port:
            yield port, code
    else:
        with StandIn(script=steps, default=500) as server:
            yield server, code


@pytest.mark.parametrize("code", [0, 7])
def test_a_failed_delivery_is_one_line_and_never_changes_the_code(code, failing, run, tmp_path):
    server, _ = failing
    result = run(
        *WHO, "--retries", "0", "--timeout", "500ms", "--", script(tmp_path, "exit %d" % code), server=server
    )
    assert result.code == code
    one_line(result)
    assert result.out == ""


def test_with_strict_a_failed_delivery_is_the_code_of_a_command_that_succeeded(failing, run, tmp_path):
    server, verdict = failing
    result = run(
        *WHO,
        "--retries",
        "0",
        "--timeout",
        "500ms",
        "--strict",
        "--",
        script(tmp_path, "exit 0"),
        server=server,
    )
    assert result.code == verdict
    one_line(result)


def test_with_strict_a_command_that_failed_keeps_its_own_code(failing, run, tmp_path):
    server, _ = failing
    result = run(
        *WHO,
        "--retries",
        "0",
        "--timeout",
        "500ms",
        "--strict",
        "--",
        script(tmp_path, "exit 9"),
        server=server,
    )
    assert result.code == 9


def test_with_strict_a_missing_key_is_1_and_the_command_runs(run, server, tmp_path):
    result = run(*WHO, "--strict", "--", script(tmp_path, "touch ran"), server=server, key=False)
    assert result.code == 1
    assert (tmp_path / "ran").exists()
    one_line(result)


def test_with_strict_a_delivered_event_leaves_0(run, server, tmp_path):
    assert run(*WHO, "--strict", "--", script(tmp_path, "exit 0"), server=server).code == 0
    only_event(server)


def test_a_failed_try_is_repeated(run, tmp_path):
    with StandIn(script=[503, RESET_AFTER]) as server:
        result = run(*WHO, "--backoff-initial", "1ms", "--", script(tmp_path, "exit 4"), server=server)
        assert (result.code, result.err) == (4, "")
        assert len(server.records) == 1


def test_an_event_that_was_not_delivered_is_kept_where_asked(run, tmp_path):
    with RefusedPort() as server:
        result = run(
            *WHO, *ONCE, "--undelivered", "kept.ndjson", "--", script(tmp_path, "exit 4"), server=server
        )
    assert result.code == 4
    lines = (tmp_path / "kept.ndjson").read_text().splitlines()
    assert [json.loads(line)["metadata"]["exit_code"] for line in lines] == [4]
    with StandIn() as server:
        again = run("--file", "kept.ndjson", "--ndjson", server=server)
        assert again.code == 0
        assert server.records[0]["message"].startswith("backup.sh exited with 4")


def test_on_a_host_with_no_way_out_the_event_goes_to_a_file(run, tmp_path):
    result = run(*WHO, "--output", "events.ndjson", "--", script(tmp_path, "exit 4"), key=False)
    assert (result.code, result.err) == (4, "")
    assert json.loads((tmp_path / "events.ndjson").read_text())["metadata"]["exit_code"] == 4


@pytest.mark.parametrize("redirect", ["2>&-", ">&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_the_code_is_the_commands_own_where_nothing_can_be_said(redirect, run, tmp_path):
    if "/dev/full" in redirect and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with RefusedPort() as server:
        result = run(*WHO, *ONCE, "--", script(tmp_path, "exit 9"), server=server, redirect=redirect)
    assert result.code == 9


def test_a_server_that_never_answers_delays_the_end_by_the_deadline_and_not_the_start(
    start, tmp_path, command
):
    with StandIn(default=SILENT) as server:
        process = start(*WHO, "--deadline", "1s", "--", *command("waiter", 5), server=server)
        wait_for_file(tmp_path / "ready")
        (tmp_path / "go").write_text("")
        began = time.monotonic()
        assert process.result().code == 5
        assert time.monotonic() - began < 2 + 1  # a second for the two interpreters to end
        assert server.records == []


@pytest.mark.full
def test_without_a_deadline_a_server_that_never_answers_delays_the_end_by_30_s(start, tmp_path, command):
    with StandIn(default=SILENT) as server:
        process = start(*WHO, "--", *command("waiter", 5), server=server)
        wait_for_file(tmp_path / "ready")
        (tmp_path / "go").write_text("")
        began = time.monotonic()
        result = process.result(timeout=60)
        assert result.code == 5
        assert time.monotonic() - began < 31
        one_line(result)


def test_the_deadline_is_that_of_the_delivery_and_not_of_the_command(run, server, tmp_path):
    result = run(*WHO, "--deadline", "300ms", "--", script(tmp_path, "sleep 0.6; exit 2"), server=server)
    assert (result.code, result.err) == (2, "")
    only_event(server)


def test_verbose_tells_of_the_delivery_and_not_of_arguments(run, server, tmp_path):
    result = run(*WHO, "--verbose", "--", script(tmp_path, "exit 0"), "--password=hunter2", server=server)
    assert result.code == 0
    assert result.err != ""
    assert "hunter2" not in result.err


# ---- a limit for the command -----------------------------------------------------------------------------


def test_a_command_that_takes_too_long_is_ended_with_124_and_reported_as_timeout(run, server):
    result = run(*WHO, "--command-timeout", "200ms", "--", "sleep", "20", server=server)
    assert result.code == 124
    assert result.seconds < 5
    event = only_event(server)
    assert (event["status"], event["severity"]) == ("timeout", "error")
    assert 200 <= event["metadata"]["duration_ms"] < 5000


def test_a_command_that_ends_well_after_the_TERM_of_its_limit_is_still_124(run, server, tmp_path):
    text = "trap 'exit 0' TERM; touch ready; while :; do sleep 0.01; done"
    result = run(*WHO, "--command-timeout", "500ms", "--", script(tmp_path, text), server=server)
    assert result.code == 124
    assert only_event(server)["status"] == "timeout"


def test_a_command_that_ignores_TERM_is_killed_5_s_after_its_limit(run, server, tmp_path):
    text = "trap '' TERM; while :; do sleep 0.05; done"
    result = run(*WHO, "--command-timeout", "300ms", "--", script(tmp_path, text), server=server)
    assert result.code == 124
    assert 5.3 <= result.seconds < 8
    assert only_event(server)["status"] == "timeout"


def test_the_limit_ends_the_command_and_not_its_descendants(run, server, tmp_path):
    text = (
        "sh -c 'echo $$ >child.new; mv child.new child; until [ -e go ]; do sleep 0.02; done' &\n"
        "until [ -e child ]; do sleep 0.01; done; exec sleep 20"
    )
    try:
        result = run(*WHO, "--command-timeout", "1s", "--", script(tmp_path, text), server=server)
        assert result.code == 124
        assert is_running(int((tmp_path / "child").read_text()))
    finally:
        (tmp_path / "go").write_text("")


def test_a_command_within_its_limit_ends_as_it_would(run, server, tmp_path):
    result = run(*WHO, "--command-timeout", "20s", "--", script(tmp_path, "exit 3"), server=server)
    assert result.code == 3
    assert only_event(server)["status"] == "failed"


# ---- signals to the wrapper ------------------------------------------------------------------------------


@COUNTS_SIGNALS
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_a_signal_to_the_wrapper_reaches_the_command_once_and_its_end_is_reported(
    name, start, server, tmp_path, command
):
    seconds = 2 if name == "SIGTERM" else 0.4
    process = start(*WHO, "--", *command("counter", name, 5, seconds), server=server)
    wait_for_file(tmp_path / "ready")
    process.send_signal(getattr(signal, name))
    result = process.result()
    assert (result.code, result.err) == (5, "")
    assert (tmp_path / "count").read_text() == "1"
    assert result.seconds >= seconds
    assert only_event(server)["metadata"]["exit_code"] == 5


@COUNTS_SIGNALS
def test_a_second_signal_is_passed_on_too(start, server, tmp_path, command):
    process = start(*WHO, "--", *command("counter", "SIGTERM", 5, 1), server=server)
    wait_for_file(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    wait_for_file(tmp_path / "count")  # or the two could merge
    process.send_signal(signal.SIGTERM)
    assert process.result().code == 5
    assert (tmp_path / "count").read_text() == "2"


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129), ("SIGQUIT", 131)])
def test_a_command_that_dies_of_a_passed_signal_is_reported_as_failed(name, code, start, server, tmp_path):
    # exec: the shell would otherwise wait for its child.
    text = "ulimit -c 0; trap - HUP; echo >ready; exec sleep 20"
    process = start(*WHO, "--", script(tmp_path, text), server=server)
    wait_for_file(tmp_path / "ready")
    process.send_signal(getattr(signal, name))
    result = process.result()
    assert result.code == code
    event = only_event(server)
    assert event["status"] == "failed"
    assert event["metadata"]["signal"] in (int(getattr(signal, name)), name, name[3:])


@COUNTS_SIGNALS
@pytest.mark.skipif(shutil.which("nohup") is None, reason="no nohup here")
def test_under_nohup_a_hangup_ends_neither(argv_of, server, surroundings, tmp_path, command):
    process = subprocess.Popen(
        ["nohup", *argv_of(*WHO, "--", *command("waiter", 5))],
        env=surroundings,
        cwd=str(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        pid = int(wait_for_file(tmp_path / "ready"))
        process.send_signal(signal.SIGHUP)
        os.kill(pid, signal.SIGHUP)
        (tmp_path / "go").write_text("")
        assert process.wait(20) == 5
    finally:
        process.kill()
        process.wait()
    assert only_event(server)["metadata"]["exit_code"] == 5


def test_a_wrapper_that_is_stopped_and_continued_reports_as_ever(start, server, tmp_path, command):
    process = start(*WHO, "--", *command("waiter", 5), server=server)
    wait_for_file(tmp_path / "ready")
    process.send_signal(signal.SIGSTOP)
    (tmp_path / "go").write_text("")
    process.send_signal(signal.SIGCONT)
    assert process.result().code == 5
    only_event(server)


def test_a_signal_while_the_event_is_delivered_ends_in_a_code_and_without_a_traceback(start, tmp_path):
    release = threading.Event()
    with StandIn(script=[Reply(delay=release)]) as server:
        process = start(*WHO, "--deadline", "5s", "--", script(tmp_path, "exit 0"), server=server)
        wait_for(lambda: server.connections == 1, "the delivery")
        server.wait_for_requests(1)
        process.send_signal(signal.SIGTERM)
        release.set()
        assert process.result().code in (0, 143)


def test_signals_at_any_moment_leave_the_code_of_the_command_or_of_the_signal(start, server, tmp_path):
    for moment in range(12):
        process = start(
            *WHO, "--", "sh", "-c", "echo ran >&2; sleep 0.05", server=server, allow_codes=(0, 143, -15)
        )
        time.sleep(0.02 * moment)  # a moment, not a wait: any is right
        process.send_signal(signal.SIGTERM)
        result = process.result()
        # Before Python has started, nothing can hold a signal up.
        assert result.code in (0, 143) or (result.code == -15 and "ran" not in result.err), result


# ---- on a terminal ---------------------------------------------------------------------------------------


@pytest.fixture
def terminal(argv_of, surroundings, tmp_path):
    """terminal(mode, *command): the program in front of the command, on a terminal."""
    made = []

    def begin(mode, *words):
        env = {**surroundings, "TERM": "dumb"}
        made.append(Terminal(mode, argv_of(*WHO, "--", *words), env, tmp_path))
        return made[-1]

    yield begin
    for one in made:
        one.close()


def test_the_command_has_the_terminal_itself(terminal, server, tmp_path):
    one = terminal(
        "job", "sh", "-c", "test -t 0 && test -t 1 && test -t 2 && tty >name && stty size >size; exit 5"
    )
    assert one.told() == ["exited", "5"]
    assert (tmp_path / "name").read_text().startswith("/dev/")
    assert only_event(server)["metadata"]["exit_code"] == 5
    one.close()
    assert one.output == b""


@COUNTS_SIGNALS
@pytest.mark.parametrize("mode", ["job", "leader"])
@pytest.mark.parametrize(
    "key, name", [(b"\x03", "SIGINT"), (b"\x1c", "SIGQUIT")], ids=["Ctrl-C", "Ctrl-backslash"]
)
def test_a_key_of_the_terminal_reaches_the_command_once(key, name, mode, terminal, server, tmp_path, command):
    one = terminal(mode, *command("counter", name, 5, 0.5))
    wait_for_file(tmp_path / "ready")
    one.type(key)
    assert one.code() == 5
    assert (tmp_path / "count").read_text() == "1"
    assert only_event(server)["metadata"]["exit_code"] == 5
    assert b"Traceback" not in one.output


@COUNTS_SIGNALS
def test_two_presses_of_Ctrl_C_reach_the_command_twice(terminal, server, tmp_path, command):
    one = terminal("job", *command("counter", "SIGINT", 5, 1))
    wait_for_file(tmp_path / "ready")
    one.type(b"\x03")
    wait_for_file(tmp_path / "count")  # or the two could merge
    one.type(b"\x03")
    assert one.code() == 5
    assert (tmp_path / "count").read_text() == "2"


@COUNTS_SIGNALS
def test_Ctrl_C_reaches_a_command_that_made_a_group_of_its_own(terminal, server, tmp_path, command):
    one = terminal("job", *command("counter", "SIGINT", 5, 0.5, "setpgid"))
    wait_for_file(tmp_path / "ready")
    one.type(b"\x03")
    assert one.code() == 5
    assert (tmp_path / "count").read_text() == "1"
    only_event(server)


def test_a_command_that_dies_of_Ctrl_C_is_reported_as_failed(terminal, server, tmp_path):
    one = terminal("job", "sh", "-c", "echo >ready; exec sleep 20")
    wait_for_file(tmp_path / "ready")
    one.type(b"\x03")
    assert one.told() == ["exited", "130"]
    event = only_event(server)
    assert event["status"] == "failed"
    assert event["metadata"]["signal"] in (2, "INT", "SIGINT")


def test_Ctrl_Z_stops_both_and_continuing_ends_as_ever(terminal, server, tmp_path, command):
    one = terminal("job", *command("waiter", 5))
    pid = int(wait_for_file(tmp_path / "ready"))
    one.type(b"\x1a")
    assert one.told() == ["stopped"]
    if sys.platform.startswith("linux"):
        wait_for(
            lambda: pathlib.Path("/proc/%d/stat" % pid).read_text().rsplit(")", 1)[1].split()[0] == "T",
            "the command to stop",
        )
    one.control.send(b"c")
    (tmp_path / "go").write_text("")
    assert one.told() == ["exited", "5"]
    assert only_event(server)["metadata"]["exit_code"] == 5


@COUNTS_SIGNALS
def test_a_terminal_that_goes_away_is_told_to_the_command_and_the_end_is_reported(
    terminal, server, tmp_path, command
):
    # The kernel tells the leader of the session alone.
    one = terminal("leader", *command("counter", "SIGHUP", 5, 0.4))
    wait_for_file(tmp_path / "ready")
    one.hang_up()
    assert one.code() == 5
    assert int((tmp_path / "count").read_text()) >= 1
    only_event(server)
