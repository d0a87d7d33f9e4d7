"""Completion in the real shells, on a terminal: what Tab makes of a line, and what it lists."""
import os
import re
import shutil
import subprocess

import pytest

import packtrack_logger

if os.name != "posix":
    pytest.skip("the shells run on POSIX systems", allow_module_level=True)

from terminal import Terminal

# How each is started, and what it reads first.
SHELLS = {
    "bash": (["bash", "--noprofile", "--rcfile", "rc", "-i"], """
        bind 'set show-all-if-ambiguous on'; bind 'set bell-style none'; bind 'set enable-bracketed-paste off'
        bind 'set completion-query-items 0'; bind 'set page-completions off'
        PS1='READY> '; . ./script; cd work"""),
    "zsh": (["zsh", "-d", "-i"], """
        unsetopt beep promptsp; LISTMAX=0; fpath=($PWD $fpath); PS1='READY> '
        autoload -Uz compinit; compinit -u -D; cd work"""),
    "zsh-sourced": (["zsh", "-d", "-i"], """
        unsetopt beep promptsp; LISTMAX=0; PS1='READY> '
        autoload -Uz compinit; compinit -u -D; . ./script; cd work"""),
    "fish": (["fish", "--no-config", "-i", "-C", "source rc"], """
        function fish_prompt; echo -n 'READY> '; end; function fish_right_prompt; end
        set -g fish_greeting; set -g fish_autosuggestion_enabled 0; set -g fish_color_normal normal
        source script; cd work"""),
}
PATHS = ["events.json", "my events.json"]
COMMAND = "nightly-backup-command"


class Line:
    """A shell at its prompt, with the completion loaded. Made by the fixture line."""

    def __init__(self, kind, folder, home):
        argv, rc = SHELLS[kind]
        script = packtrack_logger.completion(kind.split("-")[0])
        for name in ("script", "_packtrack-logger"):
            (folder / name).write_text(script)
        for name in ("rc", ".zshrc"):
            (folder / name).write_text(rc + "\n")
        (folder / "work").mkdir()
        for name in PATHS:
            (folder / "work" / name).write_text("[]")
        (folder / "bin").mkdir()
        for name in (COMMAND, "packtrack-logger"):
            (folder / "bin" / name).write_text("#!/bin/sh\n")
            (folder / "bin" / name).chmod(0o755)
        env = {"PATH": "%s:%s" % (folder / "bin", os.environ["PATH"]), "HOME": home, "ZDOTDIR": str(folder),
               "TERM": "xterm", "INPUTRC": "/dev/null", "LC_ALL": "C.UTF-8"}
        self.kind, self.terminal = kind, Terminal("job", argv, env, folder, columns=200, rows=60)
        self.terminal.wait_for_screen("READY>")

    def press(self, typed, awaited):
        """Type this; what is seen once awaited is there: the line, and what is listed below it."""
        since = len(self.terminal.output)
        self.terminal.type(b"\x15\x0c")
        self.terminal.wait_for_screen("READY>", since)
        self.terminal.type(b"packtrack-logger " + typed.encode("ascii"))
        screen = self.terminal.wait_for_screen(awaited, since, plain)
        first, _, rest = screen.partition("READY> packtrack-logger ")[2].partition("\n")
        return first.rstrip(), re.sub("READY>.*", "", rest)


def plain(screen):
    """A screen without the quoting of spaces, which differs by shell."""
    return screen.replace("\\ ", " ").replace("'", "")


@pytest.fixture(scope="module", params=sorted(SHELLS))
def line(request, home, scratch):
    """A line to type on, again and again, in each shell."""
    shell = request.param.split("-")[0]
    if shutil.which(shell) is None:
        pytest.skip("no %s here" % shell)
    folder = scratch / request.param
    folder.mkdir()
    one = Line(request.param, folder, home)
    yield one
    one.terminal.close()


@pytest.mark.parametrize("typed, result", [
    ("--sev", "--severity"),
    ("--severity d", "--severity debug"),
    ("--status ret", "--status retrying"),
    ("--completion z", "--completion zsh"),
    ("--file ev", "--file events.json"),
    ("--file my", "--file my events.json"),
    ("--undelivered ev", "--undelivered events.json"),
    ("--gzip --command-t", "--gzip --command-timeout"),
    ("--gzip -- nightly-b", "--gzip -- " + COMMAND),
    ("-- %s ev" % COMMAND, "-- %s events.json" % COMMAND),
], ids=lambda value: value.replace(" ", "_"))
def test_tab_completes_the_word(typed, result, line):
    assert line.press(typed + "\t", result)[0] == result


@pytest.mark.parametrize("typed", [
    "--timeout e", "--message e", "-- %s --sev" % COMMAND, "--no-g", "--no-j", "e",
], ids=lambda value: value.replace(" ", "_"))
def test_tab_adds_nothing_where_nothing_is_known(typed, line):
    # What is typed after the Tab shows that it has been dealt with.
    assert line.press(typed + "\tXY", "XY") == (typed + "XY", "")


@pytest.mark.parametrize("typed, listed", [
    ("--severity ", ["debug", "error", "info", "warn"]),
    ("--status ", ["failed", "ok", "retrying", "skipped", "timeout", "unknown"]),
    ("--completion ", ["bash", "fish", "zsh"]),
    ("--file ", PATHS),
    ("--n", ["--ndjson", "--no-flush"]),
    ("--actor-", ["--actor-display", "--actor-id", "--actor-type"]),
], ids=lambda value: value.replace(" ", "") if isinstance(value, str) else "")
def test_tab_lists_what_is_due_and_nothing_else(typed, listed, line):
    screen = line.press(typed + "\t", listed[-1])[1]
    for option in packtrack_logger.OPTIONS:
        screen = screen.replace(plain(option.help), "")
    assert set(screen.split()) - {"--", "()"} == set(" ".join(listed).split())


@pytest.mark.parametrize("flag", ["--severity", "--status", "--stdin", "--source-env", "--strict"])
def test_a_flag_is_listed_with_what_it_is(flag, line):
    if line.kind == "bash":
        pytest.skip("bash lists words only")
    (text,) = re.findall(r"%s +(?:-- |\()(.{20})" % flag, line.press("--s\t", "--strict")[1])
    assert packtrack_logger.BY_NAME[flag[2:]].help.startswith(text)


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_the_script_names_every_flag_and_the_shell_takes_it(shell, run, tmp_path):
    result = run("--completion", shell, key=False, env={"PACKTRACK_SEVERITY": "loud", "LC_ALL": "C"})
    assert (result.code, result.err, result.out) == (0, "", packtrack_logger.completion(shell))
    for option in packtrack_logger.OPTIONS:
        flag = "-l %s" % option.name if shell == "fish" else "--%s" % option.name
        assert re.search(r"%s(?![\w-])" % re.escape(flag), result.out), flag
    if shutil.which(shell) is None:
        pytest.skip("no %s here" % shell)
    (tmp_path / "script").write_text(result.out)
    done = subprocess.run([shell, "-n", "script"], cwd=str(tmp_path), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=30)
    assert (done.returncode, done.stdout) == (0, b"")
