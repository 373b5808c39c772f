"""Connections to object stores, against a server on the loopback interface that answers as it is told."""

from __future__ import annotations

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, PreconditionError

from shards.commit.bucket.objects import Objects
from shards.commit.bucket.store import connect_objects
from shards.errors import UserError
from shards.remote import client as storage
from shards.remote import object_store
from shards.remote.object_store import connect, for_upload, translate_errors

URL = "s3://bucket/some folder"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """``answers`` are (status, code of the error document), the last one for ever; ``seen`` the requests' headers."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            server.seen.append(self.headers)
            length, got = int(self.headers.get("Content-Length", 0)), 0
            while got < length and (data := self.rfile.read1(1 << 18)):
                got += len(data)
                time.sleep(server.pause)
            status, code = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            body = f"<Error><Code>{code}</Code><Message>so it is\nhere</Message></Error>".encode()
            self.send_response(status)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_DELETE = do_PUT

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.seen, server.pause = [(200, "")], [], 0.0
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_CA_BUNDLE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "kind", "text"),
    [
        (301, "PermanentRedirect", UserError, "is in another region .*: set AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", UserError, r"is in another region \(\w+ so it is here\): set AWS_REGION"),
        (400, "InvalidArgument", UserError, r"rejected a request \(InvalidArgument so it is here\)"),
        (400, "RequestTimeout", ConnectionError, "RequestTimeout so it is here"),  # a body that came too slowly
        (400, "ExpiredToken", PermissionError, "ExpiredToken so it is here"),
        (401, "x", PermissionError, "x so it is here"),
        (403, "AccessDenied", PermissionError, "AccessDenied so it is here"),
        (
            404,
            "NoSuchBucket",
            UserError,
            "bucket 'bucket' does not exist: create it, or correct the URL 's3://bucket/so",
        ),
        (404, "NoSuchKey", FileNotFoundError, "."),
        (409, "ConditionalRequestConflict", AlreadyExistsError, "."),
        (412, "PreconditionFailed", AlreadyExistsError, "."),
        (429, "SlowDown", ConnectionError, "SlowDown so it is here"),
        (501, "NotImplemented", UserError, "rejected a request"),
        (503, "SlowDown", ConnectionError, "SlowDown so it is here"),
    ],
)
def test_an_answer_is_reported_as_one_of_four_kinds(server, status, code, kind, text):
    server.answers = [(status, code)]
    with pytest.raises(kind, match=text), translate_errors(URL):
        obstore.put(connect(URL), "name", b"x", mode="create")
    assert len(server.seen) == 1  # the caller repeats


def test_a_failed_condition_passes_unchanged(server):
    server.answers = [(412, "PreconditionFailed")]
    with pytest.raises(PreconditionError), translate_errors(URL):
        obstore.put(connect(URL), "name", b"x", mode={"e_tag": "1"})


def test_a_server_that_accepts_every_write_is_refused(server):
    with pytest.raises(UserError, match="does not support conditional writes"):
        connect_objects(URL)
    assert [headers.get("If-None-Match") for headers in server.seen] == ["*", "*", None]  # the trial object went


@pytest.mark.parametrize("over", [None, {"e_tag": "0"}])
def test_a_write_that_met_another_one_under_way_is_tried_again(server, monkeypatch, over):
    monkeypatch.setattr(storage, "BACKOFF", (0.01,) * 3)
    server.answers = [(409, "ConditionalRequestConflict"), (200 if over else 404, ""), (200, "")]
    assert Objects(URL).put("name", b"x", over) == {"e_tag": '"1"'}
    assert [headers.get("If-Match") for headers in server.seen] == [over and "0", None, over and "0"]


def test_a_server_that_is_away_may_come_back(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(ConnectionError, match="Connection refused"), translate_errors(URL):
        obstore.get(connect(URL), "name")


def test_an_upload_may_take_longer_than_a_small_request(server, monkeypatch):
    monkeypatch.setattr(object_store, "READ_TIMEOUT", 1)
    monkeypatch.setattr(object_store, "MIN_UPLOAD_RATE", 1 << 18)
    server.pause, body = 0.1, bytes(4 << 20)
    with pytest.raises(ConnectionError), translate_errors(URL):
        obstore.put(connect(URL), "name", body, mode="create")
    obstore.put(for_upload(connect(URL), len(body)), "name", body, mode="create")
    ours, same = server.seen[0], server.seen[1]
    assert ours["Authorization"].split(",")[0] == same["Authorization"].split(",")[0]


@pytest.mark.parametrize(
    ("variable", "value", "url", "text"),
    [
        ("AWS_ENDPOINT_URL", "minio:9000", URL, "AWS_ENDPOINT_URL is 'minio:9000', expected http://"),
        ("AWS_ENDPOINT_URL", "http://", URL, "AWS_ENDPOINT_URL is 'http:', expected http://"),
        ("AWS_ACCESS_KEY_ID", "key", "s3://", "'s3://' cannot be opened .*: write scheme://bucket/folder"),
        ("AWS_ACCESS_KEY_ID", "key", "s3://a b/c", "'a b' is not a bucket name"),
        ("AWS_CA_BUNDLE", "/nowhere", URL, "No such file"),
        ("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1", "az://container/x", "Account must be specified"),
        ("AWS_ACCESS_KEY_ID", "key", "hf://bucket/x", "'hf://' is not an object store"),
    ],
)
def test_what_cannot_be_opened_is_reported_before_any_request(monkeypatch, variable, value, url, text):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=text):
        connect(url)


def test_an_emulator_of_google_may_be_named_without_a_scheme(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "localhost:9023")
    assert connect("gcs://bucket/x").config["base_url"] == "http://localhost:9023"


def test_an_account_of_azure_may_stand_in_the_url(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "other")
    store = connect("abfss://container@mine.dfs.core.windows.net/a/b")
    assert (store.config["account_name"], store.config["container_name"], store.prefix) == ("mine", "container", "a/b")


@pytest.mark.slow
def test_keys_and_region_of_an_aws_profile_are_used(server, monkeypatch, tmp_path):
    pytest.importorskip("boto3")
    (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text(
        "[default]\naws_access_key_id = default\naws_secret_access_key = x\n"
        "[mine]\naws_access_key_id = profile\naws_secret_access_key = y\n"
    )
    (tmp_path / "AWS_CONFIG_FILE").write_text("[profile mine]\nregion = eu-west-3\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for profile, scope in ((None, "default/20[0-9]+/us-east-1"), ("mine", "profile/20[0-9]+/eu-west-3")):
        if profile:
            monkeypatch.setenv("AWS_PROFILE", profile)
        store = connect(URL)
        obstore.put(store, "name", b"x", mode="create")
        obstore.put(for_upload(store, 1), "name", b"x", mode="create")
        for headers in server.seen[-2:]:
            assert re.search(f"Credential={scope}/s3/", headers["Authorization"])
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match=r"The config profile \(nobody\) could not be found"):
        connect(URL)
