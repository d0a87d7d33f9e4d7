"""What the program costs, each measure against its floor on the same interpreter.

    python tests/bench.py [--quick] [--python PATH] [--archive PATH] [--only WORD]

Floor and program take turns within one run, so that both see the same machine; what is shown are medians. The
sink (sink.py) is a process of its own, and after each run its counts must be exactly what was sent. Prints a
Markdown table; the exit code is 1 if a bound is missed. Standard library only, for POSIX.
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
import zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
KEY = "bench-key"

Sizes = collections.namedtuple("Sizes", "starts rounds events small big cost_rounds")
FULL = Sizes(starts=21, rounds=7, events=200000, small=20000, big=2000000, cost_rounds=9)
QUICK = Sizes(starts=7, rounds=3, events=40000, small=10000, big=200000, cost_rounds=5)

BLOCK = 2000  # distinct events; files repeat them, so that this process stays small
MIB = 1 << 20
MEMORY_MORE = 8 * MIB
MEMORY_ALL = 64 * MIB
COST_DRIFT = 1.15

EVENT = {
    "--source-system": "bench", "--workflow-id": "wf-1", "--actor-type": "agent", "--actor-id": "a-1",
    "--severity": "info", "--status": "ok", "--message": "checkout completed",
}
EVENT_FLAGS = [word for pair in EVENT.items() for word in pair]

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


class Sink:
    """The sink process and its counts."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, os.path.join(HERE, "sink.py")],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.host = "127.0.0.1:%d" % int(self.process.stdout.readline())
        self.url = "http://" + self.host

    def counts(self):
        """Return the counts since the last call."""
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
        self.sizes = sizes
        self.python = python
        self.archive = archive
        self.scratch = scratch
        self.sink = sink
        self.rows = []
        self.environment = {
            "PATH": os.environ.get("PATH", os.defpath), "HOME": scratch, "TMPDIR": scratch,
            "PACKTRACK_API_KEY": KEY, "PACKTRACK_BASE_URL": sink.url,
        }
        self.floor_start = self.write("floor_start.py", FLOOR_START)
        self.floor_batches = self.write("floor_batches.py", FLOOR_BATCHES)
        self.peak_script = self.write("peak.py", PEAK)

    def write(self, name, text):
        path = os.path.join(self.scratch, name)
        with open(path, "w") as file:
            file.write(text)
        return path

    # one run

    def program(self, *flags, archive=None):
        return [self.python, archive or self.archive] + list(flags)

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

    def first_byte(self, argv):
        """Run and return the seconds until the first byte on its standard output."""
        begin = time.perf_counter()
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   env=self.environment)
        byte = process.stdout.read(1)
        taken = time.perf_counter() - begin
        process.stdout.close()
        if process.wait() != 0 or not byte:
            raise Missed("the command did not start: %s" % " ".join(argv)[:300])
        return taken

    def peak(self, argv, pipe=None):
        """Run and return the bytes of memory that it had at its peak."""
        report = os.path.join(self.scratch, "peak")
        self.seconds([self.python, "-S", "-E", self.peak_script, report] + argv, pipe=pipe)
        with open(report) as file:
            status, peak = map(int, file.read().split())
        if status:
            raise Missed("wait status %d: %s" % (status, " ".join(argv)[:300]))
        return peak * (1 if sys.platform == "darwin" else 1024)

    # rows

    def row(self, measure, floor, program, ratio, bound, good):
        self.rows.append((measure, floor, program, ratio, bound, "good" if good else "MISSED"))

    def ratio_row(self, measure, floor, program, bound, unit=1000.0):
        floor, program = statistics.median(floor), statistics.median(program)
        ratio = program / floor
        form = "%.1f ms" if unit == 1000.0 else "%.2f s"
        self.row(measure, form % (floor * unit), form % (program * unit), "%.2f" % ratio,
                 "at most %s" % bound, ratio <= bound)

    def alternate(self, rounds, runs):
        """Call each of `runs` (name: function) in turn, `rounds` times; return name: list of seconds."""
        taken = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                taken[name].append(run())
        return taken

    def start(self):
        """From start to exit, and to the start of a wrapped command."""
        body = json.dumps({
            "timestamp": "2026-01-01T00:00:00.000000Z", "source": {"system": "bench"},
            "workflow": {"id": "wf-1"}, "actor": {"type": "agent", "id": "a-1"}, "severity": "info",
            "status": "ok", "message": "checkout completed"})
        foreign = os.path.join(self.scratch, "foreign.pyz")
        disguise(self.archive, foreign, cache_tag(self.python))
        floor = [self.python, self.floor_start, self.sink.url + "/api/ingest", KEY, body]
        imports = [self.python] + FLOOR_IMPORTS

        def sending(argv):
            seconds = self.seconds(argv)
            self.expect(1, 1)
            return seconds

        def wrapping():
            seconds = self.first_byte(self.program(*EVENT_FLAGS, "--", "echo", "started"))
            self.expect(1, 1)
            return seconds

        taken = self.alternate(self.sizes.starts, {
            "floor": lambda: sending(floor),
            "one": lambda: sending(self.program(*EVENT_FLAGS)),
            "foreign": lambda: sending(self.program(*EVENT_FLAGS, archive=foreign)),
            "imports": lambda: self.seconds(imports),
            "version": lambda: self.seconds(self.program("--version")),
            "usage": lambda: self.seconds(self.program("--no-such-flag"), code=1),
            "dry": lambda: self.seconds(self.program("--dry-run", *EVENT_FLAGS)),
            "help": lambda: self.seconds(self.program("--help")),
            "wrapper": wrapping,
        })
        self.ratio_row("one event from flags, start to exit", taken["floor"], taken["one"], 1.2)
        self.ratio_row("the same, bytecode of another version", taken["floor"], taken["foreign"], 1.5)
        self.ratio_row("`--version`", taken["imports"], taken["version"], 1.6)
        self.ratio_row("a usage error", taken["imports"], taken["usage"], 1.6)
        self.ratio_row("`--dry-run` of one event", taken["imports"], taken["dry"], 1.6)
        self.ratio_row("`--help`", taken["imports"], taken["help"], 2.0)
        self.ratio_row("`-- COMMAND`: until it starts", taken["imports"], taken["wrapper"], 1.6)

    def imports(self):
        """What must start without urllib.request does."""
        for name, flags in (("--version", ["--version"]), ("a usage error", ["--no-such-flag"]),
                            ("--help", ["--help"]), ("--dry-run", ["--dry-run"] + EVENT_FLAGS)):
            process = subprocess.run([self.python, "-v", self.archive] + flags, env=self.environment,
                                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                     stderr=subprocess.PIPE)
            if b"import 'zipimport'" not in process.stderr:
                raise Missed("%s -v does not name what it imports" % self.python)
            loaded = b"import 'urllib.request'" in process.stderr
            self.row("urllib.request, " + name, "", "imported" if loaded else "not imported", "",
                     "not imported", not loaded)

    def throughput(self):
        """Many events, against the plain loop."""
        count = self.sizes.events
        lines = self.make_lines("events.ndjson", count)
        array = self.make_array("events.json", count)
        requests = -(-count // 100)

        def floor(packed):
            return [self.python, self.floor_batches, self.sink.host, lines, KEY, packed]

        def run(argv, requests=requests, pipe=None):
            seconds = self.seconds(argv, pipe=pipe)
            self.expect(count, requests)
            return seconds

        program = self.program
        taken = self.alternate(self.sizes.rounds, {
            "floor": lambda: run(floor("")),
            "file": lambda: run(program("--file", lines, "--ndjson")),
            "async": lambda: run(program("--stdin", "--ndjson", "--async"), requests=None, pipe=lines),
            "array": lambda: run(program("--file", array)),
            "gzip floor": lambda: run(floor("gzip")),
            "gzip": lambda: run(program("--file", lines, "--ndjson", "--gzip")),
        })
        name = "{:,} events".format(count)
        self.ratio_row(name + ", NDJSON file", taken["floor"], taken["file"], 1.25, 1)
        self.ratio_row("the same from a pipe, `--async`", taken["floor"], taken["async"], 1.5, 1)
        self.ratio_row("the same file, `--gzip`", taken["gzip floor"], taken["gzip"], 1.15, 1)
        self.ratio_row("the same as one JSON array", taken["floor"], taken["array"], 1.5, 1)
        os.remove(lines)
        os.remove(array)

    def memory(self):
        """Peak memory for many events against few, and what an event costs then."""
        small, big = self.sizes.small, self.sizes.big
        needed = 3 * big * 410
        if shutil.disk_usage(self.scratch).free < needed:
            raise Missed("%d MB of disk are needed in %s" % (needed >> 20, self.scratch))
        few, few_array = self.make_lines("few.ndjson", small), self.make_array("few.json", small)
        many = self.make_lines("many.ndjson", big)
        modes = [
            ("file", lambda lines, array: (self.program("--file", lines, "--ndjson"), None)),
            ("pipe", lambda lines, array: (self.program("--stdin", "--ndjson"), lines)),
            ("`--async`", lambda lines, array: (self.program("--stdin", "--ndjson", "--async"), lines)),
            ("array", lambda lines, array: (self.program("--file", array), None)),
        ]
        for name, mode in modes:
            if name == "file":
                least = self.cost(few, many)
            if name == "array":
                os.remove(many)
                many_array = self.make_array("many.json", big)
            else:
                many_array = ""
            floor = self.peak(*mode(few, few_array))
            self.expect(small)
            if name == "file":
                peak = least
            else:
                peak = self.peak(*mode(many, many_array))
                self.expect(big)
            self.row("peak memory, {:,} events, {}".format(big, name), "%.1f MiB" % (floor / MIB),
                     "%.1f MiB" % (peak / MIB), "%.2f" % (peak / floor),
                     "at most 8 MiB more, under 64 MiB", peak - floor <= MEMORY_MORE and peak < MEMORY_ALL)
        os.remove(many_array)

    def cost(self, few, many):
        """Cost per event from a file, for few and for many; returns the peak memory of the latter."""
        one = self.make_lines("one.ndjson", 1)
        small, big = self.sizes.small, self.sizes.big
        starts, shorts = [], []

        def shorter(rounds):
            for _ in range(rounds):
                starts.append(self.seconds(self.program("--file", one, "--ndjson")))
                shorts.append(self.seconds(self.program("--file", few, "--ndjson")))
                self.expect(small + 1)

        shorter(self.sizes.cost_rounds // 2 + 1)
        begin = time.perf_counter()
        peak = self.peak(self.program("--file", many, "--ndjson"))
        long = time.perf_counter() - begin
        self.expect(big)
        shorter(self.sizes.cost_rounds // 2 + 1)
        start = statistics.median(starts)
        floor = (statistics.median(shorts) - start) / small
        each = (long - start) / big
        ratio = each / floor
        self.row("cost of an event, of {:,} against {:,}".format(big, small), "%.2f µs" % (floor * 1e6),
                 "%.2f µs" % (each * 1e6), "%.2f" % ratio, "within 15 %",
                 1 / COST_DRIFT <= ratio <= COST_DRIFT)
        return peak

    # data

    def make_lines(self, name, count):
        return self.make(name, count, b"", b"\n", b"\n")

    def make_array(self, name, count):
        return self.make(name, count, b"[", b", ", b"]\n")

    def make(self, name, count, opening, between, ending):
        """Write `count` events of about 400 bytes; return the path."""
        block = make_events(min(count, BLOCK))
        path = os.path.join(self.scratch, name)
        whole = between.join(block)
        with open(path, "wb") as file:
            file.write(opening)
            for _ in range(count // BLOCK):
                file.write(whole)
                count -= BLOCK
                file.write(between if count else ending)
            if count:
                file.write(between.join(block[:count]) + ending)
        return path


def make_events(count):
    """Complete events, compact JSON, as bytes."""
    hosts = ["web-%02d.example.net" % number for number in range(24)]
    return [json.dumps({
        "timestamp": "2026-01-01T%02d:%02d:%02d.%06dZ" % (
            number // 3600 % 24, number // 60 % 60, number % 60, number * 7919 % 1000000),
        "source": {"system": "checkout", "env": "prod"},
        "workflow": {"id": "wf-%05d" % (number * 31 % 977), "name": "Checkout", "run_id": "run-%08x" % (
            number * 2654435761 % (1 << 32)), "step_id": "step-%d" % (number % 9)},
        "actor": {"type": "agent", "id": "a-%d" % (number * 17 % 400), "display_name": "cart-stepper"},
        "severity": ("info", "debug", "warn", "info")[number % 4],
        "status": "ok",
        "message": "checkout %d completed for cart %08x" % (number, number * 40503 % (1 << 32)),
        "metadata": {"cart_total": number * 37 % 100000 / 100, "currency": "EUR",
                     "host": hosts[number % 24]},
    }, separators=(",", ":")).encode() for number in range(count)]


def cache_tag(python):
    """The name under which an interpreter keeps its bytecode."""
    return ask(python, "import sys; print(sys.implementation.cache_tag)")


def ask(python, code):
    return subprocess.run([python, "-c", code], stdout=subprocess.PIPE, check=True).stdout.decode().strip()


def disguise(archive, path, tag):
    """Copy an archive with this version's bytecode under the name of another's."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as copy:
        names = [item.filename for item in source.infolist()]
        if not any(tag in name for name in names):
            raise Missed("%s has no bytecode for %s: %s" % (archive, tag, names))
        for item in source.infolist():
            data = source.read(item)
            item.filename = item.filename.replace(tag, "another-version")
            copy.writestr(item, data, item.compress_type)


def build(python, scratch):
    """Build the archive with this interpreter's bytecode; return its path."""
    path = os.path.join(scratch, "packtrack-logger.pyz")
    subprocess.run(["sh", os.path.join(ROOT, "build_zipapp.sh"), "--python", python, "--output", path],
                   env=dict(os.environ, PYTHON=python), stdout=subprocess.DEVNULL, check=True)
    return path


def machine():
    """A line that says what this was measured on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return "%s, %d cores, %s %s" % (name, os.cpu_count() or 0, platform.system(), platform.release())


def show(rows):
    """Print rows as a Markdown table."""
    heads = ("measure", "floor", "program", "ratio", "bound", "verdict")
    widths = [max(len(row[column]) for row in [heads] + rows) for column in range(len(heads))]
    for row in [heads, tuple("-" * width for width in widths)] + rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer events, fewer rounds")
    parser.add_argument("--python", default=sys.executable, help="runs floor and program (default: this one)")
    parser.add_argument("--archive", help="archive under test (default: built afresh)")
    parser.add_argument("--only", default="", metavar="PART", help="start, imports, throughput or memory")
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    python = shutil.which(options.python) or parser.error("no such interpreter: " + options.python)
    # The interpreter itself: a version manager's shim would be measured with it.
    python = ask(python, "import sys; print(sys.executable)")
    begin = time.monotonic()
    missed = []
    with tempfile.TemporaryDirectory(prefix="packtrack-bench-") as scratch:
        sink = Sink()
        try:
            archive = os.path.abspath(options.archive) if options.archive else build(python, scratch)
            bench = Bench(sizes, python, archive, scratch, sink)
            for part in (bench.start, bench.imports, bench.throughput, bench.memory):
                if options.only in ("", part.__name__):
                    try:
                        part()
                    except Missed as error:
                        missed.append("%s: %s" % (part.__name__, error))
        finally:
            sink.close()
    version = ask(python, "import platform; print(platform.python_version())")
    print("Python %s on %s; medians of %d (start) and %d%s" % (
        version, machine(), sizes.starts, sizes.rounds,
        "; --quick: fewer events and rounds" if options.quick else ""))
    print()
    show(bench.rows)
    print()
    for line in missed:
        print("FAILED " + line)
    print("took %d s" % (time.monotonic() - begin))
    return 1 if missed or any(row[-1] != "good" for row in bench.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
