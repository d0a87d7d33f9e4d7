#!/usr/bin/env python3
"""Send PackTrack events from a shell: from flags, a JSON file, a JSON array or NDJSON, with retries.

Exit codes:
  0  every event was delivered (with --dry-run and --output: validated, and written)
  1  bad arguments or an invalid event; without --async and --keep-going nothing was sent
  2  refused by the server, or another failure that trying again does not mend
  3  tries or time exhausted; sending again later may work
  4  the input cannot be read or is not JSON, or --output cannot be written
  128+n  ended by signal n, after the same accounting (130 INT, 143 TERM)

The command line is written on the two classes that a program may import: Client and AsyncClient.
Everything here is the standard library of CPython 3.6 or later.
"""

import argparse
import codecs
import io
import json
import os
import re
import sys
import time

VERSION = "1.0.0"
PROGRAM = "packtrack-logger"

# ---- Errors: one class per exit code; a message is one line, without secrets -------------------------------------


class PackTrackError(Exception):
    """What this module raises.

    exit_code: the exit code of the command line. kind: a word for programs. status: the HTTP status, or None.
    where: what the message is about, such as "events.ndjson:151", "--timeout" or "PACKTRACK_TIMEOUT", or None.
    """

    exit_code, kind = 2, "error"

    def __init__(self, message, where=None, status=None, kind=None, ends_run=False):
        super().__init__(message)
        self.where, self.status, self.ends_run = where, status, ends_run
        self.kind = kind or self.kind

    def __str__(self):
        message = super().__str__()
        return "{}: {}".format(self.where, message) if self.where else message


class InvalidError(PackTrackError):
    """Arguments or an event that are not valid; nothing was sent for them."""

    exit_code, kind = 1, "invalid"


class RefusedError(PackTrackError):
    """The server's final no, or a fault that trying again does not mend. ends_run: all the rest would fail alike."""

    exit_code, kind = 2, "refused"


class RetriesExhaustedError(PackTrackError):
    """The tries or the time are used up; a later run may succeed."""

    exit_code, kind = 3, "retries_exhausted"


class InputError(PackTrackError):
    """The input cannot be read or is not what it should be, or a file cannot be written."""

    exit_code, kind = 4, "input"


class Interrupted(BaseException):
    """INT or TERM arrived, or abort() was called, while something waited. Not an Exception: nothing may swallow it."""


# ---- Options: one table, its value parsers, and resolve(argv, environ); no input is read here --------------------

DURATION = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
UNITS = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
LONGEST = 366 * 86400.0
SEVERITIES = ("debug", "info", "warn", "error")
STATUSES = ("ok", "failed", "skipped", "timeout", "retrying", "unknown")
TRUE, FALSE = ("1", "true", "yes", "y", "on"), ("0", "false", "no", "n", "off")
# RFC 3339, 5.6, with a capital T and Z. The calendar is in the pattern: datetime's parsers differ between versions.
TIMESTAMP = (
    r"(?:(?!0000)[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)"
    r"T(?:[01][0-9]|2[0-3]):[0-5][0-9]:(?:[0-5][0-9]|60)(?:\.[0-9]+)?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])\Z"
)


def parse_text(text):
    """Any text."""
    return text


def parse_boolean(text):
    """1/true/yes/y/on or 0/false/no/n/off, in any case."""
    if text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    raise ValueError("must be true or false")


def parse_duration(text):
    """A duration as in Go ("1m30s", "1.5h", "500us") or a bare number of seconds; return seconds."""
    if re.match(DURATION + r"\Z", text):
        seconds = float(text)
    else:
        parts = re.findall("({})([a-z\u00b5\u03bc]+)".format(DURATION), text)
        if not parts or "".join(map("".join, parts)) != text or any(unit not in UNITS for _, unit in parts):
            raise ValueError("must be a duration such as 500ms, 15s or 1m30s")
        seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if seconds > LONGEST:
        raise ValueError("must be at most {}h".format(int(LONGEST // 3600)))
    return seconds


def parse_limit(text):
    """A duration that is not zero; return seconds."""
    seconds = parse_duration(text)
    if not seconds:
        raise ValueError("must be more than zero")
    return seconds


def parse_fraction(text):
    """A decimal number from 0 to 1."""
    if not re.match(DURATION + r"\Z", text) or float(text) > 1:
        raise ValueError("must be a number from 0 to 1")
    return float(text)


def whole_number(least, most):
    """Return the parser of a whole number from least to most."""

    def parse(text):
        if not re.match(r"[0-9]{1,12}\Z", text) or not least <= int(text) <= most:
            raise ValueError("must be a whole number from {} to {}".format(least, most))
        return int(text)

    return parse


def one_of(*choices):
    """Return the parser of an enumeration."""

    def parse(text):
        if text not in choices:
            raise ValueError(wrong_choice(text, choices))
        return text

    parse.choices = choices
    return parse


def wrong_choice(text, choices):
    """Return the words that refuse a value of an enumeration."""
    return 'must be one of {} (got "{}"{})'.format(", ".join(choices), printable(text), nearest(text, choices))


def parse_header(text):
    """A header value: visible ASCII, spaces inside only (RFC 9110, 5.5). It may be a secret, so it is not quoted."""
    if not re.match(r"[!-~](?:[ -~]*[!-~])?\Z", text):
        raise ValueError("must be visible ASCII characters, with spaces inside only (the value is not shown)")
    return text


def parse_required(text):
    """Text that is not empty."""
    if not text:
        raise ValueError("must not be empty")
    return text


def parse_timestamp(text):
    """An RFC 3339 timestamp with T and zone; empty is absent."""
    if text and not re.match(TIMESTAMP, text):
        raise ValueError('must be an RFC 3339 time such as 2025-11-25T09:30:00Z (got "{}")'.format(printable(text)))
    return text


def parse_object(text):
    """A JSON object; empty is absent. What is wrong is told by its column, not quoted."""
    if not text:
        return {}
    try:
        value = parse_json(text)
    except InputError as error:
        raise ValueError(str(error))
    if type(value) is not dict:
        raise ValueError("must be a JSON object")
    return value


def parse_base_url(text):
    """An http or https URL of a host, without user, query or fragment; return it without trailing slashes."""
    if "@" in text:
        raise ValueError("must not hold a user or password (the value is not shown)")
    match = re.match(r"(https?)://(\[[^][/?#]*\]|[^][:/?#]*)(?::([^/?#]*))?(/[^?#]*)?\Z", text)
    if not match or not match.group(2):
        raise ValueError("must be http://HOST or https://HOST with an optional port and path, and nothing more")
    scheme, host, port, path = match.groups()
    if port is not None and not (re.match(r"[0-9]{1,5}\Z", port) and 0 < int(port) < 65536):
        raise ValueError("the port must be a number from 1 to 65535")
    if path and not re.match(r"[!-~]*\Z", path):
        raise ValueError("the path must be percent-encoded ASCII")
    return "{}://{}{}{}".format(scheme, check_host(host), ":" + port if port else "", (path or "").rstrip("/"))


def parse_path(text):
    """The path of a URL, with or without its first slash."""
    if not re.match(r"[!-\"$-~]*\Z", text):
        raise ValueError("must be percent-encoded ASCII without a fragment")
    return "/" + text.lstrip("/")


def check_host(host):
    """Return a host name in ASCII or an IPv6 address in brackets; raise ValueError for what is neither."""
    if host.startswith("["):
        import socket

        try:
            socket.inet_pton(socket.AF_INET6, host[1:-1])
        except OSError:
            raise ValueError("what stands in brackets must be an IPv6 address")
        return host
    try:
        name = host.encode("ascii" if re.match(r"[ -~]*\Z", host) else "idna").decode("ascii")
    except UnicodeError:
        name = ""
    if not re.match(r"(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?\Z", name) or len(name) > 254:
        raise ValueError("the host name is not valid")
    return name


class Option:
    """One option: what the parser, the environment, --help, the README and the completions know of it."""

    __slots__ = ("name", "parse", "default", "metavar", "group", "help", "short", "in_environment", "path", "field")

    def __init__(self, name, parse, default, metavar, group, help, short=None, in_environment=True, path=False, field=None):
        self.name, self.parse, self.default, self.metavar, self.group, self.help = (
            name, parse, default, metavar, group, help)
        self.short, self.in_environment, self.path, self.field = short, in_environment, path, field

    @property
    def flag(self):
        return "--" + self.name

    @property
    def is_boolean(self):
        return self.parse is parse_boolean

    @property
    def opposite(self):
        """The flag that undoes a boolean."""
        return "--" + (self.name[3:] if self.name.startswith("no-") else "no-" + self.name)

    @property
    def flags(self):
        """Every spelling on the command line, the usual one first."""
        undo = [self.opposite] if self.is_boolean and self.in_environment else []
        return [self.flag] + undo + ([self.short] if self.short else [])

    @property
    def variable(self):
        return "PACKTRACK_" + self.name.upper().replace("-", "_")

    @property
    def choices(self):
        return getattr(self.parse, "choices", ())


CORE, EVENT, INPUT, DELIVERY, DIAGNOSTICS, ASYNC, COMMAND = (
    "Core", "Event construction", "Input sources", "Delivery", "Diagnostics", "Async", "Command")

OPTIONS = (
    Option("api-key", parse_header, None, "KEY", CORE, "key of the service; safer in a file or the environment"),
    Option("api-key-file", parse_required, None, "PATH", CORE, "take the key from the file's first line", path=True),
    Option("base-url", parse_base_url, "https://pack.shimcounty.com", "URL", CORE, "where the service is"),
    Option("health-path", parse_path, "/api/health", "PATH", CORE, "path of the health check"),
    Option("timeout", parse_limit, "15s", "DURATION", CORE, "limit of one attempt, from connecting to the answer"),
    Option("retries", whole_number(0, 1000), "3", "N", CORE, "further tries after the first"),
    Option("backoff-initial", parse_duration, "100ms", "DURATION", CORE, "wait before the first further try"),
    Option("backoff-max", parse_duration, "2s", "DURATION", CORE, "longest wait between tries, before jitter"),
    Option("jitter", parse_fraction, "0.2", "FRACTION", CORE, "random share of each wait, 0 to 1"),
    Option("user-agent", parse_header, "pack-track-sdk-python/{0} packtrack-logger/{0}".format(VERSION), "TEXT", CORE,
           "User-Agent header"),
    Option("idempotency-key", parse_header, None, "KEY", CORE,
           "Idempotency-Key header, with the record numbers where a run makes several requests; auto: a hash of the body"),
    Option("gzip", parse_boolean, None, None, CORE, "compress the body"),

    Option("timestamp", parse_timestamp, None, "RFC3339", EVENT, "time of the event; default now", field=("timestamp",)),
    Option("source-system", parse_required, None, "TEXT", EVENT, "required", field=("source", "system")),
    Option("source-env", parse_text, None, "TEXT", EVENT, "such as prod", field=("source", "env")),
    Option("workflow-id", parse_required, None, "TEXT", EVENT, "required", field=("workflow", "id")),
    Option("workflow-name", parse_text, None, "TEXT", EVENT, "the workflow's name", field=("workflow", "name")),
    Option("run-id", parse_text, None, "TEXT", EVENT, "the workflow's run", field=("workflow", "run_id")),
    Option("step-id", parse_text, None, "TEXT", EVENT, "the run's step", field=("workflow", "step_id")),
    Option("actor-type", parse_required, None, "TEXT", EVENT, "required, such as agent", field=("actor", "type")),
    Option("actor-id", parse_required, None, "TEXT", EVENT, "required", field=("actor", "id")),
    Option("actor-display", parse_text, None, "TEXT", EVENT, "the actor's name", field=("actor", "display_name")),
    Option("severity", one_of(*SEVERITIES), None, "WORD", EVENT, "required:", field=("severity",)),
    Option("status", one_of(*STATUSES), None, "WORD", EVENT, "required:", field=("status",)),
    Option("message", parse_required, None, "TEXT", EVENT, "required", field=("message",)),
    Option("metadata", parse_object, None, "JSON", EVENT, "a JSON object", field=("metadata",)),
    Option("extra", parse_object, None, "JSON", EVENT, "a JSON object", field=("extra",)),

    Option("file", parse_required, None, "PATH", INPUT, "read a JSON event or array; - is standard input", path=True),
    Option("stdin", parse_boolean, None, None, INPUT, "read standard input"),
    Option("ndjson", parse_boolean, None, None, INPUT, "the input holds one JSON event a line"),

    Option("batch-size", whole_number(1, 1000000), "100", "N", DELIVERY, "most records of one request"),
    Option("max-batch-bytes", whole_number(1, 1 << 30), "1000000", "N", DELIVERY, "most bytes of one request's body"),
    Option("deadline", parse_limit, None, "DURATION", DELIVERY, "limit of the whole run; past it: exit 3"),
    Option("keep-going", parse_boolean, None, None, DELIVERY, "skip what is invalid or refused, deliver the rest"),
    Option("undelivered", parse_required, None, "FILE", DELIVERY, "append what was read and not delivered", path=True),
    Option("output", parse_required, None, "FILE", DELIVERY, "append to FILE instead of sending; - is standard output",
           path=True),

    Option("verbose", parse_boolean, None, None, DIAGNOSTICS, "tell of attempts, waits and statuses", short="-v"),
    Option("dry-run", parse_boolean, None, None, DIAGNOSTICS, "validate only"),
    Option("health", parse_boolean, None, None, DIAGNOSTICS, "ask the service's health; exit 0 or 1"),
    Option("health-enable", parse_boolean, None, None, DIAGNOSTICS, "ask it before sending too, told by --verbose"),
    Option("json", parse_boolean, None, None, DIAGNOSTICS, "one line of JSON on standard output at the end"),
    Option("progress", parse_boolean, None, None, DIAGNOSTICS, "show progress; default on a terminal"),
    Option("completion", one_of("bash", "zsh", "fish"), None, "SHELL", DIAGNOSTICS, "print the completion script:",
           in_environment=False),
    Option("version", parse_boolean, None, None, DIAGNOSTICS, "print the version", short="-V", in_environment=False),
    Option("help", parse_boolean, None, None, DIAGNOSTICS, "print this", short="-h", in_environment=False),

    Option("async", parse_boolean, None, None, ASYNC, "send while reading; memory stays bounded, pipes are not kept"),
    Option("flush-interval", parse_limit, "1s", "DURATION", ASYNC, "longest wait of a record for its batch to fill"),
    Option("queue-capacity", whole_number(1, 10000000), "10000", "N", ASYNC, "most records waiting; then reading waits"),
    Option("no-flush", parse_boolean, None, None, ASYNC, "abandon what is queued at the end"),

    Option("command-timeout", parse_limit, None, "DURATION", COMMAND, "send TERM then, and KILL 5s later; exit 124"),
    Option("strict", parse_boolean, None, None, COMMAND, "a failed delivery fails a command that succeeded"),
)

BY_NAME = {option.name: option for option in OPTIONS}
EVENT_OPTIONS = tuple(option for option in OPTIONS if option.field)


class Settings(dict):
    """The value of each option by its name, defaults included.

    sources: {name: the flag or variable that gave it}. command: what stands after `--`, or None. trouble: with a
    command, the first error of the environment, which must not keep the command from running; else None.
    """

    def __init__(self):
        super().__init__()
        self.sources, self.command, self.trouble = {}, None, None

    def from_flag(self, name):
        """Tell whether the command line gave this option."""
        return self.sources.get(name, "").startswith("-")


class Keep(argparse.Action):
    """Keeps a flag as it was written beside its text; values are parsed later, as those of the environment are."""

    def __call__(self, parser, namespace, value, flag=None):
        vars(namespace)[self.dest] = (flag, value)


class Parser(argparse.ArgumentParser):
    """argparse with our errors: exit code 1, and no value quoted, since it may be a secret."""

    def error(self, message):
        name, _, why = message.partition(": ")
        flag = name.replace("argument ", "").split("/")[0]
        raise InvalidError("needs a value" if why.startswith("expected") else "takes no value", where=flag)


def parse_command_line(argv):
    """Return {option name: (flag, text; None for a bare boolean)} and the command after `--`, or None."""
    # The help is ours. A fixed width keeps argparse from importing shutil to measure the terminal at each flag.
    parser = Parser(
        add_help=False, allow_abbrev=False, usage="", argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80))
    takes_value = set()
    for option in OPTIONS:
        parser.add_argument(*option.flags, dest=option.name, action=Keep, nargs="?" if option.is_boolean else None)
        if not option.is_boolean:
            takes_value.add(option.flag)
    words, command, rest = [], None, iter(argv)
    for word in rest:
        if word == "--":
            command = list(rest)
            break
        if word in takes_value:  # joined, since argparse takes a value that begins with a dash for a flag
            for value in rest:
                word += "=" + value
                break
        words.append(word)
    given, unknown = parser.parse_known_args(words)
    for word in unknown:
        if not word.startswith("-") or word == "-":
            raise InvalidError("unexpected argument (not shown: it may be a secret); put quotes around a value "
                               "with blanks, and -- before a command")
        flag = word.split("=")[0]
        known = [known for option in OPTIONS for known in option.flags]
        raise InvalidError("unknown flag {}{}; see --help".format(printable(flag), nearest(flag, known)))
    if command == []:
        raise InvalidError("a command must follow --")
    return vars(given), command


def utf8(text):
    """Return text of the command line or environment as UTF-8, whatever the locale took it for; or ValueError."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise ValueError("must be UTF-8")


def read_option(option, flag, text):
    """Return the value of an option from its text; errors name the flag or the variable."""
    source = flag or option.variable
    try:
        if option.is_boolean:
            value = True if text is None else parse_boolean(text)
            return not value if source == option.opposite else value
        return option.parse(text if option.path else utf8(text))
    except ValueError as error:
        raise InvalidError(str(error), where=source)


def resolve(argv, environ):
    """Return the Settings of a command line (a list, without the program's name) and an environment (a mapping).

    A flag beats its variable, and that the default. Raises InvalidError.
    """
    given, command = parse_command_line(argv)
    settings = Settings()
    settings.command = command
    for option in OPTIONS:
        flag, text = given.get(option.name, (None, None))
        settings[option.name] = None if option.default is None else option.parse(option.default)
        if flag:
            settings.sources[option.name] = flag
            settings[option.name] = read_option(option, flag, text)
        elif option.in_environment and environ.get(option.variable):
            settings.sources[option.name] = option.variable
            try:
                settings[option.name] = read_option(option, None, environ[option.variable])
            except InvalidError as error:
                if command is None:
                    raise
                settings.trouble = settings.trouble or error
    if not any(settings[name] for name in ("help", "version", "completion")):
        settle_sources(settings)
        settle_combinations(settings)
    return settings


def settle_sources(settings):
    """Leave one source of records in settings; what the command line says beats the environment."""
    sources = [name for name in ("file", "stdin") if settings[name]]
    from_flags = [name for name in sources if settings.from_flag(name)]
    if settings.command is not None:
        if from_flags:
            raise InvalidError("cannot be combined with a command after --", where=settings.sources[from_flags[0]])
        chosen = []
    else:
        chosen = from_flags or sources
    if len(chosen) > 1:
        raise InvalidError("one source of records, please: {} or {}".format(*(settings.sources[n] for n in chosen)))
    for name in sources:
        if name not in chosen:
            settings[name] = None


def settle_combinations(settings):
    """Refuse flags that contradict each other; of variables, drop those that are about another kind of run."""
    with_command = "cannot be combined with a command after --"
    rules = (
        ("ndjson", settings["file"] or settings["stdin"], "needs --file or --stdin"),
        ("no-flush", settings["async"], "needs --async"),
        ("command-timeout", settings.command, "needs a command after --"),
        ("strict", settings.command, "needs a command after --"),
        ("json", not settings.command, with_command),
        ("health", not settings.command, with_command),
        ("dry-run", not settings.command, with_command),
        ("output", not settings.command or settings["output"] != "-", "- " + with_command),
    )
    for name, holds, why in rules:
        if settings[name] and not holds:
            error = InvalidError(why, where=settings.sources[name])
            if settings.from_flag(name):
                raise error
            if name in ("dry-run", "output"):  # the user may rely on these to keep the event from being sent
                settings.trouble = settings.trouble or error
            settings[name] = None
    if settings.from_flag("api-key-file") and not settings.from_flag("api-key"):
        settings["api-key"] = None
    elif settings["api-key"]:
        settings["api-key-file"] = None


# ---- Texts: what people read, derived from the table; nothing is printed here ------------------------------------

EXIT_CODES = re.findall(r"^  (\S+)  (.+)$", __doc__ or "", re.MULTILINE)
USAGE = (
    "packtrack-logger [FLAGS] --workflow-id ID ... --message TEXT",
    "packtrack-logger [FLAGS] --file PATH [--ndjson]",
    "packtrack-logger [FLAGS] --stdin [--ndjson]",
    "packtrack-logger [FLAGS] -- COMMAND [ARG...]",
)
EXAMPLES = (
    "packtrack-logger --source-system shop --workflow-id wf-1 --actor-type agent \\\n"
    "      --actor-id a-42 --severity info --status ok --message 'checkout completed'",
    "packtrack-logger --stdin --ndjson --gzip --undelivered left.ndjson < events.ndjson",
    "packtrack-logger --source-system cron --workflow-id backup --actor-type host \\\n"
    "      --actor-id db1 -- /usr/local/bin/backup.sh --full",
)
QUOTED = 200


def printable(text):
    """Return text on one line, without control characters, of at most 200 characters."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(text.split())[:QUOTED]


def redact(text, secrets):
    """Return text with every secret cut out, also where it was escaped for JSON, HTML or a URL."""
    for secret in filter(None, secrets):
        from urllib.parse import quote
        forms = {secret, json.dumps(secret)[1:-1], quote(secret), quote(secret, safe="")}
        forms.add(secret.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, "***")
    return text


def nearest(word, known):
    """Return words that name the nearest of the known words, or nothing."""
    import difflib

    found = difflib.get_close_matches(word, known, 1)
    return "; did you mean {}?".format(found[0]) if found else ""


def usage_text():
    """Return the short usage."""
    return "Usage:\n  {}\nSee packtrack-logger --help.\n".format("\n  ".join(USAGE))


def help_text():
    """Return --help: at most 80 columns, and never a value of the environment."""
    import textwrap

    lines = ["Send PackTrack events: from flags, a JSON file, an array, NDJSON or a command.", "", "Usage:"]
    lines += ["  " + usage for usage in USAGE]
    for group in (CORE, EVENT, INPUT, DELIVERY, DIAGNOSTICS, ASYNC, COMMAND):
        lines += ["", group + (" (with --file or --stdin: defaults for what records lack):" if group is EVENT else ":")]
        for option in OPTIONS:
            if option.group is group:
                flag = "  {}{} {}".format(
                    option.short + ", " if option.short else "", option.flag, option.metavar or "").rstrip()
                about = " ".join([option.help] + [", ".join(option.choices)] * bool(option.choices))
                facts = [option.variable] * option.in_environment + ["default {}".format(option.default)] * bool(option.default)
                about += " [{}]".format(", ".join(facts)) if facts else ""
                width = 26
                lines += textwrap.wrap(about, 80, initial_indent=flag.ljust(width - 1) + " ",
                                       subsequent_indent=" " * width, break_long_words=False, break_on_hyphens=False)
    lines += ["", "A boolean flag has a --no- form. Each flag beats its variable, and that the default.", ""]
    lines += ["Exit codes:"]
    for code, meaning in EXIT_CODES:
        lines += textwrap.wrap(meaning, 80, initial_indent="  {:<6}".format(code), subsequent_indent=" " * 8)
    lines += ["  With a command: the command's own, 124 after --command-timeout.", "", "Examples:"]
    return "\n".join(lines + ["  " + example for example in EXAMPLES]) + "\n"


def readme_tables():
    """Return the README's two tables, {"options": text, "exit-codes": text}, in Markdown."""
    rows = ["| flag | variable | default | what it does |", "|---|---|---|---|"]
    for option in OPTIONS:
        flag = "`{}`".format(" ".join(filter(None, (option.flag, option.metavar))))
        about = " ".join([option.help] + [", ".join("`{}`".format(c) for c in option.choices)] * bool(option.choices))
        rows.append("| {}{} | {} | {} | {} |".format(
            "`{}`, ".format(option.short) if option.short else "", flag,
            "`{}`".format(option.variable) if option.in_environment else "",
            "`{}`".format(option.default) if option.default else "", about.replace("|", "\\|")))
    codes = ["| exit code | meaning |", "|---|---|"] + ["| {} | {} |".format(*row) for row in EXIT_CODES]
    return {"options": "\n".join(rows) + "\n", "exit-codes": "\n".join(codes) + "\n"}


def completion(shell):
    """Return the completion script of "bash", "zsh" or "fish"."""
    return {"bash": bash_completion, "zsh": zsh_completion, "fish": fish_completion}[shell]()


def bash_completion():
    """For bash 3.2 or later; where it proposes nothing, the shell's own file names stand in."""
    words = " ".join(flag for option in OPTIONS for flag in option.flags)
    cases = "".join(
        '        {}) COMPREPLY=($(compgen -W "{}" -- "$cur")); return ;;\n'.format(option.flag, " ".join(option.choices))
        for option in OPTIONS if option.choices)
    values = "|".join(option.flag for option in OPTIONS if not (option.is_boolean or option.choices))
    return """_packtrack_logger() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [ "${COMP_WORDS[i]}" = -- ]; then
            [ $((i + 1)) -eq "$COMP_CWORD" ] && COMPREPLY=($(compgen -c -- "$cur"))
            return
        fi
    done
    if [ "$cur" = = ]; then cur=; elif [ "$prev" = = ]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi
    case $prev in
%s        %s) return ;;
    esac
    COMPREPLY=($(compgen -W "%s" -- "$cur"))
}
complete -o default -F _packtrack_logger packtrack-logger packtrack-logger.pyz
""" % (cases, values, words)


def zsh_completion():
    """For a file _packtrack-logger on $fpath, or to be sourced after compinit."""
    lines = []
    for option in OPTIONS:
        about = re.sub(r"([][:\\])", r"\\\1", option.help.rstrip(":")).replace("'", "'\\''")
        value = ""
        if not option.is_boolean:
            what = "({})".format(" ".join(option.choices)) if option.choices else "_files" if option.path else " "
            value = ":{}:{}".format(option.metavar, what)
        lines += ["    '{}[{}]{}' \\".format(flag, about, value) for flag in option.flags]
    return """#compdef packtrack-logger packtrack-logger.pyz
_packtrack_logger() {
  _arguments -S \\
%s
    '*::command:_normal'
}
if [ "$funcstack[1]" = _packtrack-logger ]; then
  _packtrack_logger "$@"
else
  compdef _packtrack_logger packtrack-logger packtrack-logger.pyz
fi
""" % "\n".join(lines)


def fish_completion():
    """To be sourced, or kept in fish's completions directory."""
    lines = []
    for option in OPTIONS:
        value = ""
        if not option.is_boolean:
            value = " -x -a '{}'".format(" ".join(option.choices)) if option.choices else " -r -F" if option.path else " -x"
        about = option.help.rstrip(":").replace("'", "\\'")
        for flag in option.flags:
            kind = "-l " + flag[2:] if flag.startswith("--") else "-s " + flag[1:]
            lines.append("complete -c packtrack-logger -f {}{} -d '{}'".format(kind, value, about))
    return "\n".join(lines) + "\n"


# ---- Events: pure functions from records to records; no files, no clock ------------------------------------------

FIELDS = ("timestamp", "source", "workflow", "actor", "severity", "status", "message", "metadata", "extra")
PARTS = {
    "source": ("system", "env"),
    "workflow": ("id", "name", "run_id", "step_id"),
    "actor": ("type", "id", "display_name"),
}
REQUIRED = ("source.system", "workflow.id", "actor.type", "actor.id", "severity", "status", "message")
# A part's other names belong to its id: a default for them sticks to no other id.
ANCHORS = {"source": "system", "workflow": "id", "actor": "id"}
MAX_RECORD = 16 << 20
MAX_DEPTH = 500
MAX_DIGITS = 4300
skip_blanks = re.compile(r"[ \t\r\n]*").match


def _finite(text):
    value = float(text)
    if value - value:
        raise ValueError("a number is too large")
    return value


def _no_constant(name):
    raise ValueError("{} is not JSON".format(name))


# The C scanner that json.loads calls, called directly: no wrapper per record, and it reads from any position.
scan_once = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant).scan_once


def bulk_fault(text):
    """Return what is wrong with large JSON text that Python versions would disagree about, or None."""
    if len(text) > MAX_RECORD:
        return "a record of more than 16 MiB"
    if len(text) <= MAX_DIGITS and text.count("[") + text.count("{") <= MAX_DEPTH:
        return None
    depth, in_string = 0, False
    for match in re.finditer(r'\\.|["\][{}]|[0-9]{%d}' % (MAX_DIGITS + 1), text):
        token = match.group()
        if token == '"':
            in_string = not in_string
        elif in_string or token[0] == "\\":
            continue
        elif token in ("[", "{"):
            depth += 1
            if depth > MAX_DEPTH:
                return "more than {} levels of nesting".format(MAX_DEPTH)
        elif token in ("]", "}"):
            depth -= 1
        else:
            return "a number of more than {} digits".format(MAX_DIGITS)
    return None


def json_fault(error):
    """Return what an error of scan_once says, in words that quote nothing."""
    if isinstance(error, RecursionError):
        return "more than {} levels of nesting".format(MAX_DEPTH)
    if isinstance(error, StopIteration):
        return "not JSON: a value is expected"
    message = getattr(error, "msg", None)  # of a JSONDecodeError; other ValueErrors are _finite's and _no_constant's
    if not message:
        return str(error)
    return "not JSON: " + (message[:1].lower() + message[1:]).replace(" starting at", "")


def parse_json(text):
    """Return the value of JSON text, strictly: raises InputError that tells what and where, and quotes nothing."""
    fault, position = bulk_fault(text), None
    if fault is None:
        try:
            value, end = scan_once(text, skip_blanks(text).end())
            position = skip_blanks(text, end).end()
            if position == len(text):
                return value
            fault = "not JSON: something follows the value"
        except (ValueError, StopIteration, RecursionError) as error:
            fault, position = json_fault(error), getattr(error, "pos", getattr(error, "value", None))
    raise InputError(fault if position is None else "{} at column {}".format(
        fault, position - text.rfind("\n", 0, position)))


def dump_json(value):
    """Return value as the bytes of compact JSON on one line."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only hold escaped
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidError("cannot be written as JSON: {}".format(printable(str(error))))


def check_event(event):
    """Raise InvalidError, which names the field, unless event is a complete and valid event (a dict)."""
    _check_names("", event, FIELDS)
    for part, names in PARTS.items():
        if event.get(part) is not None:
            if type(event[part]) is not dict:
                raise InvalidError("must be an object", where=part)
            _check_names(part + ".", event[part], names)
    for path in ("timestamp",) + REQUIRED:
        value = _value(event, path)
        if value is None or value == "":
            raise InvalidError("is required" if value is None else "must not be empty", where=path)
    for path in ("timestamp", "severity", "status", "message") + tuple(
            "{}.{}".format(part, name) for part, names in PARTS.items() for name in names):
        value = _value(event, path)
        if value is not None and type(value) is not str:
            raise InvalidError("must be a string", where=path)
    for path, choices in (("severity", SEVERITIES), ("status", STATUSES)):
        if event[path] not in choices:
            raise InvalidError(wrong_choice(event[path], choices), where=path)
    try:
        parse_timestamp(event["timestamp"])
    except ValueError as error:
        raise InvalidError(str(error), where="timestamp")
    for name in ("metadata", "extra"):
        if event.get(name) is not None and type(event[name]) is not dict:
            raise InvalidError("must be an object", where=name)


def _value(event, path):
    part, _, name = path.partition(".")
    value = event.get(part)
    return value.get(name) if name and value is not None else value


def _check_names(prefix, record, known):
    for name in record:
        if name not in known:
            raise InvalidError('unknown field{} (what is your own belongs under "metadata")'.format(
                nearest(name, known)), where=prefix + printable(name))


def complete_event(event, defaults, now):
    """Return a copy of event (a dict) with what it lacks, null included, filled in.

    defaults: an event of any fields. now: the timestamp, text, of an event that has none. What the event says wins.
    Raises InvalidError if the result is not a valid event.
    """
    known = {name: event[name] for name in event if event[name] is not None}
    result = {}
    for name in FIELDS + tuple(name for name in known if name not in FIELDS):
        own, default = known.get(name), defaults.get(name)
        if name in PARTS and (own is None or type(own) is dict):
            own = {key: own[key] for key in own if own[key] is not None} if own else {}
            anchor = ANCHORS[name]
            default = default or {}
            if anchor in own and own[anchor] != default.get(anchor):
                default = {key: default[key] for key in default if key in ("type",)}
            own = _merge(own, default)
        elif name in ("metadata", "extra") and type(own) is dict and default:
            own = _merge(own, default)
        elif own is None:
            own = default or (now if name == "timestamp" else None)
        if own is not None and not (name in PARTS and not own):
            result[name] = own
    check_event(result)
    return result


def _merge(own, default):
    merged = dict(own)
    for key in default:
        merged.setdefault(key, default[key])
    return merged


def completeness_test(defaults):
    """Return a fast test of a parsed record: True only if it is valid and lacks nothing that the defaults hold.

    It may say False of a valid record; complete_event then has the last word. The test runs once a record, so it is
    flat: join() checks in one call that all values are strings, lengths that there is no unknown name.
    """
    timestamp, join = re.compile(TIMESTAMP).match, "".join
    severities, statuses = frozenset(SEVERITIES), frozenset(STATUSES)

    def is_complete(event):
        try:
            source, workflow, actor, message = event["source"], event["workflow"], event["actor"], event["message"]
            join(source.values())
            join(workflow.values())
            join(actor.values())
            known = 7
            if "metadata" in event:
                known = 8
                if type(event["metadata"]) is not dict:
                    return False
            if "extra" in event:
                known += 1
                if type(event["extra"]) is not dict:
                    return False
            return (
                len(event) == known and type(message) is str and message != ""
                and event["severity"] in severities and event["status"] in statuses
                and source["system"] != "" and workflow["id"] != "" and actor["type"] != "" and actor["id"] != ""
                and len(source) == 1 + ("env" in source) and len(actor) == 2 + ("display_name" in actor)
                and len(workflow) == 1 + ("name" in workflow) + ("run_id" in workflow) + ("step_id" in workflow)
                and timestamp(event["timestamp"]) is not None)
        except (KeyError, TypeError, AttributeError):
            return False

    wanted = [(part, name) for part in tuple(PARTS) + ("metadata", "extra") for name in defaults.get(part, ())]

    def lacks_nothing(event):
        if is_complete(event):
            for part, name in wanted:
                if name not in event.get(part, ()):
                    return False
            return True
        return False

    return lacks_nothing if wanted else is_complete


def event_defaults(settings):
    """Return the defaults that the event options give: an event of any fields."""
    defaults = {}
    for option in EVENT_OPTIONS:
        value = settings[option.name]
        if value:
            place = defaults
            for name in option.field[:-1]:
                place = place.setdefault(name, {})
            place[option.field[-1]] = value
    return defaults


def utc_timestamp(seconds):
    """Return seconds since the epoch as an RFC 3339 time in UTC with microseconds."""
    whole = int(seconds // 1)
    return "{}.{:06d}Z".format(time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)), int((seconds - whole) * 1e6))


# ---- Input: from streams to records; no network ------------------------------------------------------------------

BLOCK = 1 << 20
SPOOL_IN_MEMORY = 4 << 20
BULKY = 1000
BLANK = b" \t\r\n"
BOM = b"\xef\xbb\xbf"
skip_to_object = re.compile(r"[ \t\r\n]*,[ \t\r\n]*(?=\{)").match


class Watch:
    """Bounds whatever waits: by the run's deadline, and by INT and TERM.

    Waiting is done inside `with watch:`. Only there does a signal raise Interrupted, so that no accounting is cut in
    two; elsewhere it is noted, and raised where the next wait begins.
    seconds: the deadline of the run from now, or None. now, pause: the monotonic clock and the way to sleep.
    """

    def __init__(self, seconds=None, now=time.monotonic, pause=time.sleep):
        self.now, self.pause, self.signal, self.signals, self._waiting = now, pause, None, 0, False
        self.deadline = None if seconds is None else now() + seconds

    def handle_signal(self, number, frame=None):
        """The handler of INT and TERM."""
        self.signal = self.signal or number
        self.signals += 1
        if self._waiting:
            self._waiting = False
            raise Interrupted()

    def __enter__(self):
        self._waiting = True
        if self.signal:
            self._waiting = False
            raise Interrupted()

    def __exit__(self, *_):
        self._waiting = False

    def left(self, limit=None):
        """Return the seconds left, at most limit; None is no limit. Raises RetriesExhaustedError past the deadline."""
        if self.deadline is None:
            return limit
        left = self.deadline - self.now()
        if left <= 0:
            raise RetriesExhaustedError("the run's deadline has passed", kind="deadline")
        return left if limit is None else min(left, limit)

    def sleep(self, seconds):
        with self:
            self.pause(seconds)

    def stop(self):
        """Make the next wait raise Interrupted."""
        self.signal = self.signal or -1


class ThreadWatch(Watch):
    """The Watch of a thread that no signal reaches: another thread's stop() ends its sleep too."""

    def __init__(self, deadline=None):
        import threading

        bell = threading.Event()
        super().__init__(pause=bell.wait)
        self.deadline, self._bell = deadline, bell

    def stop(self):
        super().stop()
        self._bell.set()


class Source:
    """A file, a pipe or standard input, open for reading.

    name: for messages. is_file: whether it is a regular file, which can be read twice. Raises InputError.
    """

    def __init__(self, path, watch):
        import stat

        self.watch, self._waiting_error = watch, None
        self.name = "standard input" if path == "-" else printable(os.fsencode(path).decode("utf-8", "replace"))
        try:
            if path != "-":
                self.raw = io.FileIO(self._open(path, stat.S_ISFIFO(os.stat(path).st_mode)))
            elif sys.stdin is None:
                raise InputError("is closed", where=self.name)
            else:
                self.raw = io.FileIO(0, closefd=False)
            self.mode = os.fstat(self.raw.fileno()).st_mode
            self.is_file = stat.S_ISREG(self.mode)
            self.size = os.fstat(self.raw.fileno()).st_size if self.is_file else None
            self.base = self.raw.tell() if self.is_file else 0
        except (OSError, ValueError) as error:
            raise InputError("cannot be read: " + reason(error), where=self.name)

    def _open(self, path, is_fifo):
        # Opening a FIFO waits for its writer. Linux can wait in read() instead, where the deadline holds.
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
        if is_fifo and sys.platform.startswith("linux"):
            descriptor = os.open(path, flags | os.O_NONBLOCK)
            os.set_blocking(descriptor, True)
            return descriptor
        with self.watch:
            return os.open(path, flags)

    def read(self):
        """Return the bytes that are there, at most BLOCK; b"" at the end."""
        try:
            while True:
                if self.is_file:
                    self.watch.left()
                else:
                    self._wait()
                chunk = self.raw.read(BLOCK)
                if chunk is not None:  # None: standard input is non-blocking, and another process was faster
                    return chunk
        except OSError as error:
            raise InputError("cannot be read: " + reason(error), where=self.name)

    def read_block(self):
        """Return BLOCK bytes, or fewer at the end. What was read before a deadline or signal is returned before it."""
        if self._waiting_error:
            raise self._waiting_error
        chunks, size = [], 0
        try:
            while size < BLOCK:
                chunk = self.read()
                if not chunk:
                    break
                chunks.append(chunk)
                size += len(chunk)
        except (Interrupted, RetriesExhaustedError) as error:
            if not chunks:
                raise
            self._waiting_error = error
        return b"".join(chunks)

    def _wait(self):
        import select

        if os.name == "nt":  # Windows can only wait for sockets there
            return
        while True:
            left = self.watch.left()
            with self.watch:
                if hasattr(select, "poll"):  # unlike select(), it takes descriptors past 1023
                    poll = select.poll()
                    poll.register(self.raw.fileno(), select.POLLIN)
                    if poll.poll(None if left is None else left * 1000 + 1):
                        return
                elif select.select([self.raw], [], [], left)[0]:
                    return

    def close(self):
        self.raw.close()


class Replay:
    """Reads a source and later parts of it again: a regular file from itself, a pipe from what was kept of it."""

    def __init__(self, source, keep=True):
        self.source, self._spool = source, None
        if keep and not source.is_file:
            from tempfile import SpooledTemporaryFile

            # In memory, and past that in a file without a name that nobody else can open.
            self._spool = SpooledTemporaryFile(max_size=SPOOL_IN_MEMORY)

    def read(self):
        """Return the next block of the source, kept if need be."""
        chunk = self.source.read_block()
        if self._spool is not None:
            try:
                self._spool.write(chunk)
            except OSError as error:
                raise InputError("there is no place to keep it while it is validated ({}); --async needs none".format(
                    reason(error)), where=self.source.name)
        return chunk

    def again(self, start, size):
        """Return size bytes from start on, fewer if they are no longer there."""
        file, parts = (self.source.raw if self._spool is None else self._spool), []
        file.seek(self.source.base + start)
        while size > 0:
            part = file.read(min(size, BLOCK))
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def close(self):
        if self._spool is not None:
            self._spool.close()
        self.source.close()


class Block:
    """Records that were read together.

    records: their bytes, as they will be sent; those that are refused, as they came. errors: {index: why refused}.
    start, data: where the first begins in the stream, and the stream's bytes from there to the end of the last.
    broken: the last one is the whole rest of the stream, in which records cannot be told apart; start holds for it.
    """

    __slots__ = ("records", "errors", "start", "data", "broken")

    def __init__(self, records, errors, start, data, broken=False):
        self.records, self.errors, self.start, self.data, self.broken = records, errors, start, data, broken


def cut_records(data, gap):
    """Return the records of bytes in which gap, and nothing else, stands between any two of them."""
    if b"," not in gap:
        return data.split(gap)
    return [b"{" + piece + b"}" for piece in data[1:-1].split(b"}" + gap + b"{")]


class Scanner:
    """Cuts bytes into records, validates and completes them.

    name: of the source, for errors. ndjson: one record a line, else a JSON object or array. defaults: for complete_event.
    single: after reading, whether it was one object. count: records so far, refused ones included.
    """

    def __init__(self, name, ndjson, defaults):
        self.name, self.ndjson, self.defaults = name, ndjson, defaults
        self.single, self.count = False, 0
        self._is_complete = completeness_test(defaults)

    def blocks(self, read):
        """Yield the Blocks of a stream; read() returns its next bytes, b"" at the end. Raises InputError if it is empty."""
        head = b""
        while len(head) < 4:
            chunk = read()
            if not chunk:
                break
            head += chunk
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError("is UTF-16; convert it to UTF-8", where=self.name)
        start = len(BOM) if head.startswith(BOM) else 0
        for block in (self._lines if self.ndjson else self._elements)(read, head[start:], start):
            self.count += len(block.records)
            yield block
        if not self.count:
            raise InputError("holds no event", where=self.name)

    def scan_again(self, data):
        """Return the records and errors of a Block from its data."""
        if self.ndjson:
            block = self._line_block(data, 0, 1)
            return block.records, block.errors
        return self._element_block(data if self.single else data + b"]", 0, False, True, 1)[:2]

    def _lines(self, read, data, start):
        line, final = 1, not data
        while not final:
            end = data.rfind(b"\n") + 1
            if end:
                yield self._line_block(data[:end], start, line)
                line += data.count(b"\n", 0, end)
                start += end
                data = data[end:]
            elif len(data) > MAX_RECORD:
                yield self._broken(data, start, line, 0, "a line of more than 16 MiB")
                return
            chunk = read()
            final = not chunk
            data += chunk
        if data:
            yield self._line_block(data, start, line)

    def _line_block(self, data, start, line):
        """Return the Block of whole lines."""
        records, errors, size = [], {}, len(data)
        text, valid = as_text(data)
        is_complete, scan, find, append = self._is_complete, scan_once, text.find, records.append
        position = 0
        while position < size:
            end = find("\n", position)
            if end < 0:
                end = size
            try:
                event, stop = scan(text, position)
                if (valid and is_complete(event)
                        and (stop == end or stop < end and not text[stop:end].strip(" \t\r"))
                        and (stop - position <= BULKY or bulk_fault(text[position:stop]) is None)):
                    append(data[position:stop])
                    position = end + 1
                    continue
            except (ValueError, StopIteration, RecursionError):
                pass
            raw = data[position:end].strip(BLANK)
            if raw:
                self._examine(raw, records, errors, data, position, line)
            position = end + 1
        if line == 1 and 0 in errors and (records[0][:1], records[0][-1:]) in ((b"{", b"{"), (b"[", b"["), (b"[", b",")):
            errors[0] = InputError(errors[0].args[0] + "; leave out --ndjson if this is one JSON object or array",
                                   where=errors[0].where)
        begin = size - len(data.lstrip(BLANK))
        return Block(records, errors, start + begin, data[begin:].rstrip(BLANK))

    def _examine(self, raw, records, errors, data, position, line):
        """Add the record whose bytes are raw to records, completed, or as it came with its error."""
        try:
            event = parse_json(raw.decode("utf-8"))
            if type(event) is not dict:
                raise InputError("not a JSON object")
            completed = complete_event(event, self.defaults, utc_timestamp(time.time()))
            records.append(raw if completed == event else dump_json(completed))
        except (PackTrackError, UnicodeDecodeError) as error:
            if isinstance(error, UnicodeDecodeError):
                error = InputError("not UTF-8")
            errors[len(records)] = type(error)(str(error), where="{}:{}".format(
                self.name, line + data.count(b"\n", 0, position)))
            records.append(raw)

    def _broken(self, data, start, line, position, why):
        """Return the Block of a stream in which no further record can be told apart."""
        where = "{}:{}".format(self.name, line + data.count(b"\n", 0, position))
        return Block([data.strip(BLANK)], {0: InputError(why, where=where)}, start, b"", broken=True)

    def _elements(self, read, data, start):
        """Yield the Blocks of one object or of an array, which is not kept longer than a block."""
        line, after, final = 1, False, not data
        while not final and not data.lstrip(BLANK):
            line += data.count(b"\n")
            start += len(data)
            data = read()
            final = not data
        begin = len(data) - len(data.lstrip(BLANK))
        self.single = data[begin:begin + 1] == b"{"
        if data and not self.single and data[begin:begin + 1] != b"[":
            yield self._broken(data, start, line, begin, "not a JSON object or array")
            return
        position = begin + (not self.single)
        while data:
            records, errors, first, end, after, why = self._element_block(data, position, after, final, line)
            if records:
                yield Block(records, errors, start + first, data[first:end])
            if why is None:
                return
            if why or len(data) - end > MAX_RECORD:
                line += data.count(b"\n", 0, end)
                where, why = why or (end, "a record of more than 16 MiB")
                yield self._broken(data[end:], start + end, line, where - end, why)
                return
            line += data.count(b"\n", 0, end)
            start += end
            data, position = data[end:], max(0, position - end)
            wanted = 2 * len(data)  # a record that was not whole is tried again when there is twice as much of it
            while not final and len(data) <= wanted:
                chunk = read()
                final = not chunk
                data += chunk

    def _element_block(self, data, position, after, final, line):
        """Read elements from position on; after: an element, so a comma or the end comes first.

        Return records, errors, where the first begins and the last ends, whether an element came before that end, and
        None where the whole ended, () where more bytes are needed, or (position, why) where the JSON is wrong.
        """
        records, errors, first, end, size = [], {}, None, position if after else 0, len(data)
        text, valid = as_text(data)
        is_complete, scan = self._is_complete, scan_once
        while True:
            match = skip_to_object(text, end) if after and not self.single else None
            if match:
                position = match.end()
            else:
                position, why = self._next_element(text, end if after else position, after, final)
                if position is None:
                    return records, errors, first, end, after, why
            try:
                event, stop = scan(text, position)
            except (ValueError, StopIteration, RecursionError) as error:
                wrong = getattr(error, "pos", getattr(error, "value", None))
                # Cut off by the end of the data, if it is at the end that it went wrong or in an open string.
                if not final and wrong is not None and (size - wrong < 16 or "Unterminated" in str(error)):
                    return records, errors, first, end, after, ()
                return records, errors, first, end, after, (position if wrong is None else wrong, json_fault(error))
            if stop == size and not final:
                return records, errors, first, end, after, ()
            first = position if first is None else first
            if valid and is_complete(event) and (
                    stop - position <= BULKY or bulk_fault(text[position:stop]) is None):
                records.append(data[position:stop])
            else:
                self._examine(data[position:stop], records, errors, data, position, line)
            end, after = stop, True

    def _next_element(self, text, position, after, final):
        """Return where the next element begins and (), or None and what _element_block says of it."""
        size = len(text)
        position = skip_blanks(text, position).end()
        if after and position < size and text[position] == "," and not self.single:
            position = skip_blanks(text, position + 1).end()
            if position < size:
                return position, ()
        if position == size:
            if not final:
                return None, ()
            return None, None if after and self.single else (position, "not JSON: it ends before the array does")
        if not after and (self.single or text[position] != "]"):
            return position, ()
        if self.single:
            return None, (position, "several JSON objects one after another; for one a line add --ndjson"
                          if text[position] == "{" else "not JSON: something follows the object")
        if text[position] != "]":
            return None, (position, "not JSON: a comma or the array's end is expected")
        end = skip_blanks(text, position + 1).end()
        if end < size:
            return None, (end, "not JSON: something follows the array")
        return None, None if final else ()


def as_text(data):
    """Return bytes as text for the JSON scanner, and whether they are UTF-8.

    Every byte becomes one character, so that positions in the text are positions in the bytes. JSON's own characters
    are all ASCII; what is shown or written anew is decoded properly.
    """
    text = data.decode("latin-1")
    try:
        codecs.utf_8_decode(data, "strict", False)  # False: the last character may be cut off by the end of a block
    except UnicodeDecodeError:
        return text, False
    return text, True


def reason(error):
    """Return what the system says of an OSError, or another error's own words, without a path."""
    words = printable(getattr(error, "strerror", None) or str(error)) or type(error).__name__
    return words[:1].lower() + words[1:]


# ---- Transport: requests, answers, whether and when to try again; nothing is printed here ------------------------

DEFAULT_BASE_URL = BY_NAME["base-url"].default
DEFAULT_USER_AGENT = BY_NAME["user-agent"].default
LONGEST_RETRY_AFTER = 60.0
MOST_OF_BODY = 1 << 20
MOST_OF_ERROR = 1 << 16
GRACE = 0.3
ENDS_RUN = (401, 403, 404)
HTTP_DATES = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")


def is_retryable(status):
    """Tell whether a status is worth another try: 429 and 5xx are, every other one is final."""
    return status == 429 or 500 <= status <= 599


def backoff_delay(number, initial, maximum, jitter, random):
    """Return the seconds to wait after the number-th try, counted from 1.

    initial, maximum: seconds, before jitter. random: a function that returns a float of [0, 1).
    """
    return min(initial * 2.0 ** min(number - 1, 60), maximum) * (1 + jitter * (2 * random() - 1))


def parse_retry_after(value, now):
    """Return the seconds that a Retry-After header asks for (RFC 9110, 10.2.3), or None where it is absent or nonsense.

    value: the header's text or None. now: seconds since the epoch.
    """
    value = (value or "").strip(" \t")
    if re.match(r"[0-9]{1,10}\Z", value):
        return float(value)
    if not re.match(r"[A-Z][A-Za-z0-9 ,:-]{19,40}\Z", value):
        return None
    import calendar

    for form in HTTP_DATES:
        try:
            date = time.strptime(value, form)
        except ValueError:
            continue
        if value in (time.strftime(form, date), time.asctime(date)):  # strptime alone is lenient
            return max(0.0, calendar.timegm(date) - now)
    return None


def look_up(host, port, left):
    """Return the addresses of a host as getaddrinfo does; left() tells the seconds left. Raises OSError."""
    import socket
    import threading

    try:
        return socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # a name
    found = []

    def resolve_name():
        try:
            found.append(socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))
        except Exception as error:
            found.append(error)

    # The resolver cannot be told a time limit, so it is left behind in a daemon thread when its time is up.
    thread = threading.Thread(target=resolve_name, daemon=True)
    thread.start()
    thread.join(left())
    if not found:
        raise socket.timeout("looking up the name took too long")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


class TimedSocket(io.RawIOBase):
    """A connected socket for http.client, whose every operation gets the time that is left of the attempt.

    A socket's own timeout starts anew with each byte, so a drip or an endless run of 1xx answers would outlive it.
    """

    def __init__(self, sock, left):
        super().__init__()
        self.sock, self.left, self.received = sock, left, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        self.sock.settimeout(self.left())
        count = self.sock.recv_into(buffer)
        self.received += count
        return count

    def sendall(self, data):
        sent = 0
        with memoryview(data) as view:
            while sent < len(view):
                self.sock.settimeout(self.left())
                sent += self.sock.send(view[sent:sent + BLOCK])

    def makefile(self, *_, **__):
        return io.BufferedReader(self)

    def close(self):
        """http.client closes after each answer; the connection is ended by hang_up."""

    def is_idle(self):
        """Tell whether the connection is still open and nothing has come that was not asked for."""
        try:
            self.sock.settimeout(0)
            self.sock.recv(1)
            return False
        except OSError as error:  # for TLS: SSLWantReadError, named so that ssl need not be imported
            return isinstance(error, BlockingIOError) or type(error).__name__ == "SSLWantReadError"

    def hang_up(self):
        self.sock.close()


class KeptConnection:
    """The handler that urllib's OpenerDirector sends with: one connection, kept for the next request.

    until: when the attempt has to end, by the clock now(). requests, bytes_sent: what was sent so far.
    """

    handler_order = 500

    def __init__(self, now):
        self._now, self.until = now, 0.0
        self._socket = self._context = self._response_class = None
        self.requests = self.bytes_sent = 0

    def add_parent(self, parent):
        """OpenerDirector asks this of a handler."""

    def http_open(self, request):
        """Send a urllib Request; return the http.client.HTTPResponse with its headers read. Raises OSError and others."""
        fresh = self._socket is None or not self._socket.is_idle()
        if fresh:
            self.close()
            self._connect(request)
        try:
            return self._exchange(request)
        except OSError as error:
            import socket

            # Closed by the server just when it was used again: nothing was wrong with the request.
            if fresh or self._socket.received or isinstance(error, socket.timeout):
                raise
        self.close()
        self._connect(request)
        return self._exchange(request)

    https_open = http_open

    def keep(self, response):
        """Keep the connection for the next request, if the answer was read to its end and says that it stays."""
        if not response.isclosed() or response.will_close:
            self.close()

    def close(self):
        if self._socket is not None:
            self._socket.hang_up()
            self._socket = None

    def abort(self):
        """End what waits for the connection; may be called from another thread."""
        import socket

        timed = self._socket
        if timed is not None:
            try:
                socket.socket.shutdown(timed.sock, socket.SHUT_RDWR)
            except OSError:
                pass  # no longer connected, which is all that is wanted

    def _left(self):
        """Return the seconds left of the attempt."""
        left = self.until - self._now()
        if left <= 0:
            import socket

            raise socket.timeout("the attempt's time is up")
        return left

    def _connect(self, request):
        import socket

        tunnel = getattr(request, "_tunnel_host", None)
        host, port = split_host(request.host, 443 if request.type == "https" and not tunnel else 80)
        addresses, fault = look_up(host, port, self._left), None
        for index, (family, kind, protocol, _, address) in enumerate(addresses):
            sock = socket.socket(family, kind, protocol)
            self._socket = TimedSocket(sock, self._left)
            try:
                sock.settimeout(self._left() / (len(addresses) - index))
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                break
            except OSError as error:
                fault = error
                self.close()
        if self._socket is None:
            raise fault
        if tunnel:
            self._ask_proxy(request, tunnel)
        if request.type == "https":
            self._start_tls(split_host(tunnel, 443)[0] if tunnel else host)

    def _ask_proxy(self, request, target):
        from http.client import HTTPResponse

        host, port = split_host(target, 443)
        target = "{}:{}".format("[{}]".format(host) if ":" in host else host, port)
        lines = ["CONNECT {0} HTTP/1.1".format(target), "Host: " + target]
        if request.has_header("Proxy-authorization"):
            lines.append("Proxy-Authorization: " + request.get_header("Proxy-authorization"))
        self._socket.sendall("\r\n".join(lines + ["", ""]).encode("latin-1"))
        response = HTTPResponse(self._socket, method="CONNECT")
        response.begin()
        if not 200 <= response.status <= 299:
            message = "the proxy answered CONNECT with {}".format(status_words(response.status, response.reason))
            if 500 <= response.status <= 599:
                raise OSError(message)
            raise RefusedError(message, status=response.status, kind="proxy", ends_run=True)
        self._socket.received = 0

    def _start_tls(self, host):
        try:
            import ssl
        except ImportError:
            raise RefusedError("https needs Python's ssl module, which this Python was built without",
                               kind="no_tls", ends_run=True)
        if self._context is None:
            self._context = ssl.create_default_context()
            if ssl.HAS_ALPN:
                self._context.set_alpn_protocols(["http/1.1"])
        try:
            self._socket.sock.settimeout(self._left())
            self._socket.sock = self._context.wrap_socket(self._socket.sock, server_hostname=host.rstrip("."))
        except (ssl.SSLError, ssl.CertificateError) as error:  # in 3.6 a wrong host is a CertificateError, a ValueError
            if not (isinstance(error, ssl.CertificateError) or error.reason == "CERTIFICATE_VERIFY_FAILED"):
                raise
            raise RefusedError("the certificate of {} does not verify: {}; SSL_CERT_FILE can name your own roots".format(
                host, printable(getattr(error, "verify_message", "") or str(error))), kind="certificate", ends_run=True)

    def _exchange(self, request):
        from http.client import HTTPConnection, HTTPException

        tunnel = getattr(request, "_tunnel_host", None)
        headers = {name.title(): value for name, value in request.header_items()}
        if tunnel:
            headers.pop("Proxy-Authorization", None)  # it was for CONNECT alone
        self._socket.received = 0
        connection = HTTPConnection(tunnel or request.host)
        self._response_class = connection.response_class = self._response_class or response_class()
        connection.sock = self._socket
        self.requests += 1
        try:
            connection.request(request.get_method(), request.selector, request.data, headers)
            self.bytes_sent += len(request.data or b"")
        except OSError:
            self.until = max(self.until, self._now() + GRACE)
            try:  # an answer may have come before all was sent, such as 413
                return connection.getresponse()
            except (OSError, HTTPException):
                pass
            raise
        return connection.getresponse()


def response_class():
    """Return the HTTPResponse that also skips 1xx answers other than 100 (RFC 9110, 15.2), which http.client takes as final."""
    from http.client import HTTPResponse, parse_headers

    class Response(HTTPResponse):
        def _read_status(self):
            while True:
                version, status, words = super()._read_status()
                if not 101 < status < 200:
                    return version, status, words
                parse_headers(self.fp)

    return Response


def check_proxies(proxies):
    """Return {scheme: proxy URL} as it is; raise InvalidError, which quotes no URL, where one cannot be used."""
    for scheme in ("http", "https"):
        if not re.match(r"(?:https?://)?(?:[^/]*@)?(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?/?\Z",
                        proxies.get(scheme, "none")):
            raise InvalidError("is not the URL of an http proxy (it is not shown: it may hold a password)",
                               where=scheme + "_proxy", ends_run=True)
    return proxies


def split_host(place, default_port):
    """Return host and port of "host", "host:port" or "[address]:port"."""
    match = re.match(r"\[(.*)\](?::([0-9]+))?\Z|([^:]*)(?::([0-9]+))?\Z", place)
    return match.group(1) or match.group(3), int(match.group(2) or match.group(4) or default_port)


def status_words(status, words):
    """Return a status with its reason phrase, made printable."""
    return "HTTP {} {}".format(status, printable(words or "")).rstrip()


def fault_words(error, place):
    """Return what an exception of an attempt means to a person; place: host and port."""
    import http.client
    import socket

    if isinstance(error, socket.timeout):
        words = "no answer in time"
    elif isinstance(error, http.client.RemoteDisconnected):
        words = "the connection was closed without an answer"
    elif isinstance(error, socket.gaierror):
        words = "the name cannot be resolved ({})".format(reason(error))
    elif isinstance(error, http.client.LineTooLong) or "100 headers" in str(error):
        words = "the answer's headers are too large"
    elif isinstance(error, http.client.IncompleteRead):
        words = "the answer broke off"
    elif isinstance(error, http.client.HTTPException):
        words = "the answer is not HTTP"
    elif isinstance(error, OSError):
        words = reason(error)
    else:  # a ValueError of http.client's, which may quote anything
        words = "the answer is not HTTP"
    return "{} ({})".format(words, place)


class Answer:
    """The status line of an answer, what matters of its headers, and for an error the beginning of its body."""

    def __init__(self, response, body):
        self.status, self.reason = response.status, response.reason
        self.retry_after, self.location = response.getheader("Retry-After"), response.getheader("Location")
        self.body = body.decode("utf-8", "replace")

    @property
    def ok(self):
        return 200 <= self.status <= 299


class Client:
    """Sends events. A client is for one thread at a time; close() ends its connection.

    api_key: the key, sent to base_url's origin alone. timeout: seconds of one attempt. retries: further tries after the
    first. backoff_initial, backoff_max: seconds between tries, before jitter (0 to 1). gzip: compress bodies.
    watch: the Watch that bounds its waits. random: a function like random.random. trace: takes lines on what happens.
    """

    def __init__(self, api_key, base_url=DEFAULT_BASE_URL, timeout=15.0, retries=3, backoff_initial=0.1, backoff_max=2.0,
                 jitter=0.2, user_agent=DEFAULT_USER_AGENT, gzip=False, health_path="/api/health", watch=None,
                 random=None, trace=None):
        for what, value in (("api_key", api_key), ("user_agent", user_agent)):
            try:
                parse_header(value)
            except ValueError as error:
                raise InvalidError(str(error), where=what)
        try:
            self.base_url = parse_base_url(base_url)
        except ValueError as error:
            raise InvalidError(str(error), where="base_url")
        self.watch, self.retries = watch or Watch(), 0
        self._key, self._timeout, self._tries, self._gzip = api_key, timeout, retries + 1, gzip
        self._backoff = backoff_initial, backoff_max, jitter
        self._user_agent, self._health_path = user_agent, health_path
        self._random, self._trace = random, trace or (lambda line: None)
        self._opener, self._connection = None, KeptConnection(self.watch.now)

    @property
    def requests(self):
        """How many requests were sent, further tries included."""
        return self._connection.requests

    @property
    def bytes_sent(self):
        """How many bytes of bodies were sent, further tries included."""
        return self._connection.bytes_sent

    def ingest_event(self, event, idempotency_key=None):
        """Deliver one event (a dict; a missing timestamp is now). Raises PackTrackError's subclasses."""
        self.send(dump_json(complete_event(event, {}, utc_timestamp(time.time()))), idempotency_key)

    def ingest_batch(self, events, idempotency_key=None):
        """Deliver a list of events as one request. Raises PackTrackError's subclasses; then none of them counts."""
        now = utc_timestamp(time.time())
        self.send(json_array([dump_json(complete_event(event, {}, now)) for event in events]), idempotency_key)

    def health_check(self):
        """Ask the service's health, once. Raises PackTrackError's subclasses unless it is healthy."""
        try:
            answer = self._attempt("GET", self._health_path, None, {})
        except self._retryable() as error:
            raise RetriesExhaustedError(self._fault(error))
        if not answer.ok:
            raise self._refusal(answer)

    def send(self, body, idempotency_key=None):
        """Deliver a body, the bytes of an event's or an array's JSON, with tries and waits.

        idempotency_key: a header's value; "auto" is the body's SHA-256. Raises RefusedError and RetriesExhaustedError.
        """
        headers = {"Content-Type": "application/json"}
        if idempotency_key:
            headers["Idempotency-Key"] = sha256(body) if idempotency_key == "auto" else idempotency_key
        if self._gzip:
            import zlib

            headers["Content-Encoding"] = "gzip"
            packer = zlib.compressobj(6, zlib.DEFLATED, 31)  # 31: in gzip's format, whose date zlib leaves at zero
            body = packer.compress(body) + packer.flush()
        number = 0
        while True:
            number += 1
            try:
                answer = self._attempt("POST", "/api/ingest", body, headers)
            except self._retryable() as error:
                fault, status, at_least = self._fault(error), None, None
            else:
                self._trace("try {} of {}: {}".format(
                    number, self._tries, self._clean(status_words(answer.status, answer.reason))))
                if answer.ok:
                    return
                if not is_retryable(answer.status):
                    raise self._refusal(answer)
                fault, status = self._answer_words(answer), answer.status
                at_least = parse_retry_after(answer.retry_after, time.time())
            if status is None:
                self._trace("try {} of {}: {}".format(number, self._tries, fault))
            self._wait(number, fault, status, at_least)

    def _wait(self, number, fault, status, at_least):
        """Wait before another try, or raise RetriesExhaustedError where there is none."""
        if number >= self._tries:
            raise RetriesExhaustedError("{} ({})".format(fault, "1 try" if number == 1 else "%d tries" % number),
                                        status=status)
        if self._random is None:
            from random import random

            self._random = random
        delay = max(backoff_delay(number, *self._backoff, random=self._random), at_least or 0.0)
        if at_least is not None and at_least > LONGEST_RETRY_AFTER:
            raise RetriesExhaustedError("{}; it asks to wait {:.0f} s, more than {:.0f} s".format(
                fault, at_least, LONGEST_RETRY_AFTER), status=status)
        left = self.watch.left()
        if left is not None and delay >= left:
            raise RetriesExhaustedError("{}; the run's deadline comes before another try".format(fault), status=status)
        self._trace("waiting {:.3f} s".format(delay))
        self.watch.sleep(delay)
        self.retries += 1

    def _attempt(self, method, path, body, headers):
        """Return the Answer to one request. Raises RefusedError, and what _retryable names."""
        import urllib.request

        if self._opener is None:
            proxies = check_proxies(urllib.request.getproxies())
            self._opener = urllib.request.OpenerDirector()
            self._opener.add_handler(self._connection)
            self._opener.add_handler(urllib.request.ProxyHandler(proxies))
        headers = dict(headers, **{"X-PackTrack-Key": self._key, "User-Agent": self._user_agent})
        request = urllib.request.Request(self.base_url + path, body, headers, method=method)
        self._connection.until = self.watch.now() + self.watch.left(self._timeout)
        try:
            with self.watch:
                response = self._opener.open(request)
        except BaseException:
            self._connection.close()
            raise
        return self._finish(response)

    def _finish(self, response):
        """Return the Answer of a response whose headers were read; a body that breaks off changes nothing."""
        body, ok = b"", 200 <= response.status <= 299
        try:
            with self.watch:
                body = response.read(MOST_OF_BODY if ok else MOST_OF_ERROR)
        except self._retryable() as error:
            self._trace("the answer's body broke off: {}".format(fault_words(error, self._place)))
        except Interrupted:  # the verdict stands; whoever waits next is interrupted
            pass
        answer = Answer(response, b"" if ok else body)
        if ok:
            self._connection.keep(response)
        else:
            self._connection.close()
        return answer

    @staticmethod
    def _retryable():
        """Return the exceptions that mean: no answer. ValueError: http.client's, of a bad chunk or status."""
        from http.client import HTTPException

        return OSError, HTTPException, ValueError

    @property
    def _place(self):
        return self.base_url.split("/")[2]

    def _fault(self, error):
        return self._clean(fault_words(error, self._place))

    def _clean(self, text):
        """Return words of the server on one line of at most 200 characters, the key cut out before the cut."""
        return printable(redact(" ".join(redact(text, [self._key]).split()), [self._key]))

    def _answer_words(self, answer):
        words = self._clean("".join(c if c.isprintable() else " " for c in answer.body))
        status = self._clean(status_words(answer.status, answer.reason))
        return '{}: "{}"'.format(status, words) if words else status

    def _refusal(self, answer):
        """Return the RefusedError of a final answer."""
        words = self._answer_words(answer)
        if 300 <= answer.status <= 399:
            words = self._clean(status_words(answer.status, answer.reason)) + " is not followed"
            if answer.location:
                words += "; it points to " + self._clean(answer.location)
        return RefusedError(words, status=answer.status, ends_run=answer.status in ENDS_RUN)

    def abort(self):
        """End what waits, with Interrupted; may be called from another thread."""
        self.watch.stop()
        self._connection.abort()

    def close(self):
        """End the connection."""
        self._connection.close()


def sha256(body):
    """Return the SHA-256 of bytes, in hexadecimal."""
    from hashlib import sha256 as digest

    return digest(body).hexdigest()


def json_array(records):
    """Return the body of a batch: the records' own bytes as a JSON array."""
    return b"[" + b",".join(records) + b"]"


# ---- Delivery: batches, their accounting, and the two ways through, both ending in one Delivery ------------------

QUEUE_BYTES = 8 << 20
PATIENCE = 0.1
LONGEST_LOCK = 10.0
MOST_RANGES = 100
# Which exit code stands where several would be right.
PRECEDENCE = (2, 3, 4, 1)


class Batch:
    """Records that go out as one request, and their numbers in the input, counted from 1."""

    __slots__ = ("records", "numbers")

    def __init__(self, records, numbers):
        self.records, self.numbers = records, numbers

    def halves(self):
        middle = len(self.records) // 2
        return [Batch(self.records[:middle], self.numbers[:middle]), Batch(self.records[middle:], self.numbers[middle:])]

    def __str__(self):
        return "record {}".format(self.numbers[0]) if len(self.numbers) == 1 else "records {}-{}".format(
            self.numbers[0], self.numbers[-1])


class Batcher:
    """Cuts a stream of records into batches of at most size records and limit bytes of body."""

    def __init__(self, size, limit):
        self._size, self._limit, self._records, self._start = size, limit, [], 0
        self._next, self._gaps, self.bytes = 1, [], 0

    def __len__(self):
        return len(self._records) - self._start

    def add(self, records):
        """Append a list of records."""
        self._records += records
        self.bytes += sum(map(len, records))

    def skip(self):
        """Count a record that is not to be sent."""
        self._gaps.append(self._next + len(self) + len(self._gaps))

    def take(self, all_of_it):
        """Return the next full Batch, or with all_of_it also one that is not full; None where there is none."""
        records = self._records[self._start:self._start + self._size]
        size = sum(map(len, records))
        if size + len(records) + 1 > self._limit:
            size, count = 0, 0
            while count < len(records) and (not count or size + len(records[count]) + count + 2 <= self._limit):
                size += len(records[count])
                count += 1
            records = records[:count]
        elif not records or len(records) < self._size and not all_of_it:
            return None
        self.bytes -= size
        self._start += len(records)
        if self._start * 2 >= len(self._records):
            del self._records[:self._start]
            self._start = 0
        return Batch(records, self._number(len(records)))

    def _number(self, count):
        numbers = range(self._next, self._next + count)
        if self._gaps:
            numbers, number = [], self._next
            while len(numbers) < count:
                if self._gaps and self._gaps[0] == number:
                    del self._gaps[0]
                else:
                    numbers.append(number)
                number += 1
        self._next = numbers[-1] + 1
        return numbers


class Appender:
    """Appends records to a file as NDJSON, whole, also where several processes do so; the file is made when needed.

    path: "-" is standard output. mode: of a new file. Raises InputError where the file cannot be written.
    """

    def __init__(self, path, mode):
        self._path, self._mode, self._descriptor = path, mode, None
        self.name = "standard output" if path == "-" else printable(os.fsencode(path).decode("utf-8", "replace"))
        parent = os.path.dirname(path) or "."
        if path == "-":
            self._check(sys.stdout is not None, "it is closed")
        elif os.path.exists(path):
            self._check(not os.path.isdir(path), "it is a directory")
            self._check(os.access(path, os.W_OK), "permission denied or read-only")
        else:
            self._check(os.path.isdir(parent), "its directory does not exist")
            self._check(os.access(parent, os.W_OK | os.X_OK), "its directory is not writable")

    def _check(self, holds, why):
        if not holds:
            raise InputError("cannot be written: " + why, where=self.name)

    def append(self, data):
        """Append bytes; a write that fails leaves none of them in a regular file."""
        data = memoryview(data)
        try:
            if self._descriptor is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
                self._descriptor = 1 if self._path == "-" else os.open(self._path, flags, self._mode)
            locked = lock_file(self._descriptor)
            size = os.fstat(self._descriptor).st_size if locked else 0
            try:
                while data:
                    data = data[os.write(self._descriptor, data):]
            except OSError:
                if locked:
                    os.ftruncate(self._descriptor, size)
                raise
            finally:
                if locked:
                    unlock_file(self._descriptor)
        except (OSError, ValueError) as error:
            raise InputError("cannot be written: " + reason(error), where=self.name)

    def close(self):
        if self._descriptor not in (None, 1):
            os.close(self._descriptor)
            self._descriptor = None


def json_lines(records):
    """Return records as NDJSON; those that span lines have their line breaks, all between tokens, made blanks."""
    return b"".join(record.replace(b"\r", b" ").replace(b"\n", b" ") + b"\n" for record in records)


def lock_file(descriptor):
    """Lock a regular file against our other processes; return whether it is locked. One that stays locked is not waited for."""
    import stat

    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return False
    try:
        import fcntl
    except ImportError:  # Windows, where a lock is on a byte: one that no file reaches
        import msvcrt

        end = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, 1 << 62, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
        os.lseek(descriptor, end, os.SEEK_SET)
        return True
    end = time.monotonic() + LONGEST_LOCK
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        except OSError:  # a file system without locks
            return False


def unlock_file(descriptor):
    """Undo lock_file."""
    try:
        import fcntl
    except ImportError:
        import msvcrt

        os.lseek(descriptor, 1 << 62, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


class HttpSink:
    """Where batches go: to the service.

    single: the body is one object. total: how many records the run has in all; None where it streams. probe: whether
    to ask the service's health before the first batch.
    """

    def __init__(self, client, idempotency_key, trace, probe):
        self.client, self._key, self._trace, self._probe = client, idempotency_key, trace, probe
        self.single, self.total = False, None

    def put(self, batch):
        """Deliver a Batch. Raises PackTrackError."""
        if self._probe:
            self._probe = False
            try:
                self.client.health_check()
                self._trace("the service is healthy")
            except PackTrackError as error:
                self._trace("the health check failed: {}".format(error))
        body = batch.records[0] if self.single else json_array(batch.records)
        key = self._key
        if key and key != "auto" and len(batch.records) != self.total:
            key = "{}-{}-{}-{}".format(key, batch.numbers[0], batch.numbers[-1], sha256(body)[:8])
        self._trace("{}: {} bytes to {}".format(batch, len(body), self.client.base_url))
        self.client.send(body, key)

    def abort(self):
        """End what waits; may be called from another thread."""
        self.client.abort()

    def close(self):
        self.client.close()


class FileSink:
    """Where batches go with --output: to a file."""

    single, total = False, None

    def __init__(self, appender):
        self._appender = appender

    def put(self, batch):
        """Append a Batch. Raises InputError, after which the rest would fail alike."""
        try:
            self._appender.append(json_lines(batch.records))
        except InputError as error:
            error.ends_run = True
            raise

    def abort(self):
        """Nothing here waits for long."""

    def close(self):
        self._appender.close()


class Delivery:
    """Hands batches to a sink and accounts for each record: read = delivered + undelivered + invalid.

    keep_going: whether a batch that fails leaves the others be. undelivered: an Appender, or None. warn, tick: are told
    of each failure that does not end the run, and after each batch. errors: {exit code: the first error}.
    ended: the error that ended the run, or None. keeps: whether there is a place for what is not delivered.
    """

    def __init__(self, sink, keep_going=False, undelivered=None, warn=None, tick=None):
        import threading

        self.sink, self.keep_going, self.keeps, self._undelivered = sink, keep_going, bool(undelivered), undelivered
        self._warn, self.tick = warn or (lambda words: None), tick or (lambda: None)
        self.read = self.delivered = self.undelivered = self.invalid = 0
        self.errors, self.ended, self.ranges, self.unkept = {}, None, [], 0
        self._lock, self._in_hand, self._abandoned = threading.Lock(), [], False

    def send(self, batch):
        """Deliver a Batch, in halves where the server finds it too large, and account for it; nothing is raised."""
        self._in_hand = [batch]
        try:
            self._work_off()
        except Interrupted:
            self.stop()
            self._work_off()

    def stop(self):
        """End the run because of a signal."""
        self.ended = self.ended or PackTrackError("stopped by a signal", kind="interrupted")

    def _work_off(self):
        while self._in_hand and not self._abandoned:
            part, given_up = self._in_hand[0], self.ended
            error = given_up or self._put(part)
            with self._lock:
                if self._abandoned:
                    return
                if error is not None and error is not given_up and error.status == 413 and len(part.records) > 1:
                    self._in_hand[:1] = part.halves()
                    continue
                del self._in_hand[0]
                if error is None:
                    self.delivered += len(part.records)
                else:
                    self._lose(part)
            if error is not given_up:
                self.fail(error, part)
            self.tick()

    def _put(self, part):
        try:
            self.sink.put(part)
        except PackTrackError as error:
            return error
        except Exception as error:  # a fault of this program's must not lose count of the records
            return PackTrackError("internal error: " + type(error).__name__, kind="internal", ends_run=True)

    def abandon(self):
        """Give up what send() has in hand in another thread; what that thread hears of it no longer counts."""
        with self._lock:
            self._abandoned = True
            for part in self._in_hand:
                self._lose(part)

    def give_up(self, batch):
        """Account for a Batch that is not sent."""
        with self._lock:
            self._lose(batch)

    def note(self, error):
        """Note an error that does not end the run by itself."""
        self.errors.setdefault(error.exit_code, error)
        if self.keep_going:
            self._warn(str(error))

    def end(self, error):
        """Note the error that ends the run: nothing more is sent."""
        self.errors.setdefault(error.exit_code, error)
        self.ended = self.ended or error

    def fail(self, error, batch):
        """Note why a Batch failed; without keep_going, or where all the rest would fail alike, it ends the run."""
        error.where = error.where or str(batch)
        if self.keep_going and not error.ends_run and error.kind != "deadline":
            self.note(error)
        else:
            self.end(error)

    def refuse(self, error):
        """Count an invalid record, and note why."""
        self.invalid += 1
        self.note(error)

    def keep(self, records):
        """Keep records, as they came where they are not valid, if there is a place for them."""
        if self._undelivered is not None:
            with self._lock:
                self._keep(json_lines(records), len(records))

    def keep_bytes(self, data):
        """Keep what is not even a record."""
        if self._undelivered is not None:
            with self._lock:
                self._keep(data, 0)

    def close(self):
        """Close what it writes to."""
        for place in (self.sink, self._undelivered):
            if place is not None:
                place.close()

    def lose_rest(self):
        """Count as undelivered what was read and is otherwise not accounted for."""
        first = self.delivered + self.undelivered + self.invalid + 1
        if first <= self.read:
            self.undelivered += self.read - first + 1
            self._add_range(first, self.read)

    def _lose(self, batch):
        self.undelivered += len(batch.records)
        if isinstance(batch.numbers, range):
            self._add_range(batch.numbers[0], batch.numbers[-1])
        else:
            for number in batch.numbers:
                self._add_range(number, number)
        if self._undelivered is not None:
            self._keep(json_lines(batch.records), len(batch.records))

    def _keep(self, data, count):
        try:
            self._undelivered.append(data)
        except InputError as error:
            self.unkept += count
            self.errors.setdefault(error.exit_code, error)

    def _add_range(self, first, last):
        if self.ranges and self.ranges[-1][1] == first - 1:
            self.ranges[-1][1] = last
        elif len(self.ranges) <= MOST_RANGES:
            self.ranges.append([first, last])

    @property
    def error(self):
        """The error whose exit code stands, or None."""
        return next((self.errors[code] for code in PRECEDENCE if code in self.errors), None)


class AsyncClient:
    """Queues events and delivers them from a thread of its own, in batches.

    client: a Client, from then on this thread's. flush_interval: the seconds after which a batch goes out that is not
    full. queue_capacity: the most events that wait. deliver: takes a Batch; by default it is sent, and the first error
    is raised by the next flush() or close().
    """

    def __init__(self, client, batch_size=100, flush_interval=1.0, queue_capacity=10000, max_batch_bytes=1000000,
                 deliver=None):
        import threading

        self._client, self._interval, self._capacity = client, flush_interval, queue_capacity
        self._deliver, self._error, self._oldest = deliver or self._send, None, None
        self._batcher = Batcher(min(batch_size, queue_capacity), max_batch_bytes)
        self._changed = threading.Condition()
        self._busy = self._flushing = self._closing = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def enqueue(self, event, block=False, timeout=None):
        """Queue an event (a dict; a missing timestamp is now).

        A full queue raises RetriesExhaustedError of the kind "queue_full", with block only after timeout seconds (None:
        never). Raises InvalidError for an event that is not valid.
        """
        record = dump_json(complete_event(event, {}, utc_timestamp(time.time())))
        end = None if timeout is None else time.monotonic() + timeout
        while not self.offer([record]):
            left = None if end is None else end - time.monotonic()
            if not block or left is not None and left <= 0:
                raise RetriesExhaustedError("the queue is full", kind="queue_full")
            self.wait_for_room(left)

    def offer(self, records, skipped=False, force=False):
        """Queue as many of the records (bytes of complete events) as there is room for; return how many that is.

        skipped: a record that is not to be sent follows; it is counted if all the others are queued. force: queue all.
        """
        with self._changed:
            if self._closing:
                raise PackTrackError("this AsyncClient is closed", kind="closed")
            room = self._capacity - len(self._batcher) if self._batcher.bytes < QUEUE_BYTES else 0
            taken = records if force else records[:room]
            if taken:
                self._batcher.add(taken)
                if self._oldest is None:
                    self._oldest = time.monotonic()
                self._changed.notify_all()
            if skipped and len(taken) == len(records):
                self._batcher.skip()
            return len(taken)

    def wait_for_room(self, seconds=None):
        """Wait until the queue is half empty, or for some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._batcher) <= self._capacity // 2 and
                                   self._batcher.bytes <= QUEUE_BYTES // 2, seconds)

    def flush(self, timeout=None):
        """Deliver all that is queued; return whether that was done within timeout seconds. Raises the first error."""
        with self._changed:
            self._flushing = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not (self._batcher or self._busy), timeout)
            self._flushing = False
            error, self._error = self._error, None
        if error is not None:
            raise error
        return done

    def close(self, timeout=None):
        """Deliver all that is queued and end the thread; return whether that was done within timeout seconds."""
        try:
            return self.flush(timeout)
        finally:
            self.finish()
            self.join(timeout)

    def finish(self):
        """Take no more; the thread delivers what is queued and ends."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def drain(self):
        """Take no more; return the Batches that nobody has begun to deliver."""
        with self._changed:
            self.finish()
            return list(iter(lambda: self._batcher.take(True), None))

    def join(self, timeout=None):
        """Wait for the thread to end; return whether it did."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _send(self, batch):
        try:
            self._client.send(json_array(batch.records))
        except PackTrackError as error:
            error.where = error.where or str(batch)
            self._error = self._error or error
        except Interrupted:
            pass  # abort() was called

    def _work(self):
        while True:
            with self._changed:
                batch = self._take()
                while batch is None and not self._closing:
                    waited = None if self._oldest is None else self._oldest + self._interval - time.monotonic()
                    self._changed.wait(waited)
                    batch = self._take()
                self._busy = batch is not None
                self._changed.notify_all()
                if batch is None:
                    return
            self._deliver(batch)

    def _take(self):
        """Return a Batch if one is due."""
        due = self._flushing or self._closing or self._oldest is not None and time.monotonic() - self._oldest >= self._interval
        batch = self._batcher.take(due)
        if batch is not None:
            self._oldest = time.monotonic() if self._batcher else None
        return batch


def deliver_kept(scanner, replay, delivery, batcher, watch):
    """Validate all that a file or pipe holds, then deliver it: nothing is sent if a record is refused at the door."""
    # What came through a pipe is nobody else's: with --undelivered it is read to its end and kept, whatever it holds.
    keep_all = delivery.keeps and not replay.source.is_file
    notes = []
    try:
        for block in scanner.blocks(replay.read):
            delivery.tick()
            errors = sorted(block.errors.items())
            if errors and not (delivery.keep_going or keep_all):
                delivery.read += errors[0][0] + 1
                delivery.refuse(errors[0][1])
                delivery.end(errors[0][1])
                break
            delivery.read += len(block.records)
            for _, error in errors:
                delivery.refuse(error)
                if not delivery.keep_going:
                    delivery.end(error)
            notes.append(Note(block))
            if block.broken and keep_all:
                while replay.read():
                    pass
            if watch.signal and not delivery.keeps:
                break
    except PackTrackError as error:
        (delivery.note if delivery.keep_going and error.kind != "deadline" else delivery.end)(error)
    except Interrupted:
        delivery.stop()
    if delivery.sink is not None and (keep_all or not delivery.ended):
        delivery.sink.single, delivery.sink.total = scanner.single, delivery.read - delivery.invalid
        deliver_again(notes, scanner, replay, delivery, batcher, watch)
    delivery.lose_rest()


def deliver_again(notes, scanner, replay, delivery, batcher, watch):
    """Deliver what was noted, reading it a second time; what ended the run leaves the rest to be kept."""
    for note in notes:
        if delivery.ended and not delivery.keeps:
            return
        if note.size is None:
            copy_rest(note.start, replay, delivery)
            continue
        try:
            records, errors = note.read(scanner, replay)
        except InputError as error:
            delivery.end(error)
            delivery.unkept += note.count
            continue
        position = 0
        for index in sorted(errors):
            batcher.add(records[position:index])
            batcher.skip()
            delivery.keep(records[index:index + 1])
            position = index + 1
        batcher.add(records[position:])
        send_batches(batcher, False, delivery, watch)
    send_batches(batcher, True, delivery, watch)


def send_batches(batcher, all_of_it, delivery, watch):
    """Deliver what a Batcher has ready, unless a signal or the deadline says otherwise."""
    for batch in iter(lambda: batcher.take(all_of_it), None):
        if watch.signal:
            delivery.stop()
        try:
            watch.left()
        except RetriesExhaustedError as error:
            delivery.end(error)
        delivery.send(batch)


def copy_rest(start, replay, delivery):
    """Keep the rest of a stream, in which records cannot be told apart, as it came."""
    for part in iter(lambda: replay.again(start, BLOCK), b""):
        delivery.keep_bytes(part)
        start += len(part)
    delivery.keep_bytes(b"\n")


class Note:
    """Where a Block stands and what it was, so that it can be read again rather than kept."""

    __slots__ = ("start", "size", "checksum", "count", "gap")

    def __init__(self, block):
        import zlib

        self.start, self.count, self.gap = block.start, len(block.records), None
        self.size = None if block.broken else len(block.data)
        self.checksum = zlib.crc32(block.data)
        if not block.errors and not block.broken:
            # If cutting at the gap between the first two gives the very records, the second reading need not parse.
            length = len(block.records[0]) if block.records else 0
            gap = block.data[length:block.data.find(b"{", length)] if self.count > 1 else b"\n"
            if gap and cut_records(block.data, gap) == block.records:
                self.gap = gap

    def read(self, scanner, replay):
        """Return the records, and {index: error} of those that are invalid. Raises InputError if they were changed."""
        import zlib

        data = replay.again(self.start, self.size)
        if len(data) != self.size or zlib.crc32(data) != self.checksum:
            raise InputError("was changed while it was being sent", where=scanner.name)
        return (cut_records(data, self.gap), {}) if self.gap else scanner.scan_again(data)


def deliver_streamed(scanner, source, delivery, queue, watch, flush):
    """Deliver while reading: the queue's thread sends. flush: whether to send what is queued at the end."""
    try:
        for block in scanner.blocks(source.read):
            delivery.sink.single = scanner.single
            records, errors = block.records, sorted(block.errors.items())
            if errors and not delivery.keep_going:
                errors = errors[:1]
                records = records[:errors[0][0] + 1]
            delivery.read += len(records)
            position = 0
            for index, error in errors:
                queue_records(records[position:index], True, queue, watch)
                delivery.refuse(error)
                delivery.keep(records[index:index + 1])
                position = index + 1
            queue_records(records[position:], False, queue, watch)
            if delivery.ended or watch.signal or errors and not delivery.keep_going:
                break
    except PackTrackError as error:
        delivery.note(error)
    except Interrupted:
        pass
    if flush or delivery.errors or watch.signal:
        queue.finish()
    else:
        for batch in queue.drain():
            delivery.give_up(batch)
    while not queue.join(PATIENCE):
        if watch.signals > 1:
            left = queue.drain()
            delivery.sink.abort()
            queue.join(PATIENCE)
            delivery.abandon()
            for batch in left:
                delivery.give_up(batch)
            return


def queue_records(records, skipped, queue, watch):
    """Queue records, waiting while the queue is full; a second signal ends the waiting."""
    while True:
        taken = queue.offer(records, skipped, force=watch.signals > 1)
        records = records[taken:]
        if not records:
            return
        queue.wait_for_room(PATIENCE)


# ---- The command runner: a command, then one event on how it ended; signals and exit codes as if we were not there

COMMAND_DELIVERY = 30.0
KILL_AFTER = 5.0
TIMED_OUT, NOT_EXECUTABLE, NOT_FOUND = 124, 126, 127


def run_command(command, timeout, on_start=None):
    """Run a command (a list) with our own streams and descriptors; return how it ended, an Ending.

    timeout: the seconds after which it is sent TERM, and KILL 5 s later; or None. INT, TERM, HUP and QUIT that were sent
    to us are passed on. Those are ours to block in the meantime; main() installs its own handlers afterwards.
    """
    import signal
    import subprocess

    if os.name == "nt":
        return run_on_windows(command, timeout)
    passed_on = {number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
                 if signal.getsignal(number) != signal.SIG_IGN}  # what is ignored on entry, as by nohup, stays so
    numbers = passed_on | {signal.SIGCHLD, signal.SIGALRM}
    child_ignored = signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Blocked before the command starts and taken one by one: none is lost in between, none interrupts us.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def as_it_was():
        for number in passed_on:
            signal.signal(number, signal.SIG_DFL)
        if child_ignored:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    ending = Ending(command)
    try:
        process = start_process(command, as_it_was)
    except (OSError, ValueError) as error:
        ending.not_started(error)
        return ending
    try:
        while process.poll() is None:
            number, from_terminal = next_signal(numbers, ending.seconds_to(timeout))
            if number is None:
                process.send_signal(signal.SIGKILL if ending.timed_out else signal.SIGTERM)
                process.send_signal(signal.SIGCONT)  # a stopped process would not hear of TERM
                timeout, ending.timed_out = (timeout + KILL_AFTER if not ending.timed_out else None), True
            elif number in passed_on and not from_terminal:
                process.send_signal(number)
        ending.ended(process.returncode)
    finally:
        while next_signal(numbers, 0)[0] is not None:
            pass  # what came for the command is not for the delivery
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ending


def start_process(command, prepare):
    """Start a command; like execvp(3), give a script that has no #! line to sh."""
    import errno
    import subprocess

    try:
        return subprocess.Popen(command, close_fds=False, preexec_fn=prepare)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        import shutil

        return subprocess.Popen(["/bin/sh", shutil.which(command[0])] + command[1:], close_fds=False, preexec_fn=prepare)


def next_signal(numbers, seconds):
    """Return the next of the blocked signals and whether the terminal sent it to the whole group; (None, False) if none."""
    import signal

    if hasattr(signal, "sigtimedwait"):
        info = signal.sigwaitinfo(numbers) if seconds is None else signal.sigtimedwait(numbers, seconds)
        return (None, False) if info is None else (info.si_signo, info.si_code > 0)  # SI_USER and its like are not
    # macOS tells neither the sender nor takes a time: an alarm ends the wait, and the terminal's group tells the sender.
    if seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    number = signal.sigwait(numbers)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if number == signal.SIGALRM:
        return None, False
    try:
        with open("/dev/tty") as terminal:
            ours = os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        ours = False
    return number, ours and number in (signal.SIGINT, signal.SIGQUIT)


def run_on_windows(command, timeout):
    """run_command for Windows, where Ctrl-C reaches every process of the console and TERM does not exist."""
    import signal
    import subprocess

    ending, before = Ending(command), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, close_fds=False)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            ending.timed_out = True
            process.kill()
        ending.ended(process.wait())
    except (OSError, ValueError) as error:
        ending.not_started(error)
    finally:
        signal.signal(signal.SIGINT, before)
    return ending


class Ending:
    """How a command ended. exit_code: what our own is then."""

    def __init__(self, command):
        self.name = printable(os.fsencode(os.path.basename(command[0]) or command[0]).decode("utf-8", "replace"))
        self.started_at, self._started = utc_timestamp(time.time()), time.monotonic()
        self.exit_code, self.signal, self.how, self.timed_out, self.seconds = None, None, "", False, 0.0

    def seconds_to(self, timeout):
        """Return the seconds until the command has run for timeout seconds, or None."""
        return None if timeout is None else max(0.0, self._started + timeout - time.monotonic())

    def not_started(self, error):
        self.exit_code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        self.how = "could not be run: {}".format(reason(error))

    def ended(self, returncode):
        self.seconds = time.monotonic() - self._started
        self.exit_code, self.how = returncode, "exited with {}".format(returncode)
        if returncode < 0:
            import signal

            try:
                self.signal = signal.Signals(-returncode).name
            except ValueError:  # a real-time signal
                self.signal = "SIG{}".format(-returncode)
            self.exit_code, self.how = 128 - returncode, "was ended by {}".format(self.signal)
        if self.timed_out:
            self.exit_code, self.how = TIMED_OUT, "timed out"

    def event(self):
        """Return the event that tells of it, without what the defaults have to give."""
        import socket

        status = "timeout" if self.timed_out else "ok" if self.exit_code == 0 else "failed"
        metadata = {"command": self.name, "duration_ms": int(self.seconds * 1000), "started_at": self.started_at,
                    "host": socket.gethostname()}
        metadata.update({"signal": self.signal} if self.signal else {"exit_code": self.exit_code})
        return {"severity": "info" if status == "ok" else "error", "status": status, "metadata": metadata,
                "message": "{} {} after {:.1f}s".format(self.name, self.how, self.seconds)}


# ---- Reporting: the only writer to the standard streams ----------------------------------------------------------

MOST_WARNINGS = 20


class Reporter:
    """Writes to the standard streams, without secrets; a stream that is closed or full changes no verdict.

    delivery: the Delivery that is reported of, or None.
    """

    def __init__(self, environ):
        self.verbose, self._progress, self._secrets = False, False, []
        self.hide(environ.get("PACKTRACK_API_KEY"))
        self._started = self._shown = time.monotonic()
        self._warnings, self._line_open, self._terminal, self.delivery = 0, False, False, None

    def hide(self, secret):
        """Cut a secret out of all that is written from now on. One so short would be found in any text."""
        if secret and len(secret) >= 6:
            self._secrets.append(secret)

    def configure(self, settings):
        """Take what the settings say of output."""
        self.verbose = settings["verbose"]
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._progress = terminal if settings["progress"] is None else settings["progress"]
        self._terminal = terminal

    def out(self, text):
        """Write to standard output."""
        self._write(sys.stdout, text)

    def error(self, text):
        self.end_progress()
        self._write(sys.stderr, "{}: error: {}\n".format(PROGRAM, text))

    def warn(self, text):
        """Tell of a failure that does not end the run; of many, only the first."""
        self._warnings += 1
        if self._warnings <= MOST_WARNINGS:
            self.end_progress()
            self._write(sys.stderr, "{}: {}\n".format(PROGRAM, text))
        elif self._warnings == MOST_WARNINGS + 1:
            self._write(sys.stderr, "{}: further failures are only counted\n".format(PROGRAM))

    def trace(self, text):
        """Tell what happens, under --verbose."""
        if self.verbose:
            self.end_progress()
            self._write(sys.stderr, "{}: {}\n".format(PROGRAM, text))

    def usage(self):
        self._write(sys.stderr, usage_text())

    def progress(self):
        """Show how far the delivery is, from the second second on."""
        now = time.monotonic()
        if not self._progress or now - self._started < 1 or now - self._shown < (0.2 if self._terminal else 2):
            return
        self._shown, delivery = now, self.delivery
        words = "{} records read".format(delivery.read)
        if delivery.delivered:
            words += ", {} delivered, {:.0f}/s".format(delivery.delivered, delivery.delivered / (now - self._started))
        if delivery.sink is not None and delivery.sink.total:
            words += ", {:.0f} %".format(100.0 * (delivery.delivered + delivery.undelivered) / delivery.sink.total)
        self._write(sys.stderr, "\r{}\x1b[K".format(words) if self._terminal else "{}: {}\n".format(PROGRAM, words))
        self._line_open = self._terminal

    def end_progress(self):
        if self._line_open:
            self._line_open = False
            self._write(sys.stderr, "\r\x1b[K")

    def _write(self, stream, text):
        data = (redact(text, self._secrets) if self._secrets else text).encode("utf-8", "backslashreplace")
        try:
            descriptor = stream.fileno()
            while data:
                data = data[os.write(descriptor, data):]
        except (OSError, ValueError, AttributeError):  # closed or full; AttributeError: None, closed from the start
            pass

    def finish(self, error, signal):
        """Tell how the run ended, and return its exit code. error: a PackTrackError or None. signal: its number or None."""
        self.end_progress()
        if signal:
            error = PackTrackError("stopped by signal {}".format(signal), kind="interrupted")
        if error is not None:
            self.error(str(error) + (accounting(self.delivery) if self.delivery else ""))
        return error, 128 + signal if signal else error.exit_code if error is not None else 0

    def summarise(self, error, code):
        """Write the line of --json."""
        delivery = self.delivery
        client = getattr(delivery and delivery.sink, "client", None)
        summary = {"ok": code == 0, "exit_code": code}
        for name in ("read", "delivered", "undelivered", "invalid"):
            summary[name] = getattr(delivery, name, 0)
        for name in ("requests", "retries", "bytes_sent"):
            summary[name] = getattr(client, name, 0)
        summary["seconds"] = round(time.monotonic() - self._started, 3)
        summary["error"] = None if error is None else {
            "kind": error.kind, "message": redact(error.args[0], self._secrets), "status": error.status,
            "where": error.where}
        self.out(json.dumps(summary) + "\n")


def accounting(delivery):
    """Return the end of the failure line: what was delivered and what was not."""
    if not delivery.read:
        return ""
    if not delivery.delivered and not delivery.undelivered or delivery.read == 1:
        return ""
    client = getattr(delivery.sink, "client", None)
    if not delivery.delivered and not (client and client.requests):
        words = "; nothing was sent"
    else:
        ranges = ["{}-{}".format(*pair) if pair[0] != pair[1] else str(pair[0]) for pair in delivery.ranges]
        words = "; {} of {} records delivered".format(delivery.delivered, delivery.read)
        if delivery.undelivered:
            words += ", {} not: records {}{}".format(
                delivery.undelivered, ", ".join(ranges[:10]), " and more" if len(ranges) > 10 else "")
        if delivery.invalid:
            words += ", {} invalid".format(delivery.invalid)
    if delivery.unkept:
        words += "; {} of them could not be kept".format(delivery.unkept)
    return words


# ---- main: from settings to what does the work ---------------------------------------------------------------------


def open_appender(settings, name, mode, error_class):
    """Return the Appender of an option that names a file, or None; check it before anything is sent."""
    if not settings[name]:
        return None
    try:
        return Appender(settings[name], mode)
    except InputError as error:
        raise error_class(str(error), where=settings.sources[name])


def read_key(settings, watch, reporter):
    """Return the API key, from its option or from the first line of its file. Raises InvalidError."""
    key = settings["api-key"]
    if settings["api-key-file"]:
        source_name = settings.sources["api-key-file"]
        try:
            source, text = Source(settings["api-key-file"], watch), b""
            try:
                while b"\n" not in text and len(text) < BLOCK:
                    chunk = source.read()
                    if not chunk:
                        break
                    text += chunk
            finally:
                source.close()
            key = parse_header(text.split(b"\n")[0].decode("utf-8").strip())
        except InputError as error:
            raise InvalidError(str(error), where=source_name)
        except ValueError:
            raise InvalidError("the file's first line must be the key: visible ASCII characters (it is not shown)",
                               where=source_name)
        if source.is_file and os.name != "nt" and source.mode & 0o077:
            reporter.trace("{}: the file can be read by others; chmod 600 it".format(source_name))
    if not key:
        raise InvalidError("no API key: set PACKTRACK_API_KEY, or use --api-key-file or --api-key")
    reporter.hide(key)
    return key


def make_client(settings, watch, reporter):
    """Return the Client that the settings describe."""
    return Client(
        read_key(settings, watch, reporter), settings["base-url"], settings["timeout"], settings["retries"],
        settings["backoff-initial"], settings["backoff-max"], settings["jitter"], settings["user-agent"],
        settings["gzip"], settings["health-path"], trace=reporter.trace,
        watch=ThreadWatch(watch.deadline) if settings["async"] else watch)


def make_sink(settings, watch, reporter):
    """Return where the settings send records, or None for --dry-run."""
    if settings["dry-run"]:
        return None
    if settings["output"]:
        return FileSink(open_appender(settings, "output", 0o666, InputError))
    return HttpSink(make_client(settings, watch, reporter), settings["idempotency-key"], reporter.trace,
                    settings["health-enable"])


def event_from_flags(settings, event):
    """Return the record of an event that the event options complete. Raises InvalidError that names the flags."""
    missing = [option.flag for option in EVENT_OPTIONS
               if ".".join(option.field) in REQUIRED and not settings[option.name] and option.field[0] not in event]
    if missing:
        raise InvalidError("{} missing: give {}, or the variable".format(
            ", ".join(missing), "it" if len(missing) == 1 else "them"))
    return dump_json(complete_event(event, event_defaults(settings), utc_timestamp(time.time())))


def make_delivery(settings, watch, reporter):
    """Return the Delivery that the settings describe, and have the reporter report of it."""
    undelivered = None
    if not settings["dry-run"]:
        undelivered = open_appender(settings, "undelivered", 0o600, InvalidError)
    reporter.delivery = Delivery(make_sink(settings, watch, reporter), settings["keep-going"], undelivered,
                                 reporter.warn, reporter.progress)
    return reporter.delivery


def deliver_flags(settings, delivery, event):
    """Deliver the one event that flags and variables make."""
    record = event_from_flags(settings, event)
    delivery.read = 1
    if delivery.sink is None:
        delivery.lose_rest()
    else:
        delivery.sink.single, delivery.sink.total = True, 1
        delivery.send(Batch([record], range(1, 2)))


def deliver_input(settings, watch, delivery):
    """Deliver what a file or standard input holds."""
    source = Source("-" if settings["stdin"] else settings["file"], watch)
    scanner = Scanner(source.name, settings["ndjson"], event_defaults(settings))
    if settings["async"] and delivery.sink is not None:
        queue = AsyncClient(None, settings["batch-size"], settings["flush-interval"], settings["queue-capacity"],
                            settings["max-batch-bytes"], deliver=delivery.send)
        deliver_streamed(scanner, source, delivery, queue, watch, not settings["no-flush"])
        source.close()
    else:
        replay = Replay(source, keep=delivery.sink is not None)
        batcher = Batcher(settings["batch-size"], settings["max-batch-bytes"])
        deliver_kept(scanner, replay, delivery, batcher, watch)
        replay.close()


def check_health(settings, watch, reporter):
    """Ask the service's health. Raises InvalidError, whose exit code is 1, unless it is healthy."""
    client = make_client(settings, watch, reporter)
    try:
        client.health_check()
        reporter.trace("the service is healthy")
    except PackTrackError as error:
        raise InvalidError("the service is not healthy: {}".format(error), status=error.status, kind="unhealthy")
    finally:
        client.close()


def run(settings, watch, reporter):
    """Do what the settings say. Return the error whose exit code stands, or None; raises PackTrackError too."""
    if settings["health"]:
        settings["async"] = None
        return check_health(settings, watch, reporter)
    delivery = make_delivery(settings, watch, reporter)
    try:
        if settings["file"] or settings["stdin"]:
            deliver_input(settings, watch, delivery)
        else:
            deliver_flags(settings, delivery, {})
    finally:
        delivery.lose_rest()
        delivery.close()
    return delivery.error


def run_guarded(settings, watch, reporter, work):
    """Return the error that work(settings, watch, reporter) returns or raises, or None; INT and TERM go to the watch."""
    import signal

    before = []
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            before.append((number, signal.signal(number, watch.handle_signal)))
    try:
        return work(settings, watch, reporter)
    except PackTrackError as error:
        return error
    except Interrupted:
        return None
    except Exception as error:
        place = error.__traceback__
        while place.tb_next is not None:
            place = place.tb_next
        return PackTrackError("internal error: {} at line {}; please report it".format(
            type(error).__name__, place.tb_lineno), kind="internal")
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def report_command(settings, reporter):
    """Run the command of the settings and report how it ended; return the exit code, which is the command's own."""
    settings["async"], trouble = None, settings.trouble
    if trouble is None:
        try:
            event_from_flags(settings, Ending(settings.command).event())
        except InvalidError as error:
            trouble = error
    if trouble is not None:
        reporter.error("{}; the command runs, but will not be reported".format(trouble))
    ending = run_command(settings.command, settings["command-timeout"])
    if ending.how.startswith("could not"):
        reporter.error("{} {}".format(ending.name, ending.how))
    if trouble is None:
        event = ending.event()
        event.update({name: settings[name] for name in ("status", "severity", "message") if settings.from_flag(name)})

        def deliver_ending(settings, watch, reporter):
            delivery = make_delivery(settings, watch, reporter)
            try:
                deliver_flags(settings, delivery, event)
            finally:
                delivery.close()
            return delivery.error

        watch = Watch(settings["deadline"] or COMMAND_DELIVERY)
        trouble = run_guarded(settings, watch, reporter, deliver_ending)
        if trouble is not None or watch.signal:
            reporter.error("the command's end was not reported: {}".format(trouble or "stopped by a signal"))
    if settings["strict"] and trouble is not None and ending.exit_code == 0:
        return trouble.exit_code
    return ending.exit_code


def wants_json(argv, environ):
    """Tell whether a command line that was refused asked for --json."""
    words = argv[:argv.index("--")] if "--" in argv else argv
    asked = [word for word in words if word in ("--json", "--no-json")]
    return asked[-1] == "--json" if asked else environ.get("PACKTRACK_JSON", "").lower() in TRUE


def main(argv=None):
    """Run the program with the arguments argv (by default the process's own) and return its exit code."""
    import gc

    gc.disable()  # records make no cycles, and looking for some among millions takes a third of the time
    argv = sys.argv[1:] if argv is None else list(argv)
    reporter, settings, watch = Reporter(os.environ), None, Watch()
    try:
        settings = resolve(argv, os.environ)
        if settings["help"] or settings["version"] or settings["completion"]:
            reporter.out(help_text() if settings["help"] else "{} {}\n".format(PROGRAM, VERSION) if settings["version"]
                         else completion(settings["completion"]))
            return 0
        reporter.configure(settings)
        if settings.command is not None:
            return report_command(settings, reporter)
        if not argv and not any(settings[name] for name in ("message", "file", "stdin", "health")):
            reporter.usage()
            return 1
        watch = Watch(settings["deadline"])
        error = run_guarded(settings, watch, reporter, run)
    except PackTrackError as refusal:
        error = refusal
    except KeyboardInterrupt:  # before there was anything to interrupt
        return 130
    error, code = reporter.finish(error, watch.signal)
    if settings["json"] if settings is not None else wants_json(argv, os.environ):
        reporter.summarise(error, code)
    return code


if __name__ == "__main__":
    sys.exit(main())
