"""A stand-in for the PackTrack service: keeps the wire contract, and breaks it on request.

    with StandIn(script=[503, 200]) as server:      # then `default` (200) for ever
        ...                                         # talk to server.url
        assert server.records == [...]

Arguments of StandIn
    script    an iterable of steps, one for each request, in order of arrival. Steps that act at accept are
              for the next connection, before anything is read; on a kept one for the next first bytes
    default   the step that is used when the script has run out;  key  the API key that is accepted
    tls       (certfile, keyfile): speak https; (certfile, keyfile, fault): with a fault of TLS_FAULTS
    strict    check what would get a 2xx as the service does: method and path (404), key (401), content type
              (415), encoding, JSON and schema (400), and answer that status instead; why goes to `checks`
    prefix    path in front of /api/ingest and the health path;  health  that path;  host  to listen on
renew(...) takes script, default, key, strict, health anew and forgets all that was: one server, many tests.

Steps, in steps.py
    503           a sane answer of this status with a small JSON body
    Reply(...)    content_length: "auto", None (none is sent: the body ends with the connection) or the value
                  to send. close: True says `Connection: close` and closes; "silently" closes without saying
                  so. delay: seconds, or an Event that is waited for
    Raw(parts, then="close", records=False)
                  parts: bytes, or an iterable of bytes (sent), numbers (pauses in seconds) and Events (waited
                  for). then: "close" (FIN), "reset" (RST), "hang" (until the peer goes) or "keep" (serve the
                  next request). records=True: counts as a 2xx
    function(server, sock, request)
                  does the rest of the connection itself; it is closed afterwards, unless the function returns
                  "keep" or "reset". Helpers: acknowledge and pause of the server

Attributes: url, port, requests, records, raw_records, connections, checks, and garbage: what came in that is
not a whole HTTP request. Request: method, path, headers, raw_body, body, json, events, status.

Standard library only; Python 3.6 or newer. Raw sockets, a thread for each connection.
"""
import contextlib
import gzip
import http.client
import json
import re
import socket
import ssl
import struct
import threading
import types
import zlib

from steps import TLS_FAULTS, Reply

KEY = "pk-test-5ecre7-K3y-do-not-print"
HEALTH = "/api/health"
ANY, SOME = "(?s).*", "(?s).+"
SCHEMA = {  # what texts match; with a ? what may be absent or null, and {} for an object of any fields
    "severity": "debug|info|warn|error", "status": "ok|failed|skipped|timeout|retrying|unknown",
    "message": SOME, "timestamp": r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)",
    "source": {"system": SOME, "env?": ANY},
    "workflow": {"id": SOME, "name?": ANY, "run_id?": ANY, "step_id?": ANY},
    "actor": {"type": SOME, "id": SOME, "display_name?": ANY}, "metadata?": {}, "extra?": {}}


def check_schema(value, schema=SCHEMA, name="event"):
    """What the service has against this event, or None."""
    if isinstance(schema, str):
        return None if isinstance(value, str) and re.fullmatch(schema, value) else "bad text in %s" % name
    if not isinstance(value, dict):
        return "%s must be an object" % name
    if schema and set(value) - {field.strip("?") for field in schema}:
        return "unknown field in %s" % name
    for field, part in schema.items():
        inner = value.get(field.strip("?"))
        why = (inner is not None or field[-1] != "?") and check_schema(inner, part, field)
        if why:
            return why
    return None


def cut_records(body):
    """The records of a body (an object or an array of them) as the exact bytes of each."""
    text = body.decode("utf-8").strip(" \t\r\n")
    if text[:1] != "[":
        return [text.encode("utf-8")]
    found, at, decoder, space = [], 1, json.JSONDecoder(), re.compile("[ \t\r\n,]*")
    while text[space.match(text, at).end()] != "]":
        start = space.match(text, at).end()
        at = decoder.raw_decode(text, start)[1]
        found.append(text[start:at].encode("utf-8"))
    return found


class Request:
    """One request, as it came."""

    def __init__(self, method, path, version, header_list):
        self.method, self.path, self.version = method, path, version
        self.names = [name.lower() for name, _ in header_list]
        self.headers = {}
        for name, (_, value) in zip(self.names, header_list):
            self.headers[name] = self.headers[name] + ", " + value if name in self.headers else value
        self.raw_body = self.body = b""
        self.json = self.wrong = self.status = None

    def __repr__(self):
        return "<Request %s %s: %s, %d bytes>" % (self.method, self.path, self.status, len(self.raw_body))

    @property
    def events(self):
        """The events in the body, as a list."""
        return self.json if isinstance(self.json, list) else [] if self.json is None else [self.json]

    def finish(self, raw_body):
        """Take the body: decode it as far as that goes."""
        self.raw_body = self.body = raw_body
        encoding = self.headers.get("content-encoding", "gzip")
        try:
            if encoding != "gzip":
                raise ValueError("unknown encoding " + encoding)
            if "content-encoding" in self.headers:
                self.body = gzip.decompress(raw_body)
            if self.body:  # NaN is no JSON, and int() no friend of it
                self.json = json.loads(self.body.decode("utf-8"), parse_constant=int)
        except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
            self.wrong = "body: %s" % error


class StandIn:
    """The stand-in server; see the top of the module. A context manager; start() and close() work too."""

    def __init__(self, script=(), default=200, key=KEY, tls=None, strict=True, prefix="", health=HEALTH,
                 host="127.0.0.1"):
        self.prefix, self._closed, self._tls, self._sockets, self._peer = prefix, False, None, {}, None
        self._changed = threading.Condition(threading.RLock())
        self._forget(script, default, key, strict, health)
        if tls:
            self._tls = ssl.SSLContext(getattr(ssl, "PROTOCOL_TLS_SERVER", ssl.PROTOCOL_TLS))
            self._tls.load_cert_chain(*tls[:2])
            for fault in tls[2:]:
                TLS_FAULTS[fault](self._tls)
        self._listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._listener.bind((host, 0))
            self._listener.listen(512)
        except OSError:
            self._listener.close()
            raise
        self.port = self._listener.getsockname()[1]
        shown = "[%s]" % host if ":" in host else host
        self.url = "%s://%s:%d%s" % ("https" if tls else "http", shown, self.port, prefix)
        self._acceptor = threading.Thread(target=self._accept, daemon=True)

    def _forget(self, script, default, key, strict, health):
        self.default, self.key, self.strict, self.health = default, key, strict, health
        self.requests, self.records, self.checks, self.garbage, self.connections = [], [], [], [], 0
        self._script, self._peeked, self._bodies = iter(script), [], []
        self._stopping = threading.Event()

    def start(self):
        self._acceptor.start()
        return self

    def close(self, *_):
        """Stop: end every connection and wait for every thread."""
        if not self._closed:
            self._closed = True
            socket.create_connection(self._listener.getsockname()[:2]).close()  # accept() waits for one
            self._acceptor.join(10)
            self._end_connections()
            self._listener.close()

    __enter__, __exit__ = start, close

    def renew(self, script=(), default=200, key=KEY, strict=True, health=HEALTH):
        """End every connection, also those that are yet to be accepted, and begin anew with this script."""
        with socket.create_connection(self._listener.getsockname()[:2]) as last:
            self.wait_for(lambda: self._peer == last.getsockname(), what="a connection of its own")
        self._end_connections()
        with self._changed:
            self._forget(script, default, key, strict, health)

    def _end_connections(self):
        with self._changed:
            self._stopping.set()
            threads = list(self._sockets)
            for sock in self._sockets.values():
                with contextlib.suppress(OSError):
                    # Not SSLSocket.shutdown: it drops the TLS object under the feet of the thread that reads.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive(), "stand-in: a thread did not end"

    @property
    def raw_records(self):
        """The acknowledged records as the exact bytes of each, in order."""
        return [raw for body in self._bodies for raw in cut_records(body)]

    def wait_for(self, condition, timeout=10, what="condition"):
        """Block until condition() is true; AssertionError after `timeout` seconds."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout), "stand-in: waited %g s for %s: %s" % (
                timeout, what, self.requests)

    def wait_for_requests(self, number, timeout=10):
        self.wait_for(lambda: len(self.requests) >= number, timeout, "%d requests" % number)

    def wait_for_connections(self, number, timeout=10):
        self.wait_for(lambda: self.connections >= number, timeout, "%d connections" % number)

    def pause(self, what):
        """Wait that many seconds, or for that Event; an error when the server is closed."""
        if isinstance(what, (int, float)):
            self._stopping.wait(what)
        else:
            while not what.wait(0.02) and not self._stopping.is_set():
                pass
        if self._stopping.is_set():
            raise ConnectionError("closing")

    def acknowledge(self, request):
        """Check the request as the service does and record its events; the status to answer (200: good)."""
        status, why = self._verdict(request) if self.strict else (200, None)
        with self._changed:
            if why:
                self.checks.append(why)
            elif request.method == "POST":
                self.records += request.events
                self._bodies += [request.body] if request.events else []
        return status

    def _verdict(self, request):
        """(status, None) or (status, why not)."""
        path = re.sub("^https?://[^/]+", "", request.path)
        wanted = {"POST": self.prefix + "/api/ingest", "GET": self.prefix + self.health}.get(request.method)
        if wanted is None or path != wanted:
            return 404, "no such resource: %s %s" % (request.method, request.path)
        if request.headers.get("x-packtrack-key") != self.key:
            return 401, "the key is missing or wrong"
        for name in ("host", "user-agent", "content-length", "content-type", "idempotency-key"):
            if request.names.count(name) > 1:
                return 400, "header sent twice: %s" % name
        if "host" not in request.headers:
            return 400, "no Host header"
        if request.method == "GET":
            return 200, None
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return 415, "content type is not application/json"
        if request.wrong or not request.events:
            return 400, request.wrong or "no events"
        why = next(filter(None, map(check_schema, request.events)), None)
        return (400, why) if why else (200, None)

    def _next_step(self, at=None):
        """The next step of the script; with `at`, only if it is a fault of that stage, else None."""
        with self._changed:
            if not self._peeked:
                self._peeked.append(next(self._script, self.default))
            return self._peeked.pop() if at in (None, getattr(self._peeked[0], "at", None)) else None

    def _accept(self):
        while not self._closed:
            try:
                sock, peer = self._listener.accept()
            except OSError:
                continue
            if self._closed:
                return sock.close()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            step = self._next_step("accept")
            with self._changed:
                self.connections, self._peer = self.connections + 1, peer
                thread = threading.Thread(target=self._serve, args=(sock, step), daemon=True)
                self._sockets[thread] = sock
                thread.start()
                self._changed.notify_all()

    def _serve(self, sock, step):
        thread = threading.current_thread()
        try:
            if self._tls and step is None:
                with self._changed:
                    if self._stopping.is_set():
                        return
                    sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                    self._sockets[thread] = sock
                sock.do_handshake()
            if (step(self, sock, None) if step else self._converse(sock)) == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except (OSError, ValueError):
            pass
        finally:
            with self._changed:
                self._sockets.pop(thread, None)
                sock.close()
                self._changed.notify_all()

    def _converse(self, sock):
        buffer, then = bytearray(), "keep"
        while then == "keep" and not self._stopping.is_set() and (buffer or self._fill(sock, buffer)):
            step = self._next_step("accept")
            if step is not None:
                return step(self, sock, None)
            request = self._read_head(sock, buffer)
            step = self._next_step()
            if getattr(step, "at", None) != "headers":
                self._read_body(sock, buffer, request)
            then = self._answer(sock, request, step)
        return then

    @staticmethod
    def _fill(sock, buffer):
        data = sock.recv(262144)
        buffer += data
        return bool(data)

    def _read_head(self, sock, buffer):
        while b"\r\n\r\n" not in buffer and len(buffer) <= 1 << 20 and buffer[:1].isalpha():
            if not self._fill(sock, buffer):
                break
        head, end, rest = bytes(buffer).partition(b"\r\n\r\n")
        first, *lines = head.decode("iso-8859-1").split("\r\n")
        if not end or first.count(" ") != 2 or not all(":" in line for line in lines):
            self.garbage.append(bytes(buffer))
            sock.sendall(Reply(400, close=True).head() + b"{}")
            raise ConnectionError("not HTTP")
        buffer[:] = rest
        return Request(*first.split(" "), [(name, value.strip(" \t")) for name, _, value in (
            line.partition(":") for line in lines)])

    def _read_body(self, sock, buffer, request):
        length = int(request.headers.get("content-length", "0"))
        while len(buffer) < length:
            if not self._fill(sock, buffer):
                self.garbage.append(bytes(buffer))
                raise ConnectionError("the body breaks off")
        request.finish(bytes(buffer[:length]))
        del buffer[:length]

    def _answer(self, sock, request, step):
        if isinstance(step, int):
            text = {"accepted": len(request.events)} if 200 <= step < 300 else {
                "error": http.client.responses.get(step, "Unknown")}
            step = Reply(step, body="" if step == 205 else json.dumps(text))
        reply = step if isinstance(step, Reply) else None
        request.status = reply.status if reply else getattr(step, "name", "step")
        records = 200 <= reply.status < 300 if reply else getattr(step, "records", False)
        status = self.acknowledge(request) if records else 200
        if status != 200:
            request.status, reply = status, Reply(status, body=json.dumps({"error": self.checks[-1]}))
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
        if reply is None:
            return step(self, sock, request) or "close"
        if reply.delay is not None:
            self.pause(reply.delay)
        sock.sendall(reply.head() + (b"" if reply.bodiless else reply.body))
        wish = request.headers.get("connection", "").lower()
        keeps = "close" not in wish and (request.version == "HTTP/1.1" or "keep-alive" in wish)
        return "keep" if keeps and not reply.closes() else "close"


@contextlib.contextmanager
def RefusedPort():
    """A port of 127.0.0.1 that refuses connections for as long as this is open."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        yield types.SimpleNamespace(port=port, host="127.0.0.1:%d" % port, url="http://127.0.0.1:%d" % port)
