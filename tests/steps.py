"""What the stand-in answers: the steps of its script, sane and not; FAULTS has every fault by its name.

Standard library only; Python 3.6 or newer.
"""
import base64
import functools
import gzip
import html
import http.client
import itertools
import json
import re
import select
import socket
import ssl
import urllib.parse
import warnings


class Reply:
    """An HTTP answer; standin.py says what its arguments are."""

    def __init__(self, status=200, reason=None, headers=(), body=b"{}", content_length="auto", close=False,
                 delay=None):
        self.status, self.content_length, self.close, self.delay = status, content_length, close, delay
        self.reason = http.client.responses.get(status, "Unknown") if reason is None else reason
        self.headers = list(headers.items()) if isinstance(headers, dict) else list(headers)
        self.body = body.encode("utf-8") if isinstance(body, str) else body
        self.bodiless = status in (204, 304) or 100 <= status < 200

    def head(self):
        """The status line and the headers, as bytes."""
        given = {name.lower() for name, _ in self.headers}
        length = len(self.body) if self.content_length == "auto" else self.content_length
        lines = ["HTTP/1.1 %s %s" % (self.status, self.reason)]
        if not self.bodiless and self.body and "content-type" not in given:
            lines.append("Content-Type: application/json")
        lines += ["%s: %s" % pair for pair in self.headers]
        if not given & {"content-length", "transfer-encoding"} and not self.bodiless and length is not None:
            lines.append("Content-Length: %s" % length)
        if self.closes() and self.close != "silently" and "connection" not in given:
            lines.append("Connection: close")
        return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n"

    def closes(self):
        """Whether the connection ends with this answer."""
        return bool(self.close) or self.content_length is None or 100 <= self.status < 200


class Fault:
    """A named step: act(server, sock, request); `at` is "accept", "headers" or "request"."""

    def __init__(self, name, act, records=False, at="request"):
        self.name, self.act, self.records, self.at = name, act, records, at

    def __call__(self, server, sock, request):
        return self.act(server, sock, request)

    def __repr__(self):
        return self.name


class Raw(Fault):
    """Bytes to send instead of an answer."""

    def __init__(self, parts, then="close", records=False, name="Raw"):
        super().__init__(name, self.send, records)
        self.parts, self.then = (parts,) if isinstance(parts, bytes) else parts, then

    def send(self, server, sock, _):
        for part in self.parts() if callable(self.parts) else self.parts:
            if isinstance(part, bytes):
                sock.sendall(part)
            else:
                server.pause(part)
        while self.then == "hang" and sock.recv(65536):
            pass
        return self.then


def status_line(text):
    """An answer with this status, sane or not, as it is written."""
    return Raw(("HTTP/1.1 %s OK\r\nContent-Length: 2\r\n\r\n{}" % text).encode(), name="status " + text)


def refuse_larger(records):
    """413 for a batch of more records than that, 200 for others."""
    def step(server, sock, request):
        request.status = 413 if len(request.events) > records else server.acknowledge(request)
        sock.sendall(Reply(request.status).head() + b"{}")
        return "keep"
    return step


def tunnel():
    """Answer CONNECT and hand on what comes both ways."""
    def step(server, sock, request):
        host, _, port = request.path.rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port))) as peer:
            sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            ends = {sock: peer, peer: sock}
            while True:
                for one in select.select(list(ends), [], [])[0]:
                    data = one.recv(65536)
                    if not data:
                        return None
                    ends[one].sendall(data)
    return step


def _json(text):
    return json.dumps(text)[1:-1]


def _every(form):
    return lambda text: "".join(form.format(ord(char)) for char in text)


# How a server may write what it was sent: name: text to text.
ENCODINGS = {
    "plain": str, "repr": lambda text: repr(text)[1:-1],
    "JSON": _json, "JSON, every character": _every("\\u{:04x}"),
    "JSON of PHP": lambda text: _json(text).replace("/", "\\/"),
    "JSON of Go": lambda text: re.sub("[<>&]", lambda match: "\\u%04x" % ord(match.group()), _json(text)),
    "HTML": html.escape, "HTML, &#39;": lambda text: html.escape(text).replace("&#x27;", "&#39;"),
    "HTML, every character": _every("&#{};"), "HTML, every character in hexadecimal": _every("&#x{:x};"),
    "URL": lambda text: urllib.parse.quote(text, ""), "URL, every character": _every("%{:02x}"),
    "URL, lower case": lambda text: re.sub("%..", lambda match: match.group().lower(),
                                           urllib.parse.quote(text, "")),
    "URL, plus": lambda text: urllib.parse.quote_plus(text, ""),
    "base64": lambda text: base64.b64encode(text.encode("utf-8")).decode("ascii"),
    "base64, inside more": lambda text: base64.b64encode(b"k=" + text.encode("utf-8") + b";").decode("ascii"),
    "cut short": lambda text: text[:max(6, len(text) * 2 // 3)],
    "controls between": "\x01".join, "invisibles between": "\u200b".join}


@functools.lru_cache(maxsize=None)
def spellings(secret):
    """The forms of a secret that may be in no output, as bytes."""
    forms = {encode(secret) for encode in ENCODINGS.values()} | {
        secret[at:at + 10] for at in range(max(1, len(secret) - 9))}
    return sorted(form.encode("utf-8", "surrogateescape") for form in forms)


def echo(status, encode="plain"):
    """An answer whose reason, Location, headers and body hold the key, in an encoding of ENCODINGS."""
    def step(server, sock, request):
        request.status = status
        text = ENCODINGS[encode](request.headers.get("x-packtrack-key", ""))
        line = re.sub("[\r\n]", " ", text)
        reply = Reply(status, reason="key " + line, body='{"error":"bad key %s"}' % text, headers=[
            ("Location", "http://127.0.0.1:9/?key=" + line.replace(" ", "%20")), ("X-Echo", line)])
        sock.sendall(reply.head() + reply.body)
        return "keep"
    return step


OK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LENGTH = OK_HEAD + b"Content-Length: "
HALF = b"HTTP/1.1 200 OK\r\nContent-Ty"
BOMB = gzip.compress(bytes(1000000)) * 100  # members may be strung together: a hundred megabytes of zeros


def _repeat(first, part, pause, times=1 << 60):
    return Raw(lambda: itertools.chain([first], (one for _ in range(times) for one in (part, pause))))


def _early_200(server, sock, request):
    for _ in range(4):
        sock.recv(65536)
    sock.sendall(LENGTH + b"2\r\n\r\n{}")
    return "reset"


def _slow_reader(server, sock, request):
    while sock.recv(64):
        server.pause(0.05)


_ACTS = {
    # At accept, before anything is read; with tls the handshake breaks or hangs.
    "accept": {"RESET_BEFORE": Raw((), "reset"), "CLOSE_BEFORE": Raw(()),
               "SILENT_BEFORE": lambda server, *_: server.pause(60)},
    # After the headers of the request: none of the body is read (and a reset; and silence), 256 KiB of it and
    # a 200 and a reset, 64 bytes at a time.
    "headers": {
        "EARLY_413": Raw(b"HTTP/1.1 413 Request Entity Too Large\r\nContent-Length: 21\r\n"
                         b'Connection: close\r\n\r\n{"error":"too large"}', "reset"),
        "UNREAD_BODY": Raw([60]), "EARLY_200": _early_200, "SLOW_READER": _slow_reader},
    # After the request: no answer, or none that is whole; then what is not HTTP, or too much of it.
    "request": {
        "RESET_AFTER": Raw((), "reset"), "CLOSE": Raw(()), "SILENT": Raw((), "hang"),
        "HALF_HEADERS": Raw(HALF), "RESET_IN_HEADERS": Raw(HALF, "reset"),
        "DRIP_HEADERS": _repeat(b"HTTP/1.1 200 OK\r\nX-Drip: ", b"a", 0.02),
        "ENDLESS_100": _repeat(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 20, 0.01),
        "BANNER": Raw(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n"),
        "HTTP_09": Raw(b"<html><body>It works</body></html>\n"),
        **{name + "_STATUS": status_line(text) for name, text in (
            ("FOUR_DIGIT", "2000"), ("TWO_DIGIT", "20"), ("ZERO", "0200"), ("PLUS", "+200"),
            ("UNDERSCORE", "2_00"), ("ARABIC", "\u0662\u0660\u0660"))},
        "LONG_HEADER": Raw(OK_HEAD + b"X-Long: " + b"a" * 70000 + b"\r\nContent-Length: 2\r\n\r\n{}"),
        "MANY_HEADERS": Raw(b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-Many-%d: 1\r\n" % n for n in range(100))
                            + b"Content-Length: 2\r\n\r\n{}")},
    # The events are recorded; with complete headers, but the body is the trouble.
    "records": {
        "RECORD_THEN_RESET": Raw((), "reset"), "RECORD_THEN_CLOSE": Raw(()),
        "BROKEN_BODY": Raw(LENGTH + b'1000\r\n\r\n{"ids":['),
        "RESET_BODY": Raw(LENGTH + b'1000\r\n\r\n{"ids":[', "reset"),
        "SILENT_BODY": Raw(LENGTH + b"10\r\n\r\n", "hang"),
        "STALLED_BODY": Raw(LENGTH + b"10\r\n\r\n{", "hang"),
        "DRIP_BODY": _repeat(LENGTH + b"1000000\r\n\r\n", b" ", 0.02),
        "DRIP_TRAILERS": _repeat(CHUNKED + b"2\r\n{}\r\n0\r\nX-Trailer: ", b"a", 0.02),
        "ENDLESS_TRAILERS": _repeat(CHUNKED + b"2\r\n{}\r\n0\r\n", b"X-Trailer: 1\r\n" * 20, 0.01),
        "NEVER_ENDING_BODY": _repeat(CHUNKED, b"4000\r\n" + b"x" * 0x4000 + b"\r\n", 0),
        "HUGE_BODY": _repeat(LENGTH + b"100000000\r\n\r\n", b"x" * 100000, 0, 1000),
        "GZIP_BOMB": Raw(OK_HEAD + b"Content-Encoding: gzip\r\n"
                         b"Content-Length: %d\r\n\r\n%b" % (len(BOMB), BOMB)),
        **{name + "_LENGTH": Raw(LENGTH + rest) for name, rest in (
            ("SHORT", b'2\r\n\r\n{"ids":["too long"]}'), ("ABSURD", b"9" * 30 + b"\r\n\r\n{}"),
            ("NEGATIVE", b"-5\r\n\r\n{}"), ("WORD", b"many\r\n\r\n{}"))},
        "BAD_CHUNK": Raw(CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n"),
        "HTML_BODY": Raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 37\r\n\r\n"
                         b"<!DOCTYPE html><title>Welcome</title>", "keep"),
        "GARBAGE_BODY": Raw(LENGTH + b"9\r\n\r\n\x00\xff\xfe\x80{[\x1b\r\n", "keep"),
        "EMPTY_BODY": Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "keep")}}
FAULTS = {name: Fault(name, act, at == "records", "request" if at == "records" else at)
          for at, acts in _ACTS.items() for name, act in acts.items()}
SILENT, RESET_AFTER = FAULTS["SILENT"], FAULTS["RESET_AFTER"]


def _old_protocol(context):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")


def _no_cipher(context):
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AECDH:ADH:@SECLEVEL=0")


# What may be wrong with a TLS server whose certificate is good; tests with one need Python 3.7.
TLS_FAULTS = {
    "demands a certificate": lambda context: setattr(context, "verify_mode", ssl.CERT_REQUIRED),
    "unknown name": lambda context: setattr(
        context, "sni_callback", lambda *_: ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME),
    "old protocol": _old_protocol, "no common cipher": _no_cipher}
