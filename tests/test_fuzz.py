"""Mutated input, random command lines, random answers: seeded, bounded, in this process for volume.

FUZZ_SEED sets the seed, FUZZ_COUNT the number of mutations of a kind in the quick suite. A failure names
its kind, seed and number; a past failure is kept in PAST.

What holds: a documented exit code, no exception, no key in any output, an end within the time, an account
that adds up; what is sent is valid (the stand-in objects otherwise); exit 0 means that everything was
delivered; exit 1 and 4 without --async and --keep-going mean that nothing was.
"""
import contextlib
import gc
import json
import os
import random
import signal
import sys
import time

import pytest

from conftest import KEY, event, flags, ndjson
from standin import RefusedPort, Reply, StandIn

SEED = int(os.environ.get("FUZZ_SEED", "20251125"))
QUICK = int(os.environ.get("FUZZ_COUNT", "100"))
AMOUNTS = {"input": 9000, "argv": 6000, "answer": 5000}  # in all: 20,000
LONGEST = 20  # seconds; nothing here has reason to take one
FASTER = {"PACKTRACK_BACKOFF_INITIAL": "1ms", "PACKTRACK_BACKOFF_MAX": "2ms", "PACKTRACK_RETRIES": "1",
          "PACKTRACK_TIMEOUT": "300ms", "PACKTRACK_FLUSH_INTERVAL": "1ms"}


class Outcome:
    def __init__(self, code, out, err, seconds):
        self.code, self.out, self.err, self.seconds = code, out, err, seconds
        self.summary = None

    def __repr__(self):
        return "exit %r after %.2f s\n out: %s\n err: %s" % (self.code, self.seconds, self.out[-500:],
                                                             self.err[-1500:])


@pytest.fixture
def call(capfd, monkeypatch, tmp_path):
    """call(argv, env, stdin) -> Outcome: the program's main in this process, in an environment of its own."""
    import packtrack_logger

    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    kept, environ = os.dup(0), dict(os.environ)
    capfd.readouterr()

    def run(argv, env, stdin=b""):
        path = tmp_path / "standard-input"
        path.write_bytes(stdin)
        with open(str(path), "rb") as file:
            os.dup2(file.fileno(), 0)
        os.environ.clear()
        os.environ.update(env)
        began = time.monotonic()
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(monkeypatch.context()).setattr(sys, "stdin", open(0, closefd=False))
                code = packtrack_logger.main(list(argv))
        except SystemExit as stop:
            code = stop.code
        finally:
            os.environ.clear()
            os.environ.update(environ)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            gc.enable()
        seconds = time.monotonic() - began
        sys.stdout.flush()
        sys.stderr.flush()
        return Outcome(code, *capfd.readouterr(), seconds)

    yield run
    os.dup2(kept, 0)
    os.close(kept)


def environment(server, more=()):
    return {"PATH": os.environ.get("PATH", ""), "PACKTRACK_API_KEY": KEY, "PACKTRACK_BASE_URL": server.url,
            **FASTER,
            **dict(more)}


def check(outcome, argv, server, codes=(0, 1, 2, 3, 4), keeps=False):
    """What holds for every run; the summary, if one was asked for."""
    assert outcome.code in codes
    assert KEY not in outcome.out + outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.seconds < LONGEST
    assert server.checks == [], "what is sent must be valid"
    if "--json" in argv and outcome.out.strip():
        summary = outcome.summary = json.loads(outcome.out.splitlines()[-1])
        assert summary["read"] == summary["delivered"] + summary["undelivered"] + summary["invalid"]
        assert summary["exit_code"] == outcome.code
        if outcome.code == 0 and not keeps:
            assert summary["read"] == summary["delivered"]
        if outcome.code in (1, 4) and not {"--async", "--keep-going"} & set(argv):
            assert summary["delivered"] == 0
    return outcome.summary


@contextlib.contextmanager
def told(kind, number, *what):
    """Name the mutation that fails."""
    try:
        yield
    except Exception as error:
        raise AssertionError("FUZZ_SEED=%d, %s %d: %s\n%r" % (
            SEED, kind, number, "\n".join(ascii(one)[:20000] for one in what), error)) from error


def numbers(kind):
    """The mutations of a kind: a few, and all of them in the full suite."""
    few = QUICK // 2 if kind == "answer" else QUICK  # an answer that does not end takes its time
    return pytest.mark.parametrize("span", [
        pytest.param(range(few), id="seed %d" % SEED),
        pytest.param(range(few, AMOUNTS[kind]), id="seed %d, all" % SEED, marks=pytest.mark.full),
    ])


# ---- input -------------------------------------------------------------------------------------------------

RICH = [
    event(), event(message="Gr\u00fc\u00dfe \u2028 \U0001f4e6 \\ \" \n"),
    event(metadata={"n": 10 ** 30, "d": 1.10, "l": [1, [2]]}),
    event(source__env="prod", workflow__name="n", workflow__run_id="r", workflow__step_id="s",
          actor__display_name="d",
          extra={"a": {"b": None}}),
    {key: value for key, value in event().items() if key not in ("timestamp", "source")},
]
BASES = [ndjson(RICH), ndjson(RICH[:2]).replace(b"\n", b"\r\n"), json.dumps(RICH).encode(),
         json.dumps(RICH, indent=2).encode(),
         json.dumps(RICH[1]).encode(), json.dumps(RICH[3], indent=1, ensure_ascii=False).encode(),
         ndjson(RICH * 20)]
TOKENS = [b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r\n", b"\x00", b"\xff", b"\xc3",
          b"\xef\xbb\xbf", b"\\ud800", b"\\u0000",
          b"NaN", b"-Infinity", b"1e999", b"-0", b"01", b"null", b"true", b"{}", b"[]", b"/*x*/", b"'", b" ",
          b"\t", b"\x0b", b"\x0c",
          b"\xe2\x80\xa8", b"\xc2\x85", b"9" * 5000, b"[" * 600, b'{"a":' * 600, b'"severity":"loud",',
          b'"message":"",', b'"source":null,',
          b'"metadata":[],', b'"timestamp":"0000-01-01T00:00:00Z",', b'"message":1,', b'"x":1,',
          b'"extra":{"a":1},', b"x" * 70000]


def mutate(data, chance, tokens=TOKENS):
    """Flip, cut, double, insert, exchange: one to four times."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 2, 8, 100, 3000)))
        how = chance.randrange(7)
        if how == 0 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif how == 1 and at < len(data):
            data[at] = chance.randrange(256)
        elif how == 2:
            del data[at:end]
        elif how == 3:
            data[at:at] = data[at:end]
        elif how == 4:
            data[at:at] = chance.choice(tokens)
        elif how == 5:
            data[at:end] = chance.choice(tokens)
        else:
            del data[at:]
    return bytes(data)


def is_contained(part, whole):
    """Whether a record arrived with all that it said (null says nothing)."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(value is None or name in whole and is_contained(value, whole[name]) for name,
                   value in part.items())
    return type(part) is type(whole) and part == whole


def make_input(number):
    chance = random.Random("%d input %d" % (SEED, number))
    base = chance.choice(BASES)
    is_lines = base in (BASES[0], BASES[1], BASES[6])
    argv = ["--json"] + ["--ndjson"] * (is_lines if chance.random() < 0.9 else not is_lines)
    argv += chance.choice([[], [], ["--async"], ["--async", "--queue-capacity", "1"], ["--keep-going"],
                           ["--async", "--keep-going"]])
    argv += chance.choice([[], [], ["--batch-size", "1"], ["--batch-size", "3"],
                           ["--max-batch-bytes", "400"]])
    argv += chance.choice([[], [], [], ["--gzip"], ["--idempotency-key", "auto"], ["--verbose"]])
    argv += chance.choice([["--source-system", "cron"], ["--source-system", "cron", "--workflow-id", "w",
                                                         "--metadata",
                                                         '{"k":[1]}', "--severity", "warn"], []])
    data = mutate(base, chance) if chance.random() < 0.97 else base
    return argv, data


def check_input(outcome, argv, data, server, kept):
    summary = check(outcome, argv, server)
    got = server.records
    assert summary["delivered"] == len(got)
    if outcome.code in (1, 4) and not {"--async", "--keep-going"} & set(argv):
        assert not server.requests
    if outcome.code == 0:
        text = data.decode("utf-8-sig")
        if "--ndjson" in argv:
            sent = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            sent = json.loads(text)
            sent = sent if isinstance(sent, list) else [sent]
        assert len(sent) == len(got)
        assert all(map(is_contained, sent, got)), "records go out as they came"
        assert kept == b""
    else:
        assert outcome.err
        if "--ndjson" in argv and "--async" in argv and "--keep-going" in argv:
            # One line of the input is one record: whatever was not delivered is in the file, as it came.
            came = [line.strip(b" \t\r") for line in data.split(b"\n")]
            came.append(came[0].lstrip(b"\xef\xbb\xbf").strip(b" \t\r"))
            assert all(not line or line.strip(b" \t\r") in came for line in kept.split(b"\n"))


@numbers("input")
def test_mutated_input(span, call, run, tmp_path):
    path, left = tmp_path / "input", tmp_path / "left"
    for number in span:
        argv, data = make_input(number)
        path.write_bytes(data)
        with contextlib.suppress(OSError):
            left.unlink()
        argv = argv + ["--undelivered", str(left)]
        with told("input", number, argv, data), StandIn() as server:
            if number % 100 == 7:
                result = run(*argv, *(["--stdin"] if number % 200 == 7 else ["--file", path]), server=server,
                             stdin=data if number % 200 == 7 else None, env=FASTER)
                outcome = Outcome(result.code, result.out, result.err, result.seconds)
            elif number % 5 == 0:
                outcome = call(argv + ["--stdin"], environment(server), data)
            else:
                outcome = call(argv + ["--file", str(path)], environment(server))
            check_input(outcome, argv, data, server, left.read_bytes() if left.exists() else b"")


# ---- command lines -----------------------------------------------------------------------------------------

JUNK = ["", "-", "--", "x", "-x", "0", "-1", "1_0", "\u0663", "nan", "inf", "1e9", "99999999999999999999",
        "\udcff", "\u00e9", "\n", "a\r\nb: c",
        "{", "[]", '{"a":1}', '{"a":NaN}', "\x00", "\x1b[31m", " ", "1h1h", "5", "1.5", ".5s", "100ms",
        "true", "off", "%s%n{}", "a" * 300,
        "[" * 600, "9" * 5000 + "s", KEY]


def make_argv(number, options, urls, files):
    """A command line from the option table, values from pools that hold right and wrong ones."""
    chance = random.Random("%d argv %d" % (SEED, number))
    good = {"api-key": ["key-of-nobody", KEY], "api-key-file": files, "base-url": urls,
            "health-path": ["/api/health", "/x", "x"],
            "file": files, "undelivered": ["left"], "output": ["out", "-"], "deadline": ["5s", "10s"],
            "timeout": ["300ms", "1s"], "retries": ["0", "1", "2"], "backoff-initial": ["1ms"],
            "backoff-max": ["2ms"],
            "metadata": ['{"a":1}', "{}"], "extra": ['{"a":[]}'], "timestamp": ["2025-01-01T00:00:00Z"],
            "command-timeout": ["5s"], "flush-interval": ["1ms"], "user-agent": ["a b"],
            "jitter": ["0", "1", "0.5"]}
    slow = {"timeout", "deadline", "backoff-initial", "backoff-max", "retries", "command-timeout",
            "flush-interval"}
    bad_slow = [value for value in JUNK if value not in ("5", "1.5", "1h1h", "1e9")]

    def value_of(option):
        pool = good.get(option.name) or list(option.choices) or ["1", "3", "some text"]
        if chance.random() < 0.9:
            return chance.choice(pool)
        return chance.choice(bad_slow if option.name in slow else JUNK)

    argv = flags() if chance.random() < 0.6 else []
    for option in chance.sample(options, chance.choice((0, 1, 2, 3, 6))):
        name = option.flag
        if chance.random() < 0.1:
            name = option.is_boolean and option.opposite or name[:-1]
        if option.is_boolean:
            argv.append(name if chance.random() < 0.95 else name + "=" + chance.choice(JUNK))
        elif chance.random() < 0.5:
            argv.append(name + "=" + value_of(option))
        else:
            argv += [name, value_of(option)]
    if chance.random() < 0.03:
        argv.insert(chance.randrange(len(argv) + 1), chance.choice(JUNK))
    if chance.random() < 0.03:
        chance.shuffle(argv)
    env = {}
    for option in chance.sample(options, chance.choice((0, 0, 1, 3))):
        if option.name == "api-key" or not option.variable:
            continue  # what stands in KEY's place would not be known as a secret
        env[option.variable] = ("1" if option.is_boolean else value_of(option)).replace("\0", "")
    if chance.random() < 0.05:
        argv += ["--", *chance.choice([["true"], ["false"], ["sh", "-c", "exit 7"], ["/nonexistent/command"],
                                       []])]
    return argv, env


@numbers("argv")
def test_random_command_lines(span, call, run, tmp_path):
    from packtrack_logger import OPTIONS
    (tmp_path / "key").write_text("k\n")
    (tmp_path / "events.ndjson").write_bytes(ndjson(RICH))
    (tmp_path / "array.json").write_text(json.dumps(RICH))
    (tmp_path / "bad.ndjson").write_bytes(ndjson(RICH[:1]) + b"{}\n")
    files = ["key", "events.ndjson", "array.json", "bad.ndjson", "missing", "."]
    with RefusedPort() as refused:
        for number in span:
            with StandIn(strict=False) as server:
                urls = [server.url, server.url + "/prefix/", refused.url, "http://name.invalid", "ftp://x",
                        "http://u:p@x"]
                argv, env = make_argv(number, OPTIONS, urls[:3] if number % 50 else urls, files)
                is_command = "--" in argv
                codes = (0, 1, 2, 3, 4, 7, 126, 127) if is_command else (0, 1, 2, 3, 4)
                own = argv[:argv.index("--")] if is_command else argv
                keeps = any("dry-run" in word or "no-flush" in word for word in own) or {
                    "PACKTRACK_DRY_RUN", "PACKTRACK_NO_FLUSH"} & set(env)
                if {"--help", "--version", "-h", "-V"} & set(own) or "--completion" in " ".join(own):
                    argv = [word for word in argv if word != "--json"]
                with told("argv", number, argv, env):
                    if number % 100 == 7 and not any("\0" in word for word in argv):
                        words = [word.encode("utf-8", "surrogateescape") for word in argv]
                        result = run(*map(os.fsdecode, words), server=server, cwd=tmp_path, allow_codes=codes,
                                     env={**FASTER, **env})
                        outcome = Outcome(result.code, result.out, result.err, result.seconds)
                    else:
                        outcome = call(argv, environment(server, env), ndjson(RICH))
                    check(outcome, [] if is_command else argv, server, codes, keeps)


# ---- answers -----------------------------------------------------------------------------------------------

ANSWERS = [Reply(status, headers=[("Retry-After", "0"), ("Location", "http://127.0.0.1:9/")]).head() + b"{}"
           for status in (200, 201, 204, 301, 400, 401, 413, 429, 500, 503)]
ANSWERS += [
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: y\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nbody",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00",
]
ANSWER_TOKENS = [b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\0", b"\xff", b" ", b"\t", b":", b"HTTP/1.1 ",
                 b"HTTP/1.1 200 OK\r\n", b"HTTP/9.9 ", b"200", b"413", b"-1",
                 b"99999999999999999999999", b"9" * 5000, b"Content-Length: 5\r\n",
                 b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
                 b"Retry-After: 0\r\n", b"Retry-After: 99\r\n", b"Location: file:///etc/passwd\r\n",
                 b"x" * 70000, b"X: y\r\n" * 110, b"ffffffffffffffff\r\n",
                 KEY.encode(), b"\x1b[2J", b"\xe2\x80\xae", b"\xf0\x9f\x93\xa6", b"%s{}"]


def make_answer(number):
    """Bytes for the first answer, those for each further one, and flags."""
    chance = random.Random("%d answer %d" % (SEED, number))
    first, second = (mutate(chance.choice(ANSWERS), chance, ANSWER_TOKENS) for _ in range(2))
    argv = ["--json", "--retries", chance.choice("012")]
    argv += chance.choice([[], [], ["--verbose"], ["--async"], ["--keep-going"], ["--health"],
                           ["--health-enable"]])
    argv += ["--stdin", "--ndjson", *chance.choice([[], ["--batch-size",
                                                         "1"]])] if chance.random() < 0.5 else flags()
    return argv, first, second, chance.random() < 0.05


@numbers("answer")
def test_random_answers(span, call, run):
    for number in span:
        argv, first, second, hangs = make_answer(number)
        sent = []

        def answer(server, sock, request, first=first, second=second, hangs=hangs, sent=sent):
            data = second if sent else first
            sent.append(data)
            sock.sendall(data)
            if hangs:
                server.hang(sock)

        with told("answer", number, argv, first, second, hangs), StandIn(default=answer) as server:
            if number % 100 == 7:
                result = run(*argv, server=server, stdin=ndjson(RICH[:3]), env=FASTER)
                outcome = Outcome(result.code, result.out, result.err, result.seconds)
            else:
                outcome = call(argv, environment(server), ndjson(RICH[:3]))
            codes = (0, 1) if "--health" in argv else (0, 2, 3)
            summary = check(outcome, argv, server, codes)
            if summary["delivered"]:
                assert any(b"HTTP/1." in data and b" 2" in data for data in sent), "no answer said so"
            if "--health" not in argv:
                probes = 1 if "--health-enable" in argv else 0
                assert len(server.requests) + len(server.incomplete) <= summary["requests"] + probes


# ---- past failures -----------------------------------------------------------------------------------------

LINE = ndjson([event()])
PAST = [  # (id, flags, input, exit code, what --undelivered keeps)
    ("a raw CR inside a string is not made a blank, which would be valid", ["--ndjson", "--keep-going"],
     LINE + LINE.replace(b"done", b"do\rne"), 4, LINE.replace(b"done", b"do\rne")),
]


@pytest.mark.parametrize("argv, data, code, kept", [pytest.param(*row[1:], id=row[0]) for row in PAST])
@pytest.mark.parametrize("mode", [(), ("--async",)], ids=["sync", "async"])
def test_past_failure(mode, argv, data, code, kept, run, server, tmp_path):
    path, left = tmp_path / "input", tmp_path / "left"
    path.write_bytes(data)
    result = run("--json", *argv, *mode, "--file", path, "--undelivered", left, server=server)
    assert result.code == code, result
    assert (left.read_bytes() if left.exists() else b"") == kept
