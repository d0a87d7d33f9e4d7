"""What the stand-in answers: the steps of its script, sane and not. standin.py describes how they are used.

FAULTS has every fault by its name. Standard library only; Python 3.6 or newer.
"""
import base64
import email.utils
import gzip
import html
import http.client
import json
import re
import select
import socket
import ssl
import time
import urllib.parse
import warnings


class Reply:
    """An HTTP answer."""

    def __init__(self, status=200, reason=None, headers=(), body=b"{}", content_length="auto", close=False,
                 delay=None):
        self.status = status
        self.reason = reason
        self.headers = list(headers.items()) if isinstance(headers, dict) else list(headers)
        self.body = body.encode("utf-8") if isinstance(body, str) else body
        self.content_length = content_length
        self.close = close
        self.delay = delay

    def head(self):
        """The status line and the headers, as bytes."""
        reason = self.reason
        if reason is None:
            reason = http.client.responses.get(self.status, "Unknown")
        lines = ["HTTP/1.1 %s %s" % (self.status, reason)]
        given = {name.lower() for name, _ in self.headers}
        bodiless = self.status in (204, 304) or 100 <= self.status < 200
        if not bodiless and self.body and "content-type" not in given:
            lines.append("Content-Type: application/json")
        lines += ["%s: %s" % pair for pair in self.headers]
        if "content-length" not in given and "transfer-encoding" not in given and not bodiless:
            if self.content_length == "auto":
                lines.append("Content-Length: %d" % len(self.body))
            elif self.content_length is not None:
                lines.append("Content-Length: %s" % self.content_length)
        if self.closes() and self.close != "silently" and "connection" not in given:
            lines.append("Connection: close")
        return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n"

    def closes(self):
        """Whether the connection ends with this answer."""
        return bool(self.close) or self.content_length is None or 100 <= self.status < 200


class Raw:
    """Bytes to send instead of an answer."""

    def __init__(self, parts, then="close", records=False, name="Raw"):
        if then not in ("close", "reset", "hang", "keep"):
            raise ValueError(then)
        self.parts = parts
        self.then = then
        self.records = records
        self.name = name

    def __call__(self, server, sock, request):
        parts = (self.parts,) if isinstance(self.parts, bytes) else self.parts
        for part in parts() if callable(parts) else parts:
            if isinstance(part, bytes):
                sock.sendall(part)
            else:
                server.pause(part)
        if self.then == "hang":
            server.hang(sock)
        return self.then


def status_line(text, records=False):
    """An answer with this status, sane or not, as it is written."""
    return Raw("HTTP/1.1 {} OK\r\nContent-Length: 2\r\n\r\n{{}}".format(text).encode("utf-8"),
               records=records, name="status " + text)


def retry_at(seconds, status=503, skew=0):
    """An answer whose Retry-After is a date so long after its own Date; skew: of the server's clock."""
    def step(server, sock, request):
        request.status = status
        dates = [email.utils.formatdate(time.time() + skew + more, usegmt=True) for more in (0, seconds)]
        sock.sendall(Reply(status, headers=[("Date", dates[0]), ("Retry-After", dates[1])]).head() + b"{}")
        return "keep"
    return step


def refuse_larger(records):
    """413 for a batch of more records than that, 200 for others."""
    def step(server, sock, request):
        request.status = 413 if len(request.events) > records else server.acknowledge(request)
        sock.sendall(Reply(request.status).head() + b"{}")
        return "keep"
    return step


def tunnel(port=None):
    """Answer CONNECT and hand on what comes both ways, to that port of 127.0.0.1 or where it is asked to."""
    def step(server, sock, request):
        host, _, asked = request.path.rpartition(":")
        place = ("127.0.0.1", port) if port else (host.strip("[]"), int(asked))
        with socket.create_connection(place) as peer:
            sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            ends = {sock: peer, peer: sock}
            while True:
                for one in select.select(list(ends), [], [])[0]:
                    data = one.recv(65536)
                    if not data:
                        return None
                    ends[one].sendall(data)
    return step


def _every(form):
    return lambda text: "".join(form.format(ord(char)) for char in text)


def _lower_url(text):
    return re.sub("%..", lambda match: match.group().lower(), urllib.parse.quote(text, ""))


# How a server may write what it was sent: name: text to text.
ENCODINGS = {
    "plain": str,
    "JSON": lambda text: json.dumps(text)[1:-1],
    "JSON of PHP": lambda text: json.dumps(text)[1:-1].replace("/", "\\/"),
    "JSON of Go": lambda text: re.sub("[<>&]", lambda match: "\\u%04x" % ord(match.group()),
                                      json.dumps(text)[1:-1]),
    "JSON, every character": _every("\\u{:04x}"),
    "HTML": html.escape,
    "HTML, &#39;": lambda text: html.escape(text).replace("&#x27;", "&#39;"),
    "HTML, every character": _every("&#{};"),
    "HTML, every character in hexadecimal": _every("&#x{:x};"),
    "URL": lambda text: urllib.parse.quote(text, ""),
    "URL, lower case": _lower_url,
    "URL, plus": lambda text: urllib.parse.quote_plus(text, ""),
    "URL, every character": _every("%{:02x}"),
    "repr": lambda text: repr(text)[1:-1],
    "base64": lambda text: base64.b64encode(text.encode("utf-8")).decode("ascii"),
    "base64, inside more": lambda text: base64.b64encode(b"k=" + text.encode("utf-8") + b";").decode("ascii"),
    "cut short": lambda text: text[:max(6, len(text) * 2 // 3)],
    "controls between": "\x01".join,
    "invisibles between": "\u200b".join,
}


def spellings(secret):
    """The forms of a secret that may be in no output, as bytes."""
    forms = {encode(secret) for encode in ENCODINGS.values()} | {
        secret[at:at + 10] for at in range(max(1, len(secret) - 9))}
    return sorted(form.encode("utf-8", "surrogateescape") for form in forms)


def echo(status, encode="plain", headers=()):
    """An answer whose reason, Location, headers and body hold the request's headers, the key among them."""
    def step(server, sock, request):
        request.status = status
        said = "; ".join(value for name, value in request.header_list if name.lower() == "x-packtrack-key")
        text = ENCODINGS[encode](said)
        line = re.sub("[\r\n]", " ", text)
        reply = Reply(status, reason="key " + line, body='{"error":"bad key %s"}' % text, headers=[
            ("Location", "http://127.0.0.1:9/?key=" + line.replace(" ", "%20")), ("X-Echo", line), *headers])
        sock.sendall(reply.head() + reply.body)
        return "keep"
    return step


# ---- faults ----------------------------------------------------------------------------------------------

class Fault:
    """A named step: act(server, sock, request); `at` is "accept", "headers" or "request"."""

    def __init__(self, name, act, records=False, at="request"):
        self.name, self.act, self.records, self.at = name, act, records, at

    def __call__(self, server, sock, request):
        return self.act(server, sock, request)

    def __repr__(self):
        return self.name


FAULTS = {}
OK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = OK_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def _fault(name, act, records=False, at="request"):
    FAULTS[name] = Fault(name, Raw(act) if isinstance(act, bytes) else act, records, at)
    return FAULTS[name]


def _repeat(first, part, pause):
    def parts():
        yield first
        while True:
            yield part
            if pause:
                yield pause
    return Raw(parts)


def _huge():
    yield OK_HEAD + b"Content-Length: 100000000\r\n\r\n"
    block = b"x" * 100000
    for _ in range(1000):
        yield block


def _bomb():
    # Gzip members may be strung together: a hundred times a megabyte of zeros.
    body = gzip.compress(bytes(1000000)) * 100
    yield OK_HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    yield body


def _early_200(server, sock, request):
    for _ in range(4):
        sock.recv(65536)
    sock.sendall(OK_HEAD + b"Content-Length: 2\r\n\r\n{}")
    return "reset"


def _slow_reader(server, sock, request):
    while sock.recv(64):
        server.pause(0.05)


# At accept, before anything is read; with tls the handshake breaks or hangs.
RESET_BEFORE = _fault("RESET_BEFORE", lambda *_: "reset", at="accept")
CLOSE_BEFORE = _fault("CLOSE_BEFORE", lambda *_: "close", at="accept")
SILENT_BEFORE = _fault("SILENT_BEFORE", lambda server, sock, _: server.wait_closed(), at="accept")
# After the headers of the request: none of the body is read (and a reset; and silence), 256 KiB of it and a
# 200 and a reset, 64 bytes at a time.
EARLY_413 = _fault("EARLY_413", Raw(
    b'HTTP/1.1 413 Request Entity Too Large\r\nContent-Length: 21\r\nConnection: close\r\n\r\n'
    b'{"error":"too large"}', "reset"), at="headers")
UNREAD_BODY = _fault("UNREAD_BODY", lambda server, sock, _: server.wait_closed(), at="headers")
EARLY_200 = _fault("EARLY_200", _early_200, at="headers")
SLOW_READER = _fault("SLOW_READER", _slow_reader, at="headers")
# After the request: no answer, or none that is whole.
RESET_AFTER = _fault("RESET_AFTER", lambda *_: "reset")
CLOSE = _fault("CLOSE", lambda *_: "close")
SILENT = _fault("SILENT", lambda server, sock, _: server.hang(sock))
HALF_HEADERS = _fault("HALF_HEADERS", b"HTTP/1.1 200 OK\r\nContent-Ty")
RESET_IN_HEADERS = _fault("RESET_IN_HEADERS", Raw(b"HTTP/1.1 200 OK\r\nContent-Ty", "reset"))
DRIP_HEADERS = _fault("DRIP_HEADERS", _repeat(b"HTTP/1.1 200 OK\r\nX-Drip: ", b"a", 0.02))
ENDLESS_100 = _fault("ENDLESS_100", _repeat(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 20, 0.01))
RECORD_THEN_RESET = _fault("RECORD_THEN_RESET", lambda *_: "reset", records=True)
RECORD_THEN_CLOSE = _fault("RECORD_THEN_CLOSE", lambda *_: "close", records=True)
# A 200 with complete headers, so that the events are recorded; its body is the trouble.
DRIP_BODY = _fault("DRIP_BODY", _repeat(OK_HEAD + b"Content-Length: 1000000\r\n\r\n", b" ", 0.02), True)
BROKEN_BODY = _fault("BROKEN_BODY", OK_HEAD + b'Content-Length: 1000\r\n\r\n{"ids":[', True)
RESET_BODY = _fault("RESET_BODY", Raw(OK_HEAD + b'Content-Length: 1000\r\n\r\n{"ids":[', "reset"), True)
NEVER_ENDING_BODY = _fault("NEVER_ENDING_BODY",
                           _repeat(CHUNKED, b"4000\r\n" + b"x" * 0x4000 + b"\r\n", 0), True)
SILENT_BODY = _fault("SILENT_BODY", Raw(OK_HEAD + b"Content-Length: 10\r\n\r\n", "hang"), True)
STALLED_BODY = _fault("STALLED_BODY", Raw(OK_HEAD + b"Content-Length: 10\r\n\r\n{", "hang"), True)
ENDLESS_TRAILERS = _fault("ENDLESS_TRAILERS", _repeat(
    CHUNKED + b"2\r\n{}\r\n0\r\n", b"X-Trailer: 1\r\n" * 20, 0.01), True)
DRIP_TRAILERS = _fault("DRIP_TRAILERS", _repeat(
    CHUNKED + b"2\r\n{}\r\n0\r\nX-Trailer: ", b"a", 0.02), True)
SHORT_LENGTH = _fault("SHORT_LENGTH", OK_HEAD + b'Content-Length: 2\r\n\r\n{"ids":["too long"]}', True)
ABSURD_LENGTH = _fault("ABSURD_LENGTH", OK_HEAD + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n{}", True)
NEGATIVE_LENGTH = _fault("NEGATIVE_LENGTH", OK_HEAD + b"Content-Length: -5\r\n\r\n{}", True)
WORD_LENGTH = _fault("WORD_LENGTH", OK_HEAD + b"Content-Length: many\r\n\r\n{}", True)
BAD_CHUNK = _fault("BAD_CHUNK", CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", True)
HUGE_BODY = _fault("HUGE_BODY", Raw(_huge), True)
GZIP_BOMB = _fault("GZIP_BOMB", Raw(_bomb), True)
HTML_BODY = _fault("HTML_BODY", Raw(
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 37\r\n\r\n"
    b"<!DOCTYPE html><title>Welcome</title>", "keep"), True)
GARBAGE_BODY = _fault("GARBAGE_BODY", Raw(
    OK_HEAD + b"Content-Length: 9\r\n\r\n\x00\xff\xfe\x80{[\x1b\r\n", "keep"), True)
EMPTY_BODY = _fault("EMPTY_BODY", Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "keep"), True)
# Not HTTP, or too much of it.
BANNER = _fault("BANNER", b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
HTTP_09 = _fault("HTTP_09", b"<html><body>It works</body></html>\n")
for _name, _text in (("FOUR_DIGIT", "2000"), ("TWO_DIGIT", "20"), ("ZERO", "0200"), ("PLUS", "+200"),
                     ("UNDERSCORE", "2_00"), ("ARABIC", "\u0662\u0660\u0660")):
    _fault(_name + "_STATUS", status_line(_text))
FOUR_DIGIT_STATUS = FAULTS["FOUR_DIGIT_STATUS"]
LONG_HEADER = _fault("LONG_HEADER", OK_HEAD + b"X-Long: " + b"a" * 70000 + b"\r\nContent-Length: 2\r\n\r\n{}")
MANY_HEADERS = _fault("MANY_HEADERS", b"HTTP/1.1 200 OK\r\n" + b"".join(
    b"X-Many-%d: 1\r\n" % n for n in range(100)) + b"Content-Length: 2\r\n\r\n{}")


def _demand_certificate(context):
    context.verify_mode = ssl.CERT_REQUIRED


def _old_protocol(context):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")


def _unknown_name(context):
    context.sni_callback = lambda *_: ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME


def _no_cipher(context):
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AECDH:ADH:@SECLEVEL=0")


# What may be wrong with a TLS server whose certificate is good; tests with one need Python 3.7.
TLS_FAULTS = {"demands a certificate": _demand_certificate, "old protocol": _old_protocol,
              "unknown name": _unknown_name, "no common cipher": _no_cipher}
