#!/usr/bin/env python3
"""Send PackTrack events from a shell: from flags, a JSON file, a JSON array or NDJSON, with retries.

Exit codes:
  0  all events were delivered (with --dry-run and --output: validated and written)
  1  invalid arguments or events; without --async and --keep-going nothing was sent
  2  rejected by the server, or another permanent failure
  3  retries or deadline exhausted; may succeed later
  4  input could not be read or parsed, or output could not be written
  128+n  terminated by signal n, after the same accounting (130 INT, 143 TERM)

Programs may import Client. All of it runs on the standard library of CPython 3.6 or later.
"""

import _thread
import codecs
import collections
import errno
import gc
import io
import os
import stat
import sys
import time

VERSION = "1.0.0"
PROGRAM = "packtrack-logger"

# ---- A poor Python: what runs without json, even on 2.7; the archive's __main__.py holds a copy of this ----

MISSING_MODULE = ("this Python has no module {}: install python3 "
                  "(Debian: apt-get install python3; python3-minimal is not enough)")


def entry_state():
    """Return the environment and the mask of ignored signals as they were before CPython came."""
    ignored, parent = 0, "/proc/%d/" % os.getppid()
    try:
        with open("/proc/self/environ", "rb") as file:
            environ = dict(pair.split(b"=", 1) for pair in file.read().split(b"\0") if pair.find(b"=") > 0)
    except EnvironmentError:  # macOS has no /proc
        environ = dict(getattr(os, "environb", os.environ))
        if not environ.get(b"LC_ALL") and environ.get(b"LC_CTYPE") in (b"C.UTF-8", b"C.utf8", b"UTF-8") and (
                environ.get(b"LANG", b"C") in (b"", b"C", b"POSIX")):
            del environ[b"LC_CTYPE"]  # PEP 538 sets it
    try:  # CPython ignores PIPE and XFSZ: what they were only our parent, whose mask we inherited, can tell
        with open(parent + "status") as file:
            status = dict(line.split(":\t", 1) for line in file if ":\t" in line)
        readable = os.access(parent + "exe", os.R_OK)  # another user's is not
        name = os.path.basename(os.readlink(parent + "exe")) if readable else status["Name"]
        if not name.startswith(("python", "node", "sshd", "sudo", "tmux")):  # they spare their children
            ignored = int(status["SigIgn"], 16)
    except (EnvironmentError, KeyError, ValueError):
        pass
    return environ, ignored


def exec_command(command, environ, ignored):
    """Become the command (a list), found as execvp(3) finds it. Raises OSError."""
    signal = __import__("_signal" if sys.version_info >= (3, 5) else "signal")  # it needs no other module
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN if ignored >> (number - 1) & 1 else signal.SIG_DFL)
    name, failure = command[0], OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    folders = [""] if "/" in name else os.environ.get("PATH", "/bin:/usr/bin").split(":") if name else []
    for path in [os.path.join(folder, name) for folder in folders]:
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


def stand_aside(why, code=1):
    """Log why the program cannot run, run a command after `--` in its place unless it failed, and exit."""
    command = sys.argv[sys.argv.index("--") + 1:] if code == 1 and "--" in sys.argv else []
    why += "; running the command without reporting" if command else ""
    try:
        os.write(2, ("packtrack-logger: error: %s\n" % why).encode("ascii", "replace"))
    except OSError:
        pass
    try:
        if command and os.name == "nt":  # Windows
            code = __import__("subprocess").call(command)
        elif command:
            exec_command(command, *entry_state())
    except OSError as error:
        stand_aside("cannot run %s: %s" % (command[0], error.strerror), 126 + (error.errno == errno.ENOENT))
    os._exit(code)


try:
    import argparse
    import json
    import re
    import select
    import signal
except ImportError as error:
    if __name__ != "__main__":  # a program that imports this module gets the error
        raise
    stand_aside(MISSING_MODULE.format(error.name))


# ---- Errors: one class per exit code; a message is one line, without secrets -------------------------------

class PackTrackError(Exception):
    """What this module raises. kind: a word for programs. ends_run: whether the rest would fail alike."""

    exit_code, kind, is_logged = 2, "error", False

    def __init__(self, message, where=None, status=None, kind=None, ends_run=False):
        super().__init__(message)
        self.where, self.status, self.kind, self.ends_run = where, status, kind or self.kind, ends_run

    def __str__(self):
        return "{}: {}".format(self.where, self.args[0]) if self.where else self.args[0]

    def detached(self):
        """Return it without the frames it passed: they hold a batch, and it, for ever where gc is off."""
        self.__traceback__ = self.__context__ = None
        return self


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

TICK, BURST, LONGEST_SAVING, LONGEST_START = 0.1, 0.2, 30.0, 5.0  # seconds


class Limits:
    """What ends a run: a deadline (seconds or None), and signals: one the reading, `patience` the sending."""

    def __init__(self, seconds=None, patience=1, clock=time.monotonic, pause=time.sleep):
        self.clock, self._pause, self.patience = clock, pause, patience
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
        if len(self.signals) >= (1 if reading else self.patience) or reading and self.over:
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
            self._pause(self.left(max(0.0, min(TICK, until - self.clock()))))  # time passes between the two

    def saving(self, seconds):
        """Return the Limits for saving the undelivered: past the deadline, and until a second signal."""
        if self.deadline is not None:
            seconds = min(max(self.deadline - self.clock(), 0.5), seconds)
        limits = Limits(seconds, patience=2, clock=self.clock, pause=self._pause)
        limits.signals = self.signals
        return limits


def start_thread(work):
    """Run work() in a daemon thread; return a lock that is released at its end. Raises RuntimeError."""
    import threading  # here first: it takes the thread that imports it for the main one
    begun, ended = threading.Semaphore(0), threading.Lock()

    def run():
        try:
            with ended:
                begun.release()
                work()
        except MemoryError:  # what is left undone is accounted for at the end
            pass

    _thread.start_new_thread(run, ())
    if not begun.acquire(True, LONGEST_START):  # no memory: threading.Thread.start() waits for ever then
        raise RuntimeError("the thread did not start")
    return ended


# ---- Options: one table, its value parsers, and resolve(argv, environ); no input is read here --------------

UNITS = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
SEVERITIES = ("debug", "info", "warn", "error")
STATUSES = ("ok", "failed", "skipped", "timeout", "retrying", "unknown")
TRUE, FALSE = ("1", "true", "yes", "y", "on"), ("0", "false", "no", "n", "off")
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
        if text in choices:
            return text
        raise ValueError('must be one of {} (got "{}"){}'.format(
            ", ".join(choices), printable(text), nearest(text, choices, '; did you mean "{}"?')))

    return (parse, metavar) + choices


def parse_duration(text, zero=True):
    """A duration as in Go ("1m30s", "1.5h", "500us") or a bare number of seconds; return seconds."""
    pairs = re.findall(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([a-z\u00b5\u03bc]*)", text)
    units = {"": 1.0} if len(pairs) == 1 and not pairs[0][1] else UNITS
    if not pairs or "".join(map("".join, pairs)) != text or any(unit not in units for _, unit in pairs):
        raise ValueError('invalid duration "{}": use e.g. 500ms, 15s, 1m30s'.format(printable(text)))
    seconds = sum(float(number) * units[unit] for number, unit in pairs)
    if seconds > 8784 * 3600 or not (seconds or zero):
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
    host, port = split_host(authority, "80")
    for is_wrong, why in (
            ("@" in text, "must not contain a user or password (value not shown)"),
            (not scheme, "must start with http:// or https:// (e.g. https://pack.example.com)"),
            ("?" in text or "#" in text, "must not contain a query or fragment"),
            (not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536,
             "port must be a number from 1 to 65535"),
            (path.rstrip("/").endswith("/api/ingest"), "must not include /api/ingest")):
        if is_wrong:
            raise ValueError(why)
    try:
        name = host if max(host, default="") <= "~" else host.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    if not re.fullmatch(HOST, name):
        kind = "IPv6 address in brackets" if host.startswith("[") else "host name"
        raise ValueError(("invalid " if host else "missing ") + kind)
    return scheme + "://" + name + authority[len(host):] + parse_path(path).rstrip("/")


def split_host(text, default_port):
    """Return host and port, as text, of "host", "host:port" or "[address]:port"."""
    return re.fullmatch(r"(\[.*\][^:]*|[^:]*)(?::(.*))?", text, re.DOTALL).groups(default_port)


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
        self.about = help + (" [default {}]".format(default) if default else "")  # for who reads it alone
        self.field, self.secret, self.is_boolean = field, secret, kind is BOOLEAN
        self.parse, self.metavar, *self.choices = kind
        self.flag, self.path, self.variable, self.opposite = "--" + name, kind in (PATH, FILE), None, None
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
    """The value of each option by its name; defaults are parsed when asked for. Made by resolve()."""

    def __init__(self, command):
        super().__init__()
        self.sources, self.command = {}, command  # sources: {name: the flag or variable that gave it}
        self.trouble = None  # the first error that keeps a command from being reported, not from running

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
    words, errors, command, bare, rest = [], [], None, None, iter(argv)
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
        text = text if equals else "true" if bare else next(rest, None)
        if text is None:
            errors.append(UsageError("needs a value ({})".format(option.metavar), where=flag))
            break
        # The value repeats the flag: argparse does not keep it, refuses a dash first, and drops "--".
        words.append("{0}={0}={1}".format(flag, text))
    # The help is ours. A fixed width keeps argparse from importing shutil to measure the terminal.
    parser = argparse.ArgumentParser(
        add_help=False, formatter_class=lambda prog: argparse.HelpFormatter(prog, width=80))
    for option in {BY_FLAG[word.partition("=")[0]] for word in words}:  # all would take argparse long
        parser.add_argument(
            *option.flags, dest=option.name, action="append", type=lambda text: text.split("=", 1))
    return vars(parser.parse_args(words)), command, errors


def refuse_word(word, bare):
    """Return the error for a word that is no flag; bare: the boolean flag before it, or None."""
    # It may be, or hold, a secret: of a flag no more is shown than can be its name, of anything else nothing.
    if not word.startswith("-") or word == "-":
        if bare:
            return UsageError("takes no value (to read a file: --file PATH)", where=bare)
        return InvalidError("unexpected argument" + (
            ": to send a file use --file PATH (one per run)" if os.path.exists(word) else
            " (hidden, it may be a secret): quote values that contain spaces, read files with --file, put -- "
            "before a command"))
    shown = re.match("--?[A-Za-z0-9-]{0,198}", word).group()[:None if word.startswith("--") else 2]
    if shown in BY_FLAG:
        return UsageError("and what follows must be separate words", where=shown)
    if any(option.secret and shown.startswith(option.flag) for option in OPTIONS):
        shown = "--api-key..."
    return InvalidError("unknown flag {}{}; see --help".format(shown, nearest(word.split("=")[0], BY_FLAG)))


def read_option(option, source, text):
    """Return the value of an option from its text; source, the flag or variable, is named by errors."""
    if text == "" and (option.field is None or option.field in REQUIRED):  # else empty is absent
        raise UsageError("is empty (is the variable set?)", where=source)
    try:  # text is UTF-8, whatever the locale took it for
        value = option.parse(text if option.path else os.fsencode(text).decode("utf-8"))
    except (ValueError, InputError) as error:
        why = "must be UTF-8" if isinstance(error, UnicodeError) else str(error)
        raise InvalidError(why, where=source)
    return not value if source == option.opposite else value


def resolve(argv, environ):
    """Return the Settings of a command line and an environment; a flag wins. Raises InvalidError."""
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
        if any(given.get(name, [("", "")])[-1][0] == "--" + name for name in pair):
            ignored += pair
    found = {option.name: (option.variable, environ[option.variable]) for option in OPTIONS
             if option.variable and option.name not in ignored and environ.get(option.variable)}
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
    command, sources, alone = settings.command, settings.sources, "cannot be combined with a command"
    reads_stdin = command or settings["stdin"] or settings["file"] in STANDARD_INPUT
    files = [settings[name] for name in ("output", "undelivered") if settings[name]]
    keyless = settings["dry-run"] or settings["output"] or settings["health"]
    if settings["api-key"]:
        settings["api-key-file"] = None
    rules = [
        (("file",), not settings["stdin"], "and {} cannot be used together".format(sources.get("stdin"))),
        (NOT_WITH_COMMAND + ("dry-run",), not command, alone),
        (("output",), not command or settings["output"] != "-", "- " + alone),
        (("output",), len(files) < 2 or len(set(map(os.path.realpath, files))) == 2,
         "and {} name the same file".format(sources.get("undelivered"))),
        (("severity", "status"), not command, alone + ", whose outcome sets it"),
        (("api-key-file",), keyless or not reads_stdin or settings["api-key-file"] not in STANDARD_INPUT,
         "cannot be standard input: the {} it".format("command reads" if command else "events come from")),
        (("ndjson", "allow-empty"), settings["file"] or settings["stdin"], "needs --file or --stdin"),
        (("no-flush",), settings["async"], "needs --async"),
        (("command-timeout", "strict"), command, "needs a command after --"),
    ]
    for name, why in [(name, why) for names, holds, why in rules if not holds for name in names]:
        if settings[name]:
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
SHORT_FOOTER = ("\nFlags can be set as variables: --api-key as PACKTRACK_API_KEY.\n"
                "All flags, variables, exit codes and examples: packtrack-logger --help\n")
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
    return " ".join("".join(c if c.isprintable() else " " for c in text[:1 << 16]).split())[:200]


def nearest(word, known, hint=' (did you mean "{}"?)'):
    """Return a hint at the one of the known words that was probably meant, or nothing."""
    import difflib
    word = word[:200].lower()  # difflib takes time by the square, and memory
    found = [name for name in known if word == name or word in ALIASES.get(name, "").split()] or (
        difflib.get_close_matches(word, known, 1))
    return hint.format(found[0]) if found else ""


def help_text(long):
    """Return --help, or -h if not long: at most 80 columns, and never a value of the environment."""
    import textwrap

    def entry(name, text, width=26):
        text = textwrap.fill(text, 80 - width, break_long_words=False, break_on_hyphens=False)
        text = textwrap.indent(text, " " * width)
        return name.ljust(width) + text[width:] if len(name) < width else name + "\n" + text

    lines = [SUMMARY, "", USAGE.rstrip()]
    for title, options in GROUPS if long else [("Most used flags", [BY_NAME[name] for name in ESSENTIAL])]:
        lines += ["", title + ":"]
        for option in options:
            name = " ".join(filter(None, (option.short and option.short + ",", option.flag, option.metavar)))
            facts = ", ".join(filter(None, (option.variable, option.default and "default " + option.default)))
            lines.append(entry("  " + name, option.help + (" [{}]".format(facts) if long and facts else "")))
    if long:
        codes = re.findall(r"^  (\S+)  (.+)$", __doc__ or "", re.MULTILINE)
        lines += [FOOTER] + [entry("  " + code, meaning, 10) for code, meaning in codes]
        lines += [entry("", "With a COMMAND: the command's own, and 124 after --command-timeout.", 10)]
    return "\n".join(lines) + "\n" + (EXAMPLES if long else SHORT_FOOTER)


def bash_completion():
    """For bash 4 or later: only its compopt quotes the names of files."""
    cases = ["    {}) {} ;;\n".format(option.flag, "compopt -o default; return" if option.path else
                                      'words="{}"'.format(" ".join(option.choices)))
             for option in OPTIONS if option.metavar]
    words = " ".join(filter(None, [flag for option in OPTIONS for flag in (option.flag, option.short)]))
    return """_packtrack_logger() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words="%s"
    [ "$prev" != -- ] || COMPREPLY=($(compgen -c -- "$cur"))
    [[ " ${COMP_WORDS[*]:0:COMP_CWORD} " != *" -- "* ]] || { compopt -o default; return; }
    if [ "$cur" = = ]; then cur=; elif [ "$prev" = = ]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi
    case $prev in
%s    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -F _packtrack_logger packtrack-logger packtrack-logger.pyz
""" % (words, "".join(cases))


def zsh_completion():
    """For a file _packtrack-logger on $fpath, or to be sourced after compinit."""
    lines = []
    for option in OPTIONS:
        action = "_files" if option.path else "(" + " ".join(option.choices) + ")" if option.choices else " "
        value = ":{}:{}".format(option.metavar, action) if option.metavar else ""
        text = re.sub(r"([][:\\])", r"\\\1", option.about).replace("'", "'\\''")
        lines += ["'{}{}[{}]{}'".format("*" * (option.name == "meta"), flag, text, value)
                  for flag in (option.flag, option.short) if flag]
    return """#compdef packtrack-logger packtrack-logger.pyz
_packtrack_logger() {
  local -i end=${words[(i)--]}
  (( end < CURRENT )) && { shift $end words; (( CURRENT -= end )); _normal; return }
  _arguments %s
}
if [[ $funcstack[1] = _packtrack-logger ]]; then _packtrack_logger "$@"
else compdef _packtrack_logger packtrack-logger packtrack-logger.pyz; fi
""" % " \\\n    ".join(lines)


def fish_completion():
    """To be sourced, or kept in fish's completions directory."""
    lines = ["complete -c packtrack-logger.pyz -w packtrack-logger\ncomplete -c packtrack-logger -f\n"
             "complete -c packtrack-logger -n 'contains -- -- (commandline -opc)' "
             "-a '(complete -C (commandline -cp | string replace -r \"^.*? -- +\" \"\"))'"]
    for option in OPTIONS:
        value = " -x -a '{}'".format(" ".join(option.choices)) if option.metavar else ""
        value = " -r -F" if option.path else " -s " + option.short[1:] if option.short else value
        text = re.sub(r"(['\\])", r"\\\1", option.about)
        lines.append("complete -c packtrack-logger -l {}{} -d '{}'".format(option.name, value, text))
    return "\n".join(lines) + "\n"


COMPLETIONS = {"bash": bash_completion, "zsh": zsh_completion, "fish": fish_completion}


# ---- Events: pure functions from records to records; no files, no clock ------------------------------------

FIELDS = ("timestamp", "source", "workflow", "actor", "severity", "status", "message", "metadata", "extra")
PARTS = {"source": ("system", "env"), "workflow": ("id", "name", "run_id", "step_id"),
         "actor": ("type", "id", "display_name")}
REQUIRED = ("source.system", "workflow.id", "actor.type", "actor.id", "severity", "status", "message")
TEXTS = ("timestamp", "severity", "status", "message") + tuple(
    "{}.{}".format(part, name) for part in PARTS for name in PARTS[part])
OBJECTS = ("metadata", "extra")
MAX_RECORD, MAX_DEPTH, MAX_DIGITS = 16 << 20, 500, 4300
TOO_LONG = "a record of more than 16 MiB"
TOO_DEEP = "more than {} levels of nesting".format(MAX_DEPTH)
JSON_BLANKS = " \t\r\n"


def _finite(text):
    value = float(text)
    if value - value:  # not finite: NaN, or an infinity that is written as such or with an exponent
        raise ValueError("a number is too large" if text[-1].isdigit() else text + " is not JSON")
    return value


def _whole(text):
    if len(text) > MAX_DIGITS:  # int() takes time by the square of it, and newer versions refuse it
        raise ValueError("a number of more than {} digits".format(MAX_DIGITS))
    return int(text)


# The C scanner that json.loads calls, called directly: no wrapper per record, and it reads from any position.
scan_once = json.JSONDecoder(parse_float=_finite, parse_int=_whole, parse_constant=_finite).scan_once


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
    if isinstance(error, StopIteration):
        return "invalid JSON: expected a value", error.value
    if isinstance(error, json.JSONDecodeError):
        words = re.sub("( starting)? at$", "", error.msg)
        return "invalid JSON: " + words[:1].lower() + words[1:], error.pos
    return TOO_DEEP if isinstance(error, RecursionError) else str(error), None


def parse_json(text):
    """Return the value of JSON text, strictly. Raises InputError, which says where and quotes nothing."""
    position = None
    try:
        value, end = scan_once(text, len(text) - len(text.lstrip(JSON_BLANKS)))
        rest, fault = text[end:].lstrip(JSON_BLANKS), exceeded_limit(text, value)
        if rest:
            fault, position = "invalid JSON: extra data", len(text) - len(rest)
        elif fault is None:
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
        return encode_json(value).encode("utf-8", "backslashreplace")  # half of a surrogate pair, as \ud800
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidError("cannot be written as JSON: {}".format(printable(str(error))))


def check_event(event):
    """Raise InvalidError, which names the fields, unless event (a dict) is a complete and valid event."""
    for part in ("",) + tuple(PARTS) + OBJECTS:
        record, prefix = (event.get(part), part + ".") if part else (event, "")
        if record is not None and type(record) is not dict:
            raise InvalidError("must be an object", where=part)
        known = PARTS.get(part, record) if part else FIELDS
        for name in record or ():
            if name not in known:
                raise InvalidError('unknown field "{}"{}; put custom fields under "metadata"'.format(
                    prefix + printable(name), nearest(prefix + name, [prefix + field for field in known])))
    required = ("timestamp",) + REQUIRED
    missing = [path for path in required if field_value(event, path) is None]
    if missing:
        raise InvalidError("missing required " + ", ".join(missing))
    for path in TEXTS:
        value = field_value(event, path)
        if value is not None and type(value) is not str:
            raise InvalidError("must be a string", where=path)
        if value == "" and path in required:
            raise InvalidError("must not be empty", where=path)
    for path in ("severity", "status", "timestamp"):
        checked(BY_NAME[path].parse, path, event[path])


def field_value(event, path):
    """Return the value of an event's field, such as "source.env", or None."""
    part, _, name = path.partition(".")
    value = event.get(part)
    return value.get(name) if name and value is not None else value


def complete_event(event, defaults, now):
    """Return a copy of an event with what it lacks, null included, from defaults. Raises InvalidError."""
    result = {}
    for name in FIELDS + tuple(name for name in event if name not in FIELDS):
        own, default = event.get(name), defaults.get(name)
        if name in PARTS and (own is None or type(own) is dict):
            own, default, anchor = own or {}, default or {}, "system" if name == "source" else "id"
            own = {key: own[key] for key in own if own[key] is not None or key not in PARTS[name]}
            if anchor in own and own[anchor] != default.get(anchor):  # the other names belong to the id
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


def complete_record(record, defaults, now):
    """Return a record, bytes of JSON, with what it lacks. Raises InputError, InvalidError and ValueError."""
    event = parse_json(record.decode("utf-8"))
    if type(event) is not dict:
        raise InputError("not a JSON object")
    completed = complete_event(event, defaults, now)
    return record.strip(BLANK) if completed == event else dump_json(completed)


def completeness_test(defaults):
    """Return a fast test of a parsed record: whether it is surely valid and lacks nothing of the defaults."""
    timestamp, join, empty = re.compile(TIMESTAMP).match, "".join, {}
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
            # In one call: are all of them strings? Below, the lengths: is no name unknown?
            join((message, *source.values(), *workflow.values(), *actor.values()))
            return ((len(event) == 8 and type(event.get("metadata")) is dict
                     or len(event) == 7 + ("metadata" in event) + ("extra" in event)
                     and type(event.get("metadata", empty)) is type(event.get("extra", empty)) is dict)
                    and len(source) == 1 + ("env" in source) and len(actor) == 2 + ("display_name" in actor)
                    and len(workflow) == 1 + ("name" in workflow) + ("run_id" in workflow)
                    + ("step_id" in workflow))
        except (KeyError, TypeError, AttributeError):
            return False

    return is_complete if not wanted else lambda event: is_complete(event) and all(
        name in event.get(part, ()) for part, name in wanted)


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
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + ".%06dZ" % int(seconds % 1 * 1e6)


# ---- Input: from streams to lists of records; no network ---------------------------------------------------

# Read and validated at a time. Larger blocks are mapped anew by malloc each time, a tenth of the whole cost.
BLOCK, SMALL = 1 << 16, 1000
BLANK, BOM = b" \t\r\n", b"\xef\xbb\xbf"
# Tokens that decide where a JSON value ends; an escape that the data cuts off is looked at again.
TOKEN = re.compile(rb'\\(?:.|\Z)|["{}\[\]]', re.DOTALL)
# What the reading of an array expects next: its begin, the first element, the next one, what comes after one.
STEPS = {("begin", "["): "first", ("first", "]"): "end", ("after", ","): "next", ("after", "]"): "end"}
OUT_OF_STEP = {"begin": "not a JSON object or array", "end": "invalid JSON: extra data",
               "after": "invalid JSON: expected a comma or the end of the array"}
# Bytes that are no valid record. error: None where it continues the ones before. ends: whether a record ends.
Refused = collections.namedtuple("Refused", "raw error ends")


class Source:
    """An open file, pipe or standard input ("-"); for a Reader or the key. Raises InputError."""

    def __init__(self, path, limits):
        self.name, self._limits = display(path, "standard input"), limits  # the name is for messages
        try:
            flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
            if path == "-" and sys.stdin is None:
                raise OSError("it is closed")
            # Opening a FIFO waits for its writer; Linux can wait in poll() instead, within the limits.
            if path != "-" and sys.platform.startswith("linux") and stat.S_ISFIFO(os.stat(path).st_mode):
                flags |= os.O_NONBLOCK
            self._descriptor = 0 if path == "-" else os.open(path, flags)  # the end of the process closes it
            self.identity = os.fstat(self._descriptor)
            self.is_file = stat.S_ISREG(self.identity.st_mode)
        except (OSError, ValueError) as error:
            raise InputError("cannot read {}: {}".format(self.name, reason(error)))

    def chunks(self):
        """Yield the bytes as they come, at most BLOCK at a time. Raises InputError, and as Limits.check()."""
        chunk = None
        try:
            while chunk != b"":
                self._limits.check(reading=True)
                if not self.is_file:
                    wait_until_ready(self._descriptor, self._limits, reading=True)
                try:
                    chunk = os.read(self._descriptor, BLOCK)
                    yield chunk
                except BlockingIOError:  # another process was faster
                    pass
        except OSError as error:
            raise InputError("cannot read {}: {}".format(self.name, reason(error)))


def wait_until_ready(descriptor, limits, reading=False):
    """Wait until a descriptor can be read, or else written. Raises as Limits.check(), after a first wait."""
    if not hasattr(select, "poll"):  # Windows can only wait for sockets
        return
    poll, seconds = select.poll(), TICK
    poll.register(descriptor, select.POLLIN if reading else select.POLLOUT)
    while not poll.poll(seconds * 1000 + 1):
        seconds = limits.left(reading=reading)


class Reader:
    """Turns a Source's bytes into lists of valid, complete records; used by one thread at a time."""

    def __init__(self, source, ndjson, defaults, allow_empty=False):
        self.name, self.single = source.name, False  # single: whether it is one object, once known
        self._source, self._ndjson, self._allow_empty = source, ndjson, allow_empty
        self._defaults, self._is_complete = defaults, completeness_test(defaults)
        self._line, self._counted, self._state = 1, 0, "begin"  # see STEPS; "broken": after a fault
        self._skip_blanks = re.compile(r"[ \t\r\n]*").match
        self._next_object = re.compile(r"[ \t\r\n]*,[ \t\r\n]*(?=\{)").match

    def records(self):
        """Yield lists of records (bytes), and a Refused for what is none. Raises as Source.chunks()."""
        item = None
        for item in filter(None, (self._lines if self._ndjson else self._elements)(self._text_chunks())):
            yield item
        if item is None and not self._allow_empty:
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
        held, too_long = bytearray(), False
        for chunk in chunks:
            if too_long:  # its rest is kept as it came, up to the next line break
                rest, line_break, chunk = chunk.partition(b"\n")
                yield Refused(rest + line_break, None, ends=False)
                too_long, self._line = not line_break, self._line + bool(line_break)
            if b"\n" in chunk:
                items, chunk = self._whole_lines(bytes(held) + chunk)
                yield from items
                held.clear()
            held += chunk
            if len(held) > MAX_RECORD + BLOCK:  # there may be blanks around the record
                yield Refused(bytes(held), InputError(TOO_LONG, where=self._locate(b"", 0)), ends=False)
                held, too_long = bytearray(), True
        yield from self._whole_lines(bytes(held) + b"\n")[0]

    def _whole_lines(self, data):
        """Return what whole lines hold, lists of records and a Refused for what is none, and the rest."""
        *lines, rest = data.split(b"\n")
        items, end, first_line = [[]], -1, self._line
        text, trusted = as_text(data)
        is_complete, scan, append = self._is_complete, scan_once, items[0].append
        for line in lines:
            position = end + 1
            end = position + len(line)
            try:
                event, stop = scan(text, position) if trusted else (None, -1)
                if (is_complete(event)
                        and (stop == end or stop < end and not text[stop:end].strip(JSON_BLANKS))
                        and (stop - position <= SMALL or exceeded_limit(text[position:stop], event) is None)):
                    append(line if stop == end else data[position:stop])
                    continue
            except (ValueError, StopIteration, RecursionError):
                pass
            raw = line.rstrip(BLANK)
            if raw and not self._complete(raw, data, position, items):
                # scan() does not stop at a line's end: what is wrong could make it read on, line after line
                append, trusted = items[-1].append, False
        self._line, self._counted = first_line + len(lines), 0
        return items, rest

    def _complete(self, raw, data, position, items):
        """Add raw, which is at a position of data, to items, completed or Refused; return if it is valid."""
        try:
            items[-1].append(complete_record(raw, self._defaults, utc_timestamp(time.time())))
            return True
        except UnicodeDecodeError:
            error_class, why = InputError, "invalid UTF-8"
        except PackTrackError as error:
            error_class, why = type(error), str(error)
        where = self._locate(data, position)
        if self._ndjson and self._line == 1 and re.match(rb"[ \t\r]*(\{\Z|\[)", raw):
            why += "; for a JSON object or array omit --ndjson"
        elif self._ndjson and raw[-1:] == b",":
            why += " (one object per line, no commas between)"
        items += [Refused(raw.lstrip(BLANK), error_class(why, where=where), ends=True), []]
        return False

    def _elements(self, chunks):
        """Read one object or an array; only an element that is not whole yet is held back."""
        held, boundary = bytearray(), None
        for chunk in chunks:
            if self._state == "broken":
                yield Refused(chunk, None, ends=False)
                continue
            held += chunk
            whole = boundary is None or boundary.found(held)
            if whole or len(held) > MAX_RECORD:
                items, used = self._whole_elements(bytes(held), final=not whole)
                yield from items
                del held[:used]
                boundary = Boundary() if held else None
        if self._state != "broken":
            yield from self._whole_elements(bytes(held), final=True)[0]

    def _whole_elements(self, data, final):
        """Return what the whole elements hold, and how many bytes are done with. final: nothing follows."""
        items, position, size, state, why, fault_at = [[]], 0, len(data), self._state, None, None
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
                # Cut off by the end of the data: the fault is a token's length from there, or in a string.
                cut_off = fault_at is not None and (size - fault_at < 16 or "nterminated" in why)
                if cut_off and not final and not Boundary().found(data[position:]):
                    why = None
                break
            if (valid and is_complete(event)
                    and (stop - position <= SMALL or exceeded_limit(text[position:stop], event) is None)):
                items[-1].append(data[position:stop])
            else:
                self._complete(data[position:stop], data, position, items)
            position, state = stop, "end" if self.single else "after"
        if final and state not in ("begin", "end"):
            why = why or "invalid JSON: it ends too early"
        if why:
            why = TOO_LONG if final and size > MAX_RECORD else why
            where = self._locate(data, position if fault_at is None else fault_at)
            items.append(Refused(data[position:], InputError(why, where=where), ends=False))
            position, state = size, "broken"
        elif state == "after" and position < size:
            state = "next"  # the comma is done with
        self._locate(data, position)
        self._counted, self._state = 0, state
        return items, position


class Boundary:
    """Finds the end of a JSON value that comes in pieces; made by Reader for an element that is not whole."""
    _position, _depth, _in_string = 0, 0, False

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
            elif not self._in_string:
                self._depth += 1 if token in b"{[" else -1
            if self._depth <= 0 and not self._in_string:
                return True
        self._position = len(data)
        return False


def as_text(data):
    """Return bytes as text for the JSON scanner, a character for each byte, and whether they are UTF-8."""
    try:
        text = codecs.utf_8_decode(data, "strict", False)[0]  # False: the end may cut off a character
    except UnicodeDecodeError:
        text = None
    return text if text and len(text) == len(data) else data.decode("latin-1"), text is not None


def display(path, standard):
    """Return a path for messages; "-" is the standard stream of that name."""
    return standard if path == "-" else printable(os.fsencode(path).decode("utf-8", "replace"))


def reason(error):
    """Return what the system says of an OSError, or another error's own words, without a path."""
    words = printable(getattr(error, "strerror", None) or str(error)) or type(error).__name__
    return words[:1].lower() + words[1:]


# ---- Transport: requests, answers, whether and when to try again; nothing is printed here ------------------

LONGEST_RETRY_AFTER, NEXT_ADDRESS, BODY_SECONDS = 60.0, 0.25, 1.0
MOST_OF_BODY, MOST_OF_ERROR, MOST_RECEIVED = 1 << 20, 1 << 16, 8 << 20
HTTP_DATES = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")
RETRYABLE, TELLING_RUN = (429,) + tuple(range(500, 600)), 8  # every other status is final
ESCAPES = r"(?:\\u00|\\x|%)([0-9A-Fa-f]{2})|(&#?[0-9A-Za-z]{1,12};?)|\\(.)"
PROXY = (r"(?i)(?:http://)?(?![a-z0-9+.-]*://)(?:[^/:\ud800-\udfff]*:?([^/\ud800-\udfff]*)@)?"
         r"(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
BAD_PROXY = ("must be http://[USER:PASSWORD@]HOST[:PORT] (value not shown): SOCKS proxies and TLS to a "
             "proxy are not supported")
STATUS_LINE = br"(HTTP/1\.[0-9])[ \t]+([1-9][0-9]{2})(?:[ \t]([^\n]*))?\r?\n"
EARLY_ANSWER = br"(?m)^HTTP/1\.. +[2-9]"
WOULD_BLOCK = ("timeout", "TimeoutError", "BlockingIOError", "SSLWantReadError", "SSLWantWriteError")
HTTP_FAULTS = {"LineTooLong": " sent a header that is too long", "HTTPException": " sent too many headers"}
TLS_FAULTS = (  # what OpenSSL says, the kind of error (None: another attempt may succeed), our words
    ("eof", None, "{peer}: TLS connection closed"),
    ("wrong version|unknown prot|packet len|record layer", None, "{peer} does not speak TLS (use http://?)"),
    ("unrecognized name", "tls", "{peer} has no TLS certificate for this host name: check --base-url"),
    ("certificate required", "tls", "{peer} requires a TLS client certificate, which is not supported"),
    ("handshake failure", "tls", "{peer} refused the TLS handshake (does it require a client certificate?)"),
    ("protocol|sigalg", "tls", "{peer} supports none of the TLS versions that this Python has"),
    ("has expired", "certificate", "{certificate} has expired"),
    ("match|no appropriate", "certificate", "{certificate} is not valid for {host}"),
    ("failed: (self.signed|unable to)", "certificate", "{certificate} not trusted: unknown issuer{roots}"),
    ("verify failed:", "certificate", "{certificate} not trusted: {openssl}"),
    ("verify failed", "certificate", "{certificate} not trusted: unknown issuer or expired{roots}"),  # 3.6
    ("", None, "{peer}: TLS: {openssl}"),
)


class AttemptFailed(RetriesExhaustedError):
    """A failed attempt where another may succeed. retry_after: the seconds that were asked for, at least."""
    retry_after = 0.0


def backoff_delay(number, initial, maximum, jitter, random):
    """Return the seconds to wait after attempt `number`, from 1. initial, maximum: seconds before jitter."""
    return min(initial * 2.0 ** min(number - 1, 60), maximum) * (1 + jitter * (2 * random() - 1))


def parse_retry_after(value, now=None):
    """Return the seconds from now that a Retry-After asks for (RFC 9110, 10.2.3), or None for nonsense."""
    # Without now it is a Date, which is no number; its seconds are from the epoch.
    import calendar
    value = (value or "").strip(" \t")
    if now is not None and re.fullmatch("[0-9]{1,10}", value):
        return float(value)
    for form in HTTP_DATES:
        try:
            date = time.strptime(value, form)
        except ValueError:
            continue
        if value in (time.strftime(form, date), time.asctime(date)):  # strptime alone is lenient
            return max(0.0, float(calendar.timegm(date) - (now or 0)))
    return None


def holds_secret(text, secrets):
    """Return whether text shows a secret's first 6 characters, or any 8 of it in a row, escaped or not."""
    from binascii import a2b_base64
    from html import unescape

    def character(match):
        code, entity, other = match.groups()
        return chr(int(code, 16)) if code else unescape(entity) if entity else other.strip("nrt")

    def squeeze(text):
        return "".join(filter(str.isprintable, text)).replace(" ", "")

    texts = {squeeze(text)}
    for _ in range(2):  # undo the escapes of JSON, repr, HTML and URLs, and base64, also one inside another
        for each in list(texts):
            runs = re.findall("[A-Za-z0-9+/]{8,}", each.replace("-", "+").replace("_", "/"))
            runs = [run[start:] + "A" * ((start - len(run)) % 4) for run in runs for start in range(4)]
            decoded = " ".join(a2b_base64(run).decode("utf-8", "ignore") for run in runs)
            texts.update(map(squeeze, (each.replace("+", ""), re.sub(ESCAPES, character, each), decoded)))
    secrets = [secret for secret in map(squeeze, secrets) if len(secret) >= SHORTEST_SECRET]
    runs = {secret[at:at + TELLING_RUN] for secret in secrets for at in range(len(secret) - TELLING_RUN + 1)}
    return any(secret[:SHORTEST_SECRET] in each for secret in secrets for each in texts) or any(
        each[at:at + TELLING_RUN] in runs for each in texts for at in range(len(each)))


def resolve_host(host, port, left, fault):
    """Return getaddrinfo's addresses of a host. left: returns how long to wait at a time, or raises."""
    import socket
    answers, host = [], host.encode("ascii")  # bytes: text would import the IDNA codec

    def resolve(flags=0):
        try:
            found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, flags)
            answers[:] = found or [OSError("no address")]
        except Exception as error:
            answers[:] = [error.with_traceback(None)]

    resolve(socket.AI_NUMERICHOST)
    if isinstance(answers[0], socket.gaierror):  # a name
        try:  # the resolver takes no time limit: it is left behind in its thread when its time is up
            ended = start_thread(resolve)
            while not ended.acquire(True, left()):
                pass
        except RuntimeError:  # no memory or no permission for a thread
            resolve()
    if isinstance(answers[0], socket.gaierror):
        raise AttemptFailed(fault + printable(answers[0].strerror or str(answers[0])))
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers


def connect(addresses, left, clock):
    """Return a socket connected to one of getaddrinfo's addresses, by RFC 8305. Raises OSError."""
    import selectors
    import socket
    families, selector = [address[0] for address in addresses], selectors.DefaultSelector()
    order = sorted(range(len(families)), key=lambda at: families[:at].count(families[at]))
    sockets, due, code = [], 0.0, 0
    try:
        while order or selector.get_map():
            if order and (clock() >= due or not selector.get_map()):
                due = clock() + NEXT_ADDRESS
                family, kind, protocol, _, address = addresses[order.pop(0)]
                try:
                    sockets.append(socket.socket(family, kind, protocol))
                    sockets[-1].setblocking(False)
                    sockets[-1].connect(address)
                except OSError as error:
                    if not isinstance(error, BlockingIOError):  # no such family, no route
                        code = error.errno or errno.EAFNOSUPPORT
                        continue
                selector.register(sockets[-1], selectors.EVENT_WRITE)
            for sock in [key.fileobj for key, _ in selector.select(min(left(), NEXT_ADDRESS / 5))]:
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    sockets.remove(sock)
                    return sock
                selector.unregister(sock)
    finally:
        selector.close()
        for sock in sockets:
            sock.close()
    raise OSError(code, os.strerror(code))


class Connection(io.RawIOBase):
    """A connection to the service, kept for the next request; http.client reads from it as from a file."""
    _context, _lock = None, _thread.allocate_lock()  # one for all: the certificates take a MiB

    def __init__(self, limits, secrets):
        self._limits, self.secrets = limits, secrets
        self._socket = self._proxy_auth = None
        self.peer = self._host = self._stage = ""
        self._ahead, self.ended, self.received, self.until, self.timeout = b"", False, 0, 0.0, 0.0

    def left(self):
        """Return how long to wait at a time. Raises AttemptFailed when the time is up, and as Limits does."""
        # A socket's own timeout starts anew with each byte; `until` is the end of the attempt.
        wait, left = self._limits.left(TICK), self.until - self._limits.clock()
        if left <= 0:
            raise AttemptFailed("{}timed out after {:g}s".format(self._stage, self.timeout))
        return max(min(wait, left), 0.001)  # zero would make a socket non-blocking

    def open(self, request):
        """Connect, through a proxy and with TLS where they are due; return whether it was connected."""
        origin, is_secure = request.get_header("Host"), request.type == "https"
        if is_secure:  # kept, as a request that is sent again has lost it
            self._proxy_auth = request.headers.pop("Proxy-authorization", self._proxy_auth)
        try:
            if self._socket is not None and self._receive(0) is None:
                return True
        except OSError:
            pass
        self.disconnect()
        is_proxied = request.host != origin
        host, port = split_host(request.host, "443" if is_secure and not is_proxied else "80")
        name = "proxy " + host if is_proxied else host
        self._host, self.peer = host.strip("[]"), name + ":" + port
        self._stage = "cannot resolve {}: ".format(name)
        addresses = resolve_host(self._host, int(port), self.left, self._stage)
        self._stage = self.peer + ": " if is_proxied else ""
        self._socket = connect(addresses, self.left, self._limits.clock)
        if is_secure and is_proxied:
            self._open_tunnel(*split_host(origin, "443"))
        if is_secure:
            self._start_tls()
        return False

    def _open_tunnel(self, host, port):
        target = host + ":" + port
        self.send("CONNECT", target, {"Host": target, "Proxy-Authorization": self._proxy_auth}, b"")
        response = self.read_response("CONNECT")
        if not 200 <= response.status <= 299:
            message = "{} refused the tunnel: HTTP {} {}".format(
                self.peer, response.status, self.quote(response.reason)).rstrip()
            if response.status in RETRYABLE:
                raise AttemptFailed(message)
            raise RefusedError(message, status=response.status, kind="proxy", ends_run=True)
        self._host, self.peer, self._stage = host.strip("[]"), target, ""

    def _start_tls(self):
        try:
            import ssl
            with self._lock:
                Connection._context = Connection._context or ssl.create_default_context()
        except ImportError:
            raise RefusedError("https needs Python's ssl module, which this Python was built without",
                               kind="no_tls", ends_run=True)
        except OSError as error:
            raise RefusedError("cannot set up TLS (check SSLKEYLOGFILE and OPENSSL_CONF): " + reason(error),
                               kind="tls", ends_run=True)
        self._socket = self._context.wrap_socket(
            self._socket, server_hostname=self._host.rstrip("."), do_handshake_on_connect=False)
        while self._call(self.left(), lambda: self._socket.do_handshake() or True) is None:
            pass

    def send(self, method, target, headers, body):
        """Send a request; return False where the answer, or the end, came before it was all sent."""
        self._ahead, self.received, sent = b"", 0, 0
        lines = ["{} {} HTTP/1.1".format(method, target)]
        lines += ["{}: {}".format(name, value) for name, value in headers.items() if value is not None]
        with memoryview("\r\n".join(lines + ["", ""]).encode("latin-1") + body) as view:
            while sent < len(view):
                sent += self._call(self.left(), self._socket.send, view[sent:]) or 0
                if sent < len(view) and (self._receive(0) == b"" or re.search(EARLY_ANSWER, self._ahead)):
                    return False
        return True

    def read_response(self, method):
        """Return an HTTPResponse whose headers are read, past all 1xx but 101 (RFC 9110, 15.2)."""
        from http.client import BadStatusLine, HTTPResponse
        def read_status():  # in place of http.client's own, which takes +200, 0200 and 2_00
            line = stream.readline(65537)
            match = re.fullmatch(STATUS_LINE, line)
            if match is None:
                raise BadStatusLine("") if line else ConnectionError("connection closed without an answer")
            version, status, words = match.groups()
            status = 100 if b"102" <= status < b"200" else int(status)  # http.client skips a 100 only
            return version.decode(), status, (words or b"").decode("latin-1")

        response = HTTPResponse(self, method=method)
        stream, response._read_status = response.fp, read_status
        response.begin()
        if self.ended:  # http.client takes the end of the connection for the end of the headers
            raise ConnectionError("connection closed amid the headers")
        return response

    def failure(self, error):
        """Return the RefusedError or AttemptFailed for an exception of a socket, http.client or ssl."""
        if isinstance(error, (RetriesExhaustedError, Interrupted)):
            return error
        if type(error).__module__ == "ssl":
            text, path = str(error).replace("_", " "), os.environ.get("SSL_CERT_FILE")
            kind, words = next(row[1:] for row in TLS_FAULTS if re.search(row[0], text, re.IGNORECASE))
            unread = "" if path and os.access(path, os.R_OK) else ", not readable"
            roots = ". Install ca-certificates or set SSL_CERT_FILE" + (
                " (now: {}{})".format(display(path, path), unread) if path else "")
            openssl = printable(re.sub(r"^\[.*?\] *(certificate verify failed: )?|\( ?ssl\.c.*", "", text))
            message = words.format(peer=self.peer, host=self._host, roots=roots, openssl=openssl,
                                   certificate="TLS certificate of " + self._host)
            return RefusedError(message, kind=kind, ends_run=True) if kind else AttemptFailed(message)
        fault = HTTP_FAULTS.get(type(error).__name__, " sent no valid HTTP response")
        return AttemptFailed(self.peer + (": " + reason(error) if isinstance(error, OSError) else fault))

    def quote(self, text):
        """Return a server's words on one line, or nothing where they show a secret."""
        return "" if holds_secret(text, self.secrets) else printable(text)

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
        count = min(len(buffer), len(self._ahead)) if self.received < MOST_RECEIVED else 0
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


class Client:
    """Sends events over one kept connection, for one thread at a time; the key goes to base_url's host only.

    timeout: an attempt's seconds. backoff_*: seconds before jitter (0 to 1). trace: is called with lines.
    """

    def __init__(self, api_key, base_url=BASE_URL, timeout=15.0, retries=3, backoff_initial=0.1,
                 backoff_max=2.0, jitter=0.2, user_agent=USER_AGENT, gzip=False, health_path="/api/health",
                 key_source=None, limits=None, random=None, trace=None):
        self.base_url = checked(parse_base_url, "base_url", base_url)
        self._headers = {"Host": self.base_url.split("/")[2], "Accept-Encoding": "identity",
                         "X-PackTrack-Key": checked(parse_header, "api_key", api_key),
                         "User-Agent": checked(parse_header, "user_agent", user_agent)}
        self._health_path = checked(parse_path, "health_path", health_path)
        self.requests = self.retries = self.bytes_sent = 0
        self._timeout, self._attempts, self._limits = timeout, retries + 1, limits or Limits()
        self._backoff, self._random, self._gzip = (backoff_initial, backoff_max, jitter), random, gzip
        self._key_source, self._trace, self._proxy = key_source, trace or (lambda line: None), None
        self._connection = Connection(self._limits, [api_key])

    def ingest_event(self, event, idempotency_key=None):
        """Deliver one event (a dict; a missing timestamp is now). Raises PackTrackError's subclasses."""
        self.send(complete_record(dump_json(event), {}, utc_timestamp(time.time())), idempotency_key)

    def ingest_batch(self, events, idempotency_key=None):
        """Deliver a list of events as one request. Raises PackTrackError's subclasses; then none counts."""
        records = [complete_record(dump_json(event), {}, utc_timestamp(time.time())) for event in events]
        self.send(b"[%b]" % b",".join(records), idempotency_key)

    def health_check(self):
        """Ask the service's health, once. Raises PackTrackError's subclasses unless it is healthy."""
        self._attempt("GET", self._health_path, {}, b"")

    def send(self, body, idempotency_key=None):
        """Deliver the bytes of JSON, with retries; the key "auto" is their SHA-256. Raises PackTrackError."""
        headers = {"Content-Type": "application/json"}
        if idempotency_key:
            import hashlib
            key = hashlib.sha256(body).hexdigest() if idempotency_key == "auto" else idempotency_key
            headers["Idempotency-Key"] = checked(parse_header, "idempotency_key", key)
        if self._gzip:
            import zlib
            headers["Content-Encoding"] = "gzip"
            packer, packed = zlib.compressobj(6, zlib.DEFLATED, 31), []  # 31: gzip, its date left at zero
            for start in range(0, len(body), MOST_OF_BODY):
                self._limits.check()
                packed.append(packer.compress(body[start:start + MOST_OF_BODY]))
            body = b"".join(packed) + packer.flush()
        headers["Content-Length"] = len(body)
        number = 0
        while True:  # after the last attempt _wait() raises
            number, started = number + 1, self._limits.clock()
            try:
                outcome = self._attempt("POST", "/api/ingest", headers, body)
            except (AttemptFailed, RefusedError) as error:
                outcome = error.detached()
            self._trace("attempt {}/{}: {} ({:.0f} ms)".format(
                number, self._attempts, outcome, (self._limits.clock() - started) * 1000))
            if isinstance(outcome, str):
                return
            if isinstance(outcome, RefusedError):
                raise outcome
            self._wait(number, outcome)

    def _wait(self, number, failed):
        """Wait before the next attempt, or raise RetriesExhaustedError where there is none."""
        from random import random
        least, kind = failed.retry_after, None
        delay = max(least, backoff_delay(number, *self._backoff, random=self._random or random))
        asked = "; Retry-After is {:.0f} s".format(least) if least else ""
        if number == self._attempts:
            why = ", after {} attempt{}".format(number, "" if number == 1 else "s")
        elif least > LONGEST_RETRY_AFTER:
            why = asked + " (limit {:.0f} s)".format(LONGEST_RETRY_AFTER)
        elif self._limits.left(delay) < delay:
            why, kind = asked + "; no time left for another attempt before --deadline", "deadline"
        else:
            self._trace("retrying in {:.0f} ms".format(delay * 1000))
            self._limits.sleep(delay)
            self.retries += 1
            return
        raise RetriesExhaustedError(str(failed) + why, status=failed.status, kind=kind)

    def _attempt(self, method, path, headers, body):
        """Send a request; return its status, a 2xx, in words. Raises RefusedError and AttemptFailed."""
        from http.client import HTTPException
        from urllib.request import Request
        faults = OSError, HTTPException, ValueError  # ValueError: CertificateError on 3.6
        connection, clock, kept, answer = self._connection, self._limits.clock, False, b""
        connection.until, connection.timeout = clock() + self._timeout, self._timeout
        request = Request(self.base_url + path, body, method=method)
        request.headers.update(self._headers, **headers)
        self._use_proxy(request)
        try:
            response = self._exchange(request)
            ok = 200 <= response.status <= 299
            connection.until, connection.timeout = min(connection.until, clock() + BODY_SECONDS), BODY_SECONDS
            try:
                answer = response.read(MOST_OF_BODY if ok else MOST_OF_ERROR)
                kept = ok and response.isclosed() and not response.will_close  # read to its end
                if response.length and connection.ended:
                    raise ConnectionError("connection closed amid the body")
            except faults + (MemoryError, RetriesExhaustedError, Interrupted) as error:  # the status stands
                self._trace("the response body broke off: {}".format(connection.failure(error)))
        except faults as error:
            raise connection.failure(error)
        finally:
            if not kept:
                connection.disconnect()
        if not ok:
            raise self._rejection(response, answer, path)
        return "HTTP {}".format(response.status)

    def _use_proxy(self, request):
        """Have urllib direct a request to the environment's proxy, if there is one. Raises InvalidError."""
        from urllib import request as urllib
        if self._proxy is None:
            proxies = {} if urllib.proxy_bypass(request.host) else urllib.getproxies()
            proxy = proxies.get(request.type, "").rstrip("/")
            match = re.fullmatch(PROXY, proxy)
            if proxy and (match is None or int(match.group(2) or 80) > 65535):
                raise InvalidError(BAD_PROXY, where=request.type + "_proxy", ends_run=True)
            self._connection.secrets.append(urllib.unquote(match and match.group(1) or ""))
            self._proxy = proxy
        if self._proxy:
            urllib.ProxyHandler({}).proxy_open(request, self._proxy, request.type)

    def _exchange(self, request):
        """Send a request over the kept connection or a new one; return the response, its headers read."""
        connection, sent, method = self._connection, False, request.get_method()
        kept = connection.open(request)
        self.requests += 1
        try:
            sent = connection.send(method, request.selector, request.headers, request.data)
            self.bytes_sent += len(request.data) if sent else 0
        except OSError:
            pass  # an answer may have come all the same, such as 413, or a TLS alert
        try:
            response = connection.read_response(method)
        except OSError:
            if not kept or connection.received:
                raise
            # Closed by the server just when it was used again: nothing was wrong with the request.
            connection.disconnect()
            return self._exchange(request)
        if not sent and 200 <= response.status <= 299:
            raise AttemptFailed("{} answered HTTP {} before it had the whole request".format(
                connection.peer, response.status))
        return response

    def _rejection(self, response, body, path):
        """Return the RefusedError or AttemptFailed of a status that is not a 2xx."""
        quote, status, location = self._connection.quote, response.status, response.getheader("Location")
        text, kind = body.decode("utf-8", "replace"), response.getheader("Content-Type", "text/")
        message = "HTTP {} {}".format(status, quote(response.reason)).rstrip()
        is_text = re.match("(?i)text/(?!html)|.*json", kind) and "\0" not in text
        words, hint = quote(text) if is_text and not re.match(r"<|{}$|\[\]$", printable(text)) else "", ""
        if 300 <= status <= 399 and location:
            message = "HTTP {} redirects to {}".format(status, quote(location) or "another address")
            words, hint = "", "set --base-url to the new address (redirects are not followed)"
        elif status in (401, 403):
            hint = "check the API key" + (" (from {})".format(self._key_source) if self._key_source else "")
        elif status in (404, 405):
            message, hint = "{} from {}{}".format(message, self.base_url, path), "check --base-url"
        elif status == 407 and self._connection.peer.startswith("proxy"):
            message = "{}: {}".format(self._connection.peer, message)
        message += ': "{}"'.format(words) if words else ""
        message += ("; " if words else ": ") + hint if hint else ""
        if status not in RETRYABLE:
            return RefusedError(message, status=status, ends_run=status in (401, 403, 404))
        failed = AttemptFailed(message, status=status)
        now = parse_retry_after(response.getheader("Date")) or time.time()
        failed.retry_after = parse_retry_after(response.getheader("Retry-After"), now) or 0.0
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


# ---- Delivery: the chain from records to batches, and the one account --------------------------------------

HELD_IN_MEMORY, QUEUE_ITEMS, MOST_RANGES = 16 << 20, 32, 100


def accept_valid(reader, delivery):
    """Yield (number of the first, records) of what a Reader finds valid, and account for all of it."""
    try:
        for item in reader.records():
            delivery.single = reader.single
            if type(item) is list:
                delivery.read += len(item)
                delivery.reporter.progress(delivery)
                yield delivery.read - len(item) + 1, item
                if delivery.streams and delivery.ended is not None:
                    return
            elif not delivery.refuse(item):
                return
    except PackTrackError as error:
        delivery.note(error, ends=error.ends_run or not (delivery.keep_going or delivery.streams))
    except Interrupted:
        if not delivery.streams:  # else what was read is sent
            delivery.stop()


def keep_until_valid(runs, delivery, name):
    """Hold (number, records) back, in memory or a temporary file, until all are valid; then yield them."""
    held = file = io.BytesIO()  # held is read back; file, to which it may move, is closed in any case
    end, unsaved = 0, []
    try:
        for number, records in runs:
            unsaved = [(number, records)]
            data = b"\0".join(records)  # no JSON text holds a NUL
            data = number.to_bytes(8, "little") + len(data).to_bytes(8, "little") + data
            if end + len(data) <= HELD_IN_MEMORY:
                held.write(data)
            else:
                if type(held) is io.BytesIO:
                    from tempfile import TemporaryFile
                    file = TemporaryFile(buffering=0)
                    write_all(file.fileno(), held.getbuffer())
                    held = file
                write_all(held.fileno(), data)
            end, unsaved = held.tell(), []
    except (OSError, MemoryError) as error:
        why = "no writable temporary directory" if isinstance(error, FileNotFoundError) else reason(error)
        why = "cannot buffer {}: {} (set TMPDIR, or stream with --async)".format(name, why)
        delivery.note(InputError(why) if isinstance(error, OSError) else as_error(error))
    delivery.total = delivery.read - delivery.invalid
    try:
        if not held.closed and (delivery.ended is None or delivery.keeps_rest):  # closed: it found no memory
            held.seek(0)
            while held.tell() < end:
                number, size = (int.from_bytes(held.read(8), "little") for _ in range(2))
                yield number, held.read(size).split(b"\0")
            yield from unsaved
            yield from runs
    finally:
        file.close()


def read_ahead(runs, delivery, limits, capacity, interval, flushes):
    """Yield (number, records) that a thread reads up to `capacity` ahead; None each `interval` seconds."""
    import queue
    size = max(1, capacity // QUEUE_ITEMS)
    ahead, finished, oldest, item = queue.Queue(capacity // size), [], None, ()

    def read():
        try:
            for number, records in runs:
                for start in range(0, len(records), size):
                    ahead.put((limits.clock(), number + start, records[start:start + size]))
        except Exception as error:  # nobody else would hear of it
            delivery.note(as_error(error))
        finally:
            finished.append(True)  # at once, for --no-flush; the None comes after what is queued
            ahead.put(None)

    try:
        start_thread(read)
    except RuntimeError:
        delivery.note(InputError("cannot start a thread: out of memory or processes"))
        return
    while item is not None:
        limits.over = delivery.ended is not None
        due = limits.clock() + TICK if oldest is None else oldest + interval
        try:
            item = ahead.get(timeout=min(TICK, max(0.0, due - limits.clock())))
        except queue.Empty:
            item = None if finished and ahead.empty() else ()
        if finished and not (flushes or delivery.errors or limits.signals):  # --no-flush
            delivery.stop()
        if item:
            oldest = oldest or item[0]
            yield item[1:]
        elif oldest is not None and limits.clock() >= due:
            oldest = None
            yield None


def cut_batches(runs, size, limit):
    """Yield (records, their numbers) of at most `size` records and `limit` bytes; a larger record alone."""
    batch, numbers, used = [], [], 1  # used: bytes of the body so far, with one of its brackets
    for run in runs:
        number, records = run or (0, [])  # None: what is there is to be sent
        position = 0
        while position < len(records) or run is None and batch:
            part = records[position:position + min(size - len(batch), 100)]
            used, is_due = used + sum(map(len, part)) + len(part), run is None
            while used > limit and len(batch) + len(part) > 1:
                used, is_due = used - len(part.pop()) - 1, True
            batch += part
            numbers += range(number + position, number + position + len(part))
            position += len(part)
            if is_due or len(batch) >= size or used >= limit:
                yield batch, numbers
                batch, numbers, used = [], [], 1
    if batch:
        yield batch, numbers


def join_ranges(ranges):
    """Return the first of the ranges of numbers, [[first, last], ...], sorted, those that adjoin made one."""
    joined = []
    for first, last in sorted(ranges):
        if joined and joined[-1][1] >= first - 1:
            joined[-1][1] = max(last, joined[-1][1])
        else:
            joined.append([first, last])
    return joined[:MOST_RANGES]


def describe_ranges(ranges):
    """Return the words for the numbers of records: "record 3", "records 1-100, 103"."""
    text = ", ".join("{}-{}".format(*pair) if pair[0] < pair[1] else str(pair[0]) for pair in ranges[:10])
    text += " and more" if len(ranges) > 10 else ""
    return "record{} {}".format("" if text.isdigit() else "s", text)


def send_batches(batches, delivery):
    """Send an iterator's batches over the clients of a Delivery at once; this thread works for the first."""
    lock, ended, clients = _thread.allocate_lock(), [], delivery.clients or [None]
    first = [next(batches, None)]  # before there are threads, whose stacks take memory from the reading

    def work(client):
        while True:
            try:
                with lock:
                    batch = first.pop() if first else next(batches, None)
                if batch is None:
                    return
                delivery.send(batch, client)
            except Exception as error:  # such as no memory
                delivery.note(as_error(error))

    if len(clients) > 1:
        __import__("urllib.request")  # by one thread: short of memory, several find that it does not exist
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
    """Sends batches and accounts for each record: read = delivered + undelivered + invalid. Made by main."""

    def __init__(self, limits, reporter, clients=(), output=None, undelivered_file=None, keep_going=False,
                 idempotency_key=None, probes=False):
        self.clients, self.output, self.undelivered_file = clients, output, undelivered_file
        self.keep_going, self._key, self._probes = keep_going, idempotency_key, probes
        self._limits, self.reporter, self._lock = limits, reporter, _thread.RLock()
        self.streams = self.keeps_rest = False  # an invalid record only ends the reading, or not even that
        self.single, self.total = False, None  # whether the input is one object; the valid records, if known
        self.read = self.delivered = self.undelivered = self.invalid = 0
        self.errors, self.error, self.ended = {}, None, None  # by exit code; what stands; what ended the run
        self.ranges = []  # the numbers of the undelivered
        self.kept, self.unkept, self.unkept_why, self._line_ended = 0, 0, "", True  # of undelivered_file

    def refuse(self, refused):
        """Account for a Refused; return whether to read on."""
        reads_on, begins = self.keep_going or self.keeps_rest, refused.error is not None
        with self._lock:
            if begins:
                self.read, self.invalid = self.read + 1, self.invalid + 1
                self.note(refused.error, not (self.keep_going or self.streams), warns=self.keep_going)
            if reads_on or self.streams:
                self.keep(json_lines([refused.raw]) if refused.ends else refused.raw, int(begins), begins)
        return reads_on

    def send(self, batch, client=None):
        """Deliver (records, numbers), in halves if the server finds them too large; account for them all."""
        parts = [batch]
        while parts:
            records, numbers = parts.pop()
            error, half = self.ended or self._attempt(records, numbers, client), len(records) // 2
            with self._lock:
                if error is None:
                    self.delivered += len(records)
                elif error.status == 413 and half and not (error.ends_run or error is self.ended):
                    parts += [(records[half:], numbers[half:]), (records[:half], numbers[:half])]
                else:
                    if error is not self.ended:
                        if self.read > 1 and not error.where:
                            error.where = describe_ranges([[numbers[0], numbers[-1]]])
                        ends = not self.keep_going or error.ends_run
                        self.note(error, ends, warns=not ends)
                    self.undelivered += len(records)
                    self.ranges = join_ranges(self.ranges + [[number, number] for number in numbers])
                    self.keep(json_lines(records), len(records))
            self.reporter.progress(self)

    def _attempt(self, records, numbers, client):
        """Send a batch; return the error, or None."""
        try:
            self._limits.check()
            if self.output is not None:
                self.output.append(json_lines(records))
                return None
            with self._lock:
                probes, self._probes = self._probes, False
            if probes:
                check_health(client, self.reporter)
            body, key = records[0] if self.single else b"[%b]" % b",".join(records), self._key
            if key and key != "auto" and len(records) != self.total:
                import hashlib
                key = "{}-{}-{}-{}".format(key, numbers[0], numbers[-1], hashlib.sha256(body).hexdigest()[:8])
            self.reporter.trace("{}: {} bytes to {}".format(
                describe_ranges([[numbers[0], numbers[-1]]]), len(body), client.base_url))
            client.send(body, key)
        except Interrupted:
            return self.stop()
        except Exception as error:  # a fault of this program's must not lose count of the records
            return as_error(error).detached()

    def stop(self):
        """End the run without an error: a signal came, or the rest is abandoned. Return what ended it."""
        with self._lock:
            self.ended = self.ended or PackTrackError("interrupted", kind="interrupted")
            return self.ended

    def note(self, error, ends=True, warns=False):
        """Note an error. ends: whether nothing more is to be sent. warns: whether to log it at once."""
        with self._lock:
            if self.keep_going or self.ended is None or self.ended.kind == "interrupted":
                self.errors.setdefault(error.exit_code, error)
            if ends:
                self.ended = self.ended or error
            if warns:
                error.is_logged = True
                self.reporter.warn(str(error))

    def keep(self, data, count, begins=True):
        """Save bytes, in which `count` records begin. begins: on a new line, not behind the last bytes."""
        if self.undelivered_file is None:
            return
        try:
            self.undelivered_file.append(b"\n" + data if begins and not self._line_ended else data)
            self._line_ended = data.endswith(b"\n")
            self.kept += count
        except (InputError, Interrupted) as error:
            self.unkept += count
            self.unkept_why = str(error) or "cannot write {}: interrupted".format(self.undelivered_file.name)
            self.errors.setdefault(InputError.exit_code, InputError(self.unkept_why))

    def finish(self):
        """Count as undelivered what was read and is otherwise not accounted for, and close what is open."""
        first, last = self.delivered + self.undelivered + 1, self.read - self.invalid
        if last >= first:
            self.undelivered += last - first + 1
            if self.undelivered_file and (self.keeps_rest or self.streams):  # only for lack of memory
                self.unkept, self.unkept_why = self.unkept + last - first + 1, "out of memory"
            if not self.invalid:  # else their numbers are not known
                self.ranges = join_ranges(self.ranges + [[first, last]])
        if not self._line_ended:
            self.keep(b"", 0)
        self.error = next((self.errors[code] for code in (2, 3, 4, 1) if code in self.errors), None)
        for client in self.clients:
            client.close()


class Appender:
    """Appends to the file of --output or --undelivered (saving), whole, also where other processes do so."""

    def __init__(self, path, where, limits, source, saving):
        self._path, self._limits, self._saving, self._patience = path, limits, saving, LONGEST_SAVING
        self._kept, self._is_first = 1 if path == "-" else None, True  # _kept: a descriptor that stays open
        self.name, parent = display(path, "standard output"), os.path.dirname(path) or "."
        parent = os.path.dirname(os.path.realpath(path)) if os.path.islink(path) else parent
        writable = os.access(path, os.W_OK) if os.path.exists(path) else os.access(parent, os.W_OK | os.X_OK)
        why = ("it is closed" if path == "-" and sys.stdout is None else
               "it is a directory" if os.path.isdir(path) else
               "its directory does not exist" if not os.path.isdir(parent) else
               "permission denied" if path != "-" and not writable else None)
        if why:
            why = "cannot write {}: {}".format(self.name, why)
            raise (InvalidError if saving else InputError)(why, where=where)
        if source is not None and source.is_file and self._is_file(source.identity):
            raise InvalidError("is the input itself; name another file", where=where)

    def append(self, data):
        """Append bytes; a write that fails leaves none of them in a regular file. Raises InputError."""
        limits = self._limits.saving(self._patience) if self._saving else self._limits
        try:
            descriptor, size = self._open(limits)
            try:
                if size and self._is_first and os.access(self._path, os.R_OK):
                    with open(self._path, "rb") as file:
                        file.seek(-1, os.SEEK_END)  # a line that was cut off, as by kill -9, stays apart
                        data = data if file.read() == b"\n" else b"\n" + data
                write_all(descriptor, data, limits)
                self._is_first = False
            except OSError:
                if size is not None:
                    os.ftruncate(descriptor, size)
                raise
            finally:
                if size is not None:
                    os.close(descriptor)
        except (OSError, ValueError, RetriesExhaustedError) as error:
            why = reason(error)
            if isinstance(error, RetriesExhaustedError):
                if not self._saving:
                    raise
                self._patience, why = 0.0, "locked, or nobody reads it"  # the next ones do not wait anew
            raise InputError("cannot write {}: {}".format(self.name, why), ends_run=True)

    def _open(self, limits):
        """Return a descriptor, and the size of what is a locked regular file, to be closed; else None."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", getattr(os, "O_NONBLOCK", 0))
        while self._kept is None:
            try:
                descriptor = os.open(self._path, flags, 0o600 if self._saving else 0o666)
            except OSError as error:
                if error.errno != errno.ENXIO or not stat.S_ISFIFO(os.stat(self._path).st_mode):
                    raise  # else it is a FIFO that nobody reads yet
            else:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    self._kept = descriptor  # whoever reads it takes a close for the end
                    break
                if lock_file(descriptor) and self._is_file(os.fstat(descriptor)):  # not moved away meanwhile
                    return descriptor, os.fstat(descriptor).st_size
                os.close(descriptor)
            limits.sleep(0.005)
        return self._kept, None

    def _is_file(self, identity):
        """Tell whether this is the regular file of these fstat results."""
        try:
            return os.path.samestat(os.stat(1 if self._path == "-" else self._path), identity)
        except OSError:
            return False


def lock_file(descriptor):
    """Lock an open file against our other processes until it is closed; return whether nobody else has."""
    try:
        if os.name == "nt":  # on Windows a lock is on bytes from the current position on
            import msvcrt
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # it is taken; which of them says so depends on the system
        return False
    except OSError:  # a file system without locks
        pass
    return True


def write_all(descriptor, data, limits=None):
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
    return b"".join((record.replace(b"\r", b" ").replace(b"\n", b" ") if b"\n" in record else record) + b"\n"
                    for record in records)


# ---- The command runner: a command, then an event on its end; the command runs as if it were alone ---------

COMMAND_DELIVERY, HURRIED_DELIVERY, KILL_AFTER, FOREVER = 30.0, 5.0, 5.0, 1e9  # seconds
TIMED_OUT, NOT_EXECUTABLE, NOT_FOUND = 124, 126, 127
PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM")


def run_command(settings, hurry):
    """Run the command; return our exit code, the signal that ended it or 0, why it did not run, its event."""
    # hurry: the handler of signals from its end on
    command, started_at, started = settings.command, utc_timestamp(time.time()), time.monotonic()
    name = display(os.path.basename(command[0]) or command[0], "-") or "''"
    run, timeout = run_on_windows if os.name == "nt" else run_on_posix, settings["command-timeout"]
    try:
        returncode, timed_out = run(command, timeout, hurry)
        how, seconds, failure = "exited with {}".format(returncode), time.monotonic() - started, None
    except OSError as error:
        returncode = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        how, seconds, timed_out = "could not be run: " + reason(error), 0.0, False
        failure = "cannot run {}: {}".format(display(command[0], "-") or name, reason(error))
    host = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")
    metadata = {"command": name, "duration_ms": int(seconds * 1000), "started_at": started_at, "host": host}
    code, number, status = returncode, max(0, -returncode), "failed" if returncode else "ok"
    if number:
        metadata["signal"] = next((s.name for s in signal.Signals if s == number), "signal {}".format(number))
        code, how = 128 + number, "was terminated by " + metadata["signal"]
    if timed_out:
        code, number, how, status = TIMED_OUT, 0, "timed out", "timeout"
    if "signal" not in metadata:
        metadata["exit_code"] = code
    message = "{} {} after {:.1f}s".format(name, how, seconds)
    return code, number, failure, {
        "severity": "error" if code else "info", "status": status, "metadata": metadata,
        "message": settings["message"] if settings.from_flag("message") else message}


def run_on_windows(command, timeout, hurry):  # Windows
    """run_on_posix() for Windows, where Ctrl-C reaches every process of the console and there is no TERM."""
    import subprocess
    handle_signals(lambda number, frame: None, PASSED_ON)
    try:
        return subprocess.call(command, close_fds=False, timeout=timeout), False
    except subprocess.TimeoutExpired:  # it has been killed
        return TIMED_OUT, True
    finally:
        handle_signals(hurry, PASSED_ON)


def run_on_posix(command, timeout, hurry):
    """Run a command; return its exit code, or -n for signal n, and whether it took longer than timeout."""
    numbers = {getattr(signal, name) for name in PASSED_ON}
    passed_on = {number for number in numbers if signal.getsignal(number) != signal.SIG_IGN}  # not with nohup
    # Blocked before the command starts and taken one by one: none is lost in between, none interrupts us.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on | {signal.SIGCHLD})
    handle_signals(hurry, PASSED_ON)
    on_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a child that is ignored leaves no status
    environ, ignored = entry_state()
    try:
        (reader, writer), pipe = os.pipe(), os.pipe()  # the second is not 0 or 1, even if they were closed
        canary, early = start_canary(pipe), []
        while signal.sigpending() & passed_on:
            early.append((0.0, signal.sigwait(passed_on)))
        try:
            pid = os.fork()
        except OSError:  # there may be room for one process
            end_canary(canary)
            canary, pid = None, os.fork()
        if pid == 0:
            try:
                handle_signals(signal.SIG_DFL, PASSED_ON)
                signal.signal(signal.SIGCHLD, on_child)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                exec_command(command, environ, ignored)
            except OSError as error:
                os.write(writer, str(error.errno).encode())
            finally:
                os._exit(NOT_EXECUTABLE)
        os.close(writer)
        ended = wait_for(pid, timeout, passed_on, canary, pipe, early)
        number = int(os.read(reader, 10) or 0)  # an exec that succeeds closes the pipe
        if number:
            raise OSError(number, os.strerror(number))
        return ended
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def wait_for(pid, timeout, passed_on, canary, pipe, waiting):
    """Pass signals on to a process until it ends; return as run_on_posix(). waiting: [(when, signal)]."""
    timed_out, ours_until, deadline = False, 0.0, time.monotonic() + (timeout or FOREVER)
    while True:
        ended, status = os.waitpid(-1, os.WNOHANG)
        now = time.monotonic()
        if ended == pid:
            end_canary(canary)
            return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), timed_out
        try:
            if now >= deadline:  # CONT, since a stopped process would not hear of TERM
                waiting[:0] = [(0.0, signal.SIGKILL if timed_out else signal.SIGTERM), (0.0, signal.SIGCONT)]
                timed_out, deadline = True, now + (FOREVER if timed_out else KILL_AFTER)
            while waiting and waiting[0][0] <= now:
                os.kill(pid, waiting.pop(0)[1])
            if ended == canary and not os.WIFSIGNALED(status):  # it could not run
                canary = None
            elif ended == canary:  # by what was sent to our whole group
                canary = start_canary(pipe)
                if os.getpgid(pid) == os.getpgrp():
                    waiting, ours_until = [], now + 0.02  # for our own copy, or timeout(1)'s second
        except OSError:  # a setuid command takes no signals from us; it is waited for all the same
            pass
        seconds = 0.0 if ended else max(0.0, min([(deadline, 0)] + waiting)[0] - now)
        if hasattr(signal, "sigtimedwait"):
            info = signal.sigtimedwait(passed_on | {signal.SIGCHLD}, seconds)
            number = info and info.si_signo
        else:  # macOS
            time.sleep(min(seconds, 0.02))
            pending = signal.sigpending() & passed_on
            number = signal.sigwait(pending) if pending else None
        if number in passed_on and time.monotonic() >= ours_until:
            waiting.append((time.monotonic() + 0.2, number))


def start_canary(pipe):
    """Start a process that dies of what a terminal or timeout(1) sends to our whole group; return its id."""
    # A cat, which pkill(1) does not take for us, on a pipe, so that it ends when we do.
    try:
        pid = os.fork()
    except OSError:  # no room for one
        return None
    if pid == 0:
        try:
            forbid_core()
            handle_signals(signal.SIG_DFL, PASSED_ON)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.dup2(pipe[0], 0)
            os.dup2(pipe[0], 1)
            os.close(pipe[1])
            os.execve("/bin/cat", ["cat"], {})
        except OSError:  # a system without cat
            os.read(0, 1)
        finally:
            os._exit(0)
    return pid


def end_canary(pid):
    """End what start_canary() returned, and reap it: not every process 1 would."""
    if pid:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def forbid_core():
    """Have no file written where this process, or what it becomes, dumps core. Raises OSError and others."""
    import resource
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))  # 0 still runs core_pattern's


def die_of(number):
    """End this process by a signal's default action, without a core; return where it cannot be (PID 1)."""
    try:
        forbid_core()
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    except (ImportError, AttributeError, OSError, ValueError):  # Windows has none of these
        pass


def report_command(settings, reporter):
    """Run the command and report how it ended; return its exit code, or die of the signal that it died of."""
    limits, error = Limits(1.0), None  # nothing keeps the command waiting for longer

    def hurry(number, frame):
        limits.deadline = min(limits.deadline, limits.clock() + HURRIED_DELIVERY)

    reporter.configure(settings, limits)
    try:
        if settings.trouble:
            raise settings.trouble
        event_from_flags(settings, {"severity": "info", "status": "ok", "message": "-"})
        if not any(settings[name] for name in ("api-key-file", "output", "undelivered")):  # it may be a pipe
            read_key(settings, limits, reporter)
    except Exception as failure:  # whatever it is, the command runs
        error = as_error(failure)
        reporter.log("error: {}; running the command without reporting".format(error))
    limits.deadline = FOREVER
    code, ended_by, why, event = run_command(settings, hurry)
    limits.deadline = min(limits.deadline, limits.clock() + (settings["deadline"] or COMMAND_DELIVERY))
    if why:
        reporter.log("error: " + why)
    if error is None:
        error = deliver_result(event, settings, limits, reporter)
    handle_signals(signal.SIG_IGN, PASSED_ON)  # all is said: nothing is to come between this and the end
    if ended_by:
        die_of(ended_by)
    return error.exit_code if settings["strict"] and error and not code else code


def deliver_result(event, settings, limits, reporter):
    """Send the event about a command's end; return the error, which has been logged, or None."""
    delivery, name = None, event["metadata"]["command"]
    try:
        delivery = run(settings, limits, reporter, event)
        error = delivery.error
    except Exception as failure:
        error = as_error(failure)
    if error is not None:
        text = "could not report the result of {}: {}".format(name, error)
        if delivery and delivery.kept:
            text += "; event kept in " + delivery.undelivered_file.name
        elif delivery and delivery.unkept:
            text += "; event " + delivery.unkept_why.replace("cannot write", "could not be saved to", 1)
        reporter.log("error: " + text)
    return error


# ---- Reporting: the only writer to the standard streams ----------------------------------------------------

MOST_WARNINGS, SHORTEST_SECRET = 20, 6


def redact(text, secrets):
    """Return text without the secrets, also as JSON, HTML and URLs escape them, or cut short by a quote."""
    for secret in secrets:  # nothing is imported: this must work without memory, or where Python lacks html
        forms = [secret, " ".join(secret.split()) or secret, json.dumps(secret)[1:-1],
                 secret.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")]
        forms += [re.sub(unsafe, lambda match: "%{:02X}".format(ord(match.group())), secret)
                  for unsafe in ("[^A-Za-z0-9_.~-]", "[^A-Za-z0-9_.~/-]")]
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, "***")
        start = re.escape(secret[:SHORTEST_SECRET]) + '[^"/:;\\s]*'  # perhaps cut off in the middle
        text = re.sub(start, lambda match, secret=secret: (
            "***" if secret.startswith(match.group()) else match.group()), text)
    return text


class Reporter:
    """Writes to the standard streams, without secrets; a stream that is closed or full changes no verdict."""

    def __init__(self, argv, environ):
        self.verbose, self.limits, self._secrets, self._warnings = False, Limits(), [], 0
        self._progress = self._terminal = self._line_open = False
        self._started = self._shown = time.monotonic()
        self.as_json = environ.get("PACKTRACK_JSON", "").lower() in TRUE  # for an error in the command line
        self.hide(environ.get("PACKTRACK_API_KEY"))
        for word, value in zip(argv, argv[1:] + [""]):
            self.hide(value if word == "--api-key" else word[10:] if word.startswith("--api-key=") else "")
            flag, _, text = word.partition("=")
            if flag in ("--json", "--no-json"):
                self.as_json = ((text or "true").lower() in TRUE) == (flag == "--json")
        self.as_json = self.as_json and "--" not in argv

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

    def log(self, text, form="{}: {}\n"):
        """Write a line to standard error, in place of a line of progress."""
        form, self._line_open = "\r\x1b[K" * self._line_open + form, "\n" not in form
        try:
            if self._line_open:  # it must not take a second line
                text = text[:(os.get_terminal_size(2).columns or 80) - 1]
            self._write(sys.stderr, form.format(PROGRAM, text))
        except (OSError, ValueError, AttributeError):  # closed, full or gone; None, if closed from the start
            pass

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
        self._shown, text = now, "{} record{} read".format(delivery.read, "" if delivery.read == 1 else "s")
        if delivery.delivered:
            text += ", {} delivered, {:.0f}/s".format(delivery.delivered, delivery.delivered / seconds)
        if delivery.total:
            text += ", {:.0f} %".format(100.0 * (delivery.delivered + delivery.undelivered) / delivery.total)
        self.log(text, "{1}" if self._terminal else "{}: {}\n")

    def finish(self, error, code, delivery):
        """Log how the run ended, and print the line of --json."""
        for other in delivery.errors.values():  # what they are about is not delivered, and yet to be named
            if not (other is error or other.is_logged or str(other) == delivery.unkept_why):
                self.warn(str(other))
        if error is not None:
            usage = "\n" + SHORT_USAGE.rstrip() if error.kind == "usage" else ""
            self.log("error: {}{}{}".format(error, describe_account(delivery), usage))
        elif self._line_open:
            self.log("", "{1}")
        if not self.as_json:
            return
        summary = {"ok": code == 0, "exit_code": code, "read": delivery.read, "delivered": delivery.delivered,
                   "undelivered": delivery.undelivered, "invalid": delivery.invalid}
        for name in ("requests", "retries", "bytes_sent"):
            summary[name] = sum(getattr(client, name) for client in delivery.clients)
        summary["seconds"] = round(time.monotonic() - self._started, 3)
        summary["error"] = error and {
            "kind": error.kind, "message": error.args[0], "status": error.status, "where": error.where}
        try:
            self.out(json.dumps(summary) + "\n")
        except InputError as failure:
            self.log("error: the --json summary is lost: {}".format(failure))

    def _write(self, stream, text):
        data = redact(text, self._secrets).encode("utf-8", "backslashreplace")
        try:
            write_all(stream.fileno(), data, self.limits)
        except (Interrupted, RetriesExhaustedError):
            raise OSError("nobody reads it")


def describe_account(delivery):
    """Return the end of the failure line: what was delivered and what was not."""
    read, undelivered, invalid, counts = delivery.read, delivery.undelivered, delivery.invalid, []
    sent = delivery.keep_going or any(client.requests for client in delivery.clients)
    if read > 1 and invalid and not sent:
        counts = ["{} records read, {} invalid, none sent".format(read, invalid)]
    elif read > 1:
        counts = ["delivered {} of {}".format(delivery.delivered, read),
                  "not delivered: " + describe_ranges(delivery.ranges) if delivery.ranges else
                  undelivered and "{} not delivered".format(undelivered),
                  invalid and "{} invalid".format(invalid)]
    counts.append(delivery.unkept and "{} not saved: {}".format(delivery.unkept, delivery.unkept_why))
    return "".join("; " + count for count in counts if count)


def as_error(error):
    """Return the PackTrackError for any exception, such as one that should not have been possible."""
    if isinstance(error, PackTrackError):
        return error
    if isinstance(error, MemoryError):
        return RetriesExhaustedError("out of memory", kind="memory", ends_run=True)
    if isinstance(error, ImportError):
        return PackTrackError(MISSING_MODULE.format(error.name), kind="python", ends_run=True)
    import traceback
    *_, (_, line) = traceback.walk_tb(error.__traceback__)
    return PackTrackError("internal error: {} at line {}; please report it".format(
        type(error).__name__, line), kind="internal", ends_run=True)


# ---- main: from settings to what does the work -------------------------------------------------------------

def read_key(settings, limits, reporter):
    """Return the API key, from its option or from the first line of its file. Raises InvalidError."""
    key, path, text, line = settings["api-key"], settings["api-key-file"], b"", None
    if path:
        try:
            source = Source(path, limits)
            for chunk in source.chunks():
                text += chunk
                if b"\n" in chunk or len(text) > BLOCK:
                    break
            line = text.split(b"\n")[0].strip()
            key = parse_header(line.decode("utf-8"))
        except (InputError, ValueError) as error:
            fault = "contains characters not allowed in a header (not shown)" if line else "is empty"
            why = "the first line of {} {}".format(source.name, fault) if line is not None else str(error)
            raise InvalidError(why, where=settings.sources["api-key-file"])
        if source.is_file and os.name != "nt" and source.identity.st_mode & 0o077:
            reporter.trace("key file is readable by others; chmod 600 {}".format(source.name))
    if not key:
        raise InvalidError("no API key: set PACKTRACK_API_KEY, or use --api-key-file or --api-key")
    if len(key) < SHORTEST_SECRET:
        reporter.trace("the API key is too short to be redacted from messages")
    reporter.hide(key)
    return key


def make_delivery(settings, limits, reporter, source=None):
    """Return the Delivery that the settings describe. source: the input, which it must not write to."""
    undelivered_file, output = (
        None if settings["dry-run"] or settings["health"] or not settings[name] else
        Appender(settings[name], settings.sources[name], limits, source, saving=name == "undelivered")
        for name in ("undelivered", "output"))
    delivery = Delivery(limits, reporter, [], output, undelivered_file, settings["keep-going"],
                        settings["idempotency-key"], settings["health-enable"])
    if output is None and (settings["health"] or not settings["dry-run"]):
        try:
            key = read_key(settings, limits, reporter)
        except InvalidError as error:
            if settings.command is None:
                raise
            delivery.note(error)  # a command's event is saved then
            return delivery
        values = {name.replace("-", "_"): settings[name] for name in (
            "base-url", "timeout", "retries", "backoff-initial", "backoff-max", "jitter", "user-agent",
            "gzip", "health-path")}
        values.update(api_key=key, limits=limits, trace=reporter.trace if reporter.verbose else None,
                      key_source=settings.sources.get("api-key", settings.sources.get("api-key-file")))
        delivery.clients = [Client(**values) for _ in range(settings["connections"] if source else 1)]
    return delivery


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


def deliver_input(settings, limits, delivery, source):
    """Deliver what a Source holds: the chain, from end to end."""
    reader = Reader(source, settings["ndjson"], event_defaults(settings), settings["allow-empty"])
    delivery.streams = settings["async"] and not settings["dry-run"]
    # What came through a pipe is nobody else's: once it is refused, it is read to its end to be saved.
    delivery.keeps_rest = not (delivery.streams or delivery.undelivered_file is None or source.is_file)
    runs = accept_valid(reader, delivery)
    if settings["dry-run"]:
        runs = filter(lambda run: False, runs)  # all are validated, none is sent
    elif delivery.streams:
        runs = read_ahead(runs, delivery, limits, settings["queue-capacity"], settings["flush-interval"],
                          not settings["no-flush"])
    else:
        runs = keep_until_valid(runs, delivery, source.name)
    send_batches(cut_batches(runs, settings["batch-size"], settings["max-batch-bytes"]), delivery)


def run(settings, limits, reporter, event=None):
    """Do what the settings say; return the Delivery. event: a command's, or None. Raises PackTrackError."""
    source = record = None
    if not settings["health"] and (settings["file"] or settings["stdin"]):
        source = Source("-" if settings["stdin"] else settings["file"], limits)
    elif not settings["health"]:
        record = event_from_flags(settings, event or {})
    delivery = make_delivery(settings, limits, reporter, source)
    try:
        if settings["health"]:
            check_health(delivery.clients[0], reporter, delivery.note)
        elif source is not None:
            deliver_input(settings, limits, delivery, source)
        elif not settings["dry-run"]:
            delivery.single, delivery.total, delivery.read = True, 1, 1
            delivery.send(([record], [1]), delivery.clients[0] if delivery.clients else None)
    except Exception as error:  # what was read is still to be accounted for
        delivery.note(as_error(error))
    delivery.finish()
    return delivery


def check_health(client, reporter, note=lambda error: None):
    """Log the service's health; note an InvalidError, whose exit code is 1, unless it is healthy."""
    try:
        client.health_check()
        reporter.trace("the service is healthy")
    except PackTrackError as error:
        why = "the service is not healthy: {}".format(error)
        reporter.trace(why)
        note(InvalidError(why, status=error.status, kind="unhealthy"))


def handle_signals(handler, names=("SIGINT", "SIGTERM", "SIGHUP")):
    """Set the handler of signals that the system has, but for those that are ignored, as by nohup."""
    for number in {getattr(signal, name, signal.SIGTERM) for name in names}:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def stdin_hint():
    """Return words for who forgot --stdin: standard input is a pipe or a file; else nothing."""
    mode = os.fstat(0).st_mode if sys.stdin is not None else 0
    return "; standard input was not read: add --stdin" if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) else ""


def main(argv=None):
    """Run the program with the arguments argv (by default the process's own) and return its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    reporter, limits, error = Reporter(argv, os.environ), Limits(), None
    delivery = Delivery(limits, reporter)
    try:
        settings = resolve(argv, os.environ)
        reporter.as_json = settings["json"]
        if settings["help"] or settings["version"] or settings["completion"]:
            reporter.out(help_text(settings["help"] == "long") if settings["help"] else
                         COMPLETIONS[settings["completion"]]() if settings["completion"] else
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
        delivery = run(settings, limits, reporter)
        error = delivery.error
    except (Interrupted, KeyboardInterrupt):  # the latter before it was handled
        limits.signals = limits.signals or [signal.SIGINT]
    except Exception as failure:
        error = as_error(failure)
    ended_by = limits.signals[0] if limits.signals else None  # a later one only ends the report
    reporter.limits, limits.patience = limits, 1
    handle_signals(limits.handle_signal)
    if ended_by:
        error = PackTrackError("interrupted ({})".format(signal.Signals(ended_by).name), kind="interrupted")
    code = 128 + ended_by if ended_by else 0 if error is None else error.exit_code
    reporter.finish(error, code, delivery)
    if ended_by:
        die_of(ended_by)
    return code


if __name__ == "__main__":
    sys.exit(main())
