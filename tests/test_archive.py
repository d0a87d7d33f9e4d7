"""The archive: what build_zipapp.sh makes, and how it starts on each CPython that is found."""

import ast
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import zipfile

import pytest

from conftest import FLAGS, KEY, PYTHON, ROOT, flags

BUILD = ROOT / "build_zipapp.sh"
NEEDS_SH = pytest.mark.skipif(shutil.which("sh") is None, reason="the archive is built by sh")
SUPPORTED = ["3.6", "3.7", "3.8", "3.9", "3.10", "3.11", "3.12", "3.13"]
pytestmark = NEEDS_SH


def call(argv, env=None, **options):
    """A finished process with its output as text."""
    done = subprocess.run(
        [str(word) for word in argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=120,
        env=env,
        **options,
    )
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def environment(**more):
    """PATH and HOME of this process, and no more."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ}
    return {**kept, **more}


def build(folder, *pythons, source=ROOT, name="packtrack-logger.pyz", **env):
    """Build an archive with bytecode for these interpreters; returns its path."""
    output = pathlib.Path(str(folder)) / name
    words = [word for python in pythons for word in ("--python", python)]
    code, out, err = call(
        [source / "build_zipapp.sh", *words, "--output", output], environment(PYTHON=sys.executable, **env)
    )
    assert code == 0, out + err
    return output


@functools.lru_cache(maxsize=None)
def found_pythons():
    """{"3.6": path, ...} of the CPythons that are found here."""
    code, out, err = call([ROOT / ".ci" / "pythons"], environment())
    assert (code, err) == (0, "")
    return dict(line.split(" ", 1) for line in out.splitlines())


@pytest.fixture(scope="session")
def pythons():
    """What is found, and the interpreter under test in the place of its version."""
    found = dict(found_pythons())
    code, out, _ = call([PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
    assert code == 0
    found[out.strip()] = PYTHON
    return found


@pytest.fixture(scope="session")
def full_archive(tmp_path_factory, pythons):
    """An archive with bytecode for every CPython that is found."""
    return build(tmp_path_factory.mktemp("full"), *pythons.values())


def origin(python, archive, *python_flags):
    """The file that the program's module came from, when the archive is run."""
    # runpy does what the interpreter does with an archive, and leaves the module to be looked at.
    code, out, err = call(
        [
            python,
            *python_flags,
            "-c",
            (
                "import os, runpy, sys\n"
                "os._exit = sys.exit\n"
                "path = sys.argv[1]\n"
                "sys.argv[:] = [path, '--version']\n"
                "try:\n"
                "    runpy.run_path(path, run_name='__main__')\n"
                "except SystemExit as end:\n"
                "    assert not end.code, end.code\n"
                "module = sys.modules['packtrack_logger']\n"
                "print(module.__file__)\n"
                "print(module.main.__code__.co_filename)\n"
            ),
            archive,
        ],
        environment(),
    )
    assert code == 0, out + err
    return out.splitlines()[-2:]


# ---- what is in it ---------------------------------------------------------------------------------------


def test_two_builds_are_identical_to_the_byte_wherever_and_whenever_they_run(tmp_path, pythons):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("build_zipapp.sh", "packtrack_logger.py", "LICENSE"):
        shutil.copy(str(ROOT / name), str(copy / name))
        os.utime(str(copy / name), (1000000000, 1000000000))
    os.chmod(str(copy / "packtrack_logger.py"), 0o600)
    (copy / "json.py").write_text("raise SystemExit('not to be imported')\n")
    interpreters = list(pythons.values())
    one = build(tmp_path, *interpreters, name="one.pyz")
    two = build(
        tmp_path,
        *reversed(interpreters),
        source=copy,
        name="two.pyz",
        PYTHONHASHSEED="7",
        LC_ALL="C",
        TZ="Pacific/Apia",
        PYTHONOPTIMIZE="2",
    )
    assert one.read_bytes() == two.read_bytes()


def test_the_checksum_file_is_what_sha256sum_checks(archive):
    line = pathlib.Path(str(archive) + ".sha256").read_bytes()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert line == ("%s  %s\n" % (digest, archive.name)).encode("ascii")
    if shutil.which("sha256sum"):
        assert call(["sha256sum", "-c", archive.name + ".sha256"], cwd=str(archive.parent))[0] == 0


def test_it_is_executable_and_starts_with_the_line_for_env(archive):
    assert archive.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    if os.name == "posix":
        assert stat.S_IMODE(archive.stat().st_mode) == 0o755


def test_it_holds_the_module_its_licence_and_one_folder_of_bytecode_a_version(full_archive, pythons):
    with zipfile.ZipFile(str(full_archive)) as opened:
        names = opened.namelist()
        assert opened.testzip() is None
        assert opened.read("packtrack_logger.py") == (ROOT / "packtrack_logger.py").read_bytes()
        assert opened.read("LICENSE") == (ROOT / "LICENSE").read_bytes()
        dates = {entry.date_time for entry in opened.infolist()}
    tags = ["cpython-%s" % version.replace(".", "") for version in pythons]
    assert names == sorted(
        ["LICENSE", "__main__.py", "packtrack_logger.py"] + [tag + "/packtrack_logger.pyc" for tag in tags]
    )
    assert dates == {(1980, 1, 1, 0, 0, 0)}


def test_with_bytecode_for_eight_versions_it_is_under_600_kb(full_archive, pythons):
    with zipfile.ZipFile(str(full_archive)) as opened:
        folders = [entry.compress_size for entry in opened.infolist() if entry.filename.endswith(".pyc")]
    missing = max(0, len(SUPPORTED) - len(pythons))
    assert full_archive.stat().st_size + missing * max(folders) < 600000


def test_without_options_it_carries_the_bytecode_of_the_builder_alone(tmp_path):
    path = build(tmp_path)
    with zipfile.ZipFile(str(path)) as opened:
        folders = [name for name in opened.namelist() if name.endswith(".pyc")]
    assert folders == ["%s/packtrack_logger.pyc" % sys.implementation.cache_tag]


def test_a_version_given_by_number_is_found(tmp_path):
    version = next(iter(found_pythons()))
    path = build(tmp_path, version, version)
    with zipfile.ZipFile(str(path)) as opened:
        folders = [name for name in opened.namelist() if name.endswith(".pyc")]
    assert folders == ["cpython-%s/packtrack_logger.pyc" % version.replace(".", "")]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--python", "3.99"], "--python 3.99: no python3.99 on PATH, and none under ~/.pyenv/versions"),
        (["--python", "./absent"], "--python ./absent: it does not run"),
        (["--python", "two"], "--python two: neither a version such as 3.8 nor a path"),
        (["--python"], "--python needs a value"),
        (["--outptu", "x"], "unknown argument: --outptu"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_a_build_that_cannot_be_says_why_and_leaves_nothing(words, said, tmp_path):
    output = tmp_path / "a.pyz"
    code, out, err = call(
        [BUILD, "--output", output, *words], environment(PYTHON=sys.executable), cwd=str(tmp_path)
    )
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == "build_zipapp.sh: " + said
    assert os.listdir(str(tmp_path)) == []


def test_a_module_that_does_not_compile_leaves_the_old_archive(tmp_path):
    for name in ("build_zipapp.sh", "LICENSE"):
        shutil.copy(str(ROOT / name), str(tmp_path / name))
    (tmp_path / "packtrack_logger.py").write_text("def main(:\n")
    output = tmp_path / "a.pyz"
    output.write_bytes(b"old")
    code, _, err = call(
        [tmp_path / "build_zipapp.sh", "--output", output], environment(PYTHON=sys.executable)
    )
    assert code == 1
    assert "SyntaxError" in err
    assert output.read_bytes() == b"old"
    assert not list(tmp_path.glob("*.partial"))


# ---- how it starts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", SUPPORTED)
def test_it_runs_from_its_bytecode_where_it_has_it(version, full_archive, pythons):
    if version not in pythons:
        pytest.skip("no CPython %s here" % version)
    file, compiled_from = origin(pythons[version], full_archive)
    assert file == os.path.join(
        str(full_archive), "cpython-" + version.replace(".", ""), "packtrack_logger.pyc"
    )
    assert compiled_from == "packtrack_logger.py"


@pytest.mark.parametrize("flag", ["-O", "-OO", "-I", "-B", "-S"])
def test_it_runs_from_its_bytecode_whatever_the_flags(flag, archive):
    assert origin(PYTHON, archive, flag)[0].endswith("packtrack_logger.pyc")


@pytest.mark.parametrize("version", SUPPORTED)
def test_it_runs_from_its_source_where_it_lacks_the_bytecode(version, pythons, tmp_path):
    if version not in pythons:
        pytest.skip("no CPython %s here" % version)
    others = [path for other, path in pythons.items() if other != version]
    if not others:
        pytest.skip("no second CPython here")
    path = build(tmp_path, others[0])
    assert origin(pythons[version], path)[0] == os.path.join(str(path), "packtrack_logger.py")


@pytest.mark.parametrize("version", SUPPORTED)
def test_it_runs_from_its_source_where_the_bytecode_is_of_a_pre_release(
    version, full_archive, pythons, tmp_path
):
    if version not in pythons:
        pytest.skip("no CPython %s here" % version)
    path = tmp_path / "other-magic.pyz"
    with zipfile.ZipFile(str(full_archive)) as old, zipfile.ZipFile(str(path), "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, b"\1\2\r\n" + data[4:] if name.endswith(".pyc") else data)
    assert origin(pythons[version], path)[0] == os.path.join(str(path), "packtrack_logger.py")


@pytest.mark.parametrize(
    "argv, code",
    [
        (["--version"], 0),
        (["--no-such-flag"], 1),
        (["--file", "missing.json"], 4),
        (["--base-url", "http://127.0.0.1:1", "--retries", "0", *FLAGS], 3),
        (["--dry-run", *FLAGS], 0),
    ],
    ids=["version", "usage", "input", "retries", "dry-run"],
)
@pytest.mark.in_every_sample
def test_the_exit_code_of_the_program_is_that_of_the_archive(argv, code, run):
    assert run(*argv).code == code


def test_it_runs_by_its_own_name_from_anywhere(archive, tmp_path):
    if os.name != "posix" or not shutil.which("python3"):
        pytest.skip("no python3 on PATH")
    folder = tmp_path / "a folder"
    folder.mkdir()
    shutil.copy(str(archive), str(folder / "packtrack-logger"))
    code, out, err = call(
        ["packtrack-logger", "--version"], environment(PATH="%s:%s" % (folder, os.environ["PATH"])), cwd="/"
    )
    assert (code, err) == (0, "")
    assert re.search(r"\d+\.\d+\.\d+", out)


@pytest.mark.in_every_sample
def test_a_message_beyond_ascii_arrives_whatever_the_locale_says(run, server):
    result = run(
        *flags(message="Zo\u00eb \u2713 \U0001f4e6"),
        server=server,
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert result.code == 0, result
    assert server.records[0]["message"] == "Zo\u00eb \u2713 \U0001f4e6"


def test_modules_of_the_same_name_elsewhere_are_not_taken_in_its_place(archive, tmp_path):
    (tmp_path / "packtrack_logger.py").write_text("raise SystemExit('the wrong one')\n")
    code, out, err = call(
        [PYTHON, archive, "--version"], environment(PYTHONPATH=str(tmp_path)), cwd=str(tmp_path)
    )
    assert (code, err) == (0, "")


# ---- Pythons that are too old ----------------------------------------------------------------------------


def old_pythons():
    """Python 2.7 and 3.5, where they are found."""
    home = pathlib.Path(os.path.expanduser("~")) / ".pyenv" / "versions"
    for name in ("2.7", "3.5"):
        paths = [shutil.which("python" + name), *sorted(home.glob(name + "*/bin/python"))]
        for path in paths:
            if path and call([path, "-c", "pass"])[0] == 0:
                yield name, str(path)
                break


@pytest.mark.parametrize("version", ["2.7", "3.5"])
def test_a_python_that_is_too_old_is_told_in_one_line(version, archive, tmp_path):
    python = dict(old_pythons()).get(version)
    if python is None:
        pytest.skip("no Python %s here" % version)
    code, out, err = call([python, archive, *FLAGS], environment(PACKTRACK_API_KEY=KEY), cwd=str(tmp_path))
    assert (code, out) == (1, "")
    assert err == "packtrack-logger: needs Python 3.6 or newer; this is %s\n" % version


def test_the_start_is_written_in_the_syntax_of_2_7_and_3_5(archive):
    with zipfile.ZipFile(str(archive)) as opened:
        source = opened.read("__main__.py")
    source.decode("ascii")
    compile(source, "__main__.py", "exec", dont_inherit=True)
    ast.parse(source.decode("ascii"), feature_version=(3, 5))
    for name, python in old_pythons():
        code, _, err = call(
            [python, "-c", "import sys; compile(sys.argv[1], '__main__.py', 'exec')", source.decode("ascii")]
        )
        assert code == 0, (name, err)
    # The line comes before anything that an old Python lacks.
    assert source.index(b"version_info") < source.index(b"implementation")


def test_the_stock_summary_of_the_build_names_what_it_made(tmp_path):
    code, out, err = call([BUILD, "--output", tmp_path / "a.pyz"], environment(PYTHON=sys.executable))
    assert (code, err) == (0, "")
    assert out == "%s: %d bytes, bytecode for %s\n" % (
        tmp_path / "a.pyz",
        (tmp_path / "a.pyz").stat().st_size,
        sys.implementation.cache_tag,
    )


def test_a_run_from_the_archive_accounts_as_a_run_from_the_module_does(archive, tmp_path):
    (tmp_path / "event.json").write_text(json.dumps([{"message": "x"}]))
    runs = [
        call([PYTHON, path, "--file", "event.json", "--json", "--dry-run"], environment(), cwd=str(tmp_path))
        for path in (archive, ROOT / "packtrack_logger.py")
    ]
    assert [code for code, _, _ in runs] == [1, 1]
    assert runs[0][2] == runs[1][2] != ""
