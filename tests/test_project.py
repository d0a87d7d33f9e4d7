"""What holds for the project as a whole: its layout, one version, the form of the module, the workflows."""
import ast
import os
import re
import shutil
import subprocess

import pytest

import packtrack_logger
import promises
import readme
from conftest import ALL_TESTS, MODULE, PYTHON, ROOT, flags, parse_yaml

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SOURCE = MODULE.read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
SECTIONS = ["A poor Python", "Errors", "Limits", "Options", "Texts", "Events", "Input", "Transport",
            "Delivery", "The command runner", "Reporting", "main"]
BANNED = set("Watch Ending AsyncClient Replay Block Scanner Batcher place words told part tell say typing "
             "bulk_fault look_up hang_up PATIENCE GRACE _no_answer guarded as_it_was".split())
MADE = {"dist", "__pycache__"}


def call(*argv):
    done = subprocess.run(argv, cwd=str(ROOT), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=120)
    return done.returncode, done.stdout.decode("utf-8", "replace")


def text_files():
    found = [path for path in ROOT.iterdir() if path.name != "LICENSE"]
    found += [path for folder in ("tests", ".ci", ".github") for path in (ROOT / folder).rglob("*")]
    return [path for path in found if path.is_file() and "cache" not in str(path.relative_to(ROOT))]


def test_layout():
    assert {path.name for path in ROOT.iterdir() if path.name[0] != "."} - MADE == {
        "packtrack_logger.py", "build_zipapp.sh", "Makefile", "README.md", "tests", "LICENSE", "CHANGELOG.md"}
    assert len((ROOT / "LICENSE").read_text().splitlines()) == 202
    texts = {str(path): path.read_text(encoding="utf-8").split("\n") for path in text_files()}
    assert sum(len(texts[path]) - 1 for path in texts if path.startswith(str(ROOT / "tests"))
               and path.endswith(".py")) <= 7300
    assert ["%s:%d" % (path, number) for path in texts if not path.endswith((".md", ".txt"))
            for number, line in enumerate(texts[path], 1) if len(line) > 110] == []


def test_version():
    version, holders = packtrack_logger.VERSION, set()
    for path in text_files():
        text = path.read_text(encoding="utf-8")
        for name, table in readme.readme_tables().items():
            if path.name == "README.md":
                assert "<!-- {0} -->\n{1}<!-- /{0} -->".format(name, table) in text, "run readme.py"
            text = text.replace(table, "")
        if "tests" not in path.parts and re.search(r"(?<![\d.])%s(?![\d.])" % re.escape(version), text):
            holders.add(path.name)
    assert holders == {"packtrack_logger.py", "CHANGELOG.md"} and SOURCE.count(version) == 1
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.*?)\] - \d{4}-\d\d-\d\d$", changelog, re.M) == [version]
    if shutil.which("make"):
        assert call("make", "-s", "print-version") == (0, version + "\n")
        notes = call("make", "-s", "release-notes")[1].strip()
        assert notes and notes in changelog and "## [" not in notes


def test_promises(request):
    assert list(promises.broken(request.config.stash[ALL_TESTS])) == []


def test_module():
    assert len(SOURCE.splitlines()) <= 2600
    tree = ast.parse(SOURCE, feature_version=(3, 6))
    assert re.findall(r"^# -{4} (.+?)(?::.*)? -+$", SOURCE, re.M) == SECTIONS
    assert len(re.findall(r"^ *#(?! ----|!)", SOURCE, re.M)) <= SOURCE.count("\n") / 10
    defined = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert not BANNED & {node.name for node in defined} and "typing" not in SOURCE
    public = tree.body + next(node.body for node in defined if node.name == "Client")
    assert [node.name for node in public if node in defined and node.name[0] != "_" and not (
        ast.get_docstring(node) or node.decorator_list)] == []


@pytest.mark.parametrize("argv, code", [
    (["-V"], 0), (["-h"], 0), (["--zzz"], 1), (flags(severity="loud"), 1), (["--completion", "bash"], 0),
    (["--dry-run", *flags()], 0), (["--file", "none"], 4)], ids=lambda value: str(value)[2:10])
def test_imports(argv, code, run):
    """What only sending needs is not imported without it."""
    if call(PYTHON, "-c", "import sys; sys.exit(sys.version_info < (3, 7))")[0]:
        pytest.skip("-X importtime came with 3.7")
    result = run(*argv, python_flags=["-X", "importtime"])
    found = set(re.findall(r"^import time:.*\| +(\S+)$", result.err, re.M))
    assert result.code == code and "argparse" in found and not found & {
        "urllib.request", "http.client", "ssl", "socket", "email.parser", "typing", "subprocess", "shutil"}


def test_tools():
    pins = (ROOT / "tests" / "requirements.txt").read_text().split("\n")
    pins = [pin for pin in pins if re.match(r"[a-z]+==\d+(\.\d+)+$", pin)]
    assert [pin.split("==")[0] for pin in sorted(pins)] == ["mypy", "pytest", "ruff"]
    ci = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / ".ci" / "run").read_text()))
    assert {"lint", "demo", "test", "test-full", "compat", "build"} <= ci <= TARGETS
    if os.name == "posix" and shutil.which("make"):
        assert set(re.findall(r"^make (\S+)", call("make")[1], re.M)) <= TARGETS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow(path):
    text = path.read_text()
    called = set(re.findall(r"\bmake (?:-\w+ )*([a-z][a-z-]*)", re.sub(r"#.*", "", text)))
    assert called and called <= TARGETS
    assert all((ROOT / name).exists() for name in re.findall(r"\btests/\w+\.py\b|\b\w+\.sh\b", text))
    uses = re.findall(r"uses: (.*)", text)
    assert uses and all(re.match(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", one) for one in uses)
    assert re.search(r"^permissions:\n  contents: read\n", text, re.M)
    assert text.count("persist-credentials: false") == text.count("actions/checkout@")
    assert text.count("timeout-minutes:") == text.count("runs-on:")
    assert all(set(step) & {"run", "uses"} for parsed in parse_yaml(text) or ()
               for job in parsed["jobs"].values() for step in job["steps"])
