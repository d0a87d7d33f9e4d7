"""The README: every fenced block is run as written, or checked in the way of its language.

What a test cannot guess stands behind the language, where no reader sees it (```sh needs=jq records=2):

    needs=jq,flock      skipped where such a program is absent;  in=clone  in a copy of the repository
    expect=3            the exit code (default 0); a sh block ends at its first command that fails
    records=2           how many records the service gets from it;  script=503,200  what it answers
    save=/PATH          the block is this file on every machine, and is not run
    feed=/PATH          lines are appended to this file until the service has the records; TERM ends the block

Languages: sh, crontab (run as cron does), ini (a systemd unit that begins with its path: verified, run),
dockerfile, yaml (its run, script, command, argv), groovy (its sh '''...'''), python, json. Any other fails.

A Machine is a folder that stands for a host: /usr/local, /etc, /var, /run, /srv are folders in it, STUBS are
its programs, and https://pack.shimcounty.com is a stand-in of the service.
"""
import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import packtrack_logger
from conftest import ROOT, event, events, ndjson, parse_yaml
from standin import StandIn

KEY = "your-key"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.S)
JOURNAL = [{"MESSAGE": "started", "PRIORITY": "6", "__REALTIME_TIMESTAMP": "1764063000123456"},
           {"MESSAGE": [255, 10], "PRIORITY": "3", "__REALTIME_TIMESTAMP": "1764063001123456"}]
STUBS = {
    "sudo": 'exec "$@"', "backup.sh": 'echo "backup: ${1:-all}"',
    "sleep": "exec %s 0.01" % shutil.which("sleep"),
    "journalctl": "printf '%s\\n' " + " ".join(shlex.quote(json.dumps(one)) for one in JOURNAL),
    # What follows the image's name are the arguments of its entry point.
    "docker": 'while [ "$1" != registry.example/backup:1 ]; do shift; done; shift; exec ENTRYPOINT "$@"',
}
CI = {"GITHUB_RUN_ID": "17", "GITHUB_WORKFLOW": "ci", "GITHUB_ACTOR": "octo", "CI_PIPELINE_ID": "17",
      "CI_JOB_STATUS": "success", "CI_PROJECT_PATH": "acme/shop", "GITLAB_USER_LOGIN": "octo",
      "JOB_NAME": "shop", "BUILD_NUMBER": "17", "NODE_NAME": "built-in", "RESULT": "SUCCESS"}
LEFT = "var/spool/packtrack/left.ndjson"
UNIT = r"\A# (/etc/systemd/system/[\w@.-]+)\n"  # a unit begins with its path
pytestmark = pytest.mark.skipif(os.name != "posix" or shutil.which("bash") is None, reason="no bash here")


class Block:
    """A fenced block. Made for BLOCKS."""

    def __init__(self, match):
        self.line = TEXT.count("\n", 0, match.start()) + 1
        self.language, info, self.text = match.groups()
        self.options = dict(word.split("=", 1) for word in info.split())

    def __repr__(self):
        return "README.md:%d" % self.line

    def documents(self):
        return parse_yaml(self.text) or pytest.skip("no YAML parser here")


BLOCKS = [Block(match) for match in re.finditer(r"^```(\S+)(.*)\n((?:.*\n)*?)```$", TEXT, re.M)]


def block_with(text):
    (one,) = [block for block in BLOCKS if text in block.text]
    return one


def found(pattern, text):
    (value,) = re.findall(pattern, text, re.M)
    return value


def image_command(name):
    return json.loads(found("^%s (.*)$" % name, block_with("ENTRYPOINT").text))


class Machine:
    """See the top of the file. Made by machine_for."""

    def __init__(self, root, archive, script):
        self.root, self.work = root, root / "work"
        self.server = StandIn(script=script, key=KEY).start()
        for name in """work home/.config/fish/completions usr/local/share/zsh/site-functions usr/local/bin
                etc/packtrack etc/systemd/system var/log var/lock var/spool/packtrack run/secrets/packtrack
                run/credentials srv""".split():
            (root / name).mkdir(parents=True)
        for name in ("etc/packtrack/key", "run/secrets/packtrack/key", "work/new-key"):
            self.write(name, KEY + "\n", 0o600)
        shutil.copy(str(archive), str(root / "usr/local/bin/packtrack-logger"))
        for path in (archive, pathlib.Path(str(archive) + ".sha256"), ROOT / "packtrack_logger.py"):
            shutil.copy(str(path), str(self.work))
        self.write("work/event.json", json.dumps(event()))
        self.write("work/events.json", json.dumps(events(3)))
        self.write("work/events.ndjson", ndjson(events(250)).decode("utf-8"))
        self.write("var/log/shop.json", "")
        for name, text in STUBS.items():
            text = text.replace("ENTRYPOINT", " ".join(map(shlex.quote, image_command("ENTRYPOINT"))))
            for folder in ("usr/local/bin/", "work/"):
                self.write(folder + name, "#!/bin/sh\n%s\n" % text)
        for block in BLOCKS:
            if "save" in block.options or block.language == "ini":
                self.write(block.options.get("save") or found(UNIT, block.text), self.localize(block.text))

    def write(self, name, text, mode=0o644):
        """A file of the machine; a script can be run."""
        (self.root / name.lstrip("/")).write_text(text, encoding="utf-8")
        (self.root / name.lstrip("/")).chmod(0o755 if text.startswith("#!") else mode)

    def localize(self, text):
        """The text with the machine's folders and its server in it."""
        text = text.replace("https://pack.shimcounty.com", self.server.url)
        return re.sub(r"(?<![\w.$}/])/(?=(?:usr/local|etc|var|run|srv)/)", str(self.root) + "/", text)

    def environment(self, key=KEY, **more):
        return {"PATH": "%s:%s" % (self.root / "usr/local/bin", os.environ["PATH"]), "LC_ALL": "C.UTF-8",
                "HOME": str(self.root / "home"), "PACKTRACK_BASE_URL": self.server.url,
                "PACKTRACK_API_KEY": key, **more}

    def start(self, argv, env=None, cwd=None):
        return subprocess.Popen(
            argv, env=env or self.environment(), cwd=str(cwd or self.work), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def finish(self, process):
        """Wait for the end: (exit code, output)."""
        timer = threading.Timer(90, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        output = process.communicate()[0].decode("utf-8", "replace")
        timer.cancel()
        assert KEY not in output and "Traceback" not in output
        return process.returncode, output

    def call(self, *how):
        return self.finish(self.start(*how))

    def shell(self, text, shell="bash", cwd=None, **env):
        return self.call([shell, "-e", "-c", self.localize(text)], self.environment(**env), cwd)

    def resend(self, **env):
        """Run the job that sends what is kept; its exit code."""
        return self.call(["packtrack-resend"], self.environment(**env))[0]

    def kept(self):
        """The lines that wait in the spool."""
        return [line for name in ("left*", "taken*", "rest*") for path in (self.root / LEFT).parent.glob(name)
                for line in path.read_bytes().splitlines()]

    def messages(self):
        """What the service has, by its message."""
        return sorted(one["message"] for one in self.server.records)


@pytest.fixture
def machine_for(archive, tmp_path, request):
    """machine_for(block, script=None) -> a machine for it; skips the test where what it needs is absent."""
    def get(block, script=None):
        for program in filter(None, block.options.get("needs", "").split(",")):
            if shutil.which(program) is None:
                pytest.skip("%r: no %s here" % (block, program))
        if script is None:
            script = [int(word) for word in block.options.get("script", "").split(",") if word]
        machine = Machine(tmp_path, archive, script)
        request.addfinalizer(machine.server.close)
        return machine
    return get


# ---- how a block of each language is run: a generator of (exit code, output) -----------------------------

def run_sh(block, machine):
    if "save" in block.options:
        yield machine.call(["sh", "-n", machine.localize(block.options["save"])])
    elif "feed" in block.options:
        process = machine.start(["bash", "-e", "-c", machine.localize(block.text)])
        while len(machine.server.records) < int(block.options["records"]):
            with open(machine.localize(block.options["feed"]), "a") as log:
                log.write('{"ts": 1764063000, "level": "warning", "msg": "stock is low", "sku": "A-7"}\n')
            assert process.poll() is None, machine.finish(process)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        code, output = machine.finish(process)
        del machine.server.records[int(block.options["records"]):]
        yield code + signal.SIGTERM, output
    elif block.options.get("in") == "clone":
        clone = machine.work / "clone"
        shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".git", ".venv", "dist", "*cache*"))
        # Not the tests within the tests: pytest, if it is the pinned one, lists its markers.
        pinned = "pytest==%s\n" % pytest.__version__ in (clone / "tests" / "requirements.txt").read_text()
        text = block.text if pinned else block.text.replace("make test ", "true ")
        flags = "PYTHON=%s PYTEST_ARGS=--markers JOBS=1" % sys.executable
        yield machine.shell(text, cwd=clone, MAKEFLAGS=flags)
    else:
        yield machine.shell(block.text)


def run_crontab(block, machine):
    env = machine.environment(PATH="/usr/bin:/bin")
    del env["PACKTRACK_API_KEY"]
    for line in machine.localize(block.text).splitlines():
        if not line.startswith("#"):
            job = found(r"^(?:[\d*,/-]+ ){5}(.*)$", line)
            assert not re.search(r"(?<!\\)%", job), "%r: cron ends a command at %%" % block
            yield machine.call(["/bin/sh", "-c", job.replace("\\%", "%")], env, machine.root / "home")


def run_ini(block, machine):
    unit, credentials = found(UNIT, block.text), str(machine.root / "run/credentials")
    if shutil.which("systemd-analyze"):
        verify = ["systemd-analyze", "verify", "--man=no", str(machine.root) + unit]
        assert machine.call(verify) == (0, ""), block
    env = machine.environment(key="", CREDENTIALS_DIRECTORY=credentials)
    text = machine.localize(block.text).replace("%N", pathlib.Path(unit).stem)
    for name, value in re.findall(r"^(\w+)=(.*)$", re.sub(r"\\\n\s*", " ", text), re.M):
        if name == "LoadCredential":
            credential, _, path = value.partition(":")
            shutil.copy(path, credentials + "/" + credential)
        elif name == "EnvironmentFile":
            text = pathlib.Path(value).read_text()
            assert re.fullmatch(r"([A-Z_]+=[\w./-]+\n)*", text), "not read alike by all"
            env.update(one.split("=", 1) for one in text.splitlines())
        elif name == "ExecStart":
            words = [re.sub(r"\$\{(\w+)\}", lambda match: env[match.group(1)], word)
                     for word in shlex.split(value)]
            yield machine.call(words, env, machine.root)


def commands_of(node, env):
    """(argv, environment) of each command in a workflow, a pipeline, a Kubernetes object or a play."""
    if isinstance(node, list):
        for one in node:
            yield from commands_of(one, env)
    elif isinstance(node, dict):
        given = node.get("env", node.get("environment", {}))
        env = {**env, **({one["name"]: one["value"] for one in given} if isinstance(given, list) else given)}
        for key, value in node.items():
            if key in ("run", "script", "after_script"):
                yield ["bash", "-e", "-c", value if isinstance(value, str) else "\n".join(value)], env
            elif key in ("command", "argv") and isinstance(value, list):
                yield value + node.get("args", []), env
            elif key not in ("env", "environment"):
                yield from commands_of(value, env)


def run_yaml(block, machine):
    def fill(text):
        text = re.sub(r"\$?\{\{ *(secrets\.)?packtrack_api_key *\}\}", KEY, str(text), flags=re.I)
        return machine.localize(re.sub(r"\$?\{\{ *([\w.]+) *\}\}", "success", text))

    for words, env in commands_of(block.documents(), CI):
        env = {name: fill(value) for name, value in env.items()}
        yield machine.call([fill(word) for word in words], machine.environment(**env))


RUN = {
    "sh": run_sh, "crontab": run_crontab, "ini": run_ini, "yaml": run_yaml,
    "dockerfile": lambda block, machine: [machine.call(image_command("ENTRYPOINT") + image_command("CMD"))],
    "groovy": lambda block, machine: [machine.shell(script, **CI) for script in re.findall(
        "sh '''(.*?)'''", block.text, re.S)],
    "python": lambda block, machine: [machine.call([sys.executable, "-c", machine.localize(block.text)])],
    "json": lambda block, machine: [(json.loads(block.text)["exit_code"] - 2, block.text)],
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "%s-%s" % (block.line, block.language))
def test_block(block, machine_for):
    assert set(block.options) <= set("needs expect records script save feed in".split()), block
    machine = machine_for(block)
    runs = list(RUN[block.language](block, machine))
    for code, output in runs:
        assert code == int(block.options.get("expect", 0)), "%r: exit code %s\n%s" % (block, code, output)
    if "records" in block.options:
        assert runs and len(machine.server.records) == int(block.options["records"]), (block, runs)
    assert machine.server.checks == [], block


# ---- recipes that promise more than a run shows ----------------------------------------------------------

def test_the_resender_waits_for_a_job_that_is_appending(machine_for):
    machine = machine_for(block_with("exec 9>resend.lock"))
    with open(str(machine.root / LEFT), "ab") as left:
        fcntl.flock(left, fcntl.LOCK_EX)
        process = machine.start(["packtrack-resend"])
        # One of its processes waits for the lock. Had it not waited, rest.ndjson would be there.
        while b"flock taken." not in subprocess.check_output(["ps", "-e", "-o", "args="]):
            assert process.poll() is None and not (machine.root / LEFT).with_name("rest.ndjson").exists()
        left.write(ndjson([event(message="late")]))
    assert machine.finish(process)[0] == 0
    assert (machine.messages(), machine.kept()) == (["late"], [])


def test_the_resender_loses_and_doubles_nothing_while_jobs_append(machine_for):
    machine = machine_for(block_with("exec 9>resend.lock"))
    with StandIn(default=503, key=KEY) as broken:
        job = ["packtrack-logger", "--file", "events.ndjson", "--ndjson", "--keep-going", "--retries", "0",
               "--batch-size", "1", "--base-url", broken.url, "--undelivered", str(machine.root / LEFT)]
        jobs = [machine.start(job), machine.start(job)]
        while any(one.poll() is None for one in jobs):
            assert machine.resend() == 0
        assert [machine.finish(one)[0] for one in jobs] == [3, 3]
    assert machine.server.records, "nothing was resent while they ran"
    assert (machine.resend(), machine.kept()) == (0, [])
    assert machine.messages() == sorted(one["message"] for one in 2 * events(250))


@pytest.mark.parametrize("script, env, code", [
    ([200, *20 * [503]], {}, 3), ([400, 200, 401], {}, 2), ([], {"key": ""}, 1),
    ([], {"PACKTRACK_DEADLINE": "1ms"}, 3), ([], {"PACKTRACK_RETRIES": "many"}, 1),
], ids=["503", "400-then-401", "no-key", "deadline", "bad-variable"])
def test_the_resender_keeps_what_it_could_not_send(script, env, code, machine_for):
    machine = machine_for(block_with("exec 9>resend.lock"), script)
    machine.write(LEFT, ndjson(events(300)).decode("utf-8"))
    assert machine.resend(PACKTRACK_BACKOFF_MAX="1ms", **env) == code
    sent = machine.messages()
    assert len(sent) + len(machine.kept()) == 300
    machine.server.renew(key=KEY)
    assert (machine.resend(), machine.kept()) == (0, [])
    assert sorted(sent + machine.messages()) == sorted(one["message"] for one in events(300))


def test_what_the_service_refuses_holds_up_nothing_else(machine_for):
    machine = machine_for(block_with("exec 9>resend.lock"), [400])
    machine.write(LEFT, '{"message": 1}\n' + ndjson(events(101)).decode("utf-8").rstrip())
    assert (machine.resend(), machine.messages(), len(machine.kept())) == (2, ["event 101"], 101)
    machine.write(LEFT, ndjson([event(message="later")]).decode("utf-8"))
    assert (machine.resend(), machine.kept()) == (1, [b'{"message": 1}']) and "later" in machine.messages()


def test_until_delivered_copes_with_a_run_that_sent_nothing(machine_for):
    block = block_with("until packtrack-logger")
    machine = machine_for(block, [])
    text = block.text.replace("until packtrack-logger", "until packtrack-logger ${wait:---deadline 1ms}")
    code, output = machine.shell(text.replace("sleep 60", "ls left.ndjson || wait=' '"))
    assert code == 0 and "cannot access" in output, output
    assert len(machine.server.records) == 250


@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize("last, code, status", [
    ("true", 0, "ok"), ("exit 7", 7, "failed"), ("kill -TERM $$; sleep 1", 143, "failed")])
def test_the_trap_reports_every_end_and_changes_none(last, code, status, shell, machine_for):
    block = block_with("trap report EXIT")
    machine = machine_for(block)
    text = block.text[:block.text.index("cp release")] + last
    assert machine.shell(text, shell)[0] == code
    (record,) = machine.server.records
    assert (record["status"], record["message"].split()[-1]) == (status, str(code))
    machine.server.renew(key="another")
    assert machine.shell(text, shell)[0] == code


def test_a_failed_report_turns_no_job_red():
    ((step,),) = block_with("job.status").documents()
    assert step["if"] == "always()" and step["continue-on-error"] is True
    pipeline = block_with("after_script").documents()[0]["backup"]
    assert "packtrack" not in str(pipeline["script"]) and "packtrack" in str(pipeline["after_script"])
    ((task,),) = block_with("ansible.builtin.command").documents()
    assert task["failed_when"] is False and task["no_log"] is True
    jenkins = block_with("withCredentials").text
    assert jenkins.index("catchError(buildResult: 'SUCCESS'") < jenkins.index("withCredentials")


def test_the_pod_needs_no_root_and_no_writable_image():
    image = block_with("ENTRYPOINT").text
    assert "COPY" not in image.replace("\nCOPY --chmod=755 ", ""), "the archive has mode 644"
    pod = block_with("kind: CronJob").documents()[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,), (key, tmp) = pod["containers"], pod["volumes"]
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    env = {one["name"]: one["value"] for one in container["env"]}
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    assert key["secret"]["defaultMode"] == 0o440 and pod["securityContext"]["fsGroup"]
    assert env["PACKTRACK_API_KEY_FILE"] == mounts["key"] + "/key"
    assert "emptyDir" in tmp and env["TMPDIR"] == mounts["tmp"]


def test_what_is_named_exists():
    known = {flag for option in packtrack_logger.OPTIONS for flag in option.flags}
    calls = re.findall(r"packtrack-logger(?:\.pyz)? (.*?)(?: -- | #|\||$)", TEXT.replace("\\\n", " "), re.M)
    named = re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(calls + re.findall("`([^`]+)`", PROSE)))
    assert set(named) - known <= {"--repo", "--no-"}
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", PROSE, re.M)}
    assert set(re.findall(r"\]\(([^)]+)\)", PROSE)) <= anchors


def test_examples():
    assert [text for text in """--async --gzip --dry-run --health --connections --meta --allow-empty --output
        --completion LoadCredential OnCalendar EnvironmentFile catchError COPY CronJob job.status flock env
        after_script ansible resend.lock trap xargs journalctl tail docker key.new SSL_CERT_FILE https_proxy
        sha256sum Client make""".split() if not any(text in block.text for block in BLOCKS)] == []
