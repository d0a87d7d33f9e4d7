"""ACCEPT=1 prints what a failing row should say, as source; ACCEPT=write puts it into the row."""
import ast
import collections
import os
import re
import signal
import sys

MODE = os.environ.get("ACCEPT", "")
WIDTH = 110
ORDER = ["code", "err", "out", "json", "requests", "proxied", "sent", "after"]
NOTES = collections.defaultdict(list)  # path: (line of the row, its id, {field: source})


def find_place():
    """Where the row that is being made stands, or None: (path, line)."""
    if MODE:
        frame = sys._getframe(3)
        return frame.f_code.co_filename, frame.f_lineno
    return None


def template(text, names):
    """The text with what differs from run to run replaced by its name, as rows write it."""
    for name in ("url", "host", "proxy", "refused", "tmp", "root", "port"):
        if name in names:
            text = re.sub(r"(?<![\w.])%s(?!\d)" % re.escape(str(names[name])), "{%s}" % name, text)
    text = re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", "<time>", text)
    return re.sub(r"\b\d+(\.\d+)?(?= ?(ms|s)\b)", lambda match: "<s>" if match.group(1) else "<n>", text)


def lines_of(content):
    """A file's content as source: events(N), a part of them, or bytes."""
    numbers = [int(number) for number in re.findall(rb'"message":"event (\d+)"', content)]
    if numbers and [*range(numbers[0], numbers[-1] + 1)] == numbers and len(numbers) == content.count(b"\n"):
        return "events(%d)%s" % (numbers[-1], "[%d:]" % (numbers[0] - 1) if numbers[0] > 1 else "")
    return repr(content)


def source(case, field, actual, files, names):
    """What the row should say of this field."""
    if field == "err":
        return quote(template(actual, names))
    if field == "out":
        return quote(template(actual, names))
    if field == "json":
        if actual is None:
            return "None"
        wanted = case.json or ("read", "delivered", "undelivered", "invalid", "requests", "retries")
        value = {name: actual.get(name) for name in wanted}
        if actual["error"] is not None and (not case.json or "error" in case.json):
            known = (case.json or {}).get("error") or ("kind", "status", "where")
            value["error"] = {name: actual["error"].get(name) for name in known}
        return fold(template(repr(value), names))
    if field in ("requests", "proxied"):
        return str(len(actual) if not isinstance(getattr(case, field), list)
                   else [len(request.events) for request in actual])
    if field == "sent":
        numbers = [one.get("message") for one in actual]
        same = numbers == ["event %d" % n for n in range(1, len(numbers) + 1)]
        return "events(%d)" % len(numbers) if same and numbers else repr(actual)
    if field == "after":
        return fold("{%s}" % ", ".join("%r: %s" % (name, "None" if content is None else lines_of(content))
                                       for name, content in actual.items()
                                       if name not in files or content != files[name]))
    return repr(actual)


def quote(text):
    """The text as source, cut into lines at spaces."""
    pieces = re.findall(r".{0,83}\n|.{1,83}(?: |$)|.{1,84}", text) or [""]
    return "\n".join('"%s"' % repr("\"'" + piece)[4:-1].replace('"', r"\"").replace(r"\'", "'")
                     for piece in pieces)


def fold(text):
    """A value's source with double quotes, cut into lines at commas."""
    if '"' not in text:
        text = text.replace("'", '"')
    pieces = re.findall(r".{1,89}(?:, |$)|.{1,90}", text) if len(text) >= 90 else [text]
    return "\n".join(piece.rstrip() for piece in pieces)


def note(case, sources):
    """Print the fields of a failing row, and keep them for write()."""
    if MODE:
        print("\n# %s\n%s" % (case.id, ",\n".join("%s=%s" % pair for pair in sources.items())))
    if MODE == "write":
        NOTES[case.place[0]].append((case.place[1], case.id, sources))


def write():
    """Put into the files what was noted. Rows that a loop makes are left as they are."""
    for path, notes in NOTES.items():
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
        starts = [0]
        for line in text.encode("utf-8").splitlines(True):
            starts.append(starts[-1] + len(line))
        data = text.encode("utf-8")
        calls = {(node.lineno, node.args[0].value): node for node in ast.walk(ast.parse(text))
                 if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Case" and node.args
                 and isinstance(node.args[0], ast.Constant)}
        edits = []
        for (line, name), sources in {(line, name): sources for line, name, sources in notes}.items():
            call = calls.get((line, name))
            if call is None:
                print("accept: %s:%d: not written: %s" % (path, line, name))
                continue
            indent = "\n" + " " * (call.col_offset + 5)
            present = {keyword.arg: keyword.value for keyword in call.keywords}
            added = []
            for field in sorted(sources, key=ORDER.index):
                new = sources[field].replace("\n", indent + " " * (len(field) + 1))
                if field in present:
                    value = present[field]
                    edits.append((starts[value.lineno - 1] + value.col_offset,
                                  starts[value.end_lineno - 1] + value.end_col_offset, new))
                else:
                    added.append("%s=%s" % (field, new))
            end = starts[call.end_lineno - 1] + call.end_col_offset - 1
            room = WIDTH - (end - starts[call.end_lineno - 1]) - 3
            for new in added:
                fits = "\n" not in new and len(new) + 2 <= room
                edits.append((end, end, (", " if fits else "," + indent) + new))
                room = room - len(new) - 2 if fits else WIDTH - 3 - (
                    len(new.rpartition("\n")[2]) + (0 if "\n" in new else len(indent) - 1))
        for start, end, new in sorted(edits, key=lambda edit: edit[0])[::-1]:
            data = data[:start] + new.encode("utf-8") + data[end:]
        with open(path, "wb") as file:
            file.write(data)


def code_name(code):
    """An exit code as rows write it: a number, or the name of the signal."""
    return code if code >= 0 else signal.Signals(-code).name[3:]
