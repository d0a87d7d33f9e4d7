#!/bin/sh
# Builds dist/packtrack-logger.pyz and its .sha256. Two builds of one commit with the same interpreters
# are identical to the byte.
set -eu

usage() {
    cat <<'TEXT'
usage: ./build_zipapp.sh [--python VERSION_OR_PATH]... [--output FILE]

  --python X   put bytecode for this CPython (3.6 or newer) into the archive: a version such as 3.8, looked
               for on PATH as python3.8 and then under ~/.pyenv/versions, or a path; may be repeated.
               Default: the interpreter that builds. Any other version runs from the source in the archive
  --output F   default dist/packtrack-logger.pyz; F.sha256 is written beside it

environment: PYTHON, the interpreter that builds (3.6 or newer; default python3)
TEXT
}

fail() {
    printf 'build_zipapp.sh: %s\n' "$1" >&2
    exit 1
}

# Version managers put stand-ins on PATH that do not run: an interpreter counts only when it answers, here
# with its own path.
real_path() {
    "$1" -S -c "import sys; sys.exit('$2' not in ('', '%d.%d' % sys.version_info[:2]))" 2>/dev/null &&
        "$1" -S -c 'import sys; sys.stdout.write(sys.executable)'
}

find_python() {
    case $1 in
    */*)
        real_path "$1" '' || fail "--python $1: it does not run"
        echo
        return
        ;;
    3.[0-9] | 3.[0-9][0-9]) ;;
    *) fail "--python $1: neither a version such as 3.8 nor a path" ;;
    esac
    for candidate in "$(command -v "python$1" || true)" "${HOME:-}/.pyenv/versions/$1"*/bin/python3; do
        if [ -x "$candidate" ] && real_path "$candidate" "$1"; then
            echo
            return
        fi
    done
    fail "--python $1: no python$1 on PATH, and none under ~/.pyenv/versions"
}

here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
output=$here/dist/packtrack-logger.pyz
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

while [ $# -gt 0 ]; do
    case $1 in
    --python=* | --output=*)
        option=${1%%=*}
        value=${1#*=}
        shift
        set -- "$option" "$value" "$@"
        continue
        ;;
    --python | --output)
        [ $# -ge 2 ] || fail "$1 needs a value"
        if [ "$1" = --python ]; then
            find_python "$2" >>"$work/pythons"
        else
            output=$2
        fi
        shift 2
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *)
        usage >&2
        fail "unknown argument: $1"
        ;;
    esac
done

python=$(real_path "$python" '') ||
    fail "${PYTHON:-python3} does not run: install python3, or name one with PYTHON=/path/to/python3"
[ -s "$work/pythons" ] || printf '%s\n' "$python" >"$work/pythons"
mkdir -p "$(dirname "$output")" "$work/archive"
cp "$here/packtrack_logger.py" "$here/LICENSE" "$work/archive/"

# Runs on every Python that there is, 2.7 and those without zlib too. What it does where it cannot start is
# the module's own section, so that the module as a script does the same.
section='# ---- A poor Python:'
{
    cat <<'PYTHON'
import errno
import os
import sys

PYTHON
    awk -v section="$section" '/^(# ----|try:)/{on = index($0, section) == 1} on' "$here/packtrack_logger.py"
    cat <<'PYTHON'
if sys.version_info < (3, 6):
    stand_aside("needs Python 3.6 or newer; this is %d.%d" % sys.version_info[:2])
try:
    import zlib  # zipimport, too, would miss it, and not name it
    from zipimport import zipimporter

    # An import would compile the source at every start, on some versions twice, once for its name alone.
    module = sys.modules["packtrack_logger"] = type(sys)("packtrack_logger")
    try:
        # The folder of this version has it compiled.
        module.__file__ = os.path.join(sys.path[0], sys.implementation.cache_tag, "packtrack_logger.pyc")
        code = zipimporter(os.path.dirname(module.__file__)).get_code("packtrack_logger")
    except ImportError:
        # Another version, or a pre-release, which shares the name of its final version but not the bytecode.
        module.__file__ = os.path.join(sys.path[0], "packtrack_logger.py")
        code = compile(__loader__.get_data(module.__file__), "packtrack_logger.py", "exec", optimize=0)
    exec(code, module.__dict__)
    code = module.main(sys.argv[1:])
except ImportError as error:
    stand_aside(MISSING_MODULE.format(error.name))
except KeyboardInterrupt:
    import signal

    # A shell's loop ends only if we die of it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    code = 128 + signal.SIGINT  # a process 1 does not
# All is written and closed: to take the interpreter apart would take longer than the work.
os._exit(code)
PYTHON
} >"$work/archive/__main__.py"
grep -q '^def stand_aside' "$work/archive/__main__.py" || fail "packtrack_logger.py has no section '$section'"

# The same process state gives the same marshalled bytes: no site, a fixed hash seed, no inherited variables
# (but for the one without which Windows starts nothing). No column numbers (3.11): nobody sees a traceback,
# and the bytecode loads a third faster without them. No docstrings but the module's, for the same reason.
cat >"$work/compile.py" <<'PYTHON'
import ast
import importlib.util
import marshal
import os
import sys

if sys.implementation.name != "cpython" or sys.version_info < (3, 6) or not sys.implementation.cache_tag:
    sys.exit("%s: bytecode needs CPython 3.6 or newer; this is %s %d.%d"
             % ((sys.executable, sys.implementation.name) + sys.version_info[:2]))
with open("packtrack_logger.py", "rb") as file:
    source = file.read()
tree = ast.parse(source)
for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node, clean=False) is not None:
        node.body[0] = ast.copy_location(ast.Pass(), node.body[0])
code = compile(tree, "packtrack_logger.py", "exec", dont_inherit=True, optimize=0)
if sys.version_info >= (3, 7):
    # Unchecked hash (PEP 552): no clock matters.
    check = b"\1\0\0\0" + importlib.util.source_hash(source)
else:
    check = b"\0\0\0\0" + (len(source) & 0xFFFFFFFF).to_bytes(4, "little")
folder = sys.implementation.cache_tag
if not os.path.isdir(folder):
    os.mkdir(folder)
    with open(os.path.join(folder, "packtrack_logger.pyc"), "wb") as file:
        file.write(importlib.util.MAGIC_NUMBER + check + marshal.dumps(code))
PYTHON
while read -r interpreter; do
    (
        cd "$work/archive"
        env -i PATH="$PATH" SYSTEMROOT="${SYSTEMROOT:-}" PYTHONHASHSEED=0 PYTHONNODEBUGRANGES=1 \
            "$interpreter" -S -s -B "$work/compile.py"
    ) || fail "no bytecode from $interpreter"
done <"$work/pythons"

cat >"$work/pack.py" <<'PYTHON'
import hashlib
import os
import sys
import zipfile

folder, output = sys.argv[1:]
names = sorted(os.path.relpath(os.path.join(path, name), folder).replace(os.sep, "/")
               for path, _, files in os.walk(folder) for name in files)
partial = output + ".partial"
try:
    with open(partial, "wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                entry.create_system = 3
                entry.external_attr = 0o100644 << 16
                # A Python without zlib reads what is stored, and then says so.
                entry.compress_type = zipfile.ZIP_STORED if name == "__main__.py" else zipfile.ZIP_DEFLATED
                with open(os.path.join(folder, name), "rb") as source:
                    archive.writestr(entry, source.read())
    os.chmod(partial, 0o755)
    with open(partial, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    os.replace(partial, output)
finally:
    if os.path.exists(partial):
        os.remove(partial)
with open(output + ".sha256", "w", newline="\n") as file:
    file.write("%s  %s\n" % (digest, os.path.basename(output)))
print("%s: %d bytes, bytecode for %s" % (output, os.path.getsize(output),
      ", ".join(name.split("/")[0] for name in names if name.endswith(".pyc"))))
PYTHON
"$python" -S -s -B "$work/pack.py" "$work/archive" "$output"
