"""A sink for the bench: answers 200 to everything and counts, as fast as plain sockets allow.

    python tests/sink.py            prints its port, serves until its standard input closes

It answers first and counts afterwards, compressed bodies only when the counts are asked for, so that counting
is no part of what the client waits for. It checks nothing: tests/standin.py does. GET /counts answers
{"requests", "bytes", "records", "connections"} since the last time, and starts anew.
"""
import collections
import contextlib
import json
import socket
import sys
import threading
import zlib

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
MARK = b'"severity"'  # each event of the bench holds it once
LOCK, PACKED = threading.Lock(), []
counts = collections.Counter()


def take():
    """The counts since the last call, as an answer."""
    with LOCK:
        counts["records"] += sum(zlib.decompress(body, 31).count(MARK) for body in PACKED)
        body = json.dumps({name: counts[name] for name in ("requests", "bytes", "records", "connections")})
        counts.clear()
        PACKED.clear()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body.encode())


def serve(connection):
    """Answer the requests of one connection until the client closes it or goes away."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    block, filled, got, first = bytearray(1 << 20), 0, 1, True
    with connection, contextlib.suppress(OSError):
        while got:
            start = block.find(b"\r\n\r\n", 0, filled) + 4
            head = bytes(block[:start]).lower() if start > 3 else b""
            at = head.find(b"\r\ncontent-length:")
            end = start + (int(head[at + 17:].split(b"\r\n", 1)[0]) if at >= 0 else 0)
            block.extend(bytes(max(0, end - len(block))))
            if not head or filled < end:
                got = connection.recv_into(memoryview(block)[filled:])
                filled += got
                continue
            if head.startswith(b"get /counts "):
                connection.sendall(take())
            else:
                with LOCK:  # taken before the answer, so that nobody reads the counts in between
                    connection.sendall(ANSWER)
                    counts.update(requests=1, bytes=end - start, connections=first)
                    if b"\r\ncontent-encoding: gzip" in head:
                        PACKED.append(bytes(block[start:end]))
                    else:
                        counts["records"] += block.count(MARK, start, end)
                first = False
            filled -= end
            block[:filled] = block[end:end + filled]


def accept(listener):
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=accept, args=(listener,), daemon=True).start()
    sys.stdin.buffer.read()
