"""A sink for the bench: answers 200 to everything and counts, as fast as plain sockets allow.

It answers first and counts afterwards, so that counting is no part of what the client waits for; compressed
bodies are kept and counted only when the counts are asked for. It checks nothing: tests/standin.py does.

    python tests/sink.py            prints its port, serves until its standard input closes

GET /counts answers {"requests", "bytes", "records", "connections"} since the last time, and starts anew.
"""
import collections
import contextlib
import json
import socket
import socketserver
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
    """Answer the requests of one connection until the client closes it."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    block, filled, first = bytearray(1 << 20), 0, True
    view = memoryview(block)
    while True:
        end = block.find(b"\r\n\r\n", 0, filled)
        while end < 0:
            got = connection.recv_into(view[filled:])
            if not got:
                return
            filled += got
            end = block.find(b"\r\n\r\n", 0, filled)
        head = bytes(view[:end]).lower()
        at = head.find(b"\r\ncontent-length:")
        length = int(head[at + 17:].split(b"\r\n", 1)[0]) if at >= 0 else 0
        start = end + 4
        if start + length > len(block):
            larger = bytearray(start + length + (1 << 20))
            larger[:filled] = view[:filled]
            block, view = larger, memoryview(larger)
        while filled < start + length:
            got = connection.recv_into(view[filled:start + length])
            if not got:
                return
            filled += got
        if head.startswith(b"get /counts "):
            connection.sendall(take())
        else:
            with LOCK:  # taken before the answer, so that nobody reads the counts in between
                connection.sendall(ANSWER)
                counts["requests"] += 1
                counts["bytes"] += length
                counts["connections"] += first
                if b"\r\ncontent-encoding: gzip" in head:
                    PACKED.append(bytes(view[start:start + length]))
                else:
                    counts["records"] += block.count(MARK, start, start + length)
            first = False
        rest = filled - start - length
        block[:rest] = block[start + length:filled]
        filled = rest


class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError):  # a client that went away: the bench sees it in the counts
            serve(self.request)


if __name__ == "__main__":
    socketserver.ThreadingTCPServer.daemon_threads = True
    socketserver.ThreadingTCPServer.request_queue_size = 128
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.buffer.read()
