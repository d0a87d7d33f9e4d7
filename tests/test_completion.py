"""Completion in the real shells: what Tab makes of a line, and what it lists."""

import os
import re
import shutil
import subprocess

import pytest

import packtrack_logger
from conftest import KEY
from terminal import Terminal

if os.name != "posix":
    pytest.skip("the shells run on POSIX systems", allow_module_level=True)

SHELLS = ["bash", "zsh", "fish"]
SEVERITIES = ["debug", "error", "info", "warn"]
STATUSES = ["failed", "ok", "retrying", "skipped", "timeout", "unknown"]

# The command shows the words it was given; its end is spelt so that the echo of the line is not taken for it.
SHOW = "packtrack-logger() { printf '<%s>' \"$@\"; printf 'E%s\\n' ND; }"
# What each shell starts with, and where it reads it; `script` is the completion.
RC = {
    "bash": [
        "bind 'set show-all-if-ambiguous on'",
        "bind 'set bell-style none'",
        "bind 'set enable-bracketed-paste off'",
        "bind 'set completion-query-items 0'",
        "bind 'set page-completions off'",
        ". ./script",
    ],
    "zsh": [
        "unsetopt beep promptsp",
        "LISTMAX=0",
        "fpath=($PWD/functions $fpath)",
        "autoload -Uz compinit",
        "compinit -u -D",
    ],
    "zsh-sourced": [
        "unsetopt beep promptsp",
        "LISTMAX=0",
        "autoload -Uz compinit",
        "compinit -u -D",
        ". ./script",
    ],
}
ARGV = {"bash": ["bash", "--noprofile", "--rcfile", ".zshrc", "-i"], "zsh": ["zsh", "-d", "-i"]}


def needs(shell):
    """Skip the test by name where the shell is absent."""
    if shutil.which(shell) is None:
        pytest.skip("no %s here" % shell)


@pytest.fixture
def completion(run):
    """completion(shell) -> the script."""

    def ask(shell):
        result = run("--completion", shell, key=False)
        assert (result.code, result.err) == (0, "")
        assert result.out.endswith("\n")
        return result.out

    return ask


class Line:
    """A shell at its prompt, with the completion loaded."""

    def __init__(self, kind, script, home, folder):
        (folder / "script").write_text(script)
        (folder / "functions").mkdir()
        (folder / "functions" / "_packtrack-logger").write_text(script)
        work = folder / "work"
        work.mkdir()
        for name in ("events.json", "my events.json"):
            (work / name).write_text("[]")
        (folder / ".zshrc").write_text("\n".join([*RC[kind], SHOW, "cd work", "PS1='READY> '", ""]))
        env = {
            "PATH": os.environ["PATH"],
            "HOME": home,
            "TERM": "dumb",
            "INPUTRC": "/dev/null",
            "LC_ALL": "C.UTF-8",
            "ZDOTDIR": str(folder),
            "COLUMNS": "200",
            "LINES": "50",
        }
        self.terminal = Terminal("job", ARGV[kind.split("-")[0]], env, folder)
        self.seen = 0

    def press(self, typed):
        """The line, Tab, Enter: (what was on the screen before the command ran, the command's words)."""
        self.terminal.wait_for(b"READY>", self.seen)
        since = len(self.terminal.output)
        self.terminal.type(typed.encode("ascii") + b"\t\r")
        text = self.terminal.wait_for(b"END", since).decode("utf-8", "replace")
        self.seen = self.terminal.output.index(b"END", since)
        text = re.sub("\x1b\\[[0-9;?]*[A-Za-z]|[\x07\x0f]", "", text)
        screen, shown = text[: text.index("<")], text[text.index("<") :]
        return screen, re.findall("<([^>]*)>", shown)


@pytest.fixture(scope="module", params=sorted(RC))
def line(request, home, tmp_path_factory):
    """A line to type on, again and again, in each shell that edits lines on a terminal."""
    kind = request.param
    shell = kind.split("-")[0]
    needs(shell)
    one = Line(kind, packtrack_logger.completion(shell), home, tmp_path_factory.mktemp("shell"))
    yield one
    one.terminal.close()


@pytest.fixture
def fish(completion, home, tmp_path):
    """fish(line) -> the words that fish offers for it."""
    needs("fish")
    (tmp_path / "script").write_text(completion("fish"))
    for name in ("events.json", "my events.json"):
        (tmp_path / name).write_text("[]")

    def ask(typed):
        done = subprocess.run(
            ["fish", "--no-config", "-c", ". ./script; complete -C '%s'" % typed],
            env={"PATH": os.environ["PATH"], "HOME": home, "LC_ALL": "C.UTF-8"},
            cwd=str(tmp_path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=30,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return sorted(one.split("\t")[0] for one in done.stdout.decode("utf-8").splitlines())

    return ask


# ---- the line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed, words",
    [
        ("--sev", ["--severity"]),
        ("--severity d", ["--severity", "debug"]),
        ("--status ret", ["--status", "retrying"]),
        ("--completion z", ["--completion", "zsh"]),
        ("--file ev", ["--file", "events.json"]),
        ("--file my", ["--file", "my events.json"]),
        ("--undelivered ev", ["--undelivered", "events.json"]),
        ("--gzip --command-t", ["--gzip", "--command-timeout"]),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_tab_completes_the_word(typed, words, line):
    assert line.press("packtrack-logger " + typed)[1] == words


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--severity", SEVERITIES),
        ("--status", STATUSES),
        ("--file", ["events.json", "my events.json"]),
    ],
)
def test_tab_lists_the_values(flag, words, line):
    screen, given = line.press("packtrack-logger %s " % flag)
    listed = screen.split("packtrack-logger")[1]
    for word in words:
        # Shells show a blank in a name as it is, or quoted.
        assert word in listed.replace("\\ ", " "), screen
    others = set(re.findall("[a-z]+", listed)) - set(re.findall("[a-z]+", " ".join([flag, *words])))
    assert not others, screen
    assert given[0] == flag


def test_tab_on_dashes_lists_the_flags(line):
    screen = line.press("packtrack-logger --a")[0]
    assert {"--api-key", "--api-key-file", "--async", "--actor-id", "--actor-type", "--actor-display"} <= set(
        re.findall("--[a-z-]+", screen)
    )


# ---- fish says what it offers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed, words",
    [
        ("--sev", ["--severity"]),
        ("--severity ", SEVERITIES),
        ("--severity d", ["debug"]),
        ("--status ", STATUSES),
        ("--completion ", ["bash", "fish", "zsh"]),
        ("--file ", ["events.json", "my events.json", "script"]),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_fish_offers_the_words(typed, words, fish):
    offered = fish("packtrack-logger " + typed)
    if typed == "--file ":
        assert [one.replace("\\ ", " ") for one in offered] == words
    else:
        assert offered == words


def test_fish_offers_no_files_where_a_word_is_asked_for(fish):
    assert "events.json" not in fish("packtrack-logger --severity e")


# ---- the scripts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_that_is_printed_is_that_of_the_module(shell, completion):
    assert completion(shell) == packtrack_logger.completion(shell)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_names_every_flag(shell, completion):
    script = completion(shell)
    for option in packtrack_logger.OPTIONS:
        flag = "-l %s" % option.name if shell == "fish" else "--%s" % option.name
        assert re.search(r"%s(?![\w-])" % re.escape(flag), script), flag


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_finds_nothing_wrong_with_the_script(shell, completion, tmp_path):
    needs(shell)
    (tmp_path / "script").write_text(completion(shell))
    done = subprocess.run(
        [shell, "-n", "script"],
        cwd=str(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_the_same_whatever_the_environment_holds(shell, run, completion):
    env = {"PACKTRACK_SEVERITY": "loud", "PACKTRACK_FILE": "x", "PACKTRACK_API_KEY": KEY, "LC_ALL": "C"}
    assert run("--completion", shell, env=env).out == completion(shell)


def test_a_shell_that_is_not_known_is_1(run):
    result = run("--completion", "tcsh")
    assert (result.code, result.out) == (1, "")
    assert "bash, zsh, fish" in result.err
