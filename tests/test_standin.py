"""The stand-in keeps the contract, and each of its faults does what its name says."""
import contextlib
import glob
import gzip
import http.client
import json
import socket
import threading

import pytest

from conftest import event
from standin import KEY, RefusedPort, StandIn
from steps import FAULTS, Raw, Reply

HEADERS = {"Content-Type": "application/json", "X-PackTrack-Key": KEY}
ONE = json.dumps(event()).encode("ascii")


def post(server, body, path="/api/ingest", method="POST", drop=(), **headers):
    """(status, headers, body) of one request with http.client."""
    sent = {name: value for name, value in HEADERS.items() if name not in drop}
    sent.update((name.replace("_", "-"), value) for name, value in headers.items())
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body).encode(), sent)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def raw_request(body):
    return ("POST /api/ingest HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-PackTrack-Key: "
            "%s\r\nContent-Length: %d\r\n\r\n" % (KEY, len(body))).encode("ascii") + body


def converse(server, data, enough=200000, seconds=20.0):
    """Send `data`; (what came back, how it ended: "FIN", "RST", "enough" or "silence")."""
    got = b""
    with socket.create_connection(("127.0.0.1", server.port), seconds) as sock:
        try:
            sock.sendall(data)
            while len(got) < enough:
                more = sock.recv(65536)
                if not more:
                    return got, "FIN"
                got += more
        except socket.timeout:
            return got, "silence"
        except (ConnectionResetError, BrokenPipeError):
            return got, "RST"
    return got, "enough"


def test_what_is_good_is_recorded_byte_for_byte():
    odd = ONE[:-1] + b', "metadata":{"n":1.10,"text":"\\u00fc \xc3\xbc ]","i":' + b"9" * 30 + b"}}"
    with StandIn(script=[503, Reply(429, headers={"Retry-After": "1"}), 202]) as server:
        assert (post(server, ONE)[0], post(server, ONE)[1]["Retry-After"]) == (503, "1")
        assert post(server, b" " + odd + b"\n")[0] == 202
        pair = gzip.compress(b"[" + odd + b" ,\n" + odd + b" ] ")
        assert post(server, pair, Content_Encoding="gzip")[0] == 200
        assert post(server, b"", "/api/health", "GET")[0] == 200
    assert server.raw_records == [odd] * 3


@pytest.mark.parametrize("status, changes", [
    (404, {"path": "/api/ingest/"}), (404, {"method": "PUT"}), (401, {"drop": ["X-PackTrack-Key"]}),
    (401, {"X_PackTrack_Key": KEY + "x"}), (415, {"Content_Type": "text/json"}),
    (400, {"Content_Encoding": "gzip"}), (400, {"Content_Encoding": "br"}),
    *[(400, {"body": body}) for body in (
        b"{", b"", b"[]", b'{"a": NaN}', b'"\xfc"', [event(), 1], event(message=""), event(source__system=5),
        event(workflow={}), event(severity="loud"), event(status="fine"), event(metadata=[]),
        event(colour="red"), event(timestamp="2025-01-01"), event(actor__name="x"))]],
    ids=lambda value: str(value)[:40])
def test_what_the_service_refuses_is_not_recorded(status, changes):
    with StandIn() as server:
        assert post(server, **{"body": event(), **changes})[0] == status
    assert (server.records, len(server.checks), server.requests[0].status) == ([], 1, status)


def test_connections_are_kept_but_where_the_reply_closes():
    with StandIn([200, 204, 205, 301, 304, 404, 503, Reply(close=True), Reply(close="silently")]) as server:
        got, end = converse(server, raw_request(ONE) * 8)
        assert (server.connections, got.count(b"HTTP/1.1"), end) == (1, 8, "FIN")
        assert got.count(b"Connection: close") == 1
        got, end = converse(server, raw_request(ONE))
        assert (b"Connection: close" in got, end) == (False, "FIN")


# What is not FIN after the beginning of a 200: how much is enough, how it ends, what comes first.
ENDLESS = {"DRIP_HEADERS": 30, "DRIP_BODY": 90, "DRIP_TRAILERS": 120, "ENDLESS_100": 2000,
           "ENDLESS_TRAILERS": 2000, "HUGE_BODY": 10000000, "NEVER_ENDING_BODY": 10000000}
ENDS = {name: end for end, names in {
    "silence": "SILENT_BEFORE SILENT UNREAD_BODY EARLY_200 SLOW_READER SILENT_BODY STALLED_BODY HTML_BODY "
               "GARBAGE_BODY EMPTY_BODY", "FIN RST": "CLOSE_BEFORE", "enough": " ".join(ENDLESS),
    "RST": "RESET_BEFORE RESET_AFTER RECORD_THEN_RESET RESET_IN_HEADERS EARLY_413 RESET_BODY",
}.items() for name in names.split()}
FIRST = {"EARLY_413": b"HTTP/1.1 413 ", "ENDLESS_100": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100",
         "BANNER": b"SSH-2.0-", "HTTP_09": b"<html>", "HALF_HEADERS": b"HTTP/1.1 200 OK\r\nContent-Ty",
         **dict.fromkeys("RESET_BEFORE CLOSE_BEFORE SILENT_BEFORE RESET_AFTER CLOSE SILENT UNREAD_BODY "
                         "EARLY_200 SLOW_READER RECORD_THEN_RESET RECORD_THEN_CLOSE".split(), b"")}


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_a_fault_does_what_its_name_says(name):
    first = FIRST.get(name, b"HTTP/1.1 " if name.endswith("_STATUS") else b"HTTP/1.1 200 OK\r\n")
    end, enough = ENDS.get(name, "FIN"), ENDLESS.get(name, 200000)
    with StandIn(script=[FAULTS[name]]) as server:
        got, ended = converse(server, raw_request(ONE), enough, 0.2 if end == "silence" else 20)
    overtaken = ended == "RST" and got == first[:len(got)]  # a reset may overtake what was sent before it
    assert (got.startswith(first) or overtaken) and ended in end.split()
    records = FAULTS[name].records
    assert (len(server.records), len(server.requests), server.checks) == (records, "BEFORE" not in name, [])
    if records:
        with StandIn(script=[FAULTS[name]], key="other") as server:
            assert converse(server, raw_request(ONE), 20)[0].startswith(b"HTTP/1.1 401 ")
        assert server.records == []


def test_what_is_no_request():
    with StandIn(script=[418, Raw([b"HTTP/1.1 2", 0.01, b"00 OK\r\n\r\n"], "reset")]) as server:
        assert converse(server, b"\x16\x03\x01\x02\x00\x01\r\n\r\n")[0].startswith(b"HTTP/1.1 400 ")
        assert (post(server, event())[0], len(server.garbage)) == (418, 1)
        got, end = converse(server, raw_request(b"{}"))
        assert b"HTTP/1.1 200 OK\r\n\r\n".startswith(got) and end == "RST"
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(raw_request(b"x" * 100)[:-50])
        server.wait_for(lambda: len(server.garbage) == 2)
        assert (len(server.requests), server.garbage[1]) == (2, b"x" * 50)
        with pytest.raises(AssertionError, match="9 requests"):
            server.wait_for_requests(9, timeout=0.05)
    with RefusedPort() as refused, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", refused.port), timeout=20)


def test_no_thread_and_no_socket_is_left():
    threads, files = threading.active_count(), len(glob.glob("/proc/self/fd/*"))
    script = [*map(FAULTS.get, ("SILENT", "DRIP_BODY", "NEVER_ENDING_BODY")), Reply(delay=3600),
              Reply(delay=threading.Event())]
    with contextlib.ExitStack() as sockets, StandIn(script=script) as server:
        for _ in range(200):
            sock = sockets.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            sock.sendall(raw_request(ONE))
        server.wait_for_requests(200, timeout=60)
    assert (threading.active_count(), len(glob.glob("/proc/self/fd/*"))) == (threads, files)
