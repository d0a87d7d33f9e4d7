"""What the program costs, each measure against its floor on the same interpreter.

    python tests/bench.py [--quick] [--python PATH] [--archive PATH] [--only WORD]

Floor and program take turns within one run, so that both see the same machine; what is shown are medians. The
sink (sink.py) is a process of its own, and after each run its counts must be exactly what was sent; relay.py
stands before it where the time of a round trip counts. Prints a Markdown table; the exit code is 1 if a bound
is missed. Standard library only, for POSIX.
"""

import argparse
import collections
import http.client
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
KEY = "bench-key"
SYSTEM = "/usr/bin/python3"

Sizes = collections.namedtuple("Sizes", "starts rounds events small big cost_rounds")
FULL = Sizes(starts=21, rounds=7, events=200000, small=20000, big=2000000, cost_rounds=9)
QUICK = Sizes(starts=7, rounds=3, events=80000, small=20000, big=200000, cost_rounds=3)

# What opens a file, stands between events and ends it, and what is replaced in each.
LINES = (b"", b"\n", b"\n", b"", b"")
ARRAY = (b"[", b", ", b"]\n", b"", b"")
INVALID = (b"", b"\n", b"\n", b'"ok"', b'"fine"')
BLOCK = 2000  # distinct events; files repeat them, so that this process stays small
MIB = 1 << 20
COST_DRIFT = 1.15
ROUND_TRIP = 50  # milliseconds

EVENT_FLAGS = ["--source-system", "bench", "--workflow-id", "wf-1", "--actor-type", "agent", "--actor-id",
               "a-1", "--severity", "info", "--status", "ok", "--message", "checkout completed"]
BODY = json.dumps({
    "timestamp": "2026-01-01T00:00:00.000000Z", "source": {"system": "bench"}, "workflow": {"id": "wf-1"},
    "actor": {"type": "agent", "id": "a-1"}, "severity": "info", "status": "ok",
    "message": "checkout completed"})

# The floors. Each is what a user would write by hand without the program.

FLOOR_START = """\
import sys, urllib.request
headers = {"Content-Type": "application/json", "X-PackTrack-Key": sys.argv[2]}
urllib.request.urlopen(urllib.request.Request(sys.argv[1], sys.argv[3].encode(), headers)).read()
"""

FLOOR_IMPORTS = ["-c", "import argparse, json"]

FLOOR_BATCHES = """\
import http.client, json, sys, zlib
host, path, key, packed = sys.argv[1:5]
connection = http.client.HTTPConnection(host)
headers = {"Content-Type": "application/json", "X-PackTrack-Key": key}
if packed:
    headers["Content-Encoding"] = "gzip"

def post(lines):
    body = b"[" + b",".join(lines) + b"]"
    if packed:
        packer = zlib.compressobj(6, zlib.DEFLATED, 31)
        body = packer.compress(body) + packer.flush()
    connection.request("POST", "/api/ingest", body, headers)
    answer = connection.getresponse()
    answer.read()
    assert answer.status == 200

lines = []
with open(path, "rb") as file:
    for line in file:
        json.loads(line)
        lines.append(line)
        if len(lines) == 100:
            post(lines)
            lines = []
if lines:
    post(lines)
"""

# A process inherits its parent's peak through fork and exec, so the one that is measured gets a small parent.
PEAK = """\
import os, sys
child = os.fork()
if not child:
    os.execv(sys.argv[2], sys.argv[2:])
_, status, usage = os.wait4(child, 0)
with open(sys.argv[1], "w") as file:
    file.write("%d %d" % (status, usage.ru_maxrss))
"""


class Missed(Exception):
    """The program did not do what was measured: wrong exit code, or records that did not arrive."""


class Server:
    """sink.py or relay.py as a process; url: where it listens."""

    def __init__(self, name, *argv):
        self.process = subprocess.Popen([sys.executable, os.path.join(HERE, name), *argv],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.port = int(self.process.stdout.readline())
        self.host = "127.0.0.1:%d" % self.port
        self.url = "http://" + self.host

    def counts(self):
        """Return the sink's counts since the last call."""
        connection = http.client.HTTPConnection(self.host, timeout=60)
        try:
            connection.request("GET", "/counts")
            return json.loads(connection.getresponse().read().decode())
        finally:
            connection.close()

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)


class Bench:
    """Measures into rows of (measure, floor, program, ratio, bound, good)."""

    def __init__(self, sizes, python, archive, scratch, sink):
        self.sizes, self.python, self.archive, self.scratch = sizes, python, archive, scratch
        self.sink, self.rows = sink, []
        self.environment = {
            "PATH": os.environ.get("PATH", os.defpath), "HOME": scratch, "TMPDIR": scratch,
            "PACKTRACK_API_KEY": KEY, "PACKTRACK_BASE_URL": sink.url}
        self.floor_start = self.write("floor_start.py", FLOOR_START)
        self.floor_batches = self.write("floor_batches.py", FLOOR_BATCHES)
        self.peak_script = self.write("peak.py", PEAK)

    def write(self, name, text):
        path = os.path.join(self.scratch, name)
        with open(path, "w") as file:
            file.write(text)
        return path

    def program(self, *flags):
        return [self.python, self.archive, *flags]

    def seconds(self, argv, code=0, pipe=None):
        """Run to the end and return the seconds it took; `pipe` is a file that cat writes to its input."""
        errors = os.path.join(self.scratch, "stderr")
        feeder = None
        with open(errors, "wb") as stderr:
            if pipe:
                feeder = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
            begin = time.perf_counter()
            process = subprocess.Popen(argv, stdin=feeder.stdout if feeder else subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL, stderr=stderr, env=self.environment)
            got = process.wait()
            taken = time.perf_counter() - begin
        if feeder:
            feeder.stdout.close()
            feeder.wait()
        if got != code:
            with open(errors, errors="replace") as file:
                said = file.read()[-500:]
            raise Missed("exit code %d, not %d: %s\n%s" % (got, code, " ".join(argv)[:300], said))
        return taken

    def expect(self, records, requests=None):
        """Check that the sink got exactly this since the last time."""
        counts = self.sink.counts()
        if counts["records"] != records or requests not in (None, counts["requests"]):
            raise Missed("the sink got %s, not %d records" % (counts, records))

    def peak(self, argv, pipe=None, code=0):
        """Run and return the bytes of memory that it had at its peak."""
        report = os.path.join(self.scratch, "peak")
        self.seconds([self.python, "-S", "-E", self.peak_script, report] + argv, pipe=pipe)
        with open(report) as file:
            status, peak = map(int, file.read().split())
        if status != code << 8:
            raise Missed("wait status %d: %s" % (status, " ".join(argv)[:300]))
        return peak * (1 if sys.platform == "darwin" else 1024)

    def row(self, measure, floor, program, ratio, bound, good):
        self.rows.append((measure, floor, program, ratio, bound, "good" if good else "MISSED"))

    def compare(self, rounds, runs, bounds, unit):
        """Call each of `runs` (name: function) in turn; a row for each bound (name, its floor, most)."""
        taken = [{name: run() for name, run in runs.items()} for _ in range(rounds)]
        median = {name: statistics.median(one[name] for one in taken) for name in runs}
        form, scale = ("%.1f ms", 1000) if unit == "ms" else ("%.2f s", 1)
        for name, floor, bound in bounds:
            ratio = median[name] / median[floor]
            self.row(name, form % (median[floor] * scale), form % (median[name] * scale), "%.2f" % ratio,
                     "at most %s" % bound, ratio <= bound)
        return median

    def start(self):
        """From start to exit."""
        def sending(argv):
            seconds = self.seconds(argv)
            self.expect(1, 1)
            return seconds

        self.compare(self.sizes.starts, {
            "_": lambda: sending([self.python, self.floor_start, self.sink.url + "/api/ingest", KEY, BODY]),
            "one event from flags, start to exit": lambda: sending(self.program(*EVENT_FLAGS)),
            "_imports": lambda: self.seconds([self.python, *FLOOR_IMPORTS]),
            "`--version`": lambda: self.seconds(self.program("--version")),
            "a usage error": lambda: self.seconds(self.program("--no-such-flag"), code=1),
            "`--dry-run` of one event": lambda: self.seconds(self.program("--dry-run", *EVENT_FLAGS)),
        }, [("one event from flags, start to exit", "_", 1.15), ("`--version`", "_imports", 1.4),
            ("a usage error", "_imports", 1.4), ("`--dry-run` of one event", "_imports", 1.4)], "ms")

    def throughput(self):
        """Many events, against the plain loop."""
        count = self.sizes.events
        lines, array = self.make("events.ndjson", count), self.make("events.json", count, ARRAY)
        file = "{:,} events, NDJSON file".format(count)

        def run(argv, pipe=None):
            seconds = self.seconds(argv, pipe=pipe)
            self.expect(count, None if "--async" in argv else -(-count // 100))
            return seconds

        def floor(packed):
            return run([self.python, self.floor_batches, self.sink.host, lines, KEY, packed])

        program = self.program
        self.compare(self.sizes.rounds, {
            "_": lambda: floor(""),
            file: lambda: run(program("--file", lines, "--ndjson")),
            "the same from a pipe": lambda: run(program("--stdin", "--ndjson"), lines),
            "the same from a pipe, `--async`": lambda: run(program("--stdin", "--ndjson", "--async"), lines),
            "the same as one JSON array": lambda: run(program("--file", array)),
            "_gzip": lambda: floor("gzip"),
            "the same file, `--gzip`": lambda: run(program("--file", lines, "--ndjson", "--gzip")),
        }, [(file, "_", 1.25), ("the same from a pipe", "_", 1.25),
            ("the same from a pipe, `--async`", "_", 1.5), ("the same as one JSON array", "_", 1.5),
            ("the same file, `--gzip`", "_gzip", 1.15)], "s")

    def connections(self):
        """Many connections against one, where each round trip takes its time."""
        count = 10000
        lines = self.make("events.ndjson", count)
        relay = Server("relay.py", str(self.sink.port), str(ROUND_TRIP))

        def run(connections):
            seconds = self.seconds(self.program("--file", lines, "--ndjson", "--base-url", relay.url,
                                                "--connections", connections))
            self.expect(count, count // 100)
            return seconds

        name = "{:,} events at {} ms round trip, `--connections 8` against 1".format(count, ROUND_TRIP)
        try:
            self.compare(3, {"_": lambda: run("1"), name: lambda: run("8")}, [(name, "_", 0.2)], "s")
        finally:
            relay.close()

    def memory(self):
        """Peak memory for many events against few, and what an event costs then."""
        small, big = self.sizes.small, self.sizes.big
        if shutil.disk_usage(self.scratch).free < 3 * big * 410:
            raise Missed("too little room in " + self.scratch)
        few, many = self.make("few.ndjson", small), self.make("many.ndjson", big)
        peaks = {"NDJSON file": (self.peak_of(small, few), self.cost(few, many))}
        for name, flags in (("pipe", []), ("`--async`", ["--async"])):
            peaks[name] = [self.peak_of(number, path, ["--stdin", "--ndjson", *flags])
                           for number, path in ((small, few), (big, many))]
        for name, form, flags in (("array", ARRAY, []), ("invalid, `--keep-going`", INVALID, [
                "--ndjson", "--keep-going"])):
            peaks[name] = [self.peak_of(number, self.make("other", number, form), flags, code=form is INVALID)
                           for number in (small, big)]
        for name, (floor, peak) in peaks.items():
            self.row("peak memory, {:,} events, {}".format(big, name), "%.1f MiB" % (floor / MIB),
                     "%.1f MiB" % (peak / MIB), "%.2f" % (peak / floor),
                     "at most 8 MiB more, under 64 MiB", peak - floor <= 8 * MIB and peak < 64 * MIB)

    def peak_of(self, count, path, flags=("--ndjson",), code=0):
        """The peak memory for this input."""
        piped = "--stdin" in flags
        peak = self.peak(self.program(*flags, *["--file", path] * (not piped)), path if piped else None, code)
        self.expect(0 if code else count)
        return peak

    def cost(self, few, many):
        """Cost per event from a file, for few and for many; returns the peak memory of the latter."""
        small, big = self.sizes.small, self.sizes.big
        one = self.make("one.ndjson", 1)
        median = self.compare(self.sizes.cost_rounds, {
            path: lambda path=path: self.seconds(self.program("--file", path, "--ndjson"))
            for path in (one, few)}, [], "s")
        self.expect(self.sizes.cost_rounds * (small + 1))
        begin = time.perf_counter()
        peak = self.peak_of(big, many)
        each = (time.perf_counter() - begin - median[one]) / big
        floor = (median[few] - median[one]) / small
        self.row("cost of an event, of {:,} against {:,}".format(big, small), "%.2f µs" % (floor * 1e6),
                 "%.2f µs" % (each * 1e6), "%.2f" % (each / floor), "within 15 %",
                 1 / COST_DRIFT <= each / floor <= COST_DRIFT)
        return peak

    def make(self, name, count, form=LINES):
        """Write `count` events of about 400 bytes; return the path."""
        opening, between, ending, old, new = form
        block = [one.replace(old, new) if old else one for one in make_events(min(count, BLOCK))]
        path = os.path.join(self.scratch, name)
        with open(path, "wb") as file:
            file.write(opening)
            while count:
                some = block[:count]
                count -= len(some)
                file.write(between.join(some) + (between if count else ending))
        return path


def make_events(count):
    """Complete events, compact JSON, as bytes."""
    return [json.dumps({
        "timestamp": "2026-01-01T%02d:%02d:%02d.%06dZ" % (
            number // 3600 % 24, number // 60 % 60, number % 60, number * 7919 % 1000000),
        "source": {"system": "checkout", "env": "prod"},
        "workflow": {"id": "wf-%05d" % (number * 31 % 977), "step_id": "step-%d" % (number % 9),
                     "name": "Checkout", "run_id": "run-%08x" % (number * 2654435761 % (1 << 32))},
        "actor": {"type": "agent", "id": "a-%d" % (number * 17 % 400), "display_name": "cart-stepper"},
        "severity": ("info", "debug", "warn", "info")[number % 4], "status": "ok",
        "message": "checkout %d completed for cart %08x" % (number, number * 40503 % (1 << 32)),
        "metadata": {"cart_total": number * 37 % 100000 / 100, "currency": "EUR",
                     "host": "web-%02d.example.net" % (number % 24)},
    }, separators=(",", ":")).encode() for number in range(count)]


def ask(python, code):
    return subprocess.run([python, "-c", code], stdout=subprocess.PIPE, check=True).stdout.decode().strip()


def build(python, scratch):
    """Build the archive with this interpreter's bytecode; return its path."""
    path = os.path.join(scratch, "packtrack-logger.pyz")
    subprocess.run(["sh", os.path.join(ROOT, "build_zipapp.sh"), "--python", python, "--output", path],
                   env=dict(os.environ, PYTHON=python), stdout=subprocess.DEVNULL, check=True)
    return path


def show(rows):
    """Print rows as a Markdown table."""
    heads = ("measure", "floor", "program", "ratio", "bound", "verdict")
    widths = [max(len(row[column]) for row in [heads] + rows) for column in range(len(heads))]
    for row in [heads, tuple("-" * width for width in widths)] + rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer events, fewer rounds")
    parser.add_argument("--python", default=SYSTEM if os.path.exists(SYSTEM) else "python3",
                        help="runs floor and program (default: %(default)s)")
    parser.add_argument("--archive", help="archive under test (default: built afresh)")
    parser.add_argument("--only", default="", metavar="PART", help="start, throughput, connections or memory")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    python = shutil.which(options.python) or parser.error("no such interpreter: " + options.python)
    # The interpreter itself: a version manager's shim would be measured with it.
    python = ask(python, "import sys; print(sys.executable)")
    begin = time.monotonic()
    missed = []
    with tempfile.TemporaryDirectory(prefix="packtrack-bench-") as scratch:
        sink = Server("sink.py")
        try:
            archive = os.path.abspath(options.archive) if options.archive else build(python, scratch)
            bench = Bench(sizes, python, archive, scratch, sink)
            for part in (bench.start, bench.throughput, bench.connections, bench.memory):
                if options.only in ("", part.__name__):
                    try:
                        part()
                    except Missed as error:
                        missed.append("%s: %s" % (part.__name__, error))
        finally:
            sink.close()
    version = ask(python, "import platform; print(platform.python_version())")
    print("Python %s, %d cores, %s; medians of %d (start) and %d%s\n" % (
        version, os.cpu_count() or 0, platform.platform(), sizes.starts, sizes.rounds,
        "; --quick: fewer events and rounds" if options.quick else ""))
    show(bench.rows)
    for line in missed:
        print("FAILED " + line)
    print("took %d s" % (time.monotonic() - begin))
    return 1 if missed or any(row[-1] != "good" for row in bench.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
