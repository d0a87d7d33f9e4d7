"""The archive: what build_zipapp.sh makes, and how it starts on good Pythons and on poor ones."""
import ast
import hashlib
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import zipfile

import pytest

from conftest import KEY, PYTHON, ROOT, flags

pytestmark = pytest.mark.skipif(shutil.which("sh") is None, reason="the archive is built by sh")
NAMES = "build_zipapp.sh", "packtrack_logger.py", "LICENSE"


def call(argv, cwd=ROOT, **env):
    """A finished process: exit code, standard output, standard error."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    done = subprocess.run(list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120,
                          env={**kept, "PYTHON": sys.executable, **env}, cwd=str(cwd))
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def found_pythons():
    return dict(line.split(" ", 1) for line in call([ROOT / ".ci" / "pythons"])[1].splitlines())


def build(output, *pythons, source=ROOT, **env):
    words = [word for python in pythons for word in ("--python", python)]
    assert call([source / "build_zipapp.sh", *words, "--output", output], **env)[::2] == (0, "")
    return output


def test_reproducible(tmp_path):
    pythons = list(found_pythons().values())[:2] + [sys.executable]
    for name in NAMES:
        shutil.copy(str(ROOT / name), str(tmp_path))
        os.utime(str(tmp_path / name), (1000000000, 1000000000))
    (tmp_path / "packtrack_logger.py").chmod(0o600)
    one = build(tmp_path / "one.pyz", *pythons)
    two = build(tmp_path / "two.pyz", *pythons[::-1], source=tmp_path, PYTHONHASHSEED="7", LC_ALL="C",
                TZ="Pacific/Apia", PYTHONOPTIMIZE="2")
    assert one.read_bytes() == two.read_bytes()


def test_content(archive):
    data = archive.read_bytes()
    assert data.startswith(b"#!/usr/bin/env python3\n") and len(data) < 250000
    assert os.name != "posix" or stat.S_IMODE(archive.stat().st_mode) == 0o755
    line = "%s  %s\n" % (hashlib.sha256(data).hexdigest(), archive.name)
    assert pathlib.Path(str(archive) + ".sha256").read_text() == line
    with zipfile.ZipFile(str(archive)) as opened:
        names = opened.namelist()
        assert [opened.read(name) for name in NAMES[1:]] == [(ROOT / name).read_bytes() for name in NAMES[1:]]
        source = opened.read("__main__.py").decode("ascii")
        assert {entry.date_time for entry in opened.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        stored = [entry.filename for entry in opened.infolist() if entry.compress_type == zipfile.ZIP_STORED]
    assert names == sorted(names) and stored == ["__main__.py"]
    assert [name for name in names if "/" not in name] == ["LICENSE", "__main__.py", "packtrack_logger.py"]
    ast.parse(source, feature_version=(3, 5))


@pytest.mark.parametrize("words, said", [
    ("--python 3.99", "--python 3.99: no python3.99 on PATH, and none under ~/.pyenv/versions"),
    ("--python=./none", "--python ./none: it does not run"), ("--python", "--python needs a value"),
    ("--python two", "--python two: neither a version such as 3.8 nor a path"),
    ("--outptu x", "unknown argument: --outptu"), ("", "no bytecode from " + sys.executable)])
def test_build_fails(words, said, tmp_path):
    for name in NAMES:
        shutil.copy(str(ROOT / name), str(tmp_path))
    with (tmp_path / "packtrack_logger.py").open("a") as file:
        file.write("def main(:\n")
    (tmp_path / "a.pyz").write_bytes(b"old")
    code, out, err = call(["./build_zipapp.sh", "--output", "a.pyz", *words.split()], cwd=tmp_path)
    assert (code, out, err.splitlines()[-1]) == (1, "", "build_zipapp.sh: " + said)
    assert (tmp_path / "a.pyz").read_bytes() == b"old" and len(os.listdir(str(tmp_path))) == 4


ORIGIN = """
import os, runpy, sys
sys.argv[:] = [sys.argv[1], "--version"]
os._exit = lambda code: print(sys.modules["packtrack_logger"].__file__)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def origin(python, archive, *more):
    code, out, err = call([python, *more, "-c", ORIGIN, archive])
    assert (code, err) == (0, "")
    return os.path.relpath(out.splitlines()[-1], str(archive))


def test_origin(archive):
    for flag in ("-O", "-I", "-S"):
        assert origin(PYTHON, archive, flag).endswith("/packtrack_logger.pyc")


@pytest.mark.full
def test_origin_of_each_version(tmp_path):
    pythons = found_pythons()
    for version, python in pythons.items():
        own = build(tmp_path / "own.pyz", python)
        assert origin(python, own) == "cpython-%s/packtrack_logger.pyc" % version.replace(".", "")
        other = build(tmp_path / "other.pyz", next(path for path in pythons.values() if path != python))
        with zipfile.ZipFile(str(own)) as old, zipfile.ZipFile(str(tmp_path / "magic.pyz"), "w") as new:
            for name in old.namelist():  # as of a pre-release, whose folder has the same name
                start = 4 if name.endswith(".pyc") else 0
                new.writestr(name, b"\1\2\r\n"[:start] + old.read(name)[start:])
        assert origin(python, other) == origin(python, tmp_path / "magic.pyz") == "packtrack_logger.py"


BLOCK = "import sys; sys.modules[%r] = None"
LACKS = ("packtrack-logger: error: this Python has no module %s: install python3 (Debian: apt-get install "
         "python3; python3-minimal is not enough)%s\n")
STANDS_ASIDE = "; running the command without reporting"


@pytest.mark.both_forms
@pytest.mark.parametrize("name", ["json", "argparse", "signal", "zlib", "urllib.parse"])
def test_poor_python(name, program, run, server, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCK % name)
    env = {"PYTHONPATH": str(tmp_path)}
    if (name, program) != ("zlib", "py"):  # the module only compresses with it
        assert run(*flags(), env=env, server=server).err == LACKS % (name, "")
        assert run(*flags(), env=env, server=server, redirect="2>&-").code == 1 + (name == "urllib.parse")
        for command, code in ((["sh", "-c", "echo run; exit 7"], 7), (["./none"], 127), (["."], 126)):
            result = run("--workflow-id", "w", "--", *command, env=env, server=server)
            assert (result.code, result.out) == (code, "run\n" * (code == 7))
            assert name == "urllib.parse" or result.err.startswith(LACKS % (name, STANDS_ASIDE))
    assert server.requests == []


def test_import_fails():
    code, out, err = call([PYTHON, "-c", BLOCK % "json" + "; import packtrack_logger"], PYTHONPATH=str(ROOT))
    assert (code, out) == (1, "") and "packtrack_logger.py" in err and "json" in err.splitlines()[-1]


@pytest.mark.parametrize("version", ["2.7", "3.5"])
def test_old_python(version, archive, tmp_path):
    home = pathlib.Path(os.path.expanduser("~/.pyenv/versions"))
    paths = [shutil.which("python" + version), *home.glob(version + ".*/bin/python")]
    python = next((path for path in paths if path and call([path, "-c", ""])[0] == 0), None)
    if python is None:
        pytest.skip("no Python %s here" % version)
    said = "packtrack-logger: error: needs Python 3.6 or newer; this is %s" % version
    assert call([python, archive, *flags()], PACKTRACK_API_KEY=KEY) == (1, "", said + "\n")
    assert call([python, archive, "--", "sh", "-c", "exit 7"]) == (7, "", said + STANDS_ASIDE + "\n")


@pytest.mark.skipif(os.name != "posix", reason="runs the archive by its first line")
def test_by_its_name(archive, tmp_path):
    shutil.copy(str(archive), str(tmp_path / "packtrack-logger"))
    (tmp_path / "packtrack_logger.py").write_text("raise SystemExit('the wrong one')\n")
    path = os.pathsep.join([str(tmp_path), os.path.dirname(PYTHON), os.environ["PATH"]])
    for argv, code in ((["-V"], 0), (["--zzz"], 1), (["--file", "none"], 4)):
        assert call(["packtrack-logger", *argv], cwd=tmp_path, PATH=path, PYTHONPATH=str(tmp_path))[0] == code
