"""Connections to object stores: S3, Google Cloud Storage, Azure Blob Storage.

:func:`connect` takes the URL of a folder, such as ``s3://bucket/caches``, and returns an obstore store with paths
relative to that folder. :func:`translate_errors` maps obstore's exceptions to the few kinds that callers handle.
Requests are sent once. Callers retry, because only they know whether repeating a write is safe.

A store may be used from any thread, but not after a fork: obstore's threads do not survive a fork and requests hang.

Credentials and endpoints come from the environment variables that fsspec also reads:

- ``s3://``, ``s3a://``: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``; with
  boto3, the profiles in ``~/.aws``; otherwise the role of the instance or container. ``AWS_ENDPOINT_URL`` selects a
  server other than Amazon's, ``AWS_CA_BUNDLE`` the trusted certificates.
- ``gs://``, ``gcs://``: ``GOOGLE_APPLICATION_CREDENTIALS``, the login of ``gcloud``, or the role of the instance.
  ``STORAGE_EMULATOR_HOST`` selects another server.
- ``az://``, ``abfs://``: ``AZURE_STORAGE_ACCOUNT_NAME`` with ``AZURE_STORAGE_ACCOUNT_KEY``,
  ``AZURE_STORAGE_SAS_TOKEN`` or a role. ``AZURE_STORAGE_ENDPOINT`` selects another server for writing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, S3Store

from shards.errors import UserError, install_command

if TYPE_CHECKING:
    from obstore.store import ObjectStore

S3, GCS, AZURE = ("s3", "s3a"), ("gs", "gcs"), ("az", "abfs", "abfss")
SCHEMES = (*S3, *GCS, *AZURE)
READ_TIMEOUT = 30  # seconds without a byte of the response after which a request fails
MIN_UPLOAD_RATE = 128 << 10  # bytes per second: 256 MB in half an hour
METADATA_SERVICE = "//169.254."  # link-local address of the service that provides credentials to cloud instances


def connect(url: str) -> ObjectStore:
    """Return a store for the folder at ``url``. Sends no request.

    Raises:
        UserError: the URL is not a folder in an object store, or an environment variable is invalid.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    client: dict[str, Any] = {"user_agent": "earshard", "connect_timeout": "10s", "timeout": "30days"}
    client["read_timeout"] = f"{READ_TIMEOUT}s"
    options: dict[str, Any] = {"prefix": prefix.strip("/") or None, "retry_config": {"max_retries": 0}}
    options["client_options"] = client
    try:
        if scheme not in SCHEMES:
            raise ValueError(f"'{scheme}://' is not an object store")
        if not re.fullmatch(r"[\w.@-]+", bucket, re.ASCII):
            raise ValueError(f"'{bucket}' is not a bucket name")
        if scheme in S3:
            options.update(_endpoint(client, "endpoint", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
            options.update(_aws_profile())
            if bundle := os.environ.get("AWS_CA_BUNDLE"):
                client["root_certificate"] = Path(bundle).read_bytes()
            return S3Store(bucket, disable_bulk_delete=True, **options)  # some servers do not support the bulk request
        if scheme in GCS:
            if endpoint := _endpoint(client, "base_url", "STORAGE_EMULATOR_HOST"):
                options.update(
                    endpoint, bearer_token="none"
                )  # the emulator rejects credentials, which writes would send
            return GCSStore(bucket, **options)
        options.update(_endpoint(client, "endpoint", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"))
        container, _, host = bucket.partition("@")
        if host:
            options["account_name"] = host.partition(".")[0]
        return AzureStore(container, **options)
    except (BaseError, ValueError, OSError) as error:
        raise UserError(
            f"'{url}' cannot be opened ({_reason(error)}): write scheme://bucket/folder, and check the environment "
            f"variables for {scheme}://"
        ) from None


def for_upload(store: ObjectStore, size: int) -> ObjectStore:
    """Return the same store with a read timeout long enough to upload ``size`` bytes."""
    if not isinstance(store, S3Store | GCSStore | AzureStore):  # in memory
        return store
    wait = f"{READ_TIMEOUT + size // MIN_UPLOAD_RATE}s"  # obstore starts it with the request
    client: Any = {**(store.client_options or {}), "read_timeout": wait}
    options: dict[str, Any] = {"config": store.config, "credential_provider": store.credential_provider}
    return type(store)(prefix=store.prefix, client_options=client, retry_config=store.retry_config, **options)


@contextmanager
def translate_errors(url: str) -> Iterator[None]:
    """Raise the obstore exceptions of the block as one of four kinds.

    obstore's ``AlreadyExistsError`` and ``PreconditionError`` pass unchanged: they are results of a conditional write.

    Args:
        url: URL of the folder, for messages.

    Raises:
        FileNotFoundError: the object does not exist.
        PermissionError: there are no credentials, or they are insufficient.
        UserError: the bucket does not exist, or the server refuses the request permanently.
        ConnectionError: anything else; repeating the request may succeed.
    """
    try:
        yield
    except (FileNotFoundError, BaseError) as error:
        text, reason, scheme = str(error), _reason(error), url.partition("://")[0]
        found = re.search(r"status code: (\d{3})", text)
        status = int(found[1]) if found else 0
        if re.search("<Code>(NoSuchBucket|ContainerNotFound)</Code>", text):
            raise missing_bucket(url) from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(reason) from None
        if isinstance(error, AlreadyExistsError | PreconditionError):
            raise
        if METADATA_SERVICE in text and not (status == 429 or status >= 500):
            hint = f"; to use those in ~/.aws, run {install_command('s3')}" if scheme in S3 else ""
            raise PermissionError(f"no credentials were found{hint}") from None
        if "Received redirect" in text or "AuthorizationHeaderMalformed" in text:
            raise UserError(f"'{url}' is in another region ({reason}): set AWS_REGION to that region") from None
        denied = isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403)
        if denied or "<Code>ExpiredToken</Code>" in text:
            raise PermissionError(reason) from None
        if status in (400, 405, 501) and not re.search("<Code>(RequestTimeout|IncompleteBody|BadDigest)</Code>", text):
            raise UserError(f"'{url}' rejected a request ({reason}): correct the URL, or use another store") from None
        raise ConnectionError(reason) from None
    except ValueError as error:  # a path with an empty component
        raise UserError(f"'{url}' cannot be used ({_reason(error)}): correct the URL") from None


def missing_bucket(url: str) -> UserError:
    """Return the error to raise when the bucket (or Azure container) in ``url`` does not exist."""
    name = url.partition("://")[2].partition("/")[0]
    return UserError(f"bucket '{name}' does not exist: create it, or correct the URL '{url}'")


def _endpoint(client: dict[str, Any], option: str, *names: str) -> dict[str, str]:
    """Return ``{option: URL}`` of the server that the environment selects, or ``{}``. Allows HTTP for an http URL."""
    name = next((name for name in names if os.environ.get(name)), None)
    if name is None:
        return {}
    endpoint = os.environ[name].rstrip("/")
    if name == "STORAGE_EMULATOR_HOST" and "://" not in endpoint:
        endpoint = f"http://{endpoint}"
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"{name} is '{endpoint}', expected http://… or https://…")
    client["allow_http"] = parts.scheme == "http"
    return {option: endpoint}


def _aws_profile() -> dict[str, Any]:
    """Return credentials and region from ``~/.aws`` (keys, SSO, assumed roles) unless the environment sets them."""
    try:
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return {}
    try:
        if not os.environ.get("AWS_ACCESS_KEY_ID"):
            return {"credential_provider": Boto3CredentialProvider(ttl=timedelta(minutes=10))}
    except BotoCoreError as error:
        raise ValueError(str(error)) from None
    except ValueError:  # no profile: obstore tries the role of the machine
        pass
    return {}


def _reason(error: Exception) -> str:
    """Return an error's message on one line; for a server's error document, its code and message."""
    text, _, debug = str(error).partition("Debug source:")
    text = re.sub(r".*Error performing .* in [\d.]+\w+ - ", "", text, flags=re.DOTALL)
    parts = [found[1] for tag in ("Code", "Message") if (found := re.search(f"<{tag}>([^<]*)</{tag}>", text))]
    if found := re.search(r"(?:message|error): \"([^\"]*)\"|(TimedOut|IncompleteMessage)", debug):
        text = f"{text.strip()}: {found[1] or found[2]}"
    return " ".join(" ".join(parts or [text or type(error).__name__]).split())[:200]
