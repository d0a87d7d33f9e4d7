# `make` alone tells what there is.

# The interpreter that builds, and runs the tests if it has what tests/requirements.txt names.
PYTHON ?= python3
# The CPythons that the archive carries bytecode for, such as "3.6 3.8 /opt/python/bin/python3"; "all" stands
# for those that are found; empty: the one that builds.
BYTECODE =
PREFIX = /usr/local
DESTDIR =
# Further arguments of pytest, such as "-x -k proxy".
PYTEST_ARGS =
QUICK =

ARCHIVE = dist/packtrack-logger.pyz
COMPAT_TESTS = tests/test_cli.py tests/test_archive.py

HAS_TOOLS = import sys, importlib.metadata as metadata; \
	pins = dict(line.strip().split("==") for line in open("tests/requirements.txt") if "==" in line); \
	sys.exit(any(metadata.version(name) != pins[name] for name in sys.argv[1:]))

# $(call with,TOOLS): sets $$py to an interpreter that has these tools as pinned; makes .venv if none has.
define with
py=; for try in "$(PYTHON)" .venv/bin/python; do \
	if [ -z "$$py" ] && "$$try" -c '$(HAS_TOOLS)' $(1) 2>/dev/null; then py=$$try; fi; \
	done; \
	if [ -z "$$py" ]; then $(MAKE) --no-print-directory venv || exit 1; py=.venv/bin/python; fi
endef

help:
	@echo 'make demo      build the archive and send events with it to a stand-in of the service'
	@echo 'make test      the tests (pytest: present as pinned, or put into .venv)'
	@echo 'make test-full the long tests that make test leaves out'
	@echo 'make compat    the tests of the program on each CPython from 3.6 up that is found'
	@echo 'make lint      ruff, mypy, and shellcheck if it is there'
	@echo 'make bench     speed and memory against their floors (QUICK=1: in under a minute)'
	@echo 'make readme    refresh the tables in README.md'
	@echo 'make build     $(ARCHIVE) and its .sha256 (BYTECODE="3.6 3.11" or all)'
	@echo 'make install   build, and copy to PREFIX/bin/packtrack-logger (PREFIX=$(PREFIX))'
	@echo 'make uninstall remove it from there'
	@echo 'make clean     remove what these made'

build:
	@set -e; set --; \
	if [ "$(BYTECODE)" = all ]; then \
		for python in $$(.ci/pythons | cut -d " " -f 2-); do set -- "$$@" --python "$$python"; done; \
	else \
		for python in $(BYTECODE); do set -- "$$@" --python "$$python"; done; \
	fi; \
	PYTHON="$(PYTHON)" ./build_zipapp.sh "$$@" --output "$(ARCHIVE)"

demo: build
	@"$(PYTHON)" tests/demo.py "$(ARCHIVE)"

venv:
	@"$(PYTHON)" -c '' || { echo >&2 'make: $(PYTHON) does not run: install it (Debian:' \
		'apt-get install python3 python3-venv), or name another: make PYTHON=/path/to/python3 ...'; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 8))' || { echo >&2 'make: the tests run' \
		'on Python 3.8 or newer (the program does on 3.6): make PYTHON=/path/to/python3 ...'; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 'make: $(PYTHON) lacks venv and' \
		'ensurepip, which the tests need for their tools (Debian: apt-get install python3-venv)'; exit 1; }
	@echo 'Putting what tests/requirements.txt names into .venv'
	@rm -rf .venv
	@"$(PYTHON)" -m venv .venv
	@.venv/bin/python -m pip --disable-pip-version-check install -q -r tests/requirements.txt || { \
		rm -rf .venv; echo >&2 'make: pip could not install what tests/requirements.txt names:' \
		'is a package index in reach?'; exit 1; }

test:
	@$(call with,pytest); "$$py" -m pytest -q -m 'not full' $(PYTEST_ARGS)

test-full:
	@$(call with,pytest); "$$py" -m pytest -q -m full $(PYTEST_ARGS)

compat:
	@$(call with,pytest); failed=; list=$$(mktemp); trap 'rm -f "$$list"' EXIT; \
	.ci/pythons >"$$list"; \
	[ -s "$$list" ] || { echo >&2 'make: no CPython from 3.6 up was found'; exit 1; }; \
	echo "found: $$(cut -d ' ' -f 1 "$$list" | tr '\n' ' ')"; \
	while read -r version python; do \
		flags='-X dev -W error'; [ "$$version" != 3.6 ] || flags=; \
		echo "== the program on Python $$version: $$python $$flags"; \
		PROGRAM_PYTHON="$$python" PROGRAM_FLAGS="$$flags" "$$py" -m pytest -q -m 'not full' $(PYTEST_ARGS) \
			$(COMPAT_TESTS) </dev/null || failed="$$failed $$version"; \
	done <"$$list"; \
	[ -z "$$failed" ] || { echo >&2 "make: failed on$$failed"; exit 1; }; \
	echo "compat: all passed on $$(cut -d ' ' -f 1 "$$list" | tr '\n' ' ')"

lint:
	@$(call with,pytest ruff mypy); set -e; \
	echo 'ruff'; "$$py" -m ruff check .; \
	echo 'mypy'; "$$py" -m mypy; \
	if command -v shellcheck >/dev/null; then \
		echo 'shellcheck'; shellcheck build_zipapp.sh .ci/run .ci/pythons; \
	else echo 'shellcheck: not installed, left out'; fi

define FILL_IN
import re, packtrack_logger
with open("README.md", encoding="utf-8") as file:
    text = file.read()
for name, table in packtrack_logger.readme_tables().items():
    text = re.sub("(<!-- %s -->\n).*?(<!-- /%s -->)" % (name, name),
                  lambda match: match.group(1) + table + match.group(2), text, flags=re.S)
with open("README.md", "w", encoding="utf-8", newline="\n") as file:
    file.write(text)
endef
export FILL_IN

# Puts the tables of flags and exit codes into the README.
readme:
	@"$(PYTHON)" -B -c "$$FILL_IN"

print-version:
	@sed -n 's/^VERSION = "\(.*\)"$$/\1/p' packtrack_logger.py

# What CHANGELOG.md says of this version.
release-notes:
	@awk -v heading="## [$$($(MAKE) -s print-version)]" '/^\[/ { on = 0 } on && /^## / { on = 0 } on { print } \
		index($$0, heading) == 1 { on = 1 }' CHANGELOG.md | sed '/./,$$!d'

bench:
	@"$(PYTHON)" tests/bench.py $(if $(QUICK),--quick)

bench-quick:
	@"$(PYTHON)" tests/bench.py --quick

install: build
	@mkdir -p "$(DESTDIR)$(PREFIX)/bin"
	@cp "$(ARCHIVE)" "$(DESTDIR)$(PREFIX)/bin/packtrack-logger.new"
	@chmod 755 "$(DESTDIR)$(PREFIX)/bin/packtrack-logger.new"
	@mv "$(DESTDIR)$(PREFIX)/bin/packtrack-logger.new" "$(DESTDIR)$(PREFIX)/bin/packtrack-logger"
	@echo "installed $(DESTDIR)$(PREFIX)/bin/packtrack-logger"

uninstall:
	rm -f "$(DESTDIR)$(PREFIX)/bin/packtrack-logger"

clean:
	rm -rf dist .venv .ruff_cache .mypy_cache .pytest_cache __pycache__ tests/__pycache__

.PHONY: help build demo venv test test-full compat lint readme print-version release-notes bench bench-quick \
	install uninstall clean
