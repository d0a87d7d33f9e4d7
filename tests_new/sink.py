"""A sink for the bench: answers 200 to everything and counts, as fast as plain sockets allow.

It answers first and counts afterwards, so that counting is no part of what the client waits for; compressed
bodies are kept and counted only when the counts are asked for. It checks nothing: tests/standin.py does.

    python tests/sink.py            prints its port, serves until its standard input closes

GET /counts answers {"requests", "bytes", "records", "connections"} since the last time, and starts anew.
"""

import json
import socket
import sys
import threading
import zlib

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
MARK = b'"severity"'  # each event of the bench holds it once


class Counts:
    def __init__(self):
        self.lock = threading.Lock()
        self.clear()

    def clear(self):
        self.requests = self.bytes = self.records = self.connections = 0
        self.packed = []

    def take(self):
        """Return the counts since the last call, as the body of an answer."""
        with self.lock:
            for body in self.packed:
                self.records += zlib.decompress(body, 31).count(MARK)
            counts = {"requests": self.requests, "bytes": self.bytes, "records": self.records,
                      "connections": self.connections}
            self.clear()
        return json.dumps(counts).encode()


def serve(connection, counts):
    """Answer the requests of one connection until the client closes it."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    block = bytearray(1 << 20)
    view = memoryview(block)
    filled = 0
    first = True
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
            body = counts.take()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        else:
            with counts.lock:  # taken before the answer, so that nobody reads the counts in between
                connection.sendall(ANSWER)
                counts.requests += 1
                counts.bytes += length
                counts.connections += first
                if b"\r\ncontent-encoding: gzip" in head:
                    counts.packed.append(bytes(view[start:start + length]))
                else:
                    counts.records += block.count(MARK, start, start + length)
            first = False
        rest = filled - start - length
        block[:rest] = block[start + length:filled]
        filled = rest


def converse(connection, counts):
    with connection:
        try:
            serve(connection, counts)
        except OSError:
            pass  # a client that went away: the bench sees it in the counts


def accept(listener, counts):
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=converse, args=(connection, counts), daemon=True).start()


def main():
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=accept, args=(listener, Counts()), daemon=True).start()
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
