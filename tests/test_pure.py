"""The module imported: its pure functions, with their clock and their randomness given; and Client."""
import contextlib
import errno
import functools
import hashlib
import html
import inspect
import json
import math
import os
import queue
import re
import signal
import socket
import time
import types
from email.utils import formatdate
from urllib.parse import quote

import pytest

import packtrack_logger as pl
from conftest import KEY, MISSING, event
from standin import RefusedPort, Reply, StandIn

NOW = 1700000000.0


def test_option_table():
    flags = [flag for option in pl.OPTIONS for flag in option.flags]
    assert len(flags) == len(set(flags)) and len(pl.BY_NAME) == len(pl.OPTIONS) == 54
    for option in pl.OPTIONS:
        none = option.name in ("help", "version", "completion", "meta")
        assert option.variable == (None if none else "PACKTRACK_" + option.name.upper().replace("-", "_"))
        assert (option.metavar is None) is option.is_boolean
        assert option.short == {"help": "-h", "verbose": "-v", "version": "-V"}.get(option.name)
        assert option.path == (option.name in ("api-key-file", "file", "undelivered", "output"))
    assert re.findall(r"'\*(--\w+)\[", pl.COMPLETIONS["zsh"]()) == ["--meta"]  # repeatable
    assert re.findall(r"-l (\w+) -s (\w) ", pl.COMPLETIONS["fish"]()) == [
        ("verbose", "v"), ("version", "V"), ("help", "h")]


def test_json_of_usage_errors():
    for argv, env, as_json in (("--json=Yes", "", True), ("--json=0", "1", False), ("--no-json=no", "", True),
                               ("--no-json", "1", False), ("--json --no-json", "", False),
                               ("--json -- x", "1", False), ("-x", "on", True), ("-x", "", False)):
        assert pl.Reporter(argv.split(), {"PACKTRACK_JSON": env}).as_json is as_json, argv


def test_durations():
    for text, seconds in {
            "0": 0, "0s": 0, "1.5": 1.5, ".5": 0.5, "5.": 5, "9ms": 0.009, "1m30s": 90, "1.5h": 5400,
            "500us": 5e-4, "2h45m": 9900, "1ns": 1e-9, "1\u00b5s": 1e-6, "1\u03bcs": 1e-6, "007s": 7,
            "1h1m1s1ms": 3661.001, "8784h": 31622400}.items():
        assert pl.parse_duration(text) == pytest.approx(seconds, rel=1e-12)


def is_timestamp(text):
    try:
        return pl.parse_timestamp(text) == text
    except ValueError:
        return False


def test_timestamps():
    for year in (1, 4, 100, 400, 1900, 2000, 2023, 2024, 2100, 9999):
        for month in range(14):
            days = 0 if month in (0, 13) else 28 if month == 2 else 30 if month in (4, 6, 9, 11) else 31
            days += month == 2 and year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
            dates = ["%04d-%02d-%02dT00:00:00Z" % (year, month, day) for day in range(33)]
            taken = [day for day in range(33) if is_timestamp(dates[day])]
            assert taken == [*range(1, days + 1)], (year, month)
    good = "T23:59:60Z T00:00:00+23:59 T00:00:00-00:00 T00:00:00.1Z T00:00:00.123456789012+02:00"
    bad = ("T24:00:00Z T00:60:00Z T00:00:61Z T00:00:00+24:00 T00:00:00+25:00 T00:00:00+00:60 T00:00:00,5Z "
           "T00:00:00.Z T00:00Z T00:00:00+0100 T00:00:00z T00:00:00 t00:00:00Z T00:00:0\u0660Z")
    for end in [*good.split(" "), *bad.split(" "), "", " 00:00:00Z", "T00:00:00Z\n"]:
        assert is_timestamp("2025-01-01" + end) is (end in good.split(" ")), end
    for bad in ("0000-01-01T00:00:00Z", "0000-02-29T00:00:00Z", "x2025-01-01T00:00:00Z"):
        assert not is_timestamp(bad)
    assert [pl.utc_timestamp(seconds) for seconds in (0.0, 1.9999995, 1e9 + 0.25)] == [
        "1970-01-01T00:00:00.000000Z", "1970-01-01T00:00:01.999999Z", "2001-09-09T01:46:40.250000Z"]


def test_backoff():
    def delays(numbers, jitter=0.0, chance=0.5):
        return [pl.backoff_delay(number, 0.1, 2.0, jitter, lambda: chance) for number in numbers]

    assert delays(range(1, 8)) == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])
    assert delays([3, 100000], 0.2, 0.0) == pytest.approx([0.32, 1.6])
    assert delays([3, 100000], 0.2, 0.75) == pytest.approx([0.44, 2.2])
    assert pl.backoff_delay(100000, 0.0, 2.0, 0.0, lambda: 0.0) == 0.0
    assert pl.RETRYABLE == (429, *range(500, 600))


def test_retry_after():
    for value, seconds in {
            None: None, "0": 0, "1": 1, " 7\t": 7, "9999999999": 9999999999, "99999999999": None,
            formatdate(NOW + 30, usegmt=True): 30, formatdate(NOW - 30, usegmt=True): 0,
            "Tuesday, 14-Nov-23 22:14:20 GMT": 60, "Tue Nov 14 22:14:20 2023": 60,
            "Fri Dec  1 22:14:20 2023": 1468860}.items():
        assert pl.parse_retry_after(value, NOW) == seconds, value
    for value in ("", "-5", "+5", "nan", "inf", "1_0", "5,10", "1.5", "1e3", "0x10", "\u0661", "9" * 5000,
                  "2015-10-21T07:28:00Z", "Wed, 21 Oct 2015 07:28:00 CET", *("%s GMT" % day for day in (
                      "Fri, 31 Dec 99999 23:59:59", "Wed, 99 Oct 2099 07:28:00", "Wed, 21 Oct 2015 7:28:00",
                      "wed, 21 oct 2015 07:28:00", "Wed, 30 Feb 2015 07:28:00", "21 Oct 2015 07:28:00"))):
        assert pl.parse_retry_after(value, NOW) is None, value
    for value, date in {None: None, "5": None, "Tue, 14 Nov 2023 22:13:20 GMT": NOW}.items():
        assert pl.parse_retry_after(value) == date


ALL = {"timestamp": "2020-01-01T00:00:00Z", "source": {"system": "S", "env": "E"},
       "workflow": {"id": "W", "name": "N", "run_id": "R", "step_id": "P"},
       "actor": {"type": "T", "id": "A", "display_name": "D"},
       "severity": "debug", "status": "skipped", "message": "M"}
NAMES = {"source": {"env": "E"}, "workflow": {"name": "N"}, "actor": {"display_name": "D"}}
NULLS = {"source": None, "workflow": {"id": None}, "severity": None, "metadata": None, "timestamp": None}
AT = "2025-11-25T09:30:00Z"
COMPLETED = {  # what: defaults, the record, what becomes of it
    "nothing": (ALL, {}, ALL), "nulls": (ALL, NULLS, ALL), "the record wins": (ALL, event(), event()),
    "another workflow": (ALL, {"workflow": {"id": "x"}}, {**ALL, "workflow": {"id": "x"}}),
    "the same workflow": (ALL, {"workflow": {"id": "W"}}, ALL),
    "no id": (ALL, {"workflow": {"run_id": "x"}}, {**ALL, "workflow": {**ALL["workflow"], "run_id": "x"}}),
    "another system": (ALL, {"source": {"system": "x"}}, {**ALL, "source": {"system": "x"}}),
    "the same system": (ALL, {"source": {"system": "S"}}, ALL),
    "another actor": (ALL, {"actor": {"id": "x"}}, {**ALL, "actor": {"id": "x", "type": "T"}}),
    "the same": (ALL, {"actor": {"type": "x", "id": "A"}}, {**ALL, "actor": {**ALL["actor"], "type": "x"}}),
    "names without an id": (NAMES, event(), event()), "empty": ({}, event(metadata={}), event(metadata={})),
    "an empty string": (ALL, event(source__env=""), event(source__env="")),
    "a null name": (ALL, event(source__env=None), event()),
    "metadata": ({"metadata": {"a": 1, "b": {"x": 1}}, "extra": {"e": 1}}, event(metadata={"b": {"y": 2}}),
                 event(metadata={"a": 1, "b": {"y": 2}}, extra={"e": 1})),
    "a null in it": ({"metadata": {"a": 1}}, event(metadata={"a": None}), event(metadata={"a": None})),
    "no timestamp": ({}, event(timestamp=MISSING), event(timestamp=AT)),
}


def test_completion_of_records():
    for what, (defaults, record, wanted) in COMPLETED.items():
        before = json.dumps([defaults, record])
        completed = pl.complete_event(record, defaults, AT)
        assert completed == wanted and list(completed) == [name for name in pl.FIELDS if name in wanted], what
        assert json.dumps([defaults, record]) == before
        assert record == wanted or not pl.completeness_test(defaults)(record)
    is_complete, more = pl.completeness_test({}), {"metadata": {}, "extra": {}}
    for path in "source__env workflow__name workflow__run_id workflow__step_id actor__display_name".split():
        assert is_complete(event(**{path: "x"}, **more)) and is_complete(event(metadata={}, **{path: "x"}))
        assert not is_complete(event(**{path + "s": "x"}, **more)) and not is_complete(event(**{path: 1}))
    for name in ("metadata", "extra", "zzz"):
        assert is_complete(event(**{name: {}})) is (name != "zzz") and not is_complete(event(**{name: []}))
        assert not is_complete({**event(), "zzz": {}, "metadata": {}, name: 5})
    settings = pl.resolve("--workflow-id w --run-id r --meta a=1 --severity warn".split(), {})
    assert pl.event_defaults(settings) == {
        "workflow": {"id": "w", "run_id": "r"}, "metadata": {"a": "1"}, "severity": "warn"}


def test_dump_json():
    for value in ("\ud800", "\u2028\u00e9", "a\0b", 10**400, [1.5, None, True], {"\u00fc": "\U0001f680"}):
        assert json.loads(pl.dump_json(value).decode("utf-8")) == value and b" " not in pl.dump_json(value)
    for value in (math.nan, {"a": -math.inf}, object(), {"a": {1}}):
        with pytest.raises(pl.InvalidError, match="^cannot be written as JSON: "):
            pl.dump_json(value)


def test_ranges():
    for ranges, joined in (([], []), ([[5, 6], [1, 2]], [[1, 2], [5, 6]]), ([[3, 4], [1, 2]], [[1, 4]]),
                           ([[1, 9], [2, 3], [10, 10], [12, 12]], [[1, 10], [12, 12]])):
        assert pl.join_ranges(ranges) == joined
    assert len(pl.join_ranges([[number, number] for number in range(0, 999, 2)])) == 100
    odd = [[number, number] for number in range(1, 22, 2)]
    ten = "records 1, 3, 5, 7, 9, 11, 13, 15, 17, 19"
    for ranges, text in (([[3, 3]], "record 3"), ([[3, 4]], "records 3-4"),
                         ([[1, 1], [3, 4]], "records 1, 3-4"), (odd[:10], ten), (odd, ten + " and more")):
        assert pl.describe_ranges(ranges) == text


def test_batches():
    def cut(*runs, size=100, limit=10**6):
        return [list(numbers) for _, numbers in pl.cut_batches(iter(runs), size, limit)]

    one = b"x" * 9  # ten bytes with a comma; of the two brackets one stands for a comma
    assert cut((1, [one] * 5), size=2) == [[1, 2], [3, 4], [5]]
    assert cut((1, [one]), (2, [one]), (5, [one]), size=9) == [[1, 2, 5]]
    assert cut((1, [one]), None, None, (2, [one])) == [[1], [2]]
    assert cut() == cut(None) == []
    assert cut((1, [one] * 4), limit=21) == cut((1, [one] * 4), limit=30) == [[1, 2], [3, 4]]
    assert cut((1, [one] * 3), limit=20) == cut((1, [one, one * 9, one]), limit=31) == [[1], [2], [3]]
    assert cut((1, [one] * 3), limit=31) == [[1, 2, 3]]
    assert cut((1, [one] * 2500), size=10**6) == [[*range(1, 2501)]]
    assert pl.json_lines([b'{"a":\r\n1}', b"{}"]) == b'{"a":  1}\n{}\n'


def test_boundary():
    for text in (b'{"a":[1,{"b":"}]\\""}]}', b"{}", b'"\\\\"', b'{"\\u007b":"]"}', b'["{"]', b"-1e5]"):
        assert pl.Boundary().found(text + b"x")
        for step in (1, 2, 3, 5):
            boundary, cuts = pl.Boundary(), [*range(step, len(text), step), len(text)]
            assert [boundary.found(text[:end]) for end in cuts] == [end == len(text) for end in cuts], step


def test_json_errors():
    for text, column in (("{x", 2), ("\n{x", 2), ("{\n x", 2), ("[1]\n 2", 2), ("\n\n", 1), (" x", 2)):
        with pytest.raises(pl.InputError, match=" at column %d$" % column):
            pl.parse_json(text)


def test_connect(monkeypatch):
    with RefusedPort() as refused, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        places = [("127.0.0.1", refused.port), listener.getsockname()]
        addresses = [(family, socket.SOCK_STREAM, 6, "", place)
                     for family, place in zip((97, 2, 2), places[:1] + places)]
        with pl.connect(addresses, lambda: 1.0, time.monotonic) as sock:
            assert sock.getpeername() == places[1]
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        with pytest.raises(ConnectionRefusedError):
            pl.connect(addresses[:2], lambda: 1.0, time.monotonic)
    monkeypatch.setattr(socket, "getaddrinfo", raising(socket.gaierror("odd")))
    with pytest.raises(pl.AttemptFailed, match="^x: odd$"):
        pl.resolve_host("h", 80, lambda: 1.0, "x: ")


def raising(error):
    def fail(*_):
        raise error
    return fail


def delivery_of(*arguments, **named):
    return pl.Delivery(pl.Limits(), pl.Reporter([], {}), *arguments, **named)


@pytest.mark.parametrize("error, code, said", [
    (KeyError(), 2, "internal error: KeyError at line "), (MemoryError(), 3, "out of memory"),
    (ImportError(name="zlib"), 2, "this Python has no module zlib: ")])
def test_any_error(error, code, said, monkeypatch):
    """Wherever it comes up, it is noted and ends the run."""
    sends, reads = delivery_of(), delivery_of()
    sends.send = raising(error)
    pl.send_batches(iter([1]), sends)
    assert list(pl.read_ahead(map(raising(error), [1]), reads, pl.Limits(), 9, 1, True)) == []
    monkeypatch.setattr(pl, "deliver_input", raising(error))
    runs = pl.run(pl.resolve(["--stdin", "--dry-run"], {}), pl.Limits(), pl.Reporter([], {}))
    for one in (sends, reads, runs):
        assert list(one.errors) == [code] and one.ended is one.errors[code] and one.ended.ends_run
        assert str(one.ended).startswith(said)


def test_no_threads(monkeypatch):
    """Where none can be started, the thread that is there does the work, or an error says so."""
    assert pl.start_thread(raising(MemoryError())).acquire(True, 20)
    monkeypatch.setattr(pl, "LONGEST_START", 0.01)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(pl._thread, "start_new_thread", lambda *_: None)
        pl.start_thread(print)
    monkeypatch.setattr(pl, "start_thread", raising(RuntimeError()))
    delivery, sent = delivery_of(["one", "two"]), []
    delivery.send = lambda *one: sent.append(one)
    pl.send_batches(iter([1, 2]), delivery)
    assert sent == [(1, "one"), (2, "one")]
    assert list(pl.read_ahead(iter([]), delivery, pl.Limits(), 9, 1, True)) == []
    assert str(delivery.errors[4]) == "cannot start a thread: out of memory or processes"
    assert pl.resolve_host("localhost", 80, lambda: 1.0, "")[0][4][1] == 80


def test_flush_interval(monkeypatch):
    """The wait for more ends when what is there is to be sent."""
    waits, get = [], queue.Queue.get
    monkeypatch.setattr(queue.Queue, "get", lambda ahead, timeout: waits.append(timeout) or get(ahead))
    runs = pl.read_ahead(iter([(1, [b"x"])]), delivery_of(), Clock().limits(), 9, 0.03125, True)
    assert [*runs] == [(1, [b"x"])] and waits == pytest.approx([0.1, 0.03125])


def test_account_at_the_end():
    """What was read and got lost for want of memory, and what comes after a signal, is undelivered."""
    for keeps, invalid, unkept, ranges in ((True, 1, 6, []), (True, 0, 7, [[3, 9]]), (False, 0, 0, [[3, 9]])):
        delivery = delivery_of(undelivered_file=object())
        delivery.read, delivery.delivered, delivery.invalid, delivery.keeps_rest = 9, 2, invalid, keeps
        delivery.finish()
        assert (delivery.undelivered, delivery.unkept, delivery.ranges) == (7 - invalid, unkept, ranges)
        assert delivery.unkept_why == "out of memory" * keeps
    limits, written = pl.Limits(), []
    delivery = pl.Delivery(limits, pl.Reporter([], {}), output=types.SimpleNamespace(append=written.append))
    delivery.send(([b"{}"], [1]))
    limits.handle_signal(15)
    delivery.send(([b"[]"], [2]))
    limits.patience = 2  # one ends the reading
    with pytest.raises(pl.Interrupted):
        next(pl.Source(__file__, limits).chunks())
    assert (written, delivery.delivered, delivery.undelivered) == ([b"{}\n"], 1, 1)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="needs /dev/fd and fork")
def test_odd_systems(monkeypatch):
    """Another process was faster; a file system has no locks; there is no room for a process, and no cat."""
    resource = pytest.importorskip("resource")
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    steps = iter([lambda: None, lambda: os.write(writer, b"x" * 10**6), lambda: None,
                  lambda: os.read(reader, 10**6)])
    monkeypatch.setattr(pl, "wait_until_ready", lambda *_, **__: next(steps)())
    chunks = pl.Source("/dev/fd/%d" % reader, pl.Limits()).chunks()
    assert set(next(chunks)) == set(b"x")
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x")
    pl.write_all(writer, b"abc", pl.Limits())
    assert os.read(reader, 9) == b"abc"
    fcntl = pytest.importorskip("fcntl")
    for error, locked in ((OSError(errno.ENOLCK, ""), True), (BlockingIOError(), False)):
        monkeypatch.setattr(fcntl, "flock", raising(error))
        assert pl.lock_file(reader) is locked
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        for path, saving, error in (("new", True, pl.InvalidError), (__file__, False, pl.InputError)):
            with pytest.raises(error, match="cannot write .*: permission denied$"):
                pl.Appender(path, "--output", pl.Limits(), None, saving)
        told, limit = os.pipe(), resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (limit[1], limit[1]))
        patch.setattr(os, "execve", lambda *_: os.write(told[1], b"x") and raising(OSError())())
        os.set_blocking(reader, True)
        for number in (signal.SIGTERM, signal.SIGQUIT):
            canary = pl.start_canary((reader, writer))
            os.read(told[0], 1)
            os.kill(canary, number)
            assert os.waitpid(canary, 0)[1] == number  # and no core
        resource.setrlimit(resource.RLIMIT_CORE, limit)
        canary, orphan = pl.start_canary((reader, writer)), pl.start_canary((reader, writer))
        pl.end_canary(canary)
        pl.end_canary(None)
        with pytest.raises(ProcessLookupError):
            os.kill(canary, 0)
        os.close(writer)
        assert os.waitpid(orphan, 0)[1] == 0
        patch.setattr(os, "fork", raising(OSError()))
        assert pl.start_canary((reader, writer)) is None


def test_lock_that_is_waited_for(monkeypatch, tmp_path):
    flock = pytest.importorskip("fcntl").flock
    taken, clock = iter([raising(BlockingIOError()), flock]), Clock()
    monkeypatch.setattr("fcntl.flock", lambda *what: next(taken)(*what))
    pl.Appender(str(tmp_path / "out"), "--output", clock.limits(), None, False).append(b"x\n")
    assert clock.sleeps == pytest.approx([0.005]) and (tmp_path / "out").read_bytes() == b"x\n"


@pytest.mark.skipif(os.name != "posix", reason="as on POSIX")
def test_command_runner(monkeypatch):
    """What is passed on to a command, when; KILL comes 5 s after TERM; what is told of its end."""
    now, slept, kills, came = [100.0], [], [], []
    waits = iter([*[(0, 0)] * 4, (7, 9), (8, 15), *[(0, 0)] * 3, (7, 0), (9, 9)])

    def sleep(_, seconds):
        slept.append(seconds)
        now[0] += came[0][0] if came else seconds
        return types.SimpleNamespace(si_signo=came.pop(0)[1]) if came else None

    monkeypatch.setattr(pl.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "waitpid", lambda *_: next(waits))
    monkeypatch.setattr(os, "kill", lambda *pair: kills.append(pair))
    monkeypatch.setattr(pl.signal, "sigtimedwait", sleep, raising=False)
    assert pl.wait_for(7, 0.5, set(), None, None, [(103.0, 10)]) == (-9, True)
    assert slept[:3] == [0.5, 2.5, 2.5] and kills == [(7, 15), (7, 18), (7, 10), (7, 9), (7, 18)]
    # A canary, 8, dies of what the whole group gets: our copy is not passed on, what comes later is.
    came += [(0.015625, 15), (0.0625, 10)]
    monkeypatch.setattr(os, "getpgid", lambda _: os.getpgrp())
    monkeypatch.setattr(pl, "start_canary", lambda _: 9)
    del kills[:], slept[:]
    assert pl.wait_for(7, None, {10, 15}, 8, None, []) == (0, False) and kills == [(7, 10), (9, 9)]
    assert slept == pytest.approx([0.0, pl.FOREVER, 0.2, pl.FOREVER])

    def runs(_, __, hurry):
        now[0] += 2.5
        return 3, hurry and hurry(15, None)  # a signal, as the report begins

    monkeypatch.setattr(pl, "run_on_posix", runs)
    code, number, failure, told = pl.run_command(pl.resolve(["--", "/x/job"], {}), None)
    assert (code, number, failure) == (3, 0, None) and told["message"] == "job exited with 3 after 2.5s"
    assert (told["metadata"]["duration_ms"], told["metadata"]["exit_code"]) == (2500, 3)
    assert (pl.COMMAND_DELIVERY, pl.HURRIED_DELIVERY, pl.LONGEST_SAVING) == (30, 5, 30)
    handlers = []  # from the report on nothing comes in between
    monkeypatch.setattr(pl, "handle_signals", lambda *what: handlers.append(what))
    monkeypatch.setattr(pl, "deliver_result", lambda _, __, limits, ___: handlers.append(
        4 < limits.deadline - limits.clock() <= 5))
    monkeypatch.setattr(pl, "event_from_flags", lambda *_: b"{}")
    monkeypatch.setattr(pl, "read_key", lambda _, limits, __: now.append(limits.deadline - limits.clock()))
    assert pl.report_command(pl.resolve(["--api-key", KEY, "--", "job"], {}), pl.Reporter([], {})) == 3
    assert handlers == [True, (pl.signal.SIG_IGN, pl.PASSED_ON)] and 0 < now[1] <= 1


@pytest.fixture
def at(monkeypatch):
    """at(seconds): the monotonic clock's time from then on."""
    return lambda seconds: monkeypatch.setattr(pl.time, "monotonic", lambda: seconds)


def test_progress(at, monkeypatch):
    """Nothing in the first second; then at most five times a second on a terminal, else once."""
    for terminal, pause in ((True, 0.25), (False, 1.0)):
        at(100.0)
        monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((30, 9)))
        delivery, lines = delivery_of(), []
        reporter = delivery.reporter
        reporter._progress, reporter._terminal, delivery.read = True, terminal, 1
        reporter._write = functools.partial(lambda lines, _, text: lines.append(text), lines)
        for seconds in (100.875, 101.0, 101.0 + pause * 0.5, 101.0 + pause):
            at(seconds)
            reporter.progress(delivery)
            delivery.read += 1
        delivery.delivered, delivery.total, delivery.undelivered = 12, 60, 3
        at(104.0)
        reporter.progress(delivery)
        told = ["2 records read", "4 records read", "5 records read, 12 delivered, 3/s, 25 %"]
        if terminal:
            assert lines == [told[0], *("\r\x1b[K" + line[:29] for line in told[1:])]
            monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((0, 0)))  # not known
            reporter.log("x" * 99, "{1}")
            assert lines.pop() == "\r\x1b[K" + "x" * 79
            monkeypatch.setattr(os, "get_terminal_size", raising(OSError()))  # it has gone
            at(200.0)
            reporter.progress(delivery)
        else:
            assert lines == ["packtrack-logger: %s\n" % line for line in told]
        reporter._progress = False
        at(300.0)
        reporter.progress(delivery)
        assert len(lines) == 3


def test_progress_of_reading():
    reader = types.SimpleNamespace(records=lambda: iter([[b"1", b"2"], [b"3"]]), single=False)
    delivery, shown = delivery_of(), []
    delivery.reporter.progress = lambda delivery: shown.append(delivery.read)
    assert list(pl.accept_valid(reader, delivery)) == [(1, [b"1", b"2"]), (3, [b"3"])] and shown == [2, 3]
    delivery.output = types.SimpleNamespace(append=lambda data: None)
    delivery.send(([b"{}"], [1]))
    assert shown == [2, 3, 3]


class Clock:
    def __init__(self):
        self.now, self.sleeps = 128.0, []

    def pause(self, seconds):
        assert seconds >= 0  # time.sleep() takes no other
        self.sleeps.append(seconds)
        self.now += seconds

    def limits(self, *arguments, **named):
        return pl.Limits(*arguments, clock=lambda: self.now, pause=self.pause, **named)


def ends(call, *arguments, **named):
    """The kind of the end that a call of Limits comes to, or what it returns."""
    try:
        return call(*arguments, **named)
    except pl.Interrupted:
        return "interrupted"
    except pl.RetriesExhaustedError as error:
        assert (str(error), error.exit_code, error.ends_run) == ("deadline exceeded", 3, True)
        return error.kind


def test_limits():
    clock = Clock()
    limits, forever = clock.limits(1.0), clock.limits()
    assert (limits.deadline, limits.left(), limits.left(5)) == (129.0, 0.1, 1.0)
    assert ends(limits.sleep, 0.25) is None and clock.sleeps == pytest.approx([0.1, 0.1, 0.05])
    busy = pl.Limits(clock=iter(range(9)).__next__, pause=clock.pause)
    assert ends(busy.sleep, 1.5) is None  # the machine was elsewhere between two looks at the clock
    assert ends(limits.sleep, 9) == "deadline" and clock.now == pytest.approx(129.0)
    assert ends(limits.check) == ends(limits.left, 1) == "deadline"
    assert (forever.deadline, forever.left(1e9), ends(forever.check)) == (None, 1e9, None)
    for patience in (1, 2):
        limits, clock.now = clock.limits(patience=patience), 128.0
        limits.handle_signal(15)
        assert ends(limits.check, reading=True) == ends(limits.left, reading=True) == "interrupted"
        assert ends(limits.check) == (None if patience == 2 else "interrupted")
        for more, signals in ((0.1875, [15]), (0.21875, [15, 1])):  # as timeout(1) sends two
            clock.now = 128 + more
            limits.handle_signal(1)
            assert limits.signals == signals
        assert ends(limits.sleep, 1) == "interrupted"
    forever.over = True
    assert ends(forever.check) is None and ends(forever.check, reading=True) == "interrupted"
    for seconds, left in ((None, 30.0), (100, 30.0), (5, 5.0), (0.1, 0.5)):
        limits = clock.limits(seconds)
        saving = limits.saving(30.0)
        limits.handle_signal(15)
        assert saving.deadline - clock.now == pytest.approx(left) and ends(saving.check) is None
        clock.now += 0.3
        limits.handle_signal(15)
        assert ends(saving.check) == "interrupted"


def test_secrets():
    secret = 'a"b\\c/d+e<f>&g'
    for form in (secret, json.dumps(secret)[1:-1], html.escape(secret, 0), quote(secret), quote(secret, "")):
        assert pl.redact("x %s y %s" % (form, form), [secret]) == "x *** y ***"
        assert pl.holds_secret("x %s y" % form, [secret])
    for end in ('"', ": x", ""):
        assert [pl.redact(KEY[:length] + end, [KEY]) for length in (5, 6)] == [KEY[:5] + end, "***" + end]
    assert pl.redact(KEY[:6] + "x " + KEY[:-1], [KEY]) == KEY[:6] + "x ***"
    for text in (KEY[:6], KEY[9:17], KEY[:3] + "\u200b" + KEY[3:6], KEY[-8:]):
        assert pl.holds_secret("x%sx" % text, ["12345", KEY]), text
    for text in (KEY[:5], KEY[9:16], KEY[-7:], "12345"):
        assert not pl.holds_secret("x%sx" % text, ["12345", KEY]), text
    assert pl.printable("a\x1b[31m\r\n\tb\u202ec\x00" + "x" * 1000) == "a [31m b c " + "x" * 189


def test_nearest():
    for word, name in {"pass": "ok", "done": "ok", "OK": "ok", "error": "failed", "retry": "retrying",
                       "running": "unknown", "skip": "skipped"}.items():
        assert pl.nearest(word, pl.STATUSES) == ' (did you mean "%s"?)' % name
    for word, name in {"trace": "debug", "notice": "info", "warning": "warn", "fatal": "error"}.items():
        assert pl.nearest(word, pl.SEVERITIES, "{}") == name
    assert pl.nearest("x", pl.STATUSES) == ""


def test_client(server):
    settings, parameters = pl.resolve([], {}), inspect.signature(pl.Client).parameters
    for name in "base_url timeout retries backoff_initial backoff_max jitter user_agent health_path".split():
        assert parameters[name].default == settings[name.replace("_", "-")], name
    assert not parameters["gzip"].default
    client = pl.Client(KEY, base_url=server.url)
    client.ingest_event(event(timestamp=MISSING, metadata={}))
    client.ingest_batch([event(metadata={}), event()], idempotency_key="auto")
    client.health_check()
    for wrong, why in (({}, "missing required source.system"), ([], "not a JSON object"), (
            {5: 1}, 'unknown field "5"'), (event(source={"system": "s", 5: 1}), 'unknown field "source.5"')):
        with pytest.raises(pl.PackTrackError, match="^" + why):
            client.ingest_batch([event(), wrong])
    client.close()
    assert [len(request.events) for request in server.requests] == [1, 2, 0]
    assert server.records[1:] == [event(metadata={}), event()] and server.records[0]["metadata"] == {}
    body = server.requests[1].body
    assert server.requests[1].headers["idempotency-key"] == hashlib.sha256(body).hexdigest()
    assert (server.connections, client.requests, client.retries) == (1, 3, 0)
    assert client.bytes_sent == sum(len(request.raw_body) for request in server.requests)
    assert is_timestamp(server.records[0]["timestamp"]) and KEY not in repr(client)
    for options in ({"base_url": "ftp://h"}, {"user_agent": "a\nb"}, {"api_key": ""}, {"health_path": "a b"}):
        with pytest.raises(pl.InvalidError, match="^%s: " % list(options)[0]):
            pl.Client(**{"api_key": KEY, **options})


def test_client_fails(monkeypatch, server):
    for status, kind, code, sent in ((400, pl.RefusedError, 2, 1), (503, pl.RetriesExhaustedError, 3, 3)):
        with StandIn(default=status) as refuses, pytest.raises(kind) as caught:
            client = pl.Client(KEY, base_url=refuses.url, retries=2, limits=Clock().limits())
            with contextlib.closing(client):
                client.ingest_event(event())
        assert (caught.value.status, caught.value.exit_code, len(refuses.requests), client.retries) == (
            status, code, sent, sent - 1)
    with RefusedPort() as port, pytest.raises(pl.RetriesExhaustedError, match="connection refused"):
        pl.Client(KEY, base_url=port.url).health_check()
    monkeypatch.setattr("http.client.HTTPResponse.read", raising(MemoryError()))
    pl.Client(KEY, base_url=server.url).ingest_event(event())  # the status says what came of it
    assert len(server.records) == 1


def test_client_waits():
    clock, lines = Clock(), []
    with StandIn([503, Reply(429, headers={"Retry-After": "7"}), 503, 200]) as server:
        client = pl.Client(KEY, base_url=server.url, backoff_initial=0.5, backoff_max=10.0, jitter=0.5,
                           limits=clock.limits(), random=lambda: 0.75, trace=lines.append)
        client.ingest_event(event())
        client.close()
    assert clock.now - 128 == pytest.approx(0.625 + 7.0 + 2.5)
    assert lines[1::2] == ["retrying in 625 ms", "retrying in 7000 ms", "retrying in 2500 ms"]
