#!/usr/bin/env python3
"""What `make demo` runs: demo.py ARCHIVE starts a stand-in of the service, sends one event from flags, a JSON
array, an NDJSON stream with a 503 on the way and the outcome of a command, and shows what arrives.

Exits 1 if anything does not arrive as it should. Standard library only; Python 3.6 or newer.
"""
import functools
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
import textwrap

from standin import KEY, StandIn

NUMBER = 5000
WHO = "--source-system shop --workflow-id nightly --actor-type agent --actor-id a-42".split()


def make_event(message, **metadata):
    """A complete event, as the service stores it."""
    return {"timestamp": "2025-01-01T00:00:00Z", "source": {"system": "shop"}, "workflow": {"id": "nightly"},
            "actor": {"type": "agent", "id": "a-42"}, "severity": "info", "status": "ok", "message": message,
            "metadata": metadata}


def perform(archive, server, folder, title, words, as_expected, statuses, pipe=None, code=0):
    """Run the program; as_expected(records) judges what arrived. What was wrong, as a list."""
    line = "cat %s | packtrack-logger " % pipe if pipe else "packtrack-logger "
    line += " ".join(shlex.quote(word).replace(" ", "\0") for word in words)  # a word is not folded
    lines = textwrap.wrap(line, 92, break_long_words=False, break_on_hyphens=False)
    print("\n%s\n   $ %s" % (title, " \\\n       ".join(lines).replace("\0", " ")))
    seen, before = len(server.records), len(server.requests)
    env = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": folder, "PACKTRACK_API_KEY": KEY,
           "PACKTRACK_BASE_URL": server.url}
    given = pathlib.Path(folder, pipe).read_bytes() if pipe else b""
    done = subprocess.run([sys.executable, archive, *words], cwd=folder, env=env, input=given,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        print("   %s" % line)
    requests, records = server.requests[before:], server.records[seen:]
    print("   exit code %d; at the server:" % done.returncode)
    lines = ["     %s %s  %-12s %7d bytes%s  -> %s" % (
        one.method, one.path, "array of %d" % len(one.json) if isinstance(one.json, list) else "object",
        len(one.raw_body), " (gzip)" if "content-encoding" in one.headers else "", one.status)
        for one in requests]
    if len(lines) > 6:
        lines[4:-1] = ["     ...  %d more" % (len(lines) - 5)]
    print("\n".join(lines))
    good, answered = as_expected(records), [request.status for request in requests]
    print("   records: %d, %s" % (len(records), "as expected" if good else "NOT AS EXPECTED"))
    return ["%s: %s" % (title, why) for wrong, why in (
        (done.returncode != code, "exit code %d" % done.returncode),
        (not good, "other records arrived than should"),
        (answered != statuses, "the server answered %s, not %s" % (answered, statuses)),
        (KEY.encode("ascii") in done.stdout, "the API key was printed")) if wrong]


def main(argv):
    """Run the demo; 0 if all arrived."""
    if len(argv) != 2 or not os.path.isfile(argv[1]):
        return "usage: demo.py ARCHIVE (make build makes dist/packtrack-logger.pyz)"
    # One event, one array, then a 503 for the stream's second batch.
    with tempfile.TemporaryDirectory() as folder, StandIn(script=[200, 200, 200, 503]) as server:
        print("%s on Python %s; the stand-in service listens on %s" % (
            os.path.basename(argv[1]), platform.python_version(), server.url))
        one = make_event("checkout completed", cart_total=123.45)
        array = [make_event("step %d" % number, step=number) for number in (1, 2, 3)]
        stream = [make_event("event %d" % number, number=number) for number in range(NUMBER)]
        pathlib.Path(folder, "events.json").write_text(json.dumps(array, indent=2))
        pathlib.Path(folder, "events.ndjson").write_text("".join(json.dumps(each) + "\n" for each in stream))
        command = ["sh", "-c", "exit 3"] if os.name == "posix" else [sys.executable, "-c", "exit(3)"]
        step = functools.partial(perform, os.path.abspath(argv[1]), server, folder)
        wrong = step("1. One event from flags", [
            *WHO, "--timestamp", one["timestamp"], "--severity", "info", "--status", "ok", "--message",
            one["message"], "--metadata", '{"cart_total": 123.45}'], [one].__eq__, [200])
        wrong += step("2. A file with a JSON array", ["--file", "events.json"], array.__eq__, [200])
        wrong += step(
            "3. %d events as NDJSON through a pipe, gzipped; the server fails once on the way" % NUMBER,
            "--stdin --ndjson --gzip --json".split(), stream.__eq__, [200, 503] + [200] * (NUMBER // 100 - 1),
            pipe="events.ndjson")
        wrong += step(
            "4. The outcome of a command, whose exit code stands", [*WHO, "--", *command],
            lambda records: [each["metadata"]["exit_code"] for each in records] == [3], [200], code=3)
    wrong += ["the server objected: %s" % why for why in server.checks]
    print("\n" + ("\n".join("WRONG: %s" % line for line in wrong) or
                  "All %d records arrived, each once." % len(server.records)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
