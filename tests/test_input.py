"""What is read: accepted, refused, completed; where a fault is; what it costs.

Most of it is about bytes, not processes: tables of inputs for the Reader, each cut into chunks everywhere.
"""
import functools
import os
import time

import pytest

import packtrack_logger
from conftest import MISSING, Case, event, events, matches, ndjson, rows

linux = pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux's /proc")
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
BLOCK, MOST, MARK = 65536, 16 << 20, b"\xef\xbb\xbf"


def line(**overrides):
    return ndjson([event(**overrides)])[:-1]


def holding(text):
    """A record with this text, of JSON or not, as the value of metadata.a."""
    return line(metadata={"a": 0}).replace(b'{"a":0}', b'{"a":' + text + b"}")


def deep(levels):
    return holding(b"[" * (levels - 2) + b"]" * (levels - 2))


def of_size(size):
    return holding(b'"%s"' % (b"x" * (size - len(holding(b'""')))))


class Chunks:
    name, is_file = "in", True

    def __init__(self, chunks):
        self.chunks = chunks.__iter__


def read(chunks, is_ndjson, defaults=()):
    """What the Reader makes of chunks: records (bytes) and (error, exit code, bytes) for what is none."""
    found = []
    try:
        for item in packtrack_logger.Reader(Chunks(chunks), is_ndjson, dict(defaults)).records():
            if isinstance(item, list):
                found += item
            elif item.error is not None:
                found.append((str(item.error), item.error.exit_code, item.raw))
            else:
                found[-1] = (*found[-1][:2], found[-1][2] + item.raw)
    except packtrack_logger.PackTrackError as error:
        found.append((str(error), error.exit_code, b""))
    return found


def pieces(data, size):
    return [data[at:at + size] for at in range(0, len(data), size)]


GOOD = line()
TWO = line(message="two")
OMIT = "; for a JSON object or array omit --ndjson"
BAD = "in:1: invalid JSON: "
NEITHER = "in:1: not a JSON object or array"
NO_OBJECT = "in:1: not a JSON object"
EMPTY = "in: no events found"
MORE = "in:%d: more than one JSON object: use --ndjson for one object per line"
GZIP, ZCAT = b"\x1f\x8b\x08\0", "in: is gzip-compressed; use: zcat FILE | packtrack-logger --stdin"
DIGITS = "in:1: a number of more than 4300 digits"
DEEP = "in:1: more than 500 levels of nesting"
KEY = "in:1: invalid JSON: expecting property name enclosed in double quotes"
MISSING_ALL = "missing required source.system, workflow.id, actor.type, actor.id, severity, status, message"
ESCAPES = b'"\\u00e9\\ud83d\\ude80\\ud800\\\\\\"\\/"'
# Content, what is read of it as JSON, and as NDJSON (left out: the same). <...>: words of a Python version.
EXPECTED = "in:%d: invalid JSON: expected a value at column 1"
READ = {
    "nothing": (b"", [EMPTY]),
    "blank": (b" \r\n\t\n", [EMPTY]),
    "a byte order mark only": (MARK, [EMPTY]),
    "a byte order mark": (MARK + GOOD, [GOOD]),
    "two byte order marks": (MARK * 2 + GOOD, [NEITHER], [BAD + "expected a value at column 1"]),
    "UTF-16": (GOOD.decode("ascii").encode("utf-16"), ["in: is UTF-16: convert it to UTF-8"]),
    "UTF-16, big end first": (b"\xfe\xff\0{", ["in: is UTF-16: convert it to UTF-8"]),
    "UTF-16 without a mark": (GOOD.decode("ascii").encode("utf-16-le"), [KEY], [KEY + " at column 2"]),
    "gzip": (GZIP, [ZCAT]),
    "CRLF": (GOOD + b"\r\n" + TWO + b"\r\n", [GOOD, MORE % 2], [GOOD, TWO]),
    "blank lines": (b"\n\n" + GOOD + b"\n \t\r\n\r\n" + TWO + b"\n\n", [GOOD, MORE % 6], [GOOD, TWO]),
    "spaces around": (b" \t" + GOOD + b" \t\r\n", [GOOD]),
    "an array": (b"[" + GOOD + b"," + TWO + b"]", [GOOD, TWO], [NO_OBJECT + OMIT]),
    "an array over lines": (b"\r\n [\r\n" + GOOD + b"\r\n,\t\n" + TWO + b"\n ]\r\n", [GOOD, TWO], None),
    **{id: (record, [record]) for id, record in (
        ("text", line(message='}{][",\\ a\u2028b\u2029c\u0085d \uffff\U0001f680\u00e9')),
        ("escapes", holding(ESCAPES)), ("500 levels", deep(500)), ("1e-999", holding(b"1e-999")),
        ("501 brackets in a string", line(message="[" * 501)), ("4300 digits", holding(b"9" * 4300)),
        ("501 lists, not nested", holding(b"[" + b"[]," * 500 + b"0]")),
        ("the last of two keys", GOOD[:-1] + b',"message":"last"}'))},
    "the last of two keys is bad": (GOOD[:-1] + b',"message":5}', ["in:1: message: must be a string"]),
    "501 levels": (deep(501), [DEEP]),
    "100,000 levels": (deep(100000), [DEEP]),
    "4301 digits": (holding(b"9" * 4301), [DIGITS]),
    "a sign and 4300 digits": (holding(b"-" + b"9" * 4300), [DIGITS]),
    "1e999": (holding(b"1e999"), ["in:1: a number is too large"]),
    "400 digits and a half": (holding(b"9" * 400 + b".5"), ["in:1: a number is too large"]),
    "NaN": (holding(b"NaN"), ["in:1: NaN is not JSON"]),
    "-Infinity": (holding(b"-Infinity"), ["in:1: -Infinity is not JSON"]),
    "a surrogate in UTF-8": (GOOD.replace(b"done", b"\xed\xa0\x80"), ["in:1: invalid UTF-8"]),
    "overlong UTF-8": (GOOD.replace(b"done", b"\xc0\xaf"), ["in:1: invalid UTF-8"]),
    "UTF-8": (b"[%s,\n%s]" % (GOOD, GOOD.replace(b"done", b"\xff")), [GOOD, "in:2: invalid UTF-8"], None),
    "a raw NUL": (GOOD.replace(b"done", b"d\0"), [BAD + "invalid control character"],
                  [BAD + "invalid control character at column 169"]),
    "a trailing comma": (GOOD[:-1] + b",}", [BAD + "<...>"]),
    "a trailing comma in the array": (b"[" + GOOD + b",]", [GOOD, BAD + "expected a value"], None),
    "commas between lines": (GOOD + b",\n" + TWO, [GOOD, BAD + "extra data"], [
        BAD + "extra data at column 174 (one object per line, no commas between)", TWO]),
    "no comma": (b"[%s %s]" % (GOOD, TWO), [GOOD, BAD + "expected a comma or the end of the array"],
                 [BAD + "expecting ',' delimiter at column 176" + OMIT]),
    "two commas": (b"[" + GOOD + b",," + GOOD + b"]", [GOOD, BAD + "expected a value"], None),
    "comments": (b"// x\n" + GOOD, [NEITHER], [BAD + "expected a value at column 1", GOOD]),
    "a comment in the array": (b"[\n/**/" + GOOD + b"]", ["in:2: invalid JSON: expected a value"], None),
    "single quotes": (GOOD.replace(b'"', b"'"), [KEY], [KEY + " at column 2"]),
    "an object over lines": (b"{\n" + GOOD[1:], [b"{\n" + GOOD[1:]],
                             [KEY + " at column 2" + OMIT, "in:2: invalid JSON: extra data at column 12"]),
    "torn": (GOOD[:-3], [BAD + "unterminated string"], [BAD + "unterminated string at column 167"]),
    "torn after a line": (GOOD + b"\n" + GOOD[:40], [GOOD, MORE % 2],
                          [GOOD, "in:2: invalid JSON: unterminated string at column 37"]),
    "torn array": (b"[%s,\n" % GOOD + GOOD[:40], [GOOD, "in:2: invalid JSON: unterminated string"], None),
    "torn UTF-8": (GOOD.replace(b'done"}', b"\xc3"), [BAD + "unterminated string"], ["in:1: invalid UTF-8"]),
    "an array that is not closed": (b"[" + GOOD, [GOOD, BAD + "it ends too early"],
                                    [BAD + "expecting ',' delimiter at column 175" + OMIT]),
    "[": (b"[", [BAD + "it ends too early"], [BAD + "expected a value at column 2" + OMIT]),
    "[]": (b" [\t ] \n", [EMPTY], [NO_OBJECT + OMIT]),
    "[[]]": (b"[[]]", [NO_OBJECT], [NO_OBJECT + OMIT]),
    "numbers and words": (b"[1,-1.5,1.25e-10,true,false,null]", [NO_OBJECT] * 6, [NO_OBJECT + OMIT]),
    "a mixed array": (b'[%s,"x",[%s],\n1 ,%s]' % (GOOD, GOOD, TWO),
                      [GOOD, NO_OBJECT, NO_OBJECT, "in:2: not a JSON object", TWO], None),
    "bad elements": (b'[\n"x",\n\n%s,[]\n,\n5]' % GOOD, [
        "in:2: not a JSON object", GOOD, *("in:%d: not a JSON object" % number for number in (4, 6))], None),
    "bad lines, good ones between": (b"x\n%s\nx\n\nx\n%s\n" % (GOOD, TWO), [NEITHER], [
        EXPECTED % 1, GOOD, EXPECTED % 3, EXPECTED % 5, TWO]),
    "null": (b"null", [NEITHER], [NO_OBJECT]),
    "bad lines": (b"%s\n\r\n\n%s\nx\n%s\n{}" % (GOOD, TWO, GOOD), [GOOD, MORE % 4], [
        GOOD, TWO, "in:5: invalid JSON: expected a value at column 1", GOOD, "in:7: " + MISSING_ALL]),
}


def differ(expected, found):
    """Whether what was read is not what is expected: records are equal, errors as their templates say."""
    return len(expected) != len(found) or not all(
        isinstance(one, tuple) and matches(wanted, one[0], {}) if isinstance(wanted, str) else one == wanted
        for wanted, one in zip(expected, found))


@pytest.mark.parametrize("name, is_ndjson", [
    (name, is_ndjson) for name in READ for is_ndjson in (False, True) if not is_ndjson or READ[name][-1]])
def test_bytes(name, is_ndjson):
    """The same is read however the bytes are cut, and what is refused is handed on as it came."""
    content, *expected = READ[name]
    whole = read([content], is_ndjson)
    assert not differ(expected[-1 if is_ndjson else 0], whole), whole
    step = len(content) // 700 * 17 + 1
    for at in range(0, len(content) + 1, step):
        assert read([content[:at], content[at:]], is_ndjson) == whole, at
    assert read(pieces(content, 1 if step == 1 else 1000), is_ndjson) == whole
    raw = [one[2] if isinstance(one, tuple) else one for one in whole]
    if is_ndjson and raw != [b""]:
        lines = [one.strip(b" \t\r") for one in content[3 * content.startswith(MARK):].split(b"\n")]
        assert raw == [one for one in lines if one]
    elif not is_ndjson and "JSON: " in str(expected[0][-1]):
        assert content.endswith(raw[-1])


@pytest.mark.parametrize("cut", [BLOCK, 50001, 1 << 20])
@pytest.mark.parametrize("size", [MOST, MOST + 1])
def test_largest_record(size, cut):
    large = of_size(size)
    wanted = [large if size == MOST else "in:1: a record of more than 16 MiB", *[GOOD] * 900]
    for content, is_ndjson in ((b"%s\r\n" % large + (GOOD + b"\n") * 900, True),
                               (b"[%s,\n%s]" % (large, b",\n".join([GOOD] * 900)), False)):
        found = read(pieces(content, cut), is_ndjson)
        if size > MOST and not is_ndjson:  # where it ends past a chunk, so does what can be made out
            found = found[:1] + wanted[1:]
        assert not differ(wanted, found), (is_ndjson, [one for one in found if isinstance(one, tuple)])
        assert isinstance(found[0], bytes) or found[0][2].strip() == large


@pytest.mark.parametrize("begin, is_ndjson", [(b'["', False), (b"{", False), (b'{"', False), (b"", True)])
def test_endless_record(begin, is_ndjson):
    """What is larger than any record is refused before it has all come, and is not held."""
    chunks = iter([begin, *[b"x" * BLOCK] * 300])
    source = Chunks([])
    source.chunks = lambda: chunks
    items = packtrack_logger.Reader(source, is_ndjson, {}).records()
    assert not next(items).ends and not next(items).error
    assert len(list(chunks)) >= 300 - MOST // BLOCK - 4


CUSTOM = '; put custom fields under "metadata"'
FIELDS = "source.system workflow.id actor.type actor.id severity status message timestamp".split()
NAMES = "source.env workflow.name workflow.run_id workflow.step_id actor.display_name".split()
INVALID = {  # what is wrong with it: the message
    **{path: ({path.replace(".", "__"): MISSING}, "missing required " + path) for path in FIELDS[:-1]},
    **{path + " empty": ({path.replace(".", "__"): ""}, path + ": must not be empty") for path in FIELDS},
    **{path + " 5": ({path.replace(".", "__"): 5}, path + ": must be a string") for path in FIELDS + NAMES},
    **{path + " a text": ({path: "x"}, path + ": must be an object")
       for path in ("source", "workflow", "actor", "metadata", "extra")},
    "metadata a list": ({"metadata": []}, "metadata: must be an object"),
    "message null": ({"message": None}, "missing required message"),
    "actor empty": ({"actor": {}}, "missing required actor.type, actor.id"),
    "severity": ({"severity": "loud"}, 'severity: must be one of debug, info, warn, error (got "loud")'),
    "severity INFO": ({"severity": "INFO"}, 'severity: must be one of debug, info, warn, error (got "INFO"); '
                                            'did you mean "info"?'),
    "zzz": ({"status": "zz"}, "status: must be one of ok, failed, skipped, timeout, retrying, unknown <...>"),
    "no zone": ({"timestamp": "2025-01-01T00:00:00"}, "timestamp: <...>missing time zone, e.g. Z"),
    "30 February": ({"timestamp": "2025-02-30T00:00:00Z"}, "timestamp: <...>"),
    "unknown": ({"sevrity": "info"}, 'unknown field "sevrity" (did you mean "severity"?)' + CUSTOM),
    "unknown in workflow": ({"workflow__nmae": "x"},
                            'unknown field "workflow.nmae" (did you mean "workflow.name"?)' + CUSTOM),
    "unknown, like nothing": ({"zzz": 1}, 'unknown field "zzz"' + CUSTOM),
    "unknown and null": ({"zzz": None}, 'unknown field "zzz"' + CUSTOM),
    "in the wrong place": ({"env": "x"}, 'unknown field "env"' + CUSTOM),
    "a long and odd name": ({"\x1b\u202e" + "y" * 300: 1}, 'unknown field "<...>"' + CUSTOM),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid(name):
    """An invalid record is exit 1 and named by source, line and field; the others are read."""
    overrides, message = INVALID[name]
    bad = line(**overrides)
    for content, is_ndjson, where in ((b"%s\n%s\n%s" % (GOOD, bad, TWO), True, "in:2: "),
                                      (b"[%s,\n\n %s,%s]" % (GOOD, bad, TWO), False, "in:3: ")):
        first, (error, code, raw), last = read([content], is_ndjson)
        assert matches(where + message, error, {}), error
        assert len(error) < 400 and error.isprintable()
        assert (first, code, raw, last) == (GOOD, 1, bad, TWO)


J, N = "--file in", "--file in --ndjson"
test_accepted = rows(
    Case("lines", N, files={"in": MARK + GOOD + b"\r\n\r\n" + TWO}, sent=[GOOD, TWO], requests=1),
    Case("array of a pipe", "--stdin", stdin=b"[\n%s,\n%s]" % (GOOD, TWO), sent=[GOOD, TWO], requests=1),
    Case("completed", N + " --status failed --source-env x", files={"in": [event(status=None)]}, requests=1,
         sent=[event(status="failed")]),
    Case("/dev/stdin", "--file /dev/stdin --ndjson", stdin=events(2), marks=[linux], requests=1),
)
test_refused = rows(
    Case("directory", "--file .", code=4, err="error: cannot read .: is a directory"),
    Case("unreadable", "--file /proc/self/mem", marks=[linux], code=4,
         err="error: cannot read /proc/self/mem: input/output error"),
    Case("/dev/null", "--file /dev/null --ndjson", code=4, err="error: /dev/null: no events found"),
    Case("closed standard input", "--stdin", redirect="<&-", marks=[posix], code=4,
         err="error: cannot read standard input: it is closed"),
    Case("gzip", J, files={"in": GZIP}, code=4, err="error: " + ZCAT),
    Case("indented", N, files={"in": b" \t{x\n"}, code=4, err="error: in:1: invalid JSON: expecting property "
         "name enclosed in double quotes at column 4"),
    Case("late line", "--stdin --ndjson --json", stdin=(GOOD + b"\n") * 5000 + b"x\n" + GOOD, code=4,
         err="error: standard input:5001: invalid JSON: expected a value at column 1; 5001 "
             "records read, 1 invalid, none sent",
         json={"read": 5001, "undelivered": 5000, "error": {"where": "standard input:5001"}}),
    Case("late element", J, files={"in": b"[%s,{}]" % b",\n".join([GOOD] * 5000)}, code=1,
         err="error: in:5000: missing required source.system, workflow.id, actor.type, actor.id, "
             "severity, status, message; 5001 records read, 1 invalid, none sent"),
    Case("17 MiB line", N + " --keep-going --undelivered left", code=4, requests=1,
         files={"in": b"%s\n%s\n%s\n" % (GOOD, b"x" * 17 * 2**20, TWO)},
         after={"left": b"x" * 17 * 2**20 + b"\n"}, err="in:2: a record of more than 16 MiB\n"
         "error: in:2: a record of more than 16 MiB; delivered 2 of 3; 1 invalid"),
    *[Case("100 MB " + argv, argv, stdin=b'{"a":"' + b"x" * 100000000, full=True, code=4,
           err="error: standard input:1: a record of more than 16 MiB")
      for argv in ("--stdin", "--stdin --ndjson")],
)
test_empty = rows(
    Case("lines", "--stdin --ndjson --allow-empty --json", stdin=b"\n \n", json={"read": 0, "requests": 0}),
    Case("array", J + " --allow-empty", files={"in": b" [ ] "}),
    Case("async", "--stdin --ndjson --allow-empty --async", stdin=b""),
    Case("not allowed", N + " --keep-going", files={"in": b"\n"}, code=4, err="error: in: no events found"),
)


@posix
def test_fifo(start, server, tmp_path):
    os.mkfifo(str(tmp_path / "fifo"))
    process = start("--file", "fifo", server=server)
    with open(str(tmp_path / "fifo"), "wb", buffering=0) as fifo:
        for piece in pieces(b"[%s,%s]" % (GOOD, TWO), 50):
            fifo.write(piece)
    assert process.result().code == 0
    assert server.raw_records == [GOOD, TWO]


BARE = b'{"message":"x"}'
COSTS = {  # name: what a number of bytes looks like, as records
    "after a large one": lambda n: [of_size(n + 200), *[BARE] * (n // 16)],
    "valid and not": lambda n: [BARE, b"{}"] * (n // 30),
    **{text: functools.partial(lambda text, n: [holding((text * n)[:n])], text.encode("ascii"))
       for text in (" ", "1", "[", "[],", '"",', '"\\', '\\"')},
}


DEFAULTS = event(timestamp="2020-01-01T00:00:00Z", metadata={"a": 1, "b": {"x": 1}})


def cost(records, is_ndjson, size):
    """The processor time of the whole chain, in chunks of that size, seconds."""
    content = b"\n".join(records) if is_ndjson else b"[" + b",".join(records) + b"]"
    chunks = pieces(content, size)
    reporter = packtrack_logger.Reporter([], {})
    delivery = packtrack_logger.Delivery(packtrack_logger.Limits(), reporter, keep_going=True)
    delivery.send = lambda batch, client: None
    reporter.warn = lambda text: None
    begun = time.process_time()
    reader = packtrack_logger.Reader(Chunks(chunks), is_ndjson, DEFAULTS)
    runs = packtrack_logger.accept_valid(reader, delivery)
    runs = packtrack_logger.keep_until_valid(runs, delivery, "in")
    packtrack_logger.send_batches(packtrack_logger.cut_batches(runs, 1000000, 10**9), delivery)
    assert delivery.read
    return time.process_time() - begun


@pytest.mark.parametrize("is_ndjson", [False, True], ids=["json", "ndjson"])
@pytest.mark.parametrize("name, size", [*((name, BLOCK) for name in COSTS), ("after a large one", 1)])
def test_cost(name, size, is_ndjson):
    number = 150000 if size > 1 else 20000
    ratios = []
    while not ratios or ratios[-1] > 9 and len(ratios) < 4:
        few, many = (cost(COSTS[name](n), is_ndjson, size) for n in (number, 4 * number))
        ratios.append(many / max(few, 0.004))
    assert min(ratios) <= 9
