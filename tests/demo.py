#!/usr/bin/env python3
"""What `make demo` runs: demo.py ARCHIVE starts the stand-in of the service, sends one event from flags, a
JSON array and an NDJSON stream through a pipe with a 503 on the way, and shows what arrived.

Exits 1 if anything did not arrive as it should. Standard library only; Python 3.6 or newer.
"""
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile

from standin import KEY, StandIn

NUMBER = 5000
WIDTH = 100


def make_event(message, **fields):
    """A complete event, as the service stores it."""
    result = {"timestamp": "2025-01-01T00:00:00Z", "source": {"system": "shop"},
              "workflow": {"id": "nightly"}, "actor": {"type": "agent", "id": "a-42"},
              "severity": "info", "status": "ok", "message": message}
    result.update(fields)
    return result


def show_command(words):
    """A command as one would type it, folded."""
    lines = [""]
    for word in words:
        word = word if word == "|" else shlex.quote(word)
        if lines[-1] and len(lines[-1]) + len(word) > WIDTH - 8:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    print("   $ " + " \\\n       ".join(lines))


def show_arrival(server, since, code):
    """The exit code and the requests since that one."""
    requests = server.requests[since:]
    print("   exit code %d; at the server:" % code)
    shown = requests if len(requests) <= 6 else requests[:4] + [None] + requests[-1:]
    for request in shown:
        if request is None:
            print("     ...  %d more of the same" % (len(requests) - 5))
            continue
        kind = "array of %d" % len(request.json) if isinstance(request.json, list) else "object"
        print("     %s %s  %-12s %7d bytes%s  -> %s" % (
            request.method, request.path, kind, len(request.raw_body),
            " (gzip)" if "content-encoding" in request.headers else "", request.status))


class Demo:
    """The steps, and what was wrong with them."""

    def __init__(self, archive, server, folder):
        self.program = [sys.executable, archive]
        self.server = server
        self.folder = folder
        self.wrong = []
        self.environ = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": folder,
                        "PACKTRACK_API_KEY": KEY, "PACKTRACK_BASE_URL": server.url}

    def step(self, title, flags, expected, statuses, pipe=None):
        """Run the program and compare what arrived with what should have."""
        print("\n%s" % title)
        show_command((["cat", pipe, "|"] if pipe else []) + ["packtrack-logger"] + flags)
        records, requests = len(self.server.records), len(self.server.requests)
        feeder = subprocess.Popen(["cat", pipe], cwd=self.folder, stdout=subprocess.PIPE) if pipe else None
        process = subprocess.Popen(self.program + flags, cwd=self.folder, env=self.environ,
                                   stdin=feeder.stdout if feeder else subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if feeder:
            feeder.stdout.close()
        try:
            out, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            self.wrong.append("%s: did not end in two minutes" % title)
        if feeder:
            feeder.wait()
        for line in (out + err).decode("utf-8", "replace").splitlines():
            print("   %s" % line)
        show_arrival(self.server, requests, process.returncode)
        arrived = self.server.records[records:]
        good = arrived == expected
        print("   %d of %d records arrived, %s" % (len(arrived), len(expected),
                                                  "in order and unchanged" if good else "NOT AS THEY SHOULD"))
        answered = [request.status for request in self.server.requests[requests:]]
        if process.returncode != 0:
            self.wrong.append("%s: exit code %d" % (title, process.returncode))
        if not good:
            self.wrong.append("%s: other records arrived than were sent" % title)
        if answered != statuses:
            self.wrong.append("%s: the server answered %s, not %s" % (title, answered, statuses))
        if KEY.encode("ascii") in out + err:
            self.wrong.append("%s: the API key was printed" % title)


def main(argv):
    """Run the demo; 0 if all arrived."""
    if len(argv) != 2 or not os.path.isfile(argv[1]):
        print("usage: demo.py ARCHIVE (make build makes dist/packtrack-logger.pyz)", file=sys.stderr)
        return 1
    batches = NUMBER // 100
    # One event, one array, then a 503 for the stream's second batch.
    script = [200, 200, 200, 503]
    with tempfile.TemporaryDirectory() as folder, StandIn(script=script) as server:
        print("%s on %s %s; the stand-in service listens on %s" % (
            os.path.basename(argv[1]), platform.python_implementation(), platform.python_version(),
            server.url))
        print("environment: PACKTRACK_API_KEY (kept secret), PACKTRACK_BASE_URL=%s" % server.url)
        demo = Demo(os.path.abspath(argv[1]), server, folder)
        array = [make_event("step %d" % number, metadata={"cart_total": 123.45, "step": number})
                 for number in (1, 2, 3)]
        stream = [make_event("event %d" % number, metadata={"number": number})
                  for number in range(1, NUMBER + 1)]
        with open(os.path.join(folder, "events.json"), "w") as file:
            json.dump(array, file, indent=2)
        with open(os.path.join(folder, "events.ndjson"), "w") as file:
            file.write("".join(json.dumps(one) + "\n" for one in stream))

        demo.step("1. One event from flags", [
            "--timestamp", "2025-01-01T00:00:00Z", "--source-system", "shop", "--workflow-id", "nightly",
            "--actor-type", "agent", "--actor-id", "a-42", "--severity", "info", "--status", "ok",
            "--message", "checkout completed", "--metadata", '{"cart_total":123.45}',
        ], [make_event("checkout completed", metadata={"cart_total": 123.45})], [200])
        demo.step("2. A file with a JSON array", ["--file", "events.json"], array, [200])
        demo.step("3. %d events as NDJSON through a pipe, gzipped; the server fails once on the way" % NUMBER,
                  ["--stdin", "--ndjson", "--gzip", "--json"], stream, [200, 503] + [200] * (batches - 1),
                  pipe="events.ndjson")
    wrong = demo.wrong + ["the server objected: %s" % why for why in server.checks]
    print()
    for line in wrong:
        print("WRONG: %s" % line)
    if not wrong:
        print("All %d records arrived, each once." % len(server.records))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
