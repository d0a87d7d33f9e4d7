"""The async path with threads that change places as often as the interpreter lets them: nothing is lost."""
import itertools
import json
import random

import pytest

from conftest import events, ndjson
from standin import RESET_AFTER, StandIn

COMMAND_LINE = """
import sys
sys.setswitchinterval(1e-6)
sys.path.insert(0, sys.argv[1])
import packtrack_logger
sys.exit(packtrack_logger.main(sys.argv[2:]))
"""
LIBRARY = """
import os, sys, threading
sys.setswitchinterval(1e-6)
sys.path.insert(0, sys.argv[1])
from packtrack_logger import AsyncClient, Client
threads, number, size, capacity = map(int, sys.argv[2:6])
client = Client(os.environ["PACKTRACK_API_KEY"], base_url=os.environ["PACKTRACK_BASE_URL"], retries=5,
                backoff_initial=0.001, backoff_max=0.002)
sender = AsyncClient(client, batch_size=size, flush_interval=float(sys.argv[6]), queue_capacity=capacity)
def work(name):
    for count in range(number):
        sender.enqueue({"timestamp": "2025-01-01T00:00:00Z", "source": {"system": "s"},
                        "workflow": {"id": name}, "actor": {"type": "t", "id": "a"},
                        "severity": "info", "status": "ok", "message": str(count)}, block=True)
        if count % 17 == 0:
            sender.flush(30)
workers = [threading.Thread(target=work, args=("w%d" % n,)) for n in range(threads)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
sender.flush()
sender.close()
client.close()
"""
RUNS = [pytest.param(seed, marks=() if seed < 2 else pytest.mark.full,
                     id="run %d" % seed) for seed in range(50)]


def flaky(chance, steps):
    """200, and now and then one of the steps; never two faults in a row, so that the tries suffice."""
    while True:
        yield chance.choice(steps) if chance.random() < 0.1 else 200
        yield 200


@pytest.mark.parametrize("seed", RUNS)
def test_async_command_line_delivers_each_record_once(seed, run):
    chance = random.Random(seed)
    number = chance.choice([1, 10, 300, 1000])
    argv = ["--async", "--json", "--stdin", "--ndjson", "--batch-size", chance.choice("1 2 7 100".split()),
            "--queue-capacity", chance.choice("1 3 100 10000".split()), "--flush-interval",
            chance.choice("1us 1ms 20ms 1s".split()), "--backoff-initial", "1ms", "--backoff-max", "2ms"]
    argv += chance.choice([[], ["--gzip"], ["--keep-going"], ["--max-batch-bytes", "500"]])
    with StandIn(script=flaky(chance, [503, 429, RESET_AFTER])) as server:
        result = run(*argv, server=server, stdin=ndjson(events(number)),
                     python_flags=["-X", "dev", "-c", COMMAND_LINE])
        assert result.code == 0, result
        assert result.err == ""
        assert (result.summary["delivered"], result.summary["read"]) == (number, number)
        assert server.records == events(number)
        assert server.checks == []


@pytest.mark.parametrize("seed", RUNS)
def test_async_with_refusals_accounts_for_each_record_once(seed, run, tmp_path):
    chance = random.Random(1000 + seed)
    number = chance.choice([1, 10, 300])
    left = tmp_path / "left"
    argv = ["--async", "--keep-going", "--json", "--stdin", "--ndjson", "--batch-size",
            chance.choice("1 7 100".split()), "--queue-capacity", chance.choice("1 3 10000".split()),
            "--flush-interval", "1ms", "--retries", "0", "--undelivered", left]
    with StandIn(script=flaky(chance, [400, 413, 503, RESET_AFTER])) as server:
        result = run(*argv, server=server, stdin=ndjson(events(number)),
                     python_flags=["-X", "dev", "-c", COMMAND_LINE])
        assert result.code in (0, 2, 3), result
        kept = left.read_bytes().splitlines() if left.exists() else []
        assert (result.summary["delivered"], result.summary["undelivered"]) == (len(server.records),
                                                                                len(kept))
        both = server.records + [json.loads(line.decode()) for line in kept]
        assert sorted(one["message"] for one in both) == sorted(one["message"] for one in events(number))
        assert server.records == sorted(server.records, key=lambda one: int(one["message"].split()[1]))


@pytest.mark.parametrize("seed", RUNS)
def test_async_client_fed_by_several_threads_delivers_each_event_once(seed, run):
    chance = random.Random(2000 + seed)
    threads, number = chance.randint(1, 6), chance.choice([1, 20, 100])
    size, capacity = chance.choice([1, 7, 100]), chance.choice([1, 5, 10000])
    interval = chance.choice([0.001, 100])
    with StandIn(script=flaky(chance, [503, RESET_AFTER])) as server:
        result = run(*map(str, (threads, number, size, capacity, interval)), server=server,
                     python_flags=["-X", "dev", "-c", LIBRARY])
        assert (result.code, result.err) == (0, "")
        got = {}
        for record in server.records:
            got.setdefault(record["workflow"]["id"], []).append(record["message"])
        assert got == {"w%d" % n: [str(count) for count in range(number)] for n in range(threads)}
        assert all(len(request.events) <= size for request in server.requests)


@pytest.mark.parametrize("capacity, size", itertools.product([1, 2], [1, 100]))
def test_queue_that_is_smaller_than_a_batch_drops_and_blocks_nothing(capacity, size, run):
    with StandIn() as server:
        result = run("--async", "--json", "--stdin", "--ndjson", "--batch-size", str(size),
                     "--queue-capacity",
                     str(capacity), "--flush-interval", "5ms", server=server, stdin=ndjson(events(50)))
        assert result.code == 0, result
        assert server.records == events(50)
