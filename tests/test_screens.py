"""What people see, on a terminal of 80 and of 40 columns: the screens are kept in tests/screens/.

ACCEPT=write keeps what is seen now: look at the diff.
"""
import os
import re
import shlex
import threading

import pytest

from conftest import ROOT, clean_environment, events, ndjson
from standin import Reply, StandIn
from steps import SILENT
from terminal import Terminal

WHO = "--source-system shop --workflow-id nightly --actor-type host --actor-id db1"
REFUSED = Reply(400, body='{"error": "severity: unknown word"}')
BUSY = Reply(503, reason="Service Unavailable", body="<html><h1>busy</h1></html>")
FILE = "--file events.ndjson --ndjson"
# Name: the command line, what the server answers.
CASES = {
    "short-help": ("-h", []), "no-arguments": ("", []), "success": (FILE, []),
    "misspelt-flag": ("--mesage done", []), "missing-fields": ("--message done", []),
    "usage-error": (WHO + " --severity info --status success --message done", []),
    "refused": (FILE + " --undelivered left.ndjson", [200, REFUSED]),
    "retried": (FILE + " --verbose --retries 1 --backoff-initial 1ms", [BUSY, 200, BUSY, BUSY]),
    "keep-going": (FILE + " --keep-going --batch-size 400", [REFUSED, 200, REFUSED]),
    "bad-record": ("--file bad.ndjson --ndjson", []), "command-not-found": (WHO + " -- backup.sh --full", []),
    "command": (WHO + " -- sh -c 'echo working; sleep 1.1; echo done'", []),
    "command-not-reported": (WHO + " --undelivered left.ndjson -- sh -c 'echo working; exit 3'", [REFUSED]),
}


@pytest.fixture(params=[80, 40])
def window(request, argv_of, home, tmp_path):
    """window(arguments, server) -> a Terminal where a shell runs the program and then prompts again."""
    (tmp_path / "events.ndjson").write_bytes(ndjson(events(1000)))
    (tmp_path / "bad.ndjson").write_bytes(ndjson(events(2)) + b'{"message": "three", "sevrity": "info"}\n')

    def start(arguments, server):
        env = clean_environment(home, {"TYPED": "packtrack-logger " + arguments}, True, server)
        script = "echo \"$ $TYPED\"; unset TYPED; \"$0\" \"$@\"; printf '$ '"
        argv = ["sh", "-c", script, *argv_of(*shlex.split(arguments))]
        terminal = Terminal("leader", argv, env, tmp_path, request.param, rows=80)
        request.addfinalizer(terminal.close)
        return terminal

    return start


def compare(name, terminal, screen):
    """The screen is the one that is kept; what differs from run to run is left out, at its width."""
    screen = re.sub(r"(?<=127\.0\.0\.1:)\d+|\d+(?=/s)", lambda match: "9" * len(match.group()), screen)
    screen = re.sub(r"(?<=[( ])\d+ ms\b", "9 ms", screen)
    path = ROOT / "tests" / "screens" / ("%s-%d.txt" % (name, terminal.columns))
    if os.environ.get("ACCEPT") == "write":
        path.write_text(screen, encoding="utf-8")
    assert screen == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(CASES))
def test_screen(name, window):
    arguments, script = CASES[name]
    with StandIn(script=script) as server:
        terminal = window(arguments, server)
        compare(name, terminal, terminal.last_screen())


@pytest.mark.parametrize("name, status", [("ended", 200), ("failed", 400)])
def test_progress(name, status, window):
    held = threading.Event()
    with StandIn(script=[*[200] * 5, Reply(delay=1.1), Reply(status, delay=held)]) as server:
        terminal = window(FILE, server)
        compare("progress", terminal, terminal.wait_for_screen("/s"))
        held.set()
        compare("progress-" + name, terminal, terminal.last_screen())


def test_interrupted(window):
    with StandIn(script=[200], default=SILENT) as server:
        terminal = window(FILE, server)
        server.wait_for_requests(2)
        terminal.type(b"\x03")
        compare("interrupted", terminal, terminal.last_screen())
