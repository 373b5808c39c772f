"""One way to fetch a file: bounded, hashed, resumed, and never seen half."""

from __future__ import annotations

import datetime
import hashlib
import ssl
import threading
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tiny_server import serve

from shards.errors import UserError
from shards.remote import client as storage
from shards.remote.client import Remote

DATA = np.random.default_rng(0).bytes(3_000_000)
SIZE = len(DATA)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(storage, "BACKOFF", (0.001,) * 3)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(DATA)
    return tmp_path / "served"


def download(server, path, size=SIZE, sha256=DIGEST, **more) -> bool:
    return Remote(server.url).download("file", path, path.with_suffix(".part"), size, sha256, **more)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_is_cut_at_its_declared_size_however_much_the_server_sends(folder, tmp_path, ranges):
    with serve(folder, ranges) as server:
        server.faults["file"] = ["cut"]
        with (tmp_path / "copy").open("wb") as file:
            Remote(server.url).fetch("file", file, 2_000_000, hashlib.sha256(DATA[:2_000_000]).hexdigest())
    assert (tmp_path / "copy").read_bytes() == DATA[:2_000_000]


@pytest.mark.parametrize(
    ("size", "sha256", "reason"),
    [
        (SIZE + 1, DIGEST, "has 3000000 bytes, not 3000001 as the cache says"),
        (SIZE, "0" * 64, "does not match the recorded one"),
    ],
)
def test_a_file_of_another_size_or_hash_never_appears(folder, tmp_path, size, sha256, reason):
    # Without ranges: with them a range beyond the end has no answer of its own.
    with serve(folder, ranges=False) as server, pytest.raises(UserError, match=reason):
        download(server, tmp_path / "copy", size, sha256)
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_a_link_in_the_place_of_a_part_is_not_written_through(folder, tmp_path):
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "copy.part").symlink_to(tmp_path / "target")
    with serve(folder) as server, pytest.raises(FileExistsError):
        download(server, tmp_path / "copy")
    assert (tmp_path / "target").read_bytes() == b"mine"


def test_without_room_nothing_is_asked_of_the_server(folder, tmp_path):
    with serve(folder) as server:
        assert not download(server, tmp_path / "copy", space=nullcontext(False))
        assert server.asked == []
    assert not (tmp_path / "copy").exists()


def test_while_a_file_is_fetched_its_whole_size_is_taken(folder, tmp_path):
    sizes = []

    @contextmanager
    def space():
        yield True
        sizes.append((tmp_path / "copy.part").stat().st_size)

    with serve(folder) as server:
        assert download(server, tmp_path / "copy", space=space())
    assert sizes == [SIZE]


def test_a_full_disk_is_not_taken_for_a_bad_connection(folder):
    with serve(folder) as server, open("/dev/full", "wb", buffering=0) as full:
        with pytest.raises(OSError, match="No space left"):
            Remote(server.url).fetch("file", full, SIZE)
        assert server.count("file") == 1


def test_a_file_that_is_not_there_has_no_size_and_no_content(folder):
    with serve(folder) as server:
        remote = Remote(server.url + "/")
        assert (remote.size("file"), remote.size("other")) == (SIZE, None)
        assert (remote.read_if_exists("file", 9), remote.read_if_exists("other", 9)) == (DATA[:9], None)
        with pytest.raises(UserError, match=r"'http://127.0.0.1:\d+/other' does not exist"):
            remote.read("other", 9, bytes)


def test_a_password_in_a_url_is_refused_and_not_shown():
    with pytest.raises(
        UserError, match=r"the URL of 'http://127.0.0.1:9/cache' contains a user name or password"
    ) as told:
        Remote("http://ann:secret@127.0.0.1:9/cache").read_if_exists("CACHE.json", 9)
    assert "secret" not in str(told.value)


def redirecting(target: str) -> type[BaseHTTPRequestHandler]:
    """A handler that redirects every request to ``target``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", target + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    return Handler


@contextmanager
def https_redirect(target: str, folder):
    """The URL of an encrypted server that redirects to ``target``, and the file of its certificate."""

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"certificate of {folder.name}")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "certificate.pem"
    encoding = serialization.Encoding.PEM
    pem.write_bytes(
        key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(encoding)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with HTTPServer(("127.0.0.1", 0), redirecting(target)) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.server_port}", pem
        finally:
            server.shutdown()
            thread.join()


def test_a_redirect_is_followed_but_not_from_https_to_http(folder, tmp_path, monkeypatch):
    with serve(folder) as server, https_redirect(server.url, tmp_path) as (plain, pem):
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        with pytest.raises(UserError, match=r"'https://.*/file' redirects from https to http"):
            Remote(plain).read_if_exists("file", 9)
        assert server.asked == []
        with https_redirect(plain, tmp_path / "served") as (encrypted, other):
            pem.write_bytes(pem.read_bytes() + other.read_bytes())
            with pytest.raises(UserError, match=rf"'{plain}/file' redirects from https to http"):
                Remote(encrypted).read_if_exists("file", 9)


@pytest.mark.parametrize("target", ["https://127.0.0.1:1", "ftp://127.0.0.1:1", "file://", "data:,x", "gopher://x"])
def test_a_redirect_never_changes_the_scheme(tmp_path, target):
    with HTTPServer(("127.0.0.1", 0), redirecting(target)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            with pytest.raises(UserError, match=f"redirects from http to {target.partition(':')[0]}: use another URL"):
                Remote(f"http://127.0.0.1:{server.server_port}").read_if_exists("file", 9)
        finally:
            server.shutdown()


@pytest.mark.parametrize("url", ["s3://key:pa55@bucket/c", "https://host/c?sig=pa55", "https://host/c?a=1&token=pa55"])
def test_a_url_with_a_token_is_refused_before_any_request_and_not_shown(url):
    with pytest.raises(UserError, match=r"contains a (token|user name or password), which logs would show") as told:
        Remote(url)
    assert "pa55" not in str(told.value)
    assert "pa55" not in repr(told.value)
