"""The program as a process against the stand-in: arguments and environment in, requests and exit code out."""

import datetime
import gzip
import hashlib
import json
import os
import re
import stat
import subprocess
import time
from email.utils import formatdate
from typing import Any, Dict

import pytest

import standin
from conftest import FLAGS, MARK, MISSING, PYTHON, event, events, flags, ndjson
from standin import KEY, RefusedPort, Reply, StandIn

PREFIX = "packtrack-logger: error: "
FAST = {"PACKTRACK_BACKOFF_INITIAL": "1ms", "PACKTRACK_BACKOFF_MAX": "2ms"}
SECRET = "s3cr3t-va1ue"
STDIN = r"(stdin|standard input|<stdin>|/dev/stdin|-)"
NOW = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z")


def assert_fails(result, code, *words):
    """It ended with this code and one line of error that holds these words."""
    assert result.code == code, result
    assert result.err.startswith(PREFIX), result
    assert result.err.count("\n") == 1 and result.err.endswith("\n"), result
    for word in words:
        assert re.search(word, result.err), (word, result)


def assert_silent_success(result):
    """It ended with 0 and said nothing."""
    assert (result.code, result.out, result.err) == (0, "", ""), result


def sizes(server):
    """How many events each request held; None for a single object."""
    return [len(request.json) if isinstance(request.json, list) else None for request in server.requests]


def statuses(server):
    """What was answered to each request."""
    return [request.status for request in server.requests]


@pytest.fixture
def put(tmp_path):
    """Write a file into the run's directory; return its name."""

    def write(content, name="events.ndjson"):
        if not isinstance(content, bytes):
            content = ndjson(content)
        (tmp_path / name).write_bytes(content)
        return name

    return write


# ---- the examples of the requirements, as written --------------------------------------------------------

SHELL_EXAMPLE = """
packtrack-logger \\
  --api-key "$PACKTRACK_API_KEY" \\
  --base-url "$STAND_IN" \\
  --timestamp "$(date -u +%Y-%m-%dT%H:%M:%SZ)" \\
  --source-system my-service --source-env prod \\
  --workflow-id wf-123 --workflow-name "Checkout" --run-id run-1 --step-id step-1 \\
  --actor-type agent --actor-id a-42 --actor-display "cart-stepper" \\
  --severity info --status ok \\
  --message "checkout completed" \\
  --metadata '{"cart_total":123.45,"currency":"USD"}'
"""
EXAMPLE = {
    "source": {"system": "my-service", "env": "prod"},
    "workflow": {"id": "wf-123", "name": "Checkout", "run_id": "run-1", "step_id": "step-1"},
    "actor": {"type": "agent", "id": "a-42", "display_name": "cart-stepper"},
    "severity": "info",
    "status": "ok",
    "message": "checkout completed",
    "metadata": {"cart_total": 123.45, "currency": "USD"},
}


@pytest.fixture
def shell(argv_of, tmp_path, home):
    """Run a line of shell in which `packtrack-logger` is the program; (exit code, output, errors)."""
    if os.name != "posix":
        pytest.skip("a POSIX shell")
    command = tmp_path / "bin" / "packtrack-logger"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\nexec %s "$@"\n' % " ".join("'%s'" % word for word in argv_of()))
    command.chmod(0o755)

    def run_line(line, **env):
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            cwd=str(tmp_path),
            stdin=subprocess.DEVNULL,
            timeout=60,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            check=False,
            env={"PATH": "%s:%s" % (command.parent, os.environ["PATH"]), "HOME": home, **env},
        )
        assert KEY.encode("ascii") not in done.stdout + done.stderr
        return done.returncode, done.stdout, done.stderr

    return run_line


@pytest.mark.both_forms
def test_example_single_event_from_flags(shell, server):
    before = time.time()
    assert shell(SHELL_EXAMPLE, PACKTRACK_API_KEY=KEY, STAND_IN=server.url) == (0, b"", b"")
    [record] = server.records
    stamp = record.pop("timestamp")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", stamp)
    sent = datetime.datetime.strptime(stamp + "+0000", "%Y-%m-%dT%H:%M:%SZ%z").timestamp()
    assert int(before) <= sent <= time.time()
    assert record == EXAMPLE
    [request] = server.requests
    assert (request.method, request.path) == ("POST", "/api/ingest")


@pytest.mark.both_forms
def test_example_json_file_with_one_event(shell, server, put):
    one = event(**EXAMPLE)
    put(json.dumps(one, indent=2).encode("ascii"), "event.json")
    line = 'packtrack-logger --api-key "$K" --file ./event.json --base-url "$STAND_IN"'
    assert shell(line, K=KEY, STAND_IN=server.url) == (0, b"", b"")
    assert [request.json for request in server.requests] == [one]


@pytest.mark.both_forms
def test_example_json_file_with_an_array(shell, server, put):
    put(json.dumps(events(3), indent=2).encode("ascii"), "events.json")
    line = 'packtrack-logger --api-key "$K" --file ./events.json --base-url "$STAND_IN"'
    assert shell(line, K=KEY, STAND_IN=server.url) == (0, b"", b"")
    assert [request.json for request in server.requests] == [events(3)]


@pytest.mark.both_forms
def test_example_ndjson_from_a_pipe(shell, server, put):
    put(events(3))
    line = 'cat events.ndjson | packtrack-logger --api-key "$K" --stdin --ndjson --base-url "$STAND_IN"'
    assert shell(line, K=KEY, STAND_IN=server.url) == (0, b"", b"")
    assert [request.json for request in server.requests] == [events(3)]


# ---- what goes over the wire -----------------------------------------------------------------------------


@pytest.mark.both_forms
def test_a_request_keeps_the_contract(run, server):
    assert_silent_success(run(*FLAGS, server=server))
    [request] = server.requests
    assert (request.method, request.path, request.version) == ("POST", "/api/ingest", "HTTP/1.1")
    assert request.headers["x-packtrack-key"] == KEY
    assert request.headers["content-type"] == "application/json"
    assert request.headers["content-length"] == str(len(request.raw_body))
    assert request.headers["host"] == "127.0.0.1:%d" % server.port
    agent = r"pack-track-sdk-python/(\d+\.\d+\.\d+\S*) packtrack-logger/\1"
    assert re.fullmatch(agent, request.headers["user-agent"])
    assert not {"content-encoding", "idempotency-key", "transfer-encoding", "expect"} & set(request.headers)
    assert request.json == event()


@pytest.mark.parametrize(
    "suffix, path",
    [
        ("", "/api/ingest"),
        ("/", "/api/ingest"),
        ("///", "/api/ingest"),
        ("/tenant/a", "/tenant/a/api/ingest"),
        ("/tenant/a//", "/tenant/a/api/ingest"),
    ],
)
def test_base_url_keeps_its_path_and_drops_trailing_slashes(run, suffix, path):
    with StandIn(strict=False) as server:
        assert_silent_success(run(*FLAGS, "--base-url", server.url + suffix))
    assert [request.path for request in server.requests] == [path]


def test_an_object_goes_out_as_an_object_and_arrays_as_arrays(run, server, put):
    one = json.dumps(event()).encode("ascii")
    for content, argv in ((one, []), (b"[" + one + b"]", []), (one, ["--ndjson"])):
        assert_silent_success(run("--file", put(content), *argv, server=server))
    assert sizes(server) == [None, 1, 1]


@pytest.mark.parametrize("source", ["file", "stdin", "array"])
def test_batches_hold_100_records_in_order(run, server, put, source):
    data = ndjson(events(250))
    if source == "array":
        argv, given = ["--file", put(json.dumps(events(250)).encode("ascii"), "events.json")], None
    elif source == "file":
        argv, given = ["--file", put(data), "--ndjson"], None
    else:
        argv, given = ["--stdin", "--ndjson"], data
    assert_silent_success(run(*argv, stdin=given, server=server))
    assert sizes(server) == [100, 100, 50]
    assert server.records == events(250)
    assert server.connections == 1


def test_batch_size_cuts_batches(run, server, put):
    assert_silent_success(run("--file", put(events(10)), "--ndjson", "--batch-size", "4", server=server))
    assert sizes(server) == [4, 4, 2]


def test_max_batch_bytes_closes_a_batch_and_a_larger_event_goes_alone(run, server, put):
    records = [
        event(message=str(n) * size) for n, size in ((1, 100), (2, 100), (3, 100), (4, 5000), (5, 100))
    ]
    limit = 2 * len(ndjson(records[:1])) + 10
    name = put(records)
    assert_silent_success(run("--file", name, "--ndjson", "--max-batch-bytes", str(limit), server=server))
    assert server.records == records
    assert sizes(server) == [2, 1, 1, 1]
    assert [len(request.body) <= limit for request in server.requests] == [True, True, False, True]


@pytest.mark.parametrize("pipe", [False, True])
def test_complete_records_arrive_byte_for_byte(run, server, put, pipe):
    lines = [
        b'{"timestamp":"2025-01-01T00:00:00.120+02:00", "source" : {"system":"s"},"workflow":{"id":"w"},'
        b'"actor":{"id":"a","type":"t"},"status":"ok","severity":"info","message":"\\u00fc\\/ \xc3\xbc",'
        b'"metadata":{"big":' + b"123456789" * 4 + b',"price":1.10,"e":1E2,"z":-0.0}}',
        b'{"message":"x","severity":"warn","status":"failed","actor":{"type":"t","id":"i"},'
        b'"workflow":{"id":"w","name":""},"source":{"system":"s","env":""},'
        b'"timestamp":"2025-01-01T00:00:00Z","extra":{}}',
    ]
    data = b"\n".join(lines) + b"\n"
    if pipe:
        result = run("--stdin", "--ndjson", stdin=data, server=server)
    else:
        result = run("--file", put(data), "--ndjson", server=server)
    assert_silent_success(result)
    assert server.raw_records == lines


def test_records_of_a_pretty_printed_array_arrive_byte_for_byte(run, server, put):
    one = (
        b'{\n  "timestamp": "2025-01-01T00:00:00Z",\n "source": {"system": "s"}, "workflow": {"id": "w"},'
        b'"actor": {"type": "t", "id": "i"}, "severity": "info",\r\n\t"status": "ok", "message": "],[",'
        b'"metadata": {"n": 1.10}}'
    )
    assert_silent_success(run("--file", put(b" [\n" + one + b" ,\n\n" + one + b"\n]\n"), server=server))
    assert server.raw_records == [one, one]


@pytest.mark.parametrize("argv", [["--file", "events.json"], ["--file", "events.ndjson", "--ndjson"]])
def test_gzip_is_declared_and_decodes_to_the_same(run, server, put, argv):
    put(events(30))
    put(json.dumps(events(30)).encode("ascii"), "events.json")
    assert_silent_success(run(*argv, "--gzip", server=server))
    [request] = server.requests
    assert request.headers["content-encoding"] == "gzip"
    assert len(request.raw_body) < len(request.body)
    assert json.loads(gzip.decompress(request.raw_body).decode("ascii")) == events(30)


def test_gzip_of_a_single_event_is_harmless(run, server):
    assert_silent_success(run(*FLAGS, "--gzip", server=server))
    assert server.records == [event()]


# ---- every event option: flag, variable, precedence ------------------------------------------------------

EVENT_OPTIONS = {
    "timestamp": ("timestamp", "2024-02-29T23:59:60.5+01:00", "2023-01-01T00:00:00Z"),
    "source-system": ("source__system", "one", "two"),
    "source-env": ("source__env", "one", "two"),
    "workflow-id": ("workflow__id", "one", "two"),
    "workflow-name": ("workflow__name", "one", "two"),
    "run-id": ("workflow__run_id", "one", "two"),
    "step-id": ("workflow__step_id", "one", "two"),
    "actor-type": ("actor__type", "one", "two"),
    "actor-id": ("actor__id", "one", "two"),
    "actor-display": ("actor__display_name", "one", "two"),
    "severity": ("severity", "debug", "error"),
    "status": ("status", "skipped", "timeout"),
    "message": ("message", "one", "two"),
    "metadata": ("metadata", {"a": [1, None]}, {"b": "\u00fc"}),
    "extra": ("extra", {"a": 12345678901234567890}, {}),
}


def variable(name):
    """The environment variable of an option."""
    return "PACKTRACK_" + name.upper().replace("-", "_")


@pytest.mark.parametrize("name", sorted(EVENT_OPTIONS))
def test_event_option_comes_from_variable_or_flag_and_the_flag_wins(run, server, name):
    field, one, two = EVENT_OPTIONS[name]
    texts = [
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in (one, two)
    ]
    others = flags(**{name.replace("-", "_"): None})
    env = {variable(name): texts[0]}
    assert_silent_success(run(*others, env=env, server=server))
    assert_silent_success(run(*others, "--" + name, texts[1], env=env, server=server))
    wanted = [event(**{field: value}) if value != {} else event() for value in (one, two)]
    assert server.records == wanted


def test_every_word_of_the_enumerations_is_taken(run, server, put):
    records = [event(severity=word) for word in ("debug", "info", "warn", "error")]
    records += [event(status=word) for word in ("ok", "failed", "skipped", "timeout", "retrying", "unknown")]
    assert_silent_success(run("--file", put(records), "--ndjson", server=server))
    assert server.records == records


@pytest.mark.both_forms
def test_an_event_from_the_environment_alone(run, server):
    env = {variable(name[2:]): value for name, value in zip(FLAGS[::2], FLAGS[1::2])}
    assert_silent_success(run(env=env, server=server))
    assert server.records == [event()]


def test_a_missing_timestamp_is_now_in_utc_with_a_fraction(run, server):
    before = time.time()
    assert_silent_success(run(*flags(timestamp=None), server=server))
    after = time.time()
    [record] = server.records
    assert NOW.fullmatch(record["timestamp"])
    stamp = datetime.datetime.strptime(record["timestamp"].split(".")[0] + "Z+0000", "%Y-%m-%dT%H:%M:%SZ%z")
    assert int(before) <= stamp.timestamp() <= after


def test_an_optional_flag_that_is_empty_is_left_out(run, server):
    empty = (
        "source_env",
        "workflow_name",
        "run_id",
        "step_id",
        "actor_display",
        "metadata",
        "extra",
        "timestamp",
    )
    assert_silent_success(run(*flags(**dict.fromkeys(empty, "")), server=server))
    record = dict(server.records[0])
    assert NOW.fullmatch(record["timestamp"])
    assert {**record, "timestamp": event()["timestamp"]} == event()


def test_an_empty_metadata_object_is_left_out_or_empty(run, server):
    assert_silent_success(run(*FLAGS, "--metadata", "{}", server=server))
    assert server.records[0].get("metadata", {}) == {}


@pytest.mark.both_forms
@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}])
def test_text_is_utf8_whatever_the_locale(run, server, locale):
    text = "na\u00efve \u2603 \U0001f680 \u2028"
    assert_silent_success(
        run(*flags(message=text), env={**locale, "PACKTRACK_SOURCE_ENV": text}, server=server)
    )
    assert server.records == [event(message=text, source__env=text)]


def test_flags_that_hold_every_kind_of_character_stay_json(run, server):
    text = 'quote " backslash \\ newline \n tab \t escape \x1b delete \x7f'
    assert_silent_success(run(*flags(message=text), server=server))
    assert server.records == [event(message=text)]


# ---- every other option: flag, variable, precedence ------------------------------------------------------


@pytest.mark.parametrize(
    "argv, env, tries",
    [
        pytest.param([], {}, 4, id="default"),
        pytest.param(["--retries", "0"], {}, 1, id="0"),
        pytest.param(["--retries=5"], {}, 6, id="5"),
        pytest.param([], {"PACKTRACK_RETRIES": "1"}, 2, id="variable"),
        pytest.param([], {"PACKTRACK_RETRIES": ""}, 4, id="empty variable"),
        pytest.param(["--retries", "2"], {"PACKTRACK_RETRIES": "7"}, 3, id="flag over variable"),
    ],
)
def test_retries_is_the_number_of_further_tries(run, argv, env, tries):
    with StandIn(default=503) as server:
        assert_fails(run(*FLAGS, *argv, env={**FAST, **env}, server=server), 3, "503")
    assert len(server.requests) == tries
    assert len({request.body for request in server.requests}) == 1


@pytest.mark.parametrize(
    "argv, env",
    [
        (["--timeout", "300ms"], {}),
        ([], {"PACKTRACK_TIMEOUT": "0.3"}),
        (["--timeout", ".3s"], {"PACKTRACK_TIMEOUT": "30s"}),
    ],
)
def test_timeout_bounds_an_attempt(run, argv, env):
    with StandIn(default=standin.SILENT) as server:
        result = run(*FLAGS, *argv, env={**env, "PACKTRACK_RETRIES": "0"}, server=server)
    assert_fails(result, 3)
    assert 0.3 <= result.seconds < 5
    assert len(server.requests) == 1


def gaps(server):
    """The seconds between the requests."""
    times = [request.time for request in server.requests]
    return [later - earlier for earlier, later in zip(times, times[1:])]


@pytest.mark.parametrize(
    "argv, env",
    [
        (["--backoff-initial", "100ms", "--backoff-max", "10s", "--jitter", "0"], {}),
        ([], {"PACKTRACK_BACKOFF_INITIAL": "0.1", "PACKTRACK_BACKOFF_MAX": "10s", "PACKTRACK_JITTER": "0"}),
    ],
)
def test_waits_double(run, argv, env):
    with StandIn(script=[503, 503, 503]) as server:
        assert_silent_success(run(*FLAGS, *argv, env=env, server=server))
    assert [gap >= bound for gap, bound in zip(gaps(server), (0.1, 0.2, 0.4))] == [True, True, True]


@pytest.mark.parametrize(
    "argv, env",
    [
        (["--backoff-initial", "1h", "--backoff-max", "50ms", "--jitter", "0"], {}),
        ([], {"PACKTRACK_BACKOFF_INITIAL": "1h", "PACKTRACK_BACKOFF_MAX": "50ms", "PACKTRACK_JITTER": "0"}),
    ],
)
def test_backoff_max_bounds_a_wait(run, argv, env):
    with StandIn(script=[503, 503]) as server:
        assert_silent_success(run(*FLAGS, *argv, env=env, server=server))
    assert all(gap >= 0.05 for gap in gaps(server))


@pytest.mark.parametrize(
    "argv, env, agent",
    [
        (["--user-agent", "mine/1 (a b)"], {}, "mine/1 (a b)"),
        ([], {"PACKTRACK_USER_AGENT": "theirs"}, "theirs"),
        (["--user-agent", "mine"], {"PACKTRACK_USER_AGENT": "theirs"}, "mine"),
    ],
)
def test_user_agent_replaces_the_default(run, server, argv, env, agent):
    assert_silent_success(run(*FLAGS, *argv, env=env, server=server))
    assert server.requests[0].headers["user-agent"] == agent


@pytest.mark.parametrize(
    "argv, env",
    [
        pytest.param(["--api-key", KEY], {}, id="flag"),
        pytest.param(["--api-key=" + KEY], {"PACKTRACK_API_KEY": "another"}, id="flag over variable"),
        pytest.param([], {"PACKTRACK_API_KEY": KEY}, id="variable"),
        pytest.param(["--api-key-file", "key"], {}, id="file flag"),
        pytest.param(
            ["--api-key-file", "key"], {"PACKTRACK_API_KEY": "another"}, id="file flag over key variable"
        ),
        pytest.param(
            ["--api-key-file", "key"], {"PACKTRACK_API_KEY_FILE": "none"}, id="file flag over its variable"
        ),
        pytest.param(["--api-key", KEY, "--api-key-file", "other"], {}, id="key over file, flags"),
        pytest.param([], {"PACKTRACK_API_KEY_FILE": "key"}, id="file variable"),
        pytest.param(
            [], {"PACKTRACK_API_KEY": KEY, "PACKTRACK_API_KEY_FILE": "other"}, id="key over file, variables"
        ),
        pytest.param(["--api-key", KEY], {"PACKTRACK_API_KEY_FILE": "none"}, id="flag over file variable"),
    ],
)
def test_where_the_key_comes_from(run, server, put, argv, env):
    put(KEY.encode("ascii") + b"\nsecond line\n", "key")
    put(b"another\n", "other")
    assert_silent_success(run(*FLAGS, *argv, env=env, key=False, server=server))
    assert server.requests[0].headers["x-packtrack-key"] == KEY


def test_a_key_file_needs_no_final_newline(run, server, put):
    assert_silent_success(
        run(*FLAGS, "--api-key-file", put(KEY.encode("ascii"), "key"), key=False, server=server)
    )


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="needs /dev/fd")
def test_a_key_file_may_be_a_descriptor(run, server, put):
    put(KEY.encode("ascii") + b"\n", "key")
    assert_silent_success(
        run(*FLAGS, "--api-key-file", "/dev/fd/7", key=False, server=server, redirect="7<key")
    )


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n" + KEY.encode("ascii"),
        b"   \n",
        (SECRET + "\0\n").encode("ascii"),
        (SECRET + "\x1b\n").encode("ascii"),
        SECRET.encode("utf-16"),
        (SECRET + "\u00fc\n").encode("utf-8"),
        (SECRET + "\xfc\n").encode("latin-1"),
    ],
)
def test_a_key_file_without_a_good_key_is_refused_and_not_quoted(run, server, put, content):
    result = run(*FLAGS, "--api-key-file", put(content, "key"), key=False, server=server, secrets=[SECRET])
    assert_fails(result, 1, "api-key|key")
    assert server.connections == 0


@pytest.mark.parametrize("path", ["missing", "."])
def test_a_key_file_that_cannot_be_read_is_an_error(run, server, path):
    result = run(*FLAGS, "--api-key-file", path, key=False, server=server)
    assert_fails(result, result.code, "--api-key-file")
    assert result.code in (1, 4)
    assert server.connections == 0


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_key_file_that_others_may_read_is_mentioned_under_verbose_alone(run, server, put, tmp_path):
    put(KEY.encode("ascii"), "key")
    (tmp_path / "key").chmod(0o644)
    assert_silent_success(run(*FLAGS, "--api-key-file", "key", key=False, server=server))
    told = run(*FLAGS, "--api-key-file", "key", "--verbose", key=False, server=server)
    (tmp_path / "key").chmod(0o600)
    untold = run(*FLAGS, "--api-key-file", "key", "--verbose", key=False, server=server)
    assert (told.code, untold.code) == (0, 0)
    # "key" alone is a word of too many lines.
    assert re.search(r"(?i)others|readable|mode|permission", told.err), told
    assert not re.search(r"(?i)others|readable|mode|permission", untold.err), untold


@pytest.mark.both_forms
def test_without_a_key_nothing_is_sent(run, server):
    assert_fails(run(*FLAGS, key=False, server=server), 1, "PACKTRACK_API_KEY", "--api-key")
    assert_fails(run(*FLAGS, "--api-key", "", key=False, server=server), 1, "api-key")
    assert server.connections == 0


BOOLEANS = [
    (["--gzip"], {}, True),
    (["--no-gzip"], {}, False),
    ([], {}, False),
    *(([], {"PACKTRACK_GZIP": word}, True) for word in ("1", "true", "yes", "y", "oN")),
    *(([], {"PACKTRACK_GZIP": word}, False) for word in ("0", "False", "no", "n", "OFF", "")),
    (["--no-gzip"], {"PACKTRACK_GZIP": "1"}, False),
    (["--gzip"], {"PACKTRACK_GZIP": "0"}, True),
    (["--gzip=true"], {}, True),
    (["--gzip=off"], {"PACKTRACK_GZIP": "1"}, False),
]


@pytest.mark.parametrize("argv, env, wanted", BOOLEANS)
def test_forms_of_a_boolean(run, server, put, argv, env, wanted):
    assert_silent_success(run("--file", put(events(30)), "--ndjson", *argv, env=env, server=server))
    assert ("content-encoding" in server.requests[0].headers) is wanted


@pytest.mark.parametrize(
    "argv, env, source",
    [
        ([], {"PACKTRACK_GZIP": "maybe"}, "PACKTRACK_GZIP"),
        ([], {"PACKTRACK_DRY_RUN": "2"}, "PACKTRACK_DRY_RUN"),
        (["--gzip=maybe"], {}, "--gzip"),
        (["--no-gzip=maybe"], {}, "--no-gzip"),
    ],
)
def test_a_boolean_that_is_neither_is_refused(run, server, argv, env, source):
    assert_fails(run(*FLAGS, *argv, env=env, server=server), 1, source)
    assert server.connections == 0


def test_every_boolean_has_a_no_form_that_undoes_the_environment(run, server):
    names = [
        "gzip",
        "stdin",
        "ndjson",
        "verbose",
        "dry-run",
        "health",
        "health-enable",
        "json",
        "progress",
        "async",
        "keep-going",
        "strict",
    ]
    env = {variable(name): "1" for name in [*names, "no-flush"]}
    result = run(*FLAGS, "--flush", *("--no-" + name for name in names), env=env, server=server)
    assert_silent_success(result)
    assert [(request.method, "content-encoding" in request.headers) for request in server.requests] == [
        ("POST", False)
    ]


@pytest.mark.parametrize(
    "texts",
    [
        ("10000ms", "10s"),
        ("10", "5."),
        ("0.2m", "1m30s"),
        ("1.5h", ".5h"),
        ("90000000us", "90000000\u00b5s"),
        ("1h2m3s4ms", "90000000000ns"),
    ],
)
def test_durations_as_in_go_and_bare_seconds_are_taken(run, server, texts):
    assert_silent_success(run(*FLAGS, "--timeout", texts[0], "--deadline", texts[1], server=server))
    assert len(server.requests) == 1


DASHES = ["-done-", "--", "-", "--help", "-h", "--file", "--message=x", "-1", "=", "a=b"]


@pytest.mark.parametrize(
    "argv, value",
    [
        *((["--message", value], value) for value in DASHES),
        *((["--message=" + value], value) for value in DASHES[:3]),
    ],
)
def test_a_value_may_begin_with_a_dash(run, server, argv, value):
    assert_silent_success(run(*flags(message=None), *argv, server=server))
    assert server.records == [event(message=value)]


def test_variables_that_are_unknown_or_not_for_options_are_ignored(run, server):
    env = {
        "PACKTRACK_VERSION": "1.2.3",
        "PACKTRACK_HELP": "1",
        "PACKTRACK_COMPLETION": "bash",
        "PACKTRACK_WHATEVER": "x",
        "PACKTRACK_": "x",
    }
    assert_silent_success(run(*FLAGS, env=env, server=server))
    assert server.records == [event()]


def test_empty_variables_are_unset(run, server):
    env = {
        variable(name): ""
        for name in (
            "timeout",
            "retries",
            "user-agent",
            "file",
            "stdin",
            "metadata",
            "severity",
            "backoff-initial",
            "jitter",
            "undelivered",
            "output",
            "deadline",
            "idempotency-key",
            "health-path",
            "async",
        )
    }
    assert_silent_success(run(*FLAGS, env=env, server=server))
    assert server.records == [event()]


# ---- arguments that are refused --------------------------------------------------------------------------

BAD_HEADERS = {
    "CR": SECRET + "\r",
    "CR inside": SECRET + "\rx",
    "LF": SECRET + "\n",
    "ESC": SECRET + "\x1b[31m",
    "fold": SECRET + "\r\n x",
    "non-ASCII": SECRET + "\u00fc",
    "blank": " ",
    "leading blank": " " + SECRET,
    "trailing blank": SECRET + " ",
    "tab": SECRET + "\tx",
    "not UTF-8": SECRET + "\udcff",
}
LABEL = "a" * 64
BAD_URLS = {
    "file": "file:///etc/passwd",
    "ftp": "ftp://example.com",
    "data": "data:text/plain,hi",
    "no scheme": "example.com",
    "no scheme, port": "example.com:80",
    "no host": "http://",
    "no host, path": "http:///x",
    "no host, port": "http://:80",
    "no slashes": "http:example.com",
    "user and password": "http://joe:%s@example.com" % SECRET,
    "user": "http://%s@example.com" % SECRET,
    "query": "http://example.com/?a=%s" % SECRET,
    "fragment": "http://example.com/#a",
    "port 0": "http://example.com:0",
    "port 65536": "http://example.com:65536",
    "port -1": "http://example.com:-1",
    "port abc": "http://example.com:abc",
    "port with Arabic digits": "http://example.com:\u0668\u0660",
    "open bracket": "http://[::1",
    "not an address": "http://[::zz]",
    "empty label": "http://a..example.com",
    "64-character label": "http://%s.example.com" % LABEL,
    "blank": "http://exa mple.com",
    "blank in path": "http://example.com/a b",
    "line end": "http://example.com/\r\nX: y",
    "empty": " ",
}
BAD_DURATIONS = {
    "negative": "-1s",
    "negative zero": "-0.1",
    "NaN": "nan",
    "infinite": "inf",
    "1e999": "1e999",
    "absurdly large": "9" * 30 + "h",
    "1_0": "1_0",
    "1_0s": "1_0s",
    "Arabic digits": "\u0661\u0660s",
    "empty": " ",
    "unit alone": "s",
    "unknown unit": "5x",
    "two units": "5ss",
    "number after unit": "1m30",
    "blank inside": "5 s",
    "zero": "0",
    "zero seconds": "0s",
    "capital unit": "5S",
    "two points": "1.2.3s",
    "point alone": ".s",
}
BAD_WAITS = {name: value for name, value in BAD_DURATIONS.items() if not name.startswith("zero")}
BAD_COUNTS = {
    "negative": "-1",
    "fraction": "1.5",
    "NaN": "nan",
    "infinite": "inf",
    "absurdly large": "9" * 30,
    "1_0": "1_0",
    "Arabic digits": "\u0661",
    "word": "many",
    "blank": " ",
    "hexadecimal": "0x10",
}
BAD_FRACTIONS = {
    "negative": "-0.1",
    "over 1": "1.1",
    "NaN": "nan",
    "infinite": "inf",
    "1_0": "0.1_0",
    "Arabic digits": "\u0660.\u0661",
    "word": "half",
    "blank": " ",
}
BAD_TIMESTAMPS = {
    "year 0000": "0000-01-01T00:00:00Z",
    "30 February": "2025-02-30T00:00:00Z",
    "29 February, no leap year": "2025-02-29T00:00:00Z",
    "29 February 1900": "1900-02-29T00:00:00Z",
    "31 April": "2025-04-31T00:00:00Z",
    "month 13": "2025-13-01T00:00:00Z",
    "day 0": "2025-01-00T00:00:00Z",
    "24:00": "2025-01-01T24:00:00Z",
    "minute 60": "2025-01-01T00:60:00Z",
    "second 61": "2025-01-01T00:00:61Z",
    "+25:00": "2025-01-01T00:00:00+25:00",
    "comma": "2025-01-01T00:00:00,5Z",
    "blank for T": "2025-01-01 00:00:00Z",
    "no zone": "2025-01-01T00:00:00",
    "date alone": "2025-01-01",
    "zone without colon": "2025-01-01T00:00:00+0100",
    "no seconds": "2025-01-01T00:00Z",
    "empty fraction": "2025-01-01T00:00:00.Z",
    "trailing newline": "2025-01-01T00:00:00Z\n",
    "words": "yesterday",
    "epoch": "1735689600",
    "Arabic digits": "\u0662025-01-01T00:00:00Z",
}


def table(cases, daily=None):
    """{id: value, or tuple of values} as parameters; those not in `daily` are marked full."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            id=name,
            marks=[] if daily is None or name in daily else [pytest.mark.full],
        )
        for name, value in cases.items()
    ]


def refused(run, server, argv, env, *words):
    """Exit 1, one line, nothing sent, no secret."""
    result = run(*argv, env=env, server=server, secrets=[SECRET])
    assert_fails(result, 1, *words)
    if "--json" not in argv:
        assert result.out == ""
    assert server.connections == 0


NAMED_HEADERS = ("CR", "LF", "ESC", "fold", "non-ASCII", "blank")


@pytest.mark.parametrize("value", table(BAD_HEADERS, NAMED_HEADERS))
@pytest.mark.parametrize("name", ["api-key", "idempotency-key", "user-agent"])
def test_arguments_header_values(run, server, name, value):
    refused(run, server, [*FLAGS, "--" + name, value], {}, "--" + name)


@pytest.mark.parametrize("value", table(BAD_HEADERS, ("CR", "non-ASCII", "not UTF-8")))
@pytest.mark.parametrize("name", ["api-key", "idempotency-key", "user-agent"])
def test_arguments_header_values_from_the_environment(run, server, name, value):
    refused(run, server, FLAGS, {variable(name): value}, variable(name))


@pytest.mark.both_forms
@pytest.mark.parametrize(
    "argv, words",
    [
        pytest.param(["--api-kye", SECRET], ["--api-kye", "--api-key"], id="--api-kye SECRET"),
        pytest.param(["--apikey=" + SECRET], ["--apikey", "--api-key"], id="--apikey=SECRET"),
        pytest.param([SECRET], [], id="a stray SECRET"),
        pytest.param(["--verbose", "--"], ["command"], id="-- and nothing after it"),
        pytest.param(["-x" + SECRET], [], id="unknown short flag"),
        pytest.param(["-k", SECRET], ["-k"], id="unknown short flag with a value"),
        pytest.param(["--api-key", "x", SECRET], [], id="stray word after a good flag"),
    ],
)
def test_arguments_misspelt_and_stray(run, server, argv, words):
    refused(run, server, [*FLAGS, *argv], {}, *words)


@pytest.mark.parametrize("argv", [["--mess", "x"], ["--time=5"], ["--dry"], ["--source", "x"]])
def test_arguments_abbreviations(run, server, argv):
    refused(run, server, [*FLAGS, *argv], {}, "unknown", argv[0].split("=")[0])


@pytest.mark.parametrize("url", table(BAD_URLS))
def test_arguments_base_url(run, server, url):
    refused(run, server, [*FLAGS, "--base-url", url], {}, "--base-url")


@pytest.mark.parametrize("url", table(BAD_URLS, ("user and password", "query", "no scheme")))
def test_arguments_base_url_from_the_environment(run, url):
    assert_fails(run(*FLAGS, env={"PACKTRACK_BASE_URL": url}, secrets=[SECRET]), 1, "PACKTRACK_BASE_URL")


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1]:80",
        "http://b\u00fccher.example",
        "https://example.com:443/a/b",
        "http://127.0.0.1",
        "http://localhost:65535/",
        "http://my_host",
    ],
)
def test_arguments_base_url_that_is_fine(run, url):
    assert_silent_success(run(*FLAGS, "--dry-run", "--base-url", url))


NAMED_NUMBERS = (
    "negative",
    "NaN",
    "infinite",
    "absurdly large",
    "1_0",
    "Arabic digits",
    "empty",
    "unit alone",
)


@pytest.mark.parametrize("value", table(BAD_DURATIONS, NAMED_NUMBERS + ("zero",)))
def test_arguments_timeout(run, server, value):
    refused(run, server, [*FLAGS, "--timeout", value], {}, "--timeout")


@pytest.mark.parametrize("name", ["deadline", "backoff-initial", "backoff-max", "flush-interval", "timeout"])
@pytest.mark.parametrize("value", table(BAD_WAITS, ("negative",)))
def test_arguments_durations_from_the_environment(run, server, name, value):
    refused(run, server, FLAGS, {variable(name): value}, variable(name))


@pytest.mark.parametrize("name", ["deadline", "timeout"])
def test_arguments_limits_of_zero(run, server, name):
    refused(run, server, [*FLAGS, "--" + name, "0ms"], {}, "--" + name)


@pytest.mark.parametrize("value", table(BAD_COUNTS, NAMED_NUMBERS))
def test_arguments_retries(run, server, value):
    refused(run, server, [*FLAGS, "--retries", value], {}, "--retries")


@pytest.mark.parametrize("name", ["batch-size", "max-batch-bytes", "queue-capacity"])
@pytest.mark.parametrize("value", table({"zero": "0", **BAD_COUNTS}, ("zero", "negative")))
def test_arguments_counts(run, server, put, name, value):
    put(events(1))
    refused(run, server, ["--file", "events.ndjson", "--ndjson", "--" + name, value], {}, "--" + name)


@pytest.mark.parametrize("value", table(BAD_FRACTIONS, NAMED_NUMBERS + ("over 1",)))
def test_arguments_jitter(run, server, value):
    refused(run, server, [*FLAGS, "--jitter", value], {}, "--jitter")


NAMED_TIMESTAMPS = ("year 0000", "30 February", "24:00", "+25:00", "comma", "blank for T", "no zone")


@pytest.mark.parametrize("value", table(BAD_TIMESTAMPS, NAMED_TIMESTAMPS))
def test_arguments_timestamp(run, server, value):
    refused(run, server, flags(timestamp=value), {}, "--timestamp")


@pytest.mark.parametrize(
    "argv, env, words",
    [
        pytest.param(["--file", "f", "--stdin"], {}, ["--file", "--stdin"], id="--file with --stdin"),
        pytest.param(["--file", "-", "--stdin"], {}, ["--file", "--stdin"], id="--file - with --stdin"),
        pytest.param([*FLAGS, "--no-flush"], {}, ["--no-flush", "--async"], id="--no-flush without --async"),
        pytest.param(
            [*FLAGS, "--file", "f", "--", "true"], {}, ["--file", "command"], id="a command with --file"
        ),
        pytest.param(
            [*FLAGS, "--stdin", "--", "true"], {}, ["--stdin", "command"], id="a command with --stdin"
        ),
        pytest.param([*FLAGS, "--json", "--", "true"], {}, ["--json", "command"], id="a command with --json"),
        pytest.param(
            [*FLAGS, "--dry-run", "--", "true"], {}, ["--dry-run", "command"], id="a command with --dry-run"
        ),
        pytest.param(
            [*FLAGS, "--output", "-", "--", "true"],
            {},
            ["--output", "command"],
            id="a command with --output -",
        ),
        pytest.param([*FLAGS, "--ndjson"], {}, ["--ndjson", "--file", "--stdin"], id="--ndjson alone"),
        pytest.param([*FLAGS, "--strict"], {}, ["--strict", "command"], id="--strict without a command"),
        pytest.param(
            [*FLAGS, "--command-timeout", "5s"],
            {},
            ["--command-timeout", "command"],
            id="--command-timeout without a command",
        ),
        pytest.param(flags(message="\udcff"), {}, ["--message", "UTF-8"], id="a message that is not UTF-8"),
        pytest.param(
            flags(message=None),
            {"PACKTRACK_MESSAGE": "\udce4"},
            ["PACKTRACK_MESSAGE", "UTF-8"],
            id="a message variable that is not UTF-8",
        ),
        pytest.param(
            flags(severity="loud"), {}, ["--severity", "debug, info, warn, error", '"loud"'], id="severity"
        ),
        pytest.param(flags(severity="eror"), {}, ["--severity", "error"], id="severity, nearly right"),
        pytest.param(flags(severity="INFO"), {}, ["--severity"], id="severity in capitals"),
        pytest.param(
            flags(status="fine"),
            {},
            ["--status", "ok, failed, skipped, timeout, retrying, unknown"],
            id="status",
        ),
        pytest.param(
            flags(severity=None),
            {"PACKTRACK_SEVERITY": "loud"},
            ["PACKTRACK_SEVERITY"],
            id="severity variable",
        ),
        pytest.param([*FLAGS, "--metadata", "{"], {}, ["--metadata"], id="metadata torn"),
        pytest.param([*FLAGS, "--metadata", "[1]"], {}, ["--metadata", "object"], id="metadata an array"),
        pytest.param([*FLAGS, "--extra", '"%s"' % SECRET], {}, ["--extra", "object"], id="extra a string"),
        pytest.param([*FLAGS, "--extra", SECRET], {}, ["--extra"], id="extra no JSON"),
        pytest.param([*FLAGS, "--metadata", '{"a":NaN}'], {}, ["--metadata"], id="metadata with NaN"),
        pytest.param(
            [*FLAGS, "--metadata", '{"a":-Infinity}'], {}, ["--metadata"], id="metadata with -Infinity"
        ),
        pytest.param([*FLAGS, "--metadata", '{"a":1e999}'], {}, ["--metadata"], id="metadata with 1e999"),
        pytest.param(
            [*FLAGS, "--metadata", '{"a":%s}' % ("9" * 5000)],
            {},
            ["--metadata"],
            id="metadata with 5000 digits",
        ),
        pytest.param(
            [*FLAGS, "--metadata", '{"a":%s}' % ("[" * 600 + "]" * 600)],
            {},
            ["--metadata"],
            id="metadata 600 levels deep",
        ),
        pytest.param(FLAGS, {"PACKTRACK_METADATA": "{"}, ["PACKTRACK_METADATA"], id="metadata variable torn"),
        pytest.param(
            [*FLAGS, "--completion", "tcsh"], {}, ["--completion", "bash, zsh, fish"], id="completion tcsh"
        ),
        pytest.param([*FLAGS, "--message"], {}, ["--message"], id="a flag without its value"),
        pytest.param([*FLAGS, "--health-path", "a b"], {}, ["--health-path"], id="health path with a blank"),
    ],
)
def test_arguments_contradictions_and_values(run, server, argv, env, words):
    refused(run, server, argv, env, *words)


@pytest.mark.parametrize(
    "name", ["source-system", "workflow-id", "actor-type", "actor-id", "severity", "status", "message"]
)
@pytest.mark.parametrize("value", [None, ""], ids=["missing", "empty"])
def test_arguments_required_fields(run, server, name, value):
    refused(run, server, flags(**{name.replace("-", "_"): value}), {}, "--" + name)


def test_several_missing_fields_are_still_one_line(run, server):
    refused(run, server, ["--message", "x"], {}, "--source-system|--workflow-id|--severity")


@pytest.mark.both_forms
@pytest.mark.parametrize("env", [{}, {"PACKTRACK_SOURCE_SYSTEM": "s"}], ids=["nothing", "no message"])
def test_no_arguments_and_no_message_print_a_short_usage(run, server, env):
    result = run(env=env, server=server)
    assert result.code == 1
    assert result.out == ""
    assert re.search("(?i)usage", result.err) and "--help" in result.err
    assert result.err.count("\n") < 15
    assert server.connections == 0


def test_a_secret_is_not_quoted_even_with_verbose_and_json(run, server):
    result = run(*FLAGS, "--json", "--verbose", "--api-kye", SECRET, server=server, secrets=[SECRET])
    assert result.code == 1


# ---- sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, env, wanted",
    [
        pytest.param(["--file", "events.ndjson", "--ndjson"], {"PACKTRACK_STDIN": "1"}, "file", id="file"),
        pytest.param(["--stdin", "--ndjson"], {"PACKTRACK_FILE": "events.ndjson"}, "stdin", id="stdin"),
        pytest.param(["--ndjson"], {"PACKTRACK_FILE": "events.ndjson"}, "file", id="file variable"),
        pytest.param(["--ndjson"], {"PACKTRACK_STDIN": "yes"}, "stdin", id="stdin variable"),
        pytest.param(
            [], {"PACKTRACK_STDIN": "yes", "PACKTRACK_NDJSON": "1"}, "stdin", id="stdin and ndjson variables"
        ),
        pytest.param(["--file", "-", "--ndjson"], {}, "stdin", id="file -"),
        pytest.param(["--file=-", "--ndjson"], {}, "stdin", id="file=-"),
    ],
)
def test_the_command_line_chooses_the_source(run, server, put, argv, env, wanted):
    put([event(message="file")])
    result = run(*argv, env=env, stdin=ndjson([event(message="stdin")]), server=server)
    assert_silent_success(result)
    assert [record["message"] for record in server.records] == [wanted]


def test_standard_input_is_not_read_unless_asked_for(start, server):
    process = start(*FLAGS, stdin=subprocess.PIPE, server=server)
    server.wait_for_requests(1)
    assert process.popen.wait(10) == 0
    assert server.records == [event()]


@pytest.mark.skipif(os.name != "posix", reason="/dev/stdin")
@pytest.mark.parametrize("path", ["/dev/stdin", "fifo", "/dev/fd/0"])
def test_pipes_by_name(start, server, tmp_path, path):
    data = ndjson(events(5))
    if path == "fifo":
        os.mkfifo(str(tmp_path / path))
        process = start("--file", path, "--ndjson", server=server)
        with open(str(tmp_path / path), "wb") as pipe:
            pipe.write(data)
    else:
        process = start("--file", path, "--ndjson", stdin=data, server=server)
    assert_silent_success(process.result())
    assert server.records == events(5)


# ---- input -----------------------------------------------------------------------------------------------


def line(**overrides):
    """A good record as bytes, without a line end."""
    return ndjson([event(**overrides)])[:-1]


def deep(levels):
    """A record that is nested this deep, itself included."""
    inner = levels - 2
    return line(metadata={"a": 0}).replace(b'{"a":0}', b'{"a":' + b"[" * inner + b"]" * inner + b"}")


def number(text):
    """A record with this number in its metadata."""
    return line(metadata={"a": 0}).replace(b'{"a":0}', b'{"a":' + text + b"}")


JSON, NDJSON, ANY = (), ("--ndjson",), None
GOOD, MARKED = line(), line(message=MARK)
BAD_INPUT = {  # id: (content, argv, words)
    "empty": (b"", ANY, ["empty|no event|no record|nothing"]),
    "blank": (b" \r\n\t\n \n", ANY, ["empty|no event|no record|nothing"]),
    "byte order mark alone": (b"\xef\xbb\xbf", ANY, []),
    "UTF-16": (MARKED.decode("ascii").encode("utf-16"), ANY, ["UTF-8|JSON"]),
    "UTF-16 without a mark": (MARKED.decode("ascii").encode("utf-16-le"), ANY, []),
    "UTF-32": (MARKED.decode("ascii").encode("utf-32-be"), ANY, []),
    "two byte order marks": (b"\xef\xbb\xbf" * 2 + MARKED, ANY, []),
    "invalid UTF-8": (MARKED.replace(b"m4rk", b"m4rk\xff\xfe"), ANY, ["UTF-8"]),
    "invalid UTF-8, surrogate": (MARKED.replace(b"m4rk", b"m4rk\xed\xa0\x80"), ANY, ["UTF-8"]),
    "invalid UTF-8, overlong": (MARKED.replace(b"m4rk", b"m4rk\xc0\xaf"), ANY, ["UTF-8"]),
    "raw NUL": (MARKED.replace(b"m4rk", b"m4rk\0"), ANY, []),
    "NUL between": (MARKED + b"\n\0\n", ANY, []),
    "raw tab in a string": (MARKED.replace(b"m4rk", b"m4rk\t"), ANY, []),
    "501 levels": (deep(501), ANY, ["500|nest|deep"]),
    "100,000 levels": (deep(100000), ANY, ["500|nest|deep"]),
    "100,000 levels, never closed": (b"[" * 100000, NDJSON, []),
    "NaN": (number(b"NaN"), ANY, []),
    "Infinity": (number(b"Infinity"), ANY, []),
    "-Infinity": (number(b"-Infinity"), ANY, []),
    "1e999": (number(b"1e999"), ANY, []),
    "-1e999": (number(b"-1e999"), ANY, []),
    "an integer of 5000 digits": (number(b"9" * 5000), ANY, ["4300|digits"]),
    "a negative integer of 4301 digits": (number(b"-" + b"9" * 4301), ANY, ["4300|digits"]),
    "trailing comma": (MARKED[:-1] + b",}", ANY, []),
    "trailing comma in the array": (b"[" + MARKED + b",]", JSON, []),
    "missing comma in the array": (b"[" + MARKED + b" " + MARKED + b"]", JSON, []),
    "comments": (b"// " + MARK.encode("ascii") + b"\n" + MARKED, ANY, []),
    "comments inside": (b"[/* x */" + MARKED + b"]", JSON, []),
    "single quotes": (MARKED.replace(b'"', b"'"), ANY, []),
    "objects one after another without --ndjson": (MARKED + b"\n" + MARKED + b"\n", JSON, ["--ndjson"]),
    "objects one after another on a line without --ndjson": (MARKED + MARKED, JSON, ["--ndjson"]),
    "two objects on a line with --ndjson": (MARKED + MARKED + b"\n", NDJSON, []),
    "an array and more": (b"[" + MARKED + b"]" + MARK.encode("ascii"), JSON, []),
    "two arrays": (b"[" + MARKED + b"]\n[" + MARKED + b"]", JSON, []),
    "pretty-printed JSON with --ndjson": (
        json.dumps(event(message=MARK), indent=1).encode("ascii"),
        NDJSON,
        [],
    ),
    "torn": (MARKED[:-3], ANY, []),
    "torn last line": (MARKED + b"\n" + MARKED[:40], NDJSON, []),
    "torn array": (b"[" + MARKED + b"," + MARKED[:40], JSON, []),
    "array not closed": (b"[" + MARKED, JSON, []),
    "[]": (b"[]", JSON, ["empty|no event|no record|nothing"]),
    "[ ]": (b" [\n\n] \n", JSON, ["empty|no event|no record|nothing"]),
    "[] with --ndjson": (b"[]\n", NDJSON, []),
    "[[]]": (b"[[]]", JSON, ["object"]),
    "[1]": (b"[1]", JSON, ["object"]),
    "[null]": (b"[null]", JSON, ["object"]),
    "mixed array": (b"[" + MARKED + b",1]", JSON, ["object"]),
    "mixed array, string": (b"[" + MARKED + b',"x"]', JSON, ["object"]),
    "mixed array, array": (b"[" + MARKED + b",[" + MARKED + b"]]", JSON, ["object"]),
    "null": (b"null", ANY, ["object"]),
    "bare string": (b'"' + MARK.encode("ascii") + b'"', ANY, ["object"]),
    "bare number": (b"1", ANY, ["object"]),
    "true": (b"true", ANY, ["object"]),
    "array line with --ndjson": (b"[" + MARKED + b"]\n", NDJSON, ["object|array"]),
    "garbage": (MARK.encode("ascii"), ANY, []),
    "HTML": (b"<html>" + MARK.encode("ascii"), ANY, []),
    "an unpaired brace": (b"}", ANY, []),
    "Unicode line end between": (MARKED + "\u2028".encode("utf-8") + MARKED, NDJSON, []),
    "no-break space around": ("\u00a0".encode("utf-8") + MARKED, ANY, []),
    "form feed around": (b"\f" + MARKED, ANY, []),
}
# Both ways of reading are daily for these; for the others one of them is.
BOTH_DAILY = ("empty", "blank", "UTF-16", "invalid UTF-8", "501 levels", "NaN", "torn", "null")
INPUT_CASES = [
    pytest.param(
        content,
        argv,
        words,
        id="%s%s" % (name, " (ndjson)" if given is ANY and argv else ""),
        marks=[pytest.mark.full] if given is ANY and argv and name not in BOTH_DAILY else [],
    )
    for name, (content, given, words) in BAD_INPUT.items()
    for argv in ((JSON, NDJSON) if given is ANY else (given,))
]


@pytest.mark.parametrize("content, argv, words", INPUT_CASES)
def test_input_that_is_refused(run, server, put, content, argv, words):
    result = run("--file", put(content, "input"), *argv, server=server, secrets=[MARK])
    assert_fails(result, 4, "^" + PREFIX + "input", *words)
    assert server.connections == 0


@pytest.mark.parametrize(
    "name",
    [
        "empty",
        "blank",
        "UTF-16",
        "invalid UTF-8",
        "501 levels",
        "NaN",
        "torn",
        "torn last line",
        "torn array",
        "[]",
        "mixed array",
        "null",
        "garbage",
        "objects one after another without --ndjson",
    ],
)
def test_input_that_is_refused_from_a_pipe(run, server, name):
    content, given, words = BAD_INPUT[name]
    result = run("--stdin", *(given or ()), stdin=content, server=server, secrets=[MARK])
    assert_fails(result, 4, "^" + PREFIX + STDIN, *words)
    assert server.connections == 0


@pytest.mark.parametrize("argv", [JSON, NDJSON], ids=["json", "ndjson"])
@pytest.mark.parametrize("pipe", [False, True], ids=["file", "pipe"])
def test_input_a_100_mb_line(run, server, put, argv, pipe):
    content = MARKED.replace(MARK.encode("ascii"), MARK.encode("ascii") + b"x" * 100000000)
    if pipe:
        result = run("--stdin", *argv, stdin=content, server=server, secrets=[MARK], timeout=60)
    else:
        result = run("--file", put(content), *argv, server=server, secrets=[MARK], timeout=60)
    assert_fails(result, 4, "16")
    assert server.connections == 0


@pytest.mark.parametrize(
    "path, words",
    [
        pytest.param(".", ["directory"], id="directory"),
        pytest.param("missing", ["missing"], id="missing"),
        pytest.param("missing/file", ["missing/file"], id="missing directory"),
        pytest.param("/dev/null", [], id="/dev/null"),
        pytest.param("/proc/self/mem", ["/proc/self/mem"], id="unreadable (EIO)"),
        pytest.param("n" * 300, [], id="name too long"),
    ],
)
@pytest.mark.parametrize("argv", [JSON, NDJSON], ids=["json", "ndjson"])
def test_input_paths(run, server, path, words, argv):
    if path.startswith("/") and not os.path.exists(path):
        pytest.skip("no %s here" % path)
    assert_fails(run("--file", path, *argv, server=server), 4, *words)
    assert server.connections == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_input_unreadable_file(run, server, put, tmp_path):
    put([event()])
    (tmp_path / "events.ndjson").chmod(0)
    assert_fails(run("--file", "events.ndjson", "--ndjson", server=server), 4, "events.ndjson")
    assert server.connections == 0


@pytest.mark.skipif(os.name != "posix", reason="closes a descriptor in a shell")
@pytest.mark.parametrize("argv", [["--stdin"], ["--stdin", "--ndjson"], ["--file", "-"]])
def test_input_closed_standard_input(run, server, argv):
    assert_fails(run(*argv, server=server, redirect="<&-"), 4)
    assert server.connections == 0


GOOD_INPUT = {  # id: (content, argv, records)
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, ANY, [GOOD]),
    "CRLF": (GOOD + b"\r\n" + GOOD + b"\r\n", NDJSON, [GOOD, GOOD]),
    "CRLF around one object": (b"\r\n" + GOOD + b"\r\n", ANY, [GOOD]),
    "LF and CRLF mixed": (GOOD + b"\n" + GOOD + b"\r\n" + GOOD, NDJSON, [GOOD] * 3),
    "blank lines": (b"\n\n" + GOOD + b"\n \t\r\n\r\n" + GOOD + b"\n\n", NDJSON, [GOOD, GOOD]),
    "no final newline": (GOOD + b"\n" + GOOD, NDJSON, [GOOD, GOOD]),
    "blanks around": (b" \t" + GOOD + b" \t\n", ANY, [GOOD]),
    "array": (b"[" + GOOD + b"]", JSON, [GOOD]),
    "array over lines": (
        b"\xef\xbb\xbf\r\n[\r\n" + GOOD + b"\r\n,\r\n" + GOOD + b"\r\n]\r\n",
        JSON,
        [GOOD, GOOD],
    ),
    "U+2028 and U+0085 inside strings": (
        line(message="a\u2028b\u2029c\u0085d"),
        ANY,
        [line(message="a\u2028b\u2029c\u0085d")],
    ),
    "duplicate keys": (GOOD[:-1] + b',"message":"last"}', ANY, [GOOD[:-1] + b',"message":"last"}']),
    "500 levels": (deep(500), NDJSON, [deep(500)]),
    "an integer of 4300 digits": (number(b"9" * 4300), ANY, [number(b"9" * 4300)]),
    "1e308": (number(b"1e308"), ANY, [number(b"1e308")]),
    "a number too small": (number(b"1e-999"), ANY, [number(b"1e-999")]),
    "escaped surrogates": (
        line(message="x").replace(b'"x"', b'"\\ud83d\\ude80 \\ud800"'),
        ANY,
        [line(message="x").replace(b'"x"', b'"\\ud83d\\ude80 \\ud800"')],
    ),
    "noncharacters and astral planes": (
        line(message="\uffff\U0001f680"),
        ANY,
        [line(message="\uffff\U0001f680")],
    ),
    "braces inside strings": (line(message='}{][",\\'), ANY, [line(message='}{][",\\')]),
    "a record of 1 MB": (line(message="x" * 1000000), ANY, [line(message="x" * 1000000)]),
}
GOOD_CASES = [
    pytest.param(
        content,
        argv,
        records,
        id="%s%s" % (name, " (ndjson)" if given is ANY and argv else ""),
        marks=[pytest.mark.full] if given is ANY and not argv else [],
    )
    for name, (content, given, records) in GOOD_INPUT.items()
    for argv in ((JSON, NDJSON) if given is ANY else (given,))
]


@pytest.mark.parametrize("content, argv, records", GOOD_CASES)
def test_input_that_is_accepted(run, server, put, content, argv, records):
    assert_silent_success(run("--file", put(content), *argv, server=server))
    assert server.raw_records == records


@pytest.mark.parametrize(
    "name",
    [
        "byte order mark",
        "CRLF",
        "blank lines",
        "array over lines",
        "500 levels",
        "U+2028 and U+0085 inside strings",
        "a record of 1 MB",
    ],
)
def test_input_that_is_accepted_from_a_pipe(run, server, name):
    content, given, records = GOOD_INPUT[name]
    assert_silent_success(run("--stdin", *(given or ()), stdin=content, server=server))
    assert server.raw_records == records


def test_the_last_of_duplicate_keys_is_the_one_that_is_checked(run, server, put):
    content = GOOD[:-1] + b',"severity":"loud"}'
    assert_fails(run("--file", put(content), "--ndjson", server=server), 1, "events.ndjson:1: severity")
    assert server.connections == 0


@pytest.mark.parametrize(
    "argv, content, line_number",
    [
        (NDJSON, GOOD + b"\n\r\n\n" + GOOD + b"\n{torn\n" + GOOD, 5),
        (NDJSON, GOOD + b"\r\n" + b"\xff\n" + GOOD, 2),
        (NDJSON, (GOOD + b"\n") * 5000 + b"x", 5001),
        (JSON, b"[\n" + GOOD + b",\n\n" + GOOD + b",\n{torn}]", 5),
    ],
    ids=["blank lines", "UTF-8", "5001", "array"],
)
@pytest.mark.parametrize("pipe", [False, True], ids=["file", "pipe"])
def test_a_malformed_line_is_named_by_its_number(run, server, put, argv, content, line_number, pipe):
    if pipe:
        result = run("--stdin", *argv, stdin=content, server=server)
    else:
        result = run("--file", put(content, "events.x"), *argv, server=server)
    assert_fails(result, 4, "^%s%s:%d:" % (PREFIX, STDIN if pipe else r"events\.x", line_number))
    assert server.connections == 0


# ---- validation ------------------------------------------------------------------------------------------

INVALID = {  # id: (overrides, field, words)
    **{
        "%s %s" % (field.replace("__", "."), name): ({field: value}, field.replace("__", "."), [])
        for field in (
            "source__system",
            "workflow__id",
            "actor__type",
            "actor__id",
            "severity",
            "status",
            "message",
        )
        for name, value in (("missing", MISSING), ("a number", 5))
    },
    **{
        "%s a number" % field.replace("__", "."): ({field: 5}, field.replace("__", "."), ["string"])
        for field in (
            "source__env",
            "workflow__name",
            "workflow__run_id",
            "workflow__step_id",
            "actor__display_name",
        )
    },
    **{"%s a list" % field: ({field: []}, field, ["object"]) for field in ("metadata", "extra")},
    **{
        "%s %s" % (field, name): ({field: value}, field, [])
        for field in ("source", "workflow", "actor")
        for name, value in (("missing", MISSING), ("a string", "x"))
    },
    "severity loud": (
        {"severity": "loud"},
        "severity",
        [r'must be one of debug, info, warn, error \(got "loud"\)'],
    ),
    "severity INFO": ({"severity": "INFO"}, "severity", [r'got "INFO"']),
    "severity eror": ({"severity": "eror"}, "severity", [r'got "eror"']),
    "status fine": (
        {"status": "fine"},
        "status",
        [r'must be one of ok, failed, skipped, timeout, retrying, unknown \(got "fine"'],
    ),
    "message empty": ({"message": ""}, "message", []),
    "message null": ({"message": None}, "message", []),
    "timestamp without a zone": ({"timestamp": "2025-01-01T00:00:00"}, "timestamp", []),
    "timestamp on 30 February": ({"timestamp": "2025-02-30T00:00:00Z"}, "timestamp", []),
    "timestamp a number": ({"timestamp": 1735689600}, "timestamp", []),
    "timestamp empty": ({"timestamp": ""}, "timestamp", []),
    "unknown field": ({"sevrity": "info"}, "sevrity", ["severity", "metadata"]),
    "unknown field in workflow": ({"workflow__nmae": "x"}, r"workflow\.nmae|nmae", ["name", "metadata"]),
    "unknown field in actor": ({"actor__name": "x"}, r"actor\.name|name", ["metadata"]),
    "unknown field, like nothing": ({"zzz": 1}, "zzz", ["metadata"]),
    "field in the wrong place": ({"run_id": "x"}, "run_id", []),
}


@pytest.mark.parametrize("overrides, field, words", table(INVALID))
def test_an_invalid_record_is_named_by_line_and_field_and_nothing_is_sent(
    run, server, put, overrides, field, words
):
    content = GOOD + b"\n" + line(**overrides) + b"\n" + GOOD + b"\n"
    result = run("--file", put(content), "--ndjson", server=server)
    assert_fails(result, 1, r"^%sevents\.ndjson:2: .*(%s)" % (PREFIX, field), *words)
    assert server.connections == 0


@pytest.mark.both_forms
def test_the_message_names_file_line_field_and_value(run, server, put):
    records = [*events(150), event(severity="loud"), *events(5)]
    result = run("--file", put(records), "--ndjson", server=server)
    assert result.code == 1
    assert result.err.startswith(
        PREFIX + 'events.ndjson:151: severity: must be one of debug, info, warn, error (got "loud")'
    )
    assert server.connections == 0


def test_the_empty_record_is_invalid(run, server, put):
    for content, argv in ((b"{}", []), (b"[{}]", []), (b"{}\n", ["--ndjson"])):
        assert_fails(run("--file", put(content), *argv, server=server), 1)
    assert server.connections == 0


def test_an_invalid_record_of_an_array_is_found(run, server, put):
    content = json.dumps([event(), event(severity="loud")], indent=1).encode("ascii")
    assert_fails(
        run("--file", put(content, "a.json"), server=server), 1, r"a\.json:\d+: severity: ", '"loud"'
    )
    assert server.connections == 0


def test_what_is_quoted_is_short_and_printable(run, server, put):
    content = line(severity="\x1b[31m\n\u202e" + "x" * 5000)
    result = run("--file", put(content), "--ndjson", server=server)
    assert_fails(result, 1, "severity")
    assert len(result.err) < 600
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", result.err)


def test_an_unknown_field_is_quoted_short_and_printable(run, server, put):
    result = run("--file", put(line(**{"\x1b" + "y" * 5000: 1})), "--ndjson", server=server)
    assert_fails(result, 1)
    assert len(result.err) < 600
    assert "\x1b" not in result.err


def test_empty_optional_strings_and_nulls_are_accepted(run, server, put):
    record = event(source__env="", workflow__run_id="", workflow__name=None, metadata=None, extra=None)
    assert_silent_success(run("--file", put([record]), "--ndjson", server=server))
    [arrived] = server.records
    # A null is an absent value: it may stay or go.
    arrived["workflow"].setdefault("name", None)
    assert {"metadata": None, "extra": None, **arrived} == record


def test_timestamps_that_are_good(run, server, put):
    stamps = [
        "2024-02-29T00:00:00Z",
        "2000-02-29T23:59:59.999999999Z",
        "0001-01-01T00:00:00Z",
        "9999-12-31T23:59:59-23:59",
        "2025-06-30T23:59:60Z",
        "2025-01-01T00:00:00+14:00",
        "2025-01-01T00:00:00-00:00",
        "2025-01-01T00:00:00.1Z",
    ]
    records = [event(timestamp=stamp) for stamp in stamps]
    assert_silent_success(run("--file", put(records), "--ndjson", server=server))
    assert server.records == records


# ---- completion of records -------------------------------------------------------------------------------

ALL = {
    "source_system": "S",
    "source_env": "E",
    "workflow_id": "W",
    "workflow_name": "N",
    "run_id": "R",
    "step_id": "P",
    "actor_type": "T",
    "actor_id": "A",
    "actor_display": "D",
    "severity": "debug",
    "status": "skipped",
    "message": "M",
    "timestamp": "2020-01-01T00:00:00Z",
}
FULL: Dict[str, Any] = {
    "timestamp": "2020-01-01T00:00:00Z",
    "source": {"system": "S", "env": "E"},
    "workflow": {"id": "W", "name": "N", "run_id": "R", "step_id": "P"},
    "actor": {"type": "T", "id": "A", "display_name": "D"},
    "severity": "debug",
    "status": "skipped",
    "message": "M",
}
COMPLETED = {  # id: (defaults, record, what goes out)
    "the empty record": (ALL, {}, FULL),
    "nulls are absent": (
        ALL,
        {
            "source": None,
            "workflow": {"id": None},
            "severity": None,
            "metadata": None,
            "timestamp": None,
            "actor": {},
        },
        FULL,
    ),
    "what the record says wins": (ALL, event(), event()),
    "names stick to the workflow's id": (
        ALL,
        {**FULL, "workflow": {"id": "other"}},
        {**FULL, "workflow": {"id": "other"}},
    ),
    "names follow an equal workflow id": (ALL, {**FULL, "workflow": {"id": "W"}}, FULL),
    "names follow an absent workflow id": (
        ALL,
        {**FULL, "workflow": {"run_id": "mine"}},
        {**FULL, "workflow": {**FULL["workflow"], "run_id": "mine"}},
    ),
    "the environment sticks to the system": (
        ALL,
        {**FULL, "source": {"system": "other"}},
        {**FULL, "source": {"system": "other"}},
    ),
    "the environment follows an equal system": (ALL, {**FULL, "source": {"system": "S"}}, FULL),
    "the display name sticks to the actor's id": (
        ALL,
        {**FULL, "actor": {"type": "T", "id": "other"}},
        {**FULL, "actor": {"type": "T", "id": "other"}},
    ),
    "the display name follows an equal id": (
        ALL,
        {**FULL, "actor": {"type": "x", "id": "A"}},
        {**FULL, "actor": {"type": "x", "id": "A", "display_name": "D"}},
    ),
    "the actor's type is filled in for any id": (
        ALL,
        {**FULL, "actor": {"id": "other"}},
        {**FULL, "actor": {"id": "other", "type": "T"}},
    ),
    "a name without a default id does not stick to the record's": (
        {"workflow_name": "N", "source_env": "E", "actor_display": "D"},
        event(),
        event(),
    ),
    "an empty string is a value": (
        ALL,
        {**FULL, "source": {"system": "S", "env": ""}},
        {**FULL, "source": {"system": "S", "env": ""}},
    ),
    "metadata merges key by key": (
        {"metadata": '{"a":1,"b":{"x":1}}', "extra": '{"e":1}'},
        event(metadata={"b": {"y": 2}, "c": 3}),
        event(metadata={"a": 1, "b": {"y": 2}, "c": 3}, extra={"e": 1}),
    ),
    "a null under metadata is the record's word": (
        {"metadata": '{"a":1}'},
        event(metadata={"a": None}),
        event(metadata={"a": None}),
    ),
    "metadata where the record has none": ({"metadata": '{"a":1}'}, event(), event(metadata={"a": 1})),
}


@pytest.mark.parametrize("defaults, record, wanted", table(COMPLETED))
@pytest.mark.parametrize("source", ["flags", pytest.param("environment", marks=pytest.mark.full)])
def test_records_are_completed_from_flags_and_environment(run, server, put, defaults, record, wanted, source):
    pairs = {name.replace("_", "-"): value for name, value in defaults.items()}
    argv, env = [], {}
    if source == "flags":
        argv = [word for name, value in pairs.items() for word in ("--" + name, value)]
    else:
        env = {variable(name): value for name, value in pairs.items()}
    assert_silent_success(run("--file", put([record]), "--ndjson", *argv, env=env, server=server))
    assert server.records == [wanted]


def test_a_record_without_a_timestamp_gets_now(run, server, put):
    records = [event(timestamp=MISSING), event(timestamp=None), event()]
    assert_silent_success(run("--file", put(records), "--ndjson", server=server))
    stamps = [record["timestamp"] for record in server.records]
    assert NOW.fullmatch(stamps[0]) and NOW.fullmatch(stamps[1]) and stamps[2] == event()["timestamp"]


def test_a_completed_record_keeps_its_numbers_and_text(run, server, put):
    raw = line(timestamp=MISSING, metadata={"n": 0}).replace(
        b'{"n":0}', b'{"n":' + b"1234567890" * 5 + b',"d":1.5,"t":"\\u2028\\ud800\\"","k":{"z":1,"a":2}}'
    )
    assert_silent_success(run("--file", put(raw), "--ndjson", server=server))
    [record] = server.records
    assert record["metadata"] == json.loads(raw.decode("utf-8"))["metadata"]
    assert list(record["metadata"]["k"]) == ["z", "a"]


def test_complete_and_incomplete_records_keep_their_order(run, server, put):
    records = [event(message=str(n), **({} if n % 3 else {"source": MISSING})) for n in range(250)]
    assert_silent_success(run("--file", put(records), "--ndjson", "--source-system", "filled", server=server))
    assert [record["message"] for record in server.records] == [str(n) for n in range(250)]
    assert {record["source"]["system"] for record in server.records[::3]} == {"filled"}
    assert sizes(server) == [100, 100, 50]


def test_a_single_object_is_completed_too(run, server, put):
    put(b"{}", "event.json")
    assert_silent_success(run("--file", "event.json", *FLAGS, server=server))
    assert [request.json for request in server.requests] == [event()]


# ---- transport: every row of the design's table ----------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 204, 205, 299])
def test_2xx_is_delivered(run, status):
    with StandIn(default=status) as server:
        assert_silent_success(run(*FLAGS, server=server))
    assert statuses(server) == [status]
    assert server.records == [event()]


@pytest.mark.parametrize("status", [429, 500, 501, 502, 503, 504, 507, 599])
def test_429_and_5xx_are_tried_again_and_then_exit_3(run, status):
    with StandIn(default=status) as server:
        result = run(*FLAGS, "--retries", "2", "--json", env=FAST, server=server)
    assert_fails(result, 3, str(status))
    assert statuses(server) == [status] * 3
    assert (result.summary["requests"], result.summary["retries"]) == (3, 2)
    assert (result.summary["read"], result.summary["delivered"], result.summary["undelivered"]) == (1, 0, 1)
    assert result.error["status"] == status


@pytest.mark.both_forms
def test_503_503_200_is_delivered(run):
    with StandIn(script=[503, 503, 200]) as server:
        result = run(*FLAGS, "--json", env=FAST, server=server)
    assert (result.code, result.err) == (0, "")
    assert statuses(server) == [503, 503, 200]
    assert len({request.body for request in server.requests}) == 1
    assert (result.summary["requests"], result.summary["retries"], result.summary["delivered"]) == (3, 2, 1)


@pytest.mark.parametrize("fault", ["RESET_AFTER", "CLOSE", "HALF_HEADERS"])
def test_a_request_without_an_answer_is_sent_again_whole(run, fault):
    with StandIn(script=[standin.FAULTS[fault]]) as server:
        assert_silent_success(run(*FLAGS, env=FAST, server=server))
    assert statuses(server) == [fault, 200]
    assert server.requests[0].raw_body == server.requests[1].raw_body
    assert server.records == [event()]


@pytest.mark.both_forms
def test_a_refused_connection_is_tried_again_and_then_exit_3(run):
    with RefusedPort() as refused_port:
        result = run(*FLAGS, "--base-url", refused_port.url, "--retries", "2", "--json", env=FAST)
    assert_fails(result, 3)
    assert result.summary["undelivered"] == 1
    assert result.summary["retries"] == 2


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 408, 409, 410, 415, 418, 422, 451, 499])
def test_any_other_status_is_final(run, status):
    with StandIn(default=status) as server:
        result = run(*FLAGS, "--json", env=FAST, server=server)
    assert_fails(result, 2, str(status))
    assert statuses(server) == [status]
    assert (result.summary["requests"], result.summary["retries"], result.summary["undelivered"]) == (1, 0, 1)
    assert result.error["status"] == status


@pytest.mark.parametrize("status", [101, 300, 301, 302, 303, 304, 305, 307, 308, 399])
def test_redirects_and_their_kin_are_final(run, status):
    with StandIn() as other, StandIn(
        default=Reply(status, headers={"Location": other.url + "/x"}, body=b"")
    ) as server:
        result = run(*FLAGS, env=FAST, server=server)
    assert_fails(
        result, 2, str(status), *([re.escape(other.url + "/x")] if status in (301, 302, 307, 308) else [])
    )
    assert len(server.requests) == 1
    assert other.connections == 0


def test_where_a_redirect_points_is_quoted_short_printable_and_without_the_key(run):
    target = "http://127.0.0.1/?k=" + KEY + "\x1b[31m" + "z" * 5000
    with StandIn(default=Reply(302, headers={"Location": target})) as server:
        result = run(*FLAGS, server=server)
    assert_fails(result, 2, "302")
    assert len(result.err) < 600 and "\x1b" not in result.err


def test_413_on_a_batch_splits_it(run, put):
    def limit(server, sock, request):
        if len(request.json) > 30:
            reply = Reply(413)
        else:
            reply = Reply(server.acknowledge(request))
        sock.sendall(reply.head() + reply.body)
        return "keep"

    with StandIn(default=limit) as server:
        result = run("--file", put(events(100)), "--ndjson", "--json", env=FAST, server=server)
    assert (result.code, result.err) == (0, "")
    assert server.records == events(100)
    assert sizes(server) == [100, 50, 25, 25, 50, 25, 25]
    assert (result.summary["requests"], result.summary["retries"], result.summary["delivered"]) == (7, 0, 100)


@pytest.mark.parametrize("argv", [FLAGS, ["--file", "event.json"], ["--file", "events.ndjson", "--ndjson"]])
def test_413_on_a_single_event_is_final(run, put, argv):
    put(GOOD, "event.json")
    put(GOOD)
    with StandIn(default=413) as server:
        result = run(*argv, "--json", env=FAST, server=server)
    assert_fails(result, 2, "413")
    assert len(server.requests) == 1
    assert result.summary["undelivered"] == 1


def test_413_down_to_single_events_names_those_that_are_too_large(run, put):
    with StandIn(default=413) as server:
        result = run("--file", put(events(4)), "--ndjson", "--json", "--keep-going", env=FAST, server=server)
    assert result.code == 2
    assert sizes(server) == [4, 2, 1, 1, 2, 1, 1]
    assert result.summary["undelivered"] == 4


def test_the_servers_own_words_are_in_the_error(run):
    with StandIn(default=Reply(422, body=b'{"error":"quota of purple things exceeded"}')) as server:
        assert_fails(run(*FLAGS, server=server), 2, "422", "quota of purple things exceeded")


def test_the_servers_words_are_short_printable_and_without_the_key(run):
    body = ("\x1b[2J\r\n\u202e%s %s" % (KEY, "w" * 5000)).encode("utf-8")
    with StandIn(default=Reply(400, reason="Bad " + KEY, body=body)) as server:
        result = run(*FLAGS, "--verbose", server=server)
    assert result.code == 2
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", result.err)
    assert max(map(len, result.err.splitlines())) < 700
    # The key is cut out before the words are cut off: no part of it may be left at the edge.
    assert KEY[:8] not in result.err


@pytest.mark.parametrize("pad", range(186, 201, 7))
def test_a_key_at_the_edge_of_what_is_quoted_leaves_no_part(run, pad):
    with StandIn(default=Reply(400, body=b"y" * pad + KEY.encode("ascii"))) as server:
        assert KEY[:5] not in run(*FLAGS, server=server).err


def test_a_batch_that_fails_ends_the_run_and_names_its_records(run, put):
    with StandIn(script=[200, 400]) as server:
        result = run("--file", put(events(350)), "--ndjson", "--json", env=FAST, server=server)
    assert_fails(result, 2, "400", r"\b100\b", "records 101-350")
    assert statuses(server) == [200, 400]
    assert [result.summary[name] for name in ("read", "delivered", "undelivered")] == [350, 100, 250]


def test_keep_going_skips_a_refused_batch(run, put):
    with StandIn(script=[200, 400]) as server:
        result = run(
            "--file",
            put(events(350)),
            "--ndjson",
            "--keep-going",
            "--json",
            "--undelivered",
            "left",
            env=FAST,
            server=server,
        )
    assert result.code == 2
    assert statuses(server) == [200, 400, 200, 200]
    assert server.records == events(350)[:100] + events(350)[200:]
    assert [result.summary[name] for name in ("read", "delivered", "undelivered")] == [350, 250, 100]
    assert re.search("records 101-200", result.err), result


@pytest.mark.parametrize("status", [401, 403, 404])
def test_401_403_404_end_the_run_even_with_keep_going(run, put, status):
    with StandIn(script=[200, status]) as server:
        result = run(
            "--file", put(events(350)), "--ndjson", "--keep-going", "--json", env=FAST, server=server
        )
    assert result.code == 2
    assert statuses(server) == [200, status]
    assert [result.summary[name] for name in ("delivered", "undelivered")] == [100, 250]


def test_exhausted_retries_of_a_later_batch_are_exit_3(run, put):
    with StandIn(script=[200], default=503) as server:
        result = run(
            "--file", put(events(250)), "--ndjson", "--retries", "1", "--json", env=FAST, server=server
        )
    assert_fails(result, 3, "503", "records 101-250")
    assert statuses(server) == [200, 503, 503]


def test_a_retry_within_a_run_goes_on_with_the_next_batch(run, put):
    with StandIn(script=[200, 503, 500, 200]) as server:
        assert_silent_success(run("--file", put(events(250)), "--ndjson", env=FAST, server=server))
    assert server.records == events(250)
    assert statuses(server) == [200, 503, 500, 200, 200]


# ---- Retry-After -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_seconds_is_a_lower_bound(run, status):
    with StandIn(script=[Reply(status, headers={"Retry-After": "1"})]) as server:
        assert_silent_success(run(*FLAGS, env=FAST, server=server))
    assert 1.0 <= gaps(server)[0] < 15


def test_retry_after_date_is_a_lower_bound(run):
    class Later(Reply):
        def head(self):
            # Whole seconds: this is between 1 and 2 s away when it is sent.
            self.headers = [("Retry-After", formatdate(time.time() + 2, usegmt=True))]
            return super().head()

    with StandIn(script=[Later(429)]) as server:
        assert_silent_success(run(*FLAGS, env=FAST, server=server))
    assert 0.9 <= gaps(server)[0] < 15


@pytest.mark.parametrize(
    "value",
    [
        "0",
        "Wed, 21 Oct 2015 07:28:00 GMT",
        "-5",
        "nan",
        "inf",
        "1_0",
        "5,10",
        "9" * 5000,
        "5000000000000.5",
        "Fri, 31 Dec 99999 23:59:59 GMT",
        "",
        "soon",
        "\u0661\u0660",
        "0x10",
        "1e1",
        "+10",
        "10s",
        "Wed, 99 Oct 2099 07:28:00 GMT",
    ],
)
def test_retry_after_that_says_nothing_is_ignored(run, value):
    with StandIn(script=[Reply(429, headers={"Retry-After": value})]) as server:
        result = run(*FLAGS, env=FAST, server=server)
    assert_silent_success(result)
    assert len(server.requests) == 2
    assert result.seconds < 4.5


@pytest.mark.parametrize(
    "argv, value",
    [([], "999999"), ([], "61"), ([], "Fri, 31 Dec 2100 23:59:59 GMT"), (["--deadline", "10s"], "30")],
    ids=["999999", "61", "date in 2100", "past the deadline"],
)
def test_retry_after_that_is_too_far_ends_the_tries_at_once(run, argv, value):
    with StandIn(default=Reply(503, headers={"Retry-After": value})) as server:
        result = run(*FLAGS, *argv, env=FAST, server=server)
    assert_fails(result, 3, "(?i)retry-after|wait|deadline")
    assert len(server.requests) == 1
    assert result.seconds < 8


# ---- idempotency keys ------------------------------------------------------------------------------------


def keys(server):
    """The idempotency keys of the requests."""
    return [request.headers.get("idempotency-key") for request in server.requests]


@pytest.mark.parametrize(
    "argv, env", [(["--idempotency-key", "order 7"], {}), ([], {"PACKTRACK_IDEMPOTENCY_KEY": "order 7"})]
)
def test_an_idempotency_key_goes_as_given_with_the_one_request_of_a_run(run, argv, env):
    with StandIn(script=[503, standin.RESET_AFTER, 200]) as server:
        assert_silent_success(run(*FLAGS, *argv, env={**FAST, **env}, server=server))
    assert keys(server) == ["order 7"] * 3


@pytest.mark.parametrize("content, argv", [(events(30), ["--ndjson"]), (GOOD, [])])
def test_an_idempotency_key_goes_as_given_with_one_batch(run, server, put, content, argv):
    assert_silent_success(run("--file", put(content), *argv, "--idempotency-key", "k", server=server))
    assert keys(server) == ["k"]


@pytest.mark.parametrize("extra", [[], ["--gzip"]], ids=["plain", "gzip"])
def test_several_requests_carry_ranges_and_hashes(run, put, extra):
    with StandIn(script=[503]) as server:
        assert_silent_success(
            run(
                "--file",
                put(events(250)),
                "--ndjson",
                "--idempotency-key",
                "k",
                *extra,
                env=FAST,
                server=server,
            )
        )
    found = keys(server)
    assert found[0] == found[1]
    for key, request, span in zip(found[1:], server.requests[1:], ("1-100", "101-200", "201-250")):
        bodies = {request.body, request.raw_body} if extra else {request.body}
        assert key in ["k-%s-%s" % (span, hashlib.sha256(body).hexdigest()[:8]) for body in bodies]


def test_a_stream_carries_ranges_even_with_one_request(run, server):
    result = run(
        "--stdin", "--ndjson", "--async", "--idempotency-key", "k", stdin=ndjson(events(3)), server=server
    )
    assert_silent_success(result)
    assert keys(server) == ["k-1-3-" + hashlib.sha256(server.requests[0].body).hexdigest()[:8]]


@pytest.mark.parametrize("extra", [[], ["--gzip"], ["--async"]], ids=["plain", "gzip", "async"])
def test_auto_is_the_hash_of_the_uncompressed_body(run, put, extra):
    with StandIn(script=[200, 503]) as server:
        assert_silent_success(
            run(
                "--file",
                put(events(250)),
                "--ndjson",
                "--idempotency-key",
                "auto",
                *extra,
                env=FAST,
                server=server,
            )
        )
    assert keys(server) == [hashlib.sha256(request.body).hexdigest() for request in server.requests]
    assert len(set(keys(server))) == 3


def test_after_a_split_no_two_bodies_share_a_key(run, put):
    with StandIn(script=[413]) as server:
        assert_silent_success(
            run("--file", put(events(10)), "--ndjson", "--idempotency-key", "k", env=FAST, server=server)
        )
    assert sizes(server) == [10, 5, 5]
    assert len(set(keys(server))) == 3
    assert [re.sub("-[0-9a-f]{8}$", "", key) for key in keys(server)[1:]] == ["k-1-5", "k-6-10"]


# ---- --json ----------------------------------------------------------------------------------------------


@pytest.mark.both_forms
@pytest.mark.parametrize("argv, env", [(["--json"], {}), ([], {"PACKTRACK_JSON": "true"})])
def test_json_is_one_line_on_standard_output(run, server, put, argv, env):
    result = run("--file", put(events(250)), "--ndjson", *argv, env=env, server=server)
    assert (result.code, result.err) == (0, "")
    assert result.out.count("\n") == 1 and result.out.endswith("}\n")
    summary = json.loads(result.out)
    seconds = summary.pop("seconds")
    assert 0 <= seconds <= result.seconds
    bodies = sum(len(request.raw_body) for request in server.requests)
    assert bodies <= summary.pop("bytes_sent") <= bodies + 3000
    assert summary == {
        "ok": True,
        "exit_code": 0,
        "read": 250,
        "delivered": 250,
        "undelivered": 0,
        "invalid": 0,
        "requests": 3,
        "retries": 0,
        "error": None,
    }


def test_json_tells_what_failed(run, put):
    with StandIn(default=Reply(422, body=b'{"error":"purple"}')) as server:
        result = run("--file", put(events(3)), "--ndjson", "--json", server=server)
    assert_fails(result, 2)
    error = result.error
    assert error["status"] == 422
    assert isinstance(error["kind"], str) and "purple" in error["message"]


@pytest.mark.parametrize(
    "argv, content, code, counts",
    [
        (
            ["--ndjson"],
            GOOD + b"\n" + line(severity="loud") + b"\n" + GOOD,
            1,
            {"invalid": 1, "delivered": 0},
        ),
        (["--ndjson"], GOOD + b"\n{torn", 4, {"delivered": 0}),
        ([], b"", 4, {"read": 0}),
    ],
    ids=["invalid", "torn", "empty"],
)
def test_json_accounts_for_input_that_is_refused(run, server, put, argv, content, code, counts):
    result = run("--file", put(content), *argv, "--json", server=server)
    assert_fails(result, code)
    assert {name: result.summary[name] for name in counts} == counts
    assert (result.summary["requests"], result.summary["bytes_sent"]) == (0, 0)
    if "invalid" in counts:
        assert result.error["where"].startswith("events.ndjson:2")


@pytest.mark.parametrize("argv, where", [(["--timeout", "-1"], "--timeout"), (["--api-kye", "x"], None)])
def test_json_is_printed_for_usage_errors_too(run, server, argv, where):
    result = run("--json", *FLAGS, *argv, server=server)
    assert_fails(result, 1)
    if where:
        assert result.error["where"] == where


def test_json_with_verbose_keeps_standard_output_to_one_line(run, server):
    result = run(*FLAGS, "--json", "--verbose", server=server)
    assert result.out.count("\n") == 1
    assert result.err != ""


# ---- --verbose -------------------------------------------------------------------------------------------


@pytest.mark.both_forms
@pytest.mark.parametrize("argv, env", [(["--verbose"], {}), (["-v"], {}), ([], {"PACKTRACK_VERBOSE": "1"})])
def test_verbose_tells_attempts_waits_and_statuses_but_no_payload(run, argv, env):
    with StandIn(script=[503, 200]) as server:
        result = run(
            *flags(message=MARK),
            "--metadata",
            '{"%s":1}' % MARK,
            *argv,
            env={**FAST, **env},
            server=server,
            secrets=[MARK],
        )
    assert (result.code, result.out) == (0, "")
    assert "503" in result.err and "200" in result.err
    assert re.search("(?i)attempt|try|request", result.err)
    assert re.search("(?i)wait|retry|again|backoff", result.err)


def test_verbose_never_shows_payload_or_key_on_failure(run, put):
    with StandIn(script=[500, standin.CLOSE, 404]) as server:
        result = run(
            "--file",
            put([event(message=MARK)] * 3),
            "--ndjson",
            "-v",
            env=FAST,
            server=server,
            secrets=[MARK],
        )
    assert result.code == 2


# ---- --health --------------------------------------------------------------------------------------------


@pytest.mark.both_forms
@pytest.mark.parametrize(
    "argv, env", [(["--health"], {}), (["--health", *FLAGS], {}), ([], {"PACKTRACK_HEALTH": "1"})]
)
def test_health_asks_and_sends_nothing(run, server, argv, env):
    assert_silent_success(run(*argv, env=env, server=server))
    [request] = server.requests
    assert (request.method, request.path, request.raw_body) == ("GET", "/api/health", b"")
    assert request.headers["x-packtrack-key"] == KEY
    assert server.records == []


@pytest.mark.parametrize("status", [200, 204, 299])
def test_health_is_any_2xx(run, status):
    with StandIn(default=status) as server:
        assert_silent_success(run("--health", server=server))


@pytest.mark.parametrize("status", [301, 400, 401, 404, 500, 503])
def test_health_that_is_not_2xx_is_exit_1_and_why(run, status):
    with StandIn(default=status) as server:
        assert_fails(run("--health", env=FAST, server=server), 1, str(status))
    assert {request.method for request in server.requests} == {"GET"}


def test_health_of_an_unreachable_server_is_exit_1(run):
    with RefusedPort() as port:
        assert_fails(run("--health", "--base-url", port.url, env=FAST), 1)


def test_health_needs_a_key(run, server):
    assert_fails(run("--health", key=False, server=server), 1, "PACKTRACK_API_KEY")
    assert server.connections == 0


@pytest.mark.parametrize(
    "argv, env",
    [
        (["--health-path", "/healthz"], {}),
        ([], {"PACKTRACK_HEALTH_PATH": "/healthz"}),
        (["--health-path", "healthz"], {"PACKTRACK_HEALTH_PATH": "/other"}),
    ],
)
def test_health_path(run, argv, env):
    with StandIn(health="/healthz", prefix="/p") as server:
        assert_silent_success(run("--health", *argv, env=env, server=server))
    assert [request.path for request in server.requests] == ["/p/healthz"]


@pytest.mark.parametrize("status", [200, 503, 401])
def test_health_enable_probes_before_sending_and_changes_nothing(run, status):
    for verbose in ([], ["--verbose"]):
        with StandIn(script=[status]) as server:
            result = run(*FLAGS, *verbose, env={**FAST, "PACKTRACK_HEALTH_ENABLE": "true"}, server=server)
        assert result.code == 0
        assert [request.method for request in server.requests] == ["GET", "POST"]
        if verbose:
            assert re.search("(?i)health", result.err) and str(status) in result.err
        else:
            assert (result.out, result.err) == ("", "")


# ---- --dry-run, --output ---------------------------------------------------------------------------------


@pytest.mark.both_forms
@pytest.mark.parametrize("argv, env", [(["--dry-run"], {}), ([], {"PACKTRACK_DRY_RUN": "1"})])
def test_dry_run_validates_and_sends_nothing_and_needs_no_key(run, server, put, argv, env):
    put([event(), event(severity="loud")], "bad")
    put(events(3))
    assert_silent_success(run(*FLAGS, *argv, env=env, key=False, server=server))
    assert_silent_success(
        run("--file", "events.ndjson", "--ndjson", *argv, env=env, key=False, server=server)
    )
    assert_fails(
        run("--file", "bad", "--ndjson", *argv, env=env, key=False, server=server), 1, "bad:2: severity"
    )
    assert_fails(run("--file", "missing", *argv, env=env, key=False, server=server), 4)
    assert server.connections == 0


def test_dry_run_accounts(run, server, put):
    result = run("--file", put(events(3)), "--ndjson", "--dry-run", "--json", server=server)
    assert (result.code, result.summary["read"], result.summary["requests"]) == (0, 3, 0)
    assert server.connections == 0


@pytest.mark.both_forms
def test_output_appends_completed_records_as_ndjson(run, server, put, tmp_path):
    raw = b'[{"severity":"info",\n  "message": "x"},' + GOOD + b"]"
    argv = ["--file", put(raw, "in.json"), "--output", "out.ndjson", *flags(message=None, severity=None)]
    for _ in range(2):
        assert_silent_success(run(*argv, key=False, server=server))
    lines = (tmp_path / "out.ndjson").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(text.decode("utf-8")) for text in lines] == [event(message="x"), event()] * 2
    assert lines[1] == GOOD
    assert server.connections == 0


def test_output_dash_is_standard_output(run, server, put):
    result = run("--file", put(events(250)), "--ndjson", "--output", "-", key=False, server=server)
    assert (result.code, result.err) == (0, "")
    assert result.out_bytes == ndjson(events(250))
    result = run(*FLAGS, env={"PACKTRACK_OUTPUT": "-"}, key=False, server=server)
    assert [json.loads(text) for text in result.out.splitlines()] == [event()]
    assert server.connections == 0


def test_output_of_a_record_over_several_lines_is_one_line(run, put):
    result = run("--file", put(json.dumps(event(), indent=2).encode("ascii")), "--output", "-", key=False)
    assert result.out.count("\n") == 1
    assert json.loads(result.out) == event()


def test_output_that_is_taken_back_arrives(run, server, put):
    assert_silent_success(run("--file", put(events(30)), "--ndjson", "--output", "carried", key=False))
    assert_silent_success(run("--file", "carried", "--ndjson", server=server))
    assert server.records == events(30)


def test_output_writes_nothing_when_the_input_is_refused(run, put, tmp_path):
    put([event(), event(severity="loud")])
    assert_fails(run("--file", "events.ndjson", "--ndjson", "--output", "out"), 1)
    assert not (tmp_path / "out").exists() or (tmp_path / "out").read_bytes() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "argv, redirect", [(["--output", "/dev/full"], None), (["--output", "-"], ">/dev/full")]
)
def test_output_that_cannot_be_written_is_exit_4(run, put, argv, redirect):
    result = run("--file", put(events(3)), "--ndjson", *argv, redirect=redirect, key=False)
    assert_fails(result, 4)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_not_delivered(run, put):
    result = run("--file", put(events(3)), "--ndjson", "--output", "/dev/full", "--json", key=False)
    assert (result.code, result.summary["delivered"]) == (4, 0)


@pytest.mark.parametrize("path", [".", "missing/out"])
def test_output_to_a_path_that_cannot_be_opened_is_an_error(run, path):
    result = run(*FLAGS, "--output", path, key=False)
    assert result.code in (1, 4)
    assert_fails(result, result.code)


# ---- --undelivered, --keep-going -------------------------------------------------------------------------


@pytest.mark.both_forms
@pytest.mark.parametrize(
    "argv, env", [(["--undelivered", "left"], {}), ([], {"PACKTRACK_UNDELIVERED": "left"})]
)
def test_undelivered_keeps_what_was_not_delivered_and_takes_it_back(run, put, tmp_path, argv, env):
    name = put(events(250))
    with StandIn(script=[200, 503], default=400) as server:
        result = run("--file", name, "--ndjson", "--json", *argv, env={**FAST, **env}, server=server)
        assert result.code == 2
        assert result.summary["undelivered"] == 150
        left = tmp_path / "left"
        assert left.read_bytes() == ndjson(events(250)[100:])
        if os.name == "posix":
            assert stat.S_IMODE(left.stat().st_mode) == 0o600
        delivered = list(server.records)
    with StandIn() as server:
        assert_silent_success(run("--file", "left", "--ndjson", server=server))
    assert delivered + server.records == events(250)


def test_undelivered_is_appended_to(run, put, tmp_path):
    with StandIn(default=400) as server:
        for _ in range(2):
            assert run(*FLAGS, "--undelivered", "left", server=server).code == 2
    assert [json.loads(text) for text in (tmp_path / "left").read_text().splitlines()] == [event(), event()]


def test_undelivered_is_not_created_when_all_is_delivered(run, server, put, tmp_path):
    assert_silent_success(run("--file", put(events(3)), "--ndjson", "--undelivered", "left", server=server))
    assert not (tmp_path / "left").exists()


def test_undelivered_of_a_record_over_several_lines_is_one_line(run, put, tmp_path):
    with StandIn(default=400) as server:
        assert (
            run(
                "--file",
                put(json.dumps(event(), indent=2).encode("ascii")),
                "--undelivered",
                "left",
                server=server,
            ).code
            == 2
        )
    [text] = (tmp_path / "left").read_text().splitlines()
    assert json.loads(text) == event()


@pytest.mark.parametrize("path", [".", "missing/left"])
def test_undelivered_that_cannot_be_written_is_exit_1_before_anything_is_sent(run, server, put, path):
    assert_fails(
        run("--file", put(events(3)), "--ndjson", "--undelivered", path, server=server), 1, "undelivered"
    )
    assert server.connections == 0


def test_a_refusal_at_the_door_writes_nothing_for_a_file(run, server, put, tmp_path):
    put([event(), event(severity="loud"), event()])
    assert_fails(run("--file", "events.ndjson", "--ndjson", "--undelivered", "left", server=server), 1)
    assert not (tmp_path / "left").exists()


@pytest.mark.parametrize("bad, code", [(line(severity="loud"), 1), (b"{torn", 4), (b"[1]", 4)])
def test_a_refusal_at_the_door_keeps_the_whole_of_a_pipe(run, server, tmp_path, bad, code):
    data = ndjson(events(3)) + bad + b"\n" + ndjson(events(2))
    result = run("--stdin", "--ndjson", "--undelivered", "left", "--json", stdin=data, server=server)
    assert_fails(result, code)
    assert sorted((tmp_path / "left").read_bytes().splitlines()) == sorted(data.splitlines())
    assert result.summary["read"] == 6
    assert server.connections == 0


@pytest.mark.both_forms
@pytest.mark.parametrize("argv, env", [(["--keep-going"], {}), ([], {"PACKTRACK_KEEP_GOING": "1"})])
def test_keep_going_skips_invalid_records(run, server, put, tmp_path, argv, env):
    put(ndjson(events(2)) + line(severity="loud") + b"\n" + ndjson(events(2)))
    result = run(
        "--file",
        "events.ndjson",
        "--ndjson",
        "--undelivered",
        "left",
        "--json",
        *argv,
        env=env,
        server=server,
    )
    assert result.code == 1
    assert re.search(r"events\.ndjson:3: severity", result.err), result
    assert server.records == events(2) * 2
    assert (tmp_path / "left").read_bytes() == line(severity="loud") + b"\n"
    assert [result.summary[name] for name in ("read", "delivered", "undelivered", "invalid")] == [5, 4, 0, 1]


@pytest.mark.parametrize("pipe", [False, True])
def test_keep_going_skips_lines_that_are_not_json(run, server, put, tmp_path, pipe):
    bad = b"{torn \xff " + MARK.encode("ascii")
    data = ndjson(events(2)) + bad + b"\n" + ndjson(events(2))
    argv = ["--stdin"] if pipe else ["--file", put(data)]
    result = run(
        *argv,
        "--ndjson",
        "--keep-going",
        "--undelivered",
        "left",
        "--json",
        stdin=data if pipe else None,
        server=server,
        secrets=[MARK],
    )
    assert result.code == 4
    assert server.records == events(2) * 2
    assert (tmp_path / "left").read_bytes() == bad + b"\n"
    assert [result.summary[name] for name in ("read", "delivered", "invalid")] == [5, 4, 1]


@pytest.mark.parametrize(
    "script, bad, code",
    [
        pytest.param([400], line(severity="loud"), 2, id="2 before 1"),
        pytest.param([400], b"{torn", 2, id="2 before 4"),
        pytest.param([], b"{torn\n" + line(severity="loud"), 4, id="4 before 1"),
        pytest.param([503], line(severity="loud") + b"\n{torn", 3, id="3 before 4 and 1"),
        pytest.param([503, 400], b"{torn", 2, id="2 before 3 and 4"),
    ],
)
def test_keep_going_exits_with_the_first_of_2_3_4_1(run, put, script, bad, code):
    put(ndjson(events(30)) + bad + b"\n")
    with StandIn(script=script) as server:
        result = run(
            "--file",
            "events.ndjson",
            "--ndjson",
            "--keep-going",
            "--retries",
            "0",
            "--batch-size",
            "10",
            "--json",
            env=FAST,
            server=server,
        )
    assert result.code == code
    assert len(server.records) == 30 - 10 * len(script)


# ---- --async ---------------------------------------------------------------------------------------------


@pytest.mark.both_forms
@pytest.mark.parametrize(
    "argv, env",
    [
        (["--async"], {}),
        ([], {"PACKTRACK_ASYNC": "1"}),
        (["--async", "--queue-capacity", "1"], {}),
        (["--async"], {"PACKTRACK_QUEUE_CAPACITY": "7", "PACKTRACK_FLUSH_INTERVAL": "1h"}),
    ],
)
def test_async_delivers_all_in_order(run, server, argv, env):
    result = run("--stdin", "--ndjson", "--json", *argv, stdin=ndjson(events(250)), env=env, server=server)
    assert (result.code, result.err) == (0, "")
    assert server.records == events(250)
    assert max(size for size in sizes(server)) <= 100
    assert [result.summary[name] for name in ("read", "delivered")] == [250, 250]


def test_async_full_queue_waits_and_drops_nothing(run, server):
    data = ndjson(events(10000))
    assert_silent_success(
        run(
            "--stdin",
            "--ndjson",
            "--async",
            "--queue-capacity",
            "50",
            "--batch-size",
            "500",
            stdin=data,
            server=server,
        )
    )
    assert len(server.records) == 10000
    assert server.records[-1] == events(10000)[-1]


@pytest.mark.parametrize(
    "argv, env", [(["--flush-interval", "50ms"], {}), ([], {"PACKTRACK_FLUSH_INTERVAL": "0.05"})]
)
def test_async_flushes_by_interval(start, server, argv, env):
    process = start("--stdin", "--ndjson", "--async", *argv, stdin=subprocess.PIPE, env=env, server=server)
    for number in range(1, 4):
        process.stdin.write(ndjson([event(message=str(number))]))
        process.stdin.flush()
        server.wait_for_requests(number)
    assert_silent_success(process.result())
    assert [record["message"] for record in server.records] == ["1", "2", "3"]


def test_async_sends_a_full_batch_before_the_end_of_the_input(start, server):
    process = start(
        "--stdin",
        "--ndjson",
        "--async",
        "--flush-interval",
        "1h",
        "--batch-size",
        "10",
        stdin=subprocess.PIPE,
        server=server,
    )
    process.stdin.write(ndjson(events(15)))
    process.stdin.flush()
    server.wait_for_requests(1)
    assert_silent_success(process.result())
    assert sizes(server) == [10, 5]


@pytest.mark.parametrize("bad, code", [(line(severity="loud"), 1), (b"{torn", 4)])
def test_async_bad_record_stops_the_reading_and_flushes(run, server, bad, code):
    data = ndjson(events(30)) + bad + b"\n" + ndjson(events(30))
    result = run("--stdin", "--ndjson", "--async", "--json", stdin=data, server=server)
    assert_fails(result, code, STDIN + ":31")
    assert server.records == events(30)
    assert result.summary["delivered"] == 30


def test_async_failure_is_in_the_exit_code_and_in_undelivered(run, tmp_path):
    with StandIn(script=[200], default=400) as server:
        result = run(
            "--stdin",
            "--ndjson",
            "--async",
            "--batch-size",
            "10",
            "--undelivered",
            "left",
            "--json",
            stdin=ndjson(events(100)),
            server=server,
        )
    assert_fails(result, 2, "400")
    assert server.records == events(10)
    assert result.summary["delivered"] == 10
    assert (tmp_path / "left").read_bytes() == ndjson(events(100)[10:])
    assert result.summary["undelivered"] == 90


def test_async_no_flush_abandons_what_is_queued_with_exit_0(run):
    with StandIn(default=Reply(delay=0.05)) as server:
        result = run(
            "--stdin",
            "--ndjson",
            "--async",
            "--no-flush",
            "--flush-interval",
            "1h",
            "--json",
            stdin=ndjson(events(50)),
            server=server,
        )
    assert result.code == 0
    assert result.summary["read"] == 50
    assert result.summary["delivered"] == len(server.records)
    assert result.summary["undelivered"] == 50 - len(server.records)


def test_async_from_flags_sends_the_event(run, server):
    assert_silent_success(run(*FLAGS, "--async", server=server))
    assert server.records == [event()]


# ---- --deadline ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, env", [(["--deadline", "1s"], {}), ([], {"PACKTRACK_DEADLINE": "1"})])
def test_deadline_bounds_the_attempts(run, argv, env):
    with StandIn(default=standin.SILENT) as server:
        result = run(*FLAGS, *argv, "--json", env=env, server=server)
    assert_fails(result, 3, "(?i)deadline")
    assert result.seconds < 6
    assert result.summary["undelivered"] == 1


def test_deadline_bounds_the_waits(run):
    with StandIn(default=503) as server:
        result = run(
            *FLAGS, "--deadline", "1s", "--backoff-initial", "60s", "--backoff-max", "60s", server=server
        )
    assert_fails(result, 3)
    assert result.seconds < 6
    assert len(server.requests) == 1


@pytest.mark.parametrize("argv", [[], ["--async"]])
def test_deadline_bounds_a_stalled_standard_input(start, server, argv):
    process = start(
        "--stdin", "--ndjson", "--deadline", "1s", "--json", *argv, stdin=subprocess.PIPE, server=server
    )
    process.stdin.write(ndjson(events(2)))
    process.stdin.flush()
    assert process.popen.wait(10) == 3
    assert_fails(process.result(), 3, "(?i)deadline")


# ---- texts -----------------------------------------------------------------------------------------------


@pytest.mark.both_forms
@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(run, flag):
    result = run(flag, key=False)
    assert (result.code, result.err) == (0, "")
    assert re.fullmatch(r"packtrack-logger \d+\.\d+\.\d+\S*\n", result.out)


@pytest.mark.both_forms
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_goes_to_standard_output_in_80_columns_without_the_key(run, flag):
    result = run(flag, env={"PACKTRACK_METADATA": '{"a":"%s"}' % SECRET}, secrets=[SECRET])
    assert (result.code, result.err) == (0, "")
    assert max(map(len, result.out.splitlines())) <= 80
    for name in [
        "api-key",
        "api-key-file",
        "base-url",
        "timeout",
        "retries",
        "backoff-initial",
        "backoff-max",
        "jitter",
        "user-agent",
        "idempotency-key",
        "gzip",
        *EVENT_OPTIONS,
        "file",
        "stdin",
        "ndjson",
        "verbose",
        "dry-run",
        "health",
        "health-path",
        "version",
        "async",
        "batch-size",
        "flush-interval",
        "queue-capacity",
        "no-flush",
        "deadline",
        "max-batch-bytes",
        "keep-going",
        "undelivered",
        "output",
        "json",
        "progress",
        "completion",
        "command-timeout",
        "strict",
    ]:
        assert re.search(r"--%s\b(?!-)" % name, result.out), name


def test_help_and_version_work_whatever_else_is_given_rightly(run, server):
    assert run(*FLAGS, "--help", server=server).code == 0
    assert run(*FLAGS, "--version", server=server).code == 0
    assert server.connections == 0


@pytest.mark.parametrize("shell_name", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(run, shell_name):
    result = run("--completion", shell_name, key=False)
    assert (result.code, result.err) == (0, "")
    assert "severity" in result.out and "packtrack-logger" in result.out


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
@pytest.mark.parametrize(
    "argv, env, terminal, shown",
    [
        ([], {}, False, False),
        ([], {}, True, True),
        (["--no-progress"], {}, True, False),
        ([], {"PACKTRACK_PROGRESS": "0"}, True, False),
    ],
)
def test_progress_is_shown_on_a_terminal_unless_switched_off(start, put, argv, env, terminal, shown):
    put(events(2))
    options = {}
    if terminal:
        leader, follower = os.openpty()
        options["stderr"] = follower
    try:
        with StandIn(script=[Reply(delay=1.1)]) as server:
            result = start(
                "--file",
                "events.ndjson",
                "--ndjson",
                "--batch-size",
                "1",
                *argv,
                env=env,
                server=server,
                **options,
            ).result()
        assert (result.code, result.out, result.err) == (0, "", "")
        if terminal:
            os.write(follower, b"end")
            told = b""
            while not told.endswith(b"end"):
                told += os.read(leader, 65536)
            assert (b"1" in told) is shown, told
    finally:
        if terminal:
            os.close(leader)
            os.close(follower)


# ---- the environment of the host -------------------------------------------------------------------------


@pytest.mark.both_forms
def test_the_exit_code_is_the_verdict_in_every_form(run, put):
    put(b"{torn")
    with StandIn(script=[200, 404, 503]) as server:
        codes = [
            run(*FLAGS, server=server).code,
            run(*FLAGS, server=server).code,
            run(*FLAGS, "--retries", "0", server=server).code,
            run("--file", "events.ndjson", server=server).code,
            run("--bogus", server=server).code,
        ]
    assert codes == [0, 2, 3, 4, 1]
    assert len(server.requests) == 3


@pytest.mark.skipif(os.name != "posix", reason="/dev/full and closed descriptors")
@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&- <&-", "2>/dev/full"])
def test_the_verdict_stands_with_broken_streams(run, server, redirect):
    with StandIn(default=400) as refusing:
        assert run(*FLAGS, "-v", server=server, redirect=redirect).code == 0
        assert run(*FLAGS, "-v", server=refusing, redirect=redirect).code == 2
    assert server.records == [event()]


def test_isolated_mode_works(run, server):
    assert_silent_success(run(*FLAGS, server=server, python_flags=["-I"]))
    assert server.records == [event()]


def test_it_runs_without_home_and_path(run, server):
    assert_silent_success(run(*FLAGS, server=server, env={"HOME": None, "PATH": None}))


@pytest.mark.skipif(os.name != "posix", reason="runs the archive by its first line")
def test_the_archive_runs_as_a_command(archive, server, tmp_path):
    # `env python3` finds the interpreter under test.
    (tmp_path / "python3").symlink_to(PYTHON)
    done = subprocess.run(
        [str(archive), *FLAGS],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=60,
        stderr=subprocess.PIPE,
        check=False,
        env={
            "PATH": "%s:/usr/bin:/bin" % tmp_path,
            "PACKTRACK_API_KEY": KEY,
            "PACKTRACK_BASE_URL": server.url,
        },
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert server.records == [event()]


def test_two_runs_at_once_do_not_meet(start, server):
    processes = [start(*flags(message=str(number)), server=server) for number in range(8)]
    for process in processes:
        assert_silent_success(process.result())
    assert sorted(record["message"] for record in server.records) == [str(number) for number in range(8)]
