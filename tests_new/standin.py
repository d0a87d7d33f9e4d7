"""A stand-in for the PackTrack service: keeps the wire contract, and breaks it on request.

    with StandIn(script=[503, 200]) as server:      # then `default` (200) for ever
        ...                                         # talk to server.url
        assert server.records == [...]

Arguments of StandIn
    script    an iterable of steps (may be endless); one is consumed for each request, in order of arrival.
              Steps that act at accept are consumed by the next connection, before anything is read; on a kept
              connection by the next request's first bytes.
    default   the step that is used when the script has run out
    key       the API key that is accepted
    tls       (certfile, keyfile): speak https; (certfile, keyfile, fault): with a fault of TLS_FAULTS
    strict    check what would get a 2xx as the service does: method and path (404), key (401), content type
              (415), encoding, JSON and schema (400), and answer that status instead; why goes to `checks`
    prefix    path in front of /api/ingest and the health path;  health  that path, default /api/health
    host      address to listen on, default 127.0.0.1; "::1" works too;  port  default 0: any free port
renew(...) takes script, default, key, strict, health anew and forgets all that was: one server, many tests.

Steps
    503                     a sane answer of this status with a small JSON body
    Reply(status=200, reason=None, headers=(), body=b"{}", content_length="auto", close=False, delay=None)
                            content_length: "auto", None (none is sent: the body ends with the connection) or
                            the value to send. close: True says `Connection: close` and closes; "silently"
                            closes without saying so. delay: seconds, or an Event that is waited for.
    Raw(parts, then="close", records=False)
                            parts: bytes, or an iterable of bytes (sent), numbers (pauses in seconds) and
                            Events (waited for). then: "close" (FIN), "reset" (RST), "hang" (until the peer
                            goes) or "keep" (serve the next request). records=True: counts as a 2xx.
    function(server, sock, request)
                            does the rest of the connection itself; it is closed afterwards, unless the
                            function returns "keep" or "reset". Helpers: server.acknowledge(request) (checks
                            and records; returns the status), server.pause(seconds), server.hang(sock).
    a fault                 each is described in steps.py, where all of these are; FAULTS has them by name
    status_line(text)       a 200's answer with this in place of "200", such as "0200"
    retry_at(seconds, status=503, skew=0)
                            Retry-After as a date, that far from the Date that is sent, which is off by skew
    echo(status, encode)    an answer whose every part holds the key, in an encoding of ENCODINGS
    tunnel(port=None)       what a proxy does with CONNECT: connects to that port, or where it is asked to
    refuse_larger(records)  413 for batches of more

Attributes: url, port, requests, records, raw_records, connections, checks, and
    incomplete              requests that broke off: Request objects, with the body as far as it came
    garbage                 what came in that is not HTTP (bytes);  handshakes  TLS handshakes that failed
Request: method, path, headers, header_list, raw_body, body, json, events, status, connection, time.

Standard library only; Python 3.6 or newer. Raw sockets, a thread for each connection.
"""
import gzip
import http.client
import json
import os
import re
import selectors
import socket
import ssl
import struct
import threading
import time
import zlib

from steps import *  # noqa: F403
from steps import FAULTS, TLS_FAULTS, Reply

KEY = "pk-test-5ecre7-K3y-do-not-print"
INGEST = "/api/ingest"
HEALTH = "/api/health"
MAX_HEAD = 1 << 20


# ---- what the service checks -----------------------------------------------------------------------------

SCHEMA = {  # object: (required fields, optional fields)
    "": (("severity", "status", "message", "timestamp"), ()),
    "source": (("system",), ("env",)),
    "workflow": (("id",), ("name", "run_id", "step_id")),
    "actor": (("type", "id"), ("display_name",)),
}
SEVERITIES = ("debug", "info", "warn", "error")
STATUSES = ("ok", "failed", "skipped", "timeout", "retrying", "unknown")
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")


def check_schema(event):
    """What the service has against this event, or None."""
    if not isinstance(event, dict):
        return "an event must be an object"
    for name, (required, optional) in SCHEMA.items():
        part = event if not name else event.get(name)
        if not isinstance(part, dict):
            return "%s must be an object" % name
        for field in required:
            if not isinstance(part.get(field), str) or not part[field]:
                return "%s.%s must be a string that is not empty" % (name, field)
        for field in optional:
            if not isinstance(part.get(field, ""), (str, type(None))):
                return "%s.%s must be a string" % (name, field)
        if name and set(part) - set(required + optional):
            return "unknown field in %s" % name
    if set(event) - set(SCHEMA) - set(SCHEMA[""][0]) - {"metadata", "extra"}:
        return "unknown field"
    if event["severity"] not in SEVERITIES or event["status"] not in STATUSES:
        return "bad severity or status"
    if not TIMESTAMP.fullmatch(event["timestamp"]):
        return "bad timestamp"
    for name in ("metadata", "extra"):
        if not isinstance(event.get(name), (dict, type(None))):
            return "%s must be an object" % name
    return None


def _no_constant(name):
    raise ValueError("%s is not JSON" % name)


def parse_json(data):
    """Strict JSON: UTF-8, no NaN; ValueError otherwise."""
    return json.loads(data.decode("utf-8"), parse_constant=_no_constant)


def cut_records(body):
    """The records of a body (an object or an array of them) as the exact bytes of each."""
    text = body.decode("utf-8")
    decoder = json.JSONDecoder()
    at = len(text) - len(text.lstrip(" \t\r\n"))
    if text[at:at + 1] != "[":
        return [text.strip(" \t\r\n").encode("utf-8")]
    found = []
    at += 1
    while True:
        while text[at] in " \t\r\n,":
            at += 1
        if text[at] == "]":
            return found
        end = decoder.raw_decode(text, at)[1]
        found.append(text[at:end].encode("utf-8"))
        at = end


class Request:
    """One request, as it came."""

    def __init__(self, method, path, version, header_list, connection):
        self.method = method
        self.path = path
        self.version = version
        self.header_list = header_list
        self.headers = {}
        for name, value in header_list:
            name = name.lower()
            self.headers[name] = self.headers[name] + ", " + value if name in self.headers else value
        self.connection = connection
        self.raw_body = b""
        self.body = b""
        self.json = None
        self.encoding_error = None
        self.json_error = None
        self.status = None
        self.time = 0.0

    def __repr__(self):
        return "<Request %s %s: %s, %d bytes>" % (self.method, self.path, self.status, len(self.raw_body))

    @property
    def events(self):
        """The events in the body, as a list."""
        return self.json if isinstance(self.json, list) else [] if self.json is None else [self.json]

    @property
    def keeps_alive(self):
        """Whether the client lets the connection be used again."""
        wish = self.headers.get("connection", "").lower()
        return "close" not in wish and (self.version == "HTTP/1.1" or "keep-alive" in wish)

    def finish(self, raw_body):
        """Take the body: decode it as far as that goes."""
        self.time = time.monotonic()
        self.raw_body = self.body = raw_body
        encoding = self.headers.get("content-encoding")
        if encoding == "gzip":
            try:
                self.body = gzip.decompress(raw_body)
            except (OSError, EOFError, zlib.error) as error:
                self.encoding_error = str(error)
                return
        elif encoding is not None:
            self.encoding_error = "unknown encoding " + encoding
            return
        if self.body:
            try:
                self.json = parse_json(self.body)
            except (ValueError, RecursionError) as error:
                self.json_error = str(error)


class _Broken(Exception):
    """The peer went away, or does not speak HTTP."""


# ---- the server ------------------------------------------------------------------------------------------

class StandIn:
    """The stand-in server; see the top of the module. A context manager; start() and close() work too."""

    def __init__(self, script=(), default=200, key=KEY, tls=None, strict=True, prefix="", health=HEALTH,
                 host="127.0.0.1", port=0):
        self.prefix = prefix
        self._changed = threading.Condition(threading.RLock())
        self._sockets = {}
        self._forget(script, default, key, strict, health)
        self._closed = False
        self._tls = None
        if tls:
            self._tls = ssl.SSLContext(getattr(ssl, "PROTOCOL_TLS_SERVER", ssl.PROTOCOL_TLS))
            self._tls.load_cert_chain(*tls[:2])
            for fault in tls[2:]:
                TLS_FAULTS[fault](self._tls)
        self._listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            if os.name == "posix":
                self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((host, port))
            self._listener.listen(512)
        except OSError:
            self._listener.close()
            raise
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        shown = "[%s]" % host if ":" in host else host
        self.url = "%s://%s:%d%s" % ("https" if tls else "http", shown, self.port, prefix)
        self._wake_read, self._wake_write = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept, name="standin-accept", daemon=True)

    def _forget(self, script, default, key, strict, health):
        self.default, self.key, self.strict, self.health = default, key, strict, health
        self.requests, self.records, self.checks = [], [], []
        self.incomplete, self.garbage, self.handshakes = [], [], []
        self.connections = 0
        self._script, self._peeked = iter(script), []
        self._bodies, self._raw_records = [], []
        self._stopping = threading.Event()

    # -- life

    def start(self):
        """Begin to accept connections."""
        self._acceptor.start()
        return self

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc_info):
        self.close()

    def renew(self, script=(), default=200, key=KEY, strict=True, health=HEALTH):
        """End every connection and begin anew with this script."""
        with self._changed:
            threads = self._end_connections()
        self._join(threads)
        with self._changed:
            self._forget(script, default, key, strict, health)

    def close(self):
        """Stop: end every connection and wait for every thread."""
        if self._closed:
            return
        self._closed = True
        self._wake_write.send(b"x")
        if self._acceptor.ident is not None:
            self._acceptor.join(10)
        self._listener.close()
        with self._changed:
            threads = self._end_connections()
        self._join(threads)
        self._wake_read.close()
        self._wake_write.close()

    def _end_connections(self):
        self._stopping.set()
        for sock in self._sockets.values():
            _shut(sock)
        self._changed.notify_all()
        return list(self._sockets)

    @staticmethod
    def _join(threads):
        for thread in threads:
            thread.join(10)
        left = [thread.name for thread in threads if thread.is_alive()]
        if left:
            raise AssertionError("stand-in: threads that did not end: %s" % left)

    # -- for tests

    @property
    def raw_records(self):
        """The acknowledged records as the exact bytes of each, in order."""
        with self._changed:
            while self._bodies:
                self._raw_records += cut_records(self._bodies.pop(0))
            return self._raw_records

    def wait_for(self, condition, timeout=10, what="condition"):
        """Block until condition() is true; AssertionError after `timeout` seconds."""
        end = time.monotonic() + timeout
        with self._changed:
            while not condition():
                left = end - time.monotonic()
                if left <= 0:
                    raise AssertionError("stand-in: waited %g s for %s; requests: %s" % (
                        timeout, what, [request.status for request in self.requests]))
                self._changed.wait(left)

    def wait_for_requests(self, number, timeout=10):
        """Block until `number` requests have arrived."""
        self.wait_for(lambda: len(self.requests) >= number, timeout, "%d requests" % number)

    def wait_for_connections(self, number, timeout=10):
        """Block until `number` connections have been accepted."""
        self.wait_for(lambda: self.connections >= number, timeout, "%d connections" % number)

    # -- for steps

    def pause(self, what):
        """Wait that many seconds, or for that Event; cut short, with _Broken, when the server is closed."""
        if isinstance(what, (int, float)):
            if self._stopping.wait(what):
                raise _Broken("closing")
            return
        while not what.wait(0.02):
            if self._stopping.is_set():
                raise _Broken("closing")

    def wait_closed(self):
        """Wait until the server is closed, at most a minute."""
        self._stopping.wait(60)

    @staticmethod
    def hang(sock):
        """Read, and say nothing, until the peer goes away."""
        while sock.recv(65536):
            pass

    def acknowledge(self, request):
        """Check the request as the service does and record its events; the status to answer (200: good)."""
        status, why = self._verdict(request) if self.strict else (200, None)
        with self._changed:
            if why:
                self.checks.append(why)
            elif request.method == "POST":
                events = request.events
                self.records += events
                if events:
                    self._bodies.append(request.body)
        return status

    def _verdict(self, request):
        """(status, None) or (status, why not)."""
        path = re.sub("^https?://[^/]+", "", request.path)
        wanted = {"POST": self.prefix + INGEST, "GET": self.prefix + self.health}.get(request.method)
        names = [name.lower() for name, _ in request.header_list]
        if wanted is None or path != wanted:
            return 404, "no such resource: %s %s" % (request.method, request.path)
        if request.headers.get("x-packtrack-key") != self.key:
            return 401, "the key is missing or wrong"
        for name in ("host", "user-agent", "content-length", "content-type", "idempotency-key"):
            if names.count(name) > 1:
                return 400, "header sent twice: %s" % name
        if "host" not in names:
            return 400, "no Host header"
        if request.method == "GET":
            return 200, None
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return 415, "content type is not application/json"
        if request.encoding_error:
            return 400, "encoding: %s" % request.encoding_error
        if request.json_error or request.json is None:
            return 400, "not JSON: %s" % request.json_error
        if request.json == []:
            return 400, "an empty batch"
        for number, one in enumerate(request.events):
            why = check_schema(one)
            if why:
                return 400, "event %d: %s" % (number, why)
        return 200, None

    # -- connections

    def _next_step(self, at=None):
        """The next step of the script; with `at`, only if it is a fault of that stage, else None."""
        with self._changed:
            if not self._peeked:
                self._peeked.append(next(self._script, self.default))
            step = self._peeked[0]
            if at is not None and getattr(step, "at", None) != at:
                return None
            return self._peeked.pop()

    def _accept(self):
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while True:
                selector.select()
                if self._closed:
                    return
                try:
                    sock, _ = self._listener.accept()
                except OSError:
                    continue
                sock.setblocking(True)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                step = self._next_step("accept")
                with self._changed:
                    self.connections += 1
                    thread = threading.Thread(target=self._serve, args=(sock, self.connections, step),
                                              name="standin-%d" % self.connections, daemon=True)
                    try:
                        thread.start()
                        self._sockets[thread] = sock
                    except RuntimeError:
                        sock.close()
                    self._changed.notify_all()

    def _serve(self, sock, number, step):
        thread = threading.current_thread()
        try:
            if step is not None:
                self._end(sock, step(self, sock, None))
                return
            if self._tls:
                with self._changed:
                    if self._stopping.is_set():
                        return
                    sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                    self._sockets[thread] = sock
                try:
                    sock.do_handshake()
                except (OSError, ValueError) as error:
                    self.handshakes.append(error)
                    return
            self._converse(sock, number)
        except (_Broken, OSError, ValueError):
            pass
        finally:
            with self._changed:
                self._sockets.pop(thread, None)
                sock.close()
                self._changed.notify_all()

    def _converse(self, sock, number):
        buffer = bytearray()
        while not self._stopping.is_set():
            if not buffer and not self._fill(sock, buffer):
                return
            step = self._next_step("accept")
            if step is not None:
                self._end(sock, step(self, sock, None))
                return
            request = self._read_head(sock, buffer, number)
            step = self._next_step()
            if getattr(step, "at", None) != "headers":
                self._read_body(sock, buffer, request)
            then = self._answer(sock, request, step)
            if then != "keep":
                self._end(sock, then)
                return

    @staticmethod
    def _end(sock, then):
        if then == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    @staticmethod
    def _fill(sock, buffer):
        data = sock.recv(262144)
        buffer += data
        return bool(data)

    def _read_head(self, sock, buffer, number):
        while True:
            end = buffer.find(b"\r\n\r\n")
            if end >= 0:
                break
            if len(buffer) > MAX_HEAD or not buffer[:1].isalpha() or not self._fill(sock, buffer):
                self.garbage.append(bytes(buffer[:4096]))
                sock.sendall(Reply(400, close=True).head() + b"{}")
                raise _Broken("not HTTP")
        lines = bytes(buffer[:end]).decode("iso-8859-1").split("\r\n")
        del buffer[:end + 4]
        words = lines[0].split(" ")
        if len(words) != 3 or not all(":" in line for line in lines[1:]):
            self.garbage.append("\r\n".join(lines).encode("iso-8859-1"))
            sock.sendall(Reply(400, close=True).head() + b"{}")
            raise _Broken("not HTTP")
        pairs = [line.split(":", 1) for line in lines[1:]]
        header_list = [(name, value.strip(" \t")) for name, value in pairs]
        return Request(words[0], words[1], words[2], header_list, number)

    def _read_body(self, sock, buffer, request):
        body = bytearray()
        try:
            if request.headers.get("expect", "").lower() == "100-continue":
                sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            if "chunked" in request.headers.get("transfer-encoding", "").lower():
                self._read_chunks(sock, buffer, body)
            else:
                length = int(request.headers.get("content-length", "0"))
                self._take(sock, buffer, length, body)
        except (_Broken, OSError, ValueError):
            request.raw_body = request.body = bytes(body)
            request.status = "incomplete"
            with self._changed:
                self.incomplete.append(request)
                self._changed.notify_all()
            raise
        request.finish(bytes(body))

    def _take(self, sock, buffer, length, body):
        while len(buffer) < length:
            if not self._fill(sock, buffer):
                body += buffer
                raise _Broken("the body breaks off")
        body += buffer[:length]
        del buffer[:length]

    def _read_chunks(self, sock, buffer, body):
        while True:
            while b"\r\n" not in buffer:
                if not self._fill(sock, buffer):
                    raise _Broken("the body breaks off")
            line, _, rest = bytes(buffer).partition(b"\r\n")
            buffer[:] = rest
            size = int(line.split(b";")[0], 16)
            self._take(sock, buffer, size, body)
            self._take(sock, buffer, 2, bytearray())
            if not size:
                return

    # -- answers

    def _answer(self, sock, request, step):
        if isinstance(step, int):
            text = {"error": http.client.responses.get(step, "Unknown")}
            if 200 <= step < 300:
                text = {"accepted": len(request.events)}
            bodiless = step in (204, 205, 304) or 100 <= step < 200
            step = Reply(step, body=b"" if bodiless else json.dumps(text).encode("ascii"))
        reply = step if isinstance(step, Reply) else None
        if reply is not None:
            request.status = reply.status
            records = 200 <= reply.status < 300
        else:
            request.status = getattr(step, "name", getattr(step, "__name__", "step"))
            records = getattr(step, "records", False)
        if not request.time:
            request.time = time.monotonic()
        if records:
            status = self.acknowledge(request)
            if status != 200:
                request.status = status
                why = json.dumps({"error": self.checks[-1]}).encode("ascii")
                reply = Reply(status, body=why)
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
        if reply is None:
            return step(self, sock, request) or "close"
        if reply.delay is not None:
            self.pause(reply.delay)
        sock.sendall(reply.head() + (b"" if reply.status in (204, 304) else reply.body))
        return "keep" if request.keeps_alive and not reply.closes() else "close"


def _shut(sock):
    # Not SSLSocket.shutdown: it drops the TLS object under the feet of the thread that reads.
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass


class RefusedPort:
    """A port of 127.0.0.1 that refuses connections for as long as this is open."""

    def __init__(self):
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = "http://127.0.0.1:%d" % self.port

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._socket.close()



def parse_script(text):
    """`503,200,RESET_AFTER` as steps."""
    return [int(word) if word.isdigit() else FAULTS[word] for word in text.split(",") if word]
