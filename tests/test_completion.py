"""Completion in the real shells, on a terminal: what Tab makes of a line, and what it lists."""
import os
import re
import shutil
import subprocess

import pytest

import packtrack_logger
from terminal import Terminal

ZSH = "unsetopt beep promptsp; LISTMAX=0; PS1='READY> '; %s\nautoload -Uz compinit; compinit -u -D; %s"
# How each is started, and what it reads first.
SHELLS = {
    "bash": (["bash", "--noprofile", "--rcfile", "rc", "-i"], """
        bind 'set show-all-if-ambiguous on'; bind 'set bell-style none'; bind 'set enable-bracketed-paste off'
        bind 'set completion-query-items 0'; bind 'set page-completions off'
        PS1='READY> '; . ./script; cd work"""),
    "zsh": (["zsh", "-d", "-i"], ZSH % ("fpath=($PWD $fpath)", "cd work")),
    "zsh-sourced": (["zsh", "-d", "-i"], ZSH % ("", ". ./script; cd work")),
    "fish": (["fish", "--no-config", "-i", "-C", "source rc"], """
        function fish_prompt; echo -n 'READY> '; end; function fish_right_prompt; end
        set -g fish_greeting; set -g fish_autosuggestion_enabled 0; set -g fish_color_normal normal
        source script; cd work"""),
}
PATHS = ["events.json", "my events.json"]
COMMAND = "nightly-backup-command"


def plain(screen):
    """A screen without the quoting of spaces, which differs by shell."""
    return screen.replace("\\ ", " ").replace("'", "")


@pytest.fixture(scope="module", params=sorted(SHELLS))
def press(request, home, scratch):
    """press(typed, awaited) on a new line; once awaited is seen: the line, and what is listed below it."""
    shell, folder = request.param.split("-")[0], scratch / request.param
    if shutil.which(shell) is None:
        pytest.skip("no %s here" % shell)
    script, (argv, rc) = packtrack_logger.COMPLETIONS[shell](), SHELLS[request.param]
    for name, text in {"script": script, "_packtrack-logger": script, "rc": rc + "\n", ".zshrc": rc + "\n",
                       **{"work/" + name: "[]" for name in PATHS}, "bin/packtrack-logger": "#!/bin/sh\n",
                       "bin/" + COMMAND: "#!/bin/sh\n"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755 if name.startswith("bin/") else 0o644)
    env = {"PATH": "%s:%s" % (folder / "bin", os.environ["PATH"]), "HOME": home, "ZDOTDIR": str(folder),
           "TERM": "xterm", "INPUTRC": "/dev/null", "LC_ALL": "C.UTF-8"}
    terminal = Terminal("job", argv, env, folder, columns=200, rows=60)
    terminal.wait_for_screen("READY>")

    def one(typed, awaited):
        since = len(terminal.output)
        terminal.type(b"\x15\x0c")
        terminal.wait_for_screen("READY>", since)
        terminal.type(b"packtrack-logger " + typed.encode("ascii"))
        screen = terminal.wait_for_screen(awaited, since, plain)
        first, _, rest = screen.partition("READY> packtrack-logger ")[2].partition("\n")
        return first.rstrip(), re.sub("READY>.*", "", rest)

    one.shell = shell
    yield one
    terminal.close()


@pytest.mark.parametrize("typed, result", [
    ("--sev", "--severity"), ("--severity d", "--severity debug"), ("--status ret", "--status retrying"),
    ("--completion z", "--completion zsh"), ("--file ev", "--file events.json"),
    ("--file my", "--file my events.json"), ("--undelivered ev", "--undelivered events.json"),
    ("--gzip --command-t", "--gzip --command-timeout"), ("--gzip -- nightly-b", "--gzip -- " + COMMAND),
    ("-- %s ev" % COMMAND, "-- %s events.json" % COMMAND)])
def test_word(typed, result, press):
    assert press(typed + "\t", result)[0] == result


@pytest.mark.parametrize("typed", [
    "--timeout e", "--message e", "-- %s --sev" % COMMAND, "--no-g", "--no-j", "e"])
def test_nothing_is_known(typed, press):
    # What is typed after the Tab shows that it has been dealt with.
    assert press(typed + "\tXY", "XY") == (typed + "XY", "")


@pytest.mark.parametrize("typed, listed", [
    ("--severity ", ["debug", "error", "info", "warn"]),
    ("--status ", ["failed", "ok", "retrying", "skipped", "timeout", "unknown"]),
    ("--completion ", ["bash", "fish", "zsh"]), ("--file ", PATHS), ("--n", ["--ndjson", "--no-flush"]),
    ("--actor-", ["--actor-display", "--actor-id", "--actor-type"])])
def test_list(typed, listed, press):
    screen = press(typed + "\t", listed[-1])[1]
    for option in packtrack_logger.OPTIONS:
        screen = screen.replace(plain(option.help), "")
    assert set(screen.split()) - {"--", "()"} == set(" ".join(listed).split())


@pytest.mark.parametrize("flag", ["--severity", "--status", "--stdin", "--source-env", "--strict"])
def test_help_is_listed(flag, press):
    if press.shell == "bash":
        pytest.skip("bash lists words only")
    (text,) = re.findall(r"%s +(?:-- |\()(.{20})" % flag, press("--s\t", "--strict")[1])
    assert packtrack_logger.BY_NAME[flag[2:]].help.startswith(text)


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_script(shell, run, tmp_path):
    result = run("--completion", shell, key=False, env={"PACKTRACK_SEVERITY": "loud", "LC_ALL": "C"})
    assert (result.code, result.err, result.out) == (0, "", packtrack_logger.COMPLETIONS[shell]())
    for option in packtrack_logger.OPTIONS:
        flag = "-l %s" % option.name if shell == "fish" else "--%s" % option.name
        assert re.search(r"%s(?![\w-])" % re.escape(flag), result.out), flag
    if shutil.which(shell) is None:
        pytest.skip("no %s here" % shell)
    (tmp_path / "script").write_text(result.out)
    done = subprocess.run([shell, "-n", "script"], cwd=str(tmp_path), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=30)
    assert (done.returncode, done.stdout) == (0, b"")
