"""The key goes to the server alone, and the payload's text to the server and the files that are for it.

Every way to fail, with --verbose and --json, against a server that echoes the request's headers in its body,
its reason phrase, its Location and whatever else it has.
"""
import contextlib
import json
import os
import stat
import sys
import threading

import pytest

import certs
from conftest import KEY, MARK, event, events, flags, ndjson
from standin import RESET_AFTER, SILENT, Raw, RefusedPort, StandIn

full = pytest.mark.full
LOUD = ("--verbose", "--json", "--timeout", "0.4s", "--retries", "1", "--backoff-initial", "1ms",
        "--backoff-max", "2ms", "--idempotency-key", "k", "--keep-going")
WINDOW = 10  # so many characters of the key in a row are a leak


def marked(**overrides):
    """An event with the marker in every field that is free text."""
    fields = dict.fromkeys((
        "source__system", "source__env", "workflow__id", "workflow__name", "workflow__run_id",
        "workflow__step_id", "actor__type", "actor__id", "actor__display_name", "message"), MARK)
    fields.update(metadata={MARK: [MARK]}, extra={"k": {MARK: MARK}})
    return event(**{**fields, **overrides})


def assert_discreet(result, *files):
    """Neither the key, nor a good part of it, nor the payload, in the streams; no key in the files."""
    for text in (result.out, result.err):
        assert MARK not in text
        visible = "".join(c for c in text if c.isprintable())
        for at in range(len(KEY) - WINDOW + 1):
            assert KEY[at:at + WINDOW] not in visible, result
    for file in files:
        if file.exists():
            assert KEY.encode() not in file.read_bytes()


# ---- what the server may say -------------------------------------------------------------------------------

def plain(text):
    return text


def split_by_controls(text):
    return text.replace(KEY, "\x01".join(KEY))


def split_by_invisibles(text):
    return text.replace(KEY, "\u200b".join(KEY[:9]) + "\u00ad" + "\x7f".join(KEY[9:]))


def json_escaped(text):
    return '{"error":"%s","message":"%s"}' % (("".join("\\u%04x" % ord(c) for c in text),) * 2)


def html_escaped(text):
    return "<html>%s</html>" % "".join("&#%d;" % ord(c) for c in text)


def json_answer(text):
    return json.dumps({"error": {"message": text, "detail": [text]}})


def echo(status, encode=plain, headers=""):
    """An answer whose every part holds the request's headers."""
    def step(server, sock, request):
        text = encode("; ".join("%s: %s" % pair for pair in request.header_list))
        line = encode(KEY + " " + " ".join(value for _, value in request.header_list)).replace("\n", " ")
        body = text.encode("utf-8")
        head = ["HTTP/1.1 %s %s" % (status, line), "Location: http://127.0.0.1:9/" + line.replace(" ", "%20"),
                "X-Echo: " + line, "Content-Length: %d" % len(body), headers.format(KEY)]
        sock.sendall("\r\n".join(filter(None, head)).encode("utf-8") + b"\r\n\r\n" + body)
    return step


def say(template):
    """Bytes that hold the headers and are no sane answer."""
    def step(server, sock, request):
        text = "; ".join("%s: %s" % pair for pair in request.header_list)
        sock.sendall(template.replace(b"%", text.encode("ascii")))
    return step


REFUSALS = (400, 401, 403, 404, 405, 409, 410, 413, 415, 422, 301, 302, 303, 307, 308, 101, 304, 407)
TROUBLES = (429, 500, 502, 503, 504)
ENCODINGS = (plain, split_by_controls, split_by_invisibles, json_escaped, html_escaped, json_answer)

CASES = [pytest.param(echo(status), code, id=str(status))
         for code, statuses in ((2, REFUSALS), (3, TROUBLES)) for status in statuses]
CASES += [pytest.param(echo(status, encode), 2 if status == 400 else 3,
                       id="%d %s" % (status, encode.__name__))
          for status in (400, 503) for encode in ENCODINGS[1:]]
CASES += [pytest.param(echo(307, encode), 2, id="307 " + encode.__name__) for encode in ENCODINGS[1:3]]
CASES += [
    pytest.param(say(b"%\r\n\r\n"), 3, id="headers instead of a status line"),
    pytest.param(say(b"SSH-2.0-%\r\n"), 3, id="a banner"),
    pytest.param(say(b"HTTP/1.1 %\r\n\r\n"), 3, id="headers instead of a status"),
    pytest.param(say(b"HTTP/1.1 2000 %\r\n\r\n"), 3, id="a status of four digits"),
    pytest.param(say(b"HTTP/1.1 200 OK\r\nX: " + b"%" * 700 + b"\r\n\r\n"), 3, id="a long header"),
    pytest.param(say(b"HTTP/1.1 200 OK\r\n" + b"X: %\r\n" * 101 + b"\r\n"), 3, id="101 header lines"),
    pytest.param(say(b"HTTP/1.1 100 %\r\nX: %\r\n\r\nHTTP/1.1 503 %\r\nContent-Length: 0\r\n\r\n"), 3,
                 id="a 100 before a 503"),
    pytest.param(echo(429, headers="Retry-After: {0}"), 3, id="Retry-After that is the key"),
    pytest.param(echo(429, headers="Retry-After: 999999"), 3, id="Retry-After 999999"),
    pytest.param(echo(400, headers="Content-Encoding: {0}"), 2, id="Content-Encoding that is the key"),
    pytest.param(say(b"HTTP/1.1 400 %\r\nTransfer-Encoding: chunked\r\n\r\n%\r\n"), 2,
                 id="a chunk size that is the key"),
    pytest.param(say(b"HTTP/1.1 400 %\r\nContent-Length: %\r\n\r\n%"), 2, id="a length that is the key"),
    pytest.param(say(b"HTTP/1.1 200 %\r\nTransfer-Encoding: chunked\r\n\r\n%\r\n"), 0,
                 id="delivered, with a bad chunk"),
    pytest.param(say(b"HTTP/1.1 200 %\r\nContent-Length: 99999\r\n\r\n%"), 0,
                 id="delivered, body broken off"),
    pytest.param(RESET_AFTER, 3, id="reset"),
    pytest.param(SILENT, 3, id="timeout"),
]


QUICK = {"400", "401", "413", "307", "101", "407", "429", "500", "400 split_by_controls", "503 json_escaped",
         "headers instead of a status line", "a banner", "101 header lines", "a 100 before a 503",
         "Retry-After that is the key", "Retry-After 999999", "a length that is the key", "timeout",
         "delivered, with a bad chunk"}
assert QUICK <= {case.id for case in CASES}


@pytest.mark.parametrize("step, code", [
    case if case.id in QUICK else pytest.param(*case.values, id=case.id, marks=full) for case in CASES])
def test_answer_that_echoes_the_headers_leaks_nothing(step, code, run, tmp_path):
    path, left = tmp_path / "events.ndjson", tmp_path / "left"
    path.write_bytes(ndjson([marked(), marked()]))
    with StandIn(default=step) as server:
        result = run(*LOUD, "--file", path, "--ndjson", "--undelivered", left, server=server)
    assert result.code == code, result.err
    assert_discreet(result, left)
    if code:
        assert left.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("cut", [0, 9, 25, *(pytest.param(cut, marks=full) for cut in (-1, 1, 5, 15, 31))])
def test_key_is_cut_out_before_the_servers_words_are_cut_to_200_characters(cut, run):
    words = "x" * (200 - cut) + KEY + "y" * 100
    body = Raw(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(words), words.encode()))
    with StandIn(default=body) as server:
        result = run(*LOUD, *flags(message=MARK), server=server)
    assert result.code == 2
    assert_discreet(result)
    assert "xxxx" in result.err, "the server's own words are told"
    assert "x" * 201 not in result.err


@pytest.mark.parametrize("limit", [4096, 65536, 1 << 20])
def test_key_is_cut_out_where_the_reading_of_an_answer_ends(limit, run):
    """Blanks make the end of what is read into the beginning of what is shown."""
    body = b" " * (limit - 20) + KEY.encode() + b" " * 100000
    answer = Raw(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    with StandIn(default=answer) as server:
        result = run(*LOUD, *flags(), server=server)
    assert result.code == 2
    assert_discreet(result)


def test_removing_the_key_does_not_put_another_together(run):
    for words in (KEY[:7] + KEY + KEY[7:], KEY[:7] + KEY[:7] + KEY + KEY[7:] + KEY[7:]):
        body = Raw(b"HTTP/1.1 400 %s\r\nContent-Length: %d\r\n\r\n%s" % (words.encode(), len(words),
                                                                         words.encode()))
        with StandIn(default=body) as server:
            result = run(*LOUD, *flags(), server=server)
        assert result.code == 2
        assert KEY not in result.out + result.err


@pytest.mark.parametrize("status", [401, 500, *(pytest.param(status, marks=full) for status in (
    200, 404, 307, "2000"))])
@pytest.mark.parametrize("argv, code", [(("--health",), None),
                                        (("--health-enable", *flags(message=MARK)), 0)],
                         ids=["health", "health-enable"])
def test_health_check_that_echoes_leaks_nothing(argv, code, status, run):
    def script():
        yield echo(status)
        if "--health" in argv and status in (500, "2000"):
            yield echo(status)

    with StandIn(script=script()) as server:
        result = run(*LOUD, *argv, server=server)
    assert result.code == ((0 if status == 200 else 1) if code is None else code), result.err
    assert_discreet(result)


@pytest.mark.parametrize("status", [407, 502, pytest.param(403, marks=full), pytest.param(503, marks=full)])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy_that_echoes_leaks_neither_key_nor_password(scheme, status, run):
    with StandIn(default=echo(status)) as proxy:
        result = run(*LOUD, "--base-url", scheme + "://service.invalid", *flags(message=MARK),
                     secrets=["passw0rd-of"],
                     env={scheme + "_proxy": "http://user:passw0rd-of@127.0.0.1:%d" % proxy.port})
        assert result.code == (2 if status < 500 else 3), result.err
        assert "dXNlcjpwYXNzdzByZC1vZg==" not in result.out + result.err, "the password in base64"
        assert_discreet(result)
        if scheme == "https":
            assert all(KEY not in repr(request.header_list) for request in proxy.requests)


def test_tls_failures_leak_nothing(run):
    authority = certs.authority()
    for pair in (authority.self_signed, authority.expired, authority.other_host):
        with StandIn(tls=pair) as server:
            result = run(*LOUD, *flags(message=MARK), server=server, env={"SSL_CERT_FILE": authority.root})
            assert result.code == 2, result.err
            assert_discreet(result)
            assert not server.requests, "the key is not sent to a server that is not verified"


def test_network_failures_leak_nothing(run):
    with RefusedPort() as refused:
        for url in (refused.url, "https://127.0.0.1:%d" % refused.port, "http://name.invalid"):
            result = run(*LOUD, "--base-url", url, *flags(message=MARK))
            assert result.code == 3, result.err
            assert_discreet(result)


# ---- bad arguments -----------------------------------------------------------------------------------------

BAD_KEY = KEY + "\r\nX-Evil: 1"
ARGUMENTS = [
    ("--api-kye", KEY), ("--apikey=" + KEY,), ("--api-ke=" + KEY,), ("--api-key:" + KEY,), (KEY,),
    ("--" + KEY,),
    ("-k" + KEY,), ("-k", KEY), ("-v" + KEY,), ("--api-key", KEY, KEY), ("--api-key", BAD_KEY),
    ("--api-key=" + BAD_KEY,),
    ("--api-key", KEY + "\u00e9"), ("--api-key", " " + KEY), ("--api-key", KEY + "\x1b[0m"),
    ("--api-key", ""),
    ("--api-key", KEY, "--retries", KEY), ("--timeout", KEY), ("--verbose=" + KEY,), ("--no-verbose=" + KEY,),
    ("--idempotency-key", BAD_KEY), ("--user-agent", BAD_KEY), ("--user-agent", KEY + "\n"),
    ("--base-url", "http://user:%s@127.0.0.1" % KEY), ("--base-url", "http://%s@127.0.0.1" % KEY),
    ("--base-url", "http://127.0.0.1/?key=" + KEY), ("--base-url", "http://127.0.0.1/#" + KEY),
    ("--base-url", "ftp://user:%s@127.0.0.1" % KEY), ("--base-url", "http://a b:%s@c" % KEY),
    ("--base-url", "http:/user:%s@[::1" % KEY), ("--base-url", "user:%s@host" % KEY),
    ("--severity", KEY), ("--status", KEY), ("--timestamp", KEY), ("--metadata", KEY),
    ("--metadata", '{"a":' + KEY),
    ("--api-key-file", "/nonexistent/x"), ("--api-key-file", "/"), ("--file", "/nonexistent/" + "x", KEY),
    ("--async", "--no-async=" + KEY), ("--completion", KEY), ("--help", KEY), ("--version", KEY),
]


@pytest.mark.parametrize("argv", [
    pytest.param(argv, id=" ".join(argv).replace(KEY, "KEY").encode("unicode_escape").decode(),
                 marks=full if number % 2 else ()) for number, argv in enumerate(ARGUMENTS)])
def test_bad_arguments_show_no_key(argv, run):
    """The key is in the environment too, as where it is the wrong flag that was corrected."""
    json_too = () if argv[0] in ("--help", "--version") else ("--json",)
    result = run(*json_too, *flags(message=MARK), "--base-url", "http://127.0.0.1:9", *argv)
    assert result.code in (0, 1, 4) if argv[0] in ("--help", "--version") else result.code in (1, 4), result
    assert_discreet(result)


@pytest.mark.parametrize("flag", ["--severity", "--status", "--timestamp", "--retries", "--metadata",
                                  "--timeout"])
def test_key_of_the_command_line_given_to_another_flag_too_is_not_quoted(flag, run):
    result = run("--json", *flags(), "--base-url", "http://127.0.0.1:9", "--api-key", KEY, flag, KEY,
                 key=False)
    assert result.code == 1, result
    assert flag in result.err
    assert_discreet(result)


@pytest.mark.parametrize("variable", ["PACKTRACK_API_KEY", "PACKTRACK_USER_AGENT",
                                      "PACKTRACK_IDEMPOTENCY_KEY",
                                      "PACKTRACK_BASE_URL", "PACKTRACK_TIMEOUT", "PACKTRACK_SEVERITY",
                                      "PACKTRACK_RETRIES", "PACKTRACK_GZIP"])
def test_bad_variables_show_no_key(variable, run):
    value = "http://user:%s@127.0.0.1" % KEY if variable.endswith("URL") else BAD_KEY
    env = {"PACKTRACK_API_KEY": KEY, variable: value}
    left_out = flags(message=MARK, severity=None) if variable.endswith("SEVERITY") else flags(message=MARK)
    result = run("--verbose", "--json", *left_out, key=False, env=env)
    assert result.code == 1, result
    assert variable in result.err
    assert_discreet(result)


@pytest.mark.parametrize("content", [KEY + " \u00e9\n", KEY + "\x00\n", KEY + "\tx\n", "\n" + KEY, "",
                                     "\ufeff" + KEY + "\n", KEY + "\x1b\n"],
                         ids=["non-ASCII", "NUL", "tab", "first line empty", "empty", "byte order mark",
                              "ESC"])
def test_bad_key_file_shows_no_key(content, run, tmp_path):
    path = tmp_path / "key"
    path.write_bytes(content.encode("utf-8"))
    with StandIn() as server:
        result = run("--verbose", "--json", "--api-key-file", path, *flags(message=MARK), server=server,
                     key=False)
    if not content.startswith("\ufeff"):
        assert result.code in (1, 4), result
    assert_discreet(result)


# ---- bad records -------------------------------------------------------------------------------------------

LINE = ndjson([marked()]).rstrip(b"\n")
RECORDS = [
    ("a bad severity", ndjson([marked(severity="loud")])),
    ("no message", ndjson([{key: value for key, value in marked().items() if key != "message"}])),
    ("a message that is a list", ndjson([marked(message=[MARK])])),
    ("metadata that is text", ndjson([marked(metadata=MARK)])),
    ("an unknown field", ndjson([dict(marked(), colour=MARK)])),
    ("a bad timestamp", ndjson([marked(timestamp="2025-01-01")])),
    ("a source that is text", ndjson([marked(source=MARK)])),
    ("torn", LINE[:-20]),
    ("torn within the marker", LINE[:LINE.index(MARK.encode()) + 5]),
    ("two on a line", LINE + LINE),
    ("text after it", LINE + b" " + MARK.encode()),
    ("a bare string", b'"' + MARK.encode() + b'"'),
    ("no JSON", MARK.encode()),
    ("single quotes", LINE.replace(b'"', b"'")),
    ("a trailing comma", LINE[:-1] + b",}"),
    ("invalid UTF-8", LINE.replace(MARK.encode(), MARK.encode() + b"\xff")),
    ("a raw NUL", LINE.replace(MARK.encode(), MARK.encode() + b"\0")),
    ("NaN", LINE.replace(b'"metadata":', b'"metadata":{"m":NaN,"x":"' + MARK.encode() + b'"},"extra":')),
    ("UTF-16", LINE.decode().encode("utf-16")),
    ("nested too deeply", LINE.replace(b'"metadata":{',
                                       b'"metadata":{"m":' + b"[" * 600 + b"]" * 600 + b",")),
]


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in RECORDS])
@pytest.mark.parametrize("mode", [
    pytest.param((), id="sync"), pytest.param(("--async",), id="async", marks=full),
    pytest.param(("--keep-going",), id="keep-going", marks=full)])
def test_bad_record_is_named_and_not_quoted(mode, data, run, tmp_path):
    with StandIn() as server:
        path = tmp_path / "events.ndjson"
        path.write_bytes(ndjson([marked()]) + data + b"\n")
        result = run("--verbose", "--json", *mode, "--file", path, "--ndjson", server=server)
    assert result.code in (1, 4), result.err
    assert "events.ndjson:2" in result.err
    assert_discreet(result)


# ---- files and the process table ---------------------------------------------------------------------------

def test_undelivered_and_output_hold_the_payload_and_no_key(run, tmp_path):
    output, left = tmp_path / "output", tmp_path / "left"
    result = run(*LOUD, *flags(message=MARK), "--output", output)
    assert result.code == 0, result.err
    assert_discreet(result, output)
    assert MARK.encode() in output.read_bytes()
    with StandIn(default=echo(400)) as server:
        result = run(*LOUD, *flags(message=MARK), "--undelivered", left, server=server)
    assert result.code == 2
    assert_discreet(result, left)
    assert MARK.encode() in left.read_bytes()
    if os.name == "posix":
        assert stat.S_IMODE(left.stat().st_mode) == 0o600


def open_files(pid):
    """What the process has open as regular files, names or none."""
    folder = "/proc/%d/fd" % pid
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):
            path = os.path.join(folder, name)
            if stat.S_ISREG(os.stat(path).st_mode):
                with open(path, "rb") as file:
                    yield file.read()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_key_from_a_file_is_in_no_command_line_environment_or_temporary_file(start, tmp_path):
    key, left, temporary = tmp_path / "key", tmp_path / "left", tmp_path / "temporary"
    key.write_text(KEY + "\n")
    temporary.mkdir()
    gate = threading.Event()

    def wait(server, sock, request):
        server.pause(gate)
        return echo(400)(server, sock, request)

    records = ndjson(events(8000, metadata={"filler": MARK + "x" * 1000}))  # more than is kept in memory
    with StandIn(script=[wait]) as server:
        process = start("--verbose", "--json", "--api-key-file", key, "--stdin", "--ndjson", "--undelivered",
                        left,
                        server=server, key=False, stdin=records, env={"TMPDIR": str(temporary)})
        try:
            server.wait_for_requests(1, 30)
            with open("/proc/%d/cmdline" % process.pid, "rb") as file:
                assert KEY.encode() not in file.read()
            with open("/proc/%d/environ" % process.pid, "rb") as file:
                assert KEY.encode() not in file.read()
            spooled = [data for data in open_files(process.pid) if data != key.read_bytes()]
            assert any(MARK.encode() in data for data in spooled), "the pipe is spooled past 4 MiB"
            assert all(KEY.encode() not in data for data in spooled)
            assert list(temporary.iterdir()) == [], "the temporary file has no name"
        finally:
            gate.set()
        result = process.result()
    assert result.code == 2, result.err
    assert_discreet(result, left)
    assert left.read_bytes() == records
    assert list(temporary.iterdir()) == []


def test_key_file_that_others_may_read_is_mentioned_with_verbose_only(run, server, tmp_path):
    if os.name != "posix":
        pytest.skip("file modes of POSIX")
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    key.chmod(0o644)
    quiet = run("--api-key-file", key, *flags(), server=server, key=False)
    assert (quiet.code, quiet.err) == (0, "")
    loud = run("--verbose", "--api-key-file", key, *flags(), server=server, key=False)
    assert loud.code == 0
    assert "--api-key-file" in loud.err
    key.chmod(0o600)
    fine = run("--verbose", "--api-key-file", key, *flags(), server=server, key=False)
    assert "--api-key-file" not in fine.err


@pytest.mark.skipif(os.name != "posix", reason="needs sh")
def test_command_and_its_arguments_are_not_sent(run, server):
    result = run("--verbose", "--source-system", "s", "--workflow-id", "w", "--actor-type", "t",
                 "--actor-id", "a",
                 "--", "sh", "-c", "exit 3", MARK, server=server, env={"HIDDEN": MARK}, allow_codes=(3,))
    assert_discreet(result)
    body = server.requests[0].body.decode()
    assert MARK not in body
    assert KEY not in body
    assert "exit 3" not in body


def test_exceptions_and_reprs_of_the_library_show_no_key():
    module = pytest.importorskip("packtrack_logger")
    with StandIn(default=echo(400)) as server:
        client = module.Client(KEY, base_url=server.url, retries=0)
        try:
            with pytest.raises(module.RefusedError) as caught:
                client.ingest_event(event())
            shown = "%r %s %r %s" % (caught.value, caught.value, client, client)
            assert KEY not in shown
        finally:
            client.close()
