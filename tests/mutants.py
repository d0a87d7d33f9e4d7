"""How much do the tests notice? Changes the module in small ways and runs the tests of the changed line.

    python tests/mutants.py [--count 300] [--seed 1] [--jobs 2] [--only SECTION] [--coverage] [FILES...]

--coverage only says which lines and branches no test runs, save those whose first line has a comment that
names Windows or macOS. Survivors that change nothing stand, with the reason, in mutants_equivalent.txt:
blocks of a line that begins with #, the function, and the lines that go and come. Exit code 1: fewer than
90 % were noticed, or 85 % of a section; or lines that no test runs.

Works in copies of the tree. Which lines each test runs is traced once and kept in dist/ until module or test
change. A mutant gets the tests of its line, first those that noticed others in its function, then those
that run little else, or what few run, and take little time, until one fails or LONGEST is over. As a
plugin of pytest (-p mutants) it notes or picks what runs.
"""
import argparse
import ast
import collections
import concurrent.futures
import difflib
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent
MODULE = "packtrack_logger.py"
EQUIVALENT = TESTS / "mutants_equivalent.txt"
LONGEST = 60  # seconds of tests for one mutant
NOT_HERE = re.compile(r"#.*\b(Windows|macOS)\b")

# Imported by the copied module's first import: notes each new step from line to line in a mapped file, which
# outlives a kill and needs no descriptor.
LINETRACE = '''
import _thread, mmap, os, sys, threading, time
HERE, SIZE = os.path.dirname(os.path.abspath(__file__)), 4 << 14
def switch():
    global at, log, seen
    seen, at, log = {0}, 0, bytearray(SIZE)
    try:
        with open(os.path.join(HERE, "current")) as file:
            name = "%s.%d.%d" % (file.read(), os.getpid(), time.monotonic() * 1e6)
        with open(os.path.join(HERE, name), "w+b") as file:
            file.truncate(SIZE)
            log = mmap.mmap(file.fileno(), 0)
    except (OSError, ValueError):
        pass
def tracer(frame, event, arg):
    if not frame.f_code.co_filename.endswith("packtrack_logger.py"):
        return None
    name, before = frame.f_code.co_name, 0
    mask = 0 if name[0] == "<" and name != "<module>" else 65535
    def local(frame, event, arg):
        global at
        nonlocal before
        line = frame.f_lineno if event == "line" else 0
        pair = before & mask | line << 16
        if pair not in seen and event != "exception":
            seen.add(pair)
            if at < SIZE:
                log[at:at + 4] = pair.to_bytes(4, "little")
                at += 4
        before = line
        return local
    return local
switch()
getattr(os, "register_at_fork", lambda **_: None)(after_in_child=switch)
frame = sys._getframe()
while not frame.f_code.co_filename.endswith("packtrack_logger.py"):
    frame = frame.f_back
frame.f_trace = tracer(frame, "call", None)
sys.settrace(tracer)
threading.settrace(tracer)
_thread.start_new_thread = lambda work, *more, begin=_thread.start_new_thread: begin(
    lambda *arguments: (sys.settrace(tracer), work(*arguments)), *more)
'''
OUTCOMES = {}


def pytest_addoption(parser):
    parser.addoption("--mutants", type=pathlib.Path, help="the folder of pick, current and outcomes")


def pytest_collection_modifyitems(config, items):
    pick = config.getoption("--mutants") / "pick"
    if pick.exists():
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[name] for name in json.loads(pick.read_text(encoding="utf-8")) if name in by_name]


def pytest_runtest_setup(item):
    OUTCOMES[item.nodeid] = ("skipped", 0)
    (item.config.getoption("--mutants") / "current").write_text(digest(item.nodeid.encode()))
    if "linetrace" in sys.modules:
        sys.modules["linetrace"].switch()


def pytest_runtest_logreport(report):
    if report.failed or report.when == "call" and OUTCOMES[report.nodeid][0] != "failed":
        OUTCOMES[report.nodeid] = (report.outcome, report.duration)


def pytest_sessionfinish(session):
    (session.config.getoption("--mutants") / "outcomes").write_text(json.dumps(OUTCOMES), encoding="utf-8")


def digest(data):
    return hashlib.sha256(data).hexdigest()


class Module:
    """The text of the module and what can be said of its lines."""

    def __init__(self, text):
        self.text, self.lines, self.tree = text, text.split("\n"), ast.parse(text)
        self.data, self.sections, self.left_out, name = text.encode(), [""], set(), "Head"
        self.starts = [0, *(match.end() for match in re.finditer(b"\n", self.data))]
        for line in self.lines:
            banner = re.match(r"# ---- ([^:\-]+)", line)
            name = banner.group(1).strip() if banner else name
            self.sections.append(name)
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.stmt, ast.ExceptHandler)):
                self.leave_out(node.lineno, getattr(node, "body", [node]))
                if getattr(node, "orelse", None):
                    self.leave_out(node.orelse[0].lineno - 1, node.orelse)

    def leave_out(self, first, block):
        if NOT_HERE.search(self.lines[first - 1]):
            self.left_out.update(range(first, block[-1].end_lineno + 1))

    def report_coverage(self, steps):
        """Print what no test runs; return the number of such lines and branches."""
        run, missing = {line for _, line in steps}, []
        for node in ast.walk(self.tree):
            first = getattr(node, "lineno", 0)
            if not isinstance(node, ast.stmt) or first in self.left_out:
                continue
            no_code = isinstance(node, (ast.Global, ast.Nonlocal, ast.Try)) or node.col_offset == 0 or (
                isinstance(getattr(node, "value", None), ast.Constant) and isinstance(node, ast.Expr))
            end = node.body[0].lineno if hasattr(node, "body") else node.end_lineno + 1
            if not run.intersection(range(first, max(end, first + 1))):
                missing += [] if no_code else [(first, "is not run")]
            elif isinstance(node, (ast.If, ast.While, ast.For)) and node.body[0].lineno > first:
                test = getattr(node, "test", getattr(node, "iter", None))
                span = range(first, test.end_lineno + 1)
                ends = {to == node.body[0].lineno for at, to in steps if at in span and to not in span}
                missing += [(first, "is never %s" % str(taken).lower())
                            for taken, block in ((True, node.body), (False, node.orelse))
                            if taken not in ends and not isinstance(test, ast.Constant)
                            and not (block and block[0].lineno in self.left_out)]
        for line, what in sorted(missing):
            print("line %d %s: %s" % (line, what, self.lines[line - 1].strip()))
        print("coverage: %d lines and branches are missing" % len(missing))
        return len(missing)

    def mutations(self, node=None, function="module"):
        """(line, start, end, new source, function) of every change; start and end in bytes."""
        for child in ast.iter_child_nodes(node or self.tree):
            if isinstance(child, ast.JoinedStr) or getattr(child, "lineno", 0) in self.left_out:
                continue
            inner = child.name if isinstance(child, ast.FunctionDef) else function
            for new in changes(child, lambda one: self.data[slice(*self.span(one))].decode("utf-8")):
                yield (child.lineno, *self.span(child), new, inner)
            yield from self.mutations(child, inner)

    def span(self, node):
        return (self.starts[node.lineno - 1] + node.col_offset,
                self.starts[node.end_lineno - 1] + node.end_col_offset)


OTHER = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
         ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}


def changes(node, source):
    """What may stand in place of a node, as source."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield " ".join((source(node.left), OTHER[type(node.ops[0])], source(node.comparators[0])))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "(%s)" % source(node.operand)
    elif isinstance(node, ast.BoolOp):
        yield "(%s)" % (" or " if isinstance(node.op, ast.And) else " and ").join(
            "(%s)" % source(value) for value in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        yield "(%s) %s (%s)" % (source(node.left), "+-"[isinstance(node.op, ast.Add)], source(node.right))
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        yield str(not node.value) if isinstance(node.value, bool) else "(%r)" % (node.value + 1)
    elif isinstance(node, ast.Call) and len(node.args) > 1 and not any(
            isinstance(one, ast.Starred) for one in node.args):
        words = [source(one) for one in node.args] + [
            ("%s=" % one.arg if one.arg else "**") + source(one.value) for one in node.keywords]
        if words[0] != words[1] and source(node.func) not in ("min", "max"):
            yield "%s(%s)" % (source(node.func), ", ".join([words[1], words[0], *words[2:]]))
    elif isinstance(node, ast.Return) and node.value is not None and source(node) != "return None":
        yield "return None"
    elif isinstance(node, (ast.Raise, ast.AugAssign, ast.Continue, ast.Break)) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or (
            isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript))):
        yield "pass"


def block_of(function, text, changed):
    """A mutant as the list of equivalents has it."""
    diff = difflib.unified_diff(text.split("\n"), changed.split("\n"), lineterm="", n=0)
    lines = [line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return function + "\n" + "\n".join(line[0] + " " + line[1:].strip() for line in lines)


class Tree:
    """A copy of the project, for one process at a time."""

    def __init__(self, folder):
        self.folder, self.stamp = pathlib.Path(folder, "tree"), int(time.time())
        self.notes = pathlib.Path(folder, "notes")
        self.notes.mkdir(parents=True)
        shutil.copytree(str(ROOT), str(self.folder), symlinks=True, ignore=shutil.ignore_patterns(
            ".git", ".venv", "dist", "__pycache__", ".*_cache"))
        # A mutant may send a signal to anybody: where that can be, its processes are by themselves.
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.alone = alone if shutil.which("unshare") and subprocess.run(
            [*alone, "true"], stderr=subprocess.DEVNULL).returncode == 0 else []

    def run(self, text, pick, *arguments, timeout=None):
        """Run tests on this text of the module; {test: (outcome, seconds)}. To be ended is to have failed."""
        (self.folder / MODULE).write_text(text, encoding="utf-8")
        self.stamp += 2  # so that no cache is taken for it
        os.utime(str(self.folder / MODULE), (self.stamp, self.stamp))
        (self.notes / "outcomes").write_text('{"all": ["failed", 0]}')
        if pick:
            (self.notes / "pick").write_text(json.dumps(pick), encoding="utf-8")
            arguments += tuple({name.split("::")[0] for name in pick})
        tests = str(self.folder / TESTS.name)
        process = subprocess.Popen(
            [*self.alone, sys.executable, "-m", "pytest", "-m", "not full", "-p", "shard", "-p", "mutants",
             "-o", "pythonpath=. " + tests, "--mutants", str(self.notes), *arguments],
            cwd=str(self.folder), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "PROGRAM_FORMS": "py", "PYTHONPATH": tests, "PYTHONDONTWRITEBYTECODE": "1"})
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return json.loads((self.notes / "outcomes").read_text(encoding="utf-8"))

    def trace(self, text, claims, selection):
        """Run a share of the tests with linetrace; {test: (outcome, seconds, steps)}."""
        (self.notes / "current").write_text("none")
        (self.notes / "linetrace.py").write_text(LINETRACE)
        prelude = "import sys; sys.path.insert(0, %r); import linetrace; del sys.path[0]; " % str(self.notes)
        outcomes, steps = self.run(re.sub("(?m)^(?=import )", lambda _: prelude, text, count=1), None,
                                   "--claims", claims, *selection), collections.defaultdict(set)
        for path in self.notes.glob("*.*.*"):
            steps[path.name.split(".")[0]].update(struct.iter_unpack("<HH", path.read_bytes()))
        return {name: (*outcome, sorted(steps[digest(name.encode())] - {(0, 0)}))
                for name, outcome in outcomes.items() if name != "all"}


def learn(text, trees, pool, tests):
    """What trace() found of these files in this state of module and tests: kept in dist/, or found now."""
    kept = ROOT / "dist" / "mutants.json"
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    common = [TESTS / name for name in ("conftest.py", "standin.py", "steps.py")]
    keys = {test: digest(b"".join(path.read_bytes() for path in (ROOT / MODULE, *common, ROOT / test)))
            for test in tests}
    new = [test for test in tests if keys[test] not in known]
    if new:
        claims = str(trees[0].notes / "claims")
        for part in pool.map(lambda tree: tree.trace(text, claims, new), trees):
            for name, found in part.items():
                known.setdefault(keys[name.split("::")[0]], {})[name] = found
        if not all(keys[test] in known for test in new):
            sys.exit("not every file ran: does pytest collect them?")
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps({key: known[key] for key in keys.values()}), encoding="utf-8")
    return {name: found for test in tests for name, found in known.get(keys[test], {}).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag, default in (("--count", 300), ("--seed", 1), ("--jobs", os.cpu_count() or 1)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--only", default="", help="a section's name, or a part of it")
    parser.add_argument("--coverage", action="store_true")
    parser.add_argument("tests", nargs="*", help="only these files")
    options = parser.parse_args()
    module = Module((ROOT / MODULE).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        trees = [Tree(os.path.join(folder, str(number))) for number in range(options.jobs)]
        found = learn(module.text, trees, pool, options.tests or sorted(
            "%s/%s" % (TESTS.name, path.name) for path in TESTS.glob("test_*.py")))
        print("%d tests" % len(found), *sorted("fails without a mutant, and is left out: " + name
              for name in found if found[name][0] == "failed"), sep="\n", flush=True)
        if options.coverage:
            return module.report_coverage({tuple(step) for one in found.values() for step in one[2]}) > 0
        return run_mutants(options, module, trees, pool, {
            name: (seconds, {line for _, line in steps}) for name, (outcome, seconds, steps) in found.items()
            if outcome == "passed" and steps})


def run_mutants(options, module, trees, pool, tests):
    """Try the mutants; print survivors and the score."""
    found = [one for one in module.mutations() if options.only.lower() in module.sections[one[0]].lower()]
    random.Random(options.seed).shuffle(found)
    text = EQUIVALENT.read_text(encoding="utf-8") if EQUIVALENT.exists() else ""
    known = {block.split("\n", 1)[1].strip() for block in text.strip().split("\n\n") if "\n" in block}
    kills, score, began = collections.Counter(), {}, time.monotonic()
    often = collections.Counter(line for _, ran in tests.values() for line in ran)
    first = next(node.lineno for node in module.tree.body if isinstance(node, ast.Assign))
    everywhere, worth = 0.98 * often[first], collections.Counter()
    for name, (seconds, ran) in tests.items():  # what few run of a section is worth most
        for line in ran:
            worth[module.sections[line], name] += 1 / often[line] / (seconds + 0.05)

    def attempt(one):
        line, start, end, new, function = one
        changed, total, picked = (module.data[:start] + new.encode() + module.data[end:]).decode(), 0.0, []
        if block_of(function, module.text, changed) in known:
            return line, changed, function, "is known"
        # What runs when the module is imported may matter to any test.
        names = [name for name, (_, ran) in tests.items() if line in ran or often[line] > everywhere]
        place = dict.fromkeys(names, len(names))
        for key in (lambda one: -worth[module.sections[line], one],
                    lambda one: len(tests[one][1]) * tests[one][0]):  # and what runs little else
            place.update((name, min(place[name], at)) for at, name in enumerate(sorted(names, key=key)))
        for name in sorted(names, key=lambda one: (-10 * kills[function, one] - kills[one], place[one])):
            total += tests[name][0]
            if picked and total > LONGEST:
                break
            picked.append(name)
        if not picked:
            return line, changed, function, "is not run by any test"
        tree = trees.pop()
        outcomes = tree.run(changed, picked, "-x", timeout=20 + 3 * total)
        trees.append(tree)
        bad = [name for name, (outcome, _) in outcomes.items() if outcome == "failed"]
        bad += [] if outcomes else ["all"]  # it cannot even be imported
        kills.update([*bad, *((function, name) for name in bad)])
        return line, changed, function, None if bad else "survives %d of %d tests" % (len(picked), len(names))

    for line, changed, function, survived in pool.map(attempt, found[:options.count]):
        block = block_of(function, module.text, changed)
        if survived and block in known:
            continue
        for name in (module.sections[line], "all"):
            score.setdefault(name, [0, 0])[not survived] += 1
        if survived:
            print("\n# %s, line %d, %s\n%s" % (module.sections[line], line, survived, block), flush=True)
    print()
    for name, (alive, dead) in sorted(score.items(), key=lambda one: one[0] == "all"):
        print("%-50s %3d of %3d: %3d %%" % (name, dead, alive + dead, 100 * dead // (alive + dead)))
    print("%d s" % (time.monotonic() - began))
    return any(alive > (0.1 if name == "all" else 0.15) * (alive + dead)
               for name, (alive, dead) in score.items())


if __name__ == "__main__":
    sys.exit(main())
