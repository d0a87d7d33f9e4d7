"""A real server (nginx) and real hosts: no address that answers, no place to write."""
import contextlib
import os
import shutil
import socket
import subprocess
import time

import pytest

import certs
from conftest import FAST, FLAGS, KEY, Result, check_result, events, matches, ndjson, without_prefix
from standin import StandIn
from steps import SILENT

PLACES = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/sbin"
QUICK = ["--timeout", "20s", *FAST[2:], "--json", "--batch-size", "1"]
FOUND = {name: shutil.which(name, path=PLACES) for name in ("nginx", "unshare", "ip")}
NGINX = """daemon off; %(user)s worker_processes 1; pid %(folder)s/pid; error_log %(folder)s/error.log;
events { worker_connections 64; }
http { log_format plain "$status"; access_log %(folder)s/access.log plain; client_max_body_size %(largest)s;
    client_body_temp_path %(folder)s/1; proxy_temp_path %(folder)s/2; fastcgi_temp_path %(folder)s/3;
    uwsgi_temp_path %(folder)s/4; scgi_temp_path %(folder)s/5; %(http)s
    server { listen 127.0.0.1:%(port)d %(listen)s; %(server)s
        location / { proxy_pass http://127.0.0.1:%(upstream)d; %(location)s } } }
"""
SLOW = "limit_req_zone $remote_addr zone=z:1m rate=%s; limit_req_status %d;"
LIMIT = {"location": "limit_req zone=z;"}
CANNOT = "error: cannot buffer standard input: %s (set TMPDIR, or stream with --async)<...>"


@pytest.mark.skipif(FOUND["nginx"] is None, reason="nginx is not installed")
@pytest.mark.parametrize("conf, argv, code, err, number, statuses", [
    ({"tls": True}, ["--async", "--connections", "3"], 0, "", 3, "200 200 200"),
    ({"tls": True, "env": {}}, [], 2, "record 1: TLS certificate of 127.0.0.1 not trusted: unknown ", 0, ""),
    ({"tls": True, "scheme": "http"}, [], 2, "record 1: HTTP 400 Bad Request; delivered 0 of 3", 0, "400"),
    ({"largest": "400"}, ["--batch-size", "3"], 0, "", 3, "413 200 200"),
    ({"largest": "100"}, [], 2, "record 1: HTTP 413 Request Entity Too Large; delivered 0 of 3", 0, "413"),
    ({"http": "keepalive_requests 2;"}, [], 0, "", 3, "200 200 200"),
    ({"http": "keepalive_timeout 1ms;"}, ["--gzip"], 0, "", 3, "200 200 200"),
    ({"http": SLOW % ("20r/s", 429), **LIMIT}, ["--retries", "99", "--backoff-max", "20ms"], 0, "", 3, None),
    ({"http": SLOW % ("1r/m", 503), **LIMIT}, [], 3, "record 2: HTTP 503 Service ", 1, "200 503 503"),
    ({"upstream": 1}, [], 3, "record 1: HTTP 502 Bad Gateway, after 2 attempts; delivered 0", 0, "502 502"),
    ({"location": "proxy_read_timeout 100ms;", "script": [SILENT]}, [], 0, "", 3, "504 200 200 200"),
    ({"server": "return 301 https://$host$request_uri;"}, [], 2,
     "record 1: HTTP 301 redirects to https://127.0.0.1/api/ingest: ", 0, "301")],
    ids=lambda value: str(value)[:40])
def test_nginx(conf, argv, code, err, number, statuses, run, tmp_path):
    tls, authority = {}, certs.authority()
    if "tls" in conf:
        tls = {"env": {"SSL_CERT_FILE": authority.root}, "scheme": "https", "listen": "ssl",
               "server": "ssl_certificate %s; ssl_certificate_key %s;" % authority.good}
    conf = {"http": "", "server": "", "location": "", "listen": "", "largest": "0", "env": {}, **tls, **conf}
    (tmp_path / "in").write_bytes(ndjson(events(3)))
    with StandIn(conf.get("script", ())) as server, socket.socket() as sock, contextlib.ExitStack() as stack:
        sock.bind(("127.0.0.1", 0))
        sock.listen(64)
        port = sock.getsockname()[1]  # nginx takes the socket over: nobody gets the port in between
        (tmp_path / "conf").write_text(NGINX % {"folder": tmp_path, "port": port, "upstream": server.port,
                                                "user": "user root;" * (os.geteuid() == 0), **conf})
        nginx = subprocess.Popen(
            [FOUND["nginx"], "-p", str(tmp_path), "-e", "error.log", "-c", str(tmp_path / "conf")],
            pass_fds=[sock.fileno()], env={**os.environ, "NGINX": "%d;" % sock.fileno()},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(nginx.wait)
        stack.callback(nginx.terminate)
        url = "%s://127.0.0.1:%d" % (conf.get("scheme", "http"), port)
        result = run(*QUICK, "--base-url", url, "--file", "in", "--ndjson", *argv, env=conf["env"])
        assert (result.code, result.summary["delivered"]) == (code, number), result
        assert result.err.startswith("packtrack-logger: error: " + err) if err else not result.err, result
        assert {one["message"] for one in server.records} == {"event %d" % (n + 1) for n in range(number)}
        end = time.monotonic() + 20  # it logs after it has answered
        while statuses is not None and (tmp_path / "access.log").read_text().split() != statuses.split():
            assert time.monotonic() < end, (tmp_path / "access.log").read_text()
            time.sleep(0.01)


@pytest.fixture
def in_namespace(argv_of, tmp_path):
    """in_namespace(kind, script, *argv): a run after this script of sh, in namespaces of its own."""
    def run(kind, script, *argv, data=b"", env=()):
        command = [FOUND["unshare"], *kind, "sh", "-c", script + '\ncd "$0" && exec "$@"', str(tmp_path)]
        if not FOUND["unshare"] or subprocess.run([*command, "true"], stderr=subprocess.DEVNULL).returncode:
            pytest.skip("namespaces of one's own are not allowed here (unshare %s)" % " ".join(kind))
        done = subprocess.run([*command, *argv_of(*argv, "--json")], input=data, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=60,
                              env={"PATH": PLACES, "PACKTRACK_API_KEY": KEY, **dict(env)})
        result = Result(list(argv), done.returncode, done.stdout, done.stderr, 0)
        check_result(result, [*argv, "--json"], None, (), True)
        return result
    return run


READ_ONLY = """for place in /tmp /var/tmp /usr/tmp "$0"; do
    [ ! -d $place ] || [ -h $place ] || {
    mount --bind $place $place && mount -o remount,bind,ro $place; } || exit 9
done"""
FULL = 'mkdir -p "$0/small" && mount -t tmpfs -o size=1m none "$0/small" || exit 9'
BIG = ndjson(events(9000, metadata={"filler": "x" * 2000}))  # more than is held in memory


@pytest.mark.parametrize("script, argv, env, data, code, err, number", [
    (READ_ONLY, [], {}, BIG, 4, CANNOT % "no writable temporary directory", 0),
    (READ_ONLY, ["--undelivered", "new"], {}, ndjson(events(3)), 1,
     "error: --undelivered: cannot write new: permission denied", 0),
    (FULL, ["--output", "small/out"], {"TMPDIR": "/tmp"}, BIG, 4,
     "error: <...>cannot write small/out: no space left on device<...>", ...)],
    ids=["no place", "undelivered", "full output"])
def test_no_place(script, argv, env, data, code, err, number, in_namespace):
    with StandIn() as server:
        result = in_namespace(["-m"], script, "--stdin", "--ndjson", *argv, data=data,
                              env={"PACKTRACK_BASE_URL": server.url, **env})
        assert result.code == code and matches(err, without_prefix(result.err), {}), result
        assert number in (..., len(server.records)) and number in (..., result.summary["delivered"])


@pytest.mark.skipif(FOUND["ip"] is None, reason="ip is not installed")
@pytest.mark.parametrize("script, err", [
    ("ip link set lo up", "error: 192.0.2.1:80: network is unreachable, after 1 attempt"),
    ("ip link set lo up && ip route add unreachable 192.0.2.0/24",
     "error: 192.0.2.1:80: no route to host, after 1 attempt"),
    ("ip link add v0 type veth peer name v1; ip addr add 192.0.2.9/24 dev v0; ip link set v0 up; "
     "ip link set v1 up", "error: timed out after 0.5s, after 1 attempt")],
    ids=["no network", "no route", "nobody there"])
def test_no_host(script, err, in_namespace):
    result = in_namespace(["-m", "-n"], script, *FLAGS, "--retries", "0", "--timeout", "500ms", "--base-url",
                          "http://192.0.2.1")
    assert result.code == 3 and matches(err, without_prefix(result.err), {}), result
