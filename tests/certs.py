"""A test authority and its certificates, made at test time with the openssl command.

Strict verification (Python 3.13) refuses a chain without key identifiers, so everything here carries them.
"""
import atexit
import collections
import functools
import pathlib
import shutil
import subprocess
import tempfile

import pytest

CONFIG = """\
[ca]
database = index.txt
new_certs_dir = .
rand_serial = yes
default_md = sha256
policy = anything
unique_subject = no
[anything]
commonName = supplied
[req]
distinguished_name = anything
[root]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
%s
"""
NAMES = "subjectAltName = DNS:localhost, IP:127.0.0.1, IP:::1"
SIGNED = "authorityKeyIdentifier = keyid\n"
# root is for SSL_CERT_FILE; the others are (certificate file, key file): for localhost, 127.0.0.1 and ::1,
# for the same but of 2020, for elsewhere.example, for the good names but vouched for by nobody.
Authority = collections.namedtuple("Authority", "root good expired other_host self_signed")


@functools.lru_cache(maxsize=None)
def authority():
    """Make everything once per test run; skip the calling test where openssl is missing."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    directory = pathlib.Path(tempfile.mkdtemp(prefix="packtrack-certs-"))
    atexit.register(shutil.rmtree, str(directory), ignore_errors=True)
    (directory / "index.txt").write_text("", encoding="ascii")

    def openssl(line, *more):
        done = subprocess.run(["openssl", *line.split(), *more], cwd=str(directory), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        assert done.returncode == 0, "openssl %s: %s" % (line, done.stdout.decode("utf-8", "replace"))

    def certify(name, subject, names, kind="leaf", signer="-cert root.pem -keyfile root.key", end="20491231"):
        (directory / "openssl.cnf").write_text(CONFIG % names, encoding="ascii")
        openssl("ecparam -name prime256v1 -genkey -noout -out %s.key" % name)
        openssl("req -new -config openssl.cnf -key {0}.key -out {0}.csr -subj".format(name), "/CN=" + subject)
        openssl("ca -name ca -batch -notext -config openssl.cnf -extensions %s -startdate 20200101000000Z "
                "-enddate %s235959Z -in %s.csr -out %s.pem %s" % (kind, end, name, name, signer))
        return str(directory / (name + ".pem")), str(directory / (name + ".key"))

    return Authority(
        root=certify("root", "packtrack test authority", "", "root", "-selfsign -keyfile root.key")[0],
        good=certify("good", "localhost", SIGNED + NAMES),
        expired=certify("expired", "localhost", SIGNED + NAMES, end="20200201"),
        other_host=certify("other", "elsewhere.example", SIGNED + "subjectAltName = DNS:elsewhere.example"),
        self_signed=certify("alone", "localhost", NAMES, signer="-selfsign -keyfile alone.key"))
