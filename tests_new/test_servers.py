"""Real servers (nginx, tinyproxy, openssl) and real hosts: no address that answers, no place to write.

Each server is started here with a folder and a port of its own, and stopped by its own handle.
"""
import contextlib
import os
import shutil
import socket
import subprocess
import time

import pytest

import certs
from cases import matches, without_prefix
from conftest import FAST, FLAGS, KEY, Result, check_result, event, events, ndjson
from standin import RefusedPort, StandIn
from steps import SILENT

PLACES = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/sbin"
QUICK = ["--timeout", "20s", *FAST[2:], "--json", "--batch-size", "1"]
FOUND = {name: shutil.which(name, path=PLACES) for name in ("nginx", "tinyproxy", "openssl", "unshare", "ip")}
NGINX = """daemon off; %(user)s worker_processes 1; pid %(folder)s/pid; error_log %(folder)s/error.log;
events { worker_connections 64; }
http { log_format plain "$status"; access_log %(folder)s/access.log plain; client_max_body_size %(largest)s;
    client_body_temp_path %(folder)s/1; proxy_temp_path %(folder)s/2; fastcgi_temp_path %(folder)s/3;
    uwsgi_temp_path %(folder)s/4; scgi_temp_path %(folder)s/5; %(http)s
    server { listen 127.0.0.1:%(port)d %(listen)s; %(server)s
        location / { proxy_pass http://127.0.0.1:%(upstream)d; %(location)s } } }
"""
TINYPROXY = "%(user)s\nPort %(port)d\nListen 127.0.0.1\nLogFile \"%(folder)s/log\"\nMaxClients 9\n%(more)s\n"


def needs(name):
    return pytest.mark.skipif(FOUND[name] is None, reason=name + " is not installed")


@pytest.fixture
def started(tmp_path):
    """started(argv, port, **popen): a server as a child; TERM at the end. Waits until the port listens."""
    with contextlib.ExitStack() as stack:
        def begin(argv, port, **popen):
            child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                     stderr=subprocess.DEVNULL, **popen)
            stack.callback(child.wait)
            stack.callback(child.terminate)
            end = time.monotonic() + 20
            while True:
                with contextlib.closing(socket.socket()) as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        return child
                assert child.poll() is None and time.monotonic() < end, argv
                time.sleep(0.02)
        yield begin


def configure(folder, text, port, **more):
    """Write a server's configuration; its path."""
    user = ("User root\nGroup root" if "Listen " in text else "user root;") if os.geteuid() == 0 else ""
    (folder / "conf").write_text(text % {"folder": folder, "port": port, "user": user, **more})
    return str(folder / "conf")


def free_port():
    with contextlib.closing(socket.socket()) as finder:
        finder.bind(("127.0.0.1", 0))
        return finder.getsockname()[1]


def send(run, argv, code, err, number, **options):
    """A run to this exit code, this beginning of standard error and so many delivered events."""
    result = run(*QUICK, *argv, **options)
    assert (result.code, result.summary["delivered"]) == (code, number), result
    assert result.err.startswith("packtrack-logger: error: " + err) if err else not result.err, result


SLOW = "limit_req_zone $remote_addr zone=z:1m rate=%s; limit_req_status %d;"
LIMIT = {"location": "limit_req zone=z;"}
REFUSED = "proxy 127.0.0.1:%d refused the tunnel: HTTP "
CANNOT = "error: cannot buffer standard input: %s (set TMPDIR, or stream with --async)<...>"


@needs("nginx")
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
def test_nginx(conf, argv, code, err, number, statuses, run, started, tmp_path):
    tls, authority = {}, certs.authority()
    if "tls" in conf:
        tls = {"env": {"SSL_CERT_FILE": authority.root}, "scheme": "https", "listen": "ssl",
               "server": "ssl_certificate %s; ssl_certificate_key %s;" % authority.good}
    conf = {**dict.fromkeys(("http", "server", "location", "listen"), ""), "largest": "0", "env": {},
            **tls, **conf}
    (tmp_path / "in").write_bytes(ndjson(events(3)))
    with StandIn(conf.get("script", ())) as server, contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        port = listener.getsockname()[1]  # nginx takes the socket over: nobody gets the port in between
        path = configure(tmp_path, NGINX, port, **{"upstream": server.port, **conf})
        started([FOUND["nginx"], "-e", str(tmp_path / "error.log"), "-p", str(tmp_path), "-c", path], port,
                pass_fds=[listener.fileno()], env={**os.environ, "NGINX": "%d;" % listener.fileno()})
        send(run, ["--base-url", "%s://127.0.0.1:%d" % (conf.get("scheme", "http"), port),
                   "--file", tmp_path / "in", "--ndjson", *argv], code, err, number, env=conf["env"])
        assert {one["message"] for one in server.records} == {"event %d" % (n + 1) for n in range(number)}
        end = time.monotonic() + 20  # it logs after it has answered
        while statuses is not None and (tmp_path / "access.log").read_text().split() != statuses.split():
            assert time.monotonic() < end, (tmp_path / "access.log").read_text()
            time.sleep(0.01)


@needs("tinyproxy")
@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("more, user, code, err", [
    ("BasicAuth user right-w0rd\nConnectPort %d", "user:right-w0rd@", (0, 0), ("", "")),
    ("BasicAuth user right-w0rd\n#%d", "user:wrong-w0rd@", (2, 2), ("", REFUSED + "40")),
    ("ConnectPort 1\n#%d", "", (0, 2), ("", REFUSED + "403 Access violation")),
    ("ConnectPort %d", "", (3, 3), ("HTTP 50", REFUSED + "50"))])
def test_tinyproxy(scheme, more, user, code, err, run, started, tmp_path):
    tls, authority, port = scheme == "https", certs.authority(), free_port()
    with StandIn(tls=authority.good if tls else None) as server, RefusedPort() as refused:
        there = refused.port if 3 in code else server.port
        path = configure(tmp_path, TINYPROXY, port, more=more % there)
        started([FOUND["tinyproxy"], "-d", "-c", path], port)
        send(run, ["--base-url", "%s://127.0.0.1:%d" % (scheme, there), *FLAGS], code[tls],
             err[tls].replace("%d", str(port)) or "HTTP 401" * bool(code[tls]), int(code[tls] == 0),
             env={scheme + "_proxy": "http://%s127.0.0.1:%d" % (user, port), "SSL_CERT_FILE": authority.root},
             secrets=["right-w0rd", "wrong-w0rd"])
        assert server.records == [event()] * (code[tls] == 0)


@needs("openssl")
@pytest.mark.parametrize("flags, err", [
    (["-tls1_2", "-Verify", "1"], "refused the TLS handshake (does it require a client certificate?)"),
    (["-tls1_3", "-Verify", "1"], "requires a TLS client certificate, which is not supported"),
    (["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], "supports none of the TLS versions that this Python has")])
def test_openssl(flags, err, run, started):
    authority, port = certs.authority(), free_port()
    started([FOUND["openssl"], "s_server", "-quiet", "-accept", "127.0.0.1:%d" % port,
             "-cert", authority.good[0], "-key", authority.good[1], *flags], port)
    send(run, ["--base-url", "https://127.0.0.1:%d" % port, *FLAGS], 2, "127.0.0.1:%d " % port + err, 0,
         env={"SSL_CERT_FILE": authority.root})


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
    (READ_ONLY, [], {}, ndjson(events(3)), 0, "", 3),
    (READ_ONLY, [], {}, BIG, 4, CANNOT % "no writable temporary directory", 0),
    (READ_ONLY, ["--async"], {}, BIG, 0, "", 9000),
    (READ_ONLY, ["--undelivered", "new"], {}, ndjson(events(3)), 1,
     "error: --undelivered: cannot write new: its directory is not writable", 0),
    (FULL, [], {"TMPDIR": "small"}, BIG, 4, CANNOT % "no space left on device", 0),
    (FULL, ["--output", "small/out"], {"TMPDIR": "/tmp"}, BIG, 4,
     "error: <...>cannot write small/out: no space left on device<...>", ...)],
    ids=["read-only", "no place", "async", "undelivered", "full", "full output"])
def test_no_place(script, argv, env, data, code, err, number, in_namespace):
    with StandIn() as server:
        result = in_namespace(["-m"], script, "--stdin", "--ndjson", *argv, data=data,
                              env={"PACKTRACK_BASE_URL": server.url, **env})
        assert result.code == code and matches(err, without_prefix(result.err), {}), result
        assert number in (..., len(server.records)) and number in (..., result.summary["delivered"])


@needs("ip")
@pytest.mark.parametrize("script, err", [
    ("ip link set lo up", "error: 192.0.2.1:80: network is unreachable, after 1 attempt"),
    ("ip link set lo up && ip route add unreachable 192.0.2.0/24",
     "error: 192.0.2.1:80: no route to host, after 1 attempt"),
    ("ip link add v0 type veth peer name v1; ip addr add 192.0.2.9/24 dev v0; ip link set v0 up; "
     "ip link set v1 up",
     "error: timed out after 0.5s, after 1 attempt")], ids=["no network", "no route", "nobody there"])
def test_no_host(script, err, in_namespace):
    result = in_namespace(["-m", "-n"], script, *FLAGS, "--retries", "0", "--timeout", "500ms", "--base-url",
                          "http://192.0.2.1")
    assert result.code == 3 and matches(err, without_prefix(result.err), {}), result
