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
# So many processes share the tests.
JOBS = $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
QUICK =

ARCHIVE = dist/packtrack-logger.pyz
# make compat: each version runs every SAMPLE-th of these, another part of them than its neighbours.
COMPAT_TESTS = $(addprefix tests/test_,$(addsuffix .py,archive cli delivery faults input servers wrapper))
SAMPLE = 3
# Only these versions, such as "3.6 3.13"; empty: all that are found.
VERSIONS =

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

# $(call share,ARGUMENTS): runs $$py -m pytest in JOBS processes; the first one's output is seen as it comes.
# A share may be empty (exit code 5), all of them may not.
define share
logs=$$(mktemp -d); pids=; trap 'rm -rf "$$logs"' EXIT; trap 'kill $$pids; exit 130' INT TERM; \
	ran=; failed=; share=$(JOBS); mkdir "$$logs/claims"; \
	while [ $$share -gt 1 ]; do \
		PYTHONPATH=tests "$$py" -m pytest -q -p shard --claims="$$logs/claims" $(1) $(PYTEST_ARGS) \
			>"$$logs/$$share" 2>&1 </dev/null & \
		pids="$$pids $$!"; share=$$((share - 1)); \
	done; \
	PYTHONPATH=tests "$$py" -m pytest -q -p shard --claims="$$logs/claims" $(1) $(PYTEST_ARGS) </dev/null; \
	code=$$?; [ $$code -eq 5 ] || ran=1; [ $$code -eq 0 ] || [ $$code -eq 5 ] || failed=1; \
	for pid in $$pids; do \
		wait $$pid; code=$$?; \
		[ $$code -eq 5 ] || ran=1; [ $$code -eq 0 ] || [ $$code -eq 5 ] || failed=1; \
	done; pids=; \
	[ $(JOBS) -eq 1 ] || cat "$$logs"/[0-9]*; \
	[ -n "$$ran" ] || { echo >&2 'make: no test was selected'; failed=1; }; \
	[ -z "$$failed" ]
endef

help:
	@echo 'make demo      build the archive and send events with it to a stand-in of the service'
	@echo 'make test      the tests (pytest: present as pinned, or put into .venv)'
	@echo 'make test-full the long tests that make test leaves out'
	@echo 'make compat    the tests of the program on each CPython from 3.6 up that is found'
	@echo 'make lint      ruff, mypy, and shellcheck if it is there'
	@echo 'make bench     speed and memory against their floors (QUICK=1: in under a minute)'
	@echo 'make mutants   how many of 300 small changes of the module the tests notice'
	@echo 'make coverage  the lines and branches that no test runs'
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
	@$(call with,pytest); $(call share,-m 'not full')

test-full:
	@$(call with,pytest); $(call share,-m full)

compat:
	@$(call with,pytest); found=$$(.ci/pythons); failed=; done=; sample=0; \
	[ -n "$$found" ] || { echo >&2 'make: no CPython from 3.6 up was found'; exit 1; }; \
	echo "found:" $$(printf '%s\n' "$$found" | cut -d ' ' -f 1); \
	for version in $(or $(VERSIONS),$$(printf '%s\n' "$$found" | cut -d ' ' -f 1)); do \
		python=$$(printf '%s\n' "$$found" | sed -n "s/^$$version //p"); \
		[ -n "$$python" ] || { echo >&2 "make: no CPython $$version was found"; failed="$$failed $$version"; \
			continue; }; \
		flags='-X dev -W error'; [ "$$version" != 3.6 ] || flags=; \
		sample=$$((sample % $(SAMPLE) + 1)); done="$$done $$version"; \
		echo "== the program on Python $$version: $$python $$flags"; \
		( PROGRAM_PYTHON=$$python; PROGRAM_FLAGS=$$flags; export PROGRAM_PYTHON PROGRAM_FLAGS; \
		$(call share,-m 'not full' --sample $$sample/$(SAMPLE) $(COMPAT_TESTS)) ) || failed="$$failed $$version"; \
	done; \
	[ -z "$$failed" ] || { echo >&2 "make: failed on$$failed"; exit 1; }; \
	echo "compat: all passed on$$done"

lint:
	@$(call with,pytest ruff mypy); set -e; \
	echo 'ruff'; "$$py" -m ruff check .; \
	echo 'mypy'; "$$py" -m mypy; \
	if command -v shellcheck >/dev/null; then \
		echo 'shellcheck'; shellcheck build_zipapp.sh .ci/run .ci/pythons; \
	else echo 'shellcheck: not installed, left out'; fi

# Puts the tables of flags and exit codes into the README.
readme:
	@"$(PYTHON)" -B tests/readme.py

print-version:
	@sed -n 's/^VERSION = "\(.*\)"$$/\1/p' packtrack_logger.py

# What CHANGELOG.md says of this version.
release-notes:
	@awk -v heading="## [$$($(MAKE) -s print-version)]" '/^\[/ { on = 0 } on && /^## / { on = 0 } on { print } \
		index($$0, heading) == 1 { on = 1 }' CHANGELOG.md | sed '/./,$$!d'

# Mutates the module in a copy of the tree; prints the score by section and each survivor as a diff.
mutants:
	@$(call with,pytest); "$$py" tests/mutants.py --count 300 --seed 1 --jobs $(JOBS)

coverage:
	@$(call with,pytest); "$$py" tests/mutants.py --coverage --jobs $(JOBS)

bench:
	@"$(PYTHON)" tests/bench.py $(if $(QUICK),--quick)

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

.PHONY: help build demo venv test test-full compat lint readme print-version release-notes mutants coverage \
	bench install uninstall clean
