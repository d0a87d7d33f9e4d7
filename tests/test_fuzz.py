"""Random input, servers, flags and signals; a small model of the design says what may come of them.

    FUZZ_SEEDS=4000         how many seeds `make test-full` goes through, the few of `make test` included
    FUZZ_SEEDS=1234-1234    only these, in `make test`: what a failure names

Runs are forked from a process that has imported the module, six times as fast; every EVERY-th is the program
itself. A seed makes the same each time, save how the two sides are scheduled.
"""
import collections
import concurrent.futures
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import traceback

import pytest

from conftest import FLAGS_OF_PYTHON, PYTHON, ROOT, Result, check_result, clean_environment, event
from standin import StandIn, cut_records
from steps import FAULTS, Reply, refuse_larger

FIRST, _, LAST = os.environ.get("FUZZ_SEEDS", "4000").rpartition("-")
QUICK = range(int(FIRST), int(LAST) + 1) if FIRST else range(300)
FULL = range(300, 0 if FIRST else int(LAST))
AT_ONCE, EVERY = 4, 25
BOUND = 30  # seconds; a run has reason to take three

# Reads [argv, environment, folder, standard input] a line; answers the process id, and how it ended.
SERVE = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import gzip, hashlib, http.client, queue, random, tempfile, threading, urllib.request, packtrack_logger
for line in iter(sys.stdin.readline, ""):
    argv, environment, folder, source = json.loads(line)
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)
        continue
    answer = os.dup(1)
    os.chdir(folder)
    for number, path in enumerate((source, "out", "err")):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.write(answer, b"%d\\n" % os.getpid())
    os.close(answer)
    os._exit(packtrack_logger.main(argv))
"""


class Slot:
    """Runs one seed at a time: a stand-in, and the process that forks."""
    def __init__(self):
        self.server = StandIn().start()
        self.parent = subprocess.Popen([PYTHON, *FLAGS_OF_PYTHON, "-c", SERVE, str(ROOT)],
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)

    def begin(self, argv, environment, folder, source, program):
        """Start; return the process id and the function that waits for its code (negative: a signal)."""
        if program:
            with open(source) as stdin, open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
                process = subprocess.Popen([*program, *argv], stdin=stdin, stdout=out, stderr=err,
                                           cwd=str(folder), env=environment)
            return process.pid, process.wait
        print(json.dumps([argv, environment, str(folder), str(source)]), file=self.parent.stdin, flush=True)
        return int(self.parent.stdout.readline()), lambda: int(self.parent.stdout.readline())


@pytest.fixture(scope="module")
def slots():
    made = [Slot() for _ in range(AT_ONCE)]
    yield made
    for slot in made:
        slot.server.close()
        slot.parent.communicate()


CLOSES, GIVE_UP = Reply(200, close="silently"), Reply(529, headers=[("Retry-After", "99")])
GOOD = [200, 200, 201, 204, Reply(200, delay=0.02), CLOSES, FAULTS["BROKEN_BODY"], FAULTS["GARBAGE_BODY"]]
SHAKY = [429, 500, 503, Reply(503, headers=[("Retry-After", "0")]), *map(FAULTS.get, (
    "RESET_AFTER", "CLOSE", "HALF_HEADERS", "RECORD_THEN_RESET", "RECORD_THEN_CLOSE", "BANNER"))]
UNSEEN = [FAULTS["RESET_BEFORE"], FAULTS["CLOSE_BEFORE"]]  # no request tells of them
HARSH = [400, 409, 422, 301, 401, 404, 413, 413, 413, GIVE_UP, *UNSEEN * 2]
SLOW = [FAULTS["SILENT"], FAULTS["STALLED_BODY"], FAULTS["DRIP_HEADERS"]]
TEXTS = ["done", "Gr\u00fc\u00dfe \u2028 \U0001f4e6", "\\ \" \u0000 [{,", "x" * 400, "y" * 3000]


class Plan:
    """A run. items: [(mark, bytes, kind)]; kind: 0, valid as it is, 0.5, when completed, 1 or 4, refused with
    that exit code, 9: with 4, and nobody can tell where the next one begins."""

    def __init__(self, seed):
        self.chance = random.Random(seed)
        pick = self.pick = self.chance.choice
        self.form = pick(["ndjson"] * 4 + ["array"] * 3 + ["object"])
        (self.pipe, self.filled, self.streams, self.keep_going, self.keeps, self.no_flush, self.allow_empty,
         self.verbose, self.slow) = [self.chance.random() < share for share in (
             0.5, 0.5, 0.4, 0.4, 0.7, 0.2, 0.2, 0.1, 0.06)]
        self.retries, self.batch, self.bytes = pick((0, 1, 2)), pick((1, 2, 3, 7, 100)), pick((10 ** 6, 700))
        self.connections, self.deadline = pick((1, 1, 8)), pick((None,) * 5 + ("150ms", "1s"))
        self.no_flush = self.no_flush and self.streams
        self.signals = [(getattr(signal, pick(("SIGINT", "SIGTERM", "SIGHUP"))), self.chance.random() ** 4)
                        for _ in range(pick((0, 0, 0, 1, 2)) if seed % EVERY else 0)]
        self.hold = self.pipe and (self.signals or self.deadline) and pick((True, False))
        self.calm = not (self.signals or self.deadline or self.slow)
        share, bad = pick((0, 0.2, 0.6)), SHAKY * 2 + HARSH * pick((0, 1))
        self.script = [pick(SLOW)] * self.slow + [
            pick(bad if self.chance.random() < share else GOOD) for _ in range(pick((0, 4, 12)))]
        self.default = pick([200] * 6 + [503, 400, 413, refuse_larger(pick((1, 3))), FAULTS["RESET_AFTER"]])
        self.blind = any(step in UNSEEN for step in self.script)
        self.items = []
        self.data = self.make_input(pick((0, 0, 0.03, 0.15)), pick((0, 0.2)))
        self.argv = ["--json", *(["--stdin"] if self.pipe else ["--file", "input"])]
        for flag, value in {
                "ndjson": self.form == "ndjson", "async": self.streams, "gzip": pick((0, 0, 1)),
                "keep-going": self.keep_going, "no-flush": self.no_flush, "allow-empty": self.allow_empty,
                "verbose": self.verbose, "batch-size": str(self.batch), "max-batch-bytes": str(self.bytes),
                "connections": str(self.connections), "retries": str(self.retries),
                "timeout": "500ms" if self.slow else "20s", "backoff-initial": "1ms", "backoff-max": "2ms",
                "deadline": self.deadline, "undelivered": self.keeps and "left",
                "source-system": self.filled and "cron", "flush-interval": pick(("1ms", "30ms", "10s")),
                "queue-capacity": pick("13") + "00" * pick((0, 1)),
                "idempotency-key": pick((None, "key", "auto"))}.items():
            self.argv += ["--" + flag] * bool(value) + [value] * isinstance(value, str)

    def make_input(self, wrong, lacking):
        pick, lines = self.pick, self.form == "ndjson"
        for number in range(1 if self.form == "object" else pick((0, 1, 2, 3, 10, 10, 30, 60))):
            self.items.append(self.make_item("#%d#" % number, wrong, lacking))
        raws = [raw for _, raw, _ in self.items]
        if lines:
            end, blank = pick((b"\n", b"\r\n")), pick((b"", b"", b"\n", b" \r\n\n"))
            return pick((b"", b"\xef\xbb\xbf")) + (end + blank).join(raws) + pick((b"", end))
        torn = wrong and pick((True, False))
        if torn:
            self.items.append(("#1#", b'{"m": "#1#"}', 9) if self.form == "object" else (None, b"", 9))
        if self.form == "object":
            return raws[0] + pick((b"", b"\n")) + self.items[-1][1] * bool(torn)
        return b"[" + pick((b", ", b"\n,\n")).join(raws) + (b"" if torn else b"]\n")

    def make_item(self, mark, wrong, lacking):
        pick, drawn = self.pick, self.chance.random()
        record = event(message=mark + " " + pick(TEXTS))
        record.update(pick(({}, {}, {"metadata": {"n": 10 ** 30, "l": [1, {}]}}, {"extra": {"s": "]}"}})))
        kind = 0.5 if drawn > 1 - lacking else 0
        if kind:
            del record[pick(("timestamp", "source")) if self.filled else "timestamp"]
        flaw = drawn < wrong and pick(("severity", "unknown", "source", "utf-8", "text", "torn", "nan"))
        if flaw in ("severity", "unknown", "source"):
            record[flaw], kind = "wrong", 1
        raw = json.dumps(record, indent=None if self.form == "ndjson" else pick((None, 1)),
                         ensure_ascii=pick((True, False))).encode()
        if not flaw or kind:
            return mark, raw, kind
        sign = mark.encode()
        raw = {"utf-8": raw.replace(sign, sign + b"\xff"), "text": b'"%s"' % sign, "torn": raw[:-1].rstrip(),
               "nan": raw[:-1] + b', "metadata": {"n": NaN}}'}[flaw]
        return mark, raw, (
            4 if self.form == "ndjson" or flaw == "utf-8" or flaw == "text" and self.form == "array" else 9)

    def write(self, feed, over):
        at = 0
        with contextlib.closing(feed), contextlib.suppress(BrokenPipeError):
            while at < len(self.data):
                at += feed.write(self.data[at:at + self.pick((1, 50, 1000, 5000, 70000))])
                over.wait(0.01 * self.chance.random() * self.pick((0, 0, 0, 0, 1)))
            over.wait(BOUND if self.hold else 0)


def play(seed, slot, folder, home, program):
    plan, server, source = Plan(seed), slot.server, os.devnull
    server.renew(script=plan.script, default=plan.default)
    over, codes, threads = threading.Event(), [], []
    if plan.pipe:
        source = folder / "pipe"
        os.mkfifo(str(source))
        both, feed = os.open(str(source), os.O_RDWR), open(str(source), "wb", buffering=0)
        threads.append(threading.Thread(target=plan.write, args=(feed, over)))
    else:
        (folder / "input").write_bytes(plan.data)
    pid, wait = slot.begin(plan.argv, clean_environment(home, {}, True, server), folder, source, program)
    if plan.pipe:
        os.close(both)
    threads.append(threading.Thread(target=lambda: (codes.append(wait()), over.set())))
    for thread in threads:
        thread.start()
    for number, seconds in [*plan.signals, (signal.SIGKILL, BOUND)]:
        with contextlib.suppress(ProcessLookupError):
            over.wait(seconds) or os.kill(pid, number)
    for thread in threads:
        thread.join()
    requests, checks = server.requests, server.checks
    server.renew()
    (folder / "left").touch()
    out, err, left = [(folder / name).read_bytes() for name in ("out", "err", "left")]
    result = Result(plan.argv, codes[0], out, err, 0)
    assert result.code != -signal.SIGKILL and not checks, "did not end, or: %s: %r" % (checks, result)
    if result.code >= 0 or out or requests:  # else a signal came before there was a handler
        check_result(result, plan.argv, None, (), True)
        judge(plan, result, requests, left)


def verdict(status):
    """What a status in the stand-in's list means: delivered, again, given up, split or final."""
    if isinstance(status, str):
        return "delivered" if FAULTS[status].records and "THEN" not in status else "again"
    return ("delivered" if 200 <= status < 300 else "split" if status == 413 else "given up" if status == 529
            else "again" if status == 429 or status >= 500 else "final")


def judge(plan, result, requests, left):
    def claim(holds, what):
        assert holds, "%s: %r\n script %s, then %s\n requests %s" % (
            what, result, plan.script, plan.default, list(zip(marks, [one.status for one in requests])))

    marks = [[int(one["message"].split("#")[1]) for one in request.events] for request in requests]
    items, total, calm, lines = plan.items, result.summary, plan.calm, result.err.splitlines()
    claim(all(line.startswith("packtrack-logger: ") for line in lines)
          and [line for line in lines if ": error: " in line] == lines[-1:] * (result.code != 0)
          and (plan.verbose or len(lines) <= bool(result.code) * (4 + 20 * plan.keep_going)), "what is said")
    # What was read.
    wrong = [number for number, item in enumerate(items) if item[2] >= 1]
    reached = next((number + 1 for number in wrong if items[number][2] == 9), len(items))
    rest_kept = plan.keeps and plan.pipe and not plan.streams
    if wrong and not (plan.keep_going or rest_kept):
        reached = wrong[0] + 1
    read, invalid = total["read"], [number for number in wrong if number < total["read"]]
    valid = set(range(read)) - set(invalid)
    at_door = invalid and not (plan.streams or plan.keep_going)
    claim(read <= reached and total["invalid"] == len(invalid), "counts what is invalid")
    # What came of it.
    ends = [verdict(request.status) for request in requests]
    taken = [number for some, end in zip(marks, ends) if end == "delivered" for number in some]
    in_flight = 0 if calm else plan.connections * plan.batch
    sent = {raw for request in requests for raw in cut_records(request.body)}
    bodies = {(request.headers.get("idempotency-key"), request.body) for request in requests}
    claim(valid.issuperset(number for some in marks for number in some), "what is sent was read and is valid")
    claim(all(items[number][1] in sent for number in taken if not items[number][2]), "out as they came")
    claim(all(len(some) <= plan.batch and (len(some) == 1 or len(request.body) <= plan.bytes)
              for some, request in zip(marks, requests)), "the limits of a batch")
    claim(len(bodies) == len({body for _, body in bodies}), "one body, one key")
    claim(len(taken) - in_flight <= total["delivered"] <= len(taken), "counts what is delivered")
    if calm:
        claim((sorted(taken) if plan.connections > 1 else taken) == sorted(set(taken)), "once, and in order")
        claim(plan.blind or CLOSES in plan.script or total["requests"] == len(requests), "counts requests")
        claim(read == reached or plan.streams and total["undelivered"], "reads to the end")
        claim(not (at_door and requests), "nothing is sent where one is invalid")
    # The exit code.
    failures, batches = set(), collections.defaultdict(list)
    for some, end, request in zip(marks, ends, requests):
        batches[tuple(some)].append((end, request.status))
    for some, attempts in batches.items():
        end, again = attempts[-1][0], any("E" in str(status) for _, status in attempts)  # a connection broke
        if end == "final" or end == "split" and len(some) == 1:
            failures.add(2)
        elif end in ("again", "given up"):
            failures.add(3)
        claim(len(attempts) <= plan.retries + 1 + again, "no attempt too many")
        claim(end != "again" or not calm or plan.blind or len(attempts) > plan.retries, "retries")
        ends_run = end == "final" and (not plan.keep_going or attempts[-1][1] in (401, 403, 404))
        claim(plan.connections > 1 or not ends_run or tuple(marks[-1]) == some, "a failure ends the run")
    faults = {min(items[number][2], 4) for number in (invalid if plan.keep_going else invalid[:1])}
    faults |= set() if items or plan.allow_empty else {4}
    codes = {next((code for code in (2, 3, 4, 1) if code in failures | faults), 0)}
    codes = codes if plan.keep_going else failures or codes
    if not calm:
        codes = codes | {3} | (faults or {0}) | {-number for number, _ in plan.signals}
    elif plan.blind and total["undelivered"] and not at_door:
        codes = codes | {3}
    claim(result.code in codes, "exit code one of %s" % codes)
    claim(result.code or plan.no_flush or read == len(items) == total["delivered"], "0: all is delivered")
    claim(result.code or plan.deadline or not plan.hold, "an input that does not end")
    # What is kept, and what the failure line says of it.
    missing = valid.difference(taken)
    ranges = re.search(r"; not delivered: records? ([0-9, -]+)(?=$|;)", lines[-1] if lines else "")
    if ranges:
        said = [number for pair in ranges.group(1).split(", ")
                for number in range(int(pair.split("-")[0]) - 1, int(pair.split("-")[-1]))]
        claim(len(said) == total["undelivered"] and missing <= set(said) <= valid, "numbers of the records")
    if rest_kept or plan.keeps and not at_door and (calm or requests):
        found = {int(number) for number in re.findall(rb"#(\d+)#", left)}
        whole = reached == read and (plan.keep_going or rest_kept)
        missing.update(*[invalid, range(read, len(items) if whole else read)] * calm)
        claim(found.issuperset(number for number in missing if items[number][0]), "kept: %s" % missing)
        claim(len(found.intersection(taken)) <= in_flight, "nothing is delivered and kept: %s" % found)
        raws = {raw.replace(b"\n", b" ") for _, raw, _ in items}
        claim(wrong and items[reached - 1][2] == 9 or all(
            line in raws or json.loads(line.decode()) for line in left.splitlines()), "kept as it came")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seeds", [
    pytest.param(seeds[at:at + size], id="from %d" % seeds[at], marks=marks)
    for seeds, size, marks in ((QUICK, 25, ()), (FULL, 200, pytest.mark.full))
    for at in range(0, len(seeds), size)])
def test_seeds(seeds, slots, tmp_path, home, argv_of):
    free, failed = list(slots), []

    def one(seed):
        slot, folder = free.pop(), tmp_path / str(seed)
        folder.mkdir()
        try:
            play(seed, slot, folder, home, None if seed % EVERY else argv_of())
        except Exception:
            failed.append("FUZZ_SEEDS={0}-{0}: {1}".format(seed, traceback.format_exc()))
        shutil.rmtree(str(folder))
        free.append(slot)

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, seeds))
    if failed:
        pytest.fail("\n".join(sorted(failed)), pytrace=False)
