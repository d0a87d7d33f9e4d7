"""Every row of the fault table 'server and network': a test's id names the row and the input."""

import contextlib
import email.utils
import json
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any, Dict, NamedTuple, Optional, Sequence

import pytest

import certs
from conftest import FLAGS, KEY, event, events, ndjson
from standin import (
    BANNER,
    BROKEN_BODY,
    CLOSE,
    CLOSE_BEFORE,
    DRIP_BODY,
    DRIP_HEADERS,
    DRIP_TRAILERS,
    EARLY_413,
    ENDLESS_100,
    ENDLESS_TRAILERS,
    FOUR_DIGIT_STATUS,
    GARBAGE_BODY,
    GZIP_BOMB,
    HALF_HEADERS,
    HTML_BODY,
    HTTP_09,
    HUGE_BODY,
    LONG_HEADER,
    MANY_HEADERS,
    NEVER_ENDING_BODY,
    RESET_AFTER,
    RESET_BEFORE,
    RESET_BODY,
    RESET_IN_HEADERS,
    SILENT,
    SILENT_BODY,
    Raw,
    RefusedPort,
    Reply,
    StandIn,
)

TIMEOUT = 0.4
FAST = ("--timeout", "%ss" % TIMEOUT, "--retries", "1", "--backoff-initial", "1ms", "--backoff-max", "2ms",
        "--json")
OK = b"HTTP/1.1 200 OK\r\n"
EMPTY = OK + b"Content-Length: 0\r\n\r\n"


class Case(NamedTuple):
    """One event from flags, or `records` of them from a file, against a server's script."""

    id: str
    script: Sequence[Any]  # steps of the stand-in, one a request
    code: int
    requests: Optional[int]  # sent by the program, by its own count; None: some of the tries, or none
    words: str = ""  # expression that standard error must match
    seen: Optional[int] = None  # complete requests the server got, where that differs
    tries: Optional[int] = None  # where that differs: without a connection there is no request
    retries: Optional[int] = None  # where it is not tries - 1
    argv: Sequence[str] = ()
    records: int = 0
    delivered: Optional[int] = None  # of the records; by default all of them or none, by the code
    env: Dict[str, str] = {}
    seconds: Optional[float] = None  # by default a --timeout for each try, and a second


full = pytest.mark.full


def quick(cases, *wanted):
    """The cases as parameters; all but those of the wanted ids are left to the full suite."""
    assert set(wanted) <= {case.id for case in cases}
    return [pytest.param(case, id=case.id, marks=() if case.id in wanted else full) for case in cases]


def source(case, tmp_path):
    if not case.records:
        return list(FLAGS)
    path = tmp_path / "events.ndjson"
    path.write_bytes(ndjson(events(case.records)))
    return ["--file", str(path), "--ndjson"]


def check(case, result, server):
    said = result.err
    assert result.code == case.code, said
    count = case.records or 1
    delivered = case.delivered
    if delivered is None:
        delivered = count if case.code == 0 else 0
    summary = result.summary
    assert summary["exit_code"] == case.code
    assert summary["ok"] == (case.code == 0)
    assert (summary["error"] is None) == (case.code == 0)
    assert (summary["read"], summary["delivered"], summary["undelivered"], summary["invalid"]) == (
        count, delivered, count - delivered, 0)
    tries = case.requests if case.tries is None else case.tries
    if case.requests is None:
        assert summary["requests"] <= tries
    else:
        assert summary["requests"] == case.requests
    assert summary["retries"] == (tries - 1 if case.retries is None else case.retries)
    if server is not None:
        assert len(server.requests) == (case.requests if case.seen is None else case.seen)
    limit = tries * TIMEOUT + 1 if case.seconds is None else case.seconds
    assert summary["seconds"] <= limit
    if case.code == 0:
        assert said == ""
    else:
        assert said.count("\n") == 1, "one line says what failed: %r" % said
        assert re.search(case.words, said, re.IGNORECASE), said


def against(case, run, tmp_path):
    with StandIn(script=case.script) as server:
        result = run(*FAST, *case.argv, *source(case, tmp_path), server=server, env=case.env)
        check(case, result, server)


def twice(step):
    return (step, step)


# Servers that the stand-in cannot play: those that never speak HTTP, or never accept.


class Bare:
    """A listener on loopback that hands each connection to a function, in a thread."""

    def __init__(self, serve):
        self.serve = serve
        self.connections = 0
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(16)
        self.port = self.listener.getsockname()[1]
        self.ended = threading.Event()
        self.open = []
        self.thread = threading.Thread(target=self.accept, daemon=True)

    def accept(self):
        while not self.ended.is_set():
            if not select.select([self.listener], [], [], 0.05)[0]:
                continue
            connection = self.listener.accept()[0]
            self.connections += 1
            self.open.append(connection)
            threading.Thread(target=self.one, args=(connection,), daemon=True).start()

    def one(self, connection):
        with contextlib.suppress(OSError):
            self.serve(connection)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.ended.set()
        self.thread.join(10)
        self.listener.close()
        for connection in self.open:
            connection.close()


def hold(connection):
    """Take what comes and say nothing, until the other side is gone."""
    while connection.recv(65536):
        pass


def cut(connection):
    connection.recv(65536)
    connection.close()


def reset(connection):
    connection.recv(65536)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextlib.contextmanager
def full_backlog():
    """A port whose listener has no place left: to connect there is to wait."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(socket.socket()))
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(64):
            filler = stack.enter_context(contextlib.closing(socket.socket()))
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            if not select.select([], [filler], [], 0.25)[1]:
                break
        else:
            pytest.skip("this system's backlog cannot be filled")
        yield listener.getsockname()[1]


def customized(directory, code):
    """The environment in which the interpreter runs `code` before the program."""
    place = directory / "customized"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(code, encoding="utf-8")
    return {"PYTHONPATH": str(place)}


RESOLVER = """
import socket, time
real = socket.getaddrinfo
def getaddrinfo(host, port, family=0, type=0, proto=0, flags=0):
    if host in ("service.invalid", b"service.invalid") and not flags & socket.AI_NUMERICHOST:
        %s
    return real(host, port, family, type, proto, flags)
socket.getaddrinfo = getaddrinfo
"""


def resolver(directory, ports):
    """The environment in which service.invalid has one address a port."""
    entries = ["(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('127.0.0.1', %d))" % port for port in ports]
    return customized(directory, RESOLVER % "return [%s]" % ", ".join(entries))


# Faults of the connection.

TIMED_OUT = r"timed? ?out|in time"

CONNECTION = [
    # Whether the connection is there for a moment is a matter of chance.
    Case("reset on accept", twice(RESET_BEFORE), 3, None, r"reset|closed|broken", seen=0, tries=2),
    Case("reset after the request", twice(RESET_AFTER), 3, 2, r"reset|closed|broken"),
    Case("closed without an answer", twice(CLOSE), 3, 2, r"closed|without|answer"),
    Case("closed inside the headers", twice(HALF_HEADERS), 3, 2, r"closed|headers|broke|answer"),
    Case("closed on accept", twice(CLOSE_BEFORE), 3, None, r"reset|closed|broken", seen=0, tries=2),
    Case("reset inside the headers", twice(RESET_IN_HEADERS), 3, 2, r"reset|closed|broken"),
    Case("closed inside the status line", twice(Raw(b"HTTP/1.1 20", then="close")), 3, 2, r"."),
    Case("accepted and silent", twice(SILENT), 3, 2, TIMED_OUT),
    Case("headers a byte at a time", twice(DRIP_HEADERS), 3, 2, TIMED_OUT),
    Case("endless 100 Continue", twice(ENDLESS_100), 3, 2, TIMED_OUT),
]


@pytest.mark.parametrize("case", quick(
    CONNECTION, "reset on accept", "reset after the request", "closed without an answer",
    "closed inside the headers",
    "accepted and silent", "headers a byte at a time", "endless 100 Continue"))
def test_connection_fault_is_retried(case, run, tmp_path):
    against(case, run, tmp_path)


@pytest.mark.parametrize("case", quick(CONNECTION, "reset after the request"))
def test_connection_fault_then_success_delivers(case, run, tmp_path):
    with StandIn(script=case.script[:1]) as server:
        result = run(*FAST, *FLAGS, server=server)
        check(case._replace(code=0, seen=1 if case.seen == 0 else 2), result, server)
        assert len(server.records) == 1


def test_connection_refused_is_retried(run):
    with RefusedPort() as refused:
        result = run(*FAST, "--base-url", refused.url, *FLAGS)
    check(Case("refused", (), 3, 0, "refused", tries=2), result, None)
    assert "127.0.0.1" in result.err


def test_never_accepted_backlog_full_is_cut_at_the_timeout(run):
    with full_backlog() as port:
        result = run(*FAST, "--base-url", "http://127.0.0.1:%d" % port, *FLAGS)
    check(Case("backlog", (), 3, 0, TIMED_OUT, tries=2), result, None)


def test_server_that_does_not_read_the_request_is_cut_at_the_timeout(run, tmp_path):
    """The body is larger than the sockets' buffers; to read it is no part of an attempt: measured apart."""
    big = tmp_path / "big.json"
    big.write_bytes(ndjson([event(message="x" * 6000000)]))
    with Bare(lambda connection: None) as server:
        reading = run(*FAST, "--dry-run", "--file", str(big)).summary["seconds"]
        result = run(*FAST, "--base-url", "http://127.0.0.1:%d" % server.port, "--file", str(big))
        check(Case("stalled", (), 3, 2, TIMED_OUT, seconds=2 * TIMEOUT + 1 + 3 * reading), result, None)
        assert server.connections == 2


# Answers that are wrong after the headers: the service has the events.


HUNDRED_MB = 100 * 1000 * 1000
GARBAGE = bytes(random.Random(4).randrange(256) for _ in range(5000))
CHUNKED = b"Transfer-Encoding: chunked"


def answered(*lines, body=b"", then="hang"):
    """A 200 with these header lines, for which the events are recorded."""
    return Raw(OK + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body, then, records=True)


def hundred_mb(*lines):
    def parts():
        yield OK + b"".join(line + b"\r\n" for line in lines)
        for _ in range(1000):
            yield b"0" * (HUNDRED_MB // 1000)

    return Raw(parts, records=True)


BODIES = [
    ("drips", DRIP_BODY),
    ("breaks off", BROKEN_BODY),
    ("breaks off by a reset", RESET_BODY),
    ("never ends", NEVER_ENDING_BODY),
    ("never comes", SILENT_BODY),
    ("endless trailers", ENDLESS_TRAILERS),
    ("endless trailers, a byte at a time", DRIP_TRAILERS),
    ("Content-Length too large", answered(b"Content-Length: 1000", body=b"{}")),
    ("Content-Length too small", answered(b"Content-Length: 2", body=b"{}" * 50, then="keep")),
    ("Content-Length of 30 digits", answered(b"Content-Length: " + b"9" * 30, body=b"{}")),
    ("Content-Length of 5000 digits", answered(b"Content-Length: " + b"9" * 5000, body=b"{}")),
    ("Content-Length negative", answered(b"Content-Length: -5", body=b"{}")),
    ("Content-Length many", answered(b"Content-Length: many", body=b"{}")),
    ("Content-Length empty", answered(b"Content-Length:", body=b"{}")),
    ("Content-Length twice, different", answered(b"Content-Length: 2", b"Content-Length: 7", body=b"{}",
                                                 then="keep")),
    ("chunk size zz", answered(CHUNKED, body=b"zz\r\n{}\r\n0\r\n\r\n")),
    ("chunk size negative", answered(CHUNKED, body=b"-5\r\n{}\r\n0\r\n\r\n")),
    ("chunk size of 30 digits", answered(CHUNKED, body=b"f" * 30 + b"\r\n{}\r\n0\r\n\r\n")),
    ("chunk size line of 100 KB", answered(CHUNKED, body=b"0" * 100000)),
    ("chunk broken off", answered(CHUNKED, body=b"10\r\n{}", then="close")),
    ("100 MB", HUGE_BODY),
    ("100 MB without a length", hundred_mb(b"")),
    ("100 MB in one chunk", hundred_mb(CHUNKED, b"", b"%x" % HUNDRED_MB)),
    ("a gzip bomb", GZIP_BOMB),
    ("says gzip and is not", answered(b"Content-Encoding: gzip", b"Content-Length: 4", body=b"oops",
                                      then="keep")),
    ("HTML", HTML_BODY),
    ("garbage", GARBAGE_BODY),
    ("nothing", answered(b"Content-Length: 0", then="keep")),
    ("nothing, and closed", answered(then="close")),
]


@full
@pytest.mark.parametrize("step", [pytest.param(step, id=name) for name, step in BODIES])
def test_a_2xx_whose_body_is_wrong_is_delivered(step, run, tmp_path):
    against(Case("body", (step,), 0, 1), run, tmp_path)


UNNAMED_BODIES = ("never comes", "endless trailers, a byte at a time", "Content-Length of 5000 digits",
                  "Content-Length empty", "chunk size line of 100 KB", "100 MB in one chunk",
                  "says gzip and is not")


@pytest.mark.parametrize("step", [pytest.param(step, id=name, marks=full if name in UNNAMED_BODIES else ())
                                  for name, step in BODIES])
def test_after_a_2xx_whose_body_is_wrong_the_next_batch_is_delivered_too(step, run, tmp_path):
    """Whatever is left on the first connection, it must not pass for an answer to the second batch."""
    with StandIn(script=[step]) as server:
        case = Case("body", (), 0, 2, records=2, retries=0)
        result = run(*FAST, "--batch-size", "1", *source(case, tmp_path), server=server)
        assert result.code == 0, result.err
        assert (result.summary["delivered"], result.summary["undelivered"]) == (2, 0)
        assert result.summary["retries"] == 0, "a connection is not used again after an error"
        assert [record["message"] for record in server.records] == ["event 1", "event 2"]


def test_bytes_after_an_answer_do_not_answer_the_next_batch(run, tmp_path):
    smuggled = answered(b"Content-Length: 2", body=b"{}" + EMPTY)
    with StandIn(script=[smuggled, 400]) as server:
        case = Case("smuggled", (), 2, 2, records=2)
        result = run(*FAST, "--batch-size", "1", *source(case, tmp_path), server=server)
        assert result.code == 2, "the second batch was refused: %s" % result.err
        assert (result.summary["delivered"], result.summary["undelivered"]) == (1, 1)


# Answers that are none.

NOT_HTTP = [
    Case("a banner of another protocol", twice(BANNER), 3, 2, r"HTTP|answer"),
    Case("a greeting, then silence", twice(Raw(b"220 mail.example ESMTP\r\n", then="hang")), 3, 2,
         r"HTTP|answer"),
    Case("HTTP-0.9", twice(HTTP_09), 3, 2, r"HTTP|answer"),
    Case("a status of four digits", twice(FOUR_DIGIT_STATUS), 3, 2, r"HTTP|status|answer"),
    Case("a status of letters", twice(Raw(b"HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n")), 3, 2, r"."),
    Case("a status of two digits", twice(Raw(b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n")), 3, 2, r"."),
    Case("a 70 KB header line", twice(LONG_HEADER), 3, 2, r"header|long|large"),
    Case("a 70 KB status line", twice(Raw(b"HTTP/1.1 200 " + b"x" * 70000 + b"\r\n\r\n")), 3, 2, r"."),
    Case("101 header lines", twice(MANY_HEADERS), 3, 2, r"header"),
    Case("garbage", twice(Raw(GARBAGE, then="close")), 3, 2, r"."),
]


@pytest.mark.parametrize("case", quick(
    NOT_HTTP, "a banner of another protocol", "HTTP-0.9", "a status of four digits", "a 70 KB header line",
    "101 header lines", "garbage"))
def test_an_answer_that_is_not_http_is_retried(case, run, tmp_path):
    against(case, run, tmp_path)


# Statuses.


def bare_status(line):
    """An answer without a body or a length, on a connection that stays open."""
    return Raw(b"HTTP/1.1 " + line + b"\r\n\r\n", then="hang")


STATUSES = [
    Case("101", (Raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
                     then="hang"),),
         2, 1, "101"),
    Case("204", (bare_status(b"204 No Content"),), 0, 1),
    Case("205", (Raw(b"HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n", then="hang"),), 0, 1),
    Case("304", (bare_status(b"304 Not Modified"),), 2, 1, "304"),
    Case("201", (201,), 0, 1),
    Case("202", (202,), 0, 1),
    Case("299", (299,), 0, 1),
    Case("one 100 Continue before a 200",
         (Raw(b"HTTP/1.1 100 Continue\r\n\r\n" + EMPTY, then="hang"),), 0, 1),
    Case("one 103 before a 200",
         (Raw(b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n" + EMPTY, then="hang"),), 0, 1),
] + [
    Case(str(status), (status,), 2, 1, str(status))
    for status in (400, 401, 403, 404, 405, 409, 410, 415, 422, 402, 406, 408, 418, 451, 499, 300, 305, 600,
                   999)
] + [
    Case("%d twice" % status, twice(status), 3, 2, str(status)) for status in (429, 500, 501, 502, 503, 504,
                                                                               511, 599)
] + [
    Case("503, 503, 200", (503, 503, 200), 0, 3, argv=("--retries", "2"), seconds=3),
    Case("retries 0", (503,), 3, 1, "503", argv=("--retries", "0")),
    Case("413 on one event", (413,), 2, 1, "413"),
    Case("413 on a batch", (413,), 0, 3, retries=0, records=10),
    Case("413 on a batch down to one event that is too large", (413, 413, 200, 413), 2, 4, "413", retries=0,
         records=4, delivered=1),
    Case("429 with Retry-After: 999999", (Reply(429, headers=[("Retry-After", "999999")]),), 3, 1,
         r"Retry-After|999999|11d|277h"),
    Case("503 with Retry-After: 61", (Reply(503, headers=[("Retry-After", "61")]),), 3, 1,
         r"Retry-After|61|1m1s"),
    Case("429 with Retry-After past the deadline", (Reply(429, headers=[("Retry-After", "30")]),), 3, 1,
         r"deadline|Retry-After", argv=("--deadline", "20s"), seconds=4),
]


UNNAMED = ("201 202 299 402 406 408 418 451 499 300 305 600 999".split()
           + ["%d twice" % status for status in (501, 502, 503, 504, 511, 599)])


@pytest.mark.parametrize("case", quick(STATUSES, *[case.id for case in STATUSES if case.id not in UNNAMED]))
def test_status(case, run, tmp_path):
    against(case, run, tmp_path)


def test_413_halves_arrive_in_order(run, tmp_path):
    with StandIn(script=[413, 413]) as server:
        case = Case("split", (), 0, 5, records=10, retries=0)
        result = run(*FAST, *source(case, tmp_path), server=server)
        check(case, result, server)
        assert [record["message"] for record in server.records] == ["event %d" % n for n in range(1, 11)]


@pytest.mark.parametrize("key", ["", "large"], ids=["small body", "body larger than the socket's buffers"])
def test_413_sent_and_the_connection_reset_before_the_body_is_read(key, run, tmp_path):
    path = tmp_path / "event.json"
    path.write_bytes(ndjson([event(message="x" * (12000000 if key else 10))]))
    with StandIn(script=[EARLY_413]) as server:
        result = run(*FAST, "--timeout", "5s", "--file", str(path), server=server)
        assert result.code == 2, result.err
        assert result.summary["requests"] == 1
        assert server.connections == 1
        assert "413" in result.err


REDIRECTS = {
    "another origin": "http://localhost:{other}/api/ingest",
    "another port": "http://127.0.0.1:{other}/api/ingest",
    "another scheme": "https://127.0.0.1:{own}/api/ingest",
    "file": "file:///etc/hostname",
    "itself": "http://127.0.0.1:{own}/api/ingest",
    "nowhere": None,
    "a host that is none": "http://name.invalid/",
    "a relative path": "/elsewhere",
}
QUICK_REDIRECTS = [(307, where) for where in REDIRECTS] + [(s, "another port") for s in (301, 302, 303, 308)]


@pytest.mark.parametrize("status, where", [
    pytest.param(status, where, marks=() if (status, where) in QUICK_REDIRECTS else full,
                 id="%d to %s" % (status, where))
    for status in (301, 302, 303, 307, 308) for where in REDIRECTS
])
def test_redirect_is_final_and_the_other_server_sees_nothing(status, where, run):
    def script():
        yield Reply(status, headers=[] if location is None else [("Location", location)])

    with StandIn() as other, StandIn(script=script()) as server:
        location = REDIRECTS[where]
        if location is not None:
            location = location.format(other=other.port, own=server.port)
        result = run(*FAST, *FLAGS, server=server)
        check(Case("redirect", (), 2, 1, str(status)), result, server)
        if location is not None:
            assert location in result.err, "where it pointed is named"
        assert other.connections == 0
        assert server.connections == 1


# Retry-After.

WAITS = [  # value, least wait, most wait: what a wrong reading of the value would give is far above
    ("1", 1.0, None),
    ("0", 0.0, 4.0),
    ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0, 4.0),
    ("-5", 0.0, 4.0),
    ("nan", 0.0, 4.0),
    ("inf", 0.0, 4.0),
    ("1_0", 0.0, 4.0),
    ("5,10", 0.0, 4.0),
    ("5.5", 0.0, 4.0),
    ("9" * 5000, 0.0, 4.0),
    ("Sun, 06 Nov 99999 08:49:37 GMT", 0.0, 4.0),
    ("", 0.0, 4.0),
    ("soon", 0.0, 4.0),
]


UNNAMED_WAITS = ("inf", "5.5", "", "soon")


@pytest.mark.parametrize("value, least, most", [
    pytest.param(*row, id="Retry-After: " + row[0][:40], marks=full if row[0] in UNNAMED_WAITS else ())
    for row in WAITS])
def test_429_waits_at_least_what_retry_after_validly_says(value, least, most, run):
    with StandIn(script=[Reply(429, headers=[("Retry-After", value)])]) as server:
        result = run(*FAST, *FLAGS, server=server)
        check(Case("wait", (), 0, 2, seconds=5), result, server)
        waited = server.requests[1].time - server.requests[0].time
        assert waited >= least
        assert most is None or waited < most


def test_429_waits_until_the_http_date_of_retry_after(run):
    until = int(time.time()) + 2
    value = email.utils.formatdate(until, usegmt=True)
    epoch = time.time() - time.monotonic()
    with StandIn(script=[Reply(429, headers=[("Retry-After", value)])]) as server:
        result = run(*FAST, *FLAGS, server=server)
        check(Case("date", (), 0, 2, seconds=5), result, server)
        assert server.requests[1].time + epoch >= until - 0.05


# TLS.


@pytest.mark.parametrize("which, trusted", [
    pytest.param("self_signed", False, id="self-signed"),
    pytest.param("expired", True, id="expired"),
    pytest.param("other_host", True, id="for another host"),
    pytest.param("good", False, id="unknown authority"),
])
def test_certificate_that_does_not_verify_is_final(which, trusted, run):
    authority = certs.authority()
    env = {"SSL_CERT_FILE": authority.root} if trusted else {}
    with StandIn(tls=getattr(authority, which)) as server:
        result = run(*FAST, *FLAGS, server=server, env=env)
        check(Case(which, (), 2, 0, "certificate", tries=1), result, server)
        assert server.connections == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_certificate_of_the_test_root_is_taken_with_SSL_CERT_FILE(host, run):
    authority = certs.authority()
    with StandIn(tls=authority.good) as server:
        result = run(*FAST, "--timeout", "5s", "--base-url", "https://%s:%d" % (host, server.port), *FLAGS,
                     env={"SSL_CERT_FILE": authority.root})
        check(Case("good", (), 0, 1), result, server)


@pytest.mark.parametrize("serve, words", [
    pytest.param(cut, r".", id="handshake cut"),
    pytest.param(reset, r".", id="handshake reset"),
    pytest.param(hold, TIMED_OUT, id="handshake hung"),
])
def test_tls_handshake_fault_is_retried(serve, words, run):
    with Bare(serve) as server:
        result = run(*FAST, "--base-url", "https://127.0.0.1:%d" % server.port, *FLAGS)
        check(Case("handshake", (), 3, 0, words, tries=2), result, None)
        assert server.connections == 2


IN_TLS = [
    Case("closed without an answer", twice(CLOSE), 3, 2, r"."),
    Case("reset after the request", twice(RESET_AFTER), 3, 2, r"."),
    Case("silent", twice(SILENT), 3, 2, TIMED_OUT),
    Case("headers a byte at a time", twice(DRIP_HEADERS), 3, 2, TIMED_OUT),
    Case("endless 100 Continue", twice(ENDLESS_100), 3, 2, TIMED_OUT),
    Case("a body that drips", (DRIP_BODY,), 0, 1),
    Case("a body that breaks off", (BROKEN_BODY,), 0, 1),
    Case("endless trailers", (ENDLESS_TRAILERS,), 0, 1),
    Case("503, then 200", (503,), 0, 2),
]


@pytest.mark.parametrize("case", quick(IN_TLS, "closed without an answer", "headers a byte at a time"))
def test_fault_inside_tls(case, run):
    authority = certs.authority()
    with StandIn(script=case.script, tls=authority.good) as server:
        result = run(*FAST, *FLAGS, server=server, env={"SSL_CERT_FILE": authority.root})
        check(case, result, server)


def test_https_to_a_plain_port_is_retried(run):
    with StandIn() as server:
        result = run(*FAST, "--base-url", "https://127.0.0.1:%d" % server.port, *FLAGS)
        check(Case("plain", (), 3, 0, r"TLS|SSL", tries=2), result, None)
        assert server.connections == 2
        assert not server.records


def test_http_to_a_tls_port_is_retried(run):
    with StandIn(tls=certs.authority().good) as server:
        result = run(*FAST, "--base-url", "http://127.0.0.1:%d" % server.port, *FLAGS)
        check(Case("tls", (), 3, 2, r".", seen=0), result, server)
        assert server.connections == 2


# Names and addresses.


def test_name_that_does_not_resolve_is_retried_and_named(run):
    result = run(*FAST, "--timeout", "5s", "--base-url", "http://name.invalid", *FLAGS)
    check(Case("name", (), 3, 0, r"name\.invalid", tries=2, seconds=11), result, None)


def test_name_look_up_that_hangs_is_cut_at_the_timeout(run, tmp_path):
    env = customized(tmp_path, RESOLVER % "time.sleep(60)")
    result = run(*FAST, "--base-url", "http://service.invalid", *FLAGS, env=env)
    check(Case("hung look-up", (), 3, 0, r"service\.invalid", tries=2), result, None)


def test_name_look_up_that_hangs_is_cut_at_the_deadline(run, tmp_path):
    env = customized(tmp_path, RESOLVER % "time.sleep(60)")
    result = run("--timeout", "50s", "--deadline", "0.5s", "--json", "--base-url", "http://service.invalid",
                 *FLAGS,
                 env=env)
    check(Case("hung look-up", (), 3, 0, r"service\.invalid|deadline", tries=1, seconds=1.5), result, None)


@pytest.mark.parametrize("kind", ["refuses", "never accepts"])
def test_a_live_address_after_a_dead_one_is_reached_within_the_timeout(kind, run, tmp_path):
    with RefusedPort() as refused, full_backlog() as full, StandIn() as server:
        env = resolver(tmp_path, [refused.port if kind == "refuses" else full, server.port])
        result = run(*FAST, "--timeout", "2s", "--retries", "0", "--base-url", "http://service.invalid",
                     *FLAGS,
                     env=env)
        check(Case("dead first", (), 0, 1, seconds=3), result, server)


@full
def test_many_dead_addresses_share_one_timeout(run, tmp_path):
    with full_backlog() as port:
        env = resolver(tmp_path, [port] * 8)
        result = run(*FAST, "--base-url", "http://service.invalid", *FLAGS, env=env)
        check(Case("all dead", (), 3, 0, r".", tries=2), result, None)


# Kept connections, and batches of which one fails.


@pytest.mark.parametrize("step", [
    pytest.param(Raw(EMPTY, then="close"), id="closed"),
    pytest.param(Raw(EMPTY, then="reset"), id="reset"),
    pytest.param(Reply(200, close=True), id="closed as announced"),
])
def test_kept_connection_closed_between_two_batches_is_opened_anew(step, run, tmp_path):
    with StandIn(script=[step, step]) as server:
        case = Case("kept", (), 0, 3, records=3)
        result = run(*FAST, "--batch-size", "1", *source(case, tmp_path), server=server)
        assert result.code == 0, result.err
        assert result.err == ""
        summary = result.summary
        assert (summary["delivered"], summary["undelivered"], summary["retries"]) == (3, 0, 0)
        assert 3 <= summary["requests"] <= 5, "a stale connection counts as a request at most"
        assert len(server.requests) == 3
        assert server.connections == 3


def test_kept_connection_is_used_for_all_batches(run, tmp_path):
    with StandIn() as server:
        case = Case("kept", (), 0, 20, records=20, retries=0, seconds=10)
        result = run(*FAST, "--timeout", "5s", "--batch-size", "1", *source(case, tmp_path), server=server)
        check(case, result, server)
        assert server.connections == 1


def test_connection_that_closes_under_each_request_is_opened_anew_once_a_batch_only(run, tmp_path):
    with StandIn(script=[200, CLOSE, CLOSE, CLOSE]) as server:
        case = Case("closes", (), 3, 4, records=2)
        result = run(*FAST, "--batch-size", "1", *source(case, tmp_path), server=server)
        assert result.code == 3, result.err
        assert result.summary["retries"] == 1
        assert result.summary["requests"] == len(server.requests) == 4


def test_batch_2_of_3_refused_names_the_records_and_keeps_the_rest(run, tmp_path):
    left = tmp_path / "left.ndjson"
    with StandIn(script=[200, 400]) as server:
        case = Case("refused", (), 2, 2, r"records 101-300", records=300, delivered=100, retries=0)
        result = run(*FAST, "--timeout", "5s", "--undelivered", str(left), *source(case, tmp_path),
                     server=server)
        check(case, result, server)
    assert left.read_bytes() == ndjson(events(300)[100:])
    with StandIn() as server:
        again = run("--file", str(left), "--ndjson", server=server)
        assert again.code == 0, again.err
        assert len(server.records) == 200


# A file that changes while it is sent.


def rewrite(path):
    """Other records of the same size in the second half."""
    with open(str(path), "r+b") as file:
        data = file.read()
        start = data.index(b"\n", len(data) // 2) + 1
        file.seek(start)
        file.write(data[start:].replace(b"event ", b"OTHER "))


def truncate(path):
    os.truncate(str(path), path.stat().st_size // 2)


def append(path):
    with open(str(path), "ab") as file:
        file.write(ndjson(events(3)))


@pytest.mark.parametrize("change, code", [
    pytest.param(truncate, 4, id="cut"),
    pytest.param(rewrite, 4, id="rewritten"),
    pytest.param(append, 0, id="appended to"),
])
def test_regular_file_that_changes_while_it_is_sent(change, code, run, tmp_path):
    path = tmp_path / "events.ndjson"
    path.write_bytes(ndjson(events(200, metadata={"filler": "x" * 50000})))

    def spoil(server, connection, request):
        change(path)
        connection.sendall(EMPTY)
        connection.close()

    left = tmp_path / "left.ndjson"
    with StandIn(script=[spoil]) as server:
        result = run("--file", str(path), "--ndjson", "--json", "--undelivered", str(left), server=server)
        assert result.code == code, result.err
        summary = result.summary
        assert summary["read"] == 200
        first = len(server.requests[0].json)
        assert summary["delivered"] == first + len(server.records)
        assert all("OTHER" not in record["message"] for record in server.records)
        if code:
            assert "events.ndjson" in result.err
            assert re.search(r"chang", result.err), result.err
            assert summary["delivered"] < 200
        else:
            assert summary["delivered"] == 200
            assert not left.exists()


# Memory: an answer is read to its bound, whatever its size.


def peak_memory(process):
    """Wait for the end; the most memory it had, in bytes."""
    end = time.monotonic() + 30
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        assert time.monotonic() < end, "did not end"
        time.sleep(0.01)
    process.popen.returncode = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="no wait4 here")
@pytest.mark.parametrize("step", [
    pytest.param(HUGE_BODY, id="100 MB"),
    pytest.param(hundred_mb(b""), id="100 MB without a length", marks=full),
    pytest.param(hundred_mb(CHUNKED, b"", b"%x" % HUNDRED_MB), id="100 MB in one chunk", marks=full),
    pytest.param(GZIP_BOMB, id="a gzip bomb"),
    pytest.param(Raw(lambda: iter([b"HTTP/1.1 503 No\r\n\r\n"] + [b"x" * 1000000] * 100)),
                 id="100 MB of error"),
])
def test_memory_stays_flat_whatever_the_answer_weighs(step, start):
    with StandIn(script=[200, step]) as server:
        small = peak_memory(start(*FAST, "--retries", "0", *FLAGS, server=server))
        large = peak_memory(start(*FAST, "--retries", "0", *FLAGS, server=server))
        assert len(server.requests) == 2
    assert large < small + 8 * 1024 * 1024


# Signals.

SIGNALS = [pytest.param(signal.SIGINT, 130, id="INT"), pytest.param(signal.SIGTERM, 143, id="TERM")]
ONE_SIGNAL = [pytest.param(signal.SIGINT, 130, id="INT", marks=full), SIGNALS[1]]
posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def ended(process, began, within=5):
    """The result of a process that ends by itself, standard input still open."""
    process.popen.wait(20)
    assert time.monotonic() - began < within, "took %.1f s to stop" % (time.monotonic() - began)
    return process.result()


def accounted(result, delivered, undelivered, invalid=0):
    summary = result.summary
    assert (summary["read"], summary["delivered"], summary["undelivered"], summary["invalid"]) == (
        delivered + undelivered + invalid, delivered, undelivered, invalid), result


def drained(pipe):
    """Wait until the other side has read all that was written to the pipe."""
    fcntl = pytest.importorskip("fcntl")
    termios = pytest.importorskip("termios")
    end = time.monotonic() + 20
    while struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0]:
        assert time.monotonic() < end, "nobody reads standard input"
        time.sleep(0.01)


def feed(process, data):
    process.stdin.write(data)
    process.stdin.flush()
    drained(process.stdin)


@posix
@pytest.mark.parametrize("number, code", SIGNALS)
def test_signal_while_sending_stops_at_once(number, code, start, tmp_path):
    left, path = tmp_path / "left", tmp_path / "events.ndjson"
    path.write_bytes(ndjson(events(5)))
    with StandIn(script=[200, SILENT]) as server:
        process = start("--timeout", "60s", "--json", "--batch-size", "2", "--file", path, "--ndjson",
                        "--undelivered", left, server=server)
        server.wait_for_requests(2)
        began = time.monotonic()
        process.send_signal(number)
        result = ended(process, began)
    assert result.code == code
    accounted(result, 2, 3)
    assert left.read_bytes() == ndjson(events(5)[2:])
    assert re.search(r"records 3-5", result.err), result.err


@posix
@pytest.mark.parametrize("mode", [(), ("--async",)], ids=["sync", "async"])
@pytest.mark.parametrize("number, code", SIGNALS)
def test_signal_while_sending_one_event_from_flags(number, code, mode, start):
    gate = threading.Event()
    with StandIn(script=[Reply(200, delay=gate)]) as server:
        process = start("--timeout", "60s", "--json", *mode, *FLAGS, server=server)
        server.wait_for_requests(1)
        began = time.monotonic()
        process.send_signal(number)
        if mode:
            gate.set()
        result = ended(process, began)
    assert result.code == code
    accounted(result, 1 if mode else 0, 0 if mode else 1)


@posix
@pytest.mark.parametrize("number, code", SIGNALS)
def test_signal_while_waiting_stops_at_once(number, code, start):
    with StandIn(script=[Reply(503, headers=[("Retry-After", "50")])]) as server:
        process = start("--verbose", "--json", *FLAGS, server=server)
        server.wait_for_requests(1)
        process.wait_for_err("503")
        began = time.monotonic()
        process.send_signal(number)
        result = ended(process, began)
        assert len(server.requests) == 1
    assert result.code == code
    accounted(result, 0, 1)


@posix
@pytest.mark.parametrize("number, code", SIGNALS)
def test_signal_while_reading_sends_nothing_and_keeps_what_was_read(number, code, start, tmp_path):
    left = tmp_path / "left"
    with StandIn() as server:
        process = start("--json", "--stdin", "--ndjson", "--undelivered", left, server=server,
                        stdin=subprocess.PIPE)
        feed(process, ndjson(events(3)))
        began = time.monotonic()
        process.send_signal(number)
        result = ended(process, began)
        assert server.connections == 0
    assert result.code == code
    accounted(result, 0, 3)
    assert left.read_bytes() == ndjson(events(3)), "nobody else has what came from a pipe"


@posix
@pytest.mark.parametrize("number, code", SIGNALS)
def test_signal_while_a_fifo_has_no_writer_stops_at_once(number, code, start, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(str(fifo))
    process = start("--verbose", "--json", "--file", fifo, "--ndjson", "--base-url", "http://127.0.0.1:9")
    wait_until_it_is_at(process, fifo)
    began = time.monotonic()
    process.send_signal(number)
    result = ended(process, began)
    assert result.code == code
    accounted(result, 0, 0)


def wait_until_it_is_at(process, fifo):
    """Until the process has the fifo open, or waits in open() for its writer (only Linux tells)."""
    own = "/proc/%d" % process.pid
    if not os.path.isdir(own):
        pytest.skip("no /proc here")
    end = time.monotonic() + 20
    while True:
        for descriptor in os.listdir(own + "/fd"):
            with contextlib.suppress(OSError):
                if os.readlink("%s/fd/%s" % (own, descriptor)) == str(fifo):
                    return
        for task in os.listdir(own + "/task"):
            with contextlib.suppress(OSError), open("%s/task/%s/wchan" % (own, task)) as file:
                if re.search("fifo|wait_for_partner", file.read()):
                    return
        assert time.monotonic() < end, "it does not open the fifo"
        time.sleep(0.01)


@posix
@pytest.mark.parametrize("number, code", SIGNALS)
def test_async_first_signal_stops_the_reading_and_flushes(number, code, start):
    gate = threading.Event()
    with StandIn(script=[Reply(200, delay=gate)]) as server:
        process = start("--timeout", "60s", "--async", "--batch-size", "2", "--flush-interval", "60s",
                        "--json",
                        "--stdin", "--ndjson", server=server, stdin=subprocess.PIPE)
        feed(process, ndjson(events(5)))
        server.wait_for_requests(1)
        began = time.monotonic()
        process.send_signal(number)
        gate.set()
        result = ended(process, began)
        assert result.code == code
        accounted(result, 5, 0)
        assert server.records == events(5)


@posix
@pytest.mark.parametrize("number, code", ONE_SIGNAL)
def test_async_signal_while_waiting_still_flushes(number, code, start):
    with StandIn(script=[Reply(503, headers=[("Retry-After", "1")])]) as server:
        process = start("--verbose", "--async", "--flush-interval", "1ms", "--json", "--stdin", "--ndjson",
                        server=server, stdin=subprocess.PIPE)
        feed(process, ndjson(events(3)))
        server.wait_for_requests(1)
        process.wait_for_err("503")
        began = time.monotonic()
        process.send_signal(number)
        result = ended(process, began, within=10)
        assert result.code == code
        accounted(result, 3, 0)


@posix
def test_async_second_signal_stops_at_once(start, tmp_path):
    left = tmp_path / "left"
    with StandIn(script=[SILENT]) as server:
        process = start("--timeout", "60s", "--async", "--batch-size", "2", "--json", "--stdin", "--ndjson",
                        "--undelivered", left, server=server, stdin=subprocess.PIPE)
        feed(process, ndjson(events(5)))
        server.wait_for_requests(1)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        result = ended(process, began)
        assert result.code in (130, 143)
        accounted(result, 0, 5)
        assert sorted(left.read_bytes().splitlines()) == sorted(ndjson(events(5)).splitlines())


# The deadline.

DEADLINE = ("--json", "--deadline", "0.5s", "--timeout", "60s", "--retries", "1000", "--backoff-initial",
            "1ms",
            "--backoff-max", "5ms")


@pytest.mark.parametrize("mode", [pytest.param((), id="sync"),
                                  pytest.param(("--async",), id="async", marks=full)])
@pytest.mark.parametrize("step", [503, SILENT, *(pytest.param(step, marks=full) for step in (
    RESET_BEFORE, DRIP_HEADERS, ENDLESS_100))], ids=str)
def test_deadline_bounds_the_run_whatever_the_server_does(step, mode, run, tmp_path):
    path, left = tmp_path / "events.ndjson", tmp_path / "left"
    path.write_bytes(ndjson(events(5)))
    with StandIn(default=step) as server:
        result = run(*DEADLINE, *mode, "--batch-size", "2", "--file", path, "--ndjson", "--undelivered", left,
                     server=server)
    assert result.code == 3, result.err
    accounted(result, 0, 5)
    assert result.summary["seconds"] <= 1.5
    assert left.read_bytes() == ndjson(events(5))
    assert "deadline" in result.err


@pytest.mark.parametrize("mode", [(), ("--async", "--flush-interval", "60s")], ids=["sync", "async"])
def test_deadline_cuts_a_standard_input_that_stalls(mode, start, tmp_path):
    left = tmp_path / "left"
    with StandIn() as server:
        process = start(*DEADLINE, *mode, "--stdin", "--ndjson", "--undelivered", left, server=server,
                        stdin=subprocess.PIPE)
        feed(process, ndjson(events(3)))
        process.popen.wait(20)
        result = process.result()
        kept = left.read_bytes() if left.exists() else b""
        assert result.code == 3, result.err
        accounted(result, len(server.records), 3 - len(server.records))
        assert server.records + [json.loads(line.decode()) for line in kept.splitlines()] == events(3)
    assert result.summary["seconds"] <= 1.5
    assert "deadline" in result.err


@posix
def test_deadline_cuts_a_fifo_without_a_writer(run, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(str(fifo))
    result = run(*DEADLINE, "--file", fifo, "--ndjson", "--base-url", "http://127.0.0.1:9")
    assert result.code == 3, result.err
    accounted(result, 0, 0)
    assert result.summary["seconds"] <= 1.5


# Standard streams that are closed or full.

STREAMS = [
    pytest.param(">&-", ("--json",), id="standard output closed"),
    pytest.param(">/dev/full", ("--json",), id="standard output full"),
    pytest.param("2>&-", ("--verbose",), id="standard error closed"),
    pytest.param("2>/dev/full", ("--verbose",), id="standard error full"),
    pytest.param(">&- 2>&-", ("--verbose", "--json"), id="both closed"),
    pytest.param(">/dev/full 2>/dev/full", ("--verbose", "--json"), id="both full"),
    pytest.param("<&- >&- 2>&-", ("--verbose", "--json"), id="all three closed"),
]


@posix
@pytest.mark.parametrize("script, code", [
    pytest.param((), 0, id="0"), pytest.param((400,), 2, id="2"),
    pytest.param((503, 503), 3, id="3", marks=full)])
@pytest.mark.parametrize("redirect, argv", STREAMS)
def test_the_verdict_of_the_delivery_stands_with(redirect, argv, script, code, run):
    if "/dev/full" in redirect and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with StandIn(script=script) as server:
        result = run("--retries", "1", "--backoff-initial", "1ms", *argv, *FLAGS, server=server,
                     redirect=redirect)
        assert result.code == code
        assert len(server.requests) == max(1, len(script))


@posix
def test_standard_output_whose_reader_is_gone_leaves_the_verdict(start):
    with StandIn() as server:
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as file:
            result = start("--json", *FLAGS, server=server, stdout=file).result()
        assert result.code == 0, result.err
        assert len(server.records) == 1


@posix
def test_files_opened_where_the_standard_streams_were_closed_get_no_diagnostics(run, tmp_path):
    """With descriptors 0 to 2 free, the next file opened would become standard error."""
    left, path = tmp_path / "left", tmp_path / "events.ndjson"
    path.write_bytes(ndjson(events(3)))
    with StandIn(script=[400]) as server:
        result = run("--verbose", "--json", "--file", path, "--ndjson", "--undelivered", left, server=server,
                     redirect="<&- >&- 2>&-")
        assert result.code == 2
    assert left.read_bytes() == ndjson(events(3))


# Proxies: a stand-in plays the proxy.

SECRET = "pr0xy-passw0rd"


def tunnel(port):
    """A proxy's CONNECT: whatever name was asked for, the bytes go to this port of ours."""

    def step(server, sock, request):
        assert request.method == "CONNECT"
        with contextlib.closing(socket.create_connection(("127.0.0.1", port), 10)) as far:
            sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            pairs = {sock: far, far: sock}
            while True:
                for one in select.select(list(pairs), [], [], 30)[0]:
                    data = one.recv(65536)
                    if not data:
                        return
                    pairs[one].sendall(data)

    return step


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY"])
def test_proxy_of_the_environment_is_used_for_http(name, run):
    with StandIn() as proxy:
        result = run(*FAST, "--base-url", "http://service.invalid", *FLAGS,
                     env={name: "http://user:%s@127.0.0.1:%d" % (SECRET, proxy.port)}, secrets=[SECRET])
        check(Case("proxy", (), 0, 1), result, proxy)
        assert proxy.requests[0].path == "http://service.invalid/api/ingest"
        assert proxy.requests[0].headers["host"] == "service.invalid"
        assert proxy.requests[0].headers["proxy-authorization"].startswith("Basic ")


@pytest.mark.parametrize("name", ["https_proxy", "HTTPS_PROXY"])
def test_proxy_of_the_environment_is_used_by_connect_for_https(name, run, tmp_path):
    authority = certs.authority()
    with StandIn(tls=authority.good) as server, StandIn(script=[tunnel(server.port)]) as proxy:
        case = Case("connect", (), 0, 3, records=3, retries=0)
        result = run(*FAST, "--timeout", "5s", "--base-url", "https://localhost:4433", "--batch-size", "1",
                     *source(case, tmp_path), secrets=[SECRET], env={
                         name: "http://user:%s@127.0.0.1:%d" % (SECRET, proxy.port),
                         "SSL_CERT_FILE": authority.root, "no_proxy": "elsewhere.example"})
        check(case, result, server)
        assert (proxy.connections, server.connections) == (1, 1), "one tunnel serves all batches"
        connect = proxy.requests[0]
        assert (connect.method, connect.path) == ("CONNECT", "localhost:4433")
        assert connect.headers["proxy-authorization"].startswith("Basic ")
        assert "x-packtrack-key" not in connect.headers
        assert KEY not in repr(connect.header_list)
        assert all("proxy-authorization" not in request.headers for request in server.requests)


def test_certificate_is_verified_behind_connect_too(run):
    authority = certs.authority()
    with StandIn(tls=authority.other_host) as server, StandIn(script=[tunnel(server.port)]) as proxy:
        result = run(*FAST, "--base-url", "https://localhost:4433", *FLAGS, env={
            "https_proxy": proxy.url, "SSL_CERT_FILE": authority.root})
        check(Case("certificate", (), 2, 0, "certificate", tries=1), result, server)


@pytest.mark.parametrize("name, value", [("no_proxy", "127.0.0.1"), ("NO_PROXY", "127.0.0.1"),
                                         ("no_proxy", "*")])
def test_NO_PROXY_goes_directly(name, value, run):
    with StandIn() as server, StandIn() as proxy:
        result = run(*FAST, *FLAGS, server=server, env={"http_proxy": proxy.url, name: value})
        check(Case("direct", (), 0, 1), result, server)
        assert proxy.connections == 0


CONNECT = [
    Case("407", twice(407), 2, 0, "407", tries=1, seen=1),
    Case("403", twice(403), 2, 0, "403", tries=1, seen=1),
    Case("502", twice(502), 3, 0, "502", tries=2, seen=2),
    Case("503", twice(503), 3, 0, "503", tries=2, seen=2),
    Case("200 in headers that never end", twice(DRIP_HEADERS), 3, 0, TIMED_OUT, tries=2, seen=2),
    Case("silence", twice(SILENT), 3, 0, TIMED_OUT, tries=2, seen=2),
    Case("endless 100 Continue", twice(ENDLESS_100), 3, 0, TIMED_OUT, tries=2, seen=2),
    Case("a reset", twice(RESET_AFTER), 3, 0, r"reset|closed|broken", tries=2, seen=2),
    Case("an end", twice(CLOSE), 3, 0, r"closed|proxy|answer", tries=2, seen=2),
    Case("a banner", twice(BANNER), 3, 0, r"HTTP|proxy|answer", tries=2, seen=2),
    Case("200, then silence", twice(Raw(OK + b"\r\n", then="hang")), 3, 0, TIMED_OUT, tries=2, seen=2),
    Case("200, then an end", twice(Raw(OK + b"\r\n", then="close")), 3, 0, r".", tries=2, seen=2),
]


@pytest.mark.parametrize("case", quick(CONNECT, "407", "403", "502", "503", "silence"))
def test_connect_answered_by(case, run):
    with StandIn(script=case.script) as proxy:
        result = run(*FAST, "--base-url", "https://service.invalid", *FLAGS, secrets=[SECRET],
                     env={"https_proxy": "http://user:%s@127.0.0.1:%d" % (SECRET, proxy.port)})
        check(case, result, proxy)
        assert {request.method for request in proxy.requests} == {"CONNECT"}
        assert all(KEY not in repr(request.header_list) for request in proxy.requests)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy_that_refuses_connections_is_retried_without_its_password(scheme, run):
    with RefusedPort() as refused:
        result = run(*FAST, "--verbose", "--base-url", scheme + "://service.invalid", *FLAGS,
                     secrets=[SECRET], env={
            scheme + "_proxy": "http://user:%s@127.0.0.1:%d" % (SECRET, refused.port)})
    assert result.code == 3, result.err
    accounted(result, 0, 1)
    assert (result.summary["requests"], result.summary["retries"]) == (0, 1)
    assert "127.0.0.1" in result.err, "the proxy is named, since it is what is down"


@pytest.mark.parametrize("value", [
    "http://user:%s@" % SECRET, "ftp://user:%s@127.0.0.1:9" % SECRET,
    "http://user:%s@127.0.0.1:99999" % SECRET,
    "http://user:%s@127.0.0.1:x" % SECRET, "user:%s@127.0.0.1:9" % SECRET, "://%s" % SECRET,
    "http://[%s" % SECRET,
    "socks5://%s@127.0.0.1:9" % SECRET,
])
@pytest.mark.parametrize("scheme", ["https", pytest.param("http", marks=full)])
def test_proxy_variable_that_is_nonsense_shows_no_password(scheme, value, run):
    result = run(*FAST, "--verbose", "--base-url", scheme + "://name.invalid", *FLAGS, secrets=[SECRET],
                 env={scheme + "_proxy": value})
    assert result.code in (1, 2, 3), result.err
    accounted(result, 0, 1 if result.summary["read"] else 0)
