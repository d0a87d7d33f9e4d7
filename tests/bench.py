"""What the program costs, each measure against its floor on the same interpreter.

    python tests/bench.py [--quick] [--python PATH] [--only PART]

Floor and program take turns, so that both see the same machine; shown are medians. The sink (sink.py) is a
process of its own, and after each run its counts must be exactly what was sent; relay.py stands before it
where the time of a round trip counts. Exit code 1 if a bound is missed. Standard library only, for POSIX.
"""
import argparse
import collections
import contextlib
import http.client
import itertools
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
KEY = "bench-key"
SYSTEM = "/usr/bin/python3"

Sizes = collections.namedtuple("Sizes", "starts rounds events small big cost_rounds")
FULL = Sizes(starts=21, rounds=7, events=200000, small=20000, big=2000000, cost_rounds=9)
QUICK = Sizes(starts=7, rounds=3, events=80000, small=20000, big=200000, cost_rounds=3)
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

# The floors: what a user would write by hand without the program.
FLOOR_START = """\
import sys, urllib.request
headers = {"Content-Type": "application/json", "X-PackTrack-Key": sys.argv[2]}
urllib.request.urlopen(urllib.request.Request(sys.argv[1], sys.argv[3].encode(), headers)).read()
"""

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
with open(path or 0, "rb") as file:
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
import os, resource, sys
code = os.spawnv(os.P_WAIT, sys.argv[2], sys.argv[2:])
with open(sys.argv[1], "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


class Missed(Exception):
    """The program did not do what was measured: wrong exit code, or records that did not arrive."""


@contextlib.contextmanager
def serving(name, *argv):
    """Run sink.py or relay.py; its port."""
    with subprocess.Popen([sys.executable, os.path.join(HERE, name), *argv], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()


class Bench:
    """Measures into rows of (measure, floor, program, ratio, bound, verdict)."""

    def __init__(self, sizes, python, scratch, port):
        self.sizes, self.python, self.scratch, self.port, self.rows = sizes, python, scratch, port, []
        self.host = "127.0.0.1:%d" % port
        self.environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": scratch, "TMPDIR": scratch,
                            "PACKTRACK_API_KEY": KEY, "PACKTRACK_BASE_URL": "http://" + self.host}
        archive = os.path.join(scratch, "packtrack-logger.pyz")
        subprocess.run(["sh", os.path.join(HERE, "..", "build_zipapp.sh"), "--python", python, "--output",
                        archive], env=dict(os.environ, PYTHON=python), stdout=subprocess.DEVNULL, check=True)
        self.program = [python, archive]

    def seconds(self, argv, records=0, requests=None, pipe=None, code=0):
        """Run, its input what `cat pipe` writes; the seconds, if the sink got exactly that many records."""
        with open(os.path.join(self.scratch, "stderr"), "w+b") as stderr:
            feeder = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE) if pipe else None
            begin = time.perf_counter()
            got = subprocess.call(argv, stdin=feeder.stdout if feeder else subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, stderr=stderr, env=self.environment)
            taken = time.perf_counter() - begin
            if feeder:
                feeder.stdout.close()
                feeder.wait()
            if got != code:
                stderr.seek(0)
                raise Missed("exit code %d, not %d: %s\n%s" % (
                    got, code, " ".join(argv)[-300:], stderr.read()[-500:].decode(errors="replace")))
        with contextlib.closing(http.client.HTTPConnection(self.host, timeout=60)) as connection:
            connection.request("GET", "/counts")
            counts = json.loads(connection.getresponse().read().decode())
        if counts["records"] != records or requests not in (None, counts["requests"]):
            raise Missed("the sink got %s, not %d records" % (counts, records))
        return taken

    def row(self, measure, form, floor, program, bound, good):
        self.rows.append((measure, form % floor, form % program, "%.2f" % (program / floor), bound,
                          "good" if good else "MISSED"))

    def compare(self, rounds, *runs):
        """Take turns with runs of (name, its floor's, most, argv, arguments of seconds()); return medians."""
        taken = [[self.seconds(argv, **more) for *_, argv, more in runs] for _ in range(rounds)]
        median = dict(zip((run[0] for run in runs), map(statistics.median, zip(*taken))))
        for name, floor, most, *_ in runs:
            if floor:
                form, scale = ("%.1f ms", 1000) if median[floor] < 0.2 else ("%.2f s", 1)
                self.row(name, form, median[floor] * scale, median[name] * scale, "at most %s" % most,
                         median[name] / median[floor] <= most)
        return median

    def start(self):
        """From start to exit."""
        sends, program, url = {"records": 1, "requests": 1}, self.program, "http://%s/api/ingest" % self.host
        self.compare(
            self.sizes.starts,
            ("_", "", 0, [self.python, "-c", FLOOR_START, url, KEY, BODY], sends),
            ("one event from flags, start to exit", "_", 1.15, [*program, *EVENT_FLAGS], sends),
            ("_imports", "", 0, [self.python, "-c", "import argparse, json"], {}),
            ("`--version`", "_imports", 1.4, [*program, "--version"], {}),
            ("a usage error", "_imports", 1.4, [*program, "--no-such-flag"], {"code": 1}),
            ("`--dry-run` of one event", "_imports", 1.4, [*program, "--dry-run", *EVENT_FLAGS], {}))

    def throughput(self):
        """Many events, against the plain loop; what comes from a pipe against a loop that reads one, too."""
        count = self.sizes.events
        lines, array = self.make(count), self.make(count, "array")
        streams, sends = {"records": count, "pipe": lines}, {"records": count, "requests": -(-count // 100)}
        floor, pipe = [self.python, "-c", FLOOR_BATCHES, self.host], {**sends, **streams}
        file, stdin = [[*self.program, "--ndjson", *source] for source in (["--file", lines], ["--stdin"])]
        self.compare(
            self.sizes.rounds,
            ("_", "", 0, [*floor, lines, KEY, ""], sends),
            ("{:,} events, NDJSON file".format(count), "_", 1.25, file, sends),
            ("_pipe", "", 0, [*floor, "", KEY, ""], pipe),
            ("the same from a pipe", "_pipe", 1.25, stdin, pipe),
            ("the same from a pipe, `--async`", "_pipe", 1.5, [*stdin, "--async"], streams),
            ("the same as one JSON array", "_", 1.5, [*self.program, "--file", array], sends),
            ("_gzip", "", 0, [*floor, lines, KEY, "gzip"], sends),
            ("the same file, `--gzip`", "_gzip", 1.15, [*file, "--gzip"], sends))

    def connections(self):
        """Many connections against one, where each round trip takes its time."""
        count, name = 10000, "{:,} events at {} ms round trip, `--connections 8` against 1"
        sends = {"records": count, "requests": count // 100}
        with serving("relay.py", str(self.port), str(ROUND_TRIP)) as port:
            argv = [*self.program, "--file", self.make(count), "--ndjson", "--base-url",
                    "http://127.0.0.1:%d" % port, "--connections"]
            self.compare(3, ("_", "", 0, [*argv, "1"], sends),
                         (name.format(count, ROUND_TRIP), "_", 0.2, [*argv, "8"], sends))

    def memory(self):
        """Peak memory for many events against few, and what an event costs then."""
        small, big = self.sizes.small, self.sizes.big
        if shutil.disk_usage(self.scratch).free < 4 * big * 410:
            raise Missed("too little room in " + self.scratch)
        one, few = [(str(number), "", 0, [*self.program, "--file", self.make(number), "--ndjson"],
                     {"records": number}) for number in (1, small)]
        median, seconds = self.compare(self.sizes.cost_rounds, one, few), {}
        for name, form, flags in (
                ("NDJSON file", "", ["--ndjson"]), ("pipe", "", ["--stdin", "--ndjson"]),
                ("`--async`", "", ["--stdin", "--ndjson", "--async"]), ("array", "array", []),
                ("invalid, `--keep-going`", "invalid", ["--ndjson", "--keep-going"])):
            (floor, _), (peak, seconds[name]) = [self.peak(number, form, flags) for number in (small, big)]
            self.row("peak memory, {:,} events, {}".format(big, name), "%.1f MiB", floor / MIB, peak / MIB,
                     "at most 8 MiB more, under 64 MiB", peak - floor <= 8 * MIB and peak < 64 * MIB)
        floor = (median[few[0]] - median["1"]) / small
        each = (seconds["NDJSON file"] - median["1"]) / big
        self.row("cost of an event, of {:,} against {:,}".format(big, small), "%.2f µs", floor * 1e6,
                 each * 1e6, "within 15 %", 1 / COST_DRIFT <= each / floor <= COST_DRIFT)

    def peak(self, count, form, flags):
        """The bytes of memory at the peak, and the seconds, of a run with that many records."""
        path, report = self.make(count, form), os.path.join(self.scratch, "peak")
        piped, code = "--stdin" in flags, int(form == "invalid")
        seconds = self.seconds(
            [self.python, "-S", "-E", "-c", PEAK, report, *self.program, *flags,
             *["--file", path] * (not piped)], 0 if code else count, pipe=path if piped else None, code=code)
        with open(report) as file:
            return int(file.read()) * (1 if sys.platform == "darwin" else 1024), seconds

    def make(self, count, form="lines"):
        """The path of a file of `count` events of about 400 bytes: lines, an "array", or "invalid" ones."""
        path = os.path.join(self.scratch, "%d-%s" % (count, form))
        if not os.path.exists(path):
            opening, between, ending = (b"[", b", ", b"]\n") if form == "array" else (b"", b"\n", b"\n")
            block = make_events(min(count, BLOCK), "fine" if form == "invalid" else "ok")
            with open(path, "wb") as file:
                file.write(opening)
                repeated = itertools.cycle([one + between for one in block])
                file.writelines(itertools.islice(repeated, count - 1))
                file.write(block[(count - 1) % BLOCK] + ending)
        return path


def make_events(count, status):
    """Complete events, compact JSON, as bytes."""
    return [json.dumps({
        "timestamp": "2026-01-01T00:%02d:%02d.%06dZ" % (number // 60, number % 60, number * 7919 % 1000000),
        "source": {"system": "checkout", "env": "prod"},
        "workflow": {"id": "wf-%05d" % (number * 31 % 977), "step_id": "step-%d" % (number % 9),
                     "name": "Checkout", "run_id": "run-%08x" % (number * 2654435761 % (1 << 32))},
        "actor": {"type": "agent", "id": "a-%d" % (number * 17 % 400), "display_name": "cart-stepper"},
        "severity": ("info", "debug", "warn", "info")[number % 4], "status": status,
        "message": "checkout %d completed for cart %08x" % (number, number * 40503 % (1 << 32)),
        "metadata": {"cart_total": number * 37 % 100000 / 100, "currency": "EUR",
                     "host": "web-%02d.example.net" % (number % 24)},
    }, separators=(",", ":")).encode() for number in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer events, fewer rounds")
    parser.add_argument("--python", default=SYSTEM if os.path.exists(SYSTEM) else "python3",
                        help="runs floor and program (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="PART",
                        choices=("start", "throughput", "connections", "memory"), help="%(choices)s")
    options = parser.parse_args()
    sizes, begin, missed = QUICK if options.quick else FULL, time.monotonic(), []
    # The interpreter itself: a version manager's shim would be measured with it.
    python, version = subprocess.check_output(
        [options.python, "-c", "import sys; print(sys.executable, sys.version.split()[0], sep='\\n')"],
        universal_newlines=True).splitlines()
    with tempfile.TemporaryDirectory(prefix="packtrack-bench-") as scratch, serving("sink.py") as port:
        bench = Bench(sizes, python, scratch, port)
        for part in (bench.start, bench.throughput, bench.connections, bench.memory):
            if options.only in ("", part.__name__):
                try:
                    part()
                except Missed as error:
                    missed.append("FAILED %s: %s" % (part.__name__, error))
    print("Python %s, %d cores, %s; medians of %d (start) and %d%s\n" % (
        version, os.cpu_count() or 0, platform.platform(), sizes.starts, sizes.rounds,
        "; --quick: fewer events and rounds" if options.quick else ""))
    rows = [("measure", "floor", "program", "ratio", "bound", "verdict"), *bench.rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, tuple("-" * width for width in widths))
    table = ["| %s |" % " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    print("\n".join([*table, *missed, "took %d s" % (time.monotonic() - begin)]))
    return 1 if missed or any(row[-1] != "good" for row in bench.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
