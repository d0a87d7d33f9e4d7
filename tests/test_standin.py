"""The stand-in keeps the contract, and each of its faults does what its name says."""
import gzip
import http.client
import json
import os
import pathlib
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

import standin
from certs import authority
from conftest import event, events
from standin import FAULTS, KEY, Raw, RefusedPort, Reply, StandIn

HEADERS = {"Content-Type": "application/json", "X-PackTrack-Key": KEY, "User-Agent": "test"}


def post(server, body, path="/api/ingest", method="POST", drop=(), **headers):
    """(status, headers, body) of one request with http.client."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode("utf-8")
    sent = {name: value for name, value in HEADERS.items() if name not in drop}
    sent.update((name.replace("_", "-"), value) for name, value in headers.items())
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path, body, sent)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def raw_request(body, headers=()):
    """The bytes of an ingest request."""
    lines = ["POST /api/ingest HTTP/1.1", "Host: x", "Content-Type: application/json",
             "X-PackTrack-Key: " + KEY, "Content-Length: %d" % len(body)]
    return "\r\n".join([*lines, *headers]).encode("ascii") + b"\r\n\r\n" + body


def converse(server, data, enough=200000, seconds=5.0):
    """Send `data`; (what came back, how it ended: "FIN", "RST", "enough" or "silence")."""
    got = b""
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(seconds)
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


def test_an_event_and_a_batch_are_accepted_and_recorded():
    with StandIn() as server:
        assert post(server, event())[0] == 200
        assert post(server, events(2))[0] == 200
    assert server.records == [event(), *events(2)]
    assert [request.status for request in server.requests] == [200, 200]
    assert server.checks == []


def test_raw_records_are_the_exact_bytes():
    one = (b'{"timestamp":"2025-01-01T00:00:00Z", "source":{"system":"s"},"workflow":{"id":"w"},'
           b'"actor":{"type":"t","id":"i"},"severity":"info","status":"ok",'
           b'"message":"\\u00fc \xc3\xbc ]","metadata":{"n":1.10,"i":' + b"9" * 30 + b"}}")
    with StandIn() as server:
        assert post(server, b" " + one + b"\n")[0] == 200
        assert post(server, b"[" + one + b" ,\n" + one + b" ] ")[0] == 200
    assert server.raw_records == [one, one, one]


@pytest.mark.parametrize("status, changes", [
    pytest.param(404, {"path": "/api/ingest/"}, id="other path"),
    pytest.param(404, {"method": "PUT"}, id="other method"),
    pytest.param(401, {"drop": ["X-PackTrack-Key"]}, id="no key"),
    pytest.param(401, {"X_PackTrack_Key": KEY + "x"}, id="wrong key"),
    pytest.param(415, {"drop": ["Content-Type"]}, id="no content type"),
    pytest.param(415, {"Content_Type": "text/json"}, id="other content type"),
    pytest.param(400, {"Content_Encoding": "gzip"}, id="not gzip"),
    pytest.param(400, {"Content_Encoding": "br"}, id="other encoding"),
    pytest.param(400, {"body": b"{"}, id="not JSON"),
    pytest.param(400, {"body": b""}, id="nothing"),
    pytest.param(400, {"body": b"[]"}, id="empty batch"),
    pytest.param(400, {"body": b'{"a": NaN}'}, id="NaN"),
    pytest.param(400, {"body": "\"\u00fc\"".encode("latin-1")}, id="not UTF-8"),
    pytest.param(400, {"body": [event(), 1]}, id="mixed batch"),
    pytest.param(400, {"body": event(message="")}, id="empty message"),
    pytest.param(400, {"body": event(source__system=5)}, id="system a number"),
    pytest.param(400, {"body": event(workflow={})}, id="no workflow id"),
    pytest.param(400, {"body": event(severity="loud")}, id="severity"),
    pytest.param(400, {"body": event(status="fine")}, id="status"),
    pytest.param(400, {"body": event(timestamp="2025-01-01 00:00:00Z")}, id="timestamp"),
    pytest.param(400, {"body": event(metadata=[])}, id="metadata"),
    pytest.param(400, {"body": event(colour="red")}, id="unknown field"),
    pytest.param(400, {"body": event(actor__name="x")}, id="unknown nested field"),
])
def test_what_the_service_refuses_is_refused_and_not_recorded(status, changes):
    with StandIn() as server:
        assert post(server, changes.pop("body", event()), **changes)[0] == status
    assert server.records == []
    assert len(server.checks) == 1
    assert [request.status for request in server.requests] == [status]


def test_strict_false_accepts_anything():
    with StandIn(strict=False) as server:
        assert post(server, b"hello", path="/x", drop=["X-PackTrack-Key"])[0] == 200
    assert server.requests[0].body == b"hello"


def test_gzip_is_decoded():
    body = json.dumps(events(3)).encode("ascii")
    with StandIn() as server:
        assert post(server, gzip.compress(body), Content_Encoding="gzip")[0] == 200
    assert server.records == events(3)
    assert server.requests[0].body == body != server.requests[0].raw_body


def test_a_chunked_body_is_read():
    body = json.dumps(event()).encode("ascii")
    head = raw_request(b"", ["Transfer-Encoding: chunked"]).replace(b"Content-Length: 0\r\n", b"")
    with StandIn() as server:
        got, _ = converse(server, head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), enough=15)
    assert got.startswith(b"HTTP/1.1 200 OK\r\n")
    assert server.records == [event()]


def test_health_needs_the_key():
    with StandIn() as server:
        assert post(server, b"", path="/api/health", method="GET")[0] == 200
        assert post(server, b"", path="/api/health", method="GET", drop=["X-PackTrack-Key"])[0] == 401
    assert server.records == []


def test_the_script_is_followed_and_then_the_default():
    with StandIn(script=[503, Reply(429, headers={"Retry-After": "1"}), 202], default=204) as server:
        answers = [post(server, event()) for _ in range(5)]
    assert [answer[0] for answer in answers] == [503, 429, 202, 204, 204]
    assert answers[1][1]["Retry-After"] == "1"
    assert len(server.records) == 3


@pytest.mark.parametrize("status", [200, 204, 205, 301, 304, 404, 503])
def test_a_connection_is_kept_after_a_sane_answer(status):
    with StandIn(default=status) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        for _ in range(3):
            connection.request("POST", "/api/ingest", json.dumps(event()), HEADERS)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        connection.close()
    assert server.connections == 1
    assert [request.connection for request in server.requests] == [1, 1, 1]


@pytest.mark.parametrize("close", [True, "silently"])
def test_a_reply_can_close_the_connection(close):
    with StandIn(script=[Reply(close=close)]) as server:
        got, end = converse(server, raw_request(json.dumps(event()).encode("ascii")))
    assert end == "FIN"
    assert (b"Connection: close" in got) is (close is True)


def test_a_reply_can_wait_for_an_event():
    gate = threading.Event()
    with StandIn(script=[Reply(delay=gate)]) as server:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(post(server, event())))
        thread.start()
        server.wait_for_requests(1)
        assert answers == []
        gate.set()
        thread.join(10)
    assert answers[0][0] == 200


def test_a_function_as_a_step_does_the_rest_itself():
    def step(server, sock, request):
        assert server.acknowledge(request) == 200
        sock.sendall(b"HTTP/1.1 299 Fine\r\nContent-Length: 0\r\n\r\n")
        return "keep"
    with StandIn(script=[step]) as server:
        got, _ = converse(server, raw_request(json.dumps(event()).encode("ascii")) * 2, enough=120)
    assert got.startswith(b"HTTP/1.1 299 Fine") and b"HTTP/1.1 200 OK" in got
    assert len(server.records) == 2


def test_raw_sends_its_parts_and_ends_as_told():
    with StandIn(script=[Raw([b"HTTP/1.1 2", 0.01, b"00 OK\r\n\r\n"], then="reset")]) as server:
        got, end = converse(server, raw_request(b"{}"))
    # A reset may overtake what was sent before it.
    assert b"HTTP/1.1 200 OK\r\n\r\n".startswith(got)
    assert end == "RST"


# name: (how it ends, what comes first, how many records, how many requests)
EXPECTED = {
    "RESET_BEFORE": ("RST", b"", 0, 0),
    "CLOSE_BEFORE": ("FIN or RST", b"", 0, 0),
    "SILENT_BEFORE": ("silence", b"", 0, 0),
    "RESET_AFTER": ("RST", b"", 0, 1),
    "CLOSE": ("FIN", b"", 0, 1),
    "SILENT": ("silence", b"", 0, 1),
    "HALF_HEADERS": ("FIN", b"HTTP/1.1 200 OK\r\nContent-Ty", 0, 1),
    "RESET_IN_HEADERS": ("RST", b"HTTP/1.1 200 OK\r\nContent-Ty", 0, 1),
    "DRIP_HEADERS": ("enough", b"HTTP/1.1 200 OK\r\nX-Drip: aaa", 0, 1),
    "ENDLESS_100": ("enough", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100", 0, 1),
    "RECORD_THEN_RESET": ("RST", b"", 1, 1),
    "RECORD_THEN_CLOSE": ("FIN", b"", 1, 1),
    "EARLY_413": ("RST", b"HTTP/1.1 413 ", 0, 1),
    "DRIP_BODY": ("enough", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "BROKEN_BODY": ("FIN", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "RESET_BODY": ("RST", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "NEVER_ENDING_BODY": ("enough", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "SILENT_BODY": ("silence", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "ENDLESS_TRAILERS": ("enough", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "DRIP_TRAILERS": ("enough", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "SHORT_LENGTH": ("FIN", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "ABSURD_LENGTH": ("FIN", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "NEGATIVE_LENGTH": ("FIN", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "WORD_LENGTH": ("FIN", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "BAD_CHUNK": ("FIN", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "HUGE_BODY": ("enough", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "GZIP_BOMB": ("silence or FIN", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "HTML_BODY": ("silence", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "GARBAGE_BODY": ("silence", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "EMPTY_BODY": ("silence", b"HTTP/1.1 200 OK\r\n", 1, 1),
    "BANNER": ("FIN", b"SSH-2.0-", 0, 1),
    "HTTP_09": ("FIN", b"<html>", 0, 1),
    "FOUR_DIGIT_STATUS": ("FIN", b"HTTP/1.1 2000 OK\r\n", 0, 1),
    "LONG_HEADER": ("FIN", b"HTTP/1.1 200 OK\r\n", 0, 1),
    "MANY_HEADERS": ("FIN", b"HTTP/1.1 200 OK\r\n", 0, 1),
}


def test_every_fault_has_its_expectation():
    assert set(EXPECTED) == set(FAULTS)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_fault_does_what_its_name_says(name):
    end, first, records, requests = EXPECTED[name]
    # Drips are slow: a few bytes show them. Ends that come must come, so those have seconds.
    enough = {"DRIP_HEADERS": 30, "DRIP_BODY": 90, "DRIP_TRAILERS": 120, "ENDLESS_100": 2000,
              "ENDLESS_TRAILERS": 2000, "HUGE_BODY": 10000000, "NEVER_ENDING_BODY": 10000000}
    with StandIn(script=[FAULTS[name]]) as server:
        got, ended = converse(server, raw_request(json.dumps(event()).encode("ascii")),
                              enough.get(name, 200000), 0.2 if "silence" in end else 10)
        if requests:
            server.wait_for_requests(1)
    if name in ("EARLY_413", "RESET_IN_HEADERS", "RESET_BODY"):
        assert got[:len(first)] == first[:len(got)]
    else:
        assert got.startswith(first)
    assert ended in end.split(" or ")
    assert len(server.records) == records
    assert len(server.requests) == requests
    if requests:
        assert server.requests[0].status == name
    assert server.checks == []


@pytest.mark.parametrize("name", sorted(name for name in EXPECTED if EXPECTED[name][2]))
def test_a_fault_that_records_still_checks_the_key(name):
    with StandIn(script=[FAULTS[name]], key="other") as server:
        got, _ = converse(server, raw_request(json.dumps(event()).encode("ascii")), enough=20)
    assert got.startswith(b"HTTP/1.1 401 ")
    assert server.records == []


def test_a_gzip_bomb_is_small_on_the_wire_and_100_mb_unpacked():
    with StandIn(script=[standin.GZIP_BOMB]) as server:
        _, headers, body = post(server, event())
    assert headers["Content-Encoding"] == "gzip"
    assert len(body) < 200000
    assert len(gzip.decompress(body)) == 100000000


def test_many_headers_are_101_lines_and_the_long_one_has_70_kb():
    with StandIn(script=[standin.MANY_HEADERS, standin.LONG_HEADER]) as server:
        many, _ = converse(server, raw_request(b"{}"))
        long, _ = converse(server, raw_request(b"{}"))
    assert len(many.split(b"\r\n\r\n")[0].split(b"\r\n")[1:]) == 101
    assert max(map(len, long.split(b"\r\n"))) >= 70000


def test_an_accept_fault_hits_a_kept_connection_at_its_next_request():
    with StandIn(script=[200, standin.RESET_BEFORE]) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("POST", "/api/ingest", json.dumps(event()), HEADERS)
        connection.getresponse().read()
        with pytest.raises(ConnectionError):
            connection.request("POST", "/api/ingest", json.dumps(event()), HEADERS)
            connection.getresponse()
        connection.close()
    assert len(server.requests) == 1


def test_what_is_not_http_is_answered_400_and_uses_up_no_step():
    with StandIn(script=[418]) as server:
        got, end = converse(server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert post(server, event())[0] == 418
    assert got.startswith(b"HTTP/1.1 400 ") and end in ("FIN", "RST")
    assert len(server.garbage) == 1


def test_a_request_that_breaks_off_is_not_a_request():
    with StandIn() as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(raw_request(b"x" * 100)[:-50])
        server.wait_for(lambda: server.incomplete)
    assert server.requests == []
    assert server.incomplete[0].raw_body == b"x" * 50


def test_wait_for_requests_fails_after_its_timeout():
    with StandIn() as server:
        with pytest.raises(AssertionError, match="1 requests"):
            server.wait_for_requests(1, timeout=0.05)


def test_a_refused_port_refuses():
    with RefusedPort() as refused:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", refused.port), timeout=5)


def test_hundreds_of_connections_leave_no_thread_and_no_socket():
    threads = threading.active_count()
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    request = raw_request(json.dumps(event()).encode("ascii"))
    sockets = []
    with StandIn() as server:
        for _ in range(300):
            sockets.append(socket.create_connection(("127.0.0.1", server.port)))
        for sock in sockets:
            sock.sendall(request)
        server.wait_for_requests(300, timeout=60)
        server.wait_for_connections(300)
    for sock in sockets:
        sock.close()
    assert len(server.records) == 300
    assert threading.active_count() == threads
    if files:
        assert len(os.listdir("/proc/self/fd")) == files


def test_close_does_not_wait_for_those_that_hang():
    faults = [standin.SILENT, standin.DRIP_BODY, standin.SILENT_BEFORE, standin.NEVER_ENDING_BODY,
              Reply(delay=3600), Reply(delay=threading.Event())]
    sockets = []
    with StandIn(script=faults) as server:
        for _ in faults:
            sock = socket.create_connection(("127.0.0.1", server.port))
            sockets.append(sock)
            server.wait_for_connections(len(sockets))
            sock.sendall(raw_request(json.dumps(event()).encode("ascii")))
        server.wait_for_requests(len(faults) - 1)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    for sock in sockets:
        sock.close()


@pytest.mark.skipif(os.name != "posix", reason="ends on TERM")
@pytest.mark.parametrize("end", ["TERM", "stdin"])
def test_it_runs_as_a_process(end, tmp_path):
    process = subprocess.Popen(
        [sys.executable, standin.__file__, "--port-file", "port", "--script", "503,CLOSE",
         "--record", "records", "--log", "log", "--until-stdin-closes"],
        cwd=str(tmp_path), stdin=subprocess.PIPE)
    try:
        limit = time.monotonic() + 20
        while not (tmp_path / "port").exists():
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.01)

        class Server:
            port = int((tmp_path / "port").read_text())
        assert post(Server, event())[0] == 503
        with pytest.raises(ConnectionError):
            post(Server, event())
        assert post(Server, events(2))[0] == 200
        if end == "TERM":
            process.send_signal(signal.SIGTERM)
        else:
            process.stdin.close()
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdin.close()
    lines = pathlib.Path(tmp_path / "records").read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == events(2)
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["status"] for line in log] == ["503", "CLOSE", "200"]


def test_it_speaks_tls_and_counts_failed_handshakes():
    made = authority()
    context = ssl.create_default_context(cafile=made.root)
    with StandIn(script=[200, standin.SILENT_BEFORE], tls=made.good) as server:
        assert server.url.startswith("https://")
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=10, context=context)
        connection.request("POST", "/api/ingest", json.dumps(event()), HEADERS)
        assert connection.getresponse().status == 200
        connection.close()
        with socket.create_connection(("127.0.0.1", server.port), timeout=0.2) as sock:
            with pytest.raises(socket.timeout):
                context.wrap_socket(sock, server_hostname="127.0.0.1")
        got, _ = converse(server, b"GET / HTTP/1.1\r\n\r\n")
        server.wait_for(lambda: server.handshakes)
    assert b"200 OK" not in got
    assert server.records == [event()]
    assert len(server.handshakes) == 1
