"""The command line: what each option takes and refuses, which of several wins, and what is printed.

The values that options take and refuse are tried on resolve() itself, from the flag and from the variable,
and a few with the program. pure has the parsers, wrapper what goes with a command.
"""
import os
import re

import pytest

import packtrack_logger as pl
from conftest import KEY, Case, event, events, flags, rows
from standin import Reply, StandIn

SECRET = "s3cr3t-va1ue"
ONLY_LINUX = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
ALL = {  # every event option: what it fills in, and two texts
    **{name: (field, "one", "two \u2713") for name, field in (pair.split("=") for pair in (
        "message=message source-system=source__system source-env=source__env workflow-id=workflow__id "
        "workflow-name=workflow__name run-id=workflow__run_id step-id=workflow__step_id "
        "actor-type=actor__type actor-id=actor__id actor-display=actor__display_name").split(" "))},
    "timestamp": ("timestamp", "2024-02-29T23:59:60.5+01:00", "2023-01-01T00:00:00Z"),
    "severity": ("severity", "debug", "error"), "status": ("status", "skipped", "timeout"),
    "metadata": ("metadata", '{"a":[1,null]}', '{"b":"\u00fc"}'), "extra": ("extra", '{"n":1.2}', '{"z":{}}'),
}
ONE_BYTES = len(pl.dump_json(event()))
SENT = "\nrecord 1: %d bytes to {url}\nattempt 1/4: HTTP 200 (<n> ms)" % ONE_BYTES


def variable(name):
    return "PACKTRACK_" + name.upper().replace("-", "_")


def whole(number):
    return event(**{value[0]: pl.parse_json(value[number]) if value[number][0] == "{" else value[number]
                    for value in ALL.values()})


def missing(*names):
    return "error: missing required %s (or %s)" % (", ".join("--" + name for name in names),
                                                   ", ".join(map(variable, names)))


ONE = [word for name, value in ALL.items() for word in ("--" + name, value[1])]
TWO = {variable(name): value[2] for name, value in ALL.items()}
METADATA = '{"a":1,"b":2}'
TEXT = '" \\ \n \t \x1b \x7f \u2028 \U0001f4e6'
test_events = rows(
    Case("flags", ONE, requests=1, sent=[whole(1)], both_forms=True),
    Case("variables", "", env=TWO, requests=1, sent=[whole(2)], both_forms=True),
    Case("flags over variables", ONE, env=TWO, requests=1, sent=[whole(1)]),
    Case("empty", [*flags(timestamp=""), *["--%s=" % name for name in ALL if pl.BY_NAME[name].field not in (
        *pl.REQUIRED, "timestamp")]], requests=[{"body": event(timestamp="<time>")}]),
    *[Case("text, " + name, flags(message=TEXT), {"LC_ALL": name}, requests=1, sent=[event(message=TEXT)])
      for name in ("C", "C.UTF-8", "none")],
    Case("--meta", "{event} --meta a=b --meta c==d= --meta=e= --meta a=last", requests=1,
         sent=[event(metadata={"a": "last", "c": "=d=", "e": ""})]),
    *[Case("--meta over " + id, ["{event}", "--meta", "a=x", *argv], env, requests=1,
           sent=[event(metadata={"a": "x", "b": 2})]) for id, argv, env in (
        ("the rest", ["--metadata", METADATA], {}), ("the variable", [], {"PACKTRACK_METADATA": METADATA}))],
    Case("--meta for records", "--file in.json --meta a=x", files={"in.json": [event(metadata={"b": 1})]},
         requests=1, sent=[event(metadata={"b": 1, "a": "x"})]),
    Case("--dry-run", "{event} --dry-run --output out", key=False),
    Case("PACKTRACK_DRY_RUN", "{events:3} --json", key=False, env={"PACKTRACK_DRY_RUN": "yes"},
         json={"ok": True, "read": 3, "requests": 0}),
    Case("invalid", "--file in --ndjson --dry-run", key=False, files={"in": [event(), event(message="")]},
         code=1, err="error: in:2: message: must not be empty; 2 records read, 1 invalid, none sent"),
    Case("isolated", "{event}", python_flags=["-I"], requests=1, sent=[event()]),
)
SEVERITY = "must be one of debug, info, warn, error (got "
TIMESTAMP = "must be an RFC 3339 time such as 2025-11-25T09:30:00Z (got "
HINT = "; standard input was not read: add --stdin"
SIX = "source-system", "workflow-id", "actor-type", "actor-id", "severity", "status"
test_event_flags = rows(
    Case("one is missing", flags(severity=None), code=1, err=missing("severity")),
    Case("all are missing", "--dry-run", code=1, err=missing(*SIX, "message")),
    Case("a pipe waits", "--message x", stdin=b"", code=1, err=missing(*SIX) + HINT),
    Case("a file waits", "--message x", redirect="<in", files={"in": "{}"}, code=1, err=missing(*SIX) + HINT),
    Case("empty", flags(actor_id=None), {"PACKTRACK_ACTOR_ID": ""}, code=1, err=missing("actor-id")),
    *[Case(" ".join(argv), argv, code=1, err="error: %s: %s" % (argv[0], why)) for argv, why in (
        (("--severity", "loud"), SEVERITY + '"loud")'),
        (("--severity", "INFO"), SEVERITY + '"INFO"); did you mean "info"?'),
        (("--status", "success"), 'must be one of ok, failed, skipped, timeout, retrying, unknown (got '
         '"success"); did you mean "ok"?'), (("--timestamp", "now"), TIMESTAMP + '"now")'),
        (("--timestamp", "2025-01-01T10:00:00"), TIMESTAMP + '"2025-01-01T10:00:00"): missing time zone, '
         'e.g. Z'), (("--message", "\udcff"), "must be UTF-8"))],
    *[Case(name, flags(**{name: None}), {variable(name): value}, code=1, err="error: " + variable(name) + why)
      for name, value, why in (("message", "\udce4", ": must be UTF-8"), (
          "severity", "eror", ': %s"eror"); did you mean "error"?' % SEVERITY))],
    Case("a key with spaces", flags(severity="a  key to it"), key="a  key to it", code=1,
         err='error: --severity: %s"***")' % SEVERITY, secrets=["key to it"]),
    *[Case("the key in it, %d" % len(argv), [*flags(severity="x" * 180 + KEY), *argv], key=not argv, code=1,
           err='error: --severity: %s"%s***")' % (SEVERITY, "x" * 180), secrets=[KEY[:6]])
      for argv in ([], ["--api-key=" + KEY], ["--api-key", KEY])],
)
USAGE = "".join("\n| " + line for line in pl.SHORT_USAGE.splitlines())
HIDDEN = ("unexpected argument (hidden, it may be a secret): quote values that contain spaces, read files "
          "with --file, put -- before a command")
REFUSED = """
--api-kye SECRET | unknown flag --api-kye (did you mean "--api-key"?); see --help
"--api-key SECRET" | --api-key and what follows must be separate words
--api-keySECRET | unknown flag --api-key... (did you mean "--api-key-file"?); see --help
-SECRET | unknown flag -s; see --help
-vSECRET | -v and what follows must be separate words
-hv | -h and what follows must be separate words
--mässage x | unknown flag --m (did you mean "--message"?); see --help
--zzz | unknown flag --zzz; see --help
--mess x | unknown flag --mess (did you mean "--message"?); see --help
--no-gzipp | unknown flag --no-gzipp (did you mean "--no-gzip"?); see --help
--gzipp | unknown flag --gzipp (did you mean "--gzip"?); see --help
-timeout 5s | unknown flag -t (did you mean "--timeout"?); see --help
SECRET | <hidden>
'' | <hidden>
--ndjson=true x | <hidden>
--ndjson events.ndjson | --ndjson takes no value (to read a file: --file PATH)
-v true | -v takes no value (to read a file: --file PATH)
--version=x | --version: must be true or false
--message | --message needs a value (TEXT)
-- | --: a command must follow
--completion tcsh | --completion: must be one of bash, zsh, fish (got "tcsh")
--meta ab | --meta: must be KEY=VALUE, e.g. region=eu
--metadata null | --metadata: must be a JSON object
--extra '"SECRET"' | --extra: must be a JSON object
--metadata {SECRET | --metadata: invalid JSON: expecting property name enclosed in double quotes at column 2
--source-system= | --source-system is empty (is the variable set?)
--file in --stdin | --file and --stdin cannot be used together
--ndjson | --ndjson needs --file or --stdin
--allow-empty | --allow-empty needs --file or --stdin
--no-flush | --no-flush needs --async
--strict | --strict needs a command after --
--command-timeout 5s | --command-timeout needs a command after --
--file x -- true | --file cannot be combined with a command
--stdin -- true | --stdin cannot be combined with a command
--ndjson -- true | --ndjson cannot be combined with a command
--allow-empty -- true | --allow-empty cannot be combined with a command
--health -- true | --health cannot be combined with a command
"""


test_usage = rows(
    *[Case(argv, argv.replace("SECRET", SECRET), code=1, err="error: " + err.replace("<hidden>", HIDDEN),
           secrets=[SECRET]) for argv, err in (line.split(" | ") for line in REFUSED.strip().split("\n"))],
    Case("nothing", "", code=1, err="error: nothing to send" + USAGE, both_forms=True),
    Case("nothing, and a pipe waits", env={"PACKTRACK_ACTOR_ID": "s"}, stdin=b"{}", code=1,
         err="error: nothing to send" + HINT + USAGE),
    Case("a stray file", "in", files={"in": "[]"}, code=1,
         err="error: unexpected argument: to send a file use --file PATH (one per run)"),
    Case("invisible", ["--x\x1b[1m"], code=1, err="error: unknown flag --x; see --help"),
    Case("long", "--" + "z" * 300, code=1, err="error: unknown flag --%s; see --help" % ("z" * 198)),
    *[Case("the message " + " ".join(words), [*flags(message=None), *words], requests=1,
           sent=[event(message=words[-1].replace("--message=", "", len(words) == 1))])
      for words in [*(("--message", text) for text in ("-done-", "--", "-h", "--json=1", "-1", "=")),
                    *(("--message=" + text,) for text in ("-x", "--", "a=b"))]],
    Case("unknown variables", "{event}", requests=1, env={
        "": "x", **{variable(name): "x" for name in ("version", "help", "completion", "meta", "")}}),
    Case("empty variables", "{event}", requests=1, env={
        variable(option.name): "" for option in pl.OPTIONS if option.name not in ("api-key", "base-url")}),
)
test_sources = rows(
    Case("both variables", "", env={"PACKTRACK_FILE": "in", "PACKTRACK_STDIN": "1"}, code=1,
         err="error: PACKTRACK_FILE and PACKTRACK_STDIN cannot be used together"),
    *[Case(id, argv, env=env, files={"in": [event(message="file")]}, stdin=[event(message="stdin")],
           requests=1, sent=[event(message=wanted)]) for id, argv, env, wanted in (
        ("--file beats PACKTRACK_STDIN", "--file in", {"PACKTRACK_STDIN": "1"}, "file"),
        ("--stdin beats PACKTRACK_FILE", "--stdin", {"PACKTRACK_FILE": "in"}, "stdin"),
        ("--file beats PACKTRACK_FILE", "--file in", {"PACKTRACK_FILE": "none"}, "file"),
        ("PACKTRACK_FILE", "", {"PACKTRACK_FILE": "in"}, "file"),
        ("PACKTRACK_STDIN", "", {"PACKTRACK_STDIN": "y", "PACKTRACK_NDJSON": "y"}, "stdin"),
        ("--no-stdin", "--no-stdin", {"PACKTRACK_STDIN": "1", "PACKTRACK_FILE": "in"}, "file"),
        ("--file -", "--file -", {}, "stdin"), ("--file=-", "--file=- --ndjson", {}, "stdin"))],
    Case("standard input is not read", "{event}", stdin=b"x", hold=True, requests=1, sent=[event()]),
)
KEY_FILES = {"key": KEY + "\nsecond line\n", "bare": KEY, "spaced": "  %s\t\r\n" % KEY, "other": "other-key",
             "empty": "", "blank": "\n" + KEY, "odd": SECRET + "\x1b[1m", "utf-16": SECRET.encode("utf-16")}
FILE, FILE_VARIABLE, VARIABLE = "--api-key-file", "PACKTRACK_API_KEY_FILE", "PACKTRACK_API_KEY"
NO_KEY = "error: no API key: set PACKTRACK_API_KEY, or use --api-key-file or --api-key"
STDIN = " cannot be standard input: the events come from it"
UNFIT = "contains characters not allowed in a header (not shown)"
test_api_key = rows(
    *[Case(id, ["{event}", *argv], key=False, env=env, requests=[{"headers": {"x-packtrack-key": KEY}}],
           files=KEY_FILES) for id, argv, env in (
        ("flag", ["--api-key", KEY], {}), ("variable", [], {VARIABLE: KEY}), ("file", [FILE, "key"], {}),
        ("file variable", [], {FILE_VARIABLE: "key"}), ("no newline", [FILE, "bare"], {}),
        ("spaces", [FILE, "spaced"], {}), ("flag over variable", ["--api-key=" + KEY], {VARIABLE: "another"}),
        ("file over key variable", [FILE, "key"], {VARIABLE: "another"}),
        ("file over file variable", [FILE, "key"], {FILE_VARIABLE: "none"}),
        ("flag over file", ["--api-key", KEY, FILE, "other"], {}),
        ("flag over file variable", ["--api-key", KEY], {FILE_VARIABLE: "none"}),
        ("variable over file variable", [], {VARIABLE: KEY, FILE_VARIABLE: "none"}))],
    *[Case(path, ["{event}", FILE, path], key=False, requests=1, **fields) for path, fields in (
        ("-", {"stdin": KEY.encode()}), ("/dev/stdin", {"stdin": KEY.encode() + b"\n", "hold": True}),
        ("/dev/fd/7", {"files": {"key": KEY}, "redirect": "7<key"}))],
    Case("none", "{event} --json", key=False, both_forms=True, code=1, err=NO_KEY, json={"read": 0}),
    *[Case("file " + name, ["{event}", FILE, name], key=False, files=KEY_FILES,
           secrets=[SECRET], code=1, err="error: --api-key-file: " + why) for name, why in (
        ("none", "cannot read none: no such file or directory"), (".", "cannot read .: is a directory"),
        *[(name, "the first line of %s is empty" % name) for name in ("empty", "blank")],
        *[(name, "the first line of %s %s" % (name, UNFIT)) for name in ("odd", "utf-16")])],
    Case("the variable's file", "{event}", key=False, env={FILE_VARIABLE: "none"}, code=1,
         err="error: PACKTRACK_API_KEY_FILE: cannot read none: no such file or directory"),
    *[Case("with the records: " + argv, argv, key=False, env=env, stdin=KEY.encode(), code=1,
           err="error: " + source + STDIN) for argv, env, source in (
        (FILE + " - --stdin", {}, FILE), (FILE + " /dev/stdin --file /dev/fd/0", {}, FILE),
        ("--file -", {FILE_VARIABLE: "/proc/self/fd/0"}, FILE_VARIABLE))],
    *[Case("not needed: " + flag, "--stdin " + flag, key=False, stdin=[event()], env={FILE_VARIABLE: "-"},
           after=after) for flag, after in (("--dry-run", {}), ("--output out", {"out": [event()]}))],
    *[Case("%d %s" % (status, source), ["{event}", *argv], key=False, env=env, files=KEY_FILES, requests=1,
           script=[Reply(status, body="")], code=2, err="error: HTTP %d %s: check the API key (from %s)" % (
               status, words, source)) for status, words, source, argv, env in (
        (401, "Unauthorized", "--api-key", ["--api-key", KEY], {}),
        (403, "Forbidden", VARIABLE, [], {VARIABLE: KEY}), (403, "Forbidden", FILE, [FILE, "key"], {}),
        (401, "Unauthorized", FILE_VARIABLE, [], {FILE_VARIABLE: "key"}))],
)


@pytest.mark.skipif(os.name != "posix", reason="file modes")
@pytest.mark.parametrize("mode, said", [(0o700, False), (0o610, True), (0o601, True)])
def test_api_key_mode(mode, said, run, server, tmp_path):
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(mode)
    quiet, err = [run(*flags(), FILE, "key", *more, key=False, server=server).err for more in ([], ["-v"])]
    assert quiet == "" and ("chmod" in err) is said
    assert err.startswith("packtrack-logger: key file is readable by others; chmod 600 key\n") is said


def refused(argv, env=()):
    """What resolve says of a command line and an environment that it refuses."""
    with pytest.raises(pl.InvalidError) as caught:
        pl.resolve(argv, dict(env))
    assert (caught.value.exit_code, caught.value.kind, caught.value.status) == (1, "invalid", None)
    return str(caught.value)


UNFIT_VALUES = "x\r", "x\ry", "x\n", "x\0", "x\x1b[1m", "x\r\n y", "x\x7f", "x\u00fc", "x ", " x", " ", "x\ty"
NO_HEADER = "contains characters not allowed in a header (value not shown)"


@pytest.mark.parametrize("name", ["api-key", "idempotency-key", "user-agent"])
def test_header_values(name, run):
    for why, values in ((NO_HEADER, UNFIT_VALUES), ("must be UTF-8", ["x\udcff"])):
        for value in values:
            assert refused(["--" + name, value]) == "--%s: %s" % (name, why)
            assert refused([], {variable(name): value}) == "%s: %s" % (variable(name), why)
    result = run(*flags(), "--%s=%s\x1b" % (name, SECRET), secrets=[SECRET])
    assert (result.code, result.err) == (1, "packtrack-logger: error: --%s: %s\n" % (name, NO_HEADER))
    assert refused(["--%s=" % name]) == "--%s is empty (is the variable set?)" % name
    assert pl.resolve(["--" + name, "!~ x"], {})[name] == "!~ x"


def same(*texts):
    return [(text, text) for text in texts]


GOOD = {  # option: its default as text and as value; texts that are taken, and what they mean
    "timeout": [("15s", 15), ("1ns", 1e-9), ("1m30s", 90)], "deadline": [(None, None), ("8784h", 31622400)],
    "retries": [("3", 3), ("0", 0), ("1000", 1000)], "backoff-initial": [("100ms", 0.1), ("0", 0)],
    "backoff-max": [("2s", 2), ("0s", 0)], "jitter": [("0.2", 0.2), ("0", 0), ("1.0", 1)],
    "user-agent": same("pack-track-sdk-python/{0} packtrack-logger/{0}".format(pl.VERSION), "x"),
    "batch-size": [("100", 100), ("1", 1), ("1000000", 1000000)],
    "max-batch-bytes": [("1000000", 1000000), ("1", 1), ("1073741824", 1 << 30)],
    "connections": [("1", 1), ("64", 64)],
    "queue-capacity": [("10000", 10000), ("1", 1), ("10000000", 10000000)],
    "flush-interval": [("1s", 1), ("1ms", 0.001)],
    "health-path": [*same("/api/health"), ("x?z=%20", "/x?z=%20")],
    "base-url": same("https://pack.shimcounty.com", "http://h"),
    "severity": same(None, "debug", "info", "warn", "error"),
    "status": same(None, "ok", "failed", "skipped", "timeout", "retrying", "unknown"),
    **{name: same(None, "x") for name in ("idempotency-key", "undelivered", "output", "file", "api-key-file",
                                          "api-key", "message")},
}


@pytest.mark.parametrize("name", GOOD)
def test_precedence(name):
    assert pl.resolve([], {})[name] == GOOD[name][0][1] and pl.resolve([], {}).sources == {}
    for text, value in GOOD[name][not GOOD[name][0][0]:]:
        for argv in (["--" + name, text], ["--%s=%s" % (name, text)], ["--" + name, "\0", "--" + name, text]):
            for env in ({}, {variable(name): "\0"}):
                settings = pl.resolve(argv, env)
                assert settings[name] == value and settings.sources == {name: "--" + name}
                assert settings.from_flag(name)
        settings = pl.resolve([], {variable(name): text})
        assert settings[name] == value and settings.sources == {name: variable(name)}
        assert not settings.from_flag(name)


DURATION = 'invalid duration "{}": use e.g. 500ms, 15s, 1m30s'
INTEGER = 'must be an integer from {} to {} (got "{{}}")'
NUMBERS = ("-1", "+1", "1.5", "nan", "inf", "1e3", "1_0", "\u0661", "many", "0x10", "1 0", "9" * 13)
DURATIONS = ("-1s", "-0.1", "nan", "inf", "1e999", "1_0", "1_0s", "\u0661\u0660s", "s", "5x", "5ss", "5sec",
             "1m30", "5 s", "5S", "1.2.3s", ".s", ".")
BAD = {  # option: (why, texts that are refused for it)
    **{name: [(DURATION, DURATIONS), ("must be at most 8784h", ("8784h1ms", "9" * 30 + "h", "9" * 400))] + [
        ("must be more than zero", ("0", "0s", "0h0m", "0.0"))] * ("backoff" not in name)
       for name in ("timeout", "deadline", "flush-interval", "backoff-initial", "backoff-max")},
    "retries": [(INTEGER.format(0, 1000), (*NUMBERS, "1001"))],
    "batch-size": [(INTEGER.format(1, 1000000), (*NUMBERS, "0", "1000001"))],
    "max-batch-bytes": [(INTEGER.format(1, 1 << 30), (*NUMBERS, "0", "1073741825"))],
    "connections": [(INTEGER.format(1, 64), (*NUMBERS, "0", "65"))],
    "queue-capacity": [(INTEGER.format(1, 10000000), (*NUMBERS, "0", "10000001"))],
    "jitter": [('must be a number from 0 to 1 (got "{}")',
                ("-0.1", "1.01", "nan", "inf", "0.1_0", "\u0660.\u0661", "half", "1e-1", ".", "0 .1"))],
    "health-path": [("must be percent-encoded ASCII without a fragment", ("a b", "/#y", "/\u00fc", "/\x7f"))],
}


@pytest.mark.parametrize("name", BAD)
def test_values(name):
    for why, texts in BAD[name]:
        for text in texts:
            assert refused(["--%s=%s" % (name, text)]) == "--%s: %s" % (name, why.format(text))
            assert refused([], {variable(name): text}) == "%s: %s" % (variable(name), why.format(text))
    assert refused(["--" + name, ""]) == "--%s is empty (is the variable set?)" % name
    assert refused(["--" + name]) == "--%s needs a value (%s)" % (name, pl.BY_NAME[name].metavar)


@pytest.mark.parametrize("option", [option for option in pl.OPTIONS if option.is_boolean and option.variable],
                         ids=lambda option: option.name)
def test_booleans(option):
    rest = {"ndjson": ["--stdin"], "allow-empty": ["--stdin"], "no-flush": ["--async"],
            "strict": ["--", "true"]}.get(option.name, [])
    no = "--flush" if option.name == "no-flush" else "--no-" + option.name

    def value(*argv, env=""):
        return pl.resolve([*argv, *rest], {option.variable: env})[option.name]

    assert value() is None and value(option.flag) is True and value(no) is False
    for truth, texts in ((True, "1 true yes y oN"), (False, "0 False no n OFF")):
        for text in texts.split(" "):
            assert value(env=text) is value(option.flag + "=" + text) is truth
            assert value(no + "=" + text) is not truth
    assert value(no, env="1") is False and value(option.flag, env="0") is True
    assert value(option.flag, no) is False and value(no, option.flag) is True
    assert refused([], {option.variable: "tru"}) == option.variable + ": must be true or false"
    assert refused([no + "=2"]) == no + ": must be true or false"
    assert refused([option.flag, "true"]) == option.flag + " takes no value (to read a file: --file PATH)"


USER = "must not contain a user or password (value not shown)"
BAD_URLS = {
    "must start with http:// or https:// (e.g. https://pack.example.com)": (
        "file:///etc/passwd", "ftp://h", "data:text/plain,hi", "h", "h:80", "http:h", " ", "HTTP//h", "://h"),
    "missing host name": ("http://", "http:///x", "http://:80"),
    USER: ("http://joe:%s@h" % SECRET, "http://%s@h" % SECRET, "joe@h"),
    "must not contain a query or fragment": ("http://h/?a", "http://h?a", "https://h/x#a", "http://h#"),
    "port must be a number from 1 to 65535": (
        "http://h:0", "http://h:65536", "http://h:-1", "http://h:abc", "http://h:\u0668", "http://h:80:80",
        "http://h:", "http://[::1", "http://h:000080", "http://[::1]:0"),
    "invalid IPv6 address in brackets": ("http://[::zz]", "http://[]", "http://[1.2.3.4]", "http://[::1]x"),
    "invalid host name": ("http://a..b.com", "http://.a", "http://%s.b" % ("a" * 64), "http://a b",
                          "http://h\0",
                          "http://" + "a." * 127 + "b", "http://\u00a0", "http://h\\x", "http://\u00fc..b"),
    "must be percent-encoded ASCII without a fragment": ("http://h/a b", "http://h/\r\n", "http://h/\u00fc"),
    "must not include /api/ingest": ("http://h/api/ingest", "http://h/x/api/ingest//"),
}
GOOD_URLS = {
    "http://h:80///": "http://h:80", "https://h/a/b/": "https://h/a/b", "http://[::1]:80": "http://[::1]:80",
    "http://b\u00fccher.example/x": "http://xn--bcher-kva.example/x", **dict(same(
        "http://h:65535", "http://h:1", "http://my_host", "http://a.example.com.", "http://%s.b" % ("a" * 63),
        "http://" + "a." * 126 + "b", "http://h/%20/api/ingest2", "http://127.0.0.1")),
}


def test_base_url(run):
    for why, texts in BAD_URLS.items():
        for text in texts:
            assert refused(["--base-url", text]) == "--base-url: " + why, text
            assert refused([], {"PACKTRACK_BASE_URL": text}) == "PACKTRACK_BASE_URL: " + why
    for text, url in GOOD_URLS.items():
        assert pl.resolve(["--base-url", text], {})["base-url"] == url
    result = run(*flags(), "--base-url", BAD_URLS[USER][0], secrets=[SECRET])
    assert (result.code, result.err) == (1, "packtrack-logger: error: --base-url: %s\n" % USER)


def test_contradictions():
    """Variables that are about another kind of run count for nothing, unless they keep the event back."""
    for name in ("no-flush", "ndjson", "allow-empty", "strict", "command-timeout"):
        settings = pl.resolve([], {variable(name): "1"})
        assert settings[name] is None and settings.sources == {}
    env = dict.fromkeys(map(variable, (*pl.NOT_WITH_COMMAND, "severity", "status")), "1")
    settings = pl.resolve(["--", "x", "--", "-v"], env)
    assert (settings.sources, settings.trouble, settings.command) == ({}, None, ["x", "--", "-v"])
    for said, env in (("DRY_RUN cannot be combined with a command", {"PACKTRACK_DRY_RUN": "1"}),
                      ("OUTPUT - cannot be combined with a command", {"PACKTRACK_OUTPUT": "-"}),
                      ("TIMEOUT: " + DURATION.format("y"), {
                          "PACKTRACK_RETRIES": "x", "PACKTRACK_TIMEOUT": "y"})):
        settings = pl.resolve(["--", "true"], env)
        assert str(settings.trouble) == "PACKTRACK_" + said
        assert not settings["output"] and not settings["dry-run"]
    assert pl.resolve(["--output", "f", "--", "true"], {})["output"] == "f"


def test_help(run):
    for flag, least, most in (("-h", 25, 40), ("--help", 150, 300)):
        result = run(flag, "--no-such", "stray", "--retries", "x", key=False, secrets=[SECRET],
                     env={"PACKTRACK_MESSAGE": SECRET, "PACKTRACK_TIMEOUT": "x"})
        lines = result.out.splitlines()
        assert (result.code, result.err, result.out) == (0, "", pl.help_text(flag == "--help"))
        assert least <= len(lines) <= most and max(map(len, lines)) <= 80
        assert result.out.startswith("%s\n\n%s" % (pl.SUMMARY, pl.USAGE))
        assert most < 100 or "\n          With a COMMAND: the command's own, and 124 after" in result.out
        named = re.findall(r"^  (?:-\w, )?--([a-z-]+)", result.out, re.M)
        assert named == [option.name for option in pl.OPTIONS] if most > 100 else set(named) < set(pl.BY_NAME)
    for option in pl.OPTIONS:
        (entry,) = re.findall(r"^  (?:-\w, )?--%s(?: |\n)((?:.|\n {26})*)" % option.name, result.out, re.M)
        facts = ", ".join(filter(None, (option.variable, option.default and "default " + option.default)))
        parts = option.metavar, option.help, facts and "[%s]" % facts
        assert " ".join(entry.split()) == " ".join(filter(None, parts))
    assert re.findall(r"^  ([0-9][0-9+n]*) +\w", result.out, re.M) == ["0", "1", "2", "3", "4", "128+n"]


def test_help_of_what_the_outcome_sets(run):
    text = " ".join(run("--help", key=False).out.split())
    for name in ("severity", "status"):
        assert re.search(r"--%s WORD [^[]*\brequired; set by the outcome with a COMMAND\b" % name, text), name


VERSION = "packtrack-logger %s\n" % pl.VERSION
LOST = "error: the --json summary is lost: cannot write to standard output: "
test_information = rows(
    Case("--version", "--version", key=False, out=VERSION, both_forms=True),
    Case("--version=no", "{event} --version --version=no --help=0", requests=1),
    Case("-V among others", "{event} -V --retries x --file none --json", out=VERSION),
    *[Case(shell, "--completion " + shell, key=False, out=pl.COMPLETIONS[shell]())
      for shell in ("bash", "zsh", "fish")],
    *[Case("%s %s" % (redirect, argv), argv, redirect=redirect, marks=[ONLY_LINUX], key=False, code=4,
           err="error: cannot write to standard output: " + why) for redirect, why, names in (
        (">/dev/full", "no space left on device", ("--version", "-h", "--help", "--completion bash")),
        (">&-", "it is closed", ("-V", "--help", "--completion fish"))) for argv in names],
    Case("full --json", "{event} --json", redirect=">/dev/full", marks=[ONLY_LINUX], requests=1,
         err=LOST + "no space left on device"),
    Case("closed --json", "{event} --json", redirect=">&-", requests=1, err=LOST + "it is closed"),
    Case("full --json of a refusal", "{event} --json", script=[Reply(400, body="no")], redirect=">/dev/full",
         marks=[ONLY_LINUX], code=2, requests=1,
         err='error: HTTP 400 Bad Request: "no"\n' + LOST + "no space left on device"),
    Case("a closed pipe", "--help", redirect="| true"),
    Case("full standard error", "{event} -v --no-such", redirect="2>/dev/full", marks=[ONLY_LINUX], code=1),
)


def account(read, delivered=0, undelivered=0, invalid=0, requests=0, retries=0, **error):
    return {"read": read, "delivered": delivered, "undelivered": undelivered, "invalid": invalid,
            "requests": requests, "retries": retries, "error": error or None}


LINE = ('{"ok": %s, "exit_code": %d, "read": %d, "delivered": %d, "undelivered": 0, "invalid": 0, '
        '"requests": %d, "retries": 0, "bytes_sent": %d, "seconds": <s>, "error": %s}\n')
FAILED = '{"kind": "%s", "message": "%s", "status": null, "where": null}'
ASKED = {"PACKTRACK_JSON": "yes"}
test_json = rows(
    Case("delivered", "{fast} {events:250} --json", script=[200, 503], requests=4, both_forms=True,
         json={"ok": True, **account(250, 250, requests=4, retries=1)}),
    *[Case("the line" + more, "{event}" + more, env=env, requests=1, out=LINE % (
        "true", 0, 1, 1, 1, ONE_BYTES, "null")) for more, env in (("", ASKED), (" --json=on", {}))],
    Case("nothing to send", "", env=ASKED, code=1, err="error: nothing to send" + USAGE,
         out=LINE % ("false", 1, 0, 0, 0, 0, FAILED % ("usage", "nothing to send"))),
    Case("unknown flag, variable", "--zzz", env=ASKED, code=1, err="error: unknown flag --zzz; see --help",
         out="<...>" + FAILED % ("invalid", "unknown flag --zzz; see --help") + "}\n"),
    Case("unknown flag", "--zzz --no-json --json", env={"PACKTRACK_JSON": "0"}, code=1,
         err="error: unknown flag --zzz; see --help", json=account(0, kind="invalid", where=None)),
    Case("usage", "{event} --json --timeout -1", code=1, err="error: --timeout: " + DURATION.format("-1"),
         json=account(0, kind="invalid", message=DURATION.format("-1"), status=None, where="--timeout")),
    Case("no file", "--file none --json", code=4, err="error: cannot read none: no such file or directory",
         json=account(0, kind="input", message="cannot read none: no such file or directory")),
    Case("invalid", "--file in --ndjson --json", files={"in": [event(), event(message=""), event()]}, code=1,
         json=account(2, 0, 1, 1, kind="invalid", message="message: must not be empty", where="in:2"),
         err="error: in:2: message: must not be empty; 2 records read, 1 invalid, none sent"),
    Case("not healthy", "--health --json", script=[Reply(500, body="ill")], code=1, requests=1,
         json=account(0, requests=1, kind="unhealthy", status=500),
         err='error: the service is not healthy: HTTP 500 Internal Server Error: "ill"'),
)
ILL = "the service is not healthy: "
STATUSES = {
    301: "HTTP 301 Moved Permanently", 500: "HTTP 500 Internal Server Error",
    503: "HTTP 503 Service Unavailable",
    401: "HTTP 401 Unauthorized: check the API key (from PACKTRACK_API_KEY)",
    404: "HTTP 404 Not Found from {url}/api/health: check --base-url"}
test_health = rows(
    Case("healthy", "--health", requests=[{"method": "GET", "path": "/api/health", "body": b"", "headers": {
        "x-packtrack-key": KEY, "content-type": None, "content-length": None}}], both_forms=True),
    Case("with an event", "{event}", env={"PACKTRACK_HEALTH": "1"}, requests=[{"method": "GET"}]),
    *[Case(str(status), "--health", script=[Reply(status, body="")], code=1, requests=1,
           err="error: " + ILL + words) for status, words in STATUSES.items()],
    Case("gone", "--health --base-url http://{refused}", code=1, err="error: " + ILL + "{refused}: <...>"),
    Case("no key", "--health", key=False, code=1, err=NO_KEY),
    Case("path", "--health --health-path healthz", server={"health": "/healthz", "prefix": "/p"},
         env={"PACKTRACK_HEALTH_PATH": "/other"}, requests=[{"path": "/p/healthz"}]),
    Case("2xx", "{event} --health-enable -v", script=[299], requests=2, err="the service is healthy" + SENT),
    *[Case("before sending: %d" % status, "{event} --health-enable -v", script=[Reply(status, body="")],
           requests=[{"method": "GET"}, {"method": "POST"}], err=ILL + STATUSES[status] + SENT)
      for status in (503, 401)],
    Case("in silence", "{events:200}", env={"PACKTRACK_HEALTH_ENABLE": "1"}, script=[503], requests=3),
)
AGENT = "pack-track-sdk-python/{0} packtrack-logger/{0}".format(pl.VERSION)


def headers(**values):
    return {"headers": {name.replace("_", "-"): value for name, value in values.items()}}


test_request = rows(
    Case("one event", "{event}", both_forms=True, requests=[{
        "method": "POST", "path": "/api/ingest", "body": event(), **headers(
            x_packtrack_key=KEY, content_type="application/json", host="{host}", user_agent=AGENT,
            accept_encoding="identity", content_encoding=None, idempotency_key=None, transfer_encoding=None,
            expect=None, connection=None, content_length=str(ONE_BYTES))}]),
    Case("others", "{event} --no-gzip --user-agent '1 (a b)'", {"PACKTRACK_" + name: "1" for name in (
        "USER_AGENT", "GZIP")}, requests=[headers(content_encoding=None, user_agent="1 (a b)")]),
    *[Case("base URL " + end, "{event} --base-url http://{host}" + end,
           env={"PACKTRACK_BASE_URL": "http://h"}, server={"prefix": end.rstrip("/")},
           requests=[{"path": end.rstrip("/") + "/api/ingest"}])
      for end in ("", "/", "///", "/tenant/a//")],
)


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
@pytest.mark.parametrize("argv, env, terminal, delay, shown", [
    ([], {}, True, 1.1, True), ([], {}, True, 0, False), ([], {}, False, 1.1, False),
    *[pytest.param(*row, True, 1.1, False, marks=pytest.mark.full) for row in (
        (["--no-progress"], {}), ([], {"PACKTRACK_PROGRESS": "0"}))],
    (["--progress"], {}, False, 1.1, True)])
def test_progress(argv, env, terminal, delay, shown, start, tmp_path):
    (tmp_path / "in").write_bytes(b"\n".join(map(pl.dump_json, events(4))))
    (leader, follower), screen = os.openpty(), b""
    with StandIn([Reply(delay=delay)]) as server:
        result = start("--file", "in", "--ndjson", "--batch-size=2", *argv, env=env, server=server,
                       **({"stderr": follower} if terminal else {})).result()
    os.write(follower, b"end")
    while not screen.endswith(b"end"):
        screen += os.read(leader, 65536)
    os.close(leader)
    os.close(follower)
    assert (result.code, result.out, screen == b"end") == (0, "", not (terminal and shown))
    line = r"4 records read, [24] delivered, \d/s, (50|100) %"
    assert re.search(line, screen.decode() + result.err) if shown else result.err == ""
    if shown and not terminal:
        assert re.fullmatch("(packtrack-logger: %s\n)+" % line, result.err)
