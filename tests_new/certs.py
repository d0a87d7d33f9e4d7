"""A test authority and its certificates, made at test time with the openssl command.

Strict verification (Python 3.13) refuses a chain without key identifiers, so everything here carries them.
"""

import atexit
import functools
import pathlib
import shutil
import subprocess
import tempfile
from typing import NamedTuple, Tuple

import pytest

CONFIG = """\
[ca]
default_ca = authority
[authority]
dir = {directory}
database = $dir/index.txt
new_certs_dir = $dir
rand_serial = yes
default_md = sha256
policy = anything
copy_extensions = copy
unique_subject = no
email_in_dn = no
[anything]
commonName = supplied
[req]
distinguished_name = name
prompt = no
[name]
commonName = packtrack test
[root]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[here]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:localhost, IP:127.0.0.1, IP:::1
[elsewhere]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:elsewhere.example
[alone]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
subjectAltName = DNS:localhost, IP:127.0.0.1, IP:::1
"""
LONG = ("20200101000000Z", "20491231235959Z")
PAST = ("20200101000000Z", "20200201000000Z")

Pair = Tuple[str, str]  # certificate file, key file


class Authority(NamedTuple):
    root: str  # for SSL_CERT_FILE
    good: Pair  # localhost, 127.0.0.1 and ::1
    expired: Pair
    other_host: Pair  # elsewhere.example
    self_signed: Pair  # good names, vouched for by nobody


@functools.lru_cache(maxsize=None)
def authority() -> Authority:
    """Make everything once per test run; skip the calling test where openssl is missing."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")
    directory = pathlib.Path(tempfile.mkdtemp(prefix="packtrack-certs-"))
    atexit.register(shutil.rmtree, str(directory), ignore_errors=True)
    config = directory / "openssl.cnf"
    config.write_text(CONFIG.format(directory=directory.as_posix()), encoding="ascii")
    (directory / "index.txt").write_text("", encoding="ascii")

    def openssl(*arguments: str) -> None:
        done = subprocess.run(
            [str(program), *arguments], cwd=str(directory), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
        )
        assert done.returncode == 0, "openssl %s: %s" % (" ".join(arguments),
                                                         done.stdout.decode("utf-8", "replace"))

    def path(name: str) -> str:
        return str(directory / name)

    def request(name: str, subject: str) -> None:
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path(name + ".key"))
        openssl("req", "-new", "-config", str(config), "-key", path(name + ".key"), "-subj", "/CN=" + subject,
                "-out", path(name + ".csr"))

    def certify(name: str, subject: str, extensions: str, life: Pair, signer: Tuple[str, ...]) -> Pair:
        request(name, subject)
        openssl("ca", "-batch", "-notext", "-config", str(config), "-extensions", extensions, "-startdate",
                life[0],
                "-enddate", life[1], "-in", path(name + ".csr"), "-out", path(name + ".pem"), *signer)
        return path(name + ".pem"), path(name + ".key")

    root, root_key = certify("root", "packtrack test authority", "root", LONG,
                             ("-selfsign", "-keyfile", path("root.key")))
    signed = ("-cert", root, "-keyfile", root_key)
    return Authority(
        root=root,
        good=certify("good", "localhost", "here", LONG, signed),
        expired=certify("expired", "localhost", "here", PAST, signed),
        other_host=certify("other", "elsewhere.example", "elsewhere", LONG, signed),
        self_signed=certify("alone", "localhost", "alone", LONG,
                            ("-selfsign", "-keyfile", path("alone.key"))),
    )
