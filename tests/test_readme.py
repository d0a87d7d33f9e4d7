"""The README: every fenced block is run as written, or checked in the way of its language.

A comment before a block says what a test cannot guess:

    <!-- test: needs=jq,flock expect=3 records=2 script=503,200 -->
    <!-- test: continues -->          in the folder and against the server of the block before it
    <!-- test: in=clone -->           in a copy of the repository
    <!-- test: skip it needs a token of yours -->

needs: skipped where such a program is absent. expect: the exit code (default 0; a sh block ends at its first
command that fails, as with `set -e`). records: how many records the service has got from it. script: what the
service answers (see standin.py).

Languages: sh (run by bash), crontab (each line run by sh in cron's environment), ini (a systemd unit, whose
first line is `# /etc/systemd/system/NAME`: verified, and its ExecStart lines run), dockerfile (ENTRYPOINT and
CMD run), yaml (parsed; `run`, `script` and `command` run), python (run), json and ndjson (parsed), powershell
and text (their flags exist). Any other fails.

The blocks see the program as `packtrack-logger` on PATH and as packtrack-logger.pyz (with its .sha256) in the
current folder, beside packtrack_logger.py, event.json, events.json (3 events) and events.ndjson (250).
PACKTRACK_BASE_URL is set to a stand-in and PACKTRACK_API_KEY to `your-key`, the one key that it takes.
/usr/local, /etc, /var, /run, /srv and /opt are folders of the test, with /etc/packtrack/key,
/run/secrets/packtrack/key, /var/run/secrets/packtrack/key (the key) and /usr/local/bin/backup.sh;
https://pack.shimcounty.com is the stand-in. sudo, curl, scp and sleep are replaced: curl fetches the archive
from any address that ends with its name, sleep is short.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

import packtrack_logger
from conftest import ROOT, event, events, ndjson
from standin import StandIn, parse_script
from tools import parse_yaml

README = ROOT / "README.md"
KEY = "your-key"
RUN = ("sh", "crontab", "ini", "dockerfile", "yaml", "python")
OPTIONS = ("needs", "expect", "records", "script", "in", "continues")
POSIX = pytest.mark.skipif(os.name != "posix" or shutil.which("bash") is None, reason="no bash here")

STUBS = {
    "sudo": 'exec "$@"',
    "sleep": "exec %s 0.01" % (shutil.which("sleep") or "sleep"),
    "scp": 'for target in "$@"; do :; done; cp "$1" "${target#*:}"',
    "curl": """
name=
for word in "$@"; do
    case $word in
    *packtrack-logger.pyz) name=packtrack-logger.pyz; url=$word ;;
    *packtrack-logger.pyz.sha256) name=packtrack-logger.pyz.sha256; url=$word ;;
    esac
    if [ "${before:-}" = -o ] || [ "${before:-}" = --output ]; then target=$word; fi
    before=$word
done
[ -n "$name" ] || { echo "curl: only the archive is fetched here" >&2; exit 6; }
cp "$RELEASE/$name" "${target:-${url##*/}}"
""",
    "backup.sh": 'echo "backup: ${1:-all}"',
}


class Block:
    """A fenced block, and what the comment before it says."""

    def __init__(self, heading, line, language, text, comment):
        self.heading = heading
        self.line = line
        self.language = language
        self.text = text
        self.skip = None
        self.options = {}
        if comment:
            if comment.startswith("skip"):
                self.skip = comment[len("skip") :].strip()
            else:
                pairs = (word.partition("=") for word in comment.split())
                self.options = {name: value for name, _, value in pairs}

    def __repr__(self):
        return "README.md:%d" % self.line


def read_blocks(text):
    """The fenced blocks of a Markdown text."""
    blocks = []
    heading = comment = ""
    fence = None
    for number, line in enumerate(text.split("\n"), 1):
        if fence is None:
            start = re.match(r"^( *)(```+)(\S*)\s*$", line)
            marked = re.match(r"^ *<!-- test: (.*?) -->\s*$", line)
            if start:
                fence = (start.group(1), start.group(2), start.group(3), number)
                body = []
            elif marked:
                comment = marked.group(1)
            elif line.startswith("#"):
                heading, comment = line.lstrip("# "), ""
            elif line.strip():
                comment = ""
        elif line.strip() == fence[1]:
            blocks.append(Block(heading, fence[3], fence[2], "\n".join(body) + "\n", comment))
            fence, comment = None, ""
        else:
            indent = fence[0]
            body.append(line[len(indent) :] if line.startswith(indent) else line)
    assert fence is None, "README.md:%d: the block has no end" % fence[3]
    return blocks


TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
BLOCKS = read_blocks(TEXT)


def blocks_of(*languages):
    """The blocks to parametrise a test with."""
    return [
        pytest.param(
            one, id="%d-%s-%s" % (one.line, one.language, re.sub(r"\W+", "-", one.heading).strip("-"))
        )
        for one in BLOCKS
        if one.language in languages
    ]


# ---- a machine to run them on ----------------------------------------------------------------------------


class Machine:
    """A folder that stands for a host, and a server that stands for the service."""

    def __init__(self, root, archive, script):
        self.root = root
        self.work = root / "work"
        self.server = StandIn(script=script, key=KEY)
        folders = (
            "work",
            "home",
            "usr/local/bin",
            "etc/packtrack",
            "etc/systemd/system",
            "var/lib",
            "var/log",
            "var/lock",
            "var/spool/packtrack",
            "run/lock",
            "run/secrets/packtrack",
            "var/run/secrets/packtrack",
            "srv",
            "opt",
            "release",
        )
        for name in folders:
            (root / name).mkdir(parents=True)
        for name in ("etc/packtrack/key", "run/secrets/packtrack/key", "var/run/secrets/packtrack/key"):
            (root / name).write_text(KEY + "\n")
            (root / name).chmod(0o600)
        shutil.copy(str(archive), str(root / "usr/local/bin/packtrack-logger"))
        digest = pathlib.Path(str(archive) + ".sha256").read_text().split()[0]
        for folder in ("work", "release"):
            shutil.copy(str(archive), str(root / folder / "packtrack-logger.pyz"))
            (root / folder / "packtrack-logger.pyz.sha256").write_text("%s  packtrack-logger.pyz\n" % digest)
        shutil.copy(str(ROOT / "packtrack_logger.py"), str(self.work / "packtrack_logger.py"))
        (self.work / "event.json").write_text(json.dumps(event()))
        (self.work / "events.json").write_text(json.dumps(events(3)))
        (self.work / "events.ndjson").write_bytes(ndjson(events(250)))
        for name, text in STUBS.items():
            path = root / "usr/local/bin" / name
            path.write_text("#!/bin/sh\n%s\n" % text.strip("\n"))
            path.chmod(0o755)

    def place(self, text):
        """The text with the machine's places in it."""
        text = text.replace("https://pack.shimcounty.com", self.server.url)
        return re.sub(r"(?<![\w.$}/])/(?=(?:usr/local|etc|var|run|srv|opt)/)", str(self.root) + "/", text)

    def environment(self, **more):
        """What a user's shell has."""
        base = {
            "PATH": "%s:%s" % (self.root / "usr/local/bin", os.environ["PATH"]),
            "HOME": str(self.root / "home"),
            "LOGNAME": "operator",
            "USER": "operator",
            "LC_ALL": "C.UTF-8",
            "RELEASE": str(self.root / "release"),
            "PACKTRACK_BASE_URL": self.server.url,
            "PACKTRACK_API_KEY": KEY,
        }
        return {**base, **more}

    def call(self, argv, env=None, cwd=None, timeout=90):
        """Run to the end, with all that it started; (exit code, output)."""
        process = subprocess.Popen(
            argv,
            env=env or self.environment(),
            cwd=str(cwd or self.work),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output = process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()[0]
            pytest.fail("did not end: %s" % output.decode("utf-8", "replace"))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert KEY.encode("ascii") not in output
        assert b"Traceback" not in output
        return process.returncode, output.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def machines():
    """The machines by the block that made them, for blocks that continue."""
    made = {}
    yield made
    for machine in set(made.values()):
        machine.server.__exit__(None, None, None)


@pytest.fixture
def machine_for(machines, archive, tmp_path_factory):
    """machine_for(block) -> its machine: a new one, or that of the block that it continues."""

    def get(block):
        if block.skip is not None:
            pytest.skip("%r: %s" % (block, block.skip))
        for program in filter(None, block.options.get("needs", "").split(",")):
            if shutil.which(program) is None:
                pytest.skip("%r: no %s here" % (block, program))
        if "continues" in block.options:
            before = [
                one for one in BLOCKS[: BLOCKS.index(block)] if one.language in RUN and one.skip is None
            ]
            if not before or before[-1] not in machines:
                pytest.skip("%r continues a block that was not run" % block)
            machines[block] = machines[before[-1]]
            return machines[block]
        script = parse_script(block.options.get("script", ""))
        machine = Machine(tmp_path_factory.mktemp("host"), archive, script)
        machine.server.__enter__()
        machines[block] = machine
        return machine

    return get


def judge(block, machine, runs, records_before=0):
    """What the comment says, holds for these (exit code, output)."""
    for code, output in runs:
        assert code == int(block.options.get("expect", 0)), "%r: exit code %s\n%s" % (block, code, output)
    if "records" in block.options:
        got = len(machine.server.records) - records_before
        assert got == int(block.options["records"]), "%r: %d records\n%s" % (block, got, runs)
    if "expect" not in block.options:
        assert machine.server.checks == [], block


# ---- the blocks ------------------------------------------------------------------------------------------


def test_there_is_a_readme():
    assert TEXT


def test_every_block_has_a_language_and_options_that_are_known():
    for block in BLOCKS:
        assert block.language in RUN + ("json", "ndjson", "powershell", "text"), block
        assert set(block.options) <= set(OPTIONS), block
        assert block.skip is None or len(block.skip) > 10, "%r: skipped without a reason" % block


@POSIX
@pytest.mark.parametrize("block", blocks_of("sh"))
def test_a_shell_block_runs_as_written(block, machine_for):
    machine = machine_for(block)
    cwd = machine.work
    if block.options.get("in") == "clone":
        cwd = machine.work / "clone"
        shutil.copytree(
            str(ROOT),
            str(cwd),
            ignore=shutil.ignore_patterns(".git", ".venv", "dist", "__pycache__", ".*_cache"),
        )
    before = len(machine.server.records)
    judge(block, machine, [machine.call(["bash", "-e", "-c", machine.place(block.text)], cwd=cwd)], before)


@POSIX
@pytest.mark.parametrize("block", blocks_of("crontab"))
def test_a_crontab_line_runs_as_cron_runs_it(block, machine_for):
    machine = machine_for(block)
    env = {
        "HOME": str(machine.root / "home"),
        "LOGNAME": "operator",
        "SHELL": "/bin/sh",
        "PATH": "/usr/bin:/bin",
        "PACKTRACK_BASE_URL": machine.server.url,
    }
    runs = []
    for line in machine.place(block.text).splitlines():
        assignment = re.match(r"^\s*(\w+)\s*=\s*(.*?)\s*$", line)
        job = re.match(r"^\s*(?:@\w+|(?:[\d*,/-]+\s+){2}[\d*,/-]+\s+[\w*,/-]+\s+[\w*,/-]+)\s+(.*)$", line)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if assignment:
            env[assignment.group(1)] = assignment.group(2).strip("\"'")
            continue
        assert job, "%r: neither a job nor a variable: %s" % (block, line)
        assert not re.search(r"(?<!\\)%", job.group(1)), "%r: cron ends a command at %%" % block
        runs.append(
            machine.call(
                ["/bin/sh", "-c", job.group(1).replace("\\%", "%")], env=env, cwd=machine.root / "home"
            )
        )
    assert runs, block
    judge(block, machine, runs)


def unit_name(block):
    """The name of the unit that the block is."""
    match = re.match(r"^# (/etc/systemd/system/[\w@.-]+)\n", block.text)
    assert match, "%r: the first line does not name the unit" % block
    return match.group(1)


@POSIX
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
@pytest.mark.skipif(not blocks_of("ini"), reason="no units in the README")
def test_systemd_finds_nothing_wrong_with_the_units(archive, tmp_path):
    machine = Machine(tmp_path / "host", archive, [])
    with machine.server:
        paths = []
        for block in BLOCKS:
            if block.language == "ini" and block.skip is None:
                path = pathlib.Path(machine.place(unit_name(block)))
                path.write_text(machine.place(block.text))
                paths.append(str(path))
        assert machine.call(["systemd-analyze", "verify", "--man=no", *paths]) == (0, "")


@POSIX
@pytest.mark.parametrize("block", blocks_of("ini"))
def test_the_commands_of_a_unit_run_as_written(block, machine_for):
    machine = machine_for(block)
    name = unit_name(block).rsplit("/", 1)[1]
    credentials = machine.root / "run/credentials"
    credentials.mkdir(exist_ok=True)
    env = machine.environment(
        SERVICE_RESULT="success", EXIT_CODE="exited", EXIT_STATUS="0", CREDENTIALS_DIRECTORY=str(credentials)
    )
    del env["PACKTRACK_API_KEY"]

    def fill(text):
        specifiers = {
            "%d": str(credentials),
            "%n": name,
            "%N": name.rsplit(".", 1)[0],
            "%H": "host",
            "%i": "one",
            "%%": "%",
        }
        return re.sub(
            "%[a-zA-Z%]", lambda match: specifiers.get(match.group(), match.group()), machine.place(text)
        )

    runs = []
    lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
    for line in lines:
        key, _, value = line.partition("=")
        if key == "LoadCredential":
            credential, _, path = machine.place(value).partition(":")
            shutil.copy(path, str(credentials / credential))
        elif key == "Environment":
            env.update(word.split("=", 1) for word in shlex.split(fill(value)))
        elif key == "EnvironmentFile":
            text = pathlib.Path(fill(value).lstrip("-")).read_text()
            env.update(one.split("=", 1) for one in text.splitlines() if "=" in one)
    for line in lines:
        key, _, value = line.partition("=")
        if key in ("ExecStart", "ExecStartPre", "ExecStartPost", "ExecStopPost"):
            # systemd.service(5): ${NAME} is filled in anywhere, $NAME only as a word of its own.
            words = [
                re.sub(
                    r"\$\$|\$\{(\w+)\}|^\$(\w+)$",
                    lambda match: {"$": "$", **env}.get(match.group().strip("${}") or "$", ""),
                    word,
                )
                for word in shlex.split(fill(value).lstrip("-@:+!"))
            ]
            runs.append(machine.call(words, env=env, cwd=machine.root))
    assert runs or name.endswith((".timer", ".path", ".socket")), block
    judge(block, machine, runs)


@POSIX
@pytest.mark.parametrize("block", blocks_of("dockerfile"))
def test_the_command_of_an_image_runs_as_written(block, machine_for):
    machine = machine_for(block)
    env = machine.environment()
    words = {"ENTRYPOINT": [], "CMD": []}
    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "COPY":
            *sources, target = [word for word in rest.split() if not word.startswith("--")]
            for source in sources:
                assert source.startswith("/") or (machine.work / source).exists() or source == "backup.sh", (
                    block
                )
            assert target.startswith(("/", ".")), block
        elif instruction == "ENV":
            env.update(word.split("=", 1) for word in shlex.split(machine.place(rest)))
        elif instruction in words:
            words[instruction] = json.loads(machine.place(rest))
        else:
            assert instruction in ("FROM", "RUN", "USER", "WORKDIR", "ARG", "LABEL", "#", ""), line
    argv = words["ENTRYPOINT"] + words["CMD"]
    assert argv, block
    judge(block, machine, [machine.call(argv, env=env)])


def commands_of(node, env):
    """(argv or shell text, environment) of each command in a workflow, a pipeline or a Kubernetes object."""
    if isinstance(node, list):
        for one in node:
            yield from commands_of(one, env)
    elif isinstance(node, dict):
        given = node.get("env", node.get("variables", {}))
        if isinstance(given, list):
            given = {one["name"]: one["value"] for one in given if "value" in one}
        env = {**env, **{name: str(value) for name, value in given.items()}}
        if isinstance(node.get("run"), str):
            yield node["run"], env
        for key in ("before_script", "script", "after_script"):
            if isinstance(node.get(key), list):
                yield "\n".join(node[key]), env
            elif isinstance(node.get(key), str):
                yield node[key], env
        if isinstance(node.get("command"), list):
            yield node["command"] + node.get("args", []), env
        for key, value in node.items():
            if key not in ("run", "script", "command", "args", "env", "variables"):
                yield from commands_of(value, env)


def expressions(text):
    """GitHub's `${{ ... }}` filled in."""
    text = re.sub(r"\$\{\{\s*secrets\.\w+\s*\}\}", KEY, text)
    text = re.sub(r"\$\{\{\s*job\.status\s*\}\}", "success", text)
    return re.sub(r"\$\{\{.*?\}\}", "ok", text)


@POSIX
@pytest.mark.parametrize("block", blocks_of("yaml"))
def test_the_commands_of_a_pipeline_run_as_written(block, machine_for):
    machine = machine_for(block)
    documents = parse_yaml(block.text)
    if documents is None:
        pytest.skip("no YAML parser here")
    base = machine.environment(
        GITHUB_RUN_ID="17",
        GITHUB_WORKFLOW="ci",
        GITHUB_REPOSITORY="acme/shop",
        GITHUB_SHA="c0ffee",
        GITHUB_REF_NAME="main",
        GITHUB_ACTOR="octo",
        GITHUB_JOB="build",
        RUNNER_TEMP=str(machine.root / "work"),
        CI_PIPELINE_ID="17",
        CI_JOB_ID="18",
        CI_JOB_NAME="build",
        CI_JOB_STATUS="success",
        CI_PROJECT_PATH="acme/shop",
        CI_COMMIT_SHA="c0ffee",
        CI_COMMIT_REF_NAME="main",
        GITLAB_USER_LOGIN="octo",
    )
    runs = []
    for command, env in commands_of(documents, {}):
        env = {**base, **{name: machine.place(expressions(value)) for name, value in env.items()}}
        if isinstance(command, list):
            argv = [machine.place(str(word)) for word in command]
        else:
            argv = ["bash", "-e", "-c", machine.place(expressions(command))]
        runs.append(machine.call(argv, env=env))
    assert runs or "Secret" in block.text, block
    judge(block, machine, runs)


@pytest.mark.parametrize("block", blocks_of("python"))
def test_a_python_block_runs_as_written(block, machine_for):
    machine = machine_for(block)
    (machine.work / "example.py").write_text(machine.place(block.text))
    judge(block, machine, [machine.call([sys.executable, "example.py"])])


@pytest.mark.parametrize("block", blocks_of("json", "ndjson"))
def test_a_block_of_json_is_json(block):
    for text in [block.text] if block.language == "json" else block.text.splitlines():
        json.loads(text)


@pytest.mark.parametrize("block", blocks_of("powershell", "text"))
def test_the_flags_of_a_block_that_cannot_be_run_exist(block):
    known = {flag for option in packtrack_logger.OPTIONS for flag in option.flags}
    for line in re.sub(r"[`\\^]\n\s*", " ", block.text).splitlines():
        if "packtrack-logger" in line:
            own = line[line.index("packtrack-logger") :].split(" -- ")[0]
            assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", own)) <= known, line


# ---- the rest of the page --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(packtrack_logger.readme_tables()))
def test_a_table_is_what_the_option_table_says(name):
    match = re.search(r"<!-- %s -->\n(.*?)<!-- /%s -->" % (name, name), TEXT, re.S)
    assert match, "README.md lacks <!-- %s --> and <!-- /%s -->" % (name, name)
    assert match.group(1).strip("\n") == packtrack_logger.readme_tables()[name].strip("\n"), (
        "run `make readme`"
    )


def test_the_table_of_flags_comes_last():
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.S)
    assert "<!-- options -->" in prose
    assert not re.search(r"^#", prose[prose.index("<!-- options -->") :], re.M)


def test_links_within_the_project_lead_somewhere():
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.S)
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", prose, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not re.match(r"^[a-z]+:", target):
            assert (ROOT / target.split("#")[0]).exists(), target


RECIPES = {
    "cron_with_flock": ("crontab", r"flock.* -- "),
    "systemd_service": ("ini", r"LoadCredential="),
    "systemd_timer": ("ini", r"OnCalendar="),
    "systemd_failure": ("ini", r"ExecStopPost=|ExecStart=.*packtrack-logger.* -- "),
    "dockerfile": ("dockerfile", r"COPY .*packtrack-logger"),
    "kubernetes_job": ("yaml", r"kind: (Cron)?Job"),
    "github_actions": ("yaml", r"run: "),
    "gitlab": ("yaml", r"script:"),
    "jq": ("sh", r"\bjq\b"),
    "parallel": ("sh", r"xargs .*-P"),
    "split": ("sh", r"\bsplit\b"),
    "no_way_out": ("sh", r"--output "),
    "undelivered": ("sh", r"--undelivered "),
    "retry_on_3": ("sh", r"(-eq|-ne|=) 3\b|\b3\)"),
    "corporate_roots": ("sh", r"SSL_CERT_FILE"),
    "proxy": ("sh", r"(?i)https_proxy"),
    "windows": ("powershell", r"packtrack-logger\.pyz"),
    "batch_file": ("sh", r"--ndjson"),
    "async": ("sh", r"--async"),
    "health": ("sh", r"--health"),
    "dry_run": ("sh", r"--dry-run"),
    "gzip": ("sh", r"--gzip"),
    "checksum": ("sh", r"sha256sum -c|shasum -a 256 -c"),
    "isolated": ("sh", r"python3 -I"),
    "library": ("python", r"packtrack_logger"),
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_handbook_has_a_block_on(name):
    language, words = RECIPES[name]
    assert any(re.search(words, one.text) for one in BLOCKS if one.language == language), words
