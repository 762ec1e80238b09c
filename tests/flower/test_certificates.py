"""The certificates and keys that docs/deployment.md makes are what TLS and Flower take."""

import re
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

TEXT = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text()

missing = [name for name in ("openssl", "ssh-keygen") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    (block,) = (block for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL) if "openssl" in block)
    subprocess.run(["bash", "-ec", block], cwd=folder, check=True, capture_output=True, timeout=120)
    return folder


@pytest.mark.parametrize(("owner", "name"), [("server", "server.example"), ("client", "127.0.0.1")])
def test_a_strict_client_trusts_the_certificates(made, owner, name):
    here, there = socket.socketpair()
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(made / f"{owner}.pem", made / f"{owner}.key")
    trusting = ssl.create_default_context(cafile=made / "ca.pem")
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT

    def serve():
        with serving.wrap_socket(there, server_side=True) as end:
            end.sendall(b"hello")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with trusting.wrap_socket(here, server_hostname=name) as end:
            assert end.recv(5) == b"hello"
    finally:
        thread.join(30)


def test_the_keys_are_of_the_kind_that_flower_registers(made):
    private = load_ssh_private_key((made / "client3").read_bytes(), None)
    public = load_ssh_public_key((made / "client3.pub").read_bytes())
    assert isinstance(private.curve, ec.SECP384R1) and public == private.public_key()
