"""Nothing is lost in silence: accounting, batches, what is kept, memory, signals, against a bad service."""
import collections
import gzip
import hashlib
import itertools
import json
import os
import random
import re
import select
import signal
import stat
import subprocess
import sys
import threading

import pytest

import bench
import standin
from conftest import FLAGS, event, events, ndjson
from standin import Reply, StandIn, cut_records

FAST = ("--backoff-initial", "1ms", "--backoff-max", "5ms")
full = pytest.mark.full
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX alone")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone")

INVALID = b'{"timestamp":"2025-01-01T00:00:00Z","source":{"system":"s"},"workflow":{"id":"w"},' \
          b'"actor":{"type":"t","id":"i"},"severity":"loud","status":"ok","message":"invalid"}'
MALFORMED = b'{"timestamp":"2025-01-01T00:00:00Z","source":{'
REFUSED = [pytest.param(INVALID, 1, id="invalid"), pytest.param(MALFORMED, 4, id="malformed")]


def lines_of(number, **overrides):
    """Complete records as lines, without their ends."""
    return ndjson(events(number, **overrides)).splitlines()


def joined(lines):
    return b"".join(line + b"\n" for line in lines)


def write(path, lines):
    path.write_bytes(joined(lines))
    return path


@pytest.fixture
def send(run, tmp_path):
    """send(lines, *argv): run on a file that holds these records."""
    def whole(lines, *argv, **options):
        return run("--file", write(tmp_path / "in.ndjson", lines), "--ndjson", *argv, **options)
    return whole


@pytest.fixture
def pipe(run):
    """pipe(lines, *argv): run with these records on its standard input."""
    def whole(lines, *argv, **options):
        return run("--stdin", "--ndjson", *argv, stdin=joined(lines), **options)
    return whole


def kept_in(path):
    """The lines of an --undelivered file that may not be there."""
    return path.read_bytes().splitlines() if path.exists() else []


def bodies_of(server):
    return [[one["message"] for one in request.events] for request in server.requests]


def acknowledged_by(server):
    """The records that were answered with a 2xx, as bytes."""
    return [raw for request in server.requests if request.status == 200 for raw in cut_records(request.body)]


def account(result, server, lines, kept):
    """Each record read was acknowledged, or kept: never neither, never both, and the counts say so.

    A record that the stand-in recorded before it broke the connection may be kept or acknowledged later.
    """
    summary = result.summary
    read = lines[:summary["read"]]
    acknowledged = acknowledged_by(server)
    twice = [line for line, count in collections.Counter(acknowledged + kept).items() if count > 1]
    assert not twice, (twice[:3], result)
    assert set(acknowledged) | set(kept) == set(read), result
    assert summary["delivered"] == len(acknowledged), result
    assert summary["undelivered"] + summary["invalid"] == len(kept), result


def by_size(most):
    """A step: 413 for more than `most` records in a request, else as a sane service."""
    def answer(server, sock, request):
        request.status = 413 if len(request.events) > most else server.acknowledge(request)
        reply = Reply(request.status)
        sock.sendall(reply.head() + reply.body)
        return "keep"
    return answer


# ---- chaos -----------------------------------------------------------------------------------------------

CHAOS = list(itertools.product(("", "--async"), ("", "--keep-going"), ("", "--gzip")))
BREAKS = (standin.RESET_BEFORE, standin.RESET_AFTER, standin.CLOSE, standin.RECORD_THEN_RESET,
          standin.RECORD_THEN_CLOSE, standin.HALF_HEADERS)


def chaos(dice):
    """An endless script of answers and faults, at most one of them a hang."""
    hangs = 1
    while True:
        lot = dice.random()
        if lot < 0.75:
            yield 200
        elif lot < 0.85:
            yield dice.choice((429, 500, 503))
        elif lot < 0.90:
            yield 413
        elif lot < 0.903 and hangs:
            hangs -= 1
            yield standin.SILENT
        else:
            yield dice.choice(BREAKS)


@pytest.mark.parametrize("seed", [1, 2] + [pytest.param(seed, marks=full) for seed in range(3, 21)])
def test_every_record_is_acknowledged_or_kept_whatever_the_service_does(seed, start, run, tmp_path):
    lines = lines_of(900)
    source = write(tmp_path / "events.ndjson", lines)
    under_way = []
    try:
        for number, modes in enumerate(CHAOS):
            dice = random.Random(seed * 100 + number)
            kept = tmp_path / ("kept%d" % number)
            server = StandIn(chaos(dice)).start()
            piped = "--async" in modes or dice.random() < 0.5
            flags = [mode for mode in modes if mode]
            handle = start(*flags, *FAST, "--ndjson", "--json", "--batch-size", "3", "--timeout", "3s",
                           "--retries", dice.choice("1346"), "--idempotency-key", "auto",
                           "--undelivered", kept, *(["--stdin"] if piped else ["--file", source]),
                           stdin=joined(lines) if piped else None, server=server)
            under_way.append((server, handle, kept))
        for server, handle, kept_file in under_way:
            result = handle.result(120)
            kept = kept_in(kept_file)
            account(result, server, lines, kept)
            assert result.summary["read"] == len(lines), result
            assert server.checks == []
            refused = any(request.status == 413 and len(request.events) == 1 for request in server.requests)
            assert result.code == (0 if not kept else 2 if refused else 3), result
            assert result.summary["requests"] >= len(server.requests), result
            for request in server.requests:
                assert request.headers["idempotency-key"] == hashlib.sha256(request.body).hexdigest()
            if kept:
                with StandIn() as healthy:
                    assert run("--file", kept_file, "--ndjson", server=healthy).code == 0
                assert set(healthy.raw_records) | set(acknowledged_by(server)) == set(lines)
    finally:
        for server, _, _ in under_way:
            server.close()


def test_a_batch_recorded_but_not_acknowledged_is_sent_again_under_the_same_key(send, run, tmp_path):
    lines = lines_of(40)
    kept = tmp_path / "kept.ndjson"
    script = [200] + [standin.RECORD_THEN_RESET] * 4
    with StandIn(script, default=503) as server:
        result = send(lines, "--batch-size", "10", "--retries", "1",
                     *FAST, "--idempotency-key", "auto", "--undelivered", kept, "--json", server=server)
    assert result.code == 3
    account(result, server, lines, kept_in(kept))
    recorded = server.requests[1]
    assert server.raw_records[10:20] == lines[10:20]
    with StandIn() as again:
        assert run("--file", kept, "--ndjson", "--batch-size", "10", "--idempotency-key", "auto",
                   server=again).code == 0
    assert again.raw_records == lines[10:]
    assert again.requests[0].headers["idempotency-key"] == recorded.headers["idempotency-key"]
    assert again.requests[0].body == recorded.body


# ---- stopped under way -----------------------------------------------------------------------------------

STOPS = ("waiting for an answer", "waiting to try again", "sending", "streaming",
         "streaming to a broken service")


def stop_script(how, moment):
    if how == "waiting for an answer":
        return [200] * (moment - 1) + [standin.SILENT]
    if how == "waiting to try again":
        return [200] * (moment - 1) + [Reply(503, headers=[("Retry-After", "50")])]
    if how == "sending":  # the barrier: it cannot end before the signal comes
        return [200] * (moment + 5) + [standin.SILENT]
    if how == "streaming to a broken service":
        return [200] * moment + [503] * 1000
    return []


@posix
@pytest.mark.parametrize("how, seed", [
    pytest.param(how, seed, marks=() if seed == 0 else full) for how in STOPS for seed in range(4)])
def test_stopped_by_term_every_record_read_is_acknowledged_or_kept(how, seed, start, run, tmp_path):
    moment = random.Random("%s %d" % (how, seed)).randint(1, 60)
    lines = lines_of(200)
    kept_file = tmp_path / "kept.ndjson"
    with StandIn(stop_script(how, moment)) as server:
        shared = ["--ndjson", "--batch-size", "2", "--json", "--undelivered", kept_file,
                  "--retries", "1", *FAST]
        if how.startswith("streaming"):
            handle = start("--stdin", "--async", *shared, stdin=subprocess.PIPE, server=server)
            # It fits into the pipe, which stays open: only the signal ends the run.
            handle.stdin.write(joined(lines))
            handle.stdin.flush()
        else:
            handle = start("--file", write(tmp_path / "in", lines), *shared, server=server)
        server.wait_for_requests(moment)
        handle.send_signal(signal.SIGTERM)
        handle.popen.wait(25)
        result = handle.result()
    kept = kept_in(kept_file)
    acknowledged = acknowledged_by(server)
    if how == "sending":
        # The answer that was on its way is acknowledged for the stand-in alone.
        assert set(acknowledged) & set(kept) <= set(acknowledged[-2:])
        unseen = set(acknowledged) & set(kept)
        assert set(acknowledged) | set(kept) == set(lines)
        assert result.summary["delivered"] == len(acknowledged) - len(unseen)
    else:
        account(result, server, lines, kept)
    if how == "streaming to a broken service":
        assert result.code in (143, 3)  # it may have failed before it was told to stop
    else:
        assert result.code == 143
    if how == "streaming":
        assert not kept, "stopped, it flushes what it has read"
    if not how.startswith("streaming"):
        assert result.summary["read"] == len(lines)
        assert kept
    if kept:
        with StandIn() as healthy:
            assert run("--file", kept_file, "--ndjson", server=healthy).code == 0
        assert healthy.raw_records == kept
        assert set(kept) | set(acknowledged) == set(lines[:result.summary["read"]])


@posix
@pytest.mark.parametrize("mode", [(), ("--async",)], ids=["sync", "async"])
def test_int_ends_with_130_and_the_same_accounting(mode, start, tmp_path):
    lines = lines_of(60)
    kept = tmp_path / "kept"
    script = [200, 200] if mode else [200, standin.SILENT]
    with StandIn(script) as server:
        handle = start("--stdin", "--ndjson", *mode, "--batch-size", "20", "--json", "--undelivered", kept,
                       stdin=subprocess.PIPE, server=server)
        handle.stdin.write(joined(lines))
        if mode:
            handle.stdin.flush()
        else:
            handle.stdin.close()
        server.wait_for_requests(2)
        handle.send_signal(signal.SIGINT)
        handle.popen.wait(20)
        result = handle.result()
    assert result.code == 130
    account(result, server, lines, kept_in(kept))


@posix
def test_stopped_while_it_reads_a_pipe_what_was_read_is_kept(start, tmp_path):
    lines = lines_of(2000, metadata={"padding": "x" * 1000})
    kept = tmp_path / "kept"
    with StandIn() as server:
        handle = start("--stdin", "--ndjson", "--json", "--undelivered", kept, stdin=subprocess.PIPE,
                       server=server)
        # Far more than a pipe holds: most of it has been read when this returns.
        handle.stdin.write(joined(lines))
        handle.send_signal(signal.SIGTERM)
        handle.popen.wait(20)
        result = handle.result()
    assert result.code == 143
    assert server.requests == []
    assert result.summary["undelivered"] > 0
    assert kept_in(kept) == lines[:result.summary["undelivered"]]


@posix
def test_the_first_signal_flushes_and_the_second_stops_at_once(start, tmp_path):
    lines = lines_of(50)
    kept = tmp_path / "kept"
    with StandIn(default=standin.SILENT) as server:
        handle = start("--stdin", "--ndjson", "--async", "--batch-size", "10", "--timeout", "60s", "--json",
                       "--undelivered", kept, stdin=subprocess.PIPE, server=server)
        handle.stdin.write(joined(lines))
        handle.stdin.flush()
        server.wait_for_requests(1)
        handle.send_signal(signal.SIGTERM)
        for _ in range(100):  # two that come together may count as one
            try:
                handle.popen.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                handle.send_signal(signal.SIGTERM)
        result = handle.result()
    assert result.code == 143
    assert result.seconds < 40, "it waited for the flush"
    account(result, server, lines, kept_in(kept))


# ---- batches ---------------------------------------------------------------------------------------------

MODES = [pytest.param((), id="sync"), pytest.param(("--async",), id="async")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size, sizes", [("1", [1] * 7), ("3", [3, 3, 1]), ("7", [7]), ("100", [7])])
def test_batches_hold_batch_size_records_in_order(mode, size, sizes, send, server):
    lines = lines_of(7)
    result = send(lines, *mode, "--batch-size", size, "--json",
                 "--flush-interval", "1h", server=server)
    assert result.code == 0
    assert [len(request.events) for request in server.requests] == sizes
    assert all(isinstance(request.json, list) for request in server.requests)
    assert server.raw_records == lines
    assert server.connections == 1
    assert (result.summary["read"], result.summary["delivered"]) == (7, 7)
    assert (result.summary["requests"], result.summary["retries"]) == (len(sizes), 0)
    assert result.summary["bytes_sent"] >= sum(map(len, lines))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["ndjson", "array", "pipe"])
def test_a_batch_closes_at_max_batch_bytes_and_a_larger_record_goes_alone(mode, form, run, server, tmp_path):
    lines = lines_of(20)
    lines[7] = ndjson([event(message="large", metadata={"text": "x" * 3000})]).strip()
    most = 5 * len(lines[0])
    path = tmp_path / "in"
    path.write_bytes(b"[" + b", ".join(lines) + b"]" if form == "array" else joined(lines))
    source = ["--file", path, "--ndjson"] if form == "ndjson" else ["--file", path] if form == "array" else [
        "--stdin", "--ndjson"]
    result = run(*source, *mode, "--max-batch-bytes", str(most), "--flush-interval", "1h",
                 stdin=path.read_bytes() if form == "pipe" else None, server=server)
    assert result.code == 0
    assert server.raw_records == lines
    for request in server.requests:
        assert len(request.body) <= most or len(request.events) == 1
    assert ["large"] in bodies_of(server)
    assert len(server.requests) <= 10


def test_the_body_is_the_same_on_every_try(send, server):
    with StandIn([503, standin.RESET_AFTER, 429]) as flaky:
        result = send(lines_of(5), "--gzip", *FAST, "--json",
                     "--idempotency-key", "auto", server=flaky)
    assert result.code == 0
    assert len(flaky.requests) == 4
    assert len({request.raw_body for request in flaky.requests}) == 1
    assert len({request.headers["idempotency-key"] for request in flaky.requests}) == 1
    assert gzip.decompress(flaky.requests[0].raw_body) == flaky.requests[0].body
    assert result.summary["requests"] == 4
    assert result.summary["retries"] == 3


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_is_too_large_is_split_until_it_fits(mode, send):
    lines = lines_of(16)
    with StandIn(default=by_size(2)) as server:
        result = send(lines, *mode, "--batch-size", "8", "--json",
                     "--idempotency-key", "auto", server=server)
    assert result.code == 0
    assert acknowledged_by(server) == lines
    assert [len(request.events) for request in server.requests] == [8, 4, 2, 2, 4, 2, 2] * 2
    assert len({request.headers["idempotency-key"] for request in server.requests}) == 14
    assert result.summary["retries"] == 0


def test_a_single_record_that_is_too_large_is_final_and_the_only_one_not_delivered(send, tmp_path):
    lines = lines_of(8)
    large = ndjson([event(message="too large")]).strip()
    lines[5] = large

    def answer(server, sock, request):
        request.status = 413 if large in request.body else server.acknowledge(request)
        reply = Reply(request.status)
        sock.sendall(reply.head() + reply.body)
        return "keep"

    kept = tmp_path / "kept"
    with StandIn(default=answer) as server:
        result = send(lines, "--keep-going", "--json",
                     "--undelivered", kept, server=server)
    assert result.code == 2
    assert kept_in(kept) == [large]
    assert re.search(r"\b6\b", result.err), result
    account(result, server, lines, kept_in(kept))


# ---- idempotency keys ------------------------------------------------------------------------------------

def test_a_key_goes_out_as_given_when_the_run_makes_one_request(send, run, server):
    assert send(lines_of(5), "--idempotency-key", "night",
               server=server).code == 0
    assert run(*FLAGS, "--idempotency-key", "one", server=server).code == 0
    assert [request.headers["idempotency-key"] for request in server.requests] == ["night", "one"]


@pytest.mark.parametrize("mode", MODES)
def test_several_requests_carry_the_key_with_range_and_digest(mode, send):
    lines = lines_of(25)
    with StandIn([200, 503]) as server:
        assert send(lines, *mode, "--batch-size", "10", *FAST,
                   "--idempotency-key", "night", server=server).code == 0
    keys = [request.headers["idempotency-key"] for request in server.requests]
    assert keys[1] == keys[2], "a retry has the key of the first try"
    assert len(set(keys)) == 3
    for key, request, span in zip(keys[:1] + keys[2:], server.requests[:1] + server.requests[2:],
                                  ("1-10", "11-20", "21-25")):
        assert key == "night-%s-%s" % (span, hashlib.sha256(request.body).hexdigest()[:8])


def test_the_halves_of_a_split_batch_have_keys_of_their_own(send):
    with StandIn([413]) as server:
        assert send(lines_of(4), "--idempotency-key", "night",
                   server=server).code == 0
    assert len({request.headers["idempotency-key"] for request in server.requests}) == 3


# ---- what is kept ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", MODES)
def test_success_creates_no_undelivered_file(mode, send, server, tmp_path):
    kept = tmp_path / "kept"
    assert send(lines_of(5), *mode, "--undelivered", kept,
               server=server).code == 0
    assert not kept.exists()


@pytest.mark.parametrize("mode", MODES)
def test_undelivered_records_are_appended_and_private_to_the_owner(mode, send, tmp_path):
    lines = lines_of(5)
    kept = tmp_path / "kept"
    for expected in (lines, lines * 2):
        with StandIn(default=400) as server:
            result = send(lines, *mode, "--undelivered", kept, "--json",
                         server=server)
        assert result.code == 2
        assert kept_in(kept) == expected
        assert result.summary["undelivered"] == 5
    if os.name == "posix":
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600


@pytest.mark.parametrize("place", ["missing/kept", "."])
def test_an_undelivered_file_that_cannot_be_written_is_refused_first(place, send, server, tmp_path):
    result = send(lines_of(5), "--undelivered", tmp_path / place,
                 server=server)
    assert result.code == 1
    assert "--undelivered" in result.err or place in result.err
    assert server.requests == []


@linux
@pytest.mark.parametrize("mode", MODES)
def test_an_undelivered_file_on_a_full_disk_is_told_and_the_verdict_stands(mode, send):
    with StandIn(default=400) as server:
        result = send(lines_of(5), *mode, "--undelivered", "/dev/full",
                     "--json", server=server)
    assert result.code == 2
    assert "/dev/full" in result.err or "not be kept" in result.err
    assert result.summary["undelivered"] == 5


@pytest.mark.parametrize("bad, code", [*REFUSED, pytest.param(b"[1]", 4, id="an array")])
def test_a_refusal_at_the_door_from_a_file_sends_and_writes_nothing(bad, code, send, server, tmp_path):
    lines = lines_of(300)
    lines[250:250] = [bad]
    kept = tmp_path / "kept"
    result = send(lines, "--undelivered", kept, "--json",
                 server=server)
    assert result.code == code
    assert "in.ndjson:251:" in result.err
    assert server.requests == []
    assert not kept.exists()
    assert result.summary["delivered"] == 0


@pytest.mark.parametrize("bad, code", REFUSED)
def test_a_refusal_at_the_door_from_a_pipe_keeps_the_whole_input(bad, code, pipe, server, tmp_path):
    good = lines_of(300)
    lines = good[:250] + [bad] + good[250:280] + [MALFORMED, INVALID] + good[280:]
    kept = tmp_path / "kept"
    result = pipe(lines, "--undelivered", kept, "--json", server=server)
    assert result.code == code
    assert ":251:" in result.err
    assert server.requests == []
    assert sorted(kept_in(kept)) == sorted(lines)
    assert [line for line in kept_in(kept) if line in good] == good
    assert result.summary["read"] == result.summary["undelivered"] + result.summary["invalid"] == len(lines)


def test_an_array_from_a_pipe_that_is_refused_is_kept_one_record_a_line(run, server, tmp_path):
    lines = lines_of(3)
    kept = tmp_path / "kept"
    text = b"[\n  " + lines[0] + b",\n  " + INVALID.replace(b",", b",\n  ") + b",\n  " + lines[1] + b"\n]\n"
    result = run("--stdin", "--undelivered", kept, "--json", stdin=text, server=server)
    assert result.code == 1
    assert server.requests == []
    assert sorted(map(squeeze, kept_in(kept))) == sorted([lines[0], INVALID, lines[1]])


@pytest.mark.parametrize("mode", MODES)
def test_keep_going_keeps_invalid_records_as_they_came(mode, send, server, tmp_path):
    good = lines_of(6)
    odd = INVALID.replace(b'":', b'" : ')
    lines = [*good[:2], odd, *good[2:4], MALFORMED, *good[4:]]
    kept = tmp_path / "kept"
    result = send(lines, *mode, "--keep-going", "--undelivered", kept,
                 "--json", server=server)
    assert result.code == 4
    assert server.raw_records == good
    assert sorted(kept_in(kept)) == sorted([odd, MALFORMED])
    assert (result.summary["read"], result.summary["delivered"], result.summary["invalid"]) == (8, 6, 2)
    assert ":3:" in result.err
    assert ":6:" in result.err


def test_what_is_kept_of_an_incomplete_record_can_be_sent_again(send, run, tmp_path):
    kept = tmp_path / "kept"
    records = [{"message": "event %d" % number, "metadata": {"n": 10 ** 30}} for number in range(3)]
    flags = FLAGS[2:-2]  # without timestamp and message
    with StandIn(default=503) as server:
        assert send(ndjson(records).splitlines(), *flags, "--retries",
                   "0", "--undelivered", kept, server=server).code == 3
    with StandIn() as server:
        assert run("--file", kept, "--ndjson", *flags, server=server).code == 0
    assert [one["message"] for one in server.records] == [one["message"] for one in records]
    assert [one["metadata"] for one in server.records] == [{"n": 10 ** 30}] * 3


# ---- exit codes and words --------------------------------------------------------------------------------

BAD = {"i": INVALID, "m": MALFORMED}
ORDER = [  # records (good, invalid, malformed), answers to the good ones, exit code
    ("ggg", [200, 200, 200], 0),
    ("gig", [200, 200], 1),
    ("gim", [200], 4),
    ("mig", [200], 4),
    ("ggm", [503, 200], 3),
    ("gig", [200, 503], 3),
    ("ggg", [503, 400, 200], 2),
    ("ggg", [409, 503, 200], 2),
    ("img", [400], 2),
    ("igg", [400, 503], 2),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("records, script, code", ORDER)
def test_keep_going_exits_with_the_first_of_2_3_4_1(mode, records, script, code, pipe, tmp_path):
    good = iter(lines_of(len(records)))
    lines = [BAD.get(kind) or next(good) for kind in records]
    kept = tmp_path / "kept"
    with StandIn(script, default=500) as server:
        result = pipe(lines, *mode, "--keep-going", "--batch-size", "1", "--retries", "0", "--json",
                     "--undelivered", kept, server=server)
    assert result.code == code
    assert result.summary["read"] == len(records)
    assert result.summary["invalid"] == sum(kind in BAD for kind in records)
    assert len(server.requests) == len(script)
    account(result, server, lines, kept_in(kept))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("status", [401, 403, 404])
def test_keep_going_ends_where_all_the_rest_would_fail_alike(mode, status, send, tmp_path):
    lines = lines_of(50)
    kept = tmp_path / "kept"
    with StandIn([200, status]) as server:
        result = send(lines, *mode, "--keep-going", "--batch-size",
                     "10", "--json", "--undelivered", kept, server=server)
    assert result.code == 2
    assert len(server.requests) == 2
    assert result.error["status"] == status
    account(result, server, lines, kept_in(kept))


def test_the_failure_line_names_the_records_and_the_servers_words(send):
    words = "the tenant's quota is used up"
    with StandIn([200, 200, 200, Reply(409, body=json.dumps({"error": words}))]) as server:
        result = send(lines_of(1000), "--json", server=server)
    assert result.code == 2
    assert "records 301-1000" in result.err
    assert "300" in result.err.replace("301-1000", "")
    assert words in result.err
    assert "409" in result.err
    assert len(result.err.splitlines()) == 1
    assert result.error["status"] == 409
    assert result.summary["delivered"] == 300


@pytest.mark.parametrize("mode", MODES)
def test_keep_going_names_each_range_that_was_not_delivered(mode, send):
    lines = lines_of(100)
    script = [200, 400, 200, 200, 503]
    with StandIn(script) as server:
        result = send(lines, *mode, "--keep-going", "--batch-size", "10",
                     "--retries", "0", server=server)
    assert result.code == 2
    assert "11-20" in result.err
    assert "41-50" in result.err
    assert len(server.records) == 80


@pytest.mark.parametrize("mode", MODES)
def test_the_first_batch_that_fails_ends_the_run(mode, send, tmp_path):
    lines = lines_of(50)
    kept = tmp_path / "kept"
    with StandIn([200, 500, 500]) as server:
        result = send(lines, *mode, "--batch-size", "10", "--retries",
                     "1", *FAST, "--json", "--undelivered", kept, server=server)
    assert result.code == 3
    assert len(server.requests) == 3
    account(result, server, lines, kept_in(kept))


def test_success_is_silent(send, server):
    result = send(lines_of(500), server=server)
    assert (result.code, result.out, result.err) == (0, "", "")


def test_progress_is_shown_where_asked_for(send):
    with StandIn([Reply(200, delay=1.2), Reply(200, delay=1.2)]) as server:
        result = send(lines_of(1000), "--progress", server=server)
    assert result.code == 0
    assert re.search(r"\b[2-9]00\b", result.err), result
    assert "%" in result.err


@posix
@pytest.mark.parametrize("flag, shown", [((), True), (("--no-progress",), False)])
def test_progress_is_on_by_default_on_a_terminal_alone(flag, shown, start, tmp_path):
    master, slave = os.openpty()
    said = b""
    try:
        with StandIn([200, Reply(200, delay=1.2)]) as server:
            source = write(tmp_path / "in", lines_of(1000))
            handle = start("--file", source, "--ndjson", *flag, stderr=slave, server=server)
            os.close(slave)
            assert handle.result().code == 0
        while select.select([master], [], [], 0)[0]:
            try:
                said += os.read(master, 4096)
            except OSError:  # all of it was read, and nobody is left to write
                break
    finally:
        os.close(master)
    assert bool(re.search(rb"\b[2-9]00\b", said)) is shown
    assert shown or not said
    assert standin.KEY.encode() not in said


# ---- time ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", MODES)
def test_the_deadline_cuts_a_service_that_never_answers(mode, send, tmp_path):
    lines = lines_of(30)
    kept = tmp_path / "kept"
    with StandIn([200], default=standin.SILENT) as server:
        result = send(lines, *mode, "--batch-size", "10", "--deadline",
                     "1s", "--json", "--undelivered", kept, server=server)
    assert result.code == 3
    assert result.seconds < 3.5
    assert result.summary["delivered"] == 10
    account(result, server, lines, kept_in(kept))


@pytest.mark.parametrize("mode", MODES)
def test_the_deadline_cuts_a_pipe_that_stalls(mode, start, tmp_path):
    lines = lines_of(30)
    kept = tmp_path / "kept"
    with StandIn() as server:
        handle = start("--stdin", "--ndjson", *mode, "--deadline", "1s", "--flush-interval", "100ms",
                       "--json", "--undelivered", kept, stdin=subprocess.PIPE, server=server)
        handle.stdin.write(joined(lines))
        handle.stdin.flush()
        handle.popen.wait(20)
        result = handle.result()
    assert result.code == 3
    assert result.seconds < 3.5
    assert "deadline" in result.err
    account(result, server, lines, kept_in(kept))


def test_a_wait_past_the_deadline_is_not_begun(send):
    with StandIn(default=Reply(503, headers=[("Retry-After", "40")])) as server:
        result = send(lines_of(3), "--deadline", "20s", "--json",
                     server=server)
    assert result.code == 3
    assert len(server.requests) == 1
    assert result.seconds < 15
    assert "deadline" in result.err
    assert result.summary["undelivered"] == 3


# ---- async -----------------------------------------------------------------------------------------------

def test_a_queue_smaller_than_a_batch_loses_nothing_and_does_not_stall(pipe, server):
    lines = lines_of(1000)
    result = pipe(lines, "--async", "--queue-capacity", "10", "--batch-size", "100", "--json",
                 "--flush-interval", "1h", server=server)
    assert result.code == 0
    assert server.raw_records == lines


def test_a_full_queue_makes_the_reader_wait(pipe, server):
    lines = lines_of(20000)
    result = pipe(lines, "--async", "--queue-capacity", "50", "--batch-size", "200", "--json", server=server)
    assert result.code == 0
    assert server.raw_records == lines


def test_a_queue_full_of_bytes_does_not_wait_for_a_batch_to_fill(pipe, server):
    lines = lines_of(300, metadata={"padding": "x" * 60000})
    result = pipe(lines, "--async", "--batch-size", "1000", "--max-batch-bytes", "100000000",
                  "--flush-interval", "1h", server=server)
    assert result.code == 0
    assert server.raw_records == lines


def test_the_flush_interval_sends_what_there_is(start):
    lines = lines_of(3)
    with StandIn() as server:
        handle = start("--stdin", "--ndjson", "--async", "--flush-interval", "100ms", stdin=subprocess.PIPE,
                       server=server)
        handle.stdin.write(joined(lines))
        handle.stdin.flush()
        server.wait_for(lambda: len(server.records) == 3)  # the pipe is still open
        assert handle.result().code == 0
    assert server.raw_records == lines


def test_before_the_flush_interval_a_batch_is_filled(start):
    lines = lines_of(100)
    with StandIn() as server:
        handle = start("--stdin", "--ndjson", "--async", "--flush-interval", "1h", stdin=subprocess.PIPE,
                       server=server)
        for part in (lines[:3], lines[3:60], lines[60:]):
            handle.stdin.write(joined(part))
            handle.stdin.flush()
        server.wait_for_requests(1)
        assert handle.result().code == 0
    assert [len(request.events) for request in server.requests] == [100]


@pytest.mark.parametrize("bad, code", REFUSED)
@pytest.mark.parametrize("piped", [True, False], ids=["pipe", "file"])
def test_async_flushes_what_came_before_a_bad_record(bad, code, piped, run, server, tmp_path):
    lines = lines_of(400)
    lines[250:250] = [bad]
    kept = tmp_path / "kept"
    path = write(tmp_path / "in", lines)
    source = ["--stdin"] if piped else ["--file", path]
    result = run(*source, "--ndjson", "--async", "--json", "--undelivered", kept,
                 stdin=joined(lines) if piped else None, server=server)
    assert result.code == code
    assert ":251:" in result.err
    assert server.raw_records == lines[:250]
    assert result.summary["delivered"] == 250
    assert result.summary["invalid"] + result.summary["undelivered"] == len(kept_in(kept))


def test_no_flush_abandons_the_queue_and_says_how_much(send, server, tmp_path):
    lines = lines_of(150)
    kept = tmp_path / "kept"
    result = send(lines, "--async", "--no-flush", "--flush-interval", "1h",
                 "--json", "--undelivered", kept, server=server)
    assert result.code == 0
    assert result.summary["read"] == 150
    assert result.summary["undelivered"] >= 50
    account(result, server, lines, kept_in(kept))


@posix
def test_async_delivers_what_the_pipe_gave_before_it_was_closed_by_a_crash(start, server):
    lines = lines_of(30)
    handle = start("--stdin", "--ndjson", "--async", "--json", stdin=subprocess.PIPE, server=server)
    handle.stdin.write(joined(lines) + lines[0][:40])
    handle.stdin.close()
    result = handle.result()
    assert result.code == 4
    assert server.raw_records == lines


# ---- output ----------------------------------------------------------------------------------------------

@posix
def test_twenty_processes_append_whole_lines_to_one_output(start, tmp_path):
    output = tmp_path / "out.ndjson"
    expected = set()
    handles = []
    for process in range(20):
        lines = lines_of(1000, source__system="process %d" % process, extra={"padding": "x" * (process * 40)})
        expected |= set(lines)
        source = write(tmp_path / ("in%d" % process), lines)
        handles.append(start("--file", source, "--ndjson", "--output", output, "--json", key=False))
    for handle in handles:
        result = handle.result(60)
        assert result.code == 0
        assert result.summary["read"] == 1000
    data = output.read_bytes()
    assert data.endswith(b"\n")
    lines = data.splitlines()
    assert len(lines) == 20000
    assert set(lines) == expected


@linux
def test_output_to_a_full_disk_is_exit_4_and_nothing_counts_as_delivered(run, tmp_path):
    source = write(tmp_path / "in", lines_of(1000))
    result = run("--file", source, "--ndjson", "--output", "/dev/full", "--json", key=False)
    assert result.code == 4
    assert "/dev/full" in result.err
    assert "space" in result.err
    assert result.summary["delivered"] == 0
    result = run("--file", source, "--ndjson", "--output", "-", key=False, redirect=">/dev/full")
    assert result.code == 4
    assert "space" in result.err


@pytest.mark.parametrize("target", ["file", "-"])
def test_what_is_written_on_one_side_is_sent_on_the_other(target, send, run, server, tmp_path):
    lines = lines_of(250)
    output = tmp_path / "out"
    result = send(lines, "--output", output if target == "file" else "-",
                 key=False)
    assert result.code == 0
    if target == "-":
        output.write_bytes(result.out_bytes)
    assert output.read_bytes() == joined(lines)
    assert run("--file", output, "--ndjson", server=server).code == 0
    assert server.raw_records == lines


def test_output_completes_records_and_refuses_bad_ones(run, tmp_path):
    output = tmp_path / "out"
    argv = ["--stdin", "--ndjson", *FLAGS[2:-2], "--output", output]
    assert run(*argv, stdin=b'{"message":"a"}\n', key=False).code == 0
    written = json.loads(output.read_bytes())
    assert written["message"] == "a"
    assert written["source"] == {"system": "shop"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", written["timestamp"])
    assert run("--stdin", "--ndjson", "--output", output, stdin=INVALID + b"\n", key=False).code == 1
    assert len(output.read_bytes().splitlines()) == 1


# ---- the bytes of a record -------------------------------------------------------------------------------

FAITHFUL = (
    '{"message":"order","status":"ok","severity":"info","actor":{"id":"a","type":"t"},"workflow":{"id":"w"},'
    '"source":{"system":"s"},"timestamp":"2025-01-01T00:00:00.10+02:00","metadata":{"big":%s,"price":1.10,'
    '"tiny":-0.0,"power":1E5,"zero":1.0e-07}}' % ("123456789" * 3 + "123"),
    '{"timestamp":"2025-01-01T00:00:00Z", "source": {"system":"s"} ,"workflow":{"id":"w"},'
    '"actor":{"type":"t","id":"i"},\t"severity":"info","status":"ok",'
    '"message":"\\u00e9 \\/ \\ud83d\\ude00 \\n é 😀 \u2028 \u0085"}',
    '{"timestamp":"2025-01-01T00:00:00Z","source":{"system":"s"},"workflow":{"id":"w"},'
    '"actor":{"type":"t","id":"i"},"severity":"info","status":"ok","message":"twice",'
    '"metadata":{"a":1,"a":2,"nested":[[],{},[{"x":"]},{["}]]}}',
)
RECORDS = [record.encode("utf-8") for record in FAITHFUL]
SHAPES = {
    "ndjson": (joined(RECORDS), ["--ndjson"]),
    "crlf": (b"\r\n".join(RECORDS), ["--ndjson"]),
    "blank lines": (b"\n\n \n".join(RECORDS) + b"\n\n", ["--ndjson"]),
    "mark": (b"\xef\xbb\xbf" + joined(RECORDS), ["--ndjson"]),
    "one line": (b"[" + b",".join(RECORDS) + b"]", []),
    "a line each": (b"[\n" + b",\n".join(RECORDS) + b"\n]\n", []),
    "mixed": (b" [ " + RECORDS[0] + b" ,\r\n\t" + RECORDS[1] + b"," + RECORDS[2] + b"\n\n]\n ", []),
}


WAYS = ("file", "pipe", "async file", "async pipe", "gzip", "output", "undelivered")


@pytest.mark.parametrize("way, shape", [
    pytest.param(way, shape, marks=() if way == "file" or shape in ("ndjson", "mixed") else full)
    for way in WAYS for shape in SHAPES])
def test_the_bytes_of_a_complete_record_arrive_unchanged(way, shape, run, server, tmp_path):
    data, flags = SHAPES[shape]
    path = tmp_path / "in"
    path.write_bytes(data)
    written = tmp_path / "written"
    mode = {"async file": ["--async"], "async pipe": ["--async"], "gzip": ["--gzip"],
            "output": ["--output", written], "undelivered": ["--undelivered", written]}.get(way, [])
    source = ["--stdin"] if "pipe" in way else ["--file", path]
    with StandIn(default=400 if way == "undelivered" else 200) as service:
        result = run(*source, *flags, *mode, stdin=data if "pipe" in way else None, server=service)
    assert result.code == (2 if way == "undelivered" else 0)
    assert (kept_in(written) if mode[-1:] == [written] else service.raw_records) == RECORDS


@pytest.mark.parametrize("record", RECORDS, ids=["numbers", "escapes", "nested"])
@pytest.mark.parametrize("source", ["file", "stdin"])
def test_the_bytes_of_a_single_complete_event_arrive_unchanged(record, source, run, server, tmp_path):
    path = tmp_path / "event.json"
    path.write_bytes(record + b"\n")
    argv = ["--file", path] if source == "file" else ["--stdin"]
    assert run(*argv, stdin=path.read_bytes() if source == "stdin" else None, server=server).code == 0
    assert server.requests[0].body.strip() == record


def squeeze(data):
    """JSON text without the blanks outside its strings."""
    return re.sub(rb'("(?:[^"\\]|\\.)*")|[ \t\r\n]+', lambda found: found.group(1) or b"", data)


def spread(record):
    """The same record over many lines."""
    return re.sub(rb'("(?:[^"\\]|\\.)*")|([,{])',
                  lambda found: found.group(1) or found.group(2) + b"\n    ", record)


@pytest.mark.parametrize("way", ["sent", "async", "output", "undelivered", "kept at the door"])
def test_a_record_that_spans_lines_keeps_its_text_and_is_written_on_one_line(way, run, tmp_path):
    bad = [spread(INVALID)] if way == "kept at the door" else []
    data = b"[\n" + b",\n".join([spread(record) for record in RECORDS] + bad) + b"\n]\n"
    path = tmp_path / "in.json"
    path.write_bytes(data)
    written = tmp_path / "written"
    mode = {"async": ["--async"], "output": ["--output", written], "sent": []}.get(
        way, ["--undelivered", written])
    with StandIn(default=400 if way == "undelivered" else 200) as server:
        source = ["--stdin"] if bad else ["--file", path]
        result = run(*source, *mode, stdin=data if bad else None, server=server)
    assert result.code == {"undelivered": 2, "kept at the door": 1}.get(way, 0)
    got = kept_in(written) if mode[-1:] == [written] else server.raw_records
    assert [squeeze(one) for one in got if b'"invalid"' not in one] == RECORDS_SQUEEZED
    assert [squeeze(one) for one in got if b'"invalid"' in one] == [INVALID] * len(bad)


RECORDS_SQUEEZED = [squeeze(record) for record in RECORDS]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("between", [b",", b" , ", b",\n"])
def test_arrays_whose_records_cross_every_read_boundary(mode, between, run, server, tmp_path):
    dice = random.Random(7)
    lines = ndjson(event(message='"]},[{\\ %d' % number, metadata={"text": "é\\\"" * dice.randint(0, 9000)})
                   for number in range(70)).splitlines()
    path = tmp_path / "in.json"
    path.write_bytes(b"[" + between.join(lines) + b"]")
    assert run("--file", path, *mode, server=server).code == 0
    assert server.raw_records == lines


INCOMPLETE = [
    {"message": "no timestamp", "metadata": {"big": 10 ** 29 + 1, "nested": [1, None, {"é": "\u2028"}]}},
    {"message": "nulls", "timestamp": None, "source": None, "workflow": {"id": None},
     "actor": {"type": None}},
    {"message": "control \u0000 \u001b \" \\ \U0001f600", "source": {}},
    {"message": "partial", "actor": {"id": "own"}, "workflow": {"id": "own"}},
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped", "utf-8"])
def test_an_incomplete_record_is_completed_and_still_valid_json(mode, ascii_only, run, server):
    data = b"".join(json.dumps(one, ensure_ascii=ascii_only).encode("utf-8") + b"\n" for one in INCOMPLETE)
    flags = FLAGS[2:-2] + ["--workflow-name", "Shop"]
    result = run("--stdin", "--ndjson", *mode, *flags, stdin=data, server=server)
    assert result.code == 0, result
    assert [one["message"] for one in server.records] == [one["message"] for one in INCOMPLETE]
    assert server.records[0]["metadata"] == INCOMPLETE[0]["metadata"]
    for one in server.records:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", one["timestamp"])
        assert one["source"] == {"system": "shop"}
        assert one["actor"]["type"] == "agent"
    assert server.records[0]["workflow"] == {"id": "wf-1", "name": "Shop"}
    assert server.records[3]["workflow"] == {"id": "own"}, "a name belongs to an id"
    assert server.records[3]["actor"] == {"type": "agent", "id": "own"}


def test_a_complete_record_beside_incomplete_ones_keeps_its_bytes(run, server):
    data = joined([RECORDS[0], b'{"message":"x"}', RECORDS[1], b'{"message":"y"}', RECORDS[2]])
    assert run("--stdin", "--ndjson", *FLAGS[2:-2], stdin=data, server=server).code == 0
    assert server.raw_records[::2] == RECORDS
    assert [one["message"] for one in server.records[1::2]] == ["x", "y"]


# ---- a file that changes under way -----------------------------------------------------------------------

def cut(path, size):
    os.truncate(str(path), size // 2)


def rewrite(path, size):
    with open(path, "r+b") as file:
        file.seek(size - 200)
        part = file.read(20)
        file.seek(size - 200)
        file.write(part.replace(b"x", b"y"))


def extend(path, size):
    with open(path, "ab") as file:
        file.write(joined(lines_of(2)))


@pytest.mark.parametrize("change, code", [(cut, 4), (rewrite, 4), (extend, 0)])
def test_a_file_that_changes_while_it_is_sent_is_noticed(change, code, run, tmp_path):
    lines = lines_of(1000, metadata={"padding": "x" * 10000})
    path = write(tmp_path / "in", lines)
    size = path.stat().st_size
    kept = tmp_path / "kept"

    def answer(server, sock, request):
        change(path, size)
        request.status = server.acknowledge(request)
        sock.sendall(Reply(200).head() + b"{}")
        return "keep"

    with StandIn([answer]) as server:
        result = run("--file", path, "--ndjson", "--json", "--undelivered", kept, server=server)
    assert result.code == code
    assert result.summary["read"] == 1000
    assert server.raw_records == lines[:result.summary["delivered"]]
    if code:
        assert 0 < result.summary["delivered"] < 1000
        assert "chang" in result.err
    else:
        assert result.summary["delivered"] == 1000


# ---- memory ----------------------------------------------------------------------------------------------

MIB = 1 << 20


@pytest.fixture
def sink():
    """The bench's sink: it counts, and is fast."""
    process = bench.Sink()
    yield process
    process.close()


@pytest.fixture
def peak(argv_of, tmp_path, sink, home):
    """peak(argv, stdin=None): run under a small parent; return the bytes of memory it had at its peak."""
    script = tmp_path / "peak.py"
    script.write_text(bench.PEAK)
    report = tmp_path / "peak"

    def measure(*argv, stdin=None, url=None, popen=subprocess.call):
        whole = argv_of(*argv)
        environment = {"PATH": os.environ["PATH"], "HOME": home, "PACKTRACK_API_KEY": standin.KEY,
                       "PACKTRACK_BASE_URL": url or sink.url, "TMPDIR": str(tmp_path)}
        code = popen([whole[0], "-S", "-E", str(script), str(report), *whole], env=environment,
                     stdin=subprocess.DEVNULL if stdin is None else stdin)
        assert code == 0
        status, kilobytes = map(int, report.read_text().split())
        assert status == 0, argv
        return kilobytes * (1 if sys.platform == "darwin" else 1024)
    return measure


FLAT = {
    "file": ["--file", "{lines}", "--ndjson"],
    "pipe": ["--stdin", "--ndjson"],
    "async pipe": ["--stdin", "--ndjson", "--async"],
    "async file": ["--file", "{lines}", "--ndjson", "--async"],
    "array": ["--file", "{array}"],
    "array from a pipe": ["--stdin"],
    "output": ["--file", "{lines}", "--ndjson", "--output", "/dev/null"],
}


def measure_form(form, peak, tmp_path, records, *more):
    lines = tmp_path / "lines"
    array = tmp_path / "array"
    lines.write_bytes(joined(records))
    array.write_bytes(b"[" + b", ".join(records) + b"]")
    argv = [word.format(lines=lines, array=array) for word in FLAT[form]]
    try:
        if "--stdin" not in argv:
            return peak(*argv, *more)
        source = str(lines if "--ndjson" in argv else array)
        with subprocess.Popen(["cat", source], stdout=subprocess.PIPE) as feeder:
            return peak(*argv, *more, stdin=feeder.stdout)
    finally:
        lines.unlink()  # pytest would keep them, a few hundred MB, for three more runs
        array.unlink()


@posix
@pytest.mark.parametrize("form", [form if form in ("pipe", "array") else pytest.param(form, marks=full)
                                  for form in FLAT])
def test_memory_does_not_grow_with_the_number_of_records(form, peak, sink, tmp_path):
    records = bench.make_events(2000)
    few = measure_form(form, peak, tmp_path, records * 5)
    many = measure_form(form, peak, tmp_path, records * 30)
    assert many - few <= 8 * MIB
    assert many < 64 * MIB
    if form != "output":
        assert sink.counts()["records"] == 70000


@posix
@full
@pytest.mark.parametrize("form", FLAT)
def test_memory_stays_under_64_mib_with_records_of_64_kib(form, peak, sink, tmp_path):
    records = [ndjson([event(message="event %d" % number, metadata={"text": "x" * 65000})]).strip()
               for number in range(1100)]
    assert measure_form(form, peak, tmp_path, records) < 64 * MIB
    if form != "output":
        assert sink.counts()["records"] == 1100


@posix
@full
def test_memory_stays_flat_with_batches_of_one(peak, sink, tmp_path):
    records = bench.make_events(2000)
    few = measure_form("file", peak, tmp_path, records, "--batch-size", "1")
    many = measure_form("file", peak, tmp_path, records * 25, "--batch-size", "1")
    assert many - few <= 8 * MIB
    assert sink.counts()["requests"] == 52000


@posix
@full
def test_a_queue_of_large_records_is_bounded_in_bytes(peak):
    records = [ndjson([event(message="event %d" % number, metadata={"text": "x" * 60000})]).strip()
               for number in range(1150)]
    gate = threading.Event()

    def feed(argv, env, stdin):
        process = subprocess.Popen(argv, env=env, stdin=subprocess.PIPE)
        try:
            pipe = process.stdin.fileno()
            os.set_blocking(pipe, False)
            rest = memoryview(joined(records))
            # The service does not answer: the pipe stands still once the queue is full.
            while rest and select.select([], [pipe], [], 1.0 if not gate.is_set() else 30)[1]:
                rest = rest[os.write(pipe, rest[:65536]):]
            stalled = len(rest)
            gate.set()
            os.set_blocking(pipe, True)
            process.stdin.write(rest)
            process.stdin.close()
            assert stalled, "69 MB were taken in with nothing delivered"
            return process.wait(60)
        finally:
            gate.set()
            if process.poll() is None:
                process.kill()
            process.wait()

    with StandIn([Reply(200, delay=gate)]) as server:
        used = peak("--stdin", "--ndjson", "--async", "--timeout", "60s", url=server.url, popen=feed)
    assert used < 64 * MIB
    assert server.raw_records == records


@posix
def test_a_spool_leaves_nothing_behind(start, tmp_path):
    spools = tmp_path / "spools"
    spools.mkdir()
    lines = lines_of(1000, metadata={"padding": "x" * 10000})
    with StandIn([200, standin.SILENT]) as server:
        handle = start("--stdin", "--ndjson", stdin=joined(lines), env={"TMPDIR": str(spools)}, server=server)
        server.wait_for_requests(2)
        assert list(spools.iterdir()) == [], "the spool has a name"
        handle.popen.kill()
        handle.popen.wait(10)
    assert list(spools.iterdir()) == []


@posix
def test_where_a_spool_finds_no_room_the_way_out_is_named(pipe, run, server):
    import resource

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))

    lines = lines_of(1000, metadata={"padding": "x" * 10000})
    result = run("--stdin", "--ndjson", stdin=joined(lines), preexec_fn=small_files, server=server)
    assert result.code == 4
    assert "--async" in result.err
    assert server.requests == []
    assert pipe(lines, "--async", preexec_fn=small_files, server=server).code == 0
    assert server.raw_records == lines
