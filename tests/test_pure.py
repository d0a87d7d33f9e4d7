"""The module imported: its pure functions, and the library face against the stand-in."""

import json
import math
import re
import sys
import threading
import time
from email.utils import formatdate

import pytest

import packtrack_logger as pl
import standin
from conftest import FLAGS, KEY, MISSING, event, events
from standin import RefusedPort, Reply, StandIn

# ---- the option table ------------------------------------------------------------------------------------

WITHOUT_VARIABLE = {"help", "version", "completion"}
PRD_DEFAULTS = {
    "base-url": "https://pack.shimcounty.com",
    "timeout": 15.0,
    "retries": 3,
    "backoff-initial": 0.1,
    "backoff-max": 2.0,
    "jitter": 0.2,
    "batch-size": 100,
    "flush-interval": 1.0,
    "queue-capacity": 10000,
    "health-path": "/api/health",
    "max-batch-bytes": 1000000,
}
PRD_OPTIONS = {
    "api-key",
    "base-url",
    "timeout",
    "retries",
    "backoff-initial",
    "backoff-max",
    "jitter",
    "user-agent",
    "idempotency-key",
    "gzip",
    "timestamp",
    "source-system",
    "source-env",
    "workflow-id",
    "workflow-name",
    "run-id",
    "step-id",
    "actor-type",
    "actor-id",
    "actor-display",
    "severity",
    "status",
    "message",
    "metadata",
    "extra",
    "file",
    "stdin",
    "ndjson",
    "verbose",
    "dry-run",
    "health",
    "version",
    "async",
    "batch-size",
    "flush-interval",
    "queue-capacity",
    "no-flush",
    "api-key-file",
    "health-path",
    "health-enable",
    "deadline",
    "max-batch-bytes",
    "keep-going",
    "undelivered",
    "output",
    "json",
    "progress",
    "completion",
    "command-timeout",
    "strict",
    "help",
}


def test_the_table_has_every_option_of_requirements_and_design_and_no_other():
    assert {option.name for option in pl.OPTIONS} == PRD_OPTIONS


def test_no_flag_short_form_or_variable_is_declared_twice():
    flags = [flag for option in pl.OPTIONS for flag in option.flags]
    assert len(flags) == len(set(flags))
    variables = [option.variable for option in pl.OPTIONS if option.variable]
    assert len(variables) == len(set(variables))


@pytest.mark.parametrize("option", pl.OPTIONS, ids=lambda option: option.name)
def test_every_option_has_help_a_group_and_a_variable(option):
    assert option.help and any(option in options for _, options in pl.GROUPS)
    named_after_the_flag = "PACKTRACK_" + option.name.upper().replace("-", "_")
    assert option.variable == (None if option.name in WITHOUT_VARIABLE else named_after_the_flag)
    assert option.is_boolean or option.metavar


def test_the_short_forms_are_h_v_and_capital_v():
    assert {option.short: option.name for option in pl.OPTIONS if option.short} == {
        "-h": "help",
        "-v": "verbose",
        "-V": "version",
    }


def test_every_default_passes_its_own_parser_and_is_that_of_the_requirements():
    settings = pl.resolve(FLAGS, {})
    assert {name: settings[name] for name in PRD_DEFAULTS} == PRD_DEFAULTS
    agent = r"pack-track-sdk-python/{0} packtrack-logger/{0}".format(re.escape(pl.VERSION))
    assert re.fullmatch(agent, settings["user-agent"])


@pytest.mark.parametrize(
    "option",
    [option for option in pl.OPTIONS if option.is_boolean and option.name not in WITHOUT_VARIABLE],
    ids=lambda option: option.name,
)
def test_every_boolean_has_both_forms(option):
    assert {option.opposite} | {option.flag} <= set(option.flags)
    assert option.opposite == ("--flush" if option.name == "no-flush" else "--no-" + option.name)


def test_texts_name_every_flag_variable_and_default():
    tables = pl.readme_tables()
    for text in (pl.help_text(), tables["options"]):
        for option in pl.OPTIONS:
            assert option.flag in text
            assert option.variable is None or option.variable in text
        for name in WITHOUT_VARIABLE:
            assert "PACKTRACK_" + name.upper() not in text
            assert not option.default or option.default in text
    for code in ("0", "1", "2", "3", "4"):
        assert re.search(r"(?m)^\| %s \|" % code, tables["exit-codes"])
        assert re.search(r"(?m)^  %s " % code, pl.help_text())
    assert max(map(len, pl.help_text().splitlines())) <= 80


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_name_every_flag_and_word(shell):
    text = pl.completion(shell)
    for option in pl.OPTIONS:
        assert option.name in text
        for word in option.choices:
            assert word in text


# ---- resolve ---------------------------------------------------------------------------------------------


def test_flag_beats_variable_beats_default():
    env = {"PACKTRACK_RETRIES": "7"}
    assert pl.resolve(FLAGS, {})["retries"] == 3
    assert pl.resolve(FLAGS, env)["retries"] == 7
    assert pl.resolve([*FLAGS, "--retries", "5"], env)["retries"] == 5


def test_a_bad_variable_does_not_matter_where_the_flag_is_given():
    assert pl.resolve([*FLAGS, "--retries", "5"], {"PACKTRACK_RETRIES": "many"})["retries"] == 5


@pytest.mark.parametrize(
    "argv, env, source",
    [
        (["--timeout", "x"], {}, "--timeout"),
        ([], {"PACKTRACK_TIMEOUT": "x"}, "PACKTRACK_TIMEOUT"),
        (["--severity", "x"], {}, "--severity"),
        ([], {"PACKTRACK_GZIP": "x"}, "PACKTRACK_GZIP"),
    ],
)
def test_an_error_names_its_source(argv, env, source):
    with pytest.raises(pl.InvalidError) as caught:
        pl.resolve(argv, env)
    assert caught.value.where == source
    assert str(caught.value).startswith(source + ": ")
    assert caught.value.exit_code == 1


def test_what_stands_after_two_dashes_is_the_command_as_it_is():
    settings = pl.resolve(["--workflow-id", "w", "--", "cp", "--file", "-x", "--"], {})
    assert settings.command == ["cp", "--file", "-x", "--"]
    assert settings["file"] is None


def test_a_bad_variable_does_not_keep_a_command_from_running():
    settings = pl.resolve(["--", "true"], {"PACKTRACK_TIMEOUT": "soon", "PACKTRACK_JSON": "1"})
    assert settings.command == ["true"]
    assert "PACKTRACK_TIMEOUT" in str(settings.trouble)


@pytest.mark.parametrize("word", ["--retrys", "--time-out", "--Message", "--mesage", "--no-gzipp"])
def test_a_misspelt_flag_gets_the_nearest(word):
    with pytest.raises(pl.InvalidError) as caught:
        pl.resolve([word + "=SECRET"], {})
    right = {
        "--retrys": "--retries",
        "--time-out": "--timeout",
        "--Message": "--message",
        "--mesage": "--message",
        "--no-gzipp": "--no-gzip",
    }[word]
    assert word in str(caught.value) and right in str(caught.value)
    assert "SECRET" not in str(caught.value)


# ---- value parsers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("0", 0),
        ("0s", 0),
        ("15", 15),
        ("1.5", 1.5),
        (".5", 0.5),
        ("100ms", 0.1),
        ("1m30s", 90),
        ("1.5h", 5400),
        ("500us", 0.0005),
        ("2h45m", 9900),
        ("1us", 1e-6),
        ("1ns", 1e-9),
        ("1\u00b5s", 1e-6),
        ("1\u03bcs", 1e-6),
        ("1h1m1s1ms", 3661.001),
        ("007s", 7),
    ],
)
def test_parse_duration(text, seconds):
    assert pl.parse_duration(text) == pytest.approx(seconds)


BAD_DURATIONS = [
    "",
    " ",
    "-1",
    "-1s",
    "+-1",
    "nan",
    "inf",
    "1e3",
    "1e999",
    "1_0",
    "1_0s",
    "\u0661s",
    "s",
    "5x",
    "5 s",
    " 5s",
    "5s ",
    "1m30",
    "1.2.3s",
    ".s",
    ".",
    "1m 30s",
    "9" * 30 + "h",
    "9" * 400,
    "5S",
    "ms5",
    "1,5s",
    "5s\n",
    "0x1s",
    "1msms",
]


@pytest.mark.parametrize("text", BAD_DURATIONS)
def test_parse_duration_refuses(text):
    with pytest.raises(ValueError):
        pl.parse_duration(text)


@pytest.mark.parametrize("text", ["0", "0s", "0h0m", "0.0", "-0", *BAD_DURATIONS])
def test_limits_are_not_zero(text):
    with pytest.raises(ValueError):
        pl.parse_limit(text)


@pytest.mark.parametrize(
    "text, value", [("0", 0), ("1", 1), ("0.2", 0.2), (".5", 0.5), ("1.0", 1), ("0.0", 0)]
)
def test_parse_fraction(text, value):
    assert pl.parse_fraction(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "-0.1", "1.1", "nan", "inf", "0_1", "\u0661", "half", " 0.5", "0.5 ", "1e-1", "0.5\n", "1.00000001"],
)
def test_parse_fraction_refuses(text):
    with pytest.raises(ValueError):
        pl.parse_fraction(text)


@pytest.mark.parametrize(
    "text", ["", "-1", "1.0", "1_0", "\u0661", "x", " 1", "1 ", "1\n", "0x1", "9" * 5000, "1e3"]
)
@pytest.mark.parametrize("name", ["retries", "batch-size", "queue-capacity", "max-batch-bytes"])
def test_counts_refuse(name, text):
    with pytest.raises(ValueError):
        pl.BY_NAME[name].parse(text)


@pytest.mark.parametrize("text", ["k", "a b", "!~", "pk_live-1+/=", "x" * 4000])
def test_parse_header(text):
    assert pl.parse_header(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "SECRET\r",
        "SECRET\n",
        "SECRET\r\n b",
        "SECRET\0",
        "SECRET\x1b",
        "SECRET\x7f",
        "SECRET\u00fc",
        " SECRET",
        "SECRET ",
        "SECRET\tb",
        "SECRET\u2028",
        "SECRET\ud800",
    ],
)
def test_parse_header_refuses_and_quotes_nothing(text):
    with pytest.raises(ValueError) as caught:
        pl.parse_header(text)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "text, url",
    [
        ("http://h", "http://h"),
        ("https://h/", "https://h"),
        ("http://h:80///", "http://h:80"),
        ("http://h/a/b/", "http://h/a/b"),
        ("http://[::1]:80", "http://[::1]:80"),
        ("http://127.0.0.1:1", None),
        ("http://b\u00fccher.example/x", "http://xn--bcher-kva.example/x"),
        ("http://h:65535", None),
        ("https://%s.example.com" % ("a" * 63), None),
        ("http://a.example.com.", None),
        ("http://h/%20", None),
    ],
)
def test_parse_base_url(text, url):
    assert pl.parse_base_url(text) == (url or text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h",
        "h:80",
        "file:///x",
        "ftp://h",
        "data:,x",
        "http:",
        "http://",
        "http:///x",
        "http://:80",
        "http:h",
        "http://u:p@h",
        "http://u@h",
        "http://h?q",
        "http://h/?q",
        "http://h#f",
        "http://h:0",
        "http://h:65536",
        "http://h:-1",
        "http://h:abc",
        "http://h:",
        "http://h:80:80",
        "http://[::1",
        "http://::1",
        "http://[::1]x",
        "http://[1.2.3.4]",
        "http://a..b",
        "http://.a",
        "http://%s.b" % ("a" * 64),
        "http://a b",
        "http://h/a b",
        "http://h\n",
        "http://h/\r\n",
        "http://h\\x",
        "http://h:\u0661",
        "http://\u00a0",
        "javascript:alert(1)",
        "http://" + "a." * 200 + "b",
        "http://h\0",
    ],
)
def test_parse_base_url_refuses(text):
    if (
        text == "http://h:"
    ):  # An empty port is the default port (RFC 3986, 3.2.3), or an error; never a crash.
        try:
            assert pl.parse_base_url(text) in ("http://h", "http://h:", "http://h:80")
        except ValueError:
            pass
        return
    with pytest.raises(ValueError):
        pl.parse_base_url(text)


def calendar_agrees(text):
    """What the standard library says of a timestamp of this form."""
    import datetime

    try:
        datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        return False
    return True


def test_timestamps_agree_with_the_calendar():
    for year in (1, 4, 100, 400, 1900, 1999, 2000, 2023, 2024, 2100, 2400, 9999):
        for month in range(14):
            for day in (0, 1, 28, 29, 30, 31, 32):
                text = "%04d-%02d-%02dT00:00:00Z" % (year, month, day)
                try:
                    pl.parse_timestamp(text)
                    accepted = True
                except ValueError:
                    accepted = False
                assert accepted is calendar_agrees(text), text


# ---- retry policy ----------------------------------------------------------------------------------------


def test_429_and_5xx_are_worth_a_retry_and_nothing_else_is():
    assert [status for status in range(100, 1000) if pl.is_retryable(status)] == [429, *range(500, 600)]


def test_backoff_doubles_up_to_its_maximum():
    delays = [pl.backoff_delay(number, 0.1, 2.0, 0.0, lambda: 0.5) for number in range(1, 8)]
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])


def test_backoff_bears_any_number_of_tries():
    assert pl.backoff_delay(100000, 0.1, 2.0, 0.0, lambda: 0.0) == 2.0
    assert pl.backoff_delay(100000, 0.0, 2.0, 0.0, lambda: 0.0) == 0.0


@pytest.mark.parametrize("chance, factor", [(0.0, 0.8), (0.5, 1.0), (0.75, 1.1)])
def test_jitter_is_a_factor_around_one(chance, factor):
    assert pl.backoff_delay(3, 0.1, 2.0, 0.2, lambda: chance) == pytest.approx(0.4 * factor)


def test_jitter_spreads_over_its_whole_range_and_no_further():
    import random

    generator = random.Random(7)
    delays = [pl.backoff_delay(1, 1.0, 1.0, 0.5, generator.random) for _ in range(2000)]
    assert 0.5 <= min(delays) < 0.52 and 1.48 < max(delays) <= 1.5
    assert len(set(delays)) > 1900


NOW = 1700000000.0


@pytest.mark.parametrize(
    "value, seconds",
    [
        (None, None),
        ("0", 0),
        ("1", 1),
        ("120", 120),
        (" 7 ", 7),
        ("999999", 999999),
        (formatdate(NOW + 30, usegmt=True), 30),
        (formatdate(NOW - 30, usegmt=True), 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Tuesday, 14-Nov-23 22:14:20 GMT", 60),
        ("Tue Nov 14 22:14:20 2023", 60),
    ],
)
def test_parse_retry_after(value, seconds):
    assert pl.parse_retry_after(value, NOW) == seconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "-5",
        "+5",
        "nan",
        "inf",
        "1_0",
        "5,10",
        "5, 10",
        "1.5",
        "1e3",
        "0x10",
        "\u0661",
        "9" * 5000,
        "soon",
        "10s",
        "Fri, 31 Dec 99999 23:59:59 GMT",
        "Wed, 99 Oct 2099 07:28:00 GMT",
        "Wed, 21 Oct 2015 07:28:00",
        "Wed, 21 Oct 2015 07:28:00 CET",
        "21 Oct 2015",
        "2015-10-21T07:28:00Z",
        "Wed, 21 Okt 2015 07:28:00 GMT",
        "wed, 21 oct 2015 07:28:00 gmt",
        "Wed, 21 Oct 2015 25:28:00 GMT",
        "Wed, 30 Feb 2015 07:28:00 GMT",
    ],
)
def test_parse_retry_after_ignores_nonsense(value):
    assert pl.parse_retry_after(value, NOW) is None


# ---- events ----------------------------------------------------------------------------------------------

BAD_EVENTS = {
    **{
        "%s %s" % (path, name): ({path.replace(".", "__"): value}, path)
        for path in (
            "source.system",
            "workflow.id",
            "actor.type",
            "actor.id",
            "severity",
            "status",
            "message",
            "timestamp",
        )
        for name, value in (
            ("missing", MISSING),
            ("null", None),
            ("empty", ""),
            ("a number", 5),
            ("a list", ["x"]),
            ("an object", {}),
            ("true", True),
        )
    },
    **{
        "%s %s" % (path, name): ({path.replace(".", "__"): value}, path)
        for path in (
            "source.env",
            "workflow.name",
            "workflow.run_id",
            "workflow.step_id",
            "actor.display_name",
        )
        for name, value in (("a number", 5), ("zero", 0), ("false", False), ("a list", []), ("an object", {}))
    },
    **{
        "%s %s" % (path, name): ({path: value}, path)
        for path in ("metadata", "extra")
        for name, value in (("a number", 5), ("zero", 0), ("false", False), ("a list", []), ("a string", ""))
    },
    **{
        "%s %s" % (path, name): ({path: value}, path)
        for path in ("source", "workflow", "actor")
        for name, value in (("a number", 0), ("a string", ""), ("a list", []))
    },
    "unknown field": ({"sevrity": "info"}, "sevrity"),
    "unknown field in workflow": ({"workflow__nmae": "x"}, "workflow.nmae"),
    "severity in capitals": ({"severity": "INFO"}, "severity"),
    "severity with a blank": ({"severity": "info "}, "severity"),
    "status of severity": ({"status": "info"}, "status"),
}


@pytest.mark.parametrize("overrides, field", BAD_EVENTS.values(), ids=BAD_EVENTS)
def test_check_event_and_complete_event_name_the_field(overrides, field):
    bad = event(**overrides)
    with pytest.raises(pl.InvalidError) as caught:
        pl.check_event(bad)
    assert caught.value.where == field
    if field == "timestamp" and bad.get("timestamp") is None:
        return
    with pytest.raises(pl.InvalidError) as caught:
        pl.complete_event(bad, {}, "2025-01-01T00:00:00Z")
    assert caught.value.where.startswith(field)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"source__env": ""},
        {"source__env": None},
        {"metadata": {}},
        {"extra": None},
        {"metadata": {"a": [None]}},
        {"workflow__name": "\u2028"},
        {"message": " "},
    ],
)
def test_check_event_accepts(overrides):
    pl.check_event(event(**overrides))


@pytest.mark.parametrize(
    "overrides",
    [overrides for overrides, _ in BAD_EVENTS.values()]
    + [{}, {"source__env": "x"}, {"metadata": {"a": 1}}, {"extra": {}}, {"workflow__name": ""}],
    ids=str,
)
@pytest.mark.parametrize(
    "defaults", [{}, {"source": {"env": "E"}, "metadata": {"d": 1}}], ids=["bare", "defaults"]
)
def test_the_fast_test_of_a_record_never_says_more_than_the_slow_one(overrides, defaults):
    record = event(**overrides)
    if not pl.completeness_test(defaults)(record):
        return
    pl.check_event(record)
    assert pl.complete_event(record, defaults, "2025-01-01T00:00:00Z") == record


def test_the_fast_test_takes_complete_events():
    assert pl.completeness_test({})(event(source__env="x", workflow__name="n", metadata={}, extra={"a": 1}))
    assert pl.completeness_test({"metadata": {"a": 1}})(event(metadata={"a": 2}))
    assert not pl.completeness_test({"metadata": {"a": 1}})(event())


def test_complete_event_changes_neither_argument():
    record, defaults = event(metadata={"a": {"b": 1}}), {"metadata": {"c": 1}, "source": {"env": "E"}}
    before = json.dumps([record, defaults])
    pl.complete_event(record, defaults, "2025-01-01T00:00:00Z")
    assert json.dumps([record, defaults]) == before


def test_complete_event_fills_the_timestamp():
    record = event(timestamp=MISSING)
    assert pl.complete_event(record, {}, "2025-01-01T00:00:00Z") == event()
    assert pl.complete_event(record, {"timestamp": "2020-01-01T00:00:00Z"}, "2025-01-01T00:00:00Z") == event(
        timestamp="2020-01-01T00:00:00Z"
    )


@pytest.mark.parametrize("seconds", [0.0, 0.999999, 1700000000.25, 1735689599.9999999])
def test_utc_timestamps_are_valid(seconds):
    text = pl.utc_timestamp(seconds)
    assert pl.parse_timestamp(text) == text
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", text)


# ---- JSON ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "{",
        "}",
        "[1,]",
        "{'a':1}",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "[1e400]",
        "01",
        "+1",
        "1.",
        ".5",
        "0x1",
        "tru",
        "nul",
        '"\t"',
        '"',
        '"\\x"',
        '"\\u12"',
        "1 2",
        "{}{}",
        "//c\n1",
        "\ufeff1",
        "9" * 4301,
        "[-" + "9" * 4301 + "]",
        "[" * 501 + "]" * 501,
        '{"a":' * 501 + "1" + "}" * 501,
        "[" * 100000,
        '{"a":' * 100000,
        "\u00a01",
        "1\f",
        '{"a" 1}',
        "{a:1}",
        '{"a":1,}',
    ],
)
def test_parse_json_refuses_without_quoting(text):
    with pytest.raises(pl.InputError) as caught:
        pl.parse_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "-0",
        "1.5e3",
        "1e308",
        "1e-999",
        "9" * 4300,
        "-" + "9" * 4300,
        "[" * 500 + "]" * 500,
        ' {"a" : [1 , null]}\r\n',
        '"\\ud800"',
        '"' + "[" * 1000 + '"',
        '"\\"' + "{" * 1000 + '"',
        "[" + "[],{}," * 1000 + "1]",
        '"' + "9" * 5000 + '"',
    ],
)
def test_parse_json_agrees_with_json(text):
    value = pl.parse_json(text)
    if len(text) < 4000 or not text.lstrip("-").isdigit():
        assert value == json.loads(text)


@pytest.mark.parametrize(
    "value", ["\ud800", "\u2028", "a\0b", 10**400, [1.5, None, True], {"\u00fc": "\U0001f680"}]
)
def test_dump_json_gives_one_line_of_json(value):
    data = pl.dump_json(value)
    assert b"\n" not in data
    assert json.loads(data.decode("utf-8")) == value


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": -math.inf}, object(), {"a": {1}}])
def test_dump_json_refuses_what_json_has_not(value):
    with pytest.raises(pl.InvalidError):
        pl.dump_json(value)


# ---- words -----------------------------------------------------------------------------------------------


def test_printable_is_one_short_line_without_control_characters():
    text = pl.printable("a\x1b[31m\r\n\tb\u202ec\x00" + "x" * 1000)
    assert text.startswith("a [31m b c x")
    assert len(text) <= 200
    assert all(character.isprintable() for character in text)


@pytest.mark.parametrize("text", [KEY, "x%sx" % KEY, json.dumps(KEY), KEY * 3])
def test_redact_cuts_out_every_secret(text):
    assert KEY not in pl.redact(text, [KEY])


@pytest.mark.parametrize("secret", ['a"b\\c/d', "a b+c%d", "a&b<c>d"])
def test_redact_cuts_out_escaped_forms(secret):
    import html
    import urllib.parse

    for form in (
        json.dumps(secret)[1:-1],
        urllib.parse.quote(secret),
        urllib.parse.quote(secret, safe=""),
        html.escape(secret, quote=False),
        secret,
    ):
        assert form not in pl.redact("x %s y" % form, [secret])


# ---- main, in process ------------------------------------------------------------------------------------


def test_a_path_with_nul_is_exit_4(capfd, monkeypatch):
    monkeypatch.setenv("PACKTRACK_API_KEY", KEY)
    assert pl.main(["--file", "a\0b", "--base-url", "http://127.0.0.1:9"]) == 4
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("packtrack-logger: error: ") and err.count("\n") == 1


def test_main_returns_the_code_and_leaves_the_process_as_it_was(capfd, monkeypatch):
    monkeypatch.setenv("PACKTRACK_API_KEY", KEY)
    with StandIn(script=[200, 404]) as server:
        assert pl.main([*FLAGS, "--base-url", server.url]) == 0
        assert pl.main([*FLAGS, "--base-url", server.url]) == 2
    assert pl.main(["--bogus"]) == 1
    assert server.records == [event()]
    assert KEY not in "".join(capfd.readouterr())
    assert threading.active_count() == 1 or all(
        thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()
    )


def test_importing_does_not_import_what_only_sending_needs():
    import subprocess

    code = "import sys; sys.path.insert(0, %r); import packtrack_logger; print(sorted(sys.modules))" % (
        str(pl.__file__).rsplit("packtrack_logger", 1)[0] or "."
    )
    out = subprocess.check_output([sys.executable, "-I", "-S", "-c", code]).decode("ascii")
    for name in ("urllib.request", "http.client", "ssl", "socket", "typing", "subprocess", "threading"):
        assert "'%s'" % name not in out, name


# ---- the library face ------------------------------------------------------------------------------------


@pytest.fixture
def client(server):
    """A Client of the stand-in that does not wait between tries."""
    made = pl.Client(KEY, base_url=server.url, backoff_initial=0.0)
    yield made
    made.close()


def client_of(server, **options):
    """A Client of that stand-in, without waits."""
    return pl.Client(KEY, **{"base_url": server.url, "backoff_initial": 0.0, **options})


def test_client_sends_an_event_and_a_batch_over_one_connection(server, client):
    client.ingest_event(event())
    client.ingest_batch(events(3))
    client.health_check()
    assert [request.json for request in server.requests] == [event(), events(3), None]
    assert [request.method for request in server.requests] == ["POST", "POST", "GET"]
    assert server.connections == 1
    assert client.requests == 3


def test_client_fills_a_missing_timestamp(server, client):
    client.ingest_event(event(timestamp=MISSING))
    assert re.fullmatch(r"\d{4}-.*Z", server.records[0]["timestamp"])


@pytest.mark.parametrize(
    "bad, field", [(event(severity="loud"), "severity"), (event(message=MISSING), "message"), ({}, "")]
)
def test_client_validates_before_it_sends(server, client, bad, field):
    with pytest.raises(pl.InvalidError) as caught:
        client.ingest_event(bad)
    assert field in str(caught.value)
    with pytest.raises(pl.InvalidError):
        client.ingest_batch([event(), bad])
    assert server.connections == 0


@pytest.mark.parametrize(
    "status, error, requests",
    [
        (400, pl.RefusedError, 1),
        (401, pl.RefusedError, 1),
        (302, pl.RefusedError, 1),
        (413, pl.RefusedError, 1),
        (429, pl.RetriesExhaustedError, 3),
        (503, pl.RetriesExhaustedError, 3),
    ],
)
def test_client_raises_by_kind(status, error, requests):
    with StandIn(default=status) as server:
        client = client_of(server, retries=2)
        with pytest.raises(error) as caught:
            client.ingest_event(event())
        client.close()
    assert caught.value.status == status
    assert isinstance(caught.value, pl.PackTrackError)
    assert len(server.requests) == requests
    assert client.retries == requests - 1
    assert KEY not in str(caught.value)


def test_the_errors_carry_the_exit_codes():
    assert [
        error.exit_code
        for error in (pl.InvalidError, pl.RefusedError, pl.RetriesExhaustedError, pl.InputError)
    ] == [1, 2, 3, 4]


def test_client_raises_retries_exhausted_without_a_server():
    with RefusedPort() as port:
        client = pl.Client(KEY, base_url=port.url, retries=1, backoff_initial=0.0)
        with pytest.raises(pl.RetriesExhaustedError):
            client.ingest_event(event())
        with pytest.raises(pl.PackTrackError):
            client.health_check()
        client.close()


def test_client_retries_the_same_body_with_the_same_key():
    with StandIn(script=[503, standin.RESET_AFTER, 200]) as server:
        client = client_of(server)
        client.ingest_batch(events(2), idempotency_key="auto")
        client.close()
    assert len({(request.raw_body, request.headers["idempotency-key"]) for request in server.requests}) == 1
    assert server.records == events(2)


def test_client_waits_by_its_watch_and_with_its_randomness():
    waits = []
    watch = pl.Watch(pause=waits.append)
    with StandIn(script=[503, Reply(429, headers={"Retry-After": "7"}), 503, 200]) as server:
        client = pl.Client(
            KEY,
            base_url=server.url,
            backoff_initial=0.5,
            backoff_max=10.0,
            jitter=0.5,
            watch=watch,
            random=lambda: 0.75,
        )
        client.ingest_event(event())
        client.close()
    assert waits == pytest.approx([0.625, 7.0, 2.5])


def test_client_gives_up_at_once_where_retry_after_is_too_long():
    waits = []
    with StandIn(default=Reply(503, headers={"Retry-After": "61"})) as server:
        client = pl.Client(KEY, base_url=server.url, watch=pl.Watch(pause=waits.append))
        with pytest.raises(pl.RetriesExhaustedError, match="61"):
            client.ingest_event(event())
        client.close()
    assert waits == [] and len(server.requests) == 1


def test_client_gzips(server):
    client = client_of(server, gzip=True)
    client.ingest_batch(events(20))
    client.close()
    assert server.requests[0].headers["content-encoding"] == "gzip"
    assert server.records == events(20)


@pytest.mark.parametrize(
    "options", [{"base_url": "ftp://h"}, {"api_key": "a\r\nb"}, {"user_agent": "a\nb"}, {"api_key": ""}]
)
def test_client_refuses_bad_arguments(options):
    with pytest.raises(pl.InvalidError) as caught:
        pl.Client(**{"api_key": KEY, **options})
    assert "a\r\nb" not in str(caught.value)


def test_client_times_out():
    with StandIn(default=standin.SILENT) as server:
        client = client_of(server, timeout=0.2, retries=0)
        began = time.monotonic()
        with pytest.raises(pl.RetriesExhaustedError):
            client.ingest_event(event())
        assert 0.2 <= time.monotonic() - began < 5
        client.close()


def test_the_representation_of_a_client_does_not_show_the_key():
    assert KEY not in repr(pl.Client(KEY))


# ---- AsyncClient -


@pytest.fixture
def gated():
    """A stand-in that answers nothing before the gate is opened: (server, gate)."""
    gate = threading.Event()
    with StandIn(default=Reply(delay=gate)) as stand_in:
        yield stand_in, gate
        gate.set()


def test_async_client_delivers_in_order_and_in_batches(server, client):
    queue = pl.AsyncClient(client, batch_size=10, flush_interval=3600)
    for one in events(25):
        queue.enqueue(one)
    assert queue.flush(10) is True
    assert queue.close(10) is True
    assert server.records == events(25)
    assert max(len(request.json) for request in server.requests) <= 10


def test_async_client_flushes_by_interval(server, client):
    queue = pl.AsyncClient(client, flush_interval=0.01)
    queue.enqueue(event())
    server.wait_for_requests(1)
    queue.close(10)
    assert server.records == [event()]


def test_async_client_raises_when_the_queue_is_full(gated):
    server, gate = gated
    client = client_of(server)
    queue = pl.AsyncClient(client, batch_size=1, flush_interval=3600, queue_capacity=2)
    queue.enqueue(event(message="0"))
    server.wait_for_requests(1)
    queue.enqueue(event(message="1"))
    queue.enqueue(event(message="2"))
    for options in ({}, {"block": True, "timeout": 0.05}):
        with pytest.raises(pl.PackTrackError) as caught:
            queue.enqueue(event(message="3"), **options)
        assert caught.value.kind == "queue_full"
    gate.set()
    assert queue.close(10) is True
    client.close()
    assert [record["message"] for record in server.records] == ["0", "1", "2"]


def test_async_client_waits_for_room_where_asked_to(gated):
    server, gate = gated
    client = client_of(server)
    queue = pl.AsyncClient(client, batch_size=2, flush_interval=0.01, queue_capacity=2)

    def fill():
        for one in events(20):
            queue.enqueue(one, block=True)

    thread = threading.Thread(target=fill)
    thread.start()
    server.wait_for_requests(1)
    assert thread.is_alive()
    gate.set()
    thread.join(10)
    assert not thread.is_alive()
    assert queue.close(10) is True
    client.close()
    assert server.records == events(20)


def test_async_client_flush_has_a_time_limit(gated):
    server, gate = gated
    client = client_of(server)
    queue = pl.AsyncClient(client, batch_size=1)
    queue.enqueue(event())
    assert queue.flush(0.05) is False
    gate.set()
    assert queue.flush(10) is True
    queue.close(10)
    client.close()


def test_async_client_raises_the_first_error_from_flush_and_goes_on():
    with StandIn(script=[400]) as server:
        client = client_of(server)
        queue = pl.AsyncClient(client, batch_size=1)
        queue.enqueue(event(message="refused"))
        with pytest.raises(pl.RefusedError):
            queue.flush(10)
        queue.enqueue(event(message="taken"))
        assert queue.close(10) is True
        client.close()
    assert [record["message"] for record in server.records] == ["taken"]


def test_async_client_raises_from_close_too():
    with StandIn(default=503) as server:
        client = client_of(server, retries=1)
        queue = pl.AsyncClient(client)
        queue.enqueue(event())
        with pytest.raises(pl.RetriesExhaustedError):
            queue.close(10)
        client.close()
    assert len(server.requests) == 2


def test_async_client_validates_at_enqueue_and_refuses_when_closed(server, client):
    queue = pl.AsyncClient(client)
    with pytest.raises(pl.InvalidError):
        queue.enqueue(event(severity="loud"))
    assert queue.close(10) is True
    with pytest.raises(pl.PackTrackError):
        queue.enqueue(event())
    assert server.connections == 0


def test_async_client_takes_events_from_many_threads(server, client):
    queue = pl.AsyncClient(client, batch_size=7, queue_capacity=20, flush_interval=0.01)

    def fill(name):
        for number in range(50):
            queue.enqueue(event(message="%d %d" % (name, number)), block=True)

    threads = [threading.Thread(target=fill, args=(name,)) for name in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(interval)
    assert queue.close(10) is True
    arrived = [tuple(map(int, record["message"].split())) for record in server.records]
    assert sorted(arrived) == [(name, number) for name in range(8) for number in range(50)]
    for name in range(8):
        assert [number for owner, number in arrived if owner == name] == list(range(50))


def test_an_event_that_is_changed_after_enqueue_goes_out_as_it_was(server, client):
    queue = pl.AsyncClient(client, flush_interval=3600)
    record = event()
    queue.enqueue(record)
    record["message"] = "changed"
    queue.close(10)
    assert server.records == [event()]


@pytest.mark.parametrize("record, field", [({"foo": None}, "foo"), ({"source": {"foo": None}}, "source.foo")])
def test_an_unknown_field_is_refused_also_where_it_is_null(record, field):
    with pytest.raises(pl.InvalidError) as caught:
        pl.complete_event(event(**record), {}, "2025-01-01T00:00:00Z")
    assert caught.value.where == field


def test_who_waits_for_room_need_not_wait_for_a_batch_to_fill():
    batches = []
    queue = pl.AsyncClient(None, batch_size=4, queue_capacity=4, flush_interval=3600, deliver=batches.append)
    assert queue.offer([b"{}"] * 3) == 3
    waiter = threading.Thread(target=queue.wait_for_room, daemon=True)
    waiter.start()
    waiter.join(10)
    assert not waiter.is_alive() and batches == []
    assert queue.close(10) is True
    assert [len(batch.records) for batch in batches] == [3]
