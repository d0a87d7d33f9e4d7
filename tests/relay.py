"""A relay that adds latency and nothing else: no limit of bandwidth, any number of connections.

    python tests/relay.py PORT MILLISECONDS     prints its port; serves until its standard input closes

What comes goes on to PORT of 127.0.0.1 and back: half a round trip is added to each piece of data and to the
end of each direction. The handshake of TCP is not delayed: a new connection costs no more than it did.
"""
import asyncio
import collections
import contextlib
import sys


async def carry(reader, writer, delay):
    """Hand on what comes, that many seconds late, and the end of it."""
    loop = asyncio.get_running_loop()
    waiting, over, data = collections.deque(), loop.create_future(), b"x"

    def deliver():
        data = waiting.popleft()  # timers of one moment fire in any order
        if data:
            writer.write(data)
        elif not over.done():
            over.set_result(None)

    while data:
        data = b""
        with contextlib.suppress(OSError):
            data = await reader.read(1 << 18)
        waiting.append(data)
        loop.call_later(delay, deliver)
    await over
    with contextlib.suppress(OSError):
        writer.write_eof()


async def serve(port, delay):
    async def converse(reader, writer):
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.CancelledError):
            there, back = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(back):
                await asyncio.gather(carry(reader, back, delay), carry(there, writer, delay))

    server = await asyncio.start_server(converse, "127.0.0.1", 0, backlog=128)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2]) / 2000))
