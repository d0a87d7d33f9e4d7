"""Real servers: nginx in front of the stand-in, tinyproxy as http proxy and by CONNECT.

Each is started here with a configuration, a directory and a port of its own, and stopped by its own handle.
"""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

import certs
from conftest import FLAGS, KEY, event, events, ndjson
from standin import SILENT, RefusedPort, StandIn

LOCATIONS = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin" + os.pathsep + "/usr/local/sbin"
NGINX = shutil.which("nginx", path=LOCATIONS)
TINYPROXY = shutil.which("tinyproxy", path=LOCATIONS)
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
needs_tinyproxy = pytest.mark.skipif(TINYPROXY is None, reason="tinyproxy is not installed")

FAST = ("--json", "--retries", "1", "--backoff-initial", "1ms", "--backoff-max", "2ms")


@contextlib.contextmanager
def process(argv, log, **popen):
    """A server as a child; TERM at the end, and KILL if it does not end."""
    with open(str(log), "wb") as output:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, **popen)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


# ---- nginx -------------------------------------------------------------------------------------------------

CONFIG = """\
daemon off;
%(user)s
worker_processes 1;
pid %(directory)s/pid;
error_log %(directory)s/error.log info;
events { worker_connections 64; }
http {
    log_format plain "$connection $status $request_length";
    access_log %(directory)s/access.log plain;
    client_body_temp_path %(directory)s/client;
    proxy_temp_path %(directory)s/proxy;
    fastcgi_temp_path %(directory)s/fastcgi;
    uwsgi_temp_path %(directory)s/uwsgi;
    scgi_temp_path %(directory)s/scgi;
    client_max_body_size %(largest)s;
    %(http)s
    server {
        listen 127.0.0.1:%(port)d %(listen)s;
        %(server)s
        location / {
            proxy_pass http://127.0.0.1:%(upstream)d;
            %(location)s
        }
    }
}
"""


class Nginx:
    def __init__(self, child, port, scheme, directory):
        self.child, self.port, self.directory = child, port, directory
        self.url = "%s://127.0.0.1:%d" % (scheme, port)

    def log(self):
        """The access log: (connection, status) of each request, in order. Written after the answer is."""
        lines = (self.directory / "access.log").read_text().splitlines()
        return [tuple(line.split()[:2]) for line in lines]

    def wait_for_log(self, number):
        end = time.monotonic() + 10
        while len(self.log()) < number:
            assert time.monotonic() < end, self.log()
            time.sleep(0.01)
        return self.log()


@pytest.fixture
def nginx(tmp_path):
    with contextlib.ExitStack() as stack:
        def begin(upstream, http="", server="", location="", tls=None, largest="0"):
            directory = tmp_path / "nginx"
            directory.mkdir()
            # nginx takes over a listening socket: nobody can get the port in between, and nobody waits.
            listener = stack.enter_context(contextlib.closing(socket.socket()))
            listener.bind(("127.0.0.1", 0))
            listener.listen(64)
            port = listener.getsockname()[1]
            if tls:
                server += "ssl_certificate %s; ssl_certificate_key %s;" % tls
            (directory / "nginx.conf").write_text(CONFIG % {
                "directory": directory, "http": http, "largest": largest, "server": server,
                "location": location, "port": port,
                "upstream": upstream, "listen": "ssl" if tls else "",
                "user": "user root;" if os.geteuid() == 0 else "",
            })
            child = stack.enter_context(process(
                [NGINX, "-e", str(directory / "error.log"), "-p", str(directory), "-c",
                 str(directory / "nginx.conf")],
                directory / "output", pass_fds=[listener.fileno()],
                env={**os.environ, "NGINX": "%d;" % listener.fileno()}))
            listener.close()
            return Nginx(child, port, "https" if tls else "http", directory)

        yield begin


@pytest.fixture
def batches(tmp_path):
    """The flags that send so many events, one a batch."""
    def build(number, size=1, **fields):
        path = tmp_path / "events.ndjson"
        path.write_bytes(ndjson(events(number, **fields)))
        return ["--file", str(path), "--ndjson", "--batch-size", str(size)]

    return build


def delivered(result, number):
    assert result.code == 0, result
    assert result.err == ""
    assert (result.summary["delivered"], result.summary["undelivered"]) == (number, 0)


@needs_nginx
@pytest.mark.parametrize("argv", [(), ("--gzip",), ("--async",)], ids=["plain", "gzip", "async"])
def test_nginx_tls_with_the_test_authority(argv, nginx, run, batches):
    authority = certs.authority()
    with StandIn() as server:
        front = nginx(server.port, tls=authority.good)
        result = run(*FAST, *argv, *batches(300, 50), server=front, env={"SSL_CERT_FILE": authority.root})
        delivered(result, 300)
        assert result.summary["requests"] == 6
        assert result.summary["retries"] == 0
        assert server.records == events(300)
        assert len({connection for connection, _ in front.wait_for_log(6)}) == 1, "one connection for all"


@needs_nginx
def test_nginx_tls_of_an_authority_that_is_not_trusted(nginx, run):
    with StandIn() as server:
        front = nginx(server.port, tls=certs.authority().good)
        result = run(*FAST, *FLAGS, server=front)
        assert result.code == 2, result
        assert "certificate" in result.err
        assert not server.requests


@needs_nginx
def test_nginx_http_to_its_tls_port_is_refused(nginx, run):
    with StandIn() as server:
        front = nginx(server.port, tls=certs.authority().good)
        result = run(*FAST, *FLAGS, "--base-url", front.url.replace("https", "http"))
        assert result.code == 2, result
        assert "400" in result.err
        assert result.summary["requests"] == 1


@needs_nginx
@pytest.mark.parametrize("argv", [(), ("--async",)], ids=["sync", "async"])
def test_nginx_413_on_a_batch_is_split_until_it_fits(argv, nginx, run, batches):
    with StandIn() as server:
        front = nginx(server.port, largest="2k")
        result = run(*FAST, *argv, *batches(100, 100), server=front)
        delivered(result, 100)
        assert result.summary["retries"] == 0
        assert server.records == events(100)
        assert "413" in {status for _, status in front.log()}


@needs_nginx
@pytest.mark.parametrize("size", [3000, 20000000], ids=["3 KB", "20 MB"])
def test_nginx_413_on_one_event_is_final(size, nginx, run, tmp_path):
    path = tmp_path / "event.json"
    path.write_bytes(ndjson([event(message="x" * min(size, 15000000), metadata={"m": "x" * 900000})]))
    with StandIn() as server:
        front = nginx(server.port, largest="2k")
        result = run(*FAST, "--file", path, server=front)
        assert result.code == 2, result
        assert "413" in result.err
        assert result.summary["requests"] == 1
        assert not server.requests


@needs_nginx
def test_nginx_keepalive_requests_2_closes_on_the_way_without_a_retry(nginx, run, batches):
    with StandIn() as server:
        front = nginx(server.port, http="keepalive_requests 2;")
        result = run(*FAST, *batches(9), server=front)
        delivered(result, 9)
        assert (result.summary["requests"], result.summary["retries"]) == (9, 0)
        assert server.records == events(9)
        assert len({connection for connection, _ in front.wait_for_log(9)}) == 5


@needs_nginx
def test_nginx_that_closes_idle_connections_at_once_gets_each_event_once(nginx, run, batches):
    with StandIn() as server:
        front = nginx(server.port, http="keepalive_timeout 1ms;")
        result = run(*FAST, *batches(100), server=front)
        delivered(result, 100)
        assert result.summary["retries"] == 0
        assert server.records == events(100)


@needs_nginx
@pytest.mark.parametrize("status", [503, pytest.param(429, marks=pytest.mark.full)])
def test_nginx_limit_req_is_waited_out(status, nginx, run, batches):
    with StandIn() as server:
        front = nginx(server.port,
                      http="limit_req_zone $remote_addr zone=z:1m rate=10r/s; limit_req_status %d;" % status,
                      location="limit_req zone=z;")
        result = run("--json", "--retries", "50", "--backoff-initial", "20ms", "--backoff-max", "50ms",
                     *batches(5),
                     server=front)
        delivered(result, 5)
        assert result.summary["retries"] > 0
        assert str(status) in {seen for _, seen in front.log()}
        assert server.records == events(5)


@needs_nginx
@pytest.mark.parametrize("status", [503, pytest.param(429, marks=pytest.mark.full)])
def test_nginx_limit_req_that_outlasts_the_tries(status, nginx, run, batches):
    with StandIn() as server:
        front = nginx(server.port,
                      http="limit_req_zone $remote_addr zone=z:1m rate=1r/m; limit_req_status %d;" % status,
                      location="limit_req zone=z;")
        result = run(*FAST, *batches(3), server=front)
        assert result.code == 3, result
        assert str(status) in result.err
        assert (result.summary["delivered"], result.summary["undelivered"]) == (1, 2)
        assert server.records == events(1)


@needs_nginx
def test_nginx_upstream_down_is_502_and_retried(nginx, run):
    with RefusedPort() as refused:
        front = nginx(refused.port)
        result = run(*FAST, *FLAGS, server=front)
        assert result.code == 3, result
        assert "502" in result.err
        assert result.summary["requests"] == 2
        assert [status for _, status in front.wait_for_log(2)] == ["502", "502"]


@needs_nginx
def test_nginx_slow_upstream_is_504_and_retried(nginx, run):
    with StandIn(script=[SILENT]) as server:
        front = nginx(server.port, location="proxy_read_timeout 200ms;")
        result = run(*FAST, *FLAGS, server=front)
        delivered(result, 1)
        assert result.summary["retries"] == 1
        assert [status for _, status in front.wait_for_log(2)] == ["504", "200"]


@needs_nginx
def test_nginx_redirect_to_https_is_final(nginx, run):
    with StandIn() as server:
        front = nginx(server.port, server="return 301 https://$host$request_uri;")
        result = run(*FAST, *FLAGS, server=front)
        assert result.code == 2, result
        assert "https://127.0.0.1/api/ingest" in result.err
        assert not server.requests


@needs_nginx
def test_nginx_health(nginx, run):
    with StandIn() as server:
        front = nginx(server.port)
        assert run("--health", server=front).code == 0
        assert server.requests[0].headers["x-packtrack-key"] == KEY


@needs_nginx
def test_nginx_reloaded_on_the_way_gets_each_event_once(nginx, start, batches):
    with StandIn() as server:
        front = nginx(server.port)
        process = start(*FAST, "--retries", "3", *batches(400), server=front)
        for number in (50, 150, 250):
            server.wait_for_requests(number)
            front.child.send_signal(signal.SIGHUP)
        result = process.result()
        delivered(result, 400)
        assert server.records == events(400)


# ---- tinyproxy ---------------------------------------------------------------------------------------------

PROXY = """\
%(user)s
Port %(port)d
Listen 127.0.0.1
Timeout 60
LogLevel Info
LogFile "%(directory)s/log"
MaxClients 20
Allow 127.0.0.1
%(more)s
"""


def listens(port):
    with contextlib.closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def tinyproxy(tmp_path):
    with contextlib.ExitStack() as stack:
        def begin(more=""):
            directory = tmp_path / "tinyproxy"
            directory.mkdir()
            for _ in range(10):  # it cannot take over a socket, so somebody else may get the port first
                with contextlib.closing(socket.socket()) as finder:
                    finder.bind(("127.0.0.1", 0))
                    port = finder.getsockname()[1]
                (directory / "conf").write_text(PROXY % {
                    "directory": directory, "port": port, "more": more,
                    "user": "User root\nGroup root" if os.geteuid() == 0 else ""})
                child = stack.enter_context(process([TINYPROXY, "-d", "-c", str(directory / "conf")],
                                                    directory / "output"))
                end = time.monotonic() + 10
                while child.poll() is None and not listens(port):
                    assert time.monotonic() < end, (directory / "output").read_text()
                    time.sleep(0.02)
                if child.poll() is None:
                    return port
            raise AssertionError((directory / "output").read_text())

        yield begin


@needs_tinyproxy
def test_tinyproxy_as_http_proxy(tinyproxy, run, batches):
    with StandIn() as server:
        proxy = "http://127.0.0.1:%d" % tinyproxy()
        result = run(*FAST, *batches(5), server=server, env={"http_proxy": proxy})
        delivered(result, 5)
        assert result.summary["retries"] == 0
        assert server.records == events(5)
        assert all("tinyproxy" in request.headers.get("via", "") for request in server.requests)


@needs_tinyproxy
def test_tinyproxy_by_connect(tinyproxy, run, batches):
    authority = certs.authority()
    with StandIn(tls=authority.good) as server:
        proxy = "http://127.0.0.1:%d" % tinyproxy("ConnectPort %d" % server.port)
        result = run(*FAST, *batches(5), server=server, env={"https_proxy": proxy,
                                                             "SSL_CERT_FILE": authority.root})
        delivered(result, 5)
        assert result.summary["retries"] == 0
        assert server.records == events(5)
        assert server.connections == 1, "one tunnel serves all batches"


@needs_tinyproxy
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_tinyproxy_with_a_password(scheme, tinyproxy, run):
    authority = certs.authority()
    with StandIn(tls=authority.good if scheme == "https" else None) as server:
        port = tinyproxy("BasicAuth user right-passw0rd\nConnectPort %d" % server.port)
        for password, code in (("right-passw0rd", 0), ("wrong-passw0rd", 2), (None, 2)):
            user = "user:%s@" % password if password else ""
            result = run(*FAST, *FLAGS, server=server, secrets=["right-passw0rd", "wrong-passw0rd"], env={
                scheme + "_proxy": "http://%s127.0.0.1:%d" % (user, port), "SSL_CERT_FILE": authority.root})
            assert result.code == code, result
            if code:
                assert "40" in result.err
                assert result.summary["retries"] == 0
        assert len(server.records) == 1


@needs_tinyproxy
def test_tinyproxy_refuses_connect_to_a_port_that_is_not_allowed(tinyproxy, run):
    with StandIn(tls=certs.authority().good) as server:
        proxy = "http://127.0.0.1:%d" % tinyproxy("ConnectPort 1")
        result = run(*FAST, *FLAGS, server=server, env={"https_proxy": proxy})
        assert result.code == 2, result
        assert "403" in result.err
        assert server.connections == 0


@needs_tinyproxy
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_tinyproxy_that_does_not_reach_the_service_is_retried(scheme, tinyproxy, run):
    with RefusedPort() as refused:
        proxy = "http://127.0.0.1:%d" % tinyproxy("ConnectPort %d" % refused.port)
        result = run(*FAST, *FLAGS, "--base-url", "%s://127.0.0.1:%d" % (scheme, refused.port),
                     env={scheme + "_proxy": proxy})
        assert result.code == 3, result
        assert "50" in result.err
        assert result.summary["retries"] == 1
