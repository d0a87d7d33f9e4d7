"""Hosts: odd locales, no HOME, read-only places, hostile directories, missing modules, little memory."""
import json
import os
import shutil
import subprocess
import sys

import pytest

from conftest import FLAGS, KEY, PYTHON, Result, check_result, event, events, flags, ndjson
from standin import RESET_BEFORE, Reply, StandIn

posix = pytest.mark.skipif(os.name != "posix", reason="a matter of POSIX")
MIB = 1 << 20


def delivered(result, server, records):
    assert result.code == 0, result
    assert result.err == ""
    assert server.records == records


def source(tmp_path, records):
    path = tmp_path / "events.ndjson"
    path.write_bytes(ndjson(records))
    return ["--file", str(path), "--ndjson"]


# ---- locales -----------------------------------------------------------------------------------------------

TEXT = "Gr\u00fc\u00dfe \u4e16\u754c \U0001f4e6 \u2028"
LOCALES = [{"LC_ALL": "C"}, {"LC_ALL": "POSIX"}, {"LANG": "C"}, {"PYTHONIOENCODING": "ascii"},
           {"LC_ALL": "C", "PYTHONUTF8": "0"},
           {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "utf-16"},
           {"LC_ALL": "de_DE.ISO-8859-1"}, {"LC_ALL": "no_SUCH.locale"},
           {"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"}]
locales = pytest.mark.parametrize("env", [
    pytest.param(env, id=" ".join("%s=%s" % pair for pair in env.items()),
                 marks=() if number in (0, 3, 4) else pytest.mark.full) for number,
                 env in enumerate(LOCALES)])


@posix
@locales
def test_text_of_flags_and_variables_is_utf_8(env, run, server):
    result = run(*flags(message=TEXT), server=server, env={**env, "PACKTRACK_SOURCE_ENV": TEXT})
    delivered(result, server, [event(message=TEXT, source__env=TEXT)])


@posix
@locales
def test_records_and_paths_are_not_the_locales_business(env, run, server, tmp_path):
    path, left = tmp_path / "\u00e9v\u00e9nements.ndjson", tmp_path / "rest-\u00df"
    path.write_bytes(ndjson([event(message=TEXT)]))
    delivered(run("--file", path, "--ndjson", server=server, env=env), server, [event(message=TEXT)])
    with StandIn(script=[Reply(400, body=TEXT)]) as other:
        result = run("--file", path, "--ndjson", "--undelivered", left, "--json", "--verbose", server=other,
                     env=env)
    assert result.code == 2, result
    assert left.read_bytes() == path.read_bytes()


@posix
@locales
def test_errors_about_text_outside_ascii_are_told(env, run, server):
    result = run(*flags(severity="\u00fcbel"), "--json", server=server, env=env)
    assert result.code == 1, result
    assert "--severity" in result.err
    assert "--severity" in result.error["message"] or result.error["where"] == "--severity"


# ---- homes and places --------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [None, "", "/nonexistent"], ids=["none", "empty", "missing"])
def test_no_home(value, run, server):
    delivered(run(*FLAGS, server=server, env={"HOME": value}), server, [event()])


def test_environment_that_is_empty(run, server, tmp_path):
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    result = run(*FLAGS, "--base-url", server.url, "--api-key-file", key, key=False,
                 env={"PATH": None, "HOME": None})
    delivered(result, server, [event()])


BIG = 8000  # so many records of a kilobyte are more than is kept in memory of a pipe


def big_pipe():
    return ndjson(events(BIG, metadata={"filler": "x" * 1000}))


@pytest.fixture
def run_read_only(argv_of, tmp_path):
    """run(), where each place that a temporary file could go to is read-only, the working directory too."""
    script = """
        for place in /tmp /var/tmp /usr/tmp "$1"; do
            if [ -d "$place" ] && [ ! -h "$place" ]; then
                mount --bind "$place" "$place" && mount -o remount,bind,ro "$place" || exit 99
            fi
        done
        cd "$1" && shift && exec "$@"
    """
    command = [shutil.which("unshare") or "unshare", "-m", "sh", "-c", script, "sh", str(tmp_path)]
    try:
        probe = subprocess.run([*command, "true"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL).returncode
    except OSError:
        probe = None
    if probe:
        pytest.skip("mounts of one's own are not allowed here (unshare -m)")
    if probe is None:
        pytest.skip("unshare is not installed")

    def run(*argv, server, data=b""):
        done = subprocess.run(
            [*command, *argv_of(*argv)], input=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            timeout=30,
            env={"PATH": os.environ["PATH"], "PACKTRACK_API_KEY": KEY, "PACKTRACK_BASE_URL": server.url})
        result = Result(list(argv), done.returncode, done.stdout, done.stderr, 0)
        check_result(result, list(argv), None, (), True)
        return result

    return run


@posix
def test_read_only_file_system_does_not_matter_for_a_file_or_a_small_pipe(run_read_only, server, tmp_path):
    delivered(run_read_only(*source(tmp_path, events(3)), server=server), server, events(3))
    small = run_read_only("--stdin", "--ndjson", server=server, data=ndjson(events(3)))
    delivered(small, server, events(3) * 2)


@posix
def test_read_only_file_system_refuses_a_big_pipe_and_names_async(run_read_only, server):
    result = run_read_only("--stdin", "--ndjson", "--json", server=server, data=big_pipe())
    assert result.code == 4, result
    assert "--async" in result.err
    assert result.summary["delivered"] == 0
    assert not server.requests
    result = run_read_only("--stdin", "--ndjson", "--async", "--json", server=server, data=big_pipe())
    assert result.code == 0, result
    assert len(server.records) == BIG


@posix
@pytest.mark.parametrize("flag", ["--undelivered", "--output"])
def test_read_only_file_system_refuses_what_would_be_written_there_before_anything_is_sent(
        flag, run_read_only, server, tmp_path):
    result = run_read_only(*source(tmp_path, events(3)), flag, tmp_path / "new", "--json", server=server)
    assert result.code in ((1,) if flag == "--undelivered" else (1, 4)), result
    assert "new" in result.err
    assert not server.requests


@posix
def test_disk_that_is_full_while_a_pipe_is_spooled(run, server):
    def limit():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    result = run("--stdin", "--ndjson", "--json", server=server, stdin=big_pipe(), preexec_fn=limit)
    assert result.code == 4, result
    assert "--async" in result.err
    assert not server.requests


# ---- modules -----------------------------------------------------------------------------------------------

@pytest.fixture
def hostile(tmp_path):
    """A directory whose modules leave a trace when they are imported."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in ("json", "ssl", "socket", "argparse", "re", "io", "os", "urllib", "packtrack_logger",
                 "threading",
                 "sitecustomize", "usercustomize", "encodings", "zlib", "time"):
        code = "open(%r, 'w').close()\nraise SystemExit(77)\n" % str(tmp_path / "trace")
        (folder / (name + ".py")).write_text(code)
    yield folder
    assert not (tmp_path / "trace").exists(), "a module of the directory was imported"


def test_modules_in_the_working_directory_are_not_imported(run, server, hostile):
    delivered(run(*FLAGS, server=server, cwd=hostile), server, [event()])


def test_modules_on_PYTHONPATH_are_not_imported_with_I(run, server, hostile):
    result = run(*FLAGS, server=server, cwd=hostile, python_flags=["-I"], env={"PYTHONPATH": str(hostile)})
    delivered(result, server, [event()])


def customized(tmp_path, code):
    """The environment in which the interpreter runs `code` before the program."""
    folder = tmp_path / "customized"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


NO_SSL = "import sys\nsys.modules['ssl'] = sys.modules['_ssl'] = None\n"


def test_without_ssl_http_works(run, server, tmp_path):
    delivered(run(*FLAGS, server=server, env=customized(tmp_path, NO_SSL)), server, [event()])


def test_without_ssl_https_says_what_is_missing(run, server, tmp_path):
    result = run(*FLAGS, "--json", "--base-url", "https://127.0.0.1:%d" % server.port,
                 env=customized(tmp_path, NO_SSL))
    assert result.code in (1, 2), result
    assert "ssl" in result.err
    assert result.summary["retries"] == 0


def test_without_new_threads_there_is_no_traceback(run, server, tmp_path):
    code = "import _thread\ndef start(*a, **k): raise RuntimeError(\"can't start new thread\")\n" \
        "_thread.start_new_thread = start\n_thread.start_joinable_thread = start\n"
    result = run(*FLAGS, "--json", server=server, env=customized(tmp_path, code))
    assert result.code in (0, 2, 3), result
    assert result.summary["delivered"] == len(server.records)


# ---- clocks ------------------------------------------------------------------------------------------------

CLOCK = """
import os, time
def jumping(real, factor):
    return lambda: real() + (%d if os.path.exists(%r) else 0) * factor
time.time = jumping(time.time, 1)
if hasattr(time, "time_ns"):
    time.time_ns = jumping(time.time_ns, 10 ** 9)
"""


@pytest.mark.parametrize("mode", [
    pytest.param((), id="sync"), pytest.param(("--async",), id="async", marks=pytest.mark.full)])
@pytest.mark.parametrize("jump", [
    -400 * 86400, pytest.param(3600, marks=pytest.mark.full), pytest.param(-3600, marks=pytest.mark.full),
    pytest.param(400 * 86400, marks=pytest.mark.full)])
def test_clock_that_jumps_during_a_wait_changes_nothing(jump, mode, run, tmp_path):
    flag = tmp_path / "jump"

    def busy(server, sock, request):
        flag.write_text("")
        sock.sendall(b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
        return "keep"

    with StandIn(script=[busy]) as server:
        result = run(*FLAGS, *mode, "--json", "--deadline", "20s", server=server,
                     env=customized(tmp_path, CLOCK % (jump, str(flag))))
        delivered(result, server, [event()])
        assert len(server.requests) == 2
        assert 1.0 <= server.requests[1].time - server.requests[0].time < 5.0
        assert 1.0 <= result.summary["seconds"] < 10


# ---- limits ------------------------------------------------------------------------------------------------

def address_space(size):
    """For preexec_fn: the limit that `ulimit -v` sets, in bytes."""
    def limit():
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    if not sys.platform.startswith("linux"):
        pytest.skip("the limit of the address space is a matter of Linux")
    return limit


def starts_in(limit):
    """Whether the interpreter itself gets so far as to import what sending needs."""
    modules = "import argparse, json, socket, threading, urllib.request"
    return not subprocess.run([PYTHON, "-c", modules], preexec_fn=limit, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL).returncode


@pytest.mark.parametrize("size", [512, 64])
def test_address_space_that_is_enough(size, run, server, tmp_path):
    limit = address_space(size * MIB)
    if not starts_in(limit):
        pytest.skip("this interpreter needs more than %d MiB" % size)
    delivered(run(*FLAGS, server=server, preexec_fn=limit), server, [event()])
    result = run(*source(tmp_path, events(100)), "--async", "--gzip", server=server, preexec_fn=limit)
    delivered(result, server, [event()] + events(100))


@pytest.mark.parametrize("size", [40, 32, 28, 24])
def test_little_address_space_delivers_or_says_so(size, run, server):
    limit = address_space(size * MIB)
    if not starts_in(limit):
        pytest.skip("this interpreter needs more than %d MiB" % size)
    result = run(*FLAGS, "--json", server=server, preexec_fn=limit)
    # Memory may run out between request and answer: the event may be there, and counts as undelivered.
    assert result.summary["delivered"] <= len(server.records)
    assert (result.code == 0) == (result.summary["delivered"] == 1)


@posix
def test_few_file_descriptors_are_enough(run, server, tmp_path):
    def limit():
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))

    with StandIn(script=[RESET_BEFORE] * 20) as broken:
        result = run(*FLAGS, "--retries", "20", "--backoff-initial", "1ms", "--backoff-max", "1ms",
                     server=broken,
                     preexec_fn=limit)
        delivered(result, broken, [event()])


@posix
def test_umask_0_leaves_private_files_private(run, tmp_path):
    left = tmp_path / "left"
    with StandIn(script=[400]) as server:
        result = run(*FLAGS, "--undelivered", left, server=server, preexec_fn=lambda: os.umask(0) and None)
    assert result.code == 2, result
    assert left.stat().st_mode & 0o777 == 0o600
    assert json.loads(left.read_text()) == event()
