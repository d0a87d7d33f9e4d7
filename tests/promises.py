"""Which test holds which promise of the design: `promise | test ...`, checked by test_project.py.

A test is FILE::FUNCTION or FILE::FUNCTION[id]; "every run" is what conftest asserts of each.
"""
import re

PROMISES = """
read = delivered + undelivered + invalid; the --json line and standard error agree | every run
exit 0 means all were delivered | every run fuzz::test_seeds
what is not delivered is named by its record numbers | delivery::test_failure_line
what is not delivered is kept, and can be sent again | delivery::test_undelivered fuzz::test_seeds
--no-flush is the one exception | delivery::test_no_flush
exit 1 and 4 mean that nothing was sent | input::test_refused fuzz::test_seeds
memory is bounded for any number of records, valid or not, file, pipe or array | delivery::test_memory
cost is linear and the same for each record | input::test_cost
an attempt ends at --timeout, a run at --deadline | faults::test_silence delivery::test_deadline
INT, TERM, HUP are heeded within a second everywhere | delivery::test_signal
a run that a signal ended dies of it; as PID 1 128+n | delivery::test_signal delivery::test_pid_1
no traceback, no warning reaches a user | every run
complete records go out byte for byte | delivery::test_bytes_are_kept
success prints nothing | every run cli::test_events
it is in no output, whatever fails | every run faults::test_echo
it is sent to the origin of --base-url only | faults::test_redirect faults::test_proxy
the server's words are dropped where they hold it in any escape | faults::test_echo
one shorter than six characters is not searched for | faults::test_short_key
proxy credentials are in no output | faults::test_proxy
# options
every option has a variable; flag, variable, default | cli::test_precedence pure::test_option_table
an error names the flag or the variable it came from | cli::test_values
booleans: words, =, --no- form, never the next word | cli::test_booleans
durations, counts, fractions: bounds and forms | cli::test_values pure::test_durations
no abbreviations; a value may begin with a dash; no arguments: short usage, exit 1 | cli::test_usage
an unknown flag is named with the nearest, a stray argument is not quoted | cli::test_usage
header values that no header may hold are refused and not quoted | cli::test_header_values
base URLs: what is accepted, and why not | cli::test_base_url
exactly one source of records | cli::test_sources
-h is short, --help is all, in 80 columns | cli::test_help
--api-key-file; its mode is mentioned under --verbose | cli::test_api_key
--health and PACKTRACK_HEALTH_ENABLE | cli::test_health
--meta beats --metadata; --dry-run needs no key and sends nothing | cli::test_events
--allow-empty | input::test_empty
--connections: order at 1, account and ranges at 8 | delivery::test_connections fuzz::test_seeds
--max-batch-bytes and --batch-size close a batch | delivery::test_batches
--keep-going skips, and exits with the first of 2, 3, 4, 1 | delivery::test_keep_going
--undelivered: mode 0600, not the input itself, opened anew, follows mv | delivery::test_undelivered
--output: completes, appends, does not interleave; a failed write is exit 4 | delivery::test_output
--output - that nobody reads, a FIFO, a lock: deadline and signals end it | delivery::test_stuck_output
--json on every end | every run cli::test_json
--progress: only on a terminal, after a second | cli::test_progress
completion in bash, zsh, fish | completion::test_word completion::test_list completion::test_script
# events
defaults fill in what is absent, ids keep their names | pure::test_completion_of_records
validation, the same from flags and from records | cli::test_event_flags input::test_invalid
all missing fields are named at once | cli::test_event_flags
unknown field: the nearest, and metadata | input::test_invalid
timestamps; text is UTF-8 whatever the locale | pure::test_timestamps cli::test_event_flags
# input
what is accepted | input::test_accepted
what is refused, with source and line, never its content | input::test_refused
kept until valid: 16 MiB in memory, then an unnamed file; no place: TMPDIR is named | delivery::test_no_place
a file that changes while it is sent | delivery::test_file_changes
gzip is named as such | input::test_refused[gzip]
# server and network
connection faults are retried | faults::test_connection
silence and drips end at --timeout | faults::test_silence
2xx is delivered whatever its body does; stalled, in a second | faults::test_body faults::test_stalled_body
not HTTP, bad statuses, absurd headers: retried | faults::test_not_http
a 200 before the body was sent is not delivered | faults::test_early_200
statuses and their verdicts | faults::test_status
redirects are final, and name where they point | faults::test_redirect
429 and 5xx; Retry-After, which past 60 s or the deadline ends the attempts | faults::test_retry_after
413 splits a batch; one event is final; early 413 is seen | faults::test_413
401, 403, 404 end the run even with --keep-going | delivery::test_keep_going
certificates, TLS faults in words; https to a plain port, http to a TLS port | faults::test_tls
name that does not resolve; bounded resolver | faults::test_resolver
a dead address before a live one | faults::test_addresses
a kept connection closed between batches | faults::test_kept_connection
a batch refused in the middle | delivery::test_failure_line
proxies: http, CONNECT, NO_PROXY, 4xx, 5xx, https scheme | faults::test_proxy
backoff, jitter, --backoff-max | pure::test_backoff faults::test_backoff
idempotency keys; gzip bodies | delivery::test_idempotency_keys delivery::test_gzip
health path, prefix, user agent, headers | cli::test_request
standard streams closed or full: the verdict stands | cli::test_information delivery::test_full_pipe
little memory | delivery::test_little_memory
# --async
records stream; batches close on size, bytes, interval, and at a bad record | delivery::test_async
a full queue makes the reader wait | delivery::test_queue
a failure ends the run while the input is idle | faults::test_idle_input
first signal flushes, second stops; several within 0.2 s are one | delivery::test_async_signals
under timeout(1), 40 times | delivery::test_under_timeout
# a command after --
what it is given: environment, signals, descriptors, group | wrapper::test_as_if_alone
nothing of ours is left behind | wrapper::test_leaves_no_process
how it ended is reported | wrapper::test_report
the exit code is its own; a signal is died of | wrapper::test_exit
not found, not executable, no first line | wrapper::test_cannot_run
--status, --severity, --json, --output -, --dry-run are usage errors | wrapper::test_usage
what is wrong in environment, key, files is one line, and it runs | wrapper::test_runs_anyway
delivery fails: one line, where the event was kept | wrapper::test_delivery_fails
--strict; --command-timeout | wrapper::test_strict wrapper::test_command_timeout
signals are passed on once; while reporting 5 s are left | wrapper::test_signals
a command of another user is waited for | wrapper::test_setuid
Ctrl-C in a shell's loop ends the loop | wrapper::test_shell_loop
a Python without json, argparse, urllib, zlib | archive::test_poor_python
# library, archive, project
Client: the names, the errors | pure::test_client
two builds are identical | archive::test_reproducible
an old Python is told what is needed | archive::test_old_python
the module: order, line budget, 3.6 syntax | project::test_module
every README example runs | readme::test_block
"""


def broken(collected):
    """The promises whose tests are not among these ids; files that were not collected are not looked at."""
    names = {re.sub(r"\[pyz?\]$", "", name.split("/")[-1]) for name in collected}
    names |= {name.partition("[")[0] for name in names}
    files = {name.partition("::")[0] for name in names}
    for line in PROMISES.strip().split("\n"):
        promise, _, tests = line.partition(" | ")
        if not tests and line[:1] != "#":
            yield "no test: " + promise
        for test in tests.replace("every run", "").split():
            test = "test_%s" % test.replace("::", ".py::", 1)
            if test.partition("::")[0] in files and test not in names:
                yield "%s: no such test: %s" % (promise, test)
