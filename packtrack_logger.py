#!/usr/bin/env python3
"""Send PackTrack events from a shell: from flags, a JSON file, a JSON array or NDJSON, with retries.

Exit codes:
  0  all events were delivered (with --dry-run and --output: validated and written)
  1  invalid arguments or events; without --async and --keep-going nothing was sent
  2  rejected by the server, or another permanent failure
  3  retries or deadline exhausted; may succeed later
  4  input could not be read or parsed, or output could not be written
  128+n  terminated by signal n, after the same accounting (130 INT, 143 TERM)

The command line is written on a class that a program may import: Client.
Everything here is the standard library of CPython 3.6 or later.
"""

import _thread
import codecs
import errno
import gc
import io
import os
import stat
import sys
import time

try:
    import argparse
    import json
    import re
    import select
    import signal

    missing = None
except ImportError as error:
    missing = error

VERSION = "1.0.0"
PROGRAM = "packtrack-logger"

# ---- A poor Python: what runs without json, even on 2.7; the archive's __main__.py holds a copy of this ----

MISSING_MODULE = ("this Python has no module {}: install python3 "
                  "(Debian: apt-get install python3; python3-minimal is not enough)")


def entry_state():
    """Return the environment and the mask of ignored signals as they were on entry, before CPython came.

    In the C locale CPython sets LC_CTYPE (PEP 538). PIPE and XFSZ it ignores: what they were is gone, but for
    the parent, whose mask we inherited, unless it is of those that ignore PIPE and spare their children.
    """
    environ, ignored = dict(getattr(os, "environb", os.environ)), 0
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = [entry for entry in file.read().split(b"\0") if entry.startswith(b"LC_CTYPE=")]
        value = entries[0][9:] if entries else None
    except (IOError, OSError):
        value = environ.get(b"LC_CTYPE")
        if not environ.get(b"LC_ALL") and environ.get(b"LANG", b"") in (b"", b"C", b"POSIX"):
            value = None if value in (b"C.UTF-8", b"C.utf8", b"UTF-8") else value
    if value is None:
        environ.pop(b"LC_CTYPE", None)
    else:
        environ[b"LC_CTYPE"] = value
    try:
        with open("/proc/%d/status" % os.getppid()) as file:
            parent = dict(line.split(":\t", 1) for line in file if ":\t" in line)
        name = parent["Name"]
        try:
            name = os.path.basename(os.readlink("/proc/%d/exe" % os.getppid()))
        except OSError:  # another user's
            pass
        if not name.startswith(("python", "pypy", "node", "sshd", "sudo", "tmux")):
            ignored = int(parent["SigIgn"], 16)
    except (IOError, OSError, KeyError, ValueError):
        pass
    return environ, ignored


def exec_command(command, environ, ignored):
    """Become the command (a list), found as execvp(3) finds it. Raises OSError or ValueError."""
    import errno

    try:
        import signal
    except ImportError:
        import _signal as signal
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN if ignored >> (number - 1) & 1 else signal.SIG_DFL)
    name, failure = command[0], OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    folders = [""] if "/" in name else os.environ.get("PATH", "/bin:/usr/bin").split(":") if name else []
    for path in [folder and folder + "/" + name or name for folder in folders]:
        try:
            os.execve(path, command, environ)
        except OSError as error:
            if error.errno == errno.ENOEXEC:  # a script without a #! line
                os.execve("/bin/sh", ["/bin/sh", path] + command[1:], environ)
            if error.errno == errno.EACCES:
                failure = error
            elif error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ETIMEDOUT):
                raise
    raise failure


def stand_aside(why):
    """Say why the program cannot run, and let a command after `--` run in its place."""
    command = sys.argv[sys.argv.index("--") + 1:] if "--" in sys.argv else []
    code, lines = 1, [why + ("; running the command without reporting" if command else "")]
    while lines:
        try:
            os.write(2, ("packtrack-logger: error: %s\n" % lines.pop()).encode("ascii", "replace"))
        except OSError:
            pass
        try:
            if command and os.name == "nt":
                import subprocess

                os._exit(subprocess.call(command))
            elif command:
                exec_command(command, *entry_state())
        except (OSError, ValueError) as error:
            code = 127 if getattr(error, "errno", 0) == 2 else 126
            lines, command = ["cannot run %s: %s" % (command[0], getattr(error, "strerror", error))], []
    os._exit(code)


if missing is not None:  # a program that imports this module gets the error
    if __name__ == "__main__":
        stand_aside(MISSING_MODULE.format(missing.name))
    raise missing


# ---- Errors: one class per exit code; a message is one line, without secrets -------------------------------


class PackTrackError(Exception):
    """What this module raises.

    exit_code: the exit code of the command line. kind: a word for programs. status: the HTTP status, or None.
    where: what it is about, such as "events.ndjson:151", "--timeout" or "PACKTRACK_TIMEOUT", or None.
    ends_run: whether the rest of a run would fail alike.
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
    """The server's final no, or another permanent failure."""

    exit_code, kind = 2, "refused"


class RetriesExhaustedError(PackTrackError):
    """The retries or the time are used up; a later run may succeed."""

    exit_code, kind = 3, "retries_exhausted"


class InputError(PackTrackError):
    """The input cannot be read or is not what it should be, or a file cannot be written."""

    exit_code, kind = 4, "input"


class Interrupted(BaseException):
    """The run is over, so a wait ended early. Not an Exception: nothing may swallow it."""


# ---- Limits: what ends a wait; nothing else in this module waits by itself ---------------------------------

TICK = 0.1
BURST = 0.2
LONGEST_SAVING = 30.0
LONGEST_START = 5.0


class Limits:
    """The deadline of the run and the signals that came: whatever waits asks here, every TICK seconds.

    main() makes one for a run and all its threads share it. The signal handler only notes the signal, so no
    accounting is ever cut in two; Delivery sets `over` when nothing more is to be sent.

    seconds: the deadline from now, or None. patience: the signals it takes to end the sending; the first
    always ends the reading. clock, pause: the monotonic clock and the way to sleep.
    """

    def __init__(self, seconds=None, patience=1, clock=time.monotonic, pause=time.sleep):
        self.clock, self._pause, self._patience = clock, pause, patience
        self.deadline = None if seconds is None else clock() + seconds
        self.signals, self.over, self._last = [], False, 0.0

    def handle_signal(self, number, frame=None):
        """Note a signal. Several at once count as one: timeout(1) signals its child, then the group."""
        now = self.clock()
        if not self.signals or now - self._last > BURST:
            self.signals.append(number)
            self._last = now

    def check(self, reading=False):
        """Raise Interrupted where the sending, or the reading, is to stop; past the deadline its error."""
        if len(self.signals) >= (1 if reading else self._patience) or reading and self.over:
            raise Interrupted()
        if self.deadline is not None and self.clock() >= self.deadline:
            raise RetriesExhaustedError("deadline exceeded", kind="deadline", ends_run=True)

    def left(self, seconds=TICK, reading=False):
        """Return how long to wait at a time: seconds, or less near the deadline. Raises as check()."""
        self.check(reading)
        return seconds if self.deadline is None else max(0.0, min(seconds, self.deadline - self.clock()))

    def sleep(self, seconds):
        """Sleep that long. Raises as check()."""
        until = self.clock() + seconds
        while self.clock() < until:
            self._pause(self.left(min(TICK, until - self.clock())))

    def saving(self, seconds):
        """Return the Limits for saving the undelivered: past the deadline, and until a second signal."""
        if self.deadline is not None:
            seconds = min(max(self.deadline - self.clock(), 0.5), seconds)
        limits = Limits(seconds, patience=2, clock=self.clock, pause=self._pause)
        limits.signals = self.signals
        return limits


def start_thread(work):
    """Run work() in a daemon thread; return a lock that is released when it has ended.

    Raises RuntimeError where there is no memory for a thread. threading.Thread.start() would wait for ever for
    one that dies of that before it runs.
    """
    begun, ended = _thread.allocate_lock(), _thread.allocate_lock()

    def run():
        begun.release()
        try:
            work()
        except MemoryError:  # what is left undone is accounted for at the end
            pass
        finally:
            ended.release()

    begun.acquire()
    ended.acquire()
    _thread.start_new_thread(run, ())
    if not begun.acquire(True, LONGEST_START):
        raise RuntimeError("the thread did not start")
    return ended


# ---- Options: one table, its value parsers, and resolve(argv, environ); no input is read here --------------

UNITS = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
LONGEST = 8784 * 3600.0
SEVERITIES = ("debug", "info", "warn", "error")
STATUSES = ("ok", "failed", "skipped", "timeout", "retrying", "unknown")
TRUE, FALSE = ("1", "true", "yes", "y", "on"), ("0", "false", "no", "n", "off")
DIGITS = "0123456789"
HOST = r"(?=.{1,254}\Z)(?:[0-9A-Za-z_-]{1,63}\.)*[0-9A-Za-z_-]{1,63}\.?|\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]+\]"
# RFC 3339, 5.6, with a capital T and Z. The calendar is in the pattern: datetime's parsers differ by version.
TIMESTAMP = (
    r"(?:(?!0000)[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)"
    r"T(?:[01][0-9]|2[0-3]):[0-5][0-9]:(?:[0-5][0-9]|60)(?:\.[0-9]+)?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])\Z"
)


class UsageError(InvalidError):
    """Raised by resolve(): `where`, a flag or variable, is the subject of the message."""

    def __str__(self):
        return "{} {}".format(self.where, self.args[0])


def matching(pattern, message, convert=str):
    """Return the parser of texts that match pattern; others, or where convert returns None, raise message."""

    def parse(text):
        text = text or ""  # Client may be given None as its key
        value = convert(text) if re.fullmatch(pattern, text, re.DOTALL) else None
        if value is None:
            raise ValueError(message.format(printable(text)))
        return value

    return parse


def integer(least, most):
    """Return the kind of an integer from least to most."""
    return matching("[0-9]{1,12}", 'must be an integer from {} to {} (got "{{}}")'.format(least, most),
                    lambda text: int(text) if least <= int(text) <= most else None), "N"


def one_of(metavar, *choices):
    """Return the kind of an enumeration."""

    def parse(text):
        if text not in choices:
            raise ValueError('must be one of {} (got "{}"){}'.format(
                ", ".join(choices), printable(text), nearest(text, choices, '; did you mean "{}"?')))
        return text

    parse.choices = choices
    return parse, metavar


def parse_duration(text, zero=True):
    """A duration as in Go ("1m30s", "1.5h", "500us") or a bare number of seconds; return seconds."""
    pairs = re.findall(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([a-z\u00b5\u03bc]*)", text)
    units = {"": 1.0} if len(pairs) == 1 and not pairs[0][1] else UNITS
    if not pairs or "".join(map("".join, pairs)) != text or any(unit not in units for _, unit in pairs):
        raise ValueError('invalid duration "{}": use e.g. 500ms, 15s, 1m30s'.format(printable(text)))
    seconds = sum(float(number) * units[unit] for number, unit in pairs)
    if seconds > LONGEST or not (seconds or zero):
        raise ValueError("must be at most 8784h" if seconds else "must be more than zero")
    return seconds


def parse_timestamp(text):
    """An RFC 3339 time with T and zone; empty is absent."""
    if text and not re.match(TIMESTAMP, text):
        zone = ": missing time zone, e.g. Z" if re.match(TIMESTAMP, text + "Z") else ""
        raise ValueError('must be an RFC 3339 time such as 2025-11-25T09:30:00Z (got "{}"){}'.format(
            printable(text), zone))
    return text


def parse_object(text):
    """A JSON object; empty is absent. An error names the column and quotes nothing."""
    value = parse_json(text) if text else {}
    if type(value) is not dict:
        raise ValueError("must be a JSON object")
    return value


def parse_base_url(text):
    """An http or https URL without user, query or fragment; return it in ASCII, without trailing slashes."""
    scheme, authority, path = re.fullmatch("(?:(https?)://)?([^/]*)(.*)", text, re.DOTALL).groups()
    host, port = split_host(authority, None)
    if "@" in text:
        raise ValueError("must not contain a user or password (value not shown)")
    if not scheme:
        raise ValueError("must start with http:// or https:// (e.g. https://pack.example.com)")
    if "?" in text or "#" in text:
        raise ValueError("must not contain a query or fragment")
    if port is not None and not (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise ValueError("port must be a number from 1 to 65535")
    path = parse_path(path).rstrip("/")
    if path.endswith("/api/ingest"):
        raise ValueError("must not include /api/ingest")
    try:
        name = host if max(host, default="") <= "~" else host.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    if not re.fullmatch(HOST, name):
        kind = "IPv6 address in brackets" if host.startswith("[") else "host name"
        raise ValueError(("invalid " if host else "missing ") + kind)
    return "{}://{}{}{}".format(scheme, name, ":" + port if port else "", path)


def split_host(text, default_port):
    """Return host and port, as text, of "host", "host:port" or "[address]:port"."""
    host, port = re.fullmatch(r"(\[.*\][^:]*|[^:]*)(?::(.*))?", text, re.DOTALL).groups()
    return host, default_port if port is None else port


# RFC 9110, 5.5: visible ASCII, spaces inside only. Not quoted: it may be a secret.
parse_header = matching("(?! )[ -~]+(?<! )", "contains characters not allowed in a header (value not shown)")
parse_path = matching('[!"$-~]*', "must be percent-encoded ASCII without a fragment",
                      lambda text: "/" + text.lstrip("/"))
# The kinds of options: the parser, and what --help calls the value.
BOOLEAN = (matching("(?ai)" + "|".join(TRUE + FALSE), "must be true or false",
                    lambda text: text.lower() in TRUE), None)
FRACTION = (matching(r"0+\.?|0*\.[0-9]+|0*1(?:\.0*)?", 'must be a number from 0 to 1 (got "{}")', float),
            "FRACTION")
PAIR = (matching("[^=]+=.*", "must be KEY=VALUE, e.g. region=eu", lambda text: dict([text.split("=", 1)])),
        "KEY=VALUE")
DURATION, LIMIT = (parse_duration, "DURATION"), (lambda text: parse_duration(text, zero=False), "DURATION")
TEXT, TIME, JSON = (str, "TEXT"), (parse_timestamp, "TIME"), (parse_object, "JSON")
HEADER, KEY, URL = (parse_header, "TEXT"), (parse_header, "KEY"), (parse_base_url, "URL")
URL_PATH, PATH, FILE = (parse_path, "PATH"), (str, "PATH"), (str, "FILE")


class Option:
    """One option: what the parser, the environment, --help, the README and the completions know of it."""

    def __init__(self, name, help, kind=BOOLEAN, default=None, short=None, field=None, secret=False):
        self.name, self.help, self.default, self.short = name, help, default, short
        self.field, self.secret, self.path = field, secret, kind in (PATH, FILE)
        self.parse, self.metavar = kind
        self.is_boolean, self.choices = kind is BOOLEAN, getattr(self.parse, "choices", ())
        self.flag, self.variable, self.opposite = "--" + name, None, None
        if name not in ("meta", "completion", "version", "help"):
            self.variable = "PACKTRACK_" + name.upper().replace("-", "_")
            if self.is_boolean:  # the flag that undoes it
                self.opposite = "--" + (name[3:] if name.startswith("no-") else "no-" + name)
        self.flags = [flag for flag in (self.flag, self.opposite, short) if flag]


BASE_URL = "https://pack.shimcounty.com"
USER_AGENT = "pack-track-sdk-python/{0} packtrack-logger/{0}".format(VERSION)
GROUPS = (("Core", (
    Option("api-key", "API key, required to send (visible in ps: prefer --api-key-file or PACKTRACK_API_KEY)",
           KEY, secret=True),
    Option("api-key-file", "read the API key from the first line of a file (- for standard input)", PATH),
    Option("base-url", "base URL of the PackTrack service, without /api/ingest", URL, BASE_URL),
    Option("health-path", "URL path used by --health", URL_PATH, "/api/health"),
    Option("timeout", "timeout of a single attempt, from DNS lookup to response", LIMIT, "15s"),
    Option("retries", "maximum number of retries after a failed attempt (0: none)", integer(0, 1000), "3"),
    Option("backoff-initial", "delay before the first retry; doubles on each retry", DURATION, "100ms"),
    Option("backoff-max", "upper bound of the retry delay, before jitter", DURATION, "2s"),
    Option("jitter", "randomize each delay by up to this fraction (0.2: +/- 20 %)", FRACTION, "0.2"),
    Option("user-agent", "User-Agent header", HEADER, USER_AGENT),
    Option("idempotency-key", 'Idempotency-Key header; "auto" derives it from the request body. With several '
           "batches, each gets its own suffix", KEY),
    Option("gzip", "gzip request bodies"),
)), ("Event fields (with --file or --stdin: defaults for fields a record lacks)", (
    Option("timestamp", "time of the event, RFC 3339 (default: now)", TIME, field="timestamp"),
    Option("source-system", "system that emits the event, e.g. shop (required)", TEXT, field="source.system"),
    Option("source-env", "environment, e.g. prod", TEXT, field="source.env"),
    Option("workflow-id", "ID of the workflow, e.g. nightly-backup (required)", TEXT, field="workflow.id"),
    Option("workflow-name", "display name of the workflow", TEXT, field="workflow.name"),
    Option("run-id", "ID of this run of the workflow", TEXT, field="workflow.run_id"),
    Option("step-id", "ID of the step within the run", TEXT, field="workflow.step_id"),
    Option("actor-type", "kind of actor, e.g. agent, user, host (required)", TEXT, field="actor.type"),
    Option("actor-id", "ID of the actor, e.g. the host name (required)", TEXT, field="actor.id"),
    Option("actor-display", "display name of the actor", TEXT, field="actor.display_name"),
    Option("severity", "debug, info, warn or error (required; set by the outcome with a COMMAND)",
           one_of("WORD", *SEVERITIES), field="severity"),
    Option("status", "ok, failed, skipped, timeout, retrying or unknown (required; set by the outcome with a "
           "COMMAND)", one_of("WORD", *STATUSES), field="status"),
    Option("message", "human-readable message (required; generated with a COMMAND)", TEXT, field="message"),
    Option("metadata", "more fields as a JSON object, e.g. '{\"region\": \"eu\"}'", JSON, field="metadata"),
    Option("meta", "one additional text field, e.g. region=eu (repeatable; overrides --metadata)", PAIR),
    Option("extra", 'second free-form JSON object, sent as "extra"', JSON, field="extra"),
)), ("Input sources", (
    Option("file", "read events from PATH: one JSON object or array (- for standard input)", PATH),
    Option("stdin", "read events from standard input (same as --file -)"),
    Option("ndjson", "input is newline-delimited JSON, one event per line"),
    Option("allow-empty", "exit 0 if the input contains no events (default: exit 4)"),
)), ("Delivery", (
    Option("batch-size", "maximum number of events per request", integer(1, 1000000), "100"),
    Option("max-batch-bytes", "maximum size of a request body in bytes", integer(1, 1 << 30), "1000000"),
    Option("connections", "send up to N batches at once (in order only if N is 1)", integer(1, 64), "1"),
    Option("deadline", "total time limit of the run; exit 3 when exceeded (default: none; with a COMMAND: of "
           "the delivery, 30s)", LIMIT),
    Option("keep-going", "continue after invalid events and failed batches"),
    Option("undelivered", "append events that could not be delivered to FILE, as NDJSON", FILE),
    Option("output", "write events to FILE as NDJSON instead of sending them (- for standard output)", FILE),
)), ("Diagnostics", (
    Option("verbose", "log attempts, retries and response statuses to stderr", short="-v"),
    Option("dry-run", "validate the input without sending it"),
    Option("health", "check that the service is reachable and healthy, then exit 0 or 1"),
    Option("health-enable", "check health before sending; the result is only logged with --verbose"),
    Option("json", "print a JSON summary of the run to stdout"),
    Option("progress", "show progress on stderr (default: only on a terminal)"),
    Option("completion", "print the completion script for bash, zsh or fish",
           one_of("SHELL", "bash", "zsh", "fish")),
    Option("version", "print the version", short="-V"),
    Option("help", "show all flags (-h: only the most used)", short="-h"),
)), ("Async", (
    Option("async", "stream: send while reading, without validating the whole input first"),
    Option("flush-interval", "send an incomplete batch after this time (with --async)", LIMIT, "1s"),
    Option("queue-capacity", "maximum number of events queued in memory (with --async)",
           integer(1, 10000000), "10000"),
    Option("no-flush", "drop events still queued when the input ends (with --async)"),
)), ("With a COMMAND", (
    Option("command-timeout", "terminate the command after this time (TERM, KILL 5s later); exit 124", LIMIT),
    Option("strict", "exit non-zero if the command succeeded but the event could not be delivered"),
)))
OPTIONS = tuple(option for _, options in GROUPS for option in options)
BY_NAME = {option.name: option for option in OPTIONS}
BY_FLAG = {flag: option for option in OPTIONS for flag in option.flags}
NOT_WITH_COMMAND = ("file", "stdin", "ndjson", "allow-empty", "json", "health")
STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")


class Settings(dict):
    """The value of each option by its name; defaults are parsed when they are asked for. Made by resolve().

    sources: {name: the flag or variable that gave it}. command: what stands after `--`, or None. trouble:
    the first error that keeps a command from being reported but not from running, or None.
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

    def refuse(self, name, error):
        """Raise the error of an option, or note it: a variable must not keep the command from running."""
        if self.command is None or self.from_flag(name):
            raise error
        self.trouble = self.trouble or error


def parse_command_line(argv):
    """Return {option name: [(flag, text), ...]}, the command after `--` or None, and a list of errors."""
    words, errors, command, bare, options, rest = [], [], None, None, set(), iter(argv)
    for word in rest:
        if word == "--":
            command = list(rest)
            if not command:
                errors.append(InvalidError("a command must follow", where="--"))
            break
        flag, equals, text = word.partition("=")
        option = BY_FLAG.get(flag)
        if option is None:
            errors.append(refuse_word(word, bare))
            continue
        bare = flag if option.is_boolean and not equals else None
        if not equals:
            text = "true" if bare else next(rest, None)
        if text is None:
            errors.append(UsageError("needs a value ({})".format(option.metavar), where=flag))
            break
        # The value repeats the flag: argparse does not keep it, refuses a dash first, and drops "--".
        words.append("{0}={0}={1}".format(flag, text))
        options.add(option)
    # The help is ours. A fixed width keeps argparse from importing shutil to measure the terminal.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage="",
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80))
    for option in options:  # of all of them argparse takes long to be told
        parser.add_argument(*option.flags, dest=option.name, action="append")
    given = vars(parser.parse_args(words))
    return {name: [text.split("=", 1) for text in given[name]] for name in given}, command, errors


def refuse_word(word, bare):
    """Return the error for a word that is no flag; bare: the boolean flag before it, or None."""
    # It may be, or hold, a secret: of a flag no more is shown than can be its name, of anything else nothing.
    if not word.startswith("-") or word == "-":
        if bare:
            return UsageError("takes no value (to read a file: --file PATH)", where=bare)
        if os.path.exists(word):
            return InvalidError("unexpected argument: to send a file use --file PATH (one per run)")
        return InvalidError("unexpected argument (hidden, it may be a secret): quote values that contain "
                            "spaces, read files with --file, put -- before a command")
    shown = re.match("--?[A-Za-z0-9-]{0,198}", word).group()[:None if word.startswith("--") else 2]
    if shown in BY_FLAG:
        return UsageError("and what follows must be separate words", where=shown)
    near = nearest(word.partition("=")[0], BY_FLAG)
    for option in OPTIONS:
        if option.secret and shown.startswith(option.flag):
            shown = option.flag + "..."
    return InvalidError("unknown flag {}{}; see --help".format(shown, near))


def read_option(option, source, text):
    """Return the value of an option from its text; source, the flag or variable, is named by errors."""
    if text == "" and (option.field is None or option.field in REQUIRED):  # else empty is absent
        raise UsageError("is empty (is the variable set?)", where=source)
    try:
        if not option.path:  # text is UTF-8, whatever the locale took it for
            text = os.fsencode(text).decode("utf-8")
        value = option.parse(text)
    except UnicodeError:
        raise InvalidError("must be UTF-8", where=source)
    except (ValueError, InputError) as error:
        raise InvalidError(str(error), where=source)
    return not value if source == option.opposite else value


def resolve(argv, environ):
    """Return the Settings of a command line (a list without the program's name) and an environment (a dict).

    A flag beats its variable, and that the default. Raises InvalidError.
    """
    given, command, errors = parse_command_line(argv)
    settings = Settings(command)
    for name in ("help", "version", "completion"):  # whoever asks for one gets it, whatever else is wrong
        for flag, text in given.get(name, ())[-1:]:
            value = read_option(BY_NAME[name], flag, text)
            if value:
                settings[name] = {"-h": "short", "--help": "long"}.get(flag, value)
                return settings
    if errors:
        raise errors[0]
    ignored = NOT_WITH_COMMAND + ("severity", "status") if command else ()
    for pair in (("api-key", "api-key-file"), ("file", "stdin")):  # either flag beats either variable
        if any(name in given and given[name][-1][0] == "--" + name for name in pair):
            ignored += pair
    found = {option.name: (option.variable, environ[option.variable]) for option in OPTIONS
             if option.name not in ignored and environ.get(option.variable or "")}
    found.update((name, texts[-1]) for name, texts in given.items())
    for name, (source, text) in found.items():
        settings.sources[name] = source
        try:
            settings[name] = read_option(BY_NAME[name], source, text)
        except InvalidError as error:
            settings.refuse(name, error)
    for flag, text in given.get("meta", ()):
        settings["metadata"] = dict(settings["metadata"] or {}, **read_option(BY_NAME["meta"], flag, text))
    settle(settings)
    return settings


def settle(settings):
    """Refuse options that contradict each other; drop variables that are about another kind of run."""
    command, sources, reads = settings.command, settings.sources, settings["file"] or settings["stdin"]
    reads_stdin = command or settings["stdin"] or settings["file"] in STANDARD_INPUT
    keyless = settings["dry-run"] or settings["output"] or settings["health"]
    if settings["api-key"]:
        settings["api-key-file"] = None
    alone = "cannot be combined with a command"
    rules = [
        (("file",), not settings["stdin"], "and {} cannot be used together".format(sources.get("stdin"))),
        (NOT_WITH_COMMAND + ("dry-run",), not command, alone),
        (("output",), not command or settings["output"] != "-", "- " + alone),
        (("severity", "status"), not command, alone + ", whose outcome sets it"),
        (("api-key-file",), keyless or not reads_stdin or settings["api-key-file"] not in STANDARD_INPUT,
         "cannot be standard input: the {} it".format("command reads" if command else "events come from")),
        (("ndjson", "allow-empty"), reads, "needs --file or --stdin"),
        (("no-flush",), settings["async"], "needs --async"),
        (("command-timeout", "strict"), command, "needs a command after --"),
    ]
    for names, holds, why in rules:
        for name in names:
            if settings[name] and not holds:
                # The variables of these are not ignored: an event might be sent that was not to be.
                if settings.from_flag(name) or name in ("file", "dry-run", "output", "api-key-file"):
                    settings.refuse(name, UsageError(why, where=sources[name]))
                del settings[name], sources[name]


# ---- Texts: what people read, derived from the table; nothing is printed here ------------------------------

SUMMARY = "Send PackTrack events from flags, JSON or NDJSON, or the outcome of a command."
USAGE = """Usage:
  packtrack-logger [FLAGS] --workflow-id ID ... --message TEXT
  packtrack-logger [FLAGS] --file PATH [--ndjson]     (--stdin: standard input)
  packtrack-logger [FLAGS] -- COMMAND [ARG...]
"""
SHORT_USAGE = USAGE + "See packtrack-logger --help.\n"
ESSENTIAL = ("api-key-file", "source-system", "workflow-id", "actor-type", "actor-id", "severity", "status",
             "message", "file", "ndjson", "undelivered", "dry-run", "verbose", "help")
SHORT_FOOTER = """
Flags can be set as variables: --api-key as PACKTRACK_API_KEY.
All flags, variables, exit codes and examples: packtrack-logger --help
"""
FOOTER = """
Precedence: flag, environment variable, default.
Boolean flags can be negated with --no-FLAG (--no-flush: with --flush).

Exit codes:"""
EXAMPLES = """
Examples:
  packtrack-logger --source-system shop --workflow-id wf-1 --actor-type agent \\
      --actor-id a-42 --severity info --status ok --message 'checkout completed'
  packtrack-logger --stdin --ndjson --undelivered left.ndjson < events.ndjson
  packtrack-logger --source-system cron --workflow-id backup --actor-type host \\
      --actor-id db1 -- /usr/local/bin/backup.sh --full

Recipes and details: the project's README.md
"""
ALIASES = {  # what other programs call these
    "ok": "success succeeded successful pass passed complete completed done finished",
    "failed": "error failure fail", "retrying": "retry", "unknown": "running pending started queued",
    "debug": "trace", "info": "notice", "warn": "warning", "error": "critical fatal panic alert emergency",
}


def printable(text):
    """Return text on one line, without control characters, of at most 200 characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


def nearest(word, known, hint=' (did you mean "{}"?)'):
    """Return a hint at the one of the known words that was probably meant, or nothing."""
    import difflib

    word = word.lower()
    found = [name for name in known if word == name or word in ALIASES.get(name, "").split()]
    found += difflib.get_close_matches(word, known, 1)
    return hint.format(found[0]) if found else ""


def exit_codes():
    """Return the pairs of exit code and meaning that the module's docstring lists."""
    return re.findall(r"^  (\S+)  (.+)$", __doc__ or "", re.MULTILINE)


def help_text(long=True):
    """Return --help, or -h if not long: at most 80 columns, and never a value of the environment."""
    import textwrap

    def entry(name, text, width=26):
        text = textwrap.fill(text, 80 - width, break_long_words=False, break_on_hyphens=False)
        text = textwrap.indent(text, " " * width)
        return name.ljust(width) + text[width:] if len(name) < width else name + "\n" + text

    def describe(option):
        flags = ", ".join(filter(None, (option.short, option.flag)))
        facts = ", ".join(filter(None, (option.variable, option.default and "default " + option.default)))
        return entry("  " + " ".join(filter(None, (flags, option.metavar))),
                     option.help + (" [{}]".format(facts) if long and facts else ""))

    lines = [SUMMARY, "", USAGE.rstrip()]
    for title, options in GROUPS if long else [("Most used flags", [BY_NAME[name] for name in ESSENTIAL])]:
        lines += ["", title + ":"] + [describe(option) for option in options]
    if not long:
        return "\n".join(lines) + "\n" + SHORT_FOOTER
    lines += [FOOTER] + [entry("  " + code, meaning, 10) for code, meaning in exit_codes()]
    lines += [entry("", "With a COMMAND: the command's own, and 124 after --command-timeout.", 10)]
    return "\n".join(lines) + "\n" + EXAMPLES


def completion(shell):
    """Return the completion script of "bash", "zsh" or "fish". It leaves out the flags that undo others."""
    return {"bash": bash_completion, "zsh": zsh_completion, "fish": fish_completion}[shell]()


def bash_completion():
    """For bash 4 or later: only its compopt quotes the names of files."""
    case = '        {}) COMPREPLY=($(compgen -W "{}" -- "$cur")); return ;;\n'
    cases = [case.format(option.flag, " ".join(option.choices)) for option in OPTIONS if option.choices]
    paths = "|".join(option.flag for option in OPTIONS if option.path)
    values = "|".join(option.flag for option in OPTIONS if option.metavar)
    words = " ".join(flag for option in OPTIONS for flag in (option.flag, option.short) if flag)
    return """_packtrack_logger() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        [ "${COMP_WORDS[i]}" = -- ] || continue
        ((i + 1 < COMP_CWORD)) || COMPREPLY=($(compgen -c -- "$cur"))
        compopt -o default 2>/dev/null; return
    done
    if [ "$cur" = = ]; then cur=; elif [ "$prev" = = ]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi
    case $prev in
%s        %s) compopt -o default 2>/dev/null; return ;;
        %s) return ;;
    esac
    COMPREPLY=($(compgen -W "%s" -- "$cur"))
}
complete -F _packtrack_logger packtrack-logger packtrack-logger.pyz
""" % ("".join(cases), paths, values, words)


def zsh_completion():
    """For a file _packtrack-logger on $fpath, or to be sourced after compinit."""
    lines = []
    for option in OPTIONS:
        action = "_files" if option.path else "(" + " ".join(option.choices) + ")" if option.choices else " "
        value = ":{}:{}".format(option.metavar, action) if option.metavar else ""
        text = re.sub(r"([][:\\])", r"\\\1", about(option)).replace("'", "'\\''")
        form = ("'*{}[{}]{}'" if option.name == "meta" else "'{}[{}]{}'").format
        lines += [form(flag, text, value) for flag in (option.flag, option.short) if flag]
    return """#compdef packtrack-logger packtrack-logger.pyz
_packtrack_logger() {
  local -i end=${words[(i)--]}
  if (( end < CURRENT )); then
    shift $end words
    (( CURRENT -= end ))
    _normal
    return
  fi
  _arguments %s
}
if [[ $funcstack[1] = _packtrack-logger ]]; then _packtrack_logger "$@"
else compdef _packtrack_logger packtrack-logger packtrack-logger.pyz; fi
""" % " \\\n    ".join(lines)


def fish_completion():
    """To be sourced, or kept in fish's completions directory."""
    lines = [
        "complete -c packtrack-logger.pyz -w packtrack-logger",
        "complete -c packtrack-logger -f",
        "complete -c packtrack-logger -n 'contains -- -- (commandline -opc)' "
        "-a '(complete -C (commandline -cp | string replace -r \"^.*? -- +\" \"\"))'",
    ]
    for option in OPTIONS:
        value = " -r -F" if option.path else " -x" if option.metavar else ""
        value += " -a '{}'".format(" ".join(option.choices)) if option.choices else ""
        short = " -s " + option.short[1:] if option.short else ""
        text = about(option).replace("\\", "\\\\").replace("'", "\\'")
        lines.append("complete -c packtrack-logger -l {}{}{} -d '{}'".format(option.name, short, value, text))
    return "\n".join(lines) + "\n"


def about(option):
    """Return what an option is for, with its default, for completions, which show it alone."""
    return option.help + (" [default {}]".format(option.default) if option.default else "")


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
TOO_LONG = "a record of more than 16 MiB"
TOO_DEEP = "more than {} levels of nesting".format(MAX_DEPTH)
JSON_BLANKS = " \t\r\n"


def _finite(text):
    value = float(text)
    if value - value:
        raise ValueError("a number is too large")
    return value


def _whole(text):
    if len(text) > MAX_DIGITS:  # int() takes time by the square of it, and newer versions refuse it
        raise ValueError("a number of more than {} digits".format(MAX_DIGITS))
    return int(text)


def _no_constant(name):
    raise ValueError("{} is not JSON".format(name))


# The C scanner that json.loads calls, called directly: no wrapper per record, and it reads from any position.
scan_once = json.JSONDecoder(parse_float=_finite, parse_int=_whole, parse_constant=_no_constant).scan_once


def exceeded_limit(text, value):
    """Return which limit a value and its JSON text exceed, about which Python versions disagree, or None."""
    if len(text) > MAX_RECORD:
        return TOO_LONG
    depth, level = 0, [value] if text.count("[") + text.count("{") > MAX_DEPTH else []
    while level:
        level = [item for item in level if type(item) in (dict, list)]
        depth += bool(level)
        level = [inner for item in level for inner in (item.values() if type(item) is dict else item)]
    return TOO_DEEP if depth > MAX_DEPTH else None


def describe_json_error(error):
    """Return what an error of scan_once means, quoting nothing, and its position in the text or None."""
    if isinstance(error, RecursionError):
        return TOO_DEEP, None
    if isinstance(error, StopIteration):
        return "invalid JSON: expected a value", error.value
    if not isinstance(error, json.JSONDecodeError):  # a ValueError of _finite's or _no_constant's
        return str(error), None
    return "invalid JSON: " + re.sub("( starting)? at$", "", error.msg[:1].lower() + error.msg[1:]), error.pos


def parse_json(text):
    """Return the value of JSON text, strictly. Raises InputError, which says where and quotes nothing."""
    position = None
    try:
        value, end = scan_once(text, len(text) - len(text.lstrip(JSON_BLANKS)))
        fault = exceeded_limit(text, value)
        if text[end:].strip(JSON_BLANKS):
            fault, position = "invalid JSON: extra data", len(text) - len(text[end:].lstrip(JSON_BLANKS))
        if fault is None:
            return value
    except (ValueError, StopIteration, RecursionError) as error:
        fault, position = describe_json_error(error)
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
    """Raise InvalidError, which names the fields, unless event (a dict) is a complete and valid event."""
    _check_names("", event, FIELDS)
    for part in tuple(PARTS) + OBJECTS:
        if event.get(part) is not None:
            if type(event[part]) is not dict:
                raise InvalidError("must be an object", where=part)
            if part in PARTS:
                _check_names(part + ".", event[part], PARTS[part])
    missing = [path for path in ("timestamp",) + REQUIRED if field_value(event, path) is None]
    if missing:
        raise InvalidError("missing required " + ", ".join(missing))
    for path in TEXTS:
        value = field_value(event, path)
        if value is not None and type(value) is not str:
            raise InvalidError("must be a string", where=path)
        if value == "" and path in REQUIRED:
            raise InvalidError("must not be empty", where=path)
    for path in ("severity", "status", "timestamp"):
        try:
            if not event[path]:
                raise ValueError("must not be empty")
            BY_NAME[path].parse(event[path])
        except ValueError as error:
            raise InvalidError(str(error), where=path)


def field_value(event, path):
    """Return the value of an event's field, such as "source.env", or None."""
    part, _, name = path.partition(".")
    value = event.get(part)
    return value.get(name) if name and value is not None else value


def _check_names(prefix, record, known):
    for name in record:
        if name not in known:
            raise InvalidError('unknown field "{}"{}; put custom fields under "metadata"'.format(
                prefix + printable(name), nearest(prefix + name, [prefix + field for field in known])))


def complete_event(event, defaults, now):
    """Return a copy of event (a dict) with what it lacks, null included, filled in.

    defaults: an event of any fields. now: the timestamp, text, of an event that has none. What the event says
    wins. Raises InvalidError if the result is not a valid event.
    """
    result = {}
    for name in FIELDS + tuple(name for name in event if name not in FIELDS):
        own, default = event.get(name), defaults.get(name)
        if name in PARTS and (own is None or type(own) is dict):
            own, default, anchor = own or {}, default or {}, ANCHORS[name]
            own = {key: own[key] for key in own if own[key] is not None or key not in PARTS[name]}
            if anchor in own and own[anchor] != default.get(anchor):
                default = {key: default[key] for key in default if key == "type"}
            own = dict(default, **own)
        elif name in OBJECTS and type(own) is dict:
            own = dict(default, **own) if default else own
        elif own is None:
            own = default or (now if name == "timestamp" else None)
        if own not in (None, {}) or name not in FIELDS or name in OBJECTS and own is not None:
            result[name] = own
    check_event(result)
    return result


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
        return is_complete(event) and all(name in event.get(part, ()) for part, name in wanted)

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


# ---- Input: from streams to lists of records; no network ---------------------------------------------------

# Read and validated at a time. Larger blocks are mapped anew by malloc each time, a tenth of the whole cost.
BLOCK = 1 << 16
SMALL = 1000
BLANK = b" \t\r\n"
BOM = b"\xef\xbb\xbf"
# Tokens that decide where a JSON value ends; an escape that the data cuts off is looked at again.
TOKEN = re.compile(rb'\\(?:.|\Z)|["{}\[\]]', re.DOTALL)
# What the reading of an array expects next: its begin, the first element, the next one, what comes after one.
STEPS = {("begin", "["): "first", ("first", "]"): "end", ("after", ","): "next", ("after", "]"): "end"}
OUT_OF_STEP = {
    "begin": "not a JSON object or array",
    "after": "invalid JSON: expected a comma or the end of the array",
    "end": "invalid JSON: extra data",
}


class Source:
    """An open file, pipe or standard input ("-"); made by main, read by the thread that runs the Reader.

    name: for messages. mode: as of fstat. is_file: whether it is a regular file. Raises InputError.
    """

    def __init__(self, path, limits):
        self.name, self._limits = display(path, "standard input"), limits
        try:
            if path != "-":
                flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
                # Opening a FIFO waits for its writer; Linux can wait in poll() instead, within the limits.
                fifo = sys.platform.startswith("linux") and stat.S_ISFIFO(os.stat(path).st_mode)
                self.raw = io.FileIO(os.open(path, flags | os.O_NONBLOCK if fifo else flags))
            elif sys.stdin is None:
                raise InputError("cannot read standard input: it is closed")
            else:
                self.raw = io.FileIO(0, closefd=False)
            self.identity = os.fstat(self.raw.fileno())
            self.is_file = stat.S_ISREG(self.identity.st_mode)
        except (OSError, ValueError) as error:
            raise InputError("cannot read {}: {}".format(self.name, reason(error)))

    def chunks(self):
        """Yield the bytes as they come, at most BLOCK at a time. Raises InputError, and as Limits.check()."""
        try:
            while True:
                self._limits.check(reading=True)
                if not self.is_file:
                    wait_until_ready(self.raw.fileno(), self._limits, reading=True)
                chunk = self.raw.read(BLOCK)
                if chunk == b"":
                    return
                if chunk is not None:  # None: non-blocking, and another process was faster
                    yield chunk
        except OSError as error:
            raise InputError("cannot read {}: {}".format(self.name, reason(error)))

    def close(self):
        self.raw.close()


def wait_until_ready(descriptor, limits, reading=False):
    """Wait until a descriptor can be read, or else written. Raises as Limits.check(), after a first wait."""
    if not hasattr(select, "poll"):  # Windows can only wait for sockets
        return
    poll, seconds = select.poll(), TICK
    poll.register(descriptor, select.POLLIN if reading else select.POLLOUT)
    while not poll.poll(seconds * 1000 + 1):
        seconds = limits.left(reading=reading)


class Refused:
    """Bytes of the input that are no valid record; made by Reader.

    raw: as they came. error: what is wrong, or None where they continue the ones before. ends: whether the
    record ends here.
    """

    __slots__ = ("raw", "error", "ends")

    def __init__(self, raw, error, ends=True):
        self.raw, self.error, self.ends = raw, error, ends


class Reader:
    """Turns a stream of bytes into lists of valid, complete records; made by main, run by one thread.

    source: a Source. ndjson: one record a line, else one JSON object or array. defaults: see complete_event.
    allow_empty: whether there may be no record at all. single: once reading began, whether it is one object.
    """

    def __init__(self, source, ndjson, defaults, allow_empty=False):
        self.name, self.single = source.name, False
        self._source, self._ndjson, self._allow_empty = source, ndjson, allow_empty
        self._defaults, self._is_complete = defaults, completeness_test(defaults)
        self._line, self._counted = 1, 0
        self._state = "begin"  # of an array; see STEPS. "broken": its elements can no longer be told apart
        self._skip_blanks = re.compile(r"[ \t\r\n]*").match
        self._next_object = re.compile(r"[ \t\r\n]*,[ \t\r\n]*(?=\{)").match

    def records(self):
        """Yield lists of records (bytes), and a Refused for what is none. Raises as Source.chunks()."""
        found = False
        for item in (self._lines if self._ndjson else self._elements)(self._text_chunks()):
            found = True
            yield item
        if not (found or self._allow_empty):
            raise InputError("no events found", where=self.name)

    def _text_chunks(self):
        """Yield the source's chunks without a byte order mark. Raises InputError where it is no text."""
        head, chunks = b"", self._source.chunks()
        for chunk in chunks:
            head += chunk
            if len(head) > 3:
                break
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError("is UTF-16: convert it to UTF-8", where=self.name)
        if head[:2] == b"\x1f\x8b":
            raise InputError("is gzip-compressed; use: zcat FILE | packtrack-logger --stdin", where=self.name)
        yield head[len(BOM):] if head.startswith(BOM) else head
        yield from chunks

    def _locate(self, data, position):
        """Return the source and line of a position in data; each line is counted once."""
        self._line += data.count(b"\n", self._counted, position)
        self._counted = position
        return "{}:{}".format(self.name, self._line)

    def _lines(self, chunks):
        held, size, too_long = [], 0, False
        for chunk in chunks:
            if too_long:  # its rest is kept as it came, up to the next line break
                rest, line_break, chunk = chunk.partition(b"\n")
                yield Refused(rest, None, ends=bool(line_break))
                too_long, self._line = not line_break, self._line + bool(line_break)
            cut = chunk.rfind(b"\n") + 1
            if cut:
                yield from self._whole_lines(b"".join(held) + chunk[:cut])
                held, size = [], 0
            held.append(chunk[cut:])
            size += len(chunk) - cut
            if size > MAX_RECORD + BLOCK:  # there may be blanks around the record
                where = "{}:{}".format(self.name, self._line)
                yield Refused(b"".join(held), InputError(TOO_LONG, where=where), ends=False)
                held, size, too_long = [], 0, True
        if too_long:
            yield Refused(b"", None)
        yield from self._whole_lines(b"".join(held))

    def _whole_lines(self, data):
        records, position, size, trusted = [], 0, len(data), True
        text, valid = as_text(data)
        is_complete, scan, find, append = self._is_complete, scan_once, text.find, records.append
        while position < size:
            end = find("\n", position)
            if end < 0:
                end = size
            try:
                event, stop = scan(text, position) if trusted else (None, size + 1)
                if (valid and is_complete(event)
                        and (stop == end or stop < end and not text[stop:end].strip(JSON_BLANKS))
                        and (stop - position <= SMALL or exceeded_limit(text[position:stop], event) is None)):
                    append(data[position:stop])
                    position = end + 1
                    continue
            except (ValueError, StopIteration, RecursionError):
                pass
            raw = data[position:end].strip(BLANK)
            record = self._complete(raw, data, position) if raw else None
            if type(record) is Refused:
                if records:
                    yield records
                hint = " (one object per line, no commas between)" if raw[-1:] == b"," else ""
                if self._line == 1 and (raw == b"{" or raw[:1] == b"["):
                    hint = "; for a JSON object or array omit --ndjson"
                record.error.args = record.error.args[0] + hint,
                yield record
                # scan() does not stop at a line's end: what is wrong could make it read on, line after line
                records, trusted = [], False
                append = records.append
            elif raw:
                append(record)
            position = end + 1
        self._locate(data, size)
        self._counted = 0
        if records:
            yield records

    def _complete(self, raw, data, position):
        """Return the completed record whose bytes are raw, or a Refused; it begins at a position of data."""
        try:
            event = parse_json(raw.decode("utf-8"))
            if type(event) is not dict:
                raise InputError("not a JSON object")
            completed = complete_event(event, self._defaults, utc_timestamp(time.time()))
            return raw if completed == event else dump_json(completed)
        except UnicodeDecodeError:
            return Refused(raw, InputError("invalid UTF-8", where=self._locate(data, position)))
        except PackTrackError as error:
            return Refused(raw, type(error)(str(error), where=self._locate(data, position)))

    def _elements(self, chunks):
        """Read one object or an array; only an element that is not whole yet is held back."""
        held, boundary = bytearray(), None
        for chunk in chunks:
            held += chunk
            if self._state == "broken":
                yield Refused(bytes(held), None, ends=False)
                held.clear()
                continue
            whole = boundary is None or boundary.found(held)
            if whole or len(held) > MAX_RECORD:
                del held[:(yield from self._whole_elements(bytes(held), final=not whole))]
                boundary = Boundary() if held else None
        if self._state != "broken":
            yield from self._whole_elements(bytes(held), final=True)
        if self._state == "broken":
            yield Refused(b"", None)

    def _whole_elements(self, data, final):
        """Yield the elements that are whole; return how many bytes of data are done with.

        final: nothing follows. One flat loop, as it runs once a record.
        """
        records, position, size, state, why, fault_at = [], 0, len(data), self._state, None, None
        text, valid = as_text(data)
        is_complete, scan, next_object = self._is_complete, scan_once, self._next_object
        while True:
            match = next_object(text, position) if state == "after" else None
            if match:
                position = match.end()
            else:
                position = self._skip_blanks(text, position).end()
                if position == size:
                    break
                step = STEPS.get((state, text[position]))
                if step:
                    state, position = step, position + 1
                    continue
                if state in ("after", "end") or state == "begin" and text[position] != "{":
                    why = OUT_OF_STEP[state]
                    if self.single and text[position] == "{":
                        why = "more than one JSON object: use --ndjson for one object per line"
                    break
                self.single = state == "begin"
                if text[position] not in '{["' and not final and not Boundary().found(data[position:]):
                    break  # a number or a word, which may go on
            try:
                event, stop = scan(text, position)
            except (ValueError, StopIteration, RecursionError) as error:
                why, fault_at = describe_json_error(error)
                # Cut off by the end of the data: the fault is there, or in a string that is still open.
                cut_off = fault_at is not None and (size - fault_at < 16 or "nterminated" in why)
                if cut_off and not final and not Boundary().found(data[position:]):
                    why = None
                break
            if (valid and is_complete(event)
                    and (stop - position <= SMALL or exceeded_limit(text[position:stop], event) is None)):
                records.append(data[position:stop])
            else:
                record = self._complete(data[position:stop], data, position)
                if type(record) is Refused:
                    if records:
                        yield records
                    yield record
                    records = []
                else:
                    records.append(record)
            position, state = stop, "end" if self.single else "after"
        if records:
            yield records
        if final and state not in ("begin", "end"):
            why = TOO_LONG if size > MAX_RECORD else why or "invalid JSON: it ends too early"
        if why:
            where = self._locate(data, position if fault_at is None else fault_at)
            yield Refused(data[position:], InputError(why, where=where), ends=False)
            position, state = size, "broken"
        elif state == "after" and position < size:
            state = "next"  # the comma is done with
        self._locate(data, position)
        self._counted, self._state = 0, state
        return position


class Boundary:
    """Finds the end of a JSON value that comes in pieces; made by Reader for an element that is not whole."""

    def __init__(self):
        self._position, self._depth, self._in_string = 0, 0, False

    def found(self, data):
        """Return whether the value that data begins with is whole. From call to call data only grows."""
        if data[:1] not in (b"{", b"[", b'"'):
            match, self._position = re.search(rb"[,\]}\s]", data[self._position:]), len(data)
            return match is not None
        for match in TOKEN.finditer(data, self._position):
            token = match.group()
            if token == b"\\":  # the second half of an escape is still to come
                self._position = match.start()
                return False
            if token == b'"':
                self._in_string = not self._in_string
            elif not self._in_string and token[:1] != b"\\":
                self._depth += 1 if token in b"{[" else -1
            if self._depth <= 0 and not self._in_string:
                return True
        self._position = len(data)
        return False


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

LONGEST_RETRY_AFTER, NEXT_ADDRESS, BODY_SECONDS = 60.0, 0.25, 1.0
MOST_OF_BODY, MOST_OF_ERROR = 1 << 20, 1 << 16
ENDS_RUN = (401, 403, 404)
HTTP_DATES = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")
SHORTEST_SECRET, TELLING_RUN = 6, 8
ESCAPES = r"(?:\\u00|\\x|%)([0-9A-Fa-f]{2})|(&#?[0-9A-Za-z]{1,12};?)|\\(.)"
PROXY = r"(?i)(?:http://)?(?![a-z0-9+.-]*://)(?:(.*)@)?((?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?)/*"
STATUS_LINE = br"(HTTP/1\.[0-9])[ \t]+([1-9][0-9]{2})(?:[ \t]([^\n]*))?\r?\n"
EARLY_ANSWER = br"(?m)^HTTP/1\.. +[2-9]"
PORTS = {"http": "80", "https": "443"}
WOULD_BLOCK = ("timeout", "TimeoutError", "BlockingIOError", "SSLWantReadError", "SSLWantWriteError")
HTTP_FAULTS = {"LineTooLong": "sent a header that is too long", "HTTPException": "sent too many headers"}
TLS_FAULTS = (  # what OpenSSL says, the kind of error (None: another attempt may succeed), our words
    ("wrong version|http request|unknown protocol|packet length|record layer", None,
     "{peer} does not speak TLS (use http://?)"),
    ("unrecognized name", "tls", "{peer} has no TLS certificate for this host name: check --base-url"),
    ("certificate required", "tls", "{peer} requires a TLS client certificate, which is not supported"),
    ("handshake failure", "tls", "{peer} refused the TLS handshake (does it require a client certificate?)"),
    ("sigalg|unsupported protocol|protocol version", "tls",
     "{peer} supports none of the TLS versions that this Python has"),
    ("has expired", "certificate", "TLS certificate of {host} has expired"),
    ("match|no appropriate", "certificate", "TLS certificate of {host} is not valid for {host}"),
    ("failed: (self.signed|unable to)", "certificate",
     "TLS certificate of {host} not trusted: unknown issuer{roots}"),
    ("verify failed:", "certificate", "TLS certificate of {host} not trusted: {openssl}"),
    ("verify failed", "certificate",  # 3.6 does not say why
     "TLS certificate of {host} not trusted: unknown issuer or expired{roots}"),
    ("eof", None, "{peer}: TLS connection closed"),
    ("", None, "{peer}: TLS: {openssl}"),
)


class AttemptFailed(RetriesExhaustedError):
    """A failed attempt where another may succeed. retry_after: the seconds that were asked for, or None."""

    retry_after = None


def is_retryable(status):
    """Return whether a status is worth a retry: 429 and 5xx are, every other one is final."""
    return status == 429 or 500 <= status <= 599


def backoff_delay(number, initial, maximum, jitter, random):
    """Return the seconds to wait after the number-th attempt, counted from 1.

    initial, maximum: seconds, before jitter. random: a function that returns a float of [0, 1).
    """
    return min(initial * 2.0 ** min(number - 1, 60), maximum) * (1 + jitter * (2 * random() - 1))


def parse_retry_after(value, now):
    """Return the seconds that a Retry-After header asks for (RFC 9110, 10.2.3), or None if it is nonsense.

    value: the header's text or None. now: seconds since the epoch, by the server's clock where it is known.
    """
    import calendar

    value = (value or "").strip(" \t")
    if re.fullmatch("[0-9]{1,10}", value):
        return float(value)
    for form in HTTP_DATES:
        try:
            date = time.strptime(value, form)
        except ValueError:
            continue
        if value in (time.strftime(form, date), time.asctime(date)):  # strptime alone is lenient
            return max(0.0, float(calendar.timegm(date) - now))
    return None


def redact(text, secrets):
    """Return text with every secret cut out, also where it was escaped for JSON, HTML or a URL."""
    for secret in (secret for secret in secrets if len(secret) >= SHORTEST_SECRET):
        from html import escape
        from urllib.parse import quote

        raw, escaped = secret.encode("utf-8", "surrogateescape"), json.dumps(secret)[1:-1]
        for form in (escaped, escape(secret, False), quote(raw), quote(raw, safe=""), secret):
            text = text.replace(form, "***")
        for size in range(len(secret) - 1, SHORTEST_SECRET - 1, -1):  # a quoted value may be cut within it
            text = re.sub(re.escape(secret[:size]) + r'(?=\\?")', "***", text)
    return text


def holds_secret(text, secrets):
    """Return whether text shows a secret's first 6 characters, or any 8 of it in a row.

    The escapes of JSON, repr, HTML and URLs are undone, and base64, also one inside another. Secrets of less
    than 6 characters are not searched for.
    """
    from binascii import a2b_base64
    from html import unescape

    def character(match):
        code, entity, other = match.groups()
        return chr(int(code, 16)) if code else unescape(entity) if entity else other.strip("nrt")

    def squeeze(text):
        return "".join(filter(str.isprintable, text)).replace(" ", "")

    texts = {squeeze(text)}
    for _ in range(2):
        for each in list(texts):
            runs = re.findall("[A-Za-z0-9+/]{8,}", each.replace("-", "+").replace("_", "/"))
            runs = [run[start:] + "A" * ((start - len(run)) % 4) for run in runs for start in range(4)]
            decoded = " ".join(a2b_base64(run).decode("utf-8", "ignore") for run in runs)
            texts.update(map(squeeze, (each.replace("+", ""), re.sub(ESCAPES, character, each), decoded)))
    secrets = [squeeze(secret) for secret in secrets if len(secret) >= SHORTEST_SECRET]
    windows = {secret[:SHORTEST_SECRET] for secret in secrets}
    windows.update(secret[at:at + TELLING_RUN]
                   for secret in secrets for at in range(len(secret) - TELLING_RUN + 1))
    return any(window in each for each in texts for window in windows)


def resolve_host(host, port, left, fault):
    """Return getaddrinfo's addresses of a host. left: returns how long to wait at a time, or raises."""
    import socket

    host, found = host.encode("ascii"), [MemoryError()]  # bytes: text would import the IDNA codec

    def resolve(flags=0):
        try:
            found[0] = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, flags)
        except Exception as error:
            found[0] = error

    resolve(socket.AI_NUMERICHOST)
    if isinstance(found[0], socket.gaierror):  # a name
        import threading

        # The resolver takes no time limit, so it is left behind in a daemon thread when its time is up.
        thread = threading.Thread(target=resolve, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no memory or no permission for a thread
            resolve()
        while thread.is_alive():
            thread.join(left())
    if isinstance(found[0], socket.gaierror):
        raise AttemptFailed(fault + printable(found[0].strerror or str(found[0])))
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def connect(addresses, left, clock):
    """Return a socket connected to one of getaddrinfo's addresses, as RFC 8305 has it. Raises OSError.

    The next address is tried 250 ms after the one before, or once that has failed, and families alternate.
    """
    import socket

    families = [address[0] for address in addresses]
    order = sorted(range(len(families)), key=lambda at: families[:at].count(families[at]))
    due, fault, pending = 0.0, OSError("no address"), []
    try:
        while order or pending:
            wait = min(left(), NEXT_ADDRESS / 5)
            if order and (clock() >= due or not pending):
                due, sock = clock() + NEXT_ADDRESS, None
                family, kind, protocol, _, address = addresses[order.pop(0)]
                try:
                    sock = socket.socket(family, kind, protocol)
                    sock.setblocking(False)
                    sock.connect(address)
                    pending.append(sock)
                except BlockingIOError:
                    pending.append(sock)
                except OSError as error:  # no such family, no route
                    fault = error
                    if sock is not None:
                        sock.close()
                    continue
            for sock in set().union(*select.select([], pending, pending, wait)):
                pending.remove(sock)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    return sock
                fault = OSError(code, os.strerror(code))
                sock.close()
    finally:
        for sock in pending:
            sock.close()
    raise fault


class Connection(io.RawIOBase):
    """A connection to the service, kept for the next request; http.client reads from it as from a file.

    A socket's own timeout starts anew with each byte, so a drip or an endless run of 1xx answers would
    outlive it; here whatever waits asks left() each time. Client makes it and sets until, the end of the
    attempt by the clock of limits, and timeout, the seconds that messages name. open() sets peer, as messages
    name it; prefix and headers, for requests; secrets, the proxy's. received: bytes since the last request.
    """

    def __init__(self, base_url, limits):
        super().__init__()
        self._base_url, self._limits = base_url, limits
        self._socket = self._context = None
        self.peer = self._host = self._stage = ""
        self._ahead, self.ended, self.received, self.until, self.timeout = b"", False, 0, 0.0, 0.0
        self.secrets = []

    def left(self):
        """Return how long to wait at a time. Raises AttemptFailed when the time is up, and as Limits does."""
        wait, left = self._limits.left(TICK), self.until - self._limits.clock()
        if left <= 0:
            raise AttemptFailed("{}timed out after {:g}s".format(self._stage, self.timeout))
        return max(min(wait, left), 0.001)  # zero would make a socket non-blocking

    def open(self):
        """Connect, through a proxy and with TLS where they are due; return whether it was connected."""
        try:
            if self._socket is not None and self._receive(0) is None:
                return True
        except OSError:
            pass
        self.disconnect()
        scheme, _, rest = self._base_url.partition("://")
        origin, slash, path = rest.partition("/")
        proxy, self.secrets = find_proxy(scheme, origin)
        host, port = split_host(proxy, "80") if proxy else split_host(origin, PORTS[scheme])
        name = "proxy " + host if proxy else host
        self._host, self.peer = host.strip("[]"), name + ":" + port
        self._stage = "cannot resolve {}: ".format(name)
        addresses = resolve_host(self._host, int(port), self.left, self._stage)
        self._stage = self.peer + ": " if proxy else ""
        self._socket = connect(addresses, self.left, self._limits.clock)
        basic = {"Proxy-Authorization": "Basic " + self.secrets[0]} if self.secrets else {}
        self.prefix, self.headers = slash + path, {"Host": origin, "Accept-Encoding": "identity"}
        if proxy and scheme == "https":
            self._open_tunnel(*split_host(origin, PORTS[scheme]), headers=basic)
        elif proxy:
            self.prefix, self.headers = self._base_url, dict(self.headers, **basic)
        if scheme == "https":
            self._start_tls()
        return False

    def _open_tunnel(self, host, port, headers):
        target = host + ":" + port
        self.send("CONNECT", target, dict(headers, Host=target), b"")
        response = self.read_response("CONNECT")
        if not 200 <= response.status <= 299:
            message = "{} refused the tunnel: HTTP {} {}".format(
                self.peer, response.status, quote(response.reason, self.secrets)).rstrip()
            if is_retryable(response.status):
                raise AttemptFailed(message)
            raise RefusedError(message, status=response.status, kind="proxy", ends_run=True)
        self._host, self.peer, self._stage = host.strip("[]"), target, ""

    def _start_tls(self):
        try:
            import ssl
        except ImportError:
            raise RefusedError("https needs Python's ssl module, which this Python was built without",
                               kind="no_tls", ends_run=True)
        self._context = self._context or ssl.create_default_context()
        self._socket = self._context.wrap_socket(
            self._socket, server_hostname=self._host.rstrip("."), do_handshake_on_connect=False)
        while self._call(self.left(), lambda: self._socket.do_handshake() or True) is None:
            pass

    def send(self, method, target, headers, body):
        """Send a request; return False where the answer, or the end, came before it was all sent."""
        self._ahead, self.received, sent = b"", 0, 0
        lines = ["{} {} HTTP/1.1".format(method, target)]
        lines += ["{}: {}".format(name, value) for name, value in headers.items()]
        # Head and body at once: one packet is better.
        with memoryview("\r\n".join(lines + ["", ""]).encode("latin-1") + body) as view:
            while sent < len(view):
                sent += self._call(self.left(), self._socket.send, view[sent:]) or 0
                if sent < len(view) and (self._receive(0) == b"" or re.search(EARLY_ANSWER, self._ahead)):
                    return False
        return True

    def read_response(self, method):
        """Return an HTTPResponse whose headers are read, past all 1xx but 101 (RFC 9110, 15.2)."""
        from http.client import BadStatusLine, HTTPResponse, RemoteDisconnected

        def read_status():  # in place of http.client's own, which takes +200, 0200 and 2_00
            line = stream.readline(65537)
            match = re.fullmatch(STATUS_LINE, line)
            if match is None:
                raise BadStatusLine("") if line else RemoteDisconnected("connection closed without an answer")
            version, status, words = match.groups()
            status = 100 if b"102" <= status < b"200" else int(status)  # http.client skips a 100 only
            return version.decode(), status, (words or b"").decode("latin-1")

        response = HTTPResponse(self, method=method)
        stream, response._read_status = response.fp, read_status
        response.begin()
        if self.ended:  # http.client takes the end of the connection for the end of the headers
            raise RemoteDisconnected("connection closed amid the headers")
        return response

    def failure(self, error):
        """Return the RefusedError or AttemptFailed for an exception of a socket, http.client or ssl."""
        if isinstance(error, (RetriesExhaustedError, Interrupted)):
            return error
        if type(error).__module__ == "ssl":
            text, path = str(error).replace("_", " "), os.environ.get("SSL_CERT_FILE")
            kind, words = next(row[1:] for row in TLS_FAULTS if re.search(row[0], text, re.IGNORECASE))
            roots = ". Install ca-certificates or set SSL_CERT_FILE"
            if path:
                roots += " (now: {}{})".format(
                    display(path, path), "" if os.access(path, os.R_OK) else ", not readable")
            openssl = printable(re.sub(r"^\[.*?\] *(certificate verify failed: )?|\( ?ssl\.c.*", "", text))
            message = words.format(peer=self.peer, host=self._host, roots=roots, openssl=openssl)
            return RefusedError(message, kind=kind, ends_run=True) if kind else AttemptFailed(message)
        if isinstance(error, OSError):
            return AttemptFailed("{}: {}".format(self.peer, reason(error)))
        fault = HTTP_FAULTS.get(type(error).__name__, "sent no valid HTTP response")
        return AttemptFailed("{} {}".format(self.peer, fault))

    def disconnect(self):
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self):
        """http.client closes its file after each answer; the connection stays."""

    def makefile(self, *_):
        return io.BufferedReader(self)

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._ahead and self._receive(self.left()) is None:
            pass
        count = min(len(buffer), len(self._ahead))
        buffer[:count], self._ahead = self._ahead[:count], self._ahead[count:]
        self.ended = not count
        return count

    def _receive(self, seconds):
        """Receive what comes within that time for readinto(); return it, None for nothing, b"" at the end."""
        data = self._call(seconds, self._socket.recv, io.DEFAULT_BUFFER_SIZE)
        self._ahead += data or b""
        self.received += len(data or b"")
        return data

    def _call(self, seconds, operation, *arguments):
        """Return what an operation on the socket returns, or None where it takes longer than that."""
        self._socket.settimeout(seconds)
        try:
            return operation(*arguments)
        except OSError as error:  # by name: the classes differ by version, and ssl may not be there
            if type(error).__name__ not in WOULD_BLOCK:
                raise
        return None


def find_proxy(scheme, origin):
    """Return the "host:port" of the proxy that the environment has, or "", and its secrets.

    These are the credentials in base64, and the password. Raises InvalidError, which does not quote the URL.
    """
    from base64 import b64encode
    from urllib.request import getproxies, proxy_bypass, unquote

    proxy = getproxies().get(scheme)
    if not proxy or proxy_bypass(origin):
        return "", []
    match = re.fullmatch(PROXY, proxy)
    if match is None or int(match.group(3) or 80) > 65535:
        raise InvalidError("must be http://[USER:PASSWORD@]HOST[:PORT] (value not shown): SOCKS proxies and "
                           "TLS to a proxy are not supported", where=scheme + "_proxy", ends_run=True)
    user = unquote(match.group(1) or "")
    basic = b64encode(user.encode("utf-8", "surrogateescape")).decode("ascii")
    return match.group(2), [basic, user.partition(":")[2]] if user else []


def quote(text, secrets):
    """Return a server's words on one line, or nothing where they show a secret."""
    return "" if holds_secret(text, secrets) else printable(text)


class Client:
    """Sends events over one kept connection. Delivery makes one for each of its threads; close() ends it.

    Only its own methods change it, and only one thread may call them at a time; several may share limits.

    api_key: the key, sent to base_url's origin only. timeout: seconds of one attempt. retries: further
    attempts after the first. backoff_initial, backoff_max: seconds between attempts, before jitter (0 to 1).
    gzip: compress bodies. key_source: where the key came from, for messages. limits: the Limits of the run.
    random: a function like random.random. trace: takes lines on what happens. requests, retries, bytes_sent:
    what was sent so far.
    """

    def __init__(self, api_key, base_url=BASE_URL, timeout=15.0, retries=3, backoff_initial=0.1,
                 backoff_max=2.0, jitter=0.2, user_agent=USER_AGENT, gzip=False, health_path="/api/health",
                 key_source=None, limits=None, random=None, trace=None):
        self._headers = {"X-PackTrack-Key": checked(parse_header, "api_key", api_key),
                         "User-Agent": checked(parse_header, "user_agent", user_agent)}
        self._health_path = checked(parse_path, "health_path", health_path)
        self.base_url = checked(parse_base_url, "base_url", base_url)
        self.requests = self.retries = self.bytes_sent = 0
        self._timeout, self._attempts, self._limits = timeout, retries + 1, limits or Limits()
        self._backoff, self._random, self._gzip = (backoff_initial, backoff_max, jitter), random, gzip
        self._api_key, self._key_source, self._trace = api_key, key_source, trace or (lambda line: None)
        self._connection = Connection(self.base_url, self._limits)

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
        self._attempt("GET", self._health_path, {}, b"")

    def send(self, body, idempotency_key=None):
        """Deliver a body, the bytes of an event's or an array's JSON, with retries and waits.

        idempotency_key: a header's value; "auto" is the body's SHA-256. Raises RefusedError,
        RetriesExhaustedError, InvalidError (a proxy that cannot be used).
        """
        headers = {"Content-Type": "application/json"}
        if idempotency_key:
            key = sha256(body) if idempotency_key == "auto" else idempotency_key
            headers["Idempotency-Key"] = checked(parse_header, "idempotency_key", key)
        if self._gzip:
            import zlib

            headers["Content-Encoding"] = "gzip"
            packer = zlib.compressobj(6, zlib.DEFLATED, 31)  # 31: as gzip, whose date zlib leaves at zero
            body = packer.compress(body) + packer.flush()
        headers["Content-Length"] = len(body)
        number, outcome = 0, None
        while not isinstance(outcome, str):
            number, started = number + 1, self._limits.clock()
            try:
                outcome = self._attempt("POST", "/api/ingest", headers, body)
            except (AttemptFailed, RefusedError) as error:
                outcome = error
            self._trace("attempt {}/{}: {} ({:.0f} ms)".format(
                number, self._attempts, outcome, (self._limits.clock() - started) * 1000))
            if isinstance(outcome, RefusedError):
                raise outcome
            if isinstance(outcome, AttemptFailed):
                self._wait(number, outcome)

    def _wait(self, number, failed):
        """Wait before the next attempt, or raise RetriesExhaustedError where there is none."""
        from random import random

        fault, kind, at_least = str(failed), None, failed.retry_after or 0.0
        delay = max(at_least, backoff_delay(number, *self._backoff, random=self._random or random))
        asked = "" if failed.retry_after is None else "; Retry-After is {:.0f} s".format(at_least)
        if number >= self._attempts:
            fault += ", after {} attempt{}".format(number, "" if number == 1 else "s")
        elif at_least > LONGEST_RETRY_AFTER:
            fault += "{} (limit {:.0f} s)".format(asked, LONGEST_RETRY_AFTER)
        elif self._limits.left(delay) < delay:
            fault, kind = fault + asked + "; no time left for another attempt before --deadline", "deadline"
        else:
            self._trace("retrying in {:.0f} ms".format(delay * 1000))
            self._limits.sleep(delay)
            self.retries += 1
            return
        raise RetriesExhaustedError(fault, status=failed.status, kind=kind)

    def _attempt(self, method, path, headers, body):
        """Send a request; return its status, a 2xx, in words. Raises RefusedError and AttemptFailed."""
        from http.client import HTTPException, RemoteDisconnected

        faults = OSError, HTTPException, ValueError  # ValueError: CertificateError on 3.6
        connection, clock, kept, answer = self._connection, self._limits.clock, False, b""
        connection.until, connection.timeout = clock() + self._timeout, self._timeout
        try:
            response = self._exchange(method, path, headers, body)
            ok = 200 <= response.status <= 299
            connection.until, connection.timeout = min(connection.until, clock() + BODY_SECONDS), BODY_SECONDS
            try:
                answer = response.read(MOST_OF_BODY if ok else MOST_OF_ERROR)
                kept = ok and response.isclosed() and not response.will_close  # read to its end
                if response.length and connection.ended:
                    raise RemoteDisconnected("connection closed amid the body")
            except faults + (RetriesExhaustedError, Interrupted) as error:  # the status stands
                self._trace("the response body broke off: {}".format(connection.failure(error)))
        except faults as error:
            raise connection.failure(error)
        finally:
            if not kept:
                connection.disconnect()
        if not ok:
            raise self._rejection(response, answer, path)
        return "HTTP {}".format(response.status)

    def _exchange(self, method, path, headers, body):
        """Send a request over the kept connection or a new one; return the response, its headers read."""
        connection, sent = self._connection, False
        kept = connection.open()
        self.requests += 1
        try:
            headers = dict(connection.headers, **dict(self._headers, **headers))
            sent = connection.send(method, connection.prefix + path, headers, body)
            self.bytes_sent += len(body) if sent else 0
        except OSError:
            pass  # an answer may have come all the same, such as 413, or a TLS alert
        try:
            response = connection.read_response(method)
        except OSError:
            if not kept or connection.received:
                raise
            # Closed by the server just when it was used again: nothing was wrong with the request.
            connection.disconnect()
            return self._exchange(method, path, headers, body)
        if not sent and 200 <= response.status <= 299:
            raise AttemptFailed("{} answered HTTP {} before it had the whole request".format(
                connection.peer, response.status))
        return response

    def _rejection(self, response, body, path):
        """Return the RefusedError or AttemptFailed of a status that is not a 2xx."""
        secrets, text = [self._api_key] + self._connection.secrets, body.decode("utf-8", "replace")
        status, location = response.status, response.getheader("Location")
        message = "HTTP {} {}".format(status, quote(response.reason, secrets)).rstrip()
        words, hint = quote(text, secrets), ""
        kind = response.getheader("Content-Type", "text/")
        if re.match(r"<|{}$|\[\]$", words) or "\0" in text or not re.match("(?i)text/(?!html)|.*json", kind):
            words = ""
        if 300 <= status <= 399 and location:
            location = quote(location, secrets) or "another address"
            message, words = "HTTP {} redirects to {}".format(status, location), ""
            hint = "set --base-url to the new address (redirects are not followed)"
        elif status in (401, 403):
            hint = "check the API key" + (" (from {})".format(self._key_source) if self._key_source else "")
        elif status in (404, 405):
            message, hint = "{} from {}{}".format(message, self.base_url, path), "check --base-url"
        elif status == 407 and self._connection.peer.startswith("proxy"):
            message = "{}: {}".format(self._connection.peer, message)
        message += ': "{}"'.format(words) if words else ""
        message += ("; " if words else ": ") + hint if hint else ""
        if not is_retryable(status):
            return RefusedError(message, status=status, ends_run=status in ENDS_RUN)
        failed = AttemptFailed(message, status=status)
        now = parse_retry_after(response.getheader("Date"), 0) or time.time()
        failed.retry_after = parse_retry_after(response.getheader("Retry-After"), now)
        return failed

    def close(self):
        """End the connection."""
        self._connection.disconnect()


def checked(parse, name, value):
    """Return an argument as it is parsed. Raises InvalidError that names it."""
    try:
        return parse(value)
    except ValueError as error:
        raise InvalidError(str(error), where=name)


def sha256(body):
    """Return the SHA-256 of bytes, in hexadecimal."""
    import hashlib

    return hashlib.sha256(body).hexdigest()


def json_array(records):
    """Return the body of a batch: the records' own bytes as a JSON array."""
    return b"[" + b",".join(records) + b"]"
# ---- Delivery: the chain from records to batches, and the one account --------------------------------------

HELD_IN_MEMORY = 16 << 20
QUEUE_ITEMS = 32
MOST_RANGES = 100
# Which exit code stands where several would be right.
PRECEDENCE = (2, 3, 4, 1)


def accept_valid(reader, delivery, streams, keeps_rest):
    """Yield (number of the first, records) of what a Reader finds valid, and account for all of it.

    streams: a refused record ends the reading, and not the sending. keeps_rest: what follows a refused record
    is read too, since it has to be kept.
    """
    try:
        for item in reader.records():
            delivery.single = reader.single
            if type(item) is list:
                yield delivery.count_read(item), item
                if streams and delivery.ended is not None:
                    return
                continue
            saves = delivery.keep_going or streams or keeps_rest
            delivery.refuse(item, saves, ends=not (delivery.keep_going or streams))
            if not (delivery.keep_going or keeps_rest and not streams):
                return
    except PackTrackError as error:
        delivery.note(error, ends=error.ends_run or not (delivery.keep_going or streams))
    except Interrupted:
        if not streams:  # else what was read is sent
            delivery.stop()


def keep_until_valid(runs, delivery, keeps_rest, name):
    """Hold (number, records) back until the last one is valid; then yield them all.

    Up to 16 MiB are held in memory, more in an unnamed temporary file. Where the run has ended, nothing is
    yielded, or with keeps_rest everything, to be saved. name: of the input.
    """
    held, end, left_over = io.BytesIO(), 0, ()
    try:
        for number, records in runs:
            left_over = ((number, records),)
            data = b"\0".join(records)  # no JSON text holds a NUL
            if end + len(data) > HELD_IN_MEMORY and type(held) is io.BytesIO:
                from tempfile import TemporaryFile

                file = TemporaryFile(buffering=0)
                write_fully(file, held.getbuffer())
                held = file
            write_fully(held, number.to_bytes(8, "little") + len(data).to_bytes(8, "little") + data)
            end, left_over = held.tell(), ()
    except OSError as error:
        why = "no writable temporary directory" if isinstance(error, FileNotFoundError) else reason(error)
        why = "cannot buffer {}: {} (set TMPDIR, or stream with --async)".format(name, why)
        delivery.note(InputError(why), ends=True)
    delivery.total = delivery.read - delivery.invalid
    with held:
        if delivery.ended is not None and not keeps_rest:
            return
        held.seek(0)
        while held.tell() < end:
            number, size = (int.from_bytes(held.read(8), "little") for _ in range(2))
            yield number, held.read(size).split(b"\0")
        yield from left_over  # nothing, unless there was no room for it
        yield from runs


def write_fully(file, data):
    """Write bytes to an unbuffered file, which may take them in parts."""
    view = memoryview(data)
    while view:
        view = view[file.write(view):]


def read_ahead(runs, delivery, limits, capacity, interval, flushes):
    """Yield (number, records) that a thread reads, at most `capacity` records ahead (--async).

    Yields None when what was yielded since the last None should wait no longer: the first of it came `interval`
    seconds ago. flushes: whether to send what is queued when the input ends.
    """
    import queue

    size = max(1, capacity // QUEUE_ITEMS)
    ahead, finished, oldest = queue.Queue(capacity // size), [], None

    def read():
        try:
            for number, records in runs:
                for start in range(0, len(records), size):
                    ahead.put((limits.clock(), number + start, records[start:start + size]))
        except Exception as error:  # nobody else would hear of it
            delivery.note(internal_error(error), ends=True)
        finally:
            finished.append(True)
            ahead.put(None)

    try:
        start_thread(read)
    except RuntimeError:
        delivery.note(InputError("cannot start a thread: out of memory or processes"), ends=True)
        finished.append(True)
    item = ()
    while item is not None:
        limits.over = delivery.ended is not None
        due = limits.clock() + TICK if oldest is None else oldest + interval
        try:
            item = ahead.get(timeout=min(TICK, max(0.0, due - limits.clock())))
        except queue.Empty:
            item = None if finished and ahead.empty() else ()
        if finished and not (flushes or delivery.errors or limits.signals):
            delivery.stop()
        if item:
            oldest = oldest or item[0]
            yield item[1:]
        elif oldest is not None and limits.clock() >= due:
            oldest = None
            yield None


def cut_batches(runs, size, limit):
    """Yield batches, (records, their numbers), of at most `size` records and `limit` bytes of body.

    runs: (number of the first, records), or None where what is there is to go out. A larger record goes alone.
    """
    batch, numbers, used = [], [], 1
    for run in runs:
        number, records = run or (0, [])
        position = 0
        while position < len(records) or run is None and batch:
            part = records[position:position + min(size - len(batch), 1000)]
            length = sum(map(len, part)) + len(part)
            if used + length > limit:  # count out what fits
                count = length = 0
                while used + length + len(part[count]) + 1 <= limit:
                    length += len(part[count]) + 1
                    count += 1
                part = part[:count or (not batch)]
                length = length or limit
            batch += part
            numbers += range(number + position, number + position + len(part))
            position, used = position + len(part), used + length
            if len(batch) >= size or used >= limit or run is None:
                yield batch, numbers
                batch, numbers, used = [], [], 1
    if batch:
        yield batch, numbers


def join_ranges(ranges):
    """Return ranges of numbers, [[first, last], ...], sorted, and those that adjoin made one."""
    joined = []
    for first, last in sorted(ranges):
        if joined and joined[-1][1] >= first - 1:
            joined[-1][1] = max(last, joined[-1][1])
        else:
            joined.append([first, last])
    return joined


def describe_ranges(ranges):
    """Return the words for the numbers of records: "record 3", "records 1-100, 103"."""
    text = ", ".join("{}-{}".format(*pair) if pair[0] < pair[1] else str(pair[0]) for pair in ranges[:10])
    return "record{} {}{}".format("" if text.isdigit() else "s", text, " and more" if len(ranges) > 10 else "")


def send_batches(batches, delivery):
    """Send an iterator's Batches over the clients of a Delivery at once; this thread works for the first."""
    lock, ended, clients = _thread.allocate_lock(), [], delivery.clients or [None]

    def work(client):
        while True:
            try:
                with lock:
                    batch = next(batches, None)
                if batch is None:
                    return
                delivery.send(batch, client)
            except Exception as error:  # such as no memory
                delivery.note(internal_error(error), ends=True)

    try:
        for client in clients[1:]:
            ended.append(start_thread(lambda client=client: work(client)))
    except RuntimeError:  # no memory or processes for more; those there are do the work
        pass
    work(clients[0])
    for end in ended:
        while not end.acquire(True, TICK):
            pass  # a wait that does not end would let no signal through


class Delivery:
    """Sends batches and accounts for each record: read = delivered + undelivered + invalid.

    Made by main for a run; the threads of the chain change it through its methods only. clients: those that
    send. output: the Appender of --output, which takes the batches instead, or None. undelivered_file: an
    Appender, or None. probe: called with a client and the reporter before the first batch. reporter: takes
    progress, and failures that do not end the run.

    single: the input is one object, and goes out as one. total: how many records the run has in all; None
    where it streams. errors: {exit code: the first error}. ended: what ended the run, or None. kept, unkept:
    how many records undelivered_file took, and could not take. ranges: the numbers of the undelivered.
    """

    def __init__(self, limits, reporter, clients=(), output=None, undelivered_file=None, keep_going=False,
                 idempotency_key=None, probe=None):
        self.clients, self.output, self.undelivered_file = clients, output, undelivered_file
        self.keep_going, self._key, self._probe = keep_going, idempotency_key, probe
        self._limits, self._reporter, self._lock = limits, reporter, _thread.RLock()
        self.single, self.total, self._line_ended = False, None, True
        self.read = self.delivered = self.undelivered = self.invalid = self.kept = self.unkept = 0
        self.errors, self.ended, self.ranges, self.unkept_why = {}, None, [], ""

    @property
    def error(self):
        """The error whose exit code stands, or None."""
        return next((self.errors[code] for code in PRECEDENCE if code in self.errors), None)

    def sum(self, name):
        """Return the sum of a count of the clients: requests, retries or bytes_sent."""
        return sum(getattr(client, name) for client in self.clients)

    def count_read(self, records):
        """Count records as read; return the number of the first of them."""
        with self._lock:
            self.read += len(records)
            self._reporter.progress(self)
            return self.read - len(records) + 1

    def refuse(self, refused, saves, ends):
        """Account for a Refused. saves: whether it is to be kept. ends: whether nothing is to be sent."""
        with self._lock:
            if refused.error is not None:
                self.read, self.invalid = self.read + 1, self.invalid + 1
                self.note(refused.error, ends, warns=self.keep_going)
            if saves and refused.ends and refused.error is not None:
                self.keep(json_lines([refused.raw]), 1)
            elif saves:
                self.keep(refused.raw + b"\n" * refused.ends, int(refused.ends), refused.error is None)

    def send(self, batch, client=None):
        """Deliver (records, numbers), in halves if the server finds them too large; account for all of them."""
        parts = [batch]
        while parts:
            records, numbers = parts.pop()
            ended, half = self.ended, len(records) // 2
            error = ended or self._attempt(records, numbers, client)
            with self._lock:
                if error is None:
                    self.delivered += len(records)
                elif error.status == 413 and half and error is not ended:
                    parts += [(records[half:], numbers[half:]), (records[:half], numbers[:half])]
                else:
                    if error is not ended and error is not self.ended:
                        if self.read > 1 and not error.where:
                            error.where = describe_ranges([[numbers[0], numbers[-1]]])
                        ends = not self.keep_going or error.ends_run
                        self.note(error, ends, warns=not ends)
                    self.undelivered += len(records)
                    self._add_ranges([[number, number] for number in numbers])
                    self.keep(json_lines(records), len(records))
            self._reporter.progress(self)

    def _attempt(self, records, numbers, client):
        """Send a batch; return the error, or None."""
        try:
            self._limits.check()
            if self.output is not None:
                self.output.append(json_lines(records))
                return None
            with self._lock:
                probe, self._probe = self._probe, None
            if probe is not None:
                probe(client, self._reporter)
            body, key = records[0] if self.single else json_array(records), self._key
            if key and key != "auto" and len(records) != self.total:
                key = "{}-{}-{}-{}".format(key, numbers[0], numbers[-1], sha256(body)[:8])
            if self._reporter.verbose:
                self._reporter.log("{}: {} bytes to {}".format(
                    describe_ranges([[numbers[0], numbers[-1]]]), len(body), client.base_url))
            client.send(body, key)
        except PackTrackError as error:
            return error
        except Interrupted:
            return self.stop()
        except Exception as error:  # a fault of this program's must not lose count of the records
            return internal_error(error)

    def stop(self):
        """End the run without an error: a signal came, or the rest is abandoned. Return what ended it."""
        with self._lock:
            self.ended = self.ended or PackTrackError("interrupted", kind="interrupted")
            return self.ended

    def note(self, error, ends=False, warns=False):
        """Note an error. ends: whether nothing more is to be sent. warns: whether to log it at once."""
        with self._lock:
            if self.keep_going or self.ended is None or self.ended.kind == "interrupted":
                self.errors.setdefault(error.exit_code, error)
            if ends:
                self.ended = self.ended or error
            if warns:
                self._reporter.warn(str(error))

    def keep(self, data, count, continues=False):
        """Append bytes, which end `count` records, to the file of the undelivered.

        continues: they go on where the last ones ended; all others begin a line.
        """
        if self.undelivered_file is None:
            return
        try:
            self.undelivered_file.append(data if continues or self._line_ended else b"\n" + data)
            self._line_ended = data.endswith(b"\n")
            self.kept += count
        except (InputError, Interrupted) as error:
            self.unkept += count
            self.unkept_why = str(error) or "cannot write {}: interrupted".format(self.undelivered_file.name)
            self.errors.setdefault(InputError.exit_code, InputError(self.unkept_why))

    def finish(self):
        """Count as undelivered what was read and is otherwise not accounted for, and close what is open."""
        first = self.delivered + self.undelivered + 1
        rest = self.read - self.invalid - first + 1
        if rest > 0:
            self.undelivered += rest
            if not self.invalid:  # else their numbers are not known
                self._add_ranges([[first, first + rest - 1]])
        if not self._line_ended:
            self.keep(b"\n", 1, continues=True)
        for closes in (self.output, self.undelivered_file) + tuple(self.clients):
            if closes is not None:
                closes.close()

    def _add_ranges(self, ranges):
        self.ranges = join_ranges(self.ranges + ranges)[:MOST_RANGES]


class Appender:
    """Appends to a file, whole, also where several processes do so; the file is made when it is needed.

    Made by main for --output and --undelivered. path: "-" is standard output. mode: of a new file. limits:
    for waiting for a lock, a reader or room in a pipe. saving: whether these are Limits.saving()'s. Raises
    InputError where the file cannot be written.
    """

    def __init__(self, path, mode, limits, saving=False):
        self._path, self._mode, self._limits, self._saving = path, mode, limits, saving
        self._descriptor, self._patience = None, LONGEST_SAVING
        self.name, parent = display(path, "standard output"), os.path.dirname(path) or "."
        exists = path == "-" or os.path.exists(path)
        for fails, why in (
                (path == "-" and sys.stdout is None, "it is closed"),
                (os.path.isdir(path), "it is a directory"),
                (not (exists or os.path.isdir(parent)), "its directory does not exist"),
                (not (exists or os.access(parent, os.W_OK | os.X_OK)), "its directory is not writable"),
                (path != "-" and exists and not os.access(path, os.W_OK), "it is not writable")):
            if fails:
                raise InputError("cannot write {}: {}".format(self.name, why))

    def append(self, data):
        """Append bytes; a write that fails leaves none of them in a regular file."""
        limits = self._limits.saving(self._patience) if self._saving else self._limits
        try:
            descriptor, size = self._open(limits)
            try:
                write_all(descriptor, data, limits)
            except OSError:
                if size is not None:
                    os.ftruncate(descriptor, size)
                raise
            finally:
                if size is not None:
                    os.close(descriptor)
        except (OSError, ValueError) as error:
            raise InputError("cannot write {}: {}".format(self.name, reason(error)), ends_run=True)
        except RetriesExhaustedError:
            if not self._saving:
                raise
            self._patience = 0.0  # the next ones do not wait anew
            raise InputError("cannot write {}: locked, or nobody reads it".format(self.name), ends_run=True)

    def _open(self, limits):
        """Return a descriptor, and the size of what is a locked regular file, to be closed; else None."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", getattr(os, "O_NONBLOCK", 0))
        if self._path == "-":
            self._descriptor = 1
        while self._descriptor is None:
            try:
                descriptor = os.open(self._path, flags, self._mode)
            except OSError as error:
                if error.errno != errno.ENXIO:  # a FIFO that nobody reads yet
                    raise
                limits.sleep(TICK)
                continue
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                self._descriptor = descriptor  # whoever reads it takes a close for the end
                break
            try:
                lock_file(descriptor, limits)
                state = os.fstat(descriptor)
                if self.is_file(state):  # while we waited for the lock, it may have been moved away
                    return descriptor, state.st_size
                os.close(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        return self._descriptor, None

    def is_file(self, identity):
        """Tell whether this is the regular file of these fstat results."""
        try:
            named = os.fstat(1) if self._path == "-" else os.stat(self._path)
        except OSError:
            return False
        return (named.st_dev, named.st_ino) == (identity.st_dev, identity.st_ino)

    def close(self):
        if self._descriptor not in (None, 1):
            os.close(self._descriptor)
            self._descriptor = None


def lock_file(descriptor, limits):
    """Lock an open file against our other processes until it is closed. Raises as Limits.check()."""
    while True:
        try:
            try:
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # Windows, where a lock is on bytes from the current position on
                import msvcrt

                os.lseek(descriptor, 0, os.SEEK_SET)
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            return
        except (BlockingIOError, PermissionError):  # the latter is what Windows says of a lock that is taken
            limits.sleep(0.005)
        except OSError:  # a file system without locks
            return


def write_all(descriptor, data, limits):
    """Write bytes; into what may block, such as a pipe, where there is room. Raises as Limits.check()."""
    data, blocks = memoryview(data), not stat.S_ISREG(os.fstat(descriptor).st_mode)
    most = getattr(select, "PIPE_BUF", 512) if blocks else len(data)  # so much fits where poll() sees room
    while data:
        try:
            if blocks:
                wait_until_ready(descriptor, limits)
            data = data[os.write(descriptor, data[:most]):]
        except BlockingIOError:  # another process was faster
            pass


def json_lines(records):
    """Return records as NDJSON; line breaks within one, which are between its tokens, become spaces."""
    return b"".join(
        (record.replace(b"\r", b" ").replace(b"\n", b" ") if b"\n" in record else record) + b"\n"
        for record in records)


# ---- The command runner: a command, then an event on its end; the command runs as if it were alone ---------

COMMAND_DELIVERY = 30.0
HURRIED_DELIVERY = 5.0
KILL_AFTER = 5.0
TIMED_OUT, NOT_EXECUTABLE, NOT_FOUND = 124, 126, 127
PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM")


class CommandResult:
    """How a command (a list) ended. run_command() makes it, and fills it in when the command has ended.

    exit_code: what ours is then. signal: the name of the signal that ended the command, or None. failure: why
    it could not be started, or None.
    """

    def __init__(self, command):
        self.name = display(os.path.basename(command[0]) or command[0], "-") or "''"
        self.started_at, self._started, self._seconds = utc_timestamp(time.time()), time.monotonic(), 0.0
        self.exit_code, self.timed_out, self.signal, self.failure = None, False, None, None

    def not_started(self, error):
        self.exit_code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        self.failure = reason(error)

    def ended(self, returncode, timed_out):
        """Note how the command ended; returncode is negative for a signal."""
        self._seconds, self.timed_out = time.monotonic() - self._started, timed_out
        if returncode < 0:
            known = {number.value: number.name for number in signal.Signals}
            self.signal = known.get(-returncode, "signal {}".format(-returncode))
        self.exit_code = TIMED_OUT if timed_out else returncode if returncode >= 0 else 128 - returncode

    def event(self):
        """Return the event about it, without what the defaults have to give."""
        host = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")
        status = "timeout" if self.timed_out else "failed" if self.exit_code else "ok"
        how = ("could not be run: " + self.failure if self.failure else "timed out" if self.timed_out else
               "was terminated by " + self.signal if self.signal else "exited with {}".format(self.exit_code))
        metadata = {"command": self.name, "duration_ms": int(self._seconds * 1000),
                    "started_at": self.started_at, "host": host}
        metadata.update({"signal": self.signal} if self.signal else {"exit_code": self.exit_code})
        return {"severity": "info" if status == "ok" else "error", "status": status, "metadata": metadata,
                "message": "{} {} after {:.1f}s".format(self.name, how, self._seconds)}


def run_command(command, timeout, limits, delivery_time):
    """Run a command (a list) with our own streams and descriptors; return its CommandResult.

    timeout: the seconds after which it is sent TERM, and KILL 5 s later; or None. Signals sent to us are
    passed on. From its end on, limits leave delivery_time (seconds) for the report, or 5 s after a signal.
    """
    result, run = CommandResult(command), run_on_windows if os.name == "nt" else run_on_posix
    numbers = {getattr(signal, name) for name in PASSED_ON if hasattr(signal, name)}
    passed_on = {number for number in numbers if signal.getsignal(number) != signal.SIG_IGN}  # not with nohup

    def start_delivery():
        limits.deadline = limits.clock() + delivery_time
        for number in passed_on:
            signal.signal(number, hurry_delivery)

    def hurry_delivery(number, frame):
        limits.deadline = min(limits.deadline, limits.clock() + HURRIED_DELIVERY)

    try:
        result.ended(*run(command, timeout, passed_on, start_delivery))
    except (OSError, ValueError) as error:
        result.not_started(error)
    return result


def run_on_posix(command, timeout, passed_on, at_end):
    """Run a command; return its exit code, or -n for signal n, and whether it took longer than timeout.

    passed_on: the signals that are passed on. at_end: called before signals may come in again.
    """
    # Blocked before the command starts and taken one by one: none is lost in between, none interrupts us.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on | {signal.SIGCHLD, signal.SIGALRM})
    on_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a child that is ignored leaves no status
    environ, ignored = entry_state()
    try:
        reader, writer = os.pipe()
        canary, early = Canary(passed_on), signal.sigpending()
        pid = os.fork()
        if pid == 0:
            try:
                for number in passed_on:
                    signal.signal(number, signal.SIG_DFL)
                signal.signal(signal.SIGCHLD, on_child)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                exec_command(command, environ, ignored)
            except (OSError, ValueError) as error:
                os.write(writer, str(getattr(error, "errno", 0) or 22).encode())
            finally:
                os._exit(NOT_EXECUTABLE)
        os.close(writer)
        returncode, timed_out = wait_for(pid, timeout, passed_on, canary, early)
        number = int(os.read(reader, 10) or 0)  # an exec that succeeds closes the pipe
        os.close(reader)
        if number:
            raise OSError(number, os.strerror(number))
        return returncode, timed_out
    finally:
        at_end()
        signal.signal(signal.SIGCHLD, on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def wait_for(pid, timeout, passed_on, canary, early):
    """Pass signals on to a process until it ends; return as run_on_posix(). early: those it has missed."""

    def send(number, sent_to_group=False):
        try:
            if not sent_to_group or os.getpgid(pid) != os.getpgrp():
                os.kill(pid, number)
        except OSError:  # a setuid command takes no signals from us; it is waited for all the same
            pass

    timed_out, deadline = False, None if timeout is None else time.monotonic() + timeout
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            canary.end()
            return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), timed_out
        canary.died()
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        number = next_signal(passed_on | {signal.SIGCHLD, signal.SIGALRM}, left)
        if number is None:
            send(signal.SIGKILL if timed_out else signal.SIGTERM)
            send(signal.SIGCONT)  # a stopped process would not hear of TERM
            deadline, timed_out = None if timed_out else deadline + KILL_AFTER, True
        elif number in passed_on:
            send(number, canary.died(0.2) and number not in early)
            early.discard(number)


def next_signal(numbers, seconds):
    """Return the next of the blocked signals, or None after that many seconds (None: wait for ever)."""
    if hasattr(signal, "sigtimedwait"):
        info = signal.sigwaitinfo(numbers) if seconds is None else signal.sigtimedwait(numbers, seconds)
        return info and info.si_signo
    if seconds is None:
        return signal.sigwait(numbers)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))  # macOS: an alarm ends the wait
    number = signal.sigwait(numbers)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return None if number == signal.SIGALRM else number


class Canary:
    """A process of our group, which dies of what is sent to the whole group, and so to the command as well.

    run_on_posix() makes it, so that the command gets no second copy from us of what a terminal, timeout(1) or
    `kill -PGID` sent. It is a cat that reads a pipe: pkill(1) does not take it for us, and it
    ends when we do, however that may be.
    """

    def __init__(self, signals):
        self._signals, self._pid, self._writer, self._died = signals, None, None, -1.0
        self._start()

    def _start(self):
        try:
            reader, self._writer = os.pipe()
            self._pid = os.fork()
        except OSError:  # no room for one
            return
        if self._pid == 0:
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
                for descriptor in (0, 1):
                    os.dup2(reader, descriptor)
                    os.set_inheritable(descriptor, True)
                # It must not hold a lock or a pipe open.
                os.closerange(2, 1 + max(map(int, os.listdir("/dev/fd"))))
                os.chdir("/")
                os.execve("/bin/cat", ["cat"], {})
            finally:
                os._exit(0)
        os.close(reader)

    def died(self, seconds=0.0):
        """Return whether a signal killed it, just now or within so many seconds; if so, start another."""
        until = time.monotonic() + seconds
        while True:
            ended, status = os.waitpid(self._pid, os.WNOHANG) if self._pid else (0, 0)
            if ended:
                os.close(self._writer)
                self._pid = None
                if os.WIFSIGNALED(status):
                    self._died = time.monotonic()
                    self._start()
            if time.monotonic() < self._died + 0.02:  # our own copy, or timeout(1)'s second
                return True
            if time.monotonic() >= until:
                return False
            time.sleep(0.002)

    def end(self):
        if self._pid:
            os.close(self._writer)
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def run_on_windows(command, timeout, passed_on, at_end):
    """run_on_posix() for Windows, where Ctrl-C reaches every process of the console and there is no TERM."""
    import subprocess

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process, timed_out = subprocess.Popen(command, close_fds=False), False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.kill()
        return process.wait(), timed_out
    finally:
        at_end()


def die_of(number):
    """End this process by a signal's default action, without a core; return where it cannot be (PID 1)."""
    try:
        import resource

        # 1, since the kernel starts the program in core_pattern even where the limit is 0.
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    except (ImportError, AttributeError, OSError, ValueError):  # Windows has none of these
        pass


def report_command(settings, reporter):
    """Run the command of the settings and report how it ended; return the exit code, the command's own.

    Where a signal ended the command, this process dies of it too.
    """
    limits, error, command = Limits(), settings.trouble, settings.command
    settings["progress"] = False
    reporter.configure(settings, limits)
    try:
        if error is None:
            event_from_flags(settings, CommandResult(command).event())
            if not settings["api-key-file"] and not settings["output"]:  # a file may be a pipe
                read_key(settings, limits, reporter)
    except Exception as failure:  # whatever it is, the command runs
        error = failure if isinstance(failure, PackTrackError) else internal_error(failure)
    if error is not None:
        reporter.error("{}; running the command without reporting".format(error))
    delivery_time = settings["deadline"] or COMMAND_DELIVERY
    result = run_command(command, settings["command-timeout"], limits, delivery_time)
    if result.failure:
        reporter.error("cannot run {}: {}".format(display(command[0], "-") or result.name, result.failure))
    if error is None:
        error = deliver_result(result, settings, limits, reporter)
    handle_signals(signal.SIG_IGN, PASSED_ON)  # all is said: nothing is to come between this and the end
    if result.signal and not result.timed_out:
        die_of(result.exit_code - 128)
    return error.exit_code if settings["strict"] and error and not result.exit_code else result.exit_code


def deliver_result(result, settings, limits, reporter):
    """Send the event about a command's end; return the error, which has been logged, or None."""
    delivery, event = None, result.event()
    if settings.from_flag("message"):
        event["message"] = settings["message"]
    try:
        delivery = make_delivery(settings, limits, reporter)
        deliver_event(event_from_flags(settings, event), delivery)
        delivery.finish()
        error = delivery.error
    except Exception as failure:
        error = failure if isinstance(failure, PackTrackError) else internal_error(failure)
    if error is not None:
        text = "could not report the result of {}: {}".format(result.name, error)
        if delivery and delivery.kept:
            text += "; event kept in {}".format(display(settings["undelivered"], "-"))
        elif delivery and delivery.unkept:
            text += "; event could not be saved to {}: {}".format(
                display(settings["undelivered"], "-"), delivery.unkept_why.rpartition(": ")[2])
        reporter.error(text)
    return error
# ---- Reporting: the only writer to the standard streams ----------------------------------------------------

MOST_WARNINGS = 20
SHORTEST_SECRET = 6


class Reporter:
    """Writes to the standard streams, without secrets; a stream that is closed or full changes no verdict.

    Made by main; every thread may write with it. limits: what ends the waiting for room in a pipe.
    """

    def __init__(self, argv, environ):
        self.verbose, self.limits, self._secrets, self._warnings = False, Limits(), [], 0
        self._progress = self._terminal = self._line_open = False
        self._started = self._shown = time.monotonic()
        self.hide(environ.get("PACKTRACK_API_KEY"))
        for word, value in zip(argv, argv[1:] + [""]):
            self.hide(value if word == "--api-key" else word[10:] if word.startswith("--api-key=") else "")

    def hide(self, secret):
        """Cut a secret out of all that is written from now on; but one so short that any text holds it."""
        if secret and len(secret) >= SHORTEST_SECRET:
            self._secrets.append(secret)

    def configure(self, settings, limits):
        self.verbose, self.limits = settings["verbose"], limits
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        shows = self._terminal if settings["progress"] is None else settings["progress"]
        self._progress = shows and bool(settings["file"] or settings["stdin"])

    def out(self, text):
        """Write what was asked for to standard output. Raises InputError where it cannot be written."""
        try:
            if sys.stdout is None:
                raise OSError("it is closed")
            self._write(sys.stdout, text)
        except BrokenPipeError:  # the reader has seen enough
            pass
        except (OSError, ValueError) as error:
            raise InputError("cannot write to standard output: {}".format(reason(error)))

    def log(self, text, line="{}: {}\n"):
        """Write a line to standard error."""
        line, self._line_open = "\r\x1b[K" * self._line_open + line, "\n" not in line
        try:
            self._write(sys.stderr, line.format(PROGRAM, text))
        except (OSError, ValueError, AttributeError):  # closed or full; None, if closed from the start
            pass

    def error(self, text):
        self.log("error: " + text)

    def trace(self, text):
        if self.verbose:
            self.log(text)

    def warn(self, text):
        """Log a failure that does not end the run; of many, only the first."""
        self._warnings += 1
        if self._warnings <= MOST_WARNINGS:
            self.log(text if self._warnings < MOST_WARNINGS else "further failures are only counted")

    def progress(self, delivery):
        """Show how far a Delivery is, after the first second."""
        now = time.monotonic()
        seconds, pause = now - self._started, 0.2 if self._terminal else 1
        if not self._progress or seconds < 1 or now - self._shown < pause:
            return
        self._shown = now
        text = "{} record{} read".format(delivery.read, "" if delivery.read == 1 else "s")
        if delivery.delivered:
            text += ", {} delivered, {:.0f}/s".format(delivery.delivered, delivery.delivered / seconds)
        if delivery.total:
            text += ", {:.0f} %".format(100.0 * (delivery.delivered + delivery.undelivered) / delivery.total)
        if self._terminal:
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            self.log(text[:width - 1], "{1}")
        else:
            self.log(text)

    def finish(self, error, delivery):
        """Log how the run ended: the error or None, with what its Delivery (or None) has accounted for."""
        if error is not None:
            usage = "\n" + SHORT_USAGE.rstrip() if error.kind == "usage" else ""
            self.error("{}{}{}".format(error, account(delivery) if delivery is not None else "", usage))
        elif self._line_open:
            self.log("", "{1}")

    def summarize(self, error, code, delivery):
        """Print the line of --json; where that cannot be, a line on standard error says so."""
        summary = {"ok": code == 0, "exit_code": code}
        for name in ("read", "delivered", "undelivered", "invalid"):
            summary[name] = getattr(delivery, name, 0)
        for name in ("requests", "retries", "bytes_sent"):
            summary[name] = delivery.sum(name) if delivery is not None else 0
        summary["seconds"] = round(time.monotonic() - self._started, 3)
        summary["error"] = None if error is None else {
            "kind": error.kind, "message": error.args[0], "status": error.status, "where": error.where}
        try:
            self.out(json.dumps(summary) + "\n")
        except InputError as failure:
            self.error("the --json summary is lost: {}".format(failure))

    def _write(self, stream, text):
        data = redact(text, self._secrets).encode("utf-8", "backslashreplace")
        try:
            write_all(stream.fileno(), data, self.limits)
        except (Interrupted, RetriesExhaustedError):
            raise OSError("nobody reads it")


def account(delivery):
    """Return the end of the failure line: what was delivered and what was not."""
    text, read = "", delivery.read
    if read > 1 and delivery.invalid and not (delivery.keep_going or delivery.sum("requests")):
        text = "; {} records read, {} invalid, none sent".format(read, delivery.invalid)
    elif read > 1:
        text = "; delivered {} of {}".format(delivery.delivered, read)
        if delivery.ranges:
            text += "; not delivered: " + describe_ranges(delivery.ranges)
        elif delivery.undelivered:
            text += "; {} not delivered".format(delivery.undelivered)
        if delivery.invalid:
            text += "; {} invalid".format(delivery.invalid)
    if delivery.unkept:
        text += "; {} not saved: {}".format(delivery.unkept, delivery.unkept_why)
    return text


def internal_error(error):
    """Return the PackTrackError for an exception that should not have been possible, or of a poor Python."""
    if isinstance(error, MemoryError):
        return RetriesExhaustedError("out of memory", kind="memory", ends_run=True)
    if isinstance(error, ImportError):
        return PackTrackError(MISSING_MODULE.format(error.name), kind="python", ends_run=True)
    origin = error.__traceback__
    while origin.tb_next is not None:
        origin = origin.tb_next
    return PackTrackError("internal error: {} at line {}; please report it".format(
        type(error).__name__, origin.tb_lineno), kind="internal", ends_run=True)


# ---- main: from settings to what does the work -------------------------------------------------------------


def open_appender(settings, name, mode, limits, source, error_class, saving=False):
    """Return the Appender of an option that names a file, or None; check it before anything is sent."""
    if not settings[name]:
        return None
    where = settings.sources[name]
    try:
        appender = Appender(settings[name], mode, limits, saving)
    except InputError as error:
        raise error_class(str(error), where=where)
    if source is not None and source.is_file and appender.is_file(source.identity):
        raise InvalidError("is the input itself; name another file", where=where)
    return appender


def read_key(settings, limits, reporter):
    """Return the API key, from its option or from the first line of its file. Raises InvalidError."""
    key, flag = settings["api-key"], settings.sources.get("api-key-file")
    if settings["api-key-file"]:
        text = b""
        try:
            source = Source(settings["api-key-file"], limits)
            for chunk in source.chunks():
                text += chunk
                if b"\n" in chunk or len(text) > BLOCK:
                    break
            source.close()
            key = text.split(b"\n")[0].decode("utf-8").strip()
            if not key:
                raise InputError("the first line of {} is empty".format(source.name))
            parse_header(key)
        except InputError as error:
            raise InvalidError(str(error), where=flag)
        except ValueError:
            why = "the first line of {} contains characters not allowed in a header (not shown)"
            raise InvalidError(why.format(source.name), where=flag)
        if source.is_file and os.name != "nt" and source.identity.st_mode & 0o077:
            reporter.trace("key file is readable by others; chmod 600 {}".format(source.name))
    if not key:
        raise InvalidError("no API key: set PACKTRACK_API_KEY, or use --api-key-file or --api-key")
    if len(key) < SHORTEST_SECRET:
        reporter.trace("the API key is too short to be redacted from messages")
    reporter.hide(key)
    return key


def make_clients(settings, limits, reporter, number=1):
    """Return a list of Clients that the settings describe."""
    values = {name.replace("-", "_"): settings[name] for name in (
        "base-url", "timeout", "retries", "backoff-initial", "backoff-max", "jitter", "user-agent", "gzip",
        "health-path")}
    key = read_key(settings, limits, reporter)
    source = settings.sources.get("api-key", settings.sources.get("api-key-file"))
    return [Client(key, key_source=source, limits=limits, trace=reporter.trace if reporter.verbose else None,
                   **values) for _ in range(number)]


def make_delivery(settings, limits, reporter, source=None):
    """Return the Delivery that the settings describe. source: the input, which it must not write to."""
    clients, output, undelivered, probe = (), None, None, None
    if not settings["dry-run"]:
        undelivered = open_appender(settings, "undelivered", 0o600, limits, source, InvalidError, saving=True)
        output = open_appender(settings, "output", 0o666, limits, source, InputError)
        if output is None:
            number = settings["connections"] if source is not None else 1
            clients = make_clients(settings, limits, reporter, number)
            probe = check_health if settings["health-enable"] else None
    return Delivery(limits, reporter, clients, output, undelivered, settings["keep-going"],
                    settings["idempotency-key"], probe)


def event_from_flags(settings, event):
    """Return the record of an event that the event options complete. Raises InvalidError that names flags."""
    defaults = event_defaults(settings)
    missing = [option for option in OPTIONS if option.field in REQUIRED
               and field_value(event, option.field) is None and field_value(defaults, option.field) is None]
    if missing:
        raise InvalidError("missing required {} (or {}){}".format(
            ", ".join(option.flag for option in missing), ", ".join(option.variable for option in missing),
            stdin_hint()))
    return dump_json(complete_event(event, defaults, utc_timestamp(time.time())))


def deliver_event(record, delivery):
    """Deliver one event, the bytes of its JSON."""
    delivery.single, delivery.total = True, 1
    delivery.count_read([record])
    send_batches(iter([([record], [1])]), delivery)


def deliver_input(settings, limits, delivery, source):
    """Deliver what a Source holds: the chain, from end to end."""
    reader = Reader(source, settings["ndjson"], event_defaults(settings), settings["allow-empty"])
    streams = settings["async"] and not settings["dry-run"]
    # What came through a pipe is nobody else's: once it is refused, it is read to its end to be saved.
    keeps_rest = delivery.undelivered_file is not None and not source.is_file
    runs = accept_valid(reader, delivery, streams, keeps_rest)
    if settings["dry-run"]:
        for _ in runs:
            pass
        return
    if streams:
        runs = read_ahead(runs, delivery, limits, settings["queue-capacity"], settings["flush-interval"],
                          not settings["no-flush"])
    else:
        runs = keep_until_valid(runs, delivery, keeps_rest, source.name)
    send_batches(cut_batches(runs, settings["batch-size"], settings["max-batch-bytes"]), delivery)


def run(settings, limits, reporter):
    """Do what the settings say; return the Delivery. Raises PackTrackError."""
    if not (settings["file"] or settings["stdin"]):
        record, source = event_from_flags(settings, {}), None
    else:
        source = Source("-" if settings["stdin"] else settings["file"], limits)
    delivery = make_delivery(settings, limits, reporter, source)
    try:
        if source is not None:
            deliver_input(settings, limits, delivery, source)
        elif not settings["dry-run"]:
            deliver_event(record, delivery)
    except Exception as error:  # what was read is still to be accounted for
        delivery.note(error if isinstance(error, PackTrackError) else internal_error(error), ends=True)
    delivery.finish()
    return delivery


def check_health(client, reporter):
    """Log the service's health; return an InvalidError, whose exit code is 1, unless it is healthy."""
    try:
        client.health_check()
        reporter.trace("the service is healthy")
        return None
    except PackTrackError as error:
        why = "the service is not healthy: {}".format(error)
        reporter.trace(why)
        return InvalidError(why, status=error.status, kind="unhealthy")


def handle_signals(handler, names=("SIGINT", "SIGTERM", "SIGHUP")):
    """Set the handler of signals, but for those that are ignored, as by nohup."""
    for number in {getattr(signal, name, signal.SIGTERM) for name in names}:  # Windows has no HUP
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def stdin_hint():
    """Return words for who forgot --stdin: standard input is a pipe or a file; else nothing."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return ""
    return "; standard input was not read: add --stdin" if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) else ""


def wants_json(argv, environ):
    """Tell whether a command line that was refused asked for --json."""
    if "--" in argv:
        return False
    asked = [word for word in argv if word in ("--json", "--no-json")]
    return asked[-1] == "--json" if asked else environ.get("PACKTRACK_JSON", "").lower() in TRUE


def main(argv=None):
    """Run the program with the arguments argv (by default the process's own) and return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    reporter, settings, limits, delivery, error = Reporter(argv, os.environ), None, Limits(), None, None
    try:
        settings = resolve(argv, os.environ)
        if settings["help"] or settings["version"] or settings["completion"]:
            reporter.out(help_text(settings["help"] == "long") if settings["help"] else
                         completion(settings["completion"]) if settings["completion"] else
                         "{} {}\n".format(PROGRAM, VERSION))
            return 0
        if settings.command is not None:
            return report_command(settings, reporter)
        limits = Limits(settings["deadline"], patience=2 if settings["async"] else 1)
        reporter.configure(settings, limits)
        handle_signals(limits.handle_signal)
        if not argv and not any(settings[name] for name in ("message", "file", "stdin", "health")):
            raise InvalidError("nothing to send" + stdin_hint(), kind="usage")
        gc.disable()  # records make no cycles, and to look for some among millions takes a third of the time
        if settings["health"]:
            delivery = Delivery(limits, reporter, make_clients(settings, limits, reporter))
            error = check_health(delivery.clients[0], reporter)
            delivery.finish()
        else:
            delivery = run(settings, limits, reporter)
            error = delivery.error
    except PackTrackError as refusal:
        error = refusal
    except Interrupted:
        pass
    except KeyboardInterrupt:  # before it was handled
        limits.signals.append(signal.SIGINT)
    except Exception as failure:
        error = internal_error(failure)
    handle_signals(signal.SIG_IGN)  # from here on the verdict stands
    ended_by = limits.signals[0] if limits.signals else None
    if ended_by:
        error = PackTrackError("interrupted ({})".format(signal.Signals(ended_by).name), kind="interrupted")
    code = 128 + ended_by if ended_by else 0 if error is None else error.exit_code
    reporter.finish(error, delivery)
    if settings["json"] if settings is not None else wants_json(argv, os.environ):
        reporter.summarize(error, code, delivery)
    if ended_by:
        die_of(ended_by)
    return code


if __name__ == "__main__":
    sys.exit(main())
