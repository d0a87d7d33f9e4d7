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

# ---- Errors: one class per exit code; a message is one line, without secrets -------------------------------


class PackTrackError(Exception):
    """What this module raises.

    exit_code: the exit code of the command line. kind: a word for programs. status: the HTTP status, or None.
    where: what it is about, such as "events.ndjson:151", "--timeout" or "PACKTRACK_TIMEOUT", or None.
    ends_run: whether all the rest of a run would fail alike.
    """

    exit_code, kind = 2, "error"

    def __init__(self, message, where=None, status=None, kind=None, ends_run=False):
        super().__init__(message)
        self.where, self.status, self.kind, self.ends_run = where, status, kind or self.kind, ends_run

    def __str__(self):
        return "{}: {}".format(self.where, self.args[0]) if self.where else self.args[0]


class InvalidError(PackTrackError):
    """Arguments or an event that are not valid; nothing was sent for them."""

    exit_code, kind = 1, "invalid"


class RefusedError(PackTrackError):
    """The server's final no, or a fault that trying again does not mend."""

    exit_code, kind = 2, "refused"


class RetriesExhaustedError(PackTrackError):
    """The tries or the time are used up; a later run may succeed."""

    exit_code, kind = 3, "retries_exhausted"


class InputError(PackTrackError):
    """The input cannot be read or is not what it should be, or a file cannot be written."""

    exit_code, kind = 4, "input"


class Interrupted(BaseException):
    """A signal, or abort(), ended a wait. Not an Exception: nothing may swallow it."""


# ---- Options: one table, its value parsers, and resolve(argv, environ); no input is read here --------------

UNITS = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
LONGEST = 366 * 86400.0
SEVERITIES = ("debug", "info", "warn", "error")
STATUSES = ("ok", "failed", "skipped", "timeout", "retrying", "unknown")
TRUE, FALSE = ("1", "true", "yes", "y", "on"), ("0", "false", "no", "n", "off")
DIGITS = "0123456789"
LABEL = DIGITS + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_"
# RFC 3339, 5.6, with a capital T and Z. The calendar is in the pattern: datetime's parsers differ by version.
TIMESTAMP = (
    r"(?:(?!0000)[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)"
    r"T(?:[01][0-9]|2[0-3]):[0-5][0-9]:(?:[0-5][0-9]|60)(?:\.[0-9]+)?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])\Z"
)


def parse_required(text):
    """Text that is not empty."""
    if not text:
        raise ValueError("must not be empty")
    return text


def parse_boolean(text):
    """1/true/yes/y/on or 0/false/no/n/off, in any case."""
    if text.lower() not in TRUE + FALSE:
        raise ValueError("must be true or false")
    return text.lower() in TRUE


def parse_duration(text):
    """A duration as in Go ("1m30s", "1.5h", "500us") or a bare number of seconds; return seconds."""
    parts = re.findall(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([a-z\u00b5\u03bc]*)", text)
    units = {"": 1.0} if len(parts) == 1 and not parts[0][1] else UNITS
    if not parts or "".join(map("".join, parts)) != text or any(unit not in units for _, unit in parts):
        raise ValueError("must be a duration such as 500ms, 15s or 1m30s")
    seconds = sum(float(number) * units[unit] for number, unit in parts)
    if seconds > LONGEST:
        raise ValueError("must be at most {:.0f}h".format(LONGEST / 3600))
    return seconds


def parse_limit(text):
    """A duration that is not zero; return seconds."""
    seconds = parse_duration(text)
    if not seconds:
        raise ValueError("must be more than zero")
    return seconds


def parse_fraction(text):
    """A decimal number from 0 to 1."""
    if not re.match(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\Z", text) or float(text) > 1:
        raise ValueError("must be a number from 0 to 1")
    return float(text)


def whole_number(least, most):
    """Return the parser of a whole number from least to most."""

    def parse(text):
        if not 0 < len(text) < 13 or text.strip(DIGITS) or not least <= int(text) <= most:
            raise ValueError("must be a whole number from {} to {}".format(least, most))
        return int(text)

    return parse


def one_of(*choices):
    """Return the parser of an enumeration."""

    def parse(text):
        if text not in choices:
            raise ValueError('must be one of {} (got "{}"{})'.format(
                ", ".join(choices), printable(text), nearest(text, choices)))
        return text

    parse.choices = choices
    return parse


def parse_header(text):
    """A header value: visible ASCII, spaces inside only (RFC 9110, 5.5). Not quoted: it may be a secret."""
    if not text or text != text.strip(" ") or not all(" " <= character <= "~" for character in text):
        raise ValueError("must be visible ASCII characters, with spaces inside only (the value is not shown)")
    return text


def parse_timestamp(text):
    """An RFC 3339 time with T and zone; empty is absent."""
    if text and not re.match(TIMESTAMP, text):
        raise ValueError('must be an RFC 3339 time such as 2025-11-25T09:30:00Z (got "{}")'.format(
            printable(text)))
    return text


def parse_object(text):
    """A JSON object; empty is absent. What is wrong is told by its column, not quoted."""
    try:
        value = parse_json(text) if text else {}
    except InputError as error:
        raise ValueError(str(error))
    if type(value) is not dict:
        raise ValueError("must be a JSON object")
    return value


def parse_path(text):
    """The path of a URL, with or without its first slash."""
    if not all("!" <= character <= "~" for character in text) or "#" in text:
        raise ValueError("must be percent-encoded ASCII without a fragment")
    return "/" + text.lstrip("/")


def parse_base_url(text):
    """An http or https URL without user, query or fragment; return it without trailing slashes."""
    if "@" in text:
        raise ValueError("must not hold a user or password (the value is not shown)")
    scheme, _, rest = text.partition("://")
    place, slash, path = rest.partition("/")
    if scheme not in ("http", "https") or not place or "?" in text or "#" in text:
        raise ValueError(
            "must be http://HOST or https://HOST with an optional port and path, and nothing more")
    host, port = split_host(place, None)
    if place[len(host):] and (not port or len(port) > 5 or port.strip(DIGITS) or not 0 < int(port) < 65536):
        raise ValueError("the port must be a number from 1 to 65535")
    path = parse_path(path).rstrip("/") if slash else ""
    return "{}://{}{}{}".format(scheme, check_host(host), ":" + port if port else "", path)


def split_host(place, default_port):
    """Return host and port, as text, of "host", "host:port" or "[address]:port"."""
    end = place.find("]") + 1 if place.startswith("[") else 0
    host, colon, port = place[end:].partition(":")
    return place[:end] + host, port if colon else default_port


def check_host(host):
    """Return a host name in ASCII, or an IPv6 address in brackets; raise ValueError for what is neither."""
    if host.startswith("["):
        import socket

        try:
            socket.inet_pton(socket.AF_INET6, host[1:-1])
        except OSError:
            raise ValueError("what stands in brackets must be an IPv6 address")
        return host
    try:
        name = host if max(host, default="") <= "~" else host.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    labels = (name[:-1] if name.endswith(".") else name).split(".")
    if len(name) > 254 or not all(0 < len(label) < 64 and not label.strip(LABEL) for label in labels):
        raise ValueError("the host name is not valid")
    return name


class Option:
    """One option: what the parser, the environment, --help, the README and the completions know of it."""

    def __init__(self, name, help, parse=parse_boolean, metavar=None, default=None, short=None, variable=True,
                 path=False, field=None):
        self.name, self.help, self.parse, self.metavar, self.default = name, help, parse, metavar, default
        self.short, self.path, self.field = short, path, field
        self.is_boolean, self.choices = parse is parse_boolean, getattr(parse, "choices", ())
        self.variable = "PACKTRACK_" + name.upper().replace("-", "_") if variable else None
        self.flag, self.opposite = "--" + name, None
        if self.is_boolean and variable:  # the flag that undoes it
            self.opposite = "--" + (name[3:] if name.startswith("no-") else "no-" + name)
        self.flags = [flag for flag in (self.flag, self.opposite, short) if flag]


BASE_URL = "https://pack.shimcounty.com"
USER_AGENT = "pack-track-sdk-python/{0} packtrack-logger/{0}".format(VERSION)
GROUPS = (
    ("Core", (
        Option("api-key", "key of the service; safer in a file or the environment", parse_header, "KEY"),
        Option("api-key-file", "take the key from the file's first line", parse_required, "PATH", path=True),
        Option("base-url", "where the service is", parse_base_url, "URL", BASE_URL),
        Option("health-path", "path of the health check", parse_path, "PATH", "/api/health"),
        Option("timeout", "limit of one attempt, from connecting to the answer",
               parse_limit, "DURATION", "15s"),
        Option("retries", "further tries after the first", whole_number(0, 1000), "N", "3"),
        Option("backoff-initial", "wait before the first further try", parse_duration, "DURATION", "100ms"),
        Option("backoff-max", "longest wait between tries, before jitter", parse_duration, "DURATION", "2s"),
        Option("jitter", "random share of each wait, 0 to 1", parse_fraction, "FRACTION", "0.2"),
        Option("user-agent", "User-Agent header", parse_header, "TEXT", USER_AGENT),
        Option("idempotency-key", "Idempotency-Key header, with record numbers where a run makes several "
               "requests; auto: the body's hash", parse_header, "KEY"),
        Option("gzip", "compress the body"),
    )),
    ("Event construction", (
        Option("timestamp", "time; default now", parse_timestamp, "RFC3339", field="timestamp"),
        Option("source-system", "required", parse_required, "TEXT", field="source.system"),
        Option("source-env", "such as prod", str, "TEXT", field="source.env"),
        Option("workflow-id", "required", parse_required, "TEXT", field="workflow.id"),
        Option("workflow-name", "the workflow's name", str, "TEXT", field="workflow.name"),
        Option("run-id", "the workflow's run", str, "TEXT", field="workflow.run_id"),
        Option("step-id", "the run's step", str, "TEXT", field="workflow.step_id"),
        Option("actor-type", "required, such as agent", parse_required, "TEXT", field="actor.type"),
        Option("actor-id", "required", parse_required, "TEXT", field="actor.id"),
        Option("actor-display", "the actor's name", str, "TEXT", field="actor.display_name"),
        Option("severity", "required:", one_of(*SEVERITIES), "WORD", field="severity"),
        Option("status", "required:", one_of(*STATUSES), "WORD", field="status"),
        Option("message", "required", parse_required, "TEXT", field="message"),
        Option("metadata", "a JSON object", parse_object, "JSON", field="metadata"),
        Option("extra", "a JSON object", parse_object, "JSON", field="extra"),
    )),
    ("Input sources", (
        Option("file", "read a JSON event or array; - is standard input", parse_required, "PATH", path=True),
        Option("stdin", "read standard input"),
        Option("ndjson", "the input holds one JSON event a line"),
    )),
    ("Delivery", (
        Option("batch-size", "most records of one request", whole_number(1, 1000000), "N", "100"),
        Option("max-batch-bytes", "most bytes of one body", whole_number(1, 1 << 30), "N", "1000000"),
        Option("deadline", "limit of the whole run; past it: exit 3", parse_limit, "DURATION"),
        Option("keep-going", "skip what is invalid or refused, deliver the rest"),
        Option("undelivered", "append what was read and not delivered", parse_required, "FILE", path=True),
        Option("output", "append to FILE, - for standard output, and do not send",
               parse_required, "FILE", path=True),
    )),
    ("Diagnostics", (
        Option("verbose", "tell of attempts, waits and statuses", short="-v"),
        Option("dry-run", "validate only"),
        Option("health", "ask the service's health; exit 0 or 1"),
        Option("health-enable", "ask it before sending, told by --verbose"),
        Option("json", "one line of JSON on standard output at the end"),
        Option("progress", "show progress; default on a terminal"),
        Option("completion", "print the completion script:",
               one_of("bash", "zsh", "fish"), "SHELL", variable=False),
        Option("version", "print the version", short="-V", variable=False),
        Option("help", "print this", short="-h", variable=False),
    )),
    ("Async", (
        Option("async", "send while reading; a pipe is not kept for a second reading"),
        Option("flush-interval", "longest wait of a record for its batch to fill",
               parse_limit, "DURATION", "1s"),
        Option("queue-capacity", "most records that wait to be sent",
               whole_number(1, 10000000), "N", "10000"),
        Option("no-flush", "abandon what is queued at the end"),
    )),
    ("Command", (
        Option("command-timeout", "then send TERM, and 5s later KILL; exit 124", parse_limit, "DURATION"),
        Option("strict", "a failed delivery fails a command that succeeded"),
    )),
)
OPTIONS = tuple(option for _, options in GROUPS for option in options)
BY_NAME = {option.name: option for option in OPTIONS}


class Settings(dict):
    """The value of each option by its name; defaults are parsed when they are asked for.

    sources: {name: the flag or variable that gave it}. command: what stands after `--`, or None. trouble:
    with a command, the first error of the environment, which must not keep the command from running; else
    None.
    """

    def __init__(self, command=None):
        super().__init__()
        self.sources, self.command, self.trouble = {}, command, None

    def __missing__(self, name):
        option = BY_NAME[name]
        self[name] = None if option.default is None else option.parse(option.default)
        return self[name]

    def from_flag(self, name):
        return self.sources.get(name, "").startswith("-")


class Keep(argparse.Action):
    """Keeps a flag as it was written beside its text, which is parsed later, as the environment's are."""

    def __call__(self, parser, namespace, value, flag=None):
        vars(namespace)[self.dest] = (flag, value[1:] if self.nargs is None else value)


class Parser(argparse.ArgumentParser):
    """argparse with our errors: exit code 1, and no value quoted, since it may be a secret."""

    def error(self, message):
        flag, _, why = message.partition(": ")
        raise InvalidError("needs a value" if why.startswith("expected") else "takes no value",
                           where=flag.replace("argument ", "").split("/")[0])


def parse_command_line(argv):
    """Return {option name: (flag, text; None for a bare boolean)} and the command after `--`, or None."""
    # The help is ours. A fixed width keeps argparse from importing shutil to measure the terminal.
    parser = Parser(add_help=False, allow_abbrev=False, usage="", argument_default=argparse.SUPPRESS,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80))
    named = {word.partition("=")[0] if word.startswith("--") else word[:2] for word in argv}
    for option in OPTIONS:
        if not named.isdisjoint(option.flags):  # argparse is slow to be told of an option
            nargs = "?" if option.is_boolean else None
            parser.add_argument(*option.flags, dest=option.name, action=Keep, nargs=nargs)
    takes_value = {option.flag for option in OPTIONS if not option.is_boolean}
    words, command, rest = [], None, iter(argv)
    for word in rest:
        if word == "--":
            command = list(rest)
            break
        flag, equals, value = word.partition("=")
        if flag in takes_value:
            # Joined by one more "=": argparse takes a value with a dash first for a flag, and drops "--".
            value = value if equals else next(rest, None)
            word = flag if value is None else "{}=={}".format(flag, value)
        words.append(word)
    given, unknown = parser.parse_known_args(words)
    if unknown:
        if not unknown[0].startswith("-") or unknown[0] == "-":
            raise InvalidError("unexpected argument (not shown: it may be a secret); put quotes around "
                               "a value with blanks, and -- before a command")
        flag = unknown[0].split("=")[0]
        near = nearest(flag, [known for option in OPTIONS for known in option.flags])
        if not flag.startswith("--"):
            flag = flag[:2]  # the value of a short flag may follow it without a blank
        raise InvalidError("unknown flag {}{}; see --help".format(printable(flag), near))
    if command == []:
        raise InvalidError("a command must follow", where="--")
    return vars(given), command


def read_option(option, source, text):
    """Return the value of an option from its text; source, the flag or variable, is named by errors."""
    try:
        if option.is_boolean:
            value = True if text is None else parse_boolean(text)
            return not value if source == option.opposite else value
        if not option.path:  # text is UTF-8, whatever the locale took it for
            try:
                text = os.fsencode(text).decode("utf-8")
            except UnicodeError:
                raise ValueError("must be UTF-8")
        return option.parse(text)
    except ValueError as error:
        raise InvalidError(str(error), where=source)


def resolve(argv, environ):
    """Return the Settings of a command line (a list without the program's name) and an environment (a dict).

    A flag beats its variable, and that the default. Raises InvalidError.
    """
    given, command = parse_command_line(argv)
    settings = Settings(command)
    asked = [name for name in ("help", "version", "completion") if name in given]
    for option in OPTIONS:
        if asked and option.name not in asked:
            continue  # whoever asks for help must get it, whatever else is wrong
        if option.name in given:
            settings.sources[option.name], text = given[option.name]
            settings[option.name] = read_option(option, settings.sources[option.name], text)
        elif option.variable and environ.get(option.variable):
            settings.sources[option.name] = option.variable
            try:
                settings[option.name] = read_option(option, option.variable, environ[option.variable])
            except InvalidError as error:
                if command is None:
                    raise
                settings.trouble = settings.trouble or error
    if not asked:
        settle(settings)
    return settings


def settle(settings):
    """Refuse flags that contradict each other; drop variables that are about another kind of run."""
    sources = [name for name in ("file", "stdin") if settings[name]]
    flags = [name for name in sources if settings.from_flag(name)]
    chosen = flags if flags or settings.command else sources
    if len(chosen) > 1:
        names = [settings.sources[name] for name in chosen]
        raise InvalidError("one source of records, please: {} or {}".format(*names))
    for name in sources:
        if name not in chosen:
            settings[name] = None
    command = settings.command
    needs_command, no_command = "needs a command after --", "cannot be combined with a command after --"
    rules = (
        ("file", not command, no_command),
        ("stdin", not command, no_command),
        ("ndjson", settings["file"] or settings["stdin"], "needs --file or --stdin"),
        ("no-flush", settings["async"], "needs --async"),
        ("command-timeout", command, needs_command),
        ("strict", command, needs_command),
        ("json", not command, no_command),
        ("health", not command, no_command),
        ("dry-run", not command, no_command),
        ("output", not command or settings["output"] != "-", "- " + no_command),
    )
    for name, holds, why in rules:
        if settings[name] and not holds:
            error = InvalidError(why, where=settings.sources[name])
            if settings.from_flag(name):
                raise error
            if name in ("dry-run", "output"):  # whoever set these may rely on the event not being sent
                settings.trouble = settings.trouble or error
            settings[name] = None
    if settings.from_flag("api-key-file") and not settings.from_flag("api-key"):
        settings["api-key"] = None
    elif settings["api-key"]:
        settings["api-key-file"] = None


# ---- Texts: what people read, derived from the table; nothing is printed here ------------------------------

USAGE = """Usage:
  packtrack-logger [FLAGS] --workflow-id ID ... --message TEXT
  packtrack-logger [FLAGS] --file PATH [--ndjson]
  packtrack-logger [FLAGS] --stdin [--ndjson]
  packtrack-logger [FLAGS] -- COMMAND [ARG...]
"""
EXAMPLES = """
Examples:
  packtrack-logger --source-system shop --workflow-id wf-1 --actor-type agent \\
      --actor-id a-42 --severity info --status ok --message 'checkout completed'
  packtrack-logger --stdin --ndjson --undelivered left.ndjson < events.ndjson
  packtrack-logger --source-system cron --workflow-id backup --actor-type host \\
      --actor-id db1 -- /usr/local/bin/backup.sh --full
"""
QUOTED = 200


def printable(text):
    """Return text on one line, without control characters, of at most 200 characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:QUOTED]


def redact(text, secrets):
    """Return text with every secret cut out, also where it was escaped for JSON, HTML or a URL."""
    for secret in secrets:
        from urllib.parse import quote

        raw = secret.encode("utf-8", "surrogateescape")
        forms = {secret, json.dumps(secret)[1:-1], quote(raw), quote(raw, safe=""),
                 secret.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, "***")
    return text


def nearest(word, known):
    """Return words that name the nearest of the known words, or nothing."""
    import difflib

    found = difflib.get_close_matches(word, known, 1)
    return "; did you mean {}?".format(found[0]) if found else ""


def exit_codes():
    """Return the pairs of exit code and meaning that the module's docstring lists."""
    return re.findall(r"^  (\S+)  (.+)$", __doc__ or "", re.MULTILINE)


def about(option):
    """Return what an option is for, with its choices."""
    return " ".join([option.help] + [", ".join(option.choices)] * bool(option.choices))


def help_text():
    """Return --help: at most 80 columns, and never a value of the environment."""
    import textwrap

    def entry(name, text, width):
        lines = textwrap.wrap(text, 80 - width, break_long_words=False, break_on_hyphens=False)
        if len(name) >= width:
            lines.insert(0, "")
        return [name.ljust(width) + lines[0]] + [" " * width + line for line in lines[1:]]

    lines = ["Send PackTrack events: from flags, JSON, NDJSON, or on how a command ended.", ""]
    lines += [USAGE.rstrip()]
    for title, options in GROUPS:
        lines += ["", title + (" (for records from an input: what they lack):" if options[0].field else ":")]
        for option in options:
            flags = ", ".join(filter(None, (option.short, option.flag)))
            default = option.default and "default " + option.default
            facts = ", ".join(filter(None, (option.variable, default)))
            text = about(option) + (" [{}]".format(facts) if facts else "")
            lines += entry("  " + " ".join(filter(None, (flags, option.metavar))), text, 26)
    lines += ["", "A boolean flag has a --no- form. A flag beats its variable, that the default."]
    lines += ["", "Exit codes:"]
    for code, meaning in exit_codes():
        lines += entry("  " + code, meaning, 10)
    lines += entry("", "With a command: the command's own, and 124 after --command-timeout.", 10)
    return "\n".join(lines) + "\n" + EXAMPLES


def readme_tables():
    """Return the README's two tables in Markdown: {"options": text, "exit-codes": text}."""
    rows = ["| flag | variable | default | what it does |", "|---|---|---|---|"]
    for option in OPTIONS:
        flags = [option.short] * bool(option.short) + [" ".join(filter(None, (option.flag, option.metavar)))]
        cells = [", ".join("`{}`".format(flag) for flag in flags)]
        cells += ["`{}`".format(cell) if cell else "" for cell in (option.variable, option.default)]
        rows.append("| {} | {} |".format(" | ".join(cells), about(option)))
    codes = ["| exit code | meaning |", "|---|---|"] + ["| {} | {} |".format(*row) for row in exit_codes()]
    return {"options": "\n".join(rows) + "\n", "exit-codes": "\n".join(codes) + "\n"}


def completion(shell):
    """Return the completion script of "bash", "zsh" or "fish"."""
    return {"bash": bash_completion, "zsh": zsh_completion, "fish": fish_completion}[shell]()


def bash_completion():
    """For bash 3.2 or later; where it proposes nothing, the shell's own file names stand in."""
    case = '        {}) COMPREPLY=($(compgen -W "{}" -- "$cur")); return ;;\n'
    cases = "".join(case.format(option.flag, " ".join(option.choices))
                    for option in OPTIONS if option.choices)
    values = "|".join(option.flag for option in OPTIONS if not (option.is_boolean or option.choices))
    words = " ".join(flag for option in OPTIONS for flag in option.flags)
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
        value = ""
        if not option.is_boolean:
            words = "({})".format(" ".join(option.choices)) if option.choices else " "
            value = ":{}:{}".format(option.metavar, "_files" if option.path else words)
        text = re.sub(r"([][:\\])", r"\\\1", option.help.rstrip(":")).replace("'", "'\\''")
        lines += ["    '{}[{}]{}' \\".format(flag, text, value) for flag in option.flags]
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
        value = "" if option.is_boolean else " -r -F" if option.path else " -x"
        if option.choices:
            value = " -x -a '{}'".format(" ".join(option.choices))
        text = option.help.rstrip(":").replace("'", "\\'")
        for flag in option.flags:
            name = "-l " + flag[2:] if flag.startswith("--") else "-s " + flag[1:]
            lines.append("complete -c packtrack-logger {}{} -d '{}'".format(name, value, text))
    return "\n".join(lines) + "\n"


# ---- Events: pure functions from records to records; no files, no clock ------------------------------------

FIELDS = ("timestamp", "source", "workflow", "actor", "severity", "status", "message", "metadata", "extra")
PARTS = {
    "source": ("system", "env"),
    "workflow": ("id", "name", "run_id", "step_id"),
    "actor": ("type", "id", "display_name"),
}
REQUIRED = ("source.system", "workflow.id", "actor.type", "actor.id", "severity", "status", "message")
TEXTS = ("timestamp", "severity", "status", "message") + tuple(
    "{}.{}".format(part, name) for part in PARTS for name in PARTS[part])
OBJECTS = ("metadata", "extra")
# A part's other names belong to its id, so a default for them is for no other id; the actor's type does not.
ANCHORS = {"source": "system", "workflow": "id", "actor": "id"}
MAX_RECORD = 16 << 20
MAX_DEPTH = 500
MAX_DIGITS = 4300
JSON_BLANKS = " \t\r\n"


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
    may_nest = text.count("[") + text.count("{") > MAX_DEPTH
    if len(text) <= MAX_DIGITS and not may_nest:
        return None
    # A run of more than 4300 digits holds a character whose position is a multiple of 4300.
    run = re.compile(r"[0-9]{%d}" % (MAX_DIGITS + 1))
    if not may_nest and not any(
            text[middle] in DIGITS and run.search(text, middle - MAX_DIGITS, middle + MAX_DIGITS + 1)
            for middle in range(MAX_DIGITS, len(text), MAX_DIGITS)):
        return None
    depth, in_string = 0, False
    for match in re.finditer(r'\\.|["\][{}]|[0-9]{%d}' % (MAX_DIGITS + 1), text):
        token = match.group()
        if token == '"':
            in_string = not in_string
        elif in_string or token[0] == "\\":
            continue
        elif token in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return "more than {} levels of nesting".format(MAX_DEPTH)
        elif token in "]}":
            depth -= 1
        else:
            return "a number of more than {} digits".format(MAX_DIGITS)
    return None


def json_fault(error):
    """Return what an error of scan_once says, in words that quote nothing, and its position or None."""
    if isinstance(error, RecursionError):
        return "more than {} levels of nesting".format(MAX_DEPTH), None
    if isinstance(error, StopIteration):
        return "not JSON: a value is expected", error.value
    if not isinstance(error, json.JSONDecodeError):  # a ValueError of _finite's or _no_constant's
        return str(error), None
    return "not JSON: " + (error.msg[:1].lower() + error.msg[1:]).replace(" starting at", ""), error.pos


def parse_json(text):
    """Return the value of JSON text, strictly. Raises InputError that tells what and where, not quoted."""
    fault, position = bulk_fault(text), None
    if fault is None:
        try:
            value, end = scan_once(text, len(text) - len(text.lstrip(JSON_BLANKS)))
            if not text[end:].strip(JSON_BLANKS):
                return value
            fault, position = "not JSON: something follows the value", end
        except (ValueError, StopIteration, RecursionError) as error:
            fault, position = json_fault(error)
    if position is not None:
        fault = "{} at column {}".format(fault, position - text.rfind("\n", 0, position))
    raise InputError(fault)


encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def dump_json(value):
    """Return the bytes of compact JSON on one line. Raises InvalidError where JSON has no such value."""
    try:
        return encode_json(value).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only hold escaped
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidError("cannot be written as JSON: {}".format(printable(str(error))))


def check_event(event):
    """Raise InvalidError, which names the field, unless event (a dict) is a complete and valid event."""
    _check_names("", event, FIELDS)
    for part in tuple(PARTS) + OBJECTS:
        if event.get(part) is not None:
            if type(event[part]) is not dict:
                raise InvalidError("must be an object", where=part)
            if part in PARTS:
                _check_names(part + ".", event[part], PARTS[part])
    for path in ("timestamp",) + REQUIRED:
        value = _value(event, path)
        if value is None or value == "":
            raise InvalidError("is required" if value is None else "must not be empty", where=path)
    for path in TEXTS:
        value = _value(event, path)
        if value is not None and type(value) is not str:
            raise InvalidError("must be a string", where=path)
    for path in ("severity", "status", "timestamp"):
        try:
            BY_NAME[path].parse(event[path])
        except ValueError as error:
            raise InvalidError(str(error), where=path)


def _value(event, path):
    part, _, name = path.partition(".")
    value = event.get(part)
    return value.get(name) if name and value is not None else value


def _check_names(prefix, record, known):
    for name in record:
        if name not in known:
            why = 'unknown field{} (what is your own belongs under "metadata")'.format(nearest(name, known))
            raise InvalidError(why, where=prefix + printable(name))


def complete_event(event, defaults, now):
    """Return a copy of event (a dict) with what it lacks, null included, filled in.

    defaults: an event of any fields. now: the timestamp, text, of an event that has none. What the event says
    wins. Raises InvalidError if the result is not a valid event.
    """
    result = fill_event(event, defaults, now)
    check_event(result)
    return result


def fill_event(event, defaults, now):
    """complete_event without its check."""
    result = {}
    for name in FIELDS + tuple(name for name in event if name not in FIELDS):
        own, default = event.get(name), defaults.get(name)
        if name in PARTS and (own is None or type(own) is dict):
            own, default, anchor = own or {}, default or {}, ANCHORS[name]
            own = {key: own[key] for key in own if own[key] is not None or key not in PARTS[name]}
            if anchor in own and own[anchor] != default.get(anchor):
                default = {key: default[key] for key in default if key == "type"}
            own = _merge(own, default) if own else dict(default)
        elif name in OBJECTS and type(own) is dict:
            own = _merge(own, default or {})
        elif own is None:
            own = default or (now if name == "timestamp" else None)
        if own not in (None, {}) or name not in FIELDS or name in OBJECTS and own is not None:
            result[name] = own
    return result


def _merge(own, default):
    return dict(own, **{key: default[key] for key in default if key not in own}) if default else own


def completeness_test(defaults):
    """Return a fast test of a parsed record: True only if it is valid and lacks nothing of the defaults.

    It may say False of a valid record; complete_event then has the last word. The test runs once a record, so
    it is flat: join() checks in one call that all values are strings, lengths that there is no unknown name.
    """
    timestamp, join = re.compile(TIMESTAMP).match, "".join
    severities, statuses = frozenset(SEVERITIES), frozenset(STATUSES)
    wanted = [(part, name) for part in tuple(PARTS) + OBJECTS for name in defaults.get(part, ())]

    def is_complete(event):
        try:
            source, workflow, actor = event["source"], event["workflow"], event["actor"]
            message = event["message"]
            if not (event["severity"] in severities and event["status"] in statuses
                    and timestamp(event["timestamp"]) and source["system"] and workflow["id"]
                    and actor["type"] and actor["id"] and message):
                return False
            join((message, *source.values(), *workflow.values(), *actor.values()))
            known = 7
            if "metadata" in event:
                known = 8
                if type(event["metadata"]) is not dict:
                    return False
            if "extra" in event:
                known += 1
                if type(event["extra"]) is not dict:
                    return False
            return (len(event) == known and len(source) == 1 + ("env" in source)
                    and len(actor) == 2 + ("display_name" in actor)
                    and len(workflow) == 1 + ("name" in workflow) + ("run_id" in workflow)
                    + ("step_id" in workflow))
        except (KeyError, TypeError, AttributeError):
            return False

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
    for option in OPTIONS:
        if option.field and settings[option.name]:
            part, _, name = option.field.rpartition(".")
            (defaults.setdefault(part, {}) if part else defaults)[name] = settings[option.name]
    return defaults


def utc_timestamp(seconds):
    """Return seconds since the epoch as an RFC 3339 time in UTC with microseconds."""
    whole = int(seconds // 1)
    micros = int((seconds - whole) * 1e6)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + ".{:06d}Z".format(micros)


# ---- Input: from streams to records; no network ------------------------------------------------------------

# Read and validated at a time. Larger blocks are mapped anew by malloc each time, a tenth of the whole cost.
BLOCK = 1 << 16
SPOOL_IN_MEMORY = 4 << 20
BULKY = 1000
BLANK = b" \t\r\n"
BOM = b"\xef\xbb\xbf"


class Watch:
    """Bounds whatever waits: by the run's deadline, and by INT and TERM.

    Waiting is done inside `with watch:`. Only there does a signal raise Interrupted, so that no accounting is
    cut in two; elsewhere it is noted, and raised where the next wait begins. seconds: the deadline of the run
    from now, or None. now, pause: the monotonic clock and the way to sleep.
    """

    def __init__(self, seconds=None, now=time.monotonic, pause=time.sleep):
        self.now, self.pause, self.signals, self._waiting = now, pause, [], False
        self.deadline = None if seconds is None else now() + seconds

    def handle_signal(self, number, frame=None):
        """The handler of INT and TERM. One that interrupts another leaves it to that one to raise."""
        self.signals.append(number)
        if self._waiting and getattr(frame, "f_code", None) is not Watch.handle_signal.__code__:
            self._waiting = False
            raise Interrupted()

    def count_signals(self):
        """Return how many signals came.

        Where two come at once and the first's handler raises, CPython leaves the second's for later, which
        may be never; to touch the mask runs it.
        """
        import signal

        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return len(self.signals)

    def __enter__(self):
        self._waiting = True
        self.check()

    def __exit__(self, *_):
        self._waiting = False

    def check(self):
        if self.signals:
            self._waiting = False
            raise Interrupted()

    def left(self, limit=None):
        """Return the seconds left, at most limit, or None. Raises RetriesExhaustedError past the deadline."""
        if self.deadline is None:
            return limit
        left = self.deadline - self.now()
        if left <= 0:
            raise RetriesExhaustedError("the run's deadline has passed", kind="deadline", ends_run=True)
        return left if limit is None else min(left, limit)

    def sleep(self, seconds):
        with self:
            self.pause(seconds)

    def stop(self):
        """Make the next wait raise Interrupted."""
        self.signals.append(-1)


class ThreadWatch(Watch):
    """The Watch of a thread that no signal reaches: another thread's stop() ends its sleep too."""

    def __init__(self, deadline=None):
        import threading

        self._bell = threading.Event()
        super().__init__(pause=self._bell.wait)
        self.deadline = deadline

    def stop(self):
        super().stop()
        self._bell.set()


def start_thread(work):
    """Start a daemon thread that no signal reaches: one it took would not wake the main thread."""
    import signal
    import threading

    thread = threading.Thread(target=work, daemon=True)
    mask = getattr(signal, "pthread_sigmask", None)  # Windows gives signals to the main thread alone
    before = mask and mask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        thread.start()
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)
    return thread


class Source:
    """A file, a pipe or standard input ("-"), open for reading.

    name: for messages. is_file: whether it is a regular file, which can be read twice. Raises InputError.
    """

    def __init__(self, path, watch):
        import stat

        self.name, self._watch, self._late = display(path, "standard input"), watch, None
        try:
            if path != "-":
                # Opening a FIFO waits for its writer; Linux can wait in read() instead, under the deadline.
                flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
                if sys.platform.startswith("linux") and stat.S_ISFIFO(os.stat(path).st_mode):
                    descriptor = os.open(path, flags | os.O_NONBLOCK)
                    os.set_blocking(descriptor, True)
                else:
                    with watch:
                        descriptor = os.open(path, flags)
                self.raw = io.FileIO(descriptor)
            elif sys.stdin is None:
                raise InputError("is closed", where=self.name)
            else:
                self.raw = io.FileIO(0, closefd=False)
            self.mode = os.fstat(self.raw.fileno()).st_mode
            self.is_file = stat.S_ISREG(self.mode)
            self.base = self.raw.tell() if self.is_file else 0
        except (OSError, ValueError) as error:
            raise InputError("cannot be read: " + reason(error), where=self.name)

    def read(self):
        """Return the bytes that are there, at most BLOCK; b"" at the end."""
        try:
            while True:
                self._watch.left()
                if not self.is_file:
                    self._wait()
                chunk = self.raw.read(BLOCK)
                if chunk is not None:  # None: standard input is non-blocking, and another process was faster
                    return chunk
        except OSError as error:
            raise InputError("cannot be read: " + reason(error), where=self.name)

    def read_block(self):
        """Return BLOCK bytes, or fewer at the end and before a deadline or signal, which is raised next."""
        if self._late:
            raise self._late
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
            self._late = error
        return b"".join(chunks)

    def _wait(self):
        import select

        ready = os.name == "nt"  # Windows can only wait for sockets there
        while not ready:
            left = self._watch.left()
            with self._watch:
                if hasattr(select, "poll"):  # unlike select(), it takes descriptors past 1023
                    poll = select.poll()
                    poll.register(self.raw.fileno(), select.POLLIN)
                    ready = poll.poll(None if left is None else left * 1000 + 1)
                else:
                    ready = select.select([self.raw], [], [], left)[0]

    def close(self):
        self.raw.close()


class Replay:
    """Reads a source, and parts of it again: a regular file from itself, a pipe from what was kept of it."""

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
                why = "there is no place to keep it while it is validated ({}); --async needs none"
                raise InputError(why.format(reason(error)), where=self.source.name)
        return chunk

    def again(self, start, size):
        """Return size bytes from start on, fewer if they are no longer there."""
        file, data = (self.source.raw if self._spool is None else self._spool), b""
        file.seek(self.source.base + start)
        while len(data) < size:
            part = file.read(size - len(data))
            if not part:
                break
            data += part
        return data

    def close(self):
        if self._spool is not None:
            self._spool.close()
        self.source.close()


class Block:
    """Records that were read together; after note(), where to find them again.

    records: their bytes, as they will be sent; those that are refused, as they came. errors: {index: why
    refused}. start: where the first begins in the stream. data: the stream's bytes from there to the end of
    the last. as_came: they are lines, none of them blank or completed. broken: the only record is the whole
    rest of the stream, in which records cannot be told apart.
    """

    __slots__ = ("records", "errors", "start", "data", "as_came", "broken",
                 "size", "checksum", "count", "gap")

    def __init__(self, records, errors, start, data, as_came=False, broken=False):
        self.records, self.errors, self.start, self.data = records, errors, start, data
        self.as_came, self.broken = as_came, broken

    def note(self):
        """Forget the bytes; remember what a second reading needs."""
        from zlib import crc32

        self.size, self.checksum = len(self.data), crc32(self.data)
        self.count, self.gap = len(self.records), None
        # Lines as they came, with one byte between any two, which can but be the line break.
        plain = self.as_came and sum(map(len, self.records)) + self.count - 1 == self.size
        if self.records and not self.errors:
            # If cutting at the gap between the first two gives these records, it need not be parsed again.
            length = len(self.records[0])
            gap = self.data[length:self.data.find(b"{", length)] if self.count > 1 else b"\n"
            if gap and (plain or cut_records(self.data, gap) == self.records):
                self.gap = gap
        self.records = self.errors = self.data = None

    def read_again(self, replay, scanner):
        """Return the records, and {index: error}. Raises InputError if they are not what they were."""
        from zlib import crc32

        data = replay.again(self.start, self.size)
        if len(data) != self.size or crc32(data) != self.checksum:
            raise InputError("was changed while it was being sent", where=scanner.name)
        return (cut_records(data, self.gap), {}) if self.gap else scanner.scan_again(data)


def cut_records(data, gap):
    """Return the records of bytes in which gap, and nothing else, stands between any two of them."""
    if b"," not in gap:
        return data.split(gap)
    return [b"{" + piece + b"}" for piece in data[1:-1].split(b"}" + gap + b"{")]


class Scanner:
    """Cuts bytes into records, validates and completes them.

    name: of the source, for errors. ndjson: one record a line, else a JSON object or array. defaults: see
    complete_event. single: after reading, whether it was one object.
    """

    def __init__(self, name, ndjson, defaults):
        self.name, self.ndjson, self.defaults, self.single = name, ndjson, defaults, False
        self._is_complete = completeness_test(defaults)
        self._skip_blanks = re.compile(r"[ \t\r\n]*").match
        self._skip_to_object = re.compile(r"[ \t\r\n]*,[ \t\r\n]*(?=\{)").match

    def blocks(self, read):
        """Yield the Blocks of a stream; read() returns bytes, b"" at the end. Raises InputError if empty."""
        head, empty = b"", True
        while len(head) < 4:
            chunk = read()
            if not chunk:
                break
            head += chunk
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError("is UTF-16; convert it to UTF-8", where=self.name)
        start = len(BOM) if head.startswith(BOM) else 0
        for block in (self._lines if self.ndjson else self._elements)(read, head[start:], start):
            if block.records:
                empty = False
                yield block
        if empty:
            raise InputError("is empty: there is no event in it", where=self.name)

    def scan_again(self, data):
        if self.ndjson:
            block = self._line_block(data, 0, 1)[0]
            return block.records, block.errors
        return self._element_block(data if self.single else data + b"]", 0, False, True, 1)[:2]

    def _lines(self, read, data, start):
        line, final = 1, not data
        while not final:
            end = data.rfind(b"\n") + 1
            if end:
                block, lines = self._line_block(data[:end], start, line)
                yield block
                line, start, data = line + lines, start + end, data[end:]
            elif len(data) > MAX_RECORD:
                yield self._broken(data, start, line, 0, "a line of more than 16 MiB")
                return
            chunk = read()
            final = not chunk
            data += chunk
        if data:
            yield self._line_block(data, start, line)[0]

    def _line_block(self, data, start, line):
        """Return the Block of whole lines, and how many they are."""
        records, errors, blanks, as_came, position, size = [], {}, 0, True, 0, len(data)
        text, valid = as_text(data)
        is_complete, scan, find, append = self._is_complete, scan_once, text.find, records.append
        while position < size:
            end = find("\n", position)
            if end < 0:
                end = size
            try:
                event, stop = scan(text, position)
                if (valid and is_complete(event)
                        and (stop == end or stop < end and not text[stop:end].strip(JSON_BLANKS))
                        and (stop - position <= BULKY or bulk_fault(text[position:stop]) is None)):
                    append(data[position:stop])
                    position = end + 1
                    continue
            except (ValueError, StopIteration, RecursionError):
                pass
            raw, as_came = data[position:end].strip(BLANK), False
            if raw:
                self._examine(raw, records, errors, line + len(records) + blanks)
            else:
                blanks += 1
            position = end + 1
        edges = records[0][:1] + records[0][-1:] if records else b""
        if line == 1 and 0 in errors and edges in (b"{{", b"[[", b"[,"):
            why = errors[0].args[0] + "; leave out --ndjson if this is one JSON object or array"
            errors[0] = InputError(why, where=errors[0].where)
        begin = size - len(data.lstrip(BLANK))
        data = data[begin:].rstrip(BLANK)
        return Block(records, errors, start + begin, data, as_came), len(records) + blanks

    def _examine(self, raw, records, errors, line):
        """Add the record whose bytes are raw to records, completed, or as it came with its error."""
        try:
            event = parse_json(raw.decode("utf-8"))
            if type(event) is not dict:
                raise InputError("not a JSON object")
            completed = fill_event(event, self.defaults, utc_timestamp(time.time()))
            if not self._is_complete(completed):
                check_event(completed)
            records.append(raw if completed == event else dump_json(completed))
        except (PackTrackError, UnicodeDecodeError) as error:
            if isinstance(error, UnicodeDecodeError):
                error = InputError("not UTF-8")
            errors[len(records)] = type(error)(str(error), where="{}:{}".format(self.name, line))
            records.append(raw)

    def _broken(self, data, start, line, position, why):
        """Return the Block of the rest of a stream in which no record can be told apart."""
        where = "{}:{}".format(self.name, line + data.count(b"\n", 0, position))
        return Block([data.strip(BLANK)], {0: InputError(why, where=where)}, start, b"", broken=True)

    def _elements(self, read, data, start):
        """Yield the Blocks of one object or of an array, which is not kept longer than a block."""
        line, after, final = 1, False, not data
        while not final and not data.lstrip(BLANK):
            line, start, data = line + data.count(b"\n"), start + len(data), read()
            final = not data
        begin = len(data) - len(data.lstrip(BLANK))
        self.single = data[begin:begin + 1] == b"{"
        if data and not self.single and data[begin:begin + 1] != b"[":
            yield self._broken(data, start, line, begin, "not a JSON object or array")
            return
        position = begin if self.single else begin + 1
        while data:
            records, errors, first, end, after, why = self._element_block(data, position, after, final, line)
            if records:
                yield Block(records, errors, start + first, data[first:end])
            if why is None:
                return
            line, start, position = line + data.count(b"\n", 0, end), start + end, max(0, position - end)
            data = data[end:]
            if why or len(data) > MAX_RECORD:
                where, why = why or (end, "a record of more than 16 MiB")
                yield self._broken(data, start, line, where - end, why)
                return
            wanted = 2 * len(data)  # a record that was not whole is tried again when there is twice as much
            while not final and len(data) <= wanted:
                chunk = read()
                final = not chunk
                data += chunk

    def _element_block(self, data, position, after, final, line):
        """Read elements from position on; after: an element, so a comma or the end comes first.

        Return records, errors, where the first begins and the last ends, whether an element came before that
        end, and None where the whole ended, () where more bytes are needed, or (position, why) where the JSON
        is wrong.
        """
        records, errors, first, end, size = [], {}, 0, position if after else 0, len(data)
        text, valid = as_text(data)
        is_complete, scan, skip_to_object = self._is_complete, scan_once, self._skip_to_object
        while True:
            match = skip_to_object(text, end) if after and not self.single else None
            if match:
                position = match.end()
            else:
                position, why = self._next_element(text, end if after else position, after, final)
                if position is None:
                    break
            try:
                event, stop = scan(text, position)
            except (ValueError, StopIteration, RecursionError) as error:
                fault, place = json_fault(error)
                # Cut off by the end of the data, if it went wrong at the end, or in an open string.
                cut_off = place is not None and (size - place < 16 or "nterminated" in fault)
                why = () if cut_off and not final else (position if place is None else place, fault)
                break
            if stop == size and not final:
                why = ()
                break
            first = first if records else position
            if valid and is_complete(event) and (
                    stop - position <= BULKY or bulk_fault(text[position:stop]) is None):
                records.append(data[position:stop])
            else:
                self._examine(data[position:stop], records, errors, line + data.count(b"\n", 0, position))
            end, after = stop, True
        return records, errors, first, end, after, why

    def _next_element(self, text, position, after, final):
        """Return where the next element begins and (), or None and what _element_block says of it."""
        size, position = len(text), self._skip_blanks(text, position).end()
        if after and text[position:position + 1] == "," and not self.single:
            position = self._skip_blanks(text, position + 1).end()
            if position < size:
                return position, ()
        if position == size:
            if not final:
                return None, ()
            fault = position, "not JSON: it ends before the array does"
            return None, None if after and self.single else fault
        if not after and (self.single or text[position] != "]"):
            return position, ()
        if self.single and text[position] == "{":
            return None, (position, "several JSON objects one after another; for one a line add --ndjson")
        if self.single:
            return None, (position, "not JSON: something follows the object")
        if text[position] != "]":
            return None, (position, "not JSON: a comma or the array's end is expected")
        end = self._skip_blanks(text, position + 1).end()
        if end < size:
            return None, (end, "not JSON: something follows the array")
        return None, None if final else ()


def as_text(data):
    """Return bytes as text for the JSON scanner, and whether they are UTF-8.

    Every byte becomes one character, so that positions in the text are positions in the bytes. JSON's own
    characters are all ASCII; what is shown or written anew is decoded properly.
    """
    try:
        return data.decode("ascii"), True
    except UnicodeDecodeError:
        pass
    try:
        codecs.utf_8_decode(data, "strict", False)  # False: a block's end may cut off its last character
    except UnicodeDecodeError:
        return data.decode("latin-1"), False
    return data.decode("latin-1"), True


def display(path, standard):
    """Return a path for messages; "-" is the standard stream of that name."""
    return standard if path == "-" else printable(os.fsencode(path).decode("utf-8", "replace"))


def reason(error):
    """Return what the system says of an OSError, or another error's own words, without a path."""
    words = printable(getattr(error, "strerror", None) or str(error)) or type(error).__name__
    return words[:1].lower() + words[1:]


# ---- Transport: requests, answers, whether and when to try again; nothing is printed here ------------------

LONGEST_RETRY_AFTER = 60.0
MOST_OF_BODY, MOST_OF_ERROR = 1 << 20, 1 << 16
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
    """Return the seconds that a Retry-After header asks for (RFC 9110, 10.2.3), or None if it is nonsense.

    value: the header's text or None. now: seconds since the epoch.
    """
    value = (value or "").strip(" \t")
    if 0 < len(value) < 11 and not value.strip(DIGITS):
        return float(value)
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
    """Return getaddrinfo's addresses of a host; left() tells the seconds left, or raises. Raises OSError."""
    import socket

    host = host.encode("ascii")  # bytes: text would import the IDNA codec
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
    try:
        thread = start_thread(resolve_name)
        while thread.is_alive():
            thread.join(min(left(), PATIENCE))
    except RuntimeError:  # no memory or no permission for a thread
        resolve_name()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


class TimedSocket(io.RawIOBase):
    """A connected socket for http.client, whose every operation gets the time that is left of the attempt.

    A socket's own timeout starts anew with each byte, so a drip or an endless run of 1xx answers would
    outlive it. received: bytes so far. at_end: whether the other side has closed.
    """

    def __init__(self, sock, left):
        super().__init__()
        self.sock, self.left, self.received, self.at_end, self._unsent = sock, left, 0, False, []

    def readable(self):
        return True

    def readinto(self, buffer):
        self.sock.settimeout(self.left())
        count = self.sock.recv_into(buffer)
        self.received += count
        self.at_end = not count
        return count

    def sendall(self, data):
        """Keep data for send_off(): http.client gives headers and body apart; one packet is better."""
        self._unsent.append(data)

    def send_off(self):
        data, sent, self._unsent = b"".join(self._unsent), 0, []
        with memoryview(data) as view:
            while sent < len(view):
                self.sock.settimeout(self.left())
                sent += self.sock.send(view[sent:])

    def makefile(self, *_, **__):
        return io.BufferedReader(self)

    def close(self):
        """http.client closes after each answer; the connection is ended by hang_up()."""

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

    until: when the attempt has to end, by the watch's clock. requests, bytes_sent: what was sent so far.
    """

    handler_order = 500

    def __init__(self, watch):
        self._watch, self.until, self.requests, self.bytes_sent = watch, 0.0, 0, 0
        self._socket = self._context = self._response_class = None

    def add_parent(self, parent):
        """OpenerDirector asks this of a handler."""

    def http_open(self, request):
        """Send a urllib Request; return the HTTPResponse with its headers read. Raises OSError and others."""
        import socket

        fresh = self._socket is None or not self._socket.is_idle()
        if fresh:
            self._connect(request)
        try:
            return self._exchange(request)
        except OSError as error:
            # Closed by the server just when it was used again: nothing was wrong with the request.
            if fresh or self._socket.received or isinstance(error, socket.timeout):
                raise
        self._connect(request)
        return self._exchange(request)

    https_open = http_open

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
        self._watch.check()
        left = self.until - self._watch.now()
        if left <= 0:
            import socket

            raise socket.timeout("the attempt's time is up")
        return left

    def _connect(self, request):
        import socket

        self.close()
        tunnel = getattr(request, "_tunnel_host", None)
        host, port = split_host(request.host, "443" if request.type == "https" and not tunnel else "80")
        addresses, fault = look_up(host.strip("[]"), int(port), self._left), None
        for index, (family, kind, protocol, _, address) in enumerate(addresses):
            try:
                self._socket = TimedSocket(socket.socket(family, kind, protocol), self._left)
                self._socket.sock.settimeout(self._left() / (len(addresses) - index))
                self._socket.sock.connect(address)
                self._socket.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                break
            except OSError as error:
                fault = error
                self.close()
        if self._socket is None:
            if tunnel or request.has_proxy():
                raise OSError("{}, of the proxy {}:{}".format(reason(fault), host, port))
            raise fault
        if tunnel:
            self._ask_proxy(request, ":".join(split_host(tunnel, "443")))
        if request.type == "https":
            self._start_tls(split_host(tunnel or request.host, None)[0].strip("[]"))

    def _ask_proxy(self, request, target):
        from http.client import HTTPResponse

        lines = ["CONNECT {} HTTP/1.1".format(target), "Host: " + target]
        if request.has_header("Proxy-authorization"):
            lines.append("Proxy-Authorization: " + request.get_header("Proxy-authorization"))
        self._socket.sendall("\r\n".join(lines + ["", ""]).encode("latin-1"))
        self._socket.send_off()
        response = HTTPResponse(self._socket, method="CONNECT")
        response.begin()
        if not 200 <= response.status <= 299:
            message = "the proxy answered CONNECT with {}".format(status_words(response))
            if 500 <= response.status <= 599:
                raise OSError(message)
            raise RefusedError(message, status=response.status, kind="proxy", ends_run=True)

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
        except (ssl.SSLError, ssl.CertificateError) as error:  # 3.6: the latter is a ValueError
            if not isinstance(error, ssl.CertificateError) and error.reason != "CERTIFICATE_VERIFY_FAILED":
                raise
            why = "the certificate of {} does not verify: {}; SSL_CERT_FILE can name your own roots".format(
                host, printable(getattr(error, "verify_message", "") or str(error)))
            raise RefusedError(why, kind="certificate", ends_run=True)

    def _exchange(self, request):
        from http.client import HTTPConnection, HTTPException, RemoteDisconnected

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
            self._socket.send_off()
            self.bytes_sent += len(request.data or b"")
        except OSError:
            self.until = max(self.until, self._watch.now() + GRACE)
            try:  # an answer may have come before all was sent, such as 413
                return connection.getresponse()
            except (OSError, HTTPException):
                pass
            raise
        response = connection.getresponse()
        if self._socket.at_end:  # http.client takes the end of the connection for the end of the headers
            raise RemoteDisconnected("closed inside the headers")
        return response


def response_class():
    """Return an HTTPResponse that skips 1xx but 101 (RFC 9110, 15.2); http.client's own skips 100 alone."""
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
    """Return {scheme: proxy URL} as it is. Raises InvalidError, quoting no URL, if one cannot be used."""
    for scheme in ("http", "https"):
        kind, _, place = ("http://" + proxies.get(scheme, "none")).split("://", 1)[-1].rpartition("://")
        try:
            if kind not in ("", "http", "https"):
                raise ValueError(kind)
            parse_base_url("http://" + place.rpartition("@")[2].rstrip("/").encode("ascii").decode())
        except ValueError:
            why = "is not the URL of an http proxy (it is not shown: it may hold a password)"
            raise InvalidError(why, where=scheme + "_proxy", ends_run=True)
    return proxies


def proxy_secrets(proxies):
    """Return what an echo of the requests to these proxies must not show: passwords, plain and in base64."""
    from base64 import b64encode
    from urllib.parse import unquote

    users = [proxy.split("://")[-1].rpartition("@")[0] for proxy in proxies.values()]
    secrets = [b64encode(unquote(user).encode("utf-8")).decode("ascii") for user in users]
    return [secret for secret in secrets + [unquote(user.partition(":")[2]) for user in users] if secret]


def status_words(response):
    """Return the status of a response with its reason phrase, made printable."""
    return "HTTP {} {}".format(response.status, printable(response.reason or "")).rstrip()


def fault_words(error):
    """Return what an exception of an attempt means to a person."""
    import http.client
    import socket

    if isinstance(error, socket.timeout):
        return "no answer in time"
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was closed without an answer"
    if isinstance(error, socket.gaierror):
        return "the name cannot be resolved: {}".format(reason(error))
    if isinstance(error, http.client.LineTooLong) or "100 headers" in str(error):
        return "the answer's headers are too large"
    if isinstance(error, OSError):
        return reason(error)
    return "the answer is not HTTP"  # http.client's HTTPException or ValueError, which may quote anything


class Client:
    """Sends events. A client is for one thread at a time; close() ends its connection.

    api_key: the key, sent to base_url's origin alone. timeout: seconds of one attempt. retries: further tries
    after the first. backoff_initial, backoff_max: seconds between tries, before jitter (0 to 1). gzip:
    compress bodies. watch: the Watch that bounds its waits. random: a function like random.random. trace:
    takes lines on what happens.
    """

    def __init__(self, api_key, base_url=BASE_URL, timeout=15.0, retries=3, backoff_initial=0.1,
                 backoff_max=2.0, jitter=0.2, user_agent=USER_AGENT, gzip=False, health_path="/api/health",
                 watch=None, random=None, trace=None):
        try:
            name = "api_key"
            parse_header(api_key)
            name = "user_agent"
            parse_header(user_agent)
            name = "health_path"
            self._health_path = parse_path(health_path)
            name = "base_url"
            self.base_url = parse_base_url(base_url)
        except ValueError as error:
            raise InvalidError(str(error), where=name)
        self.watch, self.retries = watch or Watch(), 0
        self._key, self._timeout, self._tries, self._gzip = api_key, timeout, retries + 1, gzip
        self._secrets = [api_key]
        self._backoff, self._user_agent = (backoff_initial, backoff_max, jitter), user_agent
        self._random, self._trace, self._requests = random, trace, {}
        self._connection = KeptConnection(self.watch)

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
        """Deliver a list of events as one request. Raises PackTrackError's subclasses; then none counts."""
        now = utc_timestamp(time.time())
        records = [dump_json(complete_event(event, {}, now)) for event in events]
        self.send(json_array(records), idempotency_key)

    def health_check(self):
        """Ask the service's health, once. Raises PackTrackError's subclasses unless it is healthy."""
        try:
            response, body = self._attempt("GET", self._health_path, None, {})
        except self._no_answer() as error:
            raise RetriesExhaustedError(self._fault(error))
        if not 200 <= response.status <= 299:
            raise self._refusal(response, body)

    def send(self, body, idempotency_key=None):
        """Deliver a body, the bytes of an event's or an array's JSON, with tries and waits.

        idempotency_key: a header's value; "auto" is the body's SHA-256. Raises RefusedError,
        RetriesExhaustedError.
        """
        headers = {"Content-Type": "application/json"}
        if idempotency_key:
            headers["Idempotency-Key"] = sha256(body) if idempotency_key == "auto" else idempotency_key
        if self._gzip:
            import zlib

            headers["Content-Encoding"] = "gzip"
            packer = zlib.compressobj(6, zlib.DEFLATED, 31)  # 31: as gzip, whose date zlib leaves at zero
            body = packer.compress(body) + packer.flush()
        number = 0
        while True:
            number += 1
            status = at_least = None
            try:
                response, words = self._attempt("POST", "/api/ingest", body, headers)
            except self._no_answer() as error:
                fault = self._fault(error)
            else:
                status = response.status
                if 200 <= status <= 299 and self._trace is None:
                    return
                fault = self._answer_words(response, words)
                at_least = parse_retry_after(response.getheader("Retry-After"), time.time())
            if self._trace is not None:
                self._trace("try {} of {}: {}".format(number, self._tries, fault))
            if status is not None and 200 <= status <= 299:
                return
            if status is not None and not is_retryable(status):
                raise self._refusal(response, words)
            self._wait(number, fault, status, at_least)

    def _wait(self, number, fault, status, at_least):
        """Wait before another try, or raise RetriesExhaustedError where there is none."""
        if number >= self._tries:
            tries = "1 try" if number == 1 else "{} tries".format(number)
            raise RetriesExhaustedError("{} ({})".format(fault, tries), status=status)
        if self._random is None:
            from random import random

            self._random = random
        delay, left = backoff_delay(number, *self._backoff, random=self._random), self.watch.left()
        if at_least is not None:
            fault += "; it asks to wait {:.0f} s".format(at_least)
            if at_least > LONGEST_RETRY_AFTER:
                raise RetriesExhaustedError("{}, more than {:.0f} s".format(fault, LONGEST_RETRY_AFTER),
                                            status=status)
            delay = max(delay, at_least)
        if left is not None and delay >= left:
            raise RetriesExhaustedError(fault + "; the run's deadline comes first", status=status)
        if self._trace is not None:
            self._trace("waiting {:.3f} s".format(delay))
        self.watch.sleep(delay)
        self.retries += 1

    def _attempt(self, method, path, body, headers):
        """Return the response to one request and an error's body. Raises RefusedError and _no_answer()'s."""
        self._connection.until = self.watch.now() + self.watch.left(self._timeout)
        headers = dict(headers, **{"X-PackTrack-Key": self._key, "User-Agent": self._user_agent})
        try:
            with self.watch:
                response = self._open(method, path, body, headers)
        except BaseException as error:
            self._connection.close()
            if isinstance(error, RefusedError):  # it may quote a proxy
                error.args = (self._clean(error.args[0]),)
            raise
        ok, words = 200 <= response.status <= 299, b""
        try:
            with self.watch:
                words = response.read(MOST_OF_BODY if ok else MOST_OF_ERROR)
        except self._no_answer() as error:  # the status stands
            self._connection.close()
            if self._trace is not None:
                self._trace("the answer's body broke off: {}".format(self._fault(error)))
        except Interrupted:  # as it does here; whoever waits next is interrupted
            self._connection.close()
        if not (ok and response.isclosed() and not response.will_close):  # not read to its end, or not kept
            self._connection.close()
        return response, b"" if ok else words

    def _open(self, method, path, body, headers):
        """Return the response to a request; from the second on, what urllib knows of proxies is known."""
        request = self._requests.get(path)
        if request is not None:
            request.data, request.headers = body, dict(request.headers, **headers)
            return self._connection.http_open(request)
        from urllib.request import OpenerDirector, ProxyHandler, Request, getproxies

        opener, proxies = OpenerDirector(), check_proxies(getproxies())
        self._secrets += proxy_secrets(proxies)
        opener.add_handler(self._connection)
        opener.add_handler(ProxyHandler(proxies))
        request = self._requests[path] = Request(self.base_url + path, body, headers, method=method)
        return opener.open(request)

    @staticmethod
    def _no_answer():
        """Return the exceptions that mean: no answer. ValueError: http.client's, of a bad chunk or status."""
        from http.client import HTTPException

        return OSError, HTTPException, ValueError

    def _fault(self, error):
        return self._clean("{} ({})".format(fault_words(error), self.base_url.split("/")[2]))

    def _clean(self, text):
        """Return the server's words on one line of at most 200 characters, secrets cut out before that."""
        text = redact(text, self._secrets)
        for length in range(min(len(self._key), len(text)), 3, -1):  # where the reading ended amid the key
            if text.endswith(self._key[:length]):
                text = text[:-length]
                break
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return printable(redact(text, self._secrets))

    def _answer_words(self, response, body):
        status, words = self._clean(status_words(response)), self._clean(body.decode("utf-8", "replace"))
        return '{}: "{}"'.format(status, words) if words else status

    def _refusal(self, response, body):
        words, location = self._answer_words(response, body), response.getheader("Location")
        if 300 <= response.status <= 399:
            words = self._clean(status_words(response)) + " is not followed"
            words += "; it points to " + self._clean(location) if location else ""
        return RefusedError(words, status=response.status, ends_run=response.status in ENDS_RUN)

    def abort(self):
        """End what waits, with Interrupted; may be called from another thread."""
        self.watch.stop()
        self._connection.abort()

    def close(self):
        """End the connection."""
        self._connection.close()


def sha256(body):
    """Return the SHA-256 of bytes, in hexadecimal."""
    import hashlib

    return hashlib.sha256(body).hexdigest()


def json_array(records):
    """Return the body of a batch: the records' own bytes as a JSON array."""
    return b"[" + b",".join(records) + b"]"


# ---- Delivery: batches, their accounting, and the two ways through, both ending in one Delivery ------------

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

    def __str__(self):
        words = describe_range(self.numbers[0], self.numbers[-1])
        return ("records " if "-" in words else "record ") + words


def describe_range(first, last):
    """Return the words for the numbers from first to last."""
    return str(first) if first == last else "{}-{}".format(first, last)


class Batcher:
    """Cuts a stream of records into batches of at most size records and limit bytes of body."""

    def __init__(self, size, limit):
        self._size, self._limit, self._records, self._start = size, limit, [], 0
        self._next, self._gaps, self.bytes = 1, [], 0

    def __len__(self):
        return len(self._records) - self._start

    def add(self, records):
        self._records += records
        self.bytes += sum(map(len, records))

    def skip(self):
        self._gaps.append(self._next + len(self) + len(self._gaps))

    def take(self, all_of_it):
        """Return the next full Batch, with all_of_it also one that is not full; None where there is none."""
        records = self._records[self._start:self._start + self._size]
        size = sum(map(len, records))
        if size + len(records) + 1 > self._limit:
            size, count = len(records[0]), 1
            while count < len(records) and size + len(records[count]) + count + 2 <= self._limit:
                size, count = size + len(records[count]), count + 1
            records = records[:count]
        elif not records or len(records) < self._size and not all_of_it:
            return None
        self.bytes -= size
        self._start += len(records)
        if self._start * 2 >= len(self._records):
            del self._records[:self._start]
            self._start = 0
        numbers = range(self._next, self._next + len(records))
        if self._gaps:
            span = range(self._next, numbers[-1] + len(self._gaps) + 1)
            numbers = sorted(set(span).difference(self._gaps))[:len(records)]
            self._gaps = [gap for gap in self._gaps if gap > numbers[-1]]
        self._next = numbers[-1] + 1
        return Batch(records, numbers)


class Appender:
    """Appends to a file, whole, also where several processes do so; the file is made when it is needed.

    path: "-" is standard output. mode: of a new file. Raises InputError where the file cannot be written.
    """

    def __init__(self, path, mode):
        self._path, self._mode, self._descriptor = path, mode, None
        self.name, parent = display(path, "standard output"), os.path.dirname(path) or "."
        exists = path == "-" or os.path.exists(path)
        for holds, why in (
                (path != "-" or sys.stdout is not None, "it is closed"),
                (not os.path.isdir(path), "it is a directory"),
                (exists or os.path.isdir(parent), "its directory does not exist"),
                (exists or os.access(parent, os.W_OK | os.X_OK), "its directory is not writable"),
                (path == "-" or not exists or os.access(path, os.W_OK), "it is not writable")):
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
            size = os.fstat(self._descriptor).st_size
            try:
                while data:
                    data = data[os.write(self._descriptor, data):]
            except OSError:
                if locked:
                    os.ftruncate(self._descriptor, size)
                raise
            finally:
                if locked:
                    lock_file(self._descriptor, undo=True)
        except (OSError, ValueError) as error:
            raise InputError("cannot be written: " + reason(error), where=self.name, ends_run=True)

    def close(self):
        if self._descriptor not in (None, 1):
            os.close(self._descriptor)
            self._descriptor = None


def lock_file(descriptor, undo=False):
    """Lock a regular file against our other processes; return whether it is locked. Waits at most 10 s."""
    import stat

    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return False
    try:
        import fcntl
    except ImportError:  # Windows, where a lock is on bytes from the current position on
        import msvcrt

        fcntl = None
    end = time.monotonic() + LONGEST_LOCK
    while True:
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_UN if undo else fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                os.lseek(descriptor, 0, os.SEEK_SET)
                msvcrt.locking(descriptor, msvcrt.LK_UNLCK if undo else msvcrt.LK_NBLCK, 1)
            return True
        except (BlockingIOError, PermissionError):  # the latter is what Windows says of a lock that is taken
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        except OSError:  # a file system without locks
            return False


def json_lines(records):
    """Return records as NDJSON; line breaks within one, which are between its tokens, become blanks."""
    return b"".join(
        (record.replace(b"\r", b" ").replace(b"\n", b" ") if b"\n" in record else record) + b"\n"
        for record in records)


class HttpSink:
    """Where batches go: to the service.

    single: the body is one object. total: how many records the run has in all; None where it streams. probe:
    whether to ask the service's health before the first batch.
    """

    def __init__(self, client, idempotency_key, trace, probe):
        self.client, self._key, self._trace, self._probe = client, idempotency_key, trace, probe
        self.single, self.total = False, None

    def put(self, batch):
        """Deliver a Batch. Raises PackTrackError."""
        if self._probe:
            self._probe, words = False, "the service is healthy"
            try:
                self.client.health_check()
            except PackTrackError as error:
                words = "the health check failed: {}".format(error)
            if self._trace is not None:
                self._trace(words)
        body = batch.records[0] if self.single else json_array(batch.records)
        key = self._key
        if key and key != "auto" and len(batch.records) != self.total:
            key = "{}-{}-{}-{}".format(key, batch.numbers[0], batch.numbers[-1], sha256(body)[:8])
        if self._trace is not None:
            self._trace("{}: {} bytes to {}".format(batch, len(body), self.client.base_url))
        self.client.send(body, key)

    def abort(self):
        self.client.abort()

    def close(self):
        self.client.close()


class FileSink:
    """Where batches go with --output: to a file."""

    single, total = False, None

    def __init__(self, appender):
        self._appender = appender

    def put(self, batch):
        """Append a Batch. Raises InputError."""
        self._appender.append(json_lines(batch.records))

    def abort(self):
        """Nothing here waits for long."""

    def close(self):
        self._appender.close()


class Delivery:
    """Hands batches to a sink and accounts for each record: read = delivered + undelivered + invalid.

    keep_going: whether a batch that fails leaves the others be. undelivered: an Appender, or None. warn,
    tick: are told of each failure that does not end the run, and of each step. errors: {exit code: the first
    error}. ended: the error that ended the run, or None. ranges: the numbers of what was not delivered.
    unkept: how many of those the Appender could not take.
    """

    def __init__(self, sink, keep_going=False, undelivered=None, warn=None, tick=None):
        self.sink, self.keep_going, self.undelivered_file = sink, keep_going, undelivered
        self._warn, self.tick = warn or (lambda words: None), tick or (lambda: None)
        self.read = self.delivered = self.undelivered = self.invalid = self.unkept = 0
        self.errors, self.ended, self.ranges, self.unkept_why = {}, None, [], ""

    @property
    def error(self):
        """The error whose exit code stands, or None."""
        return next((self.errors[code] for code in PRECEDENCE if code in self.errors), None)

    def send(self, batch):
        """Deliver a Batch, in halves if the server finds it too large, and account for it. Raises nothing."""
        parts = [batch]
        while parts:
            part = parts.pop(0)
            error = self.ended or self._put(part)
            if error is None:
                self.delivered += len(part.records)
            elif error.status == 413 and len(part.records) > 1 and error is not self.ended:
                half = len(part.records) // 2
                parts[:0] = [Batch(part.records[cut], part.numbers[cut])
                             for cut in (slice(0, half), slice(half, None))]
            else:
                if error is not self.ended:
                    error.where = error.where or (str(part) if self.read > 1 else None)
                    self.note(error, not self.keep_going or error.ends_run)
                self.undelivered += len(part.records)
                for first, last in ([(part.numbers[0], part.numbers[-1])] if isinstance(part.numbers, range)
                                    else zip(part.numbers, part.numbers)):
                    self._add_range(first, last)
                self.keep(json_lines(part.records), len(part.records))
            self.tick()

    def _put(self, part):
        try:
            self.sink.put(part)
        except PackTrackError as error:
            return error
        except Interrupted:
            self.stop()
            return self.ended
        except Exception as error:  # a fault of this program's must not lose count of the records
            return internal_error(error)

    def stop(self):
        """End the run without an error: a signal came, or the rest is to be abandoned."""
        self.ended = self.ended or PackTrackError("stopped", kind="interrupted")

    def note(self, error, ends=False):
        """Note an error; ends: whether nothing more is to be sent."""
        if self.keep_going or not self.ended:
            self.errors.setdefault(error.exit_code, error)
        if ends:
            self.ended = self.ended or error
        elif self.keep_going:
            self._warn(str(error))

    def refuse(self, error, ends=False):
        self.invalid += 1
        self.note(error, ends)

    def keep(self, data, count=0):
        if self.undelivered_file is not None:
            try:
                self.undelivered_file.append(data)
            except InputError as error:
                self.unkept, self.unkept_why = self.unkept + count, str(error)
                self.errors.setdefault(error.exit_code, error)

    def lose_rest(self):
        """Count as undelivered what was read and is otherwise not accounted for."""
        first = self.delivered + self.undelivered + 1
        rest = self.read - self.invalid - first + 1
        if rest > 0:
            self.undelivered += rest
            self._add_range(first, first + rest - 1)

    def _add_range(self, first, last):
        if self.ranges and self.ranges[-1][1] == first - 1:
            self.ranges[-1][1] = last
        elif len(self.ranges) <= MOST_RANGES:
            self.ranges.append([first, last])

    def close(self):
        for place in (self.sink, self.undelivered_file):
            if place is not None:
                place.close()


class AsyncClient:
    """Queues events and delivers them from a thread of its own, in batches.

    client: a Client, from then on this thread's. flush_interval: the seconds after which a batch goes out
    that is not full. queue_capacity: the most events that wait. deliver: takes a Batch; by default it is
    sent, and the first error is raised by the next flush() or close().
    """

    def __init__(self, client, batch_size=100, flush_interval=1.0, queue_capacity=10000,
                 max_batch_bytes=1000000, deliver=None):
        import threading

        self._client, self._interval, self._capacity = client, flush_interval, queue_capacity
        self._deliver, self._error, self._oldest = deliver or self._send, None, None
        self._batcher = Batcher(min(batch_size, queue_capacity), max_batch_bytes)
        self._changed = threading.Condition()
        self._busy, self._flushing, self._closing = False, 0, False
        self._thread = start_thread(self._work)

    def enqueue(self, event, block=False, timeout=None):
        """Queue an event (a dict; a missing timestamp is now).

        A full queue raises RetriesExhaustedError of the kind "queue_full", with block only after timeout
        seconds (None: never). Raises InvalidError for an event that is not valid.
        """
        record = dump_json(complete_event(event, {}, utc_timestamp(time.time())))
        end = None if timeout is None else time.monotonic() + timeout
        while not self.offer([record]):
            left = None if end is None else end - time.monotonic()
            if not block or left is not None and left <= 0:
                raise RetriesExhaustedError("the queue is full", kind="queue_full")
            self.wait_for_room(left)

    def offer(self, records, skipped=False, force=False):
        """Queue as many of the records (bytes of complete events) as there is room for; return how many.

        skipped: a record that is not to be sent follows, and counts once all the others are queued. force:
        queue all.
        """
        with self._changed:
            if self._closing:
                raise PackTrackError("this AsyncClient is closed", kind="closed")
            room = self._capacity - len(self._batcher) if self._batcher.bytes < QUEUE_BYTES else 0
            taken = records if force else records[:room]
            if taken:
                self._batcher.add(taken)
                self._oldest = self._oldest or time.monotonic()
                self._changed.notify_all()
            if skipped and len(taken) == len(records):
                self._batcher.skip()
            return len(taken)

    def wait_for_room(self, seconds=None, share=0.0):
        """Wait until more than that share of the queue is empty, or for some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._batcher) < self._capacity * (1 - share) and
                                   self._batcher.bytes < QUEUE_BYTES * (1 - share), seconds)

    def flush(self, timeout=None):
        """Deliver all that is queued; return whether timeout seconds sufficed. Raises the first error."""
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not (self._batcher or self._busy), timeout)
            self._flushing -= 1
            error, self._error = self._error, None
        if error is not None:
            raise error
        return done

    def close(self, timeout=None):
        """Deliver all that is queued and end the thread; return whether timeout seconds sufficed for that."""
        end = None if timeout is None else time.monotonic() + timeout
        try:
            return self.flush(timeout)
        finally:
            self.finish()
            self.join(None if end is None else max(0.0, end - time.monotonic()))

    def finish(self):
        """Take no more; the thread delivers what is queued and ends."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

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
            self._error = self._error or PackTrackError("aborted", where=str(batch), kind="interrupted")
        except Exception as error:  # a fault of this program's must not end the thread
            self._error = self._error or internal_error(error)

    def _work(self):
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                batch = self._take()
                while batch is None and not self._closing:
                    due = self._oldest and self._oldest + self._interval - time.monotonic()
                    self._changed.wait(due and max(0.0, due))
                    batch = self._take()
                if batch is None:
                    return
                self._busy = True
            self._deliver(batch)

    def _take(self):
        late = self._oldest is not None and time.monotonic() - self._oldest >= self._interval
        full = self._batcher.bytes >= QUEUE_BYTES
        batch = self._batcher.take(self._flushing or self._closing or late or full)
        if batch is not None:
            self._oldest = time.monotonic() if self._batcher else None
        return batch


def deliver_kept(scanner, replay, delivery, batcher, watch):
    """Validate all that a file or pipe holds, then deliver it: one refused record, and nothing is sent."""
    # What came through a pipe is nobody else's: --undelivered has it read to its end and kept.
    keeps = delivery.undelivered_file is not None
    keep_all, blocks = keeps and not replay.source.is_file, []
    try:
        for block in scanner.blocks(replay.read):
            delivery.tick()
            errors = [block.errors[index] for index in sorted(block.errors)]
            if errors and not (delivery.keep_going or keep_all):
                delivery.read += min(block.errors) + 1
                delivery.refuse(errors[0], ends=True)
                break
            delivery.read += len(block.records)
            for error in errors:
                delivery.refuse(error, ends=not delivery.keep_going)
            block.note()
            blocks.append(block)
            if block.broken and keep_all:
                while replay.read():
                    pass
            if watch.signals and not keeps:
                break
    except PackTrackError as error:
        delivery.note(error, ends=not delivery.keep_going or error.ends_run)
    except Interrupted:
        delivery.stop()
    if delivery.sink is None or delivery.ended and not keep_all:
        return
    delivery.sink.single, delivery.sink.total = scanner.single, delivery.read - delivery.invalid
    for block in blocks:
        if delivery.ended and not keeps:
            return
        try:
            deliver_block(block, replay, scanner, delivery, batcher, watch)
        except InputError as error:
            delivery.note(error, ends=True)
            if keeps:
                delivery.unkept, delivery.unkept_why = delivery.unkept + block.count, str(error)
    send_batches(batcher, True, delivery, watch)


def deliver_block(block, replay, scanner, delivery, batcher, watch):
    """Read a noted Block again, and deliver it. Raises InputError where it was changed."""
    if block.broken:
        start, part = block.start, None
        while part != b"":
            part = replay.again(start, BLOCK)
            delivery.keep(part or b"\n")
            start += len(part)
        return
    records, errors = block.read_again(replay, scanner)
    position = 0
    for index in sorted(errors):
        batcher.add(records[position:index])
        batcher.skip()
        send_batches(batcher, bool(delivery.ended), delivery, watch)
        delivery.keep(json_lines(records[index:index + 1]), 1)
        position = index + 1
    batcher.add(records[position:])
    send_batches(batcher, False, delivery, watch)


def send_batches(batcher, all_of_it, delivery, watch):
    """Deliver what a Batcher has ready, unless a signal or the deadline says otherwise."""
    for batch in iter(lambda: batcher.take(all_of_it), None):
        if watch.signals:
            delivery.stop()
        try:
            watch.left()
        except RetriesExhaustedError as error:
            delivery.note(error, ends=True)
        delivery.send(batch)


def deliver_streamed(scanner, source, delivery, queue, watch, flush):
    """Deliver while reading: the queue's thread sends. flush: whether to send what is queued at the end."""
    try:
        for block in scanner.blocks(source.read):
            delivery.sink.single = scanner.single
            records, errors = block.records, sorted(block.errors)
            if errors and not delivery.keep_going:
                del records[errors[0] + 1:], errors[1:]
            delivery.read += len(records)
            position = 0
            for index in errors:
                queue_records(records[position:index], True, queue, watch)
                delivery.refuse(block.errors[index])
                delivery.keep(json_lines(records[index:index + 1]), 1)
                position = index + 1
            queue_records(records[position:], False, queue, watch)
            if delivery.ended or watch.signals or errors and not delivery.keep_going:
                break
    except PackTrackError as error:
        delivery.note(error)
    except Interrupted:
        pass
    if not (flush or delivery.errors or watch.signals):
        delivery.stop()
    queue.finish()
    while not queue.join(PATIENCE):
        if watch.count_signals() > 1:
            delivery.stop()
            delivery.sink.abort()


def queue_records(records, skipped, queue, watch):
    """Queue records, waiting while the queue is full; a second signal ends the waiting."""
    while True:
        records = records[queue.offer(records, skipped, force=watch.count_signals() > 1):]
        if not records:
            return
        queue.wait_for_room(PATIENCE, share=0.5)


# ---- The command runner: a command, then an event on how it ended; else as if we were not there ------------

COMMAND_DELIVERY = 30.0
KILL_AFTER = 5.0
TIMED_OUT, NOT_EXECUTABLE, NOT_FOUND = 124, 126, 127


class Ending:
    """How a command (a list) ended. exit_code: what ours is then. fault: why it did not start, or None."""

    def __init__(self, command):
        self.name = display(os.path.basename(command[0]) or command[0], "-")
        self.started_at, self._started = utc_timestamp(time.time()), time.monotonic()
        self.exit_code, self.timed_out, self.signal, self.fault, self._seconds = None, False, None, None, 0.0

    def seconds_to(self, timeout):
        """Return the seconds until the command has run for timeout seconds, or None."""
        return None if timeout is None else max(0.0, self._started + timeout - time.monotonic())

    def not_started(self, error):
        self.exit_code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        self.fault = "could not be run: " + reason(error)

    def ended(self, returncode):
        """Note how the command ended; returncode is negative for a signal."""
        self._seconds = time.monotonic() - self._started
        if returncode < 0:
            import signal

            known = {number.value: number.name for number in signal.Signals}
            self.signal = known.get(-returncode, "signal {}".format(-returncode))
        self.exit_code = TIMED_OUT if self.timed_out else returncode if returncode >= 0 else 128 - returncode

    def event(self):
        """Return the event that tells of it, without what the defaults have to give."""
        host = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")
        status = "timeout" if self.timed_out else "failed" if self.exit_code else "ok"
        how = self.fault or ("timed out" if self.timed_out else "was ended by " + self.signal if self.signal
                             else "exited with {}".format(self.exit_code))
        metadata = {"command": self.name, "duration_ms": int(self._seconds * 1000),
                    "started_at": self.started_at, "host": host}
        metadata.update({"signal": self.signal} if self.signal else {"exit_code": self.exit_code})
        return {"severity": "info" if status == "ok" else "error", "status": status, "metadata": metadata,
                "message": "{} {} after {:.1f}s".format(self.name, how, self._seconds)}


def run_command(command, timeout):
    """Run a command (a list) with our own streams and descriptors; return its Ending.

    timeout: the seconds after which it is sent TERM, and KILL 5 s later; or None. INT, TERM, HUP and QUIT
    that were sent to us are passed on.
    """
    import signal

    ending = Ending(command)
    if os.name == "nt":
        return run_on_windows(command, timeout, ending)
    passed_on = {number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
                 if signal.getsignal(number) != signal.SIG_IGN}  # what nohup, say, has us ignore stays so
    numbers = passed_on | {signal.SIGCHLD, signal.SIGALRM}
    on_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Blocked before the command starts and taken one by one: none is lost in between, none interrupts us.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def as_it_was():
        for number in passed_on:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        process = start_process(command, as_it_was)
        while process.poll() is None:
            number, from_terminal = next_signal(numbers, ending.seconds_to(timeout))
            if number is None:
                process.send_signal(signal.SIGKILL if ending.timed_out else signal.SIGTERM)
                process.send_signal(signal.SIGCONT)  # a stopped process would not hear of TERM
                timeout, ending.timed_out = None if ending.timed_out else timeout + KILL_AFTER, True
            elif number in passed_on and not (from_terminal and shares_terminal(process.pid, number)):
                process.send_signal(number)
        ending.ended(process.returncode)
    except (OSError, ValueError) as error:
        ending.not_started(error)
    finally:
        for number in passed_on:  # what came for the command, or comes late, is not to end the delivery
            signal.signal(number, lambda *_: None)
        while next_signal(numbers, 0)[0] is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ending


def shares_terminal(pid, number):
    """Tell whether a signal that the terminal sent to us reached the process pid too."""
    import signal

    # A terminal that goes away tells the session's leader alone; else it tells the whole foreground group.
    to_leader = number == signal.SIGHUP and os.getsid(0) == os.getpid()
    return os.getpgid(pid) == os.getpgrp() and not to_leader


def start_process(command, prepare):
    """Start a command; like execvp(3), give a script that has no #! line to sh."""
    import errno
    import subprocess

    try:
        return subprocess.Popen(command, close_fds=False, preexec_fn=prepare)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
    from shutil import which

    return subprocess.Popen(["/bin/sh", which(command[0])] + command[1:], close_fds=False, preexec_fn=prepare)


def next_signal(numbers, seconds):
    """Return the next of the blocked signals, and whether a terminal sent it to all; or (None, False)."""
    import signal

    if hasattr(signal, "sigtimedwait"):
        info = signal.sigwaitinfo(numbers) if seconds is None else signal.sigtimedwait(numbers, seconds)
        # SI_USER and its like are not positive.
        return (None, False) if info is None else (info.si_signo, info.si_code > 0)
    # macOS tells no sender and takes no time: an alarm ends the wait, the terminal's group tells the sender.
    if seconds is not None:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    number = signal.sigwait(numbers)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if number == signal.SIGALRM:
        return None, False
    try:
        with open("/dev/tty") as terminal:
            return number, number != signal.SIGTERM and os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return number, False


def run_on_windows(command, timeout, ending):
    """run_command for Windows, where Ctrl-C reaches every process of the console and TERM does not exist."""
    import signal
    import subprocess

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
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


# ---- Reporting: the only writer to the standard streams ----------------------------------------------------

MOST_WARNINGS = 20
SHORTEST_SECRET = 6


class Reporter:
    """Writes to the standard streams, without secrets; a stream that is closed or full changes no verdict.

    delivery: the Delivery that is reported of, or None.
    """

    def __init__(self, argv, environ):
        self.delivery, self.verbose, self._secrets, self._warnings = None, False, [], 0
        self._progress = self._terminal = self._line_open = False
        self._started = self._shown = time.monotonic()
        self.hide(environ.get("PACKTRACK_API_KEY"))
        for word, value in zip(argv, argv[1:] + [""]):
            self.hide(value if word == "--api-key" else word[10:] if word.startswith("--api-key=") else "")

    def hide(self, secret):
        """Cut a secret out of all that is written from now on; but one so short that any text holds it."""
        if secret and len(secret) >= SHORTEST_SECRET:
            self._secrets.append(secret)

    def configure(self, settings):
        self.verbose = settings["verbose"]
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._progress = self._terminal if settings["progress"] is None else settings["progress"]

    def out(self, text):
        self._write(sys.stdout, text)

    def say(self, text):
        line, self._line_open = "\r\x1b[K" if self._line_open else "", False
        self._write(sys.stderr, "{}{}: {}\n".format(line, PROGRAM, text))

    def trace(self, text):
        if self.verbose:
            self.say(text)

    def warn(self, text):
        """Tell of a failure that does not end the run; of many, only the first."""
        self._warnings += 1
        if self._warnings <= MOST_WARNINGS:
            self.say(text if self._warnings < MOST_WARNINGS else "further failures are only counted")

    def progress(self):
        """Show how far the delivery is, from the second second on."""
        now, delivery = time.monotonic(), self.delivery
        seconds, pause = now - self._started, 0.2 if self._terminal else 1
        if not self._progress or seconds < 1 or now - self._shown < pause:
            return
        self._shown, words = now, "{} records read".format(delivery.read)
        if delivery.delivered:
            words += ", {} delivered, {:.0f}/s".format(delivery.delivered, delivery.delivered / seconds)
        if delivery.sink is not None and delivery.sink.total:
            done = delivery.delivered + delivery.undelivered
            words += ", {:.0f} %".format(100.0 * done / delivery.sink.total)
        line = "\r{0}\x1b[K" if self._terminal else "{1}: {0}\n"
        self._write(sys.stderr, line.format(words, PROGRAM))
        self._line_open = self._terminal

    def finish(self, error, signal):
        """Tell how the run ended; return the error and exit code. signal: a number or None."""
        if signal:
            error = PackTrackError("stopped by signal {}".format(signal), kind="interrupted")
        if error is not None:
            self.say("error: {}{}".format(error, accounting(self.delivery) if self.delivery else ""))
        elif self._line_open:
            self._write(sys.stderr, "\r\x1b[K")
        return error, 128 + signal if signal else 0 if error is None else error.exit_code

    def summarise(self, error, code):
        client = getattr(self.delivery and self.delivery.sink, "client", None)
        summary = {"ok": code == 0, "exit_code": code}
        for name in ("read", "delivered", "undelivered", "invalid"):
            summary[name] = getattr(self.delivery, name, 0)
        for name in ("requests", "retries", "bytes_sent"):
            summary[name] = getattr(client, name, 0)
        summary["seconds"] = round(time.monotonic() - self._started, 3)
        summary["error"] = None if error is None else {
            "kind": error.kind, "message": error.args[0], "status": error.status, "where": error.where}
        self.out(json.dumps(summary) + "\n")

    def _write(self, stream, text):
        data = redact(text, self._secrets).encode("utf-8", "backslashreplace")
        try:
            descriptor = stream.fileno()
            while data:
                data = data[os.write(descriptor, data):]
        except (OSError, ValueError, AttributeError):  # closed or full; None, if closed from the start
            pass


def accounting(delivery):
    """Return the end of the failure line: what was delivered and what was not."""
    if delivery.read < 2:
        return "; it could not be kept: " + delivery.unkept_why if delivery.unkept else ""
    refused = delivery.invalid and not (delivery.keep_going or delivery.delivered)
    words = "; {} of {} records delivered".format(delivery.delivered, delivery.read)
    if refused and not getattr(getattr(delivery.sink, "client", None), "requests", 0):
        words = "; nothing was sent of {} records read".format(delivery.read)
    elif delivery.undelivered:
        ranges = ", ".join(describe_range(*pair) for pair in delivery.ranges[:10])
        words += ", {} not: records {}".format(delivery.undelivered, ranges)
        words += " and more" if len(delivery.ranges) > 10 else ""
    if delivery.invalid:
        words += ", {} invalid".format(delivery.invalid)
    if delivery.unkept:
        words += "; {} could not be kept: {}".format(delivery.unkept, delivery.unkept_why)
    return words


def internal_error(error):
    """Return the PackTrackError for an exception that should not have been possible."""
    place = error.__traceback__
    while place.tb_next is not None:
        place = place.tb_next
    return PackTrackError("internal error: {} at line {}; please report it".format(
        type(error).__name__, place.tb_lineno), kind="internal", ends_run=True)


# ---- main: from settings to what does the work -------------------------------------------------------------


def open_appender(settings, name, mode, error_class):
    """Return the Appender of an option that names a file, or None; check it before anything is sent."""
    try:
        return Appender(settings[name], mode) if settings[name] else None
    except InputError as error:
        raise error_class(str(error), where=settings.sources[name])


def read_key(settings, watch, reporter):
    """Return the API key, from its option or from the first line of its file. Raises InvalidError."""
    key, name = settings["api-key"], settings.sources.get("api-key-file")
    if settings["api-key-file"]:
        text = b""
        try:
            source = Source(settings["api-key-file"], watch)
            for chunk in iter(source.read, b""):
                text += chunk
                if b"\n" in text or len(text) > BLOCK:
                    break
            source.close()
            key = parse_header(text.split(b"\n")[0].decode("utf-8").strip())
        except InputError as error:
            raise InvalidError(str(error), where=name)
        except ValueError:
            why = "the file's first line must be the key, in visible ASCII (it is not shown)"
            raise InvalidError(why, where=name)
        if source.is_file and os.name != "nt" and source.mode & 0o077:
            reporter.trace("{}: others may read the file; chmod 600 would keep it yours".format(name))
    if not key:
        raise InvalidError("no API key: set PACKTRACK_API_KEY, or use --api-key-file or --api-key")
    reporter.hide(key)
    return key


def make_client(settings, watch, reporter):
    """Return the Client that the settings describe."""
    return Client(
        read_key(settings, watch, reporter), settings["base-url"], settings["timeout"], settings["retries"],
        settings["backoff-initial"], settings["backoff-max"], settings["jitter"], settings["user-agent"],
        settings["gzip"], settings["health-path"], trace=reporter.trace if reporter.verbose else None,
        watch=ThreadWatch(watch.deadline) if settings["async"] else watch)


def make_delivery(settings, watch, reporter):
    """Return the Delivery that the settings describe, and have the reporter report of it."""
    undelivered = sink = None
    if not settings["dry-run"]:
        undelivered = open_appender(settings, "undelivered", 0o600, InvalidError)
        if settings["output"]:
            sink = FileSink(open_appender(settings, "output", 0o666, InputError))
        else:
            sink = HttpSink(make_client(settings, watch, reporter), settings["idempotency-key"],
                            reporter.trace if reporter.verbose else None, settings["health-enable"])
    reporter.delivery = Delivery(sink, settings["keep-going"], undelivered, reporter.warn, reporter.progress)
    return reporter.delivery


def event_from_flags(settings, event):
    """Return the record of an event that the event options complete. Raises InvalidError that names flags."""
    missing = [option.flag for option in OPTIONS if option.field in REQUIRED
               and not settings[option.name] and option.field.split(".")[0] not in event]
    if missing:
        flags = "the flag" if len(missing) == 1 else "the flags"
        raise InvalidError("missing {}: give {} or the variable".format(", ".join(missing), flags))
    return dump_json(complete_event(event, event_defaults(settings), utc_timestamp(time.time())))


def deliver_event(record, delivery):
    """Deliver one event, the bytes of its JSON."""
    delivery.read = 1
    if delivery.sink is not None:
        delivery.sink.single, delivery.sink.total = True, 1
        delivery.send(Batch([record], range(1, 2)))


def deliver_input(settings, watch, delivery):
    """Deliver what a file or standard input holds."""
    source = Source("-" if settings["stdin"] else settings["file"], watch)
    scanner = Scanner(source.name, settings["ndjson"], event_defaults(settings))
    size, limit = settings["batch-size"], settings["max-batch-bytes"]
    if settings["async"] and delivery.sink is not None:
        queue = AsyncClient(None, size, settings["flush-interval"], settings["queue-capacity"], limit,
                            deliver=delivery.send)
        deliver_streamed(scanner, source, delivery, queue, watch, not settings["no-flush"])
        source.close()
    else:
        replay = Replay(source, keep=delivery.sink is not None)
        deliver_kept(scanner, replay, delivery, Batcher(size, limit), watch)
        replay.close()


def run(settings, watch, reporter):
    """Do what the settings say; return the error whose exit code stands, or None. Raises PackTrackError."""
    if settings["health"]:
        return check_health(settings, watch, reporter)
    delivery = make_delivery(settings, watch, reporter)
    try:
        if settings["file"] or settings["stdin"]:
            deliver_input(settings, watch, delivery)
        else:
            deliver_event(event_from_flags(settings, {}), delivery)
    finally:
        delivery.lose_rest()
        delivery.close()
    return delivery.error


def check_health(settings, watch, reporter):
    """Ask the service's health. Raises InvalidError, whose exit code is 1, unless it is healthy."""
    client = make_client(settings, watch, reporter)
    try:
        client.health_check()
        reporter.trace("the service is healthy")
    except PackTrackError as error:
        why = "the service is not healthy: {}".format(error)
        raise InvalidError(why, status=error.status, kind="unhealthy")
    finally:
        client.close()


def guarded(watch, work, *arguments):
    """Return the error that work(*arguments) returns or raises, or None; INT and TERM go to the watch."""
    import gc
    import signal

    collecting = gc.isenabled()
    gc.disable()  # records make no cycles, and to look for some among millions takes a third of the time
    before = {number: signal.signal(number, watch.handle_signal) for number in (signal.SIGINT, signal.SIGTERM)
              if signal.getsignal(number) != signal.SIG_IGN}
    try:
        return work(*arguments)
    except PackTrackError as error:
        return error
    except Interrupted:
        return None
    except Exception as error:
        return internal_error(error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if collecting:
            gc.enable()


def report_command(settings, reporter):
    """Run the command of the settings and report how it ended; return the exit code, the command's own."""
    trouble, settings["async"] = settings.trouble, None
    if trouble is None:
        try:
            event_from_flags(settings, Ending(settings.command).event())
        except InvalidError as error:
            trouble = error
    if trouble is not None:
        reporter.say("error: {}; the command runs, and will not be reported".format(trouble))
    ending = run_command(settings.command, settings["command-timeout"])
    if ending.fault:
        reporter.say("error: {} {}".format(ending.name, ending.fault))
    if trouble is None:
        watch, event = Watch(settings["deadline"] or COMMAND_DELIVERY), ending.event()
        told = filter(settings.from_flag, ("status", "severity", "message"))
        event.update({name: settings[name] for name in told})

        def deliver_ending():
            delivery = make_delivery(settings, watch, reporter)
            deliver_event(event_from_flags(settings, event), delivery)
            delivery.close()
            return delivery.error

        trouble = guarded(watch, deliver_ending)
        if trouble is not None or watch.signals:
            why = trouble or "stopped by a signal"
            reporter.say("error: the command's end was not reported: {}".format(why))
    return trouble.exit_code if settings["strict"] and trouble and not ending.exit_code else ending.exit_code


def wants_json(argv, environ):
    """Tell whether a command line that was refused asked for --json."""
    if "--" in argv:
        return False
    asked = [word for word in argv if word in ("--json", "--no-json")]
    return asked[-1] == "--json" if asked else environ.get("PACKTRACK_JSON", "").lower() in TRUE


def main(argv=None):
    """Run the program with the arguments argv (by default the process's own) and return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    reporter, settings, watch = Reporter(argv, os.environ), None, Watch()
    try:
        settings = resolve(argv, os.environ)
        if settings["help"] or settings["version"] or settings["completion"]:
            reporter.out(help_text() if settings["help"] else completion(settings["completion"])
                         if settings["completion"] else "{} {}\n".format(PROGRAM, VERSION))
            return 0
        reporter.configure(settings)
        if settings.command is not None:
            return report_command(settings, reporter)
        if not argv and not any(settings[name] for name in ("message", "file", "stdin", "health")):
            reporter.say("nothing to send\n" + USAGE + "See packtrack-logger --help.")
            return 1
        watch = Watch(settings["deadline"])
        error = guarded(watch, run, settings, watch, reporter)
    except PackTrackError as refusal:
        error = refusal
    except KeyboardInterrupt:  # before there was anything to interrupt
        return 130
    error, code = reporter.finish(error, watch.signals[0] if watch.signals else None)
    if settings["json"] if settings is not None else wants_json(argv, os.environ):
        reporter.summarise(error, code)
    return code


if __name__ == "__main__":
    sys.exit(main())
