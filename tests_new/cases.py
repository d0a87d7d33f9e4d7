"""The rows of the tables, and how one is compared with what came out; conftest.py says what a row holds."""
import collections
import dataclasses
import difflib
import json
import os
import re
import shlex
import signal
from typing import Any

import pytest

import accept
import certs
from standin import KEY, RefusedPort, StandIn

FAST = ["--timeout", "400ms", "--retries", "1", "--backoff-initial", "1ms", "--backoff-max", "2ms"]
FLAGS = ["--timestamp", "2025-01-01T00:00:00Z", "--source-system", "shop", "--workflow-id", "wf-1",
         "--actor-type", "agent", "--actor-id", "a-1", "--severity", "info", "--status", "ok",
         "--message", "done"]
MISSING = object()


# ---- events ----------------------------------------------------------------------------------------------

def event(**overrides):
    """A complete valid event; `source__env="x"` sets a nested field, MISSING removes one."""
    result = {"timestamp": "2025-01-01T00:00:00Z", "source": {"system": "shop"}, "workflow": {"id": "wf-1"},
              "actor": {"type": "agent", "id": "a-1"}, "severity": "info", "status": "ok", "message": "done"}
    for name, value in overrides.items():
        part = result
        *path, last = name.split("__")
        for step in path:
            part = part.setdefault(step, {})
        if value is MISSING:
            del part[last]
        else:
            part[last] = value
    return result


def events(number, **overrides):
    """`number` valid events that differ in their message: "event 1", "event 2", ..."""
    return [event(message="event %d" % n, **overrides) for n in range(1, number + 1)]


def ndjson(records):
    """The records as bytes, one a line."""
    return b"".join(json.dumps(one, separators=(",", ":"), ensure_ascii=False).encode("utf-8") + b"\n"
                    for one in records)


def flags(**overrides):
    """FLAGS with some replaced: flags(message="x", timestamp=None) (None: left out)."""
    pairs = dict(zip(FLAGS[::2], FLAGS[1::2]))
    for name, value in overrides.items():
        pairs["--" + name.replace("_", "-")] = value
    return [word for pair in pairs.items() if pair[1] is not None for word in pair]


# ---- rows ------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Case:
    """A row; see the top of the file."""

    id: str
    argv: Any = ""
    env: Any = ()
    key: Any = True
    stdin: Any = None
    hold: bool = False
    files: Any = ()
    script: Any = ()
    default: Any = 200
    server: Any = ()
    proxy: Any = None
    proxied: Any = None
    kill: Any = ()
    redirect: Any = None
    python_flags: Any = ()
    secrets: Any = ()
    timeout: float = 30
    code: Any = 0
    err: Any = ""
    out: Any = ""
    json: Any = None
    requests: Any = 0
    sent: Any = None
    after: Any = ()
    both_forms: bool = False
    full: bool = False
    marks: Any = ()

    def __post_init__(self):
        self.place = accept.find_place()
        self.argv = shlex.split(self.argv) if isinstance(self.argv, str) else list(map(os.fspath, self.argv))


def rows(*cases):
    """A test for each of the cases."""
    def test(case, perform):
        __tracebackhide__ = True
        perform(case)
    assert len({case.id for case in cases}) == len(cases), "two rows of one id"
    test.cases = cases
    return test


def as_bytes(content, names):
    """What is to be in a file: bytes, text with names in it, or a list of events."""
    if isinstance(content, str):
        return substitute(content, names).encode("utf-8")
    return content if isinstance(content, bytes) else ndjson(content)


class Names(dict):
    """What {names} in a row stand for; some are made when first used."""

    def __init__(self, stack, **known):
        super().__init__(known)
        self.stack = stack

    def __missing__(self, name):
        if name == "root":
            self[name] = certs.authority().root
        else:
            self[name] = "127.0.0.1:%d" % self.stack.enter_context(RefusedPort()).port
        return self[name]


def substitute(text, names):
    """The text with {url} and its like replaced."""
    return re.sub(r"\{(url|host|port|proxy|refused|root|tmp)\}", lambda name: str(names[name.group(1)]), text)


WILD = {"<n>": r"\d+", "<s>": r"\d+(?:\.\d+)?", "<hash>": "[0-9a-f]+", "<...>": ".*",
        "<time>": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)"}


def matches(expected, actual, names):
    """Whether the text is what the template says."""
    parts = re.split("(%s)" % "|".join(map(re.escape, WILD)), substitute(expected, names))
    return re.fullmatch("".join(WILD.get(part) or re.escape(part) for part in parts), actual) is not None


def equal(expected, actual, names):
    """Whether the values are equal, the texts in them taken as templates."""
    if isinstance(expected, str) and isinstance(actual, str):
        return matches(expected, actual, names)
    if isinstance(expected, dict) and isinstance(actual, dict):
        return all(equal(value, actual.get(name), names) for name, value in expected.items())
    return expected == actual and isinstance(expected, bool) == isinstance(actual, bool)


def without_prefix(text):
    """Standard error as rows write it."""
    prefix = "packtrack-logger: "
    return "\n".join(line[len(prefix):] if line.startswith(prefix) else "| " + line
                     for line in text[:-1].split("\n")) if text.endswith("\n") else text and "| " + text


def request_differs(expected, request, names):
    """Whether a request is not what its row says."""
    if isinstance(expected, int):
        return len(request.events) != expected
    actual = {"events": len(request.events), "method": request.method, "path": request.path,
              "status": request.status, "headers": request.headers,
              "body": request.body if isinstance(expected.get("body"), bytes) else request.json}
    return not equal(expected, actual, names)


def compare_requests(expected, requests, names):
    """Whether the requests are as many as expected, or what each is said to be."""
    if expected is None or isinstance(expected, int):
        return expected in (None, len(requests))
    return len(expected) == len(requests) and not any(
        request_differs(one, request, names) for one, request in zip(expected, requests))


def perform_row(case, start, stand_in, folder, stack):
    """Run a row and compare all of it."""
    __tracebackhide__ = True
    server = proxy = None
    names = Names(stack, tmp=str(folder))
    if case.server is not False:
        key = case.key if isinstance(case.key, str) else KEY
        server = stand_in(script=case.script, default=case.default, **{"key": key, **dict(case.server)})
        names.update(url=server.url, port=server.port, host=server.url.split("/")[2])
    if case.proxy is not None:
        proxy = stack.enter_context(StandIn(case.proxy, strict=False))
        names["proxy"] = "127.0.0.1:%d" % proxy.port
    files = dict(case.files)
    argv = []
    for word in case.argv:
        many = re.fullmatch(r"\{events:(\d+)\}", word)
        if many:
            files["events.ndjson"] = events(int(many.group(1)))
            argv += ["--file", "events.ndjson", "--ndjson"]
        else:
            argv += {"{event}": FLAGS, "{fast}": FAST}.get(word) or [substitute(word, names)]
    made = {name: as_bytes(content, names) for name, content in files.items()}
    for name, content in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    process = start(*argv, stdin=None if case.stdin is None else as_bytes(case.stdin, names), hold=case.hold,
                    env={name: value and substitute(value, names) for name, value in dict(case.env).items()},
                    key=case.key, server=server, secrets=case.secrets, redirect=case.redirect, cwd=folder,
                    python_flags=case.python_flags, allow_codes=None)
    for number, moment in [case.kill] if case.kill and isinstance(case.kill[0], str) else case.kill:
        if isinstance(moment, int):
            server.wait_for_requests(moment)
        elif isinstance(moment, str):
            process.wait_for_err(substitute(moment, names))
        else:
            moment(process, server)
        process.send_signal(getattr(signal, "SIG" + number))
    result = process.result(case.timeout)
    requests = server.requests if server else []
    left = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file()}
    expected_files = {**made, **{name: None if content is None else as_bytes(content, names)
                                 for name, content in dict(case.after).items()}}
    actual = {
        "code": accept.code_name(result.code),
        "err": without_prefix(result.err), "out": result.out, "json": result.summary,
        "requests": requests, "proxied": proxy and proxy.requests,
        "sent": server and server.records,
        "after": {name: left.get(name) for name in {**left, **expected_files}}}
    sent_raw = case.sent and isinstance(case.sent[0], bytes)
    right = {
        "code": case.code == actual["code"],
        "err": case.err is None or matches(case.err, actual["err"], names),
        "out": case.out is None or (result.summary is not None and not case.out)
        or matches(case.out, result.out, names),
        "json": case.json is result.summary or equal(case.json, result.summary, names),
        "requests": compare_requests(case.requests, requests, names),
        "proxied": proxy is None or compare_requests(case.proxied, proxy.requests, names),
        "sent": case.sent is None or case.sent == (server.raw_records if sent_raw else server.records),
        "after": actual["after"] == expected_files}
    wrong = [name for name, holds in right.items() if not holds]
    if wrong:
        sources = {name: accept.source(case, name, actual[name], made, names) for name in wrong}
        accept.note(case, sources)
        pytest.fail("\n".join(show(name, getattr(case, name), actual[name], sources[name]) for name in wrong)
                    + "\n%r" % result, pytrace=False)
    if server and server.strict:
        assert server.checks == [], result
    check_cover(case, argv, files, server, left, result)


def show(name, expected, actual, source):
    """The two values one above the other, or as a diff where they are text."""
    if isinstance(expected, str) and isinstance(actual, str):
        lines = [line for line in difflib.ndiff(expected.split("\n"), actual.split("\n")) if line[0] != "?"]
        return "%s differs:\n  %s" % (name, "\n  ".join(lines))
    return "%s differs:\n  expected %r\n  actual   %s" % (name, expected, source)


def check_cover(case, argv, files, server, left, result):
    """Each record was delivered or kept, where the row says what was read and where to keep it."""
    given = [content for content in [*files.values(), case.stdin] if isinstance(content, list)]
    nothing_sent = result.code in (1, 4) and server and not server.requests and case.stdin is None
    if "--undelivered" not in argv or len(given) != 1 or nothing_sent or server is None:
        return
    count = collections.Counter(ndjson([one]) for one in given[0])
    count.subtract(ndjson([one]) for one in server.records)
    kept = left.get(argv[argv.index("--undelivered") + 1], b"")
    count.subtract(kept.splitlines(True))
    assert not +count, "neither delivered nor kept: %s\n%r" % (list(+count), result)
