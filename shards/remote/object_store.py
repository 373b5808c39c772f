"""Connections to object stores: S3, Google Cloud Storage, Azure Blob Storage.

In: the URL of a folder, such as ``s3://bucket/caches``. Out: an obstore store whose paths are relative to that folder,
and :func:`translate_errors`, which turns obstore's exceptions into the few kinds that a caller acts on. A request is
sent once: the callers retry, because only they know whether a repeated write is the same write.

Credentials and endpoints come from the environment:

- ``s3://``, ``s3a://``: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, the
  role of an instance or a container; the profiles of ``~/.aws`` if boto3 is installed. ``AWS_ENDPOINT_URL`` names
  another server than Amazon's, ``AWS_CA_BUNDLE`` the certificates to trust, ``AWS_SKIP_SIGNATURE=true`` reads a public
  bucket.
- ``gs://``, ``gcs://``: ``GOOGLE_APPLICATION_CREDENTIALS``, the login of ``gcloud``, the role of an instance.
  ``GOOGLE_BASE_URL`` or ``STORAGE_EMULATOR_HOST`` names another server, ``GOOGLE_SKIP_SIGNATURE=true`` reads a public
  bucket.
- ``az://``, ``abfs://``: ``AZURE_STORAGE_ACCOUNT_NAME`` with ``AZURE_STORAGE_ACCOUNT_KEY``,
  ``AZURE_STORAGE_SAS_TOKEN`` or a role. ``AZURE_STORAGE_ENDPOINT`` names another server.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from shards.errors import UserError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

S3, GCS, AZURE = ("s3", "s3a"), ("gs", "gcs"), ("az", "azure", "abfs", "abfss", "adl")
SCHEMES = (*S3, *GCS, *AZURE)
SILENCE = 30  # seconds without a byte of the answer, after which a request fails
SLOWEST_UPLOAD = 128 << 10  # bytes a second: 256 MB in half an hour
ENDPOINTS = (
    ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    ("GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST"),
    ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
)
METADATA_SERVICE = "//169.254."  # the link-local address at which a cloud gives credentials to its machines


def is_object_store(url: str) -> bool:
    """Whether :func:`connect` knows the scheme of ``url``."""
    return url.partition("://")[0] in SCHEMES


def connect(url: str, upload: int = 0) -> ObjectStore:
    """The folder at ``url``. Nothing is asked of the server yet.

    The store may be used from any thread, but not after a fork.

    Args:
        upload: bytes of the largest object to write, which decide how long the server may be silent while it receives.

    Raises:
        UserError: the URL names no folder of an object store, or the environment contradicts itself.
    """
    from obstore.exceptions import BaseError
    from obstore.store import AzureStore, GCSStore, S3Store

    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    client: dict[str, Any] = {"user_agent": "earshard", "connect_timeout": "10s", "timeout": "30days"}
    client["read_timeout"] = f"{SILENCE + upload // SLOWEST_UPLOAD}s"  # it counts while a request is sent, too
    options: dict[str, Any] = {"prefix": prefix.strip("/") or None, "retry_config": {"max_retries": 0}}
    options["client_options"] = client
    try:
        if not re.fullmatch(r"[\w.@-]+", bucket, re.ASCII):
            raise ValueError(f"'{bucket}' is no name of a bucket")
        endpoint = _endpoint(scheme)
        client["allow_http"] = endpoint.startswith("http:")  # only where the user wrote it
        if scheme in S3:
            if bundle := os.environ.get("AWS_CA_BUNDLE"):
                client["root_certificate"] = Path(bundle).read_bytes()
            if endpoint:
                options["endpoint"] = endpoint
            # Not every server knows the request that deletes many.
            return S3Store(bucket, disable_bulk_delete=True, **_aws_profile(url), **options)
        if scheme in GCS:
            if endpoint:
                options["base_url"] = endpoint
            if endpoint and not os.environ.get("GOOGLE_BASE_URL"):
                options["bearer_token"] = "none"  # an emulator knows no credentials, and writes ask for some
            return GCSStore(bucket, **options)
        if scheme in AZURE:
            if endpoint:
                options["endpoint"] = endpoint
            container, _, host = bucket.partition("@")
            if host:
                options["account_name"] = host.partition(".")[0]
            return AzureStore(container, **options)
    except (BaseError, ValueError, OSError) as error:
        raise UserError(
            f"'{url}' cannot be opened ({_reason(error)}): write scheme://bucket/folder, and check the environment "
            f"variables for {scheme}://"
        ) from None
    raise UserError(f"'{url}' is in no known object store: use {', '.join(f'{known}://' for known in SCHEMES)}")


@contextmanager
def translate_errors(url: str) -> Iterator[None]:
    """Raise what obstore raises within the block as one of four kinds.

    ``AlreadyExistsError`` and ``PreconditionError`` of obstore pass unchanged: they answer a conditional write.

    Args:
        url: of the folder, for the messages.

    Raises:
        FileNotFoundError: there is no such object.
        PermissionError: there are no credentials, or they do not suffice.
        UserError: there is no such bucket, or the server refuses the request for good.
        ConnectionError: anything else; the same request may succeed when it is repeated.
    """
    from obstore.exceptions import (
        AlreadyExistsError,
        BaseError,
        PermissionDeniedError,
        PreconditionError,
        UnauthenticatedError,
    )

    try:
        yield
    except (FileNotFoundError, BaseError) as error:
        text, reason = str(error), _reason(error)
        found = re.search(r"status code: (\d{3})", text)
        status = int(found[1]) if found else 0
        if re.search("<Code>(NoSuchBucket|ContainerNotFound)</Code>", text):
            raise no_bucket(url) from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(reason) from None
        if isinstance(error, AlreadyExistsError | PreconditionError):
            raise
        if METADATA_SERVICE in text and not (status == 429 or status >= 500):
            raise PermissionError("there are no credentials in the environment") from None
        if "Received redirect" in text or "AuthorizationHeaderMalformed" in text:
            raise UserError(f"'{url}' is in another region ({reason}): set AWS_REGION") from None
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403):
            raise PermissionError(reason) from None
        if status in (400, 405, 501):
            raise UserError(f"'{url}' refused a request ({reason}): correct the URL, or use another store") from None
        raise ConnectionError(reason) from None
    except ValueError as error:  # a path with an empty part
        raise UserError(f"'{url}' cannot be used ({_reason(error)}): correct the URL") from None


def no_bucket(url: str) -> UserError:
    """What to raise when there is no bucket of the name that ``url`` gives."""
    scheme, _, rest = url.partition("://")
    kind = "container" if scheme in AZURE else "bucket"
    return UserError(f"there is no {kind} '{rest.partition('/')[0]}': make it, or correct the URL '{url}'")


def _first(*names: str) -> str:
    """The first of these environment variables that is set and not empty, else an empty string."""
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _endpoint(scheme: str) -> str:
    """The server that the environment names for ``scheme``, or an empty string."""
    names = ENDPOINTS[0 if scheme in S3 else 1 if scheme in GCS else 2]
    endpoint = _first(*names)
    if endpoint and endpoint == os.environ.get("STORAGE_EMULATOR_HOST") and "://" not in endpoint:
        endpoint = f"http://{endpoint}"
    parts = urlsplit(endpoint)
    if endpoint and not (parts.scheme in ("http", "https") and parts.hostname and parts.port != 0):
        raise ValueError(f"{' or '.join(names)} is '{endpoint}', expected http://… or https://…")
    return endpoint.rstrip("/")


def _aws_profile(url: str) -> dict[str, Any]:
    """Credentials of ``~/.aws`` (keys, SSO, assumed roles), by boto3, unless the environment has some."""
    names = ("ACCESS_KEY_ID", "WEB_IDENTITY_TOKEN_FILE", "CONTAINER_CREDENTIALS_RELATIVE_URI")
    given = _first(*(f"AWS_{name}" for name in (*names, "CONTAINER_CREDENTIALS_FULL_URI", "SKIP_SIGNATURE")))
    shared = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    if given or not (os.environ.get("AWS_PROFILE") or shared.is_file()):
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise UserError(
            f"the credentials for '{url}' are in the configuration files of AWS, which are read by boto3: run "
            "`pip install boto3`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    try:
        return {"credential_provider": Boto3CredentialProvider()}
    except Exception as error:  # botocore's own kinds: no such profile, a file that cannot be read
        raise UserError(
            f"the configuration files of AWS give no credentials for '{url}' ({_reason(error)}): check AWS_PROFILE"
        ) from None


def _reason(error: Exception) -> str:
    """What an error says, on one line; of a server's error document the code and message."""
    text = str(error).partition("Debug source:")[0]
    text = re.sub(r".*Error performing .* in [\d.]+\w+ - ", "", text, flags=re.DOTALL)
    parts = [found[1] for tag in ("Code", "Message") if (found := re.search(f"<{tag}>([^<]*)</{tag}>", text))]
    return " ".join(" ".join(parts or [text or type(error).__name__]).split())[:200]
