"""Server and network: a row for each fault, with verdict, requests, whole standard error and sums.

lone() makes a row of one event that fails, all_delivered() and each() one of several batches.
"""
import re
import struct
import subprocess
import sys
import time

import pytest

from conftest import FLAGS, KEY, PYTHON, Case, event, events, rows
from standin import StandIn
from steps import ENCODINGS, FAULTS, OK_HEAD, Fault, Raw, Reply, echo, refuse_larger, status_line, tunnel

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a matter of Linux")
OLD = subprocess.run([PYTHON, "-c", "import sys; sys.exit(sys.version_info < (3, 8))"]).returncode
modern = pytest.mark.skipif(OLD != 0, reason="the ssl module of Python 3.6 and 3.7 knows less")
ONE, BATCHES = "{fast} {event} --json ", "{fast} --json --batch-size 1 "
BIG = {"big.json": [event(message="x" * 15000000)]}  # more than the sockets' buffers hold
SEND_BIG = "{fast} --json --file big.json "
KEPT, CHUNKS = b"Content-Length: 2\r\n\r\n{}", b"Transfer-Encoding: chunked\r\n\r\n"
TLS = {"env": {"SSL_CERT_FILE": "{root}"}, "server": {"tls": "good"}}
SITE = {"PYTHONPATH": "{tmp}/site", "PYTHONDONTWRITEBYTECODE": "1"}
AWAY = {**SITE, "PACKTRACK_BASE_URL": "http://service.invalid"}


def sums(read=1, delivered=0, requests=2, retries=1, **error):
    """The --json line; what is ... is not compared."""
    line = {"read": read, "delivered": delivered, "undelivered": read - delivered, "invalid": 0,
            "requests": requests, "retries": retries, "error": error or None}
    return {name: value for name, value in line.items() if value is not ...}


DONE = {"requests": 1, "json": sums(1, 1, 1, 0)}


def lone(id, message, script=(), code=3, argv=ONE, requests=None, counted=None, retries=None, status=None,
         kind=None, where=None, before="", **fields):
    """One event that is not delivered. counted: the requests of --json, where the server saw fewer."""
    number = len(script) if requests is None else requests
    counted = number if counted is None else counted
    retries = max(0, len(script) - 1) if retries is None else retries
    kind = kind or ("invalid", "refused", "retries_exhausted")[code - 1]
    return Case(id, argv, script=script, code=code, requests=number, err=before + "error: " + message,
                json=sums(1, 0, counted, retries, status=status, where=where, kind=kind), **fields)


def all_delivered(id, number, script=(), counted=..., argv=BATCHES, **fields):
    return Case(id, argv + "{events:%d}" % number, script=script, requests=number, sent=events(number),
                json=sums(number, number, counted, 0), **fields)


def each(id, *pairs, code=2, kind="refused", status=400, **fields):
    """A batch for each (step, message), all of which fail; at most 19, as further ones are not told."""
    number, lines = len(pairs), ["record %d: %s" % (n, message) for n, (_, message) in enumerate(pairs, 1)]
    assert number < 20
    lines += ["error: %s; delivered 0 of %d; not delivered: records 1-%d" % (lines[0], number, number)]
    return Case(id, BATCHES + "--retries 0 --keep-going {events:%d}" % number, code=code, requests=number,
                script=[step for step, _ in pairs], err="\n".join(lines), json=sums(
                    number, 0, number, 0, kind=kind, status=status, where="record 1"), **fields)


def ok(rest, then="hang"):
    return Raw(OK_HEAD + rest, then, records=True)


def bad(body, kind="text/plain", status=400):
    return Reply(status, body=body, headers={"Content-Type": kind})


def named(*names):
    return [FAULTS[name] for name in names]


AFTER_2 = ", after 2 attempts"
test_connection = rows(
    *[lone(name, "{host}%s" % message + AFTER_2, named(name) * 2, requests=0 if "BEFORE" in name else 2,
           counted=... if "BEFORE" in name else 2)
      for name, message in (
          ("RESET_BEFORE", ": <...>"), ("CLOSE_BEFORE", ": <...>"),
          ("RESET_AFTER", ": connection reset by peer"), ("BANNER", " sent no valid HTTP response"),
          ("CLOSE", ": connection closed without an answer"),
          ("HALF_HEADERS", ": connection closed amid the headers"),
          ("RESET_IN_HEADERS", ": connection reset by peer"))],
    *[lone(repr(step.parts), "{host} sent no valid HTTP response" + AFTER_2, [step] * 2)
      for step in (Raw(b"HTTP/1.1 20"), Raw(b"220 mail ESMTP\r\n", "hang"))],
    lone("amid the body", "{host}: <...>" + AFTER_2, [Fault("reset", lambda *_: "reset", at="headers")] * 2,
         argv=SEND_BIG + "--timeout 5s", files=BIG),
    lone("gone", "{refused}: <...> refused" + AFTER_2, argv=ONE + "--base-url http://{refused}", retries=1),
    Case("recorded", ONE, script=named("RECORD_THEN_RESET"), requests=2, json=sums(1, 1), sent=[event()] * 2),
)
LATE = "timed out after 0.4s, after 1 attempt"
test_silence = rows(
    lone("twice", "timed out after 0.4s" + AFTER_2, named("SILENT") * 2),
    *[lone(name + " in TLS" * bool(tls), LATE, named(name), argv=ONE + "--retries 0", full=bool(tls), **tls)
      for name in ("DRIP_HEADERS", "ENDLESS_100", "SILENT") for tls in ({}, TLS)],
    lone("UNREAD_BODY", LATE, named("UNREAD_BODY"), argv=SEND_BIG + "--retries 0", files=BIG),
    lone("SLOW_READER", LATE, named("SLOW_READER"), argv=SEND_BIG + "--retries 0", files=BIG, full=True),
)
# Whatever is left of one answer, it must not pass for the next one's.
test_body = rows(
    all_delivered("broken in many ways", 18, [
        *named("BROKEN_BODY", "RESET_BODY", "SHORT_LENGTH", "ABSURD_LENGTH", "NEGATIVE_LENGTH", "WORD_LENGTH",
               "BAD_CHUNK", "HTML_BODY", "GARBAGE_BODY", "EMPTY_BODY"),
        ok(b"Content-Length: 2\r\nContent-Length: 7\r\n\r\n{}", "keep"), ok(b"\r\n", "close"),
        ok(b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\noops", "keep"),
        *[ok(CHUNKS + rest, "close") for rest in (
            b"-5\r\n{}\r\n0\r\n\r\n", b"10\r\n{}", b"f" * 30 + b"\r\n{}", b"0" * 100000)],
        ok(b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}", "close")]),
    all_delivered("endless", 5, named("HUGE_BODY", "GZIP_BOMB", "NEVER_ENDING_BODY", "ENDLESS_TRAILERS")),
    all_delivered("drips", 4, named("DRIP_BODY", "DRIP_TRAILERS", "SILENT_BODY", "STALLED_BODY"), full=True),
    all_delivered("in TLS", 4, named("BROKEN_BODY", "DRIP_BODY", "ENDLESS_TRAILERS"), 4, full=True, **TLS),
    *[Case("a word of " + name, "{event} --verbose", script=named(name), requests=1, err="record 1: 173 "
           "bytes to {url}\nthe response body broke off: %s\nattempt 1/4: HTTP 200 (<n> ms)" % message)
      for name, message in (("BROKEN_BODY", "<...>"), ("BAD_CHUNK", "{host} sent no valid HTTP response"),
                            ("STALLED_BODY", "timed out after 1s"))],
    Case("no word of its end", "{event} --verbose", script=[ok(b"\r\n{}", "close")], requests=1,
         err="record 1: 173 bytes to {url}\nattempt 1/4: HTTP 200 (<n> ms)"),
    Case("more after it", BATCHES + "{events:2}", code=2, requests=2, sent=events(1), script=[
        ok(KEPT + b"HTTP/1.1 200 OK\r\n" + KEPT, "keep"), bad("")],
        json=sums(2, 1, 2, 0, kind="refused", status=400, where="record 2"),
        err="error: record 2: HTTP 400 Bad Request; delivered 1 of 2; not delivered: record 2"),
)
FRUGAL = """
import resource
with open("/proc/self/status") as status:
    now = [int(line.split()[1]) << 10 for line in status if line.startswith("VmSize")][0]
resource.setrlimit(resource.RLIMIT_AS, (now + (48 << 20),) * 2)
"""
HUNDRED_MB = [b"x" * 1000000] * 100
SMALL = {"env": SITE, "files": {"site/sitecustomize.py": FRUGAL}, "marks": [linux]}
test_body_memory = rows(
    *[Case(id, ONE, script=[Raw([head, *HUNDRED_MB], records=True)], full=id == "a chunk", **DONE, **SMALL)
      for id, head in (("a body", OK_HEAD + b"\r\n"), ("a chunk", OK_HEAD + CHUNKS + b"6000000\r\n"),
                       ("a chunk of -1", OK_HEAD + CHUNKS + b"-1\r\n"))],
    lone("an error", 'HTTP 400 No: "%s"' % ("x" * 200), [Raw([b"HTTP/1.1 400 No\r\n\r\n", *HUNDRED_MB])], 2,
         status=400, **SMALL),
)


# It costs a second, not the attempt's minute.
test_stalled_body = rows(*[
    all_delivered(fault, 2, named(fault), argv=BATCHES + "--timeout 60s ", full=full, timeout=20)
    for fault, full in (("SILENT_BODY", False), ("DRIP_BODY", True))])
test_not_http = rows(
    each("many", *[(step, "{host} sent no valid HTTP response, after 1 attempt") for step in (
        *named("HTTP_09", "FOUR_DIGIT_STATUS", "TWO_DIGIT_STATUS", "ZERO_STATUS", "PLUS_STATUS",
               "UNDERSCORE_STATUS", "ARABIC_STATUS"),
        *map(status_line, ("abc", "099", "-200", "2 00")), Raw(b"HTTP/2 200 OK\r\n" + KEPT),
        Raw(b"HTTP/1.1 200 " + b"x" * 70000 + b"\r\n" + KEPT), Raw(b"http/1.1 200 OK\r\n" + KEPT),
        Raw(b"\x15\x03\x01\x00\x02\x02\x46"))],
         (FAULTS["LONG_HEADER"], "{host} sent a header that is too long, after 1 attempt"),
         (FAULTS["MANY_HEADERS"], "{host} sent too many headers, after 1 attempt"),
         code=3, kind="retries_exhausted", status=None),
    all_delivered("just so", 4, [
        ok(b"".join(b"X-%d: 1\r\n" % n for n in range(97)) + KEPT, "keep"),
        ok(b"X-Long: " + b"a" * 65000 + b"\r\n" + KEPT, "keep"),
        Raw(b"HTTP/1.0 200\r\n" + KEPT, records=True), Raw(b"HTTP/1.1\t200\tOK\n" + KEPT, records=True)]),
)
test_early_200 = rows(lone("a reset", "{host} answered HTTP 200 before it had the whole request" + AFTER_2,
                           named("EARLY_200") * 2, argv=SEND_BIG + "--timeout 5s", files=BIG))

NAMES = {300: "Multiple Choices", 305: "Use Proxy", 400: "Bad Request", 402: "Payment Required",
         406: "Not Acceptable", 408: "Request Timeout", 409: "Conflict", 410: "Gone", 413: "Too Large",
         415: "Unsupported", 418: "Teapot", 422: "Unprocessable", 428: "Precondition", 430: "", 451: "Legal",
         499: "Client Closed", 600: "Parse Error"}
test_status = rows(
    all_delivered("2xx", 8, [200, 201, 202, 203, 204, 205, 206, 299], 8),
    all_delivered("after 1xx", 3, [Raw(before + b"HTTP/1.1 200 OK\r\n" + KEPT, "keep", True) for before in (
        b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50)], 3),
    each("final", *[(Reply(code, reason=name, body=""), ("HTTP %d %s" % (code, name)).rstrip()) for code, name
                    in NAMES.items()], (Raw(b"HTTP/1.1 304 No\r\n\r\n"), "HTTP 304 No"), status=300),
    each("final, beyond", (Reply(999, reason="-", body=""), "HTTP 999 -"),
         (Raw(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", "hang"), "HTTP 101 Switching"),
         (Reply(405, body=""), "HTTP 405 Method Not Allowed from {url}/api/ingest: check --base-url"),
         status=999),
    each("429 and 5xx", *[(Reply(one, reason="R", body=""), "HTTP %d R, after 1 attempt" % one) for one in (
        429, 500, 501, 502, 503, 504, 507, 511, 530, 599)], code=3, kind="retries_exhausted", status=429),
    *[Case("%d ends the run" % status, BATCHES + "--keep-going {events:2}", code=2, requests=1,
           script=[bad(body, status=status)],
           json=sums(2, 0, 1, 0, kind="refused", status=status, where="record 1"),
           err="error: record 1: HTTP %s; delivered 0 of 2; not delivered: records 1-2" % message, **fields)
      for status, body, message, fields in (
          (401, "no", '401 Unauthorized: "no"; check the API key (from PACKTRACK_API_KEY)', {}),
          (404, "a", '404 Not Found from {url}/api/ingest: "a"; check <...>', {"server": {"prefix": "/a"}}))],
    lone("503, 400", "HTTP 400 Bad Request", [503, bad("")], 2, status=400),
)
PLAIN, HTML = "HTTP 400 Bad Request", "<!DOCTYPE html><title>Sorry</title>"
test_server_words = rows(
    each("what is shown of them", (bad('{"no":"\\n"}', "application/json"), PLAIN + ': "{"no":"\\n"}"'),
         (bad("two\r\nlines\t\x1b[1m"), PLAIN + ': "two lines [1m"'), (bad(HTML), PLAIN),
         (bad(" \n" + HTML), PLAIN), (bad("oops", "TEXT/HTML; charset=utf-8"), PLAIN),
         (bad("oops", "image/png"), PLAIN),
         (bad("oops", "application/problem+json"), PLAIN + ': "oops"'), (bad(b"a\0b"), PLAIN),
         (bad(b"caf\xe9 \xc3\xa9"), PLAIN + ': "caf\ufffd \u00e9"'), (bad(""), PLAIN),
         (bad("x" * 201), PLAIN + ': "%s"' % ("x" * 200)), (bad(b" " * 65533 + b"abcdef"), PLAIN + ': "abc"'),
         (Reply(400, reason="It\x1b[31m is", body=""), "HTTP 400 It [31m is"),
         (Raw(b"HTTP/1.1 400 Bare\r\nContent-Length: 5\r\n\r\nplain", "keep"), 'HTTP 400 Bare: "plain"'),
         (Raw(b"HTTP/1.1 400\r\nContent-Length: 9\r\n\r\nabc"), 'HTTP 400: "abc"')),
    lone("of a 503", 'HTTP 503 Service Unavailable: "a"' + AFTER_2, [503, bad("a", status=503)], status=503),
)


def redirects(status, where):
    def step(server, sock, request):
        request.status = status
        sock.sendall(Reply(status, headers=[("Location", where.format(port=server.port))]).head() + b"{}")
        return "keep"
    return step, "HTTP %d redirects to %s: set --base-url to the new address " \
        "(redirects are not followed)" % (status, where[:200])


test_redirect = rows(
    each("followed nowhere", *[redirects(status, "http://localhost:{port}/api/ingest")
                               for status in (301, 300, 302, 303, 307, 308, 399)],
         *[redirects(307, where) for where in (
             "https://127.0.0.1:{port}/api/ingest", "http://127.0.0.1:{port}/api/ingest",
             "file:///etc/hostname", "http://name.invalid/", "/elsewhere", "http://x/" + "y" * 300)],
         (Reply(308, body=""), "HTTP 308 Permanent Redirect"),
         (Reply(400, headers={"Location": "/"}, body=""), "HTTP 400 Bad Request"), status=301),
)
SLOWLY = "{event} --verbose --jitter 0 --retries 1 --backoff-initial 3ms "
ATTEMPT = "attempt %d/%d: HTTP %s (<n> ms)"
BUSY = Reply(503, reason="Later", body="")


def later(*values):
    return Reply(503, reason="Later", headers=[*zip(("Retry-After", "Date"), values)], body="")


def waited(*waits, attempts=2, last="200"):
    """What --verbose says of these waits, in milliseconds."""
    lines = ["record 1: 173 bytes to {url}"]
    for number, wait in enumerate(waits, 1):
        lines += [ATTEMPT % (number, attempts, "503 Later"), "retrying in %s ms" % wait]
    end = ATTEMPT % (len(waits) + 1, attempts, last) if last else "error: interrupted (SIGTERM)"
    return "\n".join([*lines, end])


NOON = "Sun, 06 Nov 1994 12:00:00 GMT"
test_retry_after = rows(
    *[Case(repr(value)[:40], SLOWLY, script=[later(value)], requests=2, err=waited(3), full=value != NOON)
      for value in ("0", NOON, "1_0", "9" * 5000, "\u0665", "Sun, 06 Nov 99999 08:49:37 GMT")],
    Case("1", SLOWLY, script=[later(" 01\t")], requests=2, err=waited(1000)),
    Case("a Date that is none", SLOWLY, script=[later(NOON, "5")], requests=2, err=waited(3)),
    Case("a lower bound", SLOWLY + "--backoff-initial 1100ms", script=[later("1")], requests=2,
         err=waited(1100), full=True),
    *[Case("60 s, " + id, SLOWLY, script=[step], kill=("TERM", "retrying in"), code="TERM", requests=1,
           err=waited("60000", last=None))
      for id, step in (("a number", later("60")), ("a date", later("Sun, 06 Nov 1994 12:01:00 GMT", NOON)))],
    *[lone(id, "HTTP 503 Later; Retry-After is %s s (limit 60 s)" % said, [step], status=503)
      for id, step, said in (
          ("61", later("61"), "61"), ("ten digits", later("9" * 10), "9" * 10),
          ("61 s, a date", later("Sun, 06 Nov 1994 12:01:01 GMT", NOON), "61"),
          ("RFC 850's", later("Sunday, 06-Nov-94 09:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT"), "3600"),
          ("asctime's", later("Sun Nov  6 08:59:37 1994", "Sun Nov  6 08:49:37 1994"), "600"),
          ("without a Date", later("Fri, 06 Nov 2099 08:49:37 GMT", "now"), "<n>"))],
    lone("past the deadline", "HTTP 503 Later; Retry-After is 31 s; no time left for another attempt before "
         "--deadline", [later("31")], argv=ONE + "--deadline 30s", kind="deadline", status=503),
    lone("not of a 400", "HTTP 400 A", [Reply(400, "A", [("Retry-After", "99")], "")], 2, status=400),
    lone("not after the last attempt", "HTTP 503 Later, after 1 attempt", [later("99")],
         argv=ONE + "--retries 0", status=503),
)


test_backoff = rows(
    Case("doubles up to its bound", SLOWLY + "--retries 5 --backoff-max 20ms", script=[BUSY] * 5, requests=6,
         err=waited(3, 6, 12, 20, 20, attempts=6)),
    Case("after a connection too", SLOWLY + "--retries 2", script=[FAULTS["CLOSE"], BUSY], requests=3,
         err=waited(3, 6, attempts=3).replace("HTTP 503 Later", "{host}: <...>", 1)),
    lone("past the deadline", "HTTP 503 Later; no time left for another attempt before --deadline", [BUSY],
         argv=ONE + "--backoff-initial 1m --backoff-max 1m --deadline 9s", kind="deadline", status=503),
)
LARGE = Reply(413, reason="Large", body="")
EARLY = 'HTTP 413 Request Entity Too Large: "{"error":"too large"}"'
test_413 = rows(
    Case("again and again", "{fast} --json {events:11}", default=refuse_larger(2),
         requests=[11, 5, 2, 3, 1, 2, 6, 3, 1, 2, 3, 1, 2], sent=events(11), json=sums(11, 11, 13, 0)),
    *[Case("down to one" + argv, "{fast} --json --undelivered left {events:4}" + argv, code=2,
           requests=requests, script=[LARGE, LARGE, 200, LARGE], after={"left": kept},
           err=message % (4 - len(kept)), json=sums(
               4, 4 - len(kept), len(requests), 0, kind="refused", status=413, where="record 2"))
      for argv, requests, kept, message in (
          ("", [4, 2, 1, 1], events(4)[1:],
           "error: record 2: HTTP 413 Large; delivered %d of 4; not delivered: records 2-4"),
          (" --keep-going", [4, 2, 1, 1, 2], events(2)[1:], "record 2: HTTP 413 Large\n"
           "error: record 2: HTTP 413 Large; delivered %d of 4; not delivered: record 2"))],
    lone("one event", "HTTP 413 Large", [LARGE], 2, status=413),
    lone("early", EARLY, named("EARLY_413"), 2, status=413),
    lone("early, and silence", "HTTP 413 Large", [Fault("silence", lambda server, sock, _: [
        sock.sendall(LARGE.head()), server.pause(60)], at="headers")], 2, SEND_BIG + "--timeout 5s",
         status=413, files=BIG),
    *[lone("early, of much" + " in TLS" * bool(tls), EARLY, named("EARLY_413"), 2, SEND_BIG + "--timeout 5s",
           status=413, files=BIG, full=bool(tls), **tls) for tls in ({}, TLS)],
)
test_kept_connection = rows(
    all_delivered("closed", 3, [ok(KEPT, "close")] * 2, python_flags=["-X", "dev"]),
    all_delivered("reset", 3, [ok(KEPT, "reset")] * 2),
    all_delivered("closed silently", 3, [Reply(close="silently")] * 2),
    all_delivered("announced", 3, [Reply(close=True)] * 2, 3),
    *[Case(name, BATCHES + "{events:2}", script=[200] + named(name) * 3, code=3, requests=number,
           json=sums(2, 1, number, 1, kind="retries_exhausted", status=None, where="record 2"),
           err="error: record 2: %s, after 2 attempts; delivered 1 of 2; not delivered: record 2" % message)
      for name, number, message in (
          ("CLOSE", 4, "{host}: connection closed without an answer"),
          ("RESET_AFTER", 4, "{host}: connection reset by peer"),
          ("HALF_HEADERS", 3, "{host}: connection closed amid the headers"),
          ("SILENT", 3, "timed out after 0.4s"))],
)


def untrusted(id, tls, message, host="127.0.0.1", kind="certificate", **fields):
    fields = {"env": TLS["env"], "marks": [modern], **fields}
    return lone(id, message, (), 2, ONE + "--base-url https://%s:{port}" % host, server={"tls": tls},
                kind=kind, **fields)


def at_hello(length, then):
    """Ends the handshake after so much of the client's first message."""
    return Fault("at_hello", lambda server, sock, _: sock.recv(length) and then, at="accept")


ISSUER = ("TLS certificate of 127.0.0.1 not trusted: unknown issuer. Install ca-certificates "
          "or set SSL_CERT_FILE")
NO_SSL = {"env": SITE, "files": {"site/sitecustomize.py": "import sys\nsys.modules['_ssl'] = None\n"}}
test_tls = rows(
    Case("trusted", ONE, **DONE, **TLS),
    Case("by its name", ONE + "--base-url https://localhost:{port}", **DONE, **TLS),
    untrusted("unknown issuer", "good", ISSUER, env=()),
    untrusted("none", "good", ISSUER + " (now: {tmp}/n, not readable)", env={"SSL_CERT_FILE": "{tmp}/n"}),
    untrusted("SSLKEYLOGFILE", "good", "cannot set up TLS (check SSLKEYLOGFILE and OPENSSL_CONF): no such "
              "file or directory", env={"SSLKEYLOGFILE": "{tmp}/none/x"}, kind="tls"),
    untrusted("self-signed", "self_signed", ISSUER + " (now: {root})"),
    untrusted("expired", "expired", "TLS certificate of 127.0.0.1 has expired"),
    untrusted("another's address", "other_host", "TLS certificate of 127.0.0.1 is not valid for 127.0.0.1"),
    untrusted("a name", "other_host", "TLS certificate of localhost is not valid for localhost", "localhost"),
    untrusted("unknown name", "unknown name", "localhost:{port} has no TLS certificate for this host name: "
              "check --base-url", "localhost", kind="tls"),
    untrusted("demands a certificate", "demands a certificate", "{host} requires a TLS client certificate, "
              "which is not supported", kind="tls", counted=..., retries=...),
    *[untrusted(id, id, "{host} " + message, kind="tls") for id, message in (
        ("old protocol", "supports none of the TLS versions that this Python has"),
        ("no common cipher", "refused the TLS handshake (does it require a client certificate?)"))],
    Case("ends a run that keeps going", BATCHES + "--keep-going {events:3}", server=TLS["server"], code=2,
         marks=[modern],
         json=sums(3, 0, 0, 0, kind="certificate", status=None, where="record 1"),
         err="error: record 1: %s; delivered 0 of 3; not delivered: records 1-3" % ISSUER),
    untrusted("without ssl", "good", "https needs Python's ssl module, which this Python was built without",
              kind="no_tls", **NO_SSL),
    Case("without ssl, keep going", BATCHES + "--keep-going --base-url https://{host} {events:2}", code=2,
         **NO_SSL, err="error: record 1: https needs <...>; delivered 0 of 2; not delivered: records 1-2",
         json=sums(2, 0, 0, 0, kind="no_tls", status=None, where="record 1")),
    Case("http without ssl", ONE, **DONE, **NO_SSL),
    lone("https to a plain port", "{host} does not speak TLS (use http://?)" + AFTER_2, retries=1,
         argv=ONE + "--base-url https://{host}"),
    lone("http to a TLS port", "{host}<...>" + AFTER_2, counted=2, retries=1, server=TLS["server"],
         argv=ONE + "--base-url http://{host}"),
    *[lone(id, message + AFTER_2, [step] * 2, requests=0, marks=[modern], **TLS) for id, step, message in (
        ("handshake cut", at_hello(9999, "close"), "{host}: TLS connection closed"),
        ("handshake reset", at_hello(50, "reset"), "{host}: connection reset by peer"),
        ("an alert", Fault("alert", lambda _, sock, __: sock.recv(9999) and sock.sendall(
            b"\x15\3\3\0\2\2\x50") or "close", at="accept"), "{host}: TLS: <...> internal error"),
        ("handshake hung", FAULTS["SILENT_BEFORE"], "timed out after 0.4s"))],
    lone("no answer", "{host}: <...> without an answer" + AFTER_2, named("CLOSE") * 2, marks=[modern], **TLS),
    all_delivered("one connection, and another", 5, [200, ok(KEPT, "close")], **TLS),
)
RESOLVER = """
import os, socket, threading, time
AF_INET, AF_INET6 = socket.AF_INET, socket.AF_INET6
real = socket.getaddrinfo
def getaddrinfo(host, port, family=0, type=0, proto=0, flags=0):
    if flags & socket.AI_NUMERICHOST:
        return real(host, port, family, type, proto, flags)
    return [(family, socket.SOCK_STREAM, 6, '', place) for family, place in resolve(host)]
socket.getaddrinfo = getaddrinfo
"""
# `dead` is a port whose backlog is full: to connect there is to wait.
DEAD = """
crowd = [socket.socket() for _ in range(4)]
crowd[0].bind(('127.0.0.1', 0))
crowd[0].listen(0)
dead = crowd[0].getsockname()[1]
[one.setblocking(False) or one.connect_ex(('127.0.0.1', dead)) for one in crowd[1:]]
[one.detach() for one in crowd]
"""
# Says where it is to connect.
LOUD = """
def connect(sock, place, connect=socket.socket.connect):
    os.write(2, b'to %d\\n' % place[1])
    return connect(sock, place)
socket.socket.connect = connect
"""
SIX, FOUR = "(AF_INET6, ('::1', %s, 0, 0))", "(AF_INET, ('127.0.0.1', %s))"
UNKNOWN = "raise socket.gaierror(-2, 'Name or service not known')"


def site(code, *more):
    return {"site/sitecustomize.py": "\n".join([RESOLVER, *more, "def resolve(host):\n    " + code])}


def to(*places):
    return "return [%s]" % ", ".join(places)


LIVE = {"env": AWAY, **DONE}
test_resolver = rows(
    lone("no such name", "cannot resolve service.invalid: Name or service not known" + AFTER_2, env=AWAY,
         retries=1, files=site(UNKNOWN)),
    lone("no address", "service.invalid:80: no address" + AFTER_2, env=AWAY, retries=1, files=site(to())),
    Case("then there is one", ONE, AWAY, requests=1, json=sums(1, 1, 1, 1), files=site(
        "global resolve; resolve = lambda _: [%s]\n    %s" % (FOUR % "{port}", UNKNOWN))),
    Case("in IDNA", ONE + "--base-url http://b\u00fccher.invalid", files=site(
        "assert host == b'xn--bcher-kva.invalid'; " + to(FOUR % "{port}")), **LIVE),
    lone("a bug", "internal error: ZeroDivisionError at line <n>; please report it", code=2, kind="internal",
         env=AWAY, files=site("raise ZeroDivisionError")),
    lone("hangs", "cannot resolve service.invalid: timed out after 0.4s" + AFTER_2, env=AWAY, retries=1,
         files=site("time.sleep(60)")),
    Case("no thread for it", ONE, files=site(to(FOUR % "{port}"), "def start(self): raise RuntimeError('no')",
                                             "threading.Thread.start = start"), **LIVE),
)
test_addresses = rows(
    *[Case(id, argv, files=site(to(*places, FOUR % "{port}"), DEAD), marks=[linux], **LIVE)
      for id, argv, places in (
        ("refused, then live", ONE, [FOUR % 1, SIX % 1]),
        ("no such family, then live", ONE, ["(99, ('x', 1))"]),
        ("dead, then live", ONE + "--timeout 20s", [FOUR % "dead"]))],
    Case("dead, then live, in time", ONE + "--timeout 20s", marks=[linux], timeout=4,
         files=site(to(FOUR % "dead", FOUR % "{port}"), DEAD), **LIVE),
    *[lone("families alternate, " + scheme, "service.invalid:%d: connection refused, after 1 attempt" % port,
           argv=ONE + "--retries 0 --base-url %s://service.invalid" % scheme, env=AWAY, files=site(
               to(SIX % 1, SIX % 2, SIX % 3, FOUR % 4, FOUR % 5), LOUD.replace(
                   "return connect(sock, place)", "raise OSError(111, 'Connection refused')")),
           before="| to 1\n| to 4\n| to 2\n| to 5\n| to 3\n")
      for scheme, port in (("http", 80), ("https", 443))],
    lone("dead", "timed out after 0.4s" + AFTER_2, env=AWAY, files=site(to(FOUR % "dead"), DEAD), retries=1,
         marks=[linux], full=True),
)


@linux
def test_dead_address_first(run, tmp_path):
    """The live one is reached within half a second; RFC 8305, 5: not before a quarter of it."""
    (tmp_path / "site").mkdir()

    def milliseconds(*ports):
        code = site(to(*[FOUR % port for port in ports]), DEAD)["site/sitecustomize.py"]
        (tmp_path / "site" / "sitecustomize.py").write_text(code)
        env = {**AWAY, "PYTHONPATH": str(tmp_path / "site")}
        result = run(*FLAGS, "--verbose", "--retries", "0", env=env)
        return int(re.search(r"HTTP 200 \((\d+) ms\)", result.err).group(1))
    with StandIn() as server:
        difference = min(milliseconds("dead", server.port) for _ in range(3)) - milliseconds(server.port)
    assert 150 < difference < 500


WORD, BASIC = "pr0xy-passw0rd", "Basic dXNlcjpwcjB4eS1wYXNzdzByZA=="
BY, HIDDEN = "http://user:%s@" % WORD, [WORD, BASIC[6:]]


def by(scheme, proxy="{proxy}", **more):
    """The environment with a proxy, whose password nobody may see."""
    base = scheme + "://service.invalid"
    return {"env": {scheme + "_proxy": BY + proxy, "PACKTRACK_BASE_URL": base, **more}, "secrets": HIDDEN}


DIRECT = {"proxy": [], "proxied": 0, "secrets": HIDDEN, **DONE}
REFUSED = "proxy {proxy} refused the tunnel: HTTP "
test_proxy = rows(
    Case("http", ONE, proxy=[], json=sums(1, 1, 1, 0), proxied=[{
        "path": "http://service.invalid/api/ingest", "headers": {
            "host": "service.invalid", "proxy-authorization": BASIC, "x-packtrack-key": KEY}}], **by("http")),
    Case("without a scheme", ONE, {"HTTP_PROXY": "{proxy}", "PACKTRACK_BASE_URL": "http://a.invalid:8"},
         proxy=[], json=sums(1, 1, 1, 0), proxied=[{"path": "http://a.invalid:8/api/ingest", "headers": {
             "host": "a.invalid:8", "proxy-authorization": None}}]),
    Case("all_proxy is none", ONE, {"all_proxy": BY + "{proxy}"}, **DIRECT),
    Case("no_proxy", ONE, {"http_proxy": BY + "{proxy}", "no_proxy": "x,127.0.0.1"}, **DIRECT),
    Case("NO_PROXY, all", ONE, {"http_proxy": BY + "{proxy}", "NO_PROXY": "*"}, **DIRECT),
    Case("CONNECT", BATCHES + "--base-url https://localhost:{port} {events:3}", server=TLS["server"],
         sent=events(3), requests=[{"headers": {"proxy-authorization": None}}, 1, 1], proxy=[tunnel()],
         json=sums(3, 3, 3, 0),
         proxied=[{"method": "CONNECT", "path": "localhost:{port}", "headers": {
             "host": "localhost:{port}", "proxy-authorization": BASIC, "x-packtrack-key": None}}],
         **by("https", **TLS["env"])),
    lone("CONNECT to another", "TLS certificate of localhost is not valid for localhost", code=2, proxied=1,
         argv=ONE + "--base-url https://localhost:{port}", server={"tls": "other_host"}, proxy=[tunnel()],
         kind="certificate", **by("https", **TLS["env"])),
    lone("http, 407", "proxy {proxy}: HTTP 407 Proxy Authentication Required", code=2, status=407, counted=1,
         proxy=[bad("no, user:" + WORD, status=407)], proxied=1, **by("http")),
    lone("http, 502", "HTTP 502 Bad Gateway" + AFTER_2, status=502, counted=2, retries=1, proxied=2,
         proxy=[bad("cannot reach it, " + BASIC, status=502)] * 2, **by("http")),
    Case("not one, keep going", BATCHES + "--keep-going {events:2}", proxied=0, proxy=[], code=1,
         json=sums(2, 0, 0, 0, kind="invalid", status=None, where="http_proxy"),
         err="error: http_proxy: must be http://<...>; delivered 0 of 2; not delivered: records 1-2",
         **by("http", "socks5://{proxy}")),
    Case("CONNECT, 403, keep going", BATCHES + "--keep-going {events:2}", proxy=[Reply(403, reason="No")] * 2,
         proxied=1, code=2, json=sums(2, 0, 0, 0, kind="proxy", status=403, where="record 1"), **by("https"),
         err="error: record 1: %s403 No; delivered 0 of 2; not delivered: records 1-2" % REFUSED),
    *[lone("CONNECT, %d %s" % (status, reason), (REFUSED + "%d %s" % (status, shown)).rstrip(), code=2,
           kind="proxy", status=status, proxy=[Reply(status, reason=reason)], proxied=1, **by("https"))
      for status, reason, shown in ((403, "No", "No"), (300, "A", "A"), (407, "not " + WORD, ""))],
    Case("CONNECT, 413", "{fast} --json {events:2}", proxy=[Reply(413, reason="No")], proxied=1, code=2,
         json=sums(2, 0, 0, 0, kind="proxy", status=413, where="records 1-2"), **by("https"),
         err="error: records 1-2: %s413 No; delivered 0 of 2; not delivered: records 1-2" % REFUSED),
    lone("port 65535", "proxy 127.0.0.1:65535: <...>" + AFTER_2, retries=1, **by("http", "127.0.0.1:65535")),
    *[lone(id, message + AFTER_2, retries=1, proxy=[step] * 2, proxied=2, full=id != "502", **by("https"))
      for id, step, message in (
          *[(status, Reply(int(status), reason="A"), REFUSED + status + " A")
            for status in ("429", "502", "503")],
          ("SILENT", FAULTS["SILENT"], "proxy {proxy}: timed out after 0.4s"),
          ("DRIP_HEADERS", FAULTS["DRIP_HEADERS"], "proxy {proxy}: timed out after 0.4s"),
          ("RESET_AFTER", FAULTS["RESET_AFTER"], "proxy {proxy}: connection reset by peer"),
          ("CLOSE", FAULTS["CLOSE"], "proxy {proxy}: connection closed without an answer"),
          ("BANNER", FAULTS["BANNER"], "proxy {proxy} sent no valid HTTP response"),
          ("200, silence", Raw(b"HTTP/1.1 200 OK\r\n\r\n", "hang"), "timed out after 0.4s"),
          ("200, an end", Raw(b"HTTP/1.1 200 OK\r\n\r\n"), "service.invalid:443: <...>"))],
    *[lone("refused, " + scheme, "proxy {refused}: connection refused" + AFTER_2, retries=1,
           **by(scheme, "{refused}")) for scheme in ("http", "https")],
    *[lone("TLS to it, " + scheme, scheme + "_proxy: must be http://<...>", code=1, where=scheme + "_proxy",
           proxy=[tunnel()], proxied=0, **by(scheme, **{scheme + "_proxy": "https://user:%s@{proxy}" % WORD}))
      for scheme in ("http", "https")],
    lone("no such name", "cannot resolve proxy proxy.invalid: Name or service not known" + AFTER_2, retries=1,
         files=site(UNKNOWN), **by("https", "proxy.invalid:8", **SITE)),
    *[lone("%s %s" % (scheme, value), scheme + "_proxy: must be http://[USER:PASSWORD@]HOST[:PORT] (value "
           "not shown): SOCKS proxies and TLS to a proxy are not supported", code=1, where=scheme + "_proxy",
           full=scheme == "http", **by(scheme, **{scheme + "_proxy": value % WORD}))
      for scheme in ("http", "https") for value in (
          "http://user:%s@", "ftp://user:%s@127.0.0.1:9", "http://u:%s@127.0.0.1:65536",
          "http://u:%s@127.0.0.1:x", "://%s", "http://[%s", "http://b\u00fccher-%s", "https://u:%s@a:9",
          "socks5://%s@127.0.0.1:9", "http://\udcff:%s@a:9",
          "SOCKS5h://%s@127.0.0.1")],
)
TWICE = {
    "JSON twice": lambda text: ENCODINGS["JSON, every character"](ENCODINGS["JSON, every character"](text)),
    "URL in HTML": lambda text: ENCODINGS["HTML, every character"](ENCODINGS["URL"](text)),
    "zeros": lambda text: "".join("&#%012d;" % ord(char) for char in text),
    "base64 for URLs": lambda text: ENCODINGS["base64"]("??>" + text).replace("/", "_").replace("+", "-"),
    "base64, one later": lambda text: ENCODINGS["base64"]("x" + text),
    "spaces between": " ".join, "repr's": lambda text: "".join("\\x%02x" % ord(char) for char in text)}
ODD = "pk/a+b=c&d<e>\"f'g h\\i%j-\u007e"
ONCE = [name for name in ENCODINGS if name != "invisibles between"]
ENCODINGS.update(TWICE)
ELSEWHERE = "redirects to another address: set --base-url to the new address (redirects are not followed)"


def say(text, said):
    """Bytes with the key for each %, and what is said of them."""
    return Raw(text.replace(b"%", KEY.encode("ascii"))), said


test_echo = rows(
    *[each(id, *[(echo(400, name), "HTTP 400") for name in names], **key) for id, names, key in (
        ("in every encoding", ONCE, {}), ("in two encodings", TWICE, {}),
        ("in every encoding, an odd key", ONCE, {"key": ODD, "secrets": [ODD]}))],
    each("in a Location", *[(echo(307, name), "HTTP 307 " + ELSEWHERE) for name in ONCE], status=307),
    each("in every status", *[(echo(status), "HTTP %d" % status) for status in (101, 402, 407, 413, 422)],
         *[(echo(status), "HTTP %d %s" % (status, ELSEWHERE)) for status in (301, 304, 399)],
         *[(echo(status), "HTTP %d, after 1 attempt" % status) for status in (429, 500, 503, 599)],
         (echo(405), "HTTP 405 from {url}/api/ingest: check --base-url"), status=101),
    each("in what is no answer", *[say(text, said + ", after 1 attempt") for text, said in (
        *[(text + b"\r\n\r\n", "{host} sent no valid HTTP response")
          for text in (b"%", b"HTTP/1.1 %", b"HTTP/1.1 2000 %")],
        (b"HTTP/1.1 200 OK\r\n" + b"X: %\r\n" * 101, "{host} sent too many headers"),
        (b"HTTP/1.1 100 %\r\nX: %\r\n\r\nHTTP/1.1 503 %\r\nContent-Length: 0\r\n\r\n", "HTTP 503"),
        (b"HTTP/1.1 429 A\r\nRetry-After: %\r\nContent-Length: 0\r\n\r\n", "HTTP 429 A"))],
         code=3, kind="retries_exhausted", status=None),
    each("in odd headers", *[say(b"HTTP/1.1 400 A\r\n" + text, "HTTP 400 A") for text in (
        b"Content-Length: %\r\n\r\n%", b"Transfer-Encoding: chunked\r\n\r\n%\r\n",
        b"Content-Type: %\r\nContent-Length: 2\r\n\r\nhi")]),
    each("cut by what is shown or read", *[(bad(body), PLAIN) for body in (
        "x" * 195 + KEY, "x" * 200 + KEY, b" " * 65516 + KEY.encode() + b" " * 9999, KEY[:7] + KEY + KEY[7:],
        "x" * 191 + KEY[:9], KEY[:6] + "\xfc" + KEY[6:], "\u200b".join(KEY))]),
    each("a part of it", *[(bad("a " + KEY[part]), PLAIN + ': "a %s"' % KEY[part] * shown)
         for part, shown in ((slice(5), 1), (slice(6), 0), (slice(1, 8), 1), (slice(1, 9), 0),
                             (slice(-7, 99), 1), (slice(-8, 99), 0))]),
)
test_short_key = rows(
    Case("five characters", "{event} --verbose", key="abcde", script=[echo(400)], code=2, requests=1, err=(
        "the API key is too short to be redacted from messages\nrecord 1: 173 bytes to {url}\n"
        'attempt 1/4: HTTP 400 key abcde: "{"error":"bad key abcde"}" (<n> ms)\n'
        'error: HTTP 400 key abcde: "{"error":"bad key abcde"}"')),
    Case("six", "{event} --verbose", key="abcdef", secrets=["abcdef"], script=[echo(400)], code=2, requests=1,
         err="record 1: 173 bytes to {url}\nattempt 1/4: HTTP 400 (<n> ms)\nerror: HTTP 400"),
)


def connected(process, server):
    server.wait_for_connections(1)


def drained(process, server):
    """All that was written to standard input has been read."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    process._feeder.join()
    end = time.monotonic() + 20
    while struct.unpack("i", fcntl.ioctl(process.stdin, termios.FIONREAD, bytes(4)))[0]:
        assert time.monotonic() < end, "nobody reads standard input"
        time.sleep(0.01)


def another(process, server):
    time.sleep(0.3)


# Where the program is: fields, when it is there, requests, what is said before the last line
STATES = {
    "resolving": ({"env": AWAY, "files": site("os.write(2, b'up\\n'); time.sleep(99)")}, "up", 0, "| up\n"),
    "connecting": ({"env": AWAY, "files": site(to(FOUR % "dead"), DEAD, LOUD)}, "to ", 0, "| to <n>\n"),
    "handshake": ({**TLS, "default": FAULTS["SILENT_BEFORE"]}, connected, 0, ""),
    "sending": ({"default": FAULTS["UNREAD_BODY"]}, 1, 1, ""),
    "waiting": ({"default": FAULTS["SILENT"]}, 1, 1, ""),
    "waiting in TLS": ({**TLS, "default": FAULTS["SILENT"]}, 1, 1, ""),
    "dripping": ({"default": FAULTS["DRIP_HEADERS"]}, 1, 1, ""),
    "backoff": ({"default": later("50")}, 1, 1, ""),
}


def stopped(id, state, argv="", number=2, signals=("TERM",), full=False):
    """A run that is stopped there by signals, or else by its deadline: nothing is delivered, all is kept."""
    fields, moment, requests, before = STATES[state]
    records = [event()] * number  # several connections keep them in any order
    ended = "interrupted (SIG%s)" % signals[0] if signals else "record <n>: deadline exceeded"
    return Case(id, "--timeout 60s --json --batch-size 1 --undelivered left --file in --ndjson " + argv, **{
        **fields, "files": {"in": records, **fields.get("files", {})}}, after={"left": records}, full=full,
        kill=[(name, another if n else moment) for n, name in enumerate(signals)],
        code=signals[0] if signals else 3, requests=None if "8" in argv else requests,
        json=sums(number, 0, ..., ..., kind="interrupted" if signals else "deadline"),
        err=before + "error: %s; delivered 0 of %d; not delivered: records 1-%d" % (ended, number, number))


HOLD = "{fast} --json --timeout 60s --batch-size 1 --undelivered left --stdin --ndjson "
KEEPS = {"hold": True, "stdin": events(3), "after": {"left": events(3)}}
test_signal = rows(
    *[stopped("%s, %s" % (state, name), state, signals=[name],
              full=state != "waiting" and (name != "TERM" or state in ("dripping", "sending")))
      for state in STATES for name in ("TERM", "INT", "HUP")],
    *[stopped("async, " + state, state, "--async", 3, ("INT", "TERM"), full=state != "waiting")
      for state in STATES],
    *[stopped("8 connections, " + state, state, "--connections 8", 9, full=state != "waiting")
      for state in list(STATES)[2:]],
    Case("idle input", HOLD, kill=("TERM", drained), code="TERM", json=sums(3, 0, 0, 0, kind="interrupted"),
         err="error: interrupted (SIGTERM); delivered 0 of 3; not delivered: records 1-3", **KEEPS),
    *[Case("idle input, async" + ", backoff" * bool(script), HOLD + "--async", hold=True, stdin=events(3),
           kill=kill, code=kill[0], script=script, requests=3 + len(script), sent=events(3),
           json=sums(3, 3, 3 + len(script), len(script), kind="interrupted"),
           err="error: interrupted (SIG%s); delivered 3 of 3" % kill[0])
      for kill, script in ((("HUP", drained), []), (("INT", 1), [later("1")]))],
)
test_deadline = rows(
    *[stopped(state, state, "--deadline 700ms", 2, (), state != "dripping")
      for state in list(STATES)[:-1]],
    *[stopped("8 connections, " + state, state, "--deadline 700ms --connections 8", 9, (), True)
      for state in ("handshake", "waiting")],
    Case("idle input", HOLD + "--deadline 700ms", code=3, json=sums(3, 0, 0, 0, kind="deadline"),
         err="error: deadline exceeded; delivered 0 of 3; not delivered: records 1-3", **KEEPS),
)
test_idle_input = rows(*[
    lone(id + argv, message, script, code, HOLD + "--async --flush-interval 1ms" + argv, status=status,
         hold=True, stdin=events(1), after={"left": events(1)})
    for argv in ("", " --connections 8") for id, script, code, status, message in (
        ("401", [bad("", status=401)], 2, 401, "HTTP 401 Unauthorized: check the API key (from <...>)"),
        ("400", [bad("")], 2, 400, "HTTP 400 Bad Request"),
        ("503", [BUSY, BUSY], 3, 503, "HTTP 503 Later" + AFTER_2))])
