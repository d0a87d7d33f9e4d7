"""What holds for the project as a whole: its layout, one version, the form of the module, the workflows."""

import ast
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

import packtrack_logger
from conftest import FLAGS, PYTHON, ROOT, flags
from tools import parse_yaml

MODULE = ROOT / "packtrack_logger.py"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MADE = {"dist", "__pycache__"}
HAS_MAKE = pytest.mark.skipif(
    os.name != "posix" or shutil.which("make") is None or shutil.which("sh") is None, reason="no make here"
)


def call(argv, cwd=ROOT, **env):
    """A finished process: (exit code, standard output, standard error)."""
    base = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    done = subprocess.run(
        [str(word) for word in argv],
        cwd=str(cwd),
        env={**base, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def text_files():
    """The project's own text files."""
    found = [path for path in ROOT.iterdir() if path.is_file() and path.name != "LICENSE"]
    for folder in ("tests", ".ci", ".github/workflows"):
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return [path for path in found if "data" not in path.parts and ".git" != path.name]


def tree():
    """The module, parsed as Python 3.6 would."""
    return ast.parse(MODULE.read_text(encoding="utf-8"), feature_version=(3, 6))


# ---- layout ----------------------------------------------------------------------------------------------


def test_the_top_level_holds_what_it_should_and_nothing_else():
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - MADE
    expected = {
        "packtrack_logger.py",
        "build_zipapp.sh",
        "Makefile",
        "README.md",
        "tests",
        "LICENSE",
        "CHANGELOG.md",
    }
    assert names == expected


def test_no_line_is_over_110_columns():
    over = [
        "%s:%d" % (path.relative_to(ROOT), number)
        for path in text_files()
        if path.suffix in (".py", ".sh", ".yml", ".toml", ".ini", "") and path.name != "README.md"
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        if len(line) > 110
    ]
    assert over == []


def test_the_licence_is_the_apache_licence_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text.splitlines()) == 202


# ---- the version -----------------------------------------------------------------------------------------


def test_the_version_stands_in_one_place():
    version = packtrack_logger.VERSION
    holders = set()
    for path in text_files():
        text = path.read_text(encoding="utf-8")
        for table in packtrack_logger.readme_tables().values():
            text = text.replace(table, "")
        if path.parent.name != "tests" and re.search(r"(?<![\d.])%s(?![\d.])" % re.escape(version), text):
            holders.add(path.name)
    assert holders == {"packtrack_logger.py", "CHANGELOG.md"}
    assert MODULE.read_text(encoding="utf-8").count(version) == 1


def test_the_newest_entry_of_the_changelog_is_of_this_version():
    headings = re.findall(
        r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    released = [one for one in headings if one[0] != "Unreleased"]
    assert released[0][0] == packtrack_logger.VERSION
    assert all(date for _, date in released)


def test_the_version_is_told_and_sent(run, server):
    told = run("--version")
    assert (told.code, told.err) == (0, "")
    assert packtrack_logger.VERSION in told.out
    assert run(*FLAGS, server=server).code == 0
    agent = "pack-track-sdk-python/{0} packtrack-logger/{0}".format(packtrack_logger.VERSION)
    assert server.requests[0].headers["user-agent"] == agent


# ---- the module ------------------------------------------------------------------------------------------


def test_the_module_has_at_most_3000_lines():
    assert len(MODULE.read_text(encoding="utf-8").splitlines()) <= 3000


def test_the_module_is_in_the_syntax_of_3_6():
    assert tree().body


def test_one_line_in_ten_or_fewer_is_a_comment():
    lines = MODULE.read_text(encoding="utf-8").splitlines()
    comments = [
        line for line in lines if line.lstrip().startswith("#") and not line.startswith(("#!", "# ----"))
    ]
    assert len(comments) <= len(lines) / 10


def test_public_functions_and_classes_say_what_they_do():
    library = ("Client", "AsyncClient")
    silent = []
    for node in tree().body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            methods = node.body if isinstance(node, ast.ClassDef) and node.name in library else []
            for one in [node, *methods]:
                if isinstance(one, (ast.FunctionDef, ast.ClassDef)) and not one.name.startswith("_"):
                    if ast.get_docstring(one) is None:
                        silent.append("%s:%d" % (one.name, one.lineno))
    assert silent == []


def test_it_imports_the_standard_library_alone_and_not_typing():
    names = set()
    for node in ast.walk(tree()):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    assert "typing" not in names
    library = pathlib.Path(sysconfig.get_paths()["stdlib"]).resolve()
    for name in names:
        if name in sys.builtin_module_names or name in ("msvcrt", "fcntl", "winreg"):
            continue
        spec = importlib.util.find_spec(name)
        assert spec is not None, name
        if spec.origin not in ("frozen", "built-in", None):
            origin = pathlib.Path(spec.origin).resolve()
            assert library in origin.parents and "site-packages" not in origin.parts, name


def imported(run, *argv, **options):
    """The modules that a run imports."""
    result = run(*argv, python_flags=("-X", "importtime"), **options)
    found = set(re.findall(r"^import time:.*\| +(\S+)$", result.err, re.M))
    assert found
    return found


@pytest.mark.parametrize(
    "argv, code",
    [
        (["--version"], 0),
        (["--help"], 0),
        (["--no-such-flag"], 1),
        (flags(severity="loud"), 1),
        (["--dry-run", *FLAGS], 0),
        (["--completion", "bash"], 0),
    ],
    ids=["version", "help", "usage", "value", "dry-run", "completion"],
)
def test_what_only_sending_needs_is_not_imported_without_it(argv, code, run):
    if call([PYTHON, "-c", "import sys; sys.exit(sys.version_info < (3, 7))"])[0]:
        pytest.skip("-X importtime came with 3.7")
    assert run(*argv).code == code
    found = imported(run, *argv)
    for name in ("urllib.request", "http.client", "ssl", "socket", "email.parser"):
        assert name not in found, name


def test_sending_imports_no_typing(run, server):
    if call([PYTHON, "-c", "import sys; sys.exit(sys.version_info < (3, 7))"])[0]:
        pytest.skip("-X importtime came with 3.7")
    code, _, err = call([PYTHON, "-X", "importtime", "-c", "import urllib.request, argparse, json"])
    assert code == 0
    if re.search(r"\| +typing$", err, re.M):
        pytest.skip("the library itself imports it on this version")
    assert "typing" not in imported(run, *FLAGS, server=server)


# ---- the Makefile and the workflows ----------------------------------------------------------------------


def make_targets():
    """The targets of the Makefile."""
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([a-z][a-z-]*):", text, re.M))


@HAS_MAKE
def test_make_alone_tells_of_each_target_for_people():
    code, out, err = call(["make"])
    assert (code, err) == (0, "")
    told = set(re.findall(r"^make (\S+)", out, re.M))
    assert told == make_targets() - {"help", "venv", "bench-quick", "print-version", "release-notes"}
    assert call(["make", "help"])[1] == out
    assert max(len(line) for line in out.splitlines()) <= 100


@HAS_MAKE
def test_install_puts_the_program_under_the_prefix(tmp_path):
    words = ["ARCHIVE=%s" % (tmp_path / "built.pyz"), "DESTDIR=%s" % (tmp_path / "root"), "PREFIX=/opt/tools"]
    code, out, err = call(["make", "install", "PYTHON=" + sys.executable, *words])
    assert code == 0, out + err
    installed = tmp_path / "root" / "opt" / "tools" / "bin" / "packtrack-logger"
    assert installed.read_bytes() == (tmp_path / "built.pyz").read_bytes()
    assert os.listdir(str(installed.parent)) == ["packtrack-logger"]
    code, out, _ = call([installed, "--version"])
    assert (code, packtrack_logger.VERSION in out) == (0, True)
    assert call(["make", "uninstall", *words])[0] == 0
    assert not installed.exists()


@HAS_MAKE
@pytest.mark.parametrize(
    "fails, said",
    [
        ("-c ", "does not run"),
        ("version_info", "Python 3.8 or newer"),
        ("ensurepip", "apt-get install python3-venv"),
    ],
)
def test_make_says_what_the_tests_lack(fails, said, tmp_path):
    (tmp_path / "tests").mkdir()
    for name in ("Makefile", "tests/requirements.txt"):
        shutil.copy(str(ROOT / name), str(tmp_path / name))
    fake = tmp_path / "python3"
    fake.write_text(
        "#!/bin/sh\ncase \"$*\" in *'%s'*) exit 1 ;; esac\nexec '%s' \"$@\"\n" % (fails, sys.executable)
    )
    fake.chmod(0o755)
    code, _, err = call(["make", "venv", "PYTHON=%s" % fake], cwd=tmp_path)
    assert code != 0
    assert said in err.splitlines()[0]
    assert not (tmp_path / ".venv").exists()


@HAS_MAKE
def test_the_release_notes_are_what_the_changelog_says_of_this_version():
    code, out, err = call(["make", "-s", "release-notes"])
    assert (code, err) == (0, "")
    text = (ROOT / "CHANGELOG.md").read_text()
    assert out.strip() and out.strip() in text
    assert "## [" not in out
    assert call(["make", "-s", "print-version"])[1] == packtrack_logger.VERSION + "\n"


def test_the_tools_are_pinned():
    lines = (ROOT / "tests" / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"^[a-z]+==\d+(\.\d+)+$", line) for line in pins)
    assert {line.split("==")[0] for line in pins} == {"pytest", "ruff", "mypy"}


def test_ci_runs_everything():
    text = (ROOT / ".ci" / "run").read_text()
    for target in ("lint", "demo", "test", "test-full", "compat", "build"):
        assert re.search(r"\bmake %s\b(?!-)" % target, text), target


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_commands_that_a_workflow_calls_are_there(path):
    text = path.read_text()
    called = set(re.findall(r"\bmake (?:-\w+ )*([a-z][a-z-]*)", re.sub(r"#.*", "", text)))
    assert called
    assert called <= make_targets()
    for script in re.findall(r"(?:sh|python) ((?:tests/)?\w+\.(?:py|sh))", text):
        assert (ROOT / script).exists(), script
    for test in re.findall(r"tests/test_\w+\.py", text):
        assert (ROOT / test).exists(), test


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_pins_its_actions_by_commit_and_asks_for_the_least(path):
    text = path.read_text()
    uses = re.findall(r"uses: (.*)", text)
    assert uses
    for one in uses:
        assert re.match(r"^[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", one), one
    assert re.search(r"^permissions:\n  contents: read\n", text, re.M)
    assert text.count("persist-credentials: false") == text.count("actions/checkout@")
    assert text.count("timeout-minutes:") == text.count("runs-on:")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_yaml(path):
    documents = parse_yaml(path.read_text())
    if documents is None:
        pytest.skip("no YAML parser here")
    (parsed,) = documents
    for job in parsed["jobs"].values():
        assert {"runs-on", "steps"} <= set(job)
        assert all(set(step) & {"run", "uses"} for step in job["steps"])


def test_there_are_workflows_for_ci_and_for_releases():
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "release.yml"]
