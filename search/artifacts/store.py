"""Where a study keeps files for other machines: in a bucket of an S3-compatible store, or only below ``--out``.

In a store, ``URL/STUDY/`` holds the files below the study's ``--out``, under the same names. A study stores the URL
alone: credentials, region and endpoint are boto3's own matter (environment, ``~/.aws``, instance roles).
"""

import contextlib
import io
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import optuna
from optuna.artifacts import Boto3ArtifactStore, FileSystemArtifactStore

from data.errors import UserError, first_line
from search.attributes import ARTIFACTS

URL = re.compile(r"s3://(?P<bucket>[A-Za-z0-9._-]{1,255})(?P<prefix>(/[A-Za-z0-9._-]*[A-Za-z0-9_-])*)/?")
"""No segment ends in a dot, so none is ``.`` or ``..``; and no keys can be part of it, as in ``s3://KEY:SECRET@``."""

CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 3, 10, 2
"""How long a store may take to answer, and how often it is tried. A worker that is asked to stop waits until its
checkpoint is copied: boto3's own 60 s and five tries would be minutes."""


class Store(Protocol):
    """Optuna's interface of an artifact store; every method raises OSError if the store cannot be used."""

    @property
    def text(self) -> str:
        """Where it is, for people."""

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """A file by its name, or `optuna.artifacts.exceptions.ArtifactNotFound`."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Store a file, in the place of one with the same name."""

    def remove(self, artifact_id: str) -> None:
        """Delete a file."""


@dataclass(frozen=True)
class Folder:
    """Files in a folder, which is made for the first one."""

    path: Path

    @property
    def text(self) -> str:
        return str(self.path)

    def open_reader(self, artifact_id: str) -> BinaryIO:
        return FileSystemArtifactStore(self.path).open_reader(artifact_id)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        FileSystemArtifactStore(self.path).write(artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        FileSystemArtifactStore(self.path).remove(artifact_id)


@dataclass(frozen=True)
class Bucket:
    """Objects of a bucket whose names begin with a prefix; the text of its OSErrors is one line without a secret.

    Attributes:
        text: URL of what begins with the prefix.
        prefix: empty, or ends in a slash.
        objects: the whole bucket.
    """

    text: str
    prefix: str
    objects: Boto3ArtifactStore

    def below(self, name: str) -> "Bucket":
        """Its objects whose names begin with ``name/``."""
        return replace(self, text=f"{self.text}/{name}", prefix=f"{self.prefix}{name}/")

    def open_reader(self, artifact_id: str) -> BinaryIO:
        with _as_os_errors(), self.objects.open_reader(self.prefix + artifact_id) as body:
            return io.BytesIO(body.read())  # all of it here, where its errors become OSErrors

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        with _as_os_errors():
            self.objects.write(self.prefix + artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        with _as_os_errors():
            self.objects.remove(self.prefix + artifact_id)


def store_url(given: str | None, study: optuna.Study | None) -> str | None:
    """The URL of a study's store: the one that it has, else ``--artifacts``, else ``$SEARCH_ARTIFACTS``.

    Args:
        given: on the command line.
        study: None if it is not created yet.

    Returns:
        None if its files are only below ``--out``.

    Raises:
        UserError: no URL of a bucket, or not the study's.
    """
    stored: str | None = study.user_attrs.get(ARTIFACTS) if study else None
    text = given or (None if stored else os.environ.get("SEARCH_ARTIFACTS"))
    if not text:
        return stored
    if not URL.fullmatch(text):
        # The text may hold a key, so it is not repeated.
        raise UserError(
            "--artifacts takes s3://BUCKET or s3://BUCKET/PREFIX, of letters, digits, '.', '_' and '-'; keys and "
            "endpoint are boto3's matter (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, ~/.aws)"
        )
    url = text.rstrip("/")
    if study is not None and stored not in (None, url):
        raise UserError(
            f"study {study.study_name!r} keeps its artifacts in {stored}, not in {url}; leave --artifacts out, or give "
            "the other place another --name"
        )
    return url


def store_of(study: optuna.Study) -> Bucket | None:
    """A study's own part of its store; None if it has no store.

    Raises:
        UserError: boto3 is not installed, or set up wrongly.
    """
    url = study.user_attrs.get(ARTIFACTS)
    return None if url is None else open_store(url).below(study.study_name)


def open_store(url: str) -> Bucket:
    """The store of a URL that `store_url` returned. Nothing is requested from it yet.

    Raises:
        UserError: boto3 is not installed, or set up wrongly.
    """
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise UserError(f'artifacts in {url} need an extra: pip install "block-search[s3]"') from None
    parts = URL.fullmatch(url)
    assert parts is not None
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
        # Recent versions of boto3 add checksums that other stores than S3 may not know.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        client = boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:  # such as an endpoint that is no URL
        raise UserError(f"boto3 is set up wrongly: {first_line(error)}") from error
    prefix = parts["prefix"].removeprefix("/")
    # Without a copy: nobody uses a file's object again after it was written.
    return Bucket(url, prefix and f"{prefix}/", Boto3ArtifactStore(parts["bucket"], client, avoid_buf_copy=True))


def check_store(store: Bucket) -> None:
    """Write, read and remove a tiny object.

    Raises:
        UserError: one of these cannot be done.
    """
    name = f"check-{uuid.uuid4().hex}"
    try:
        store.write(name, io.BytesIO(b"block-search"))
        store.open_reader(name)
        store.remove(name)
    except (OSError, optuna.artifacts.exceptions.ArtifactNotFound) as error:
        raise UserError(f"artifacts cannot be kept in {store.text}: {first_line(error)}") from error


@contextmanager
def _as_os_errors() -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise OSError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """What went wrong, in our own words: boto3's may contain an endpoint with a password in it."""
    code = getattr(error, "response", {}).get("Error", {}).get("Code")
    name = str(code or type(error).__name__)
    with contextlib.suppress(KeyError):
        return f"{REASONS[name]} ({name})"
    return f"the store answers {name}" if code else name


REASONS = {
    **dict.fromkeys(("NoSuchBucket", "404"), "there is no such bucket"),
    **dict.fromkeys(
        ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
        "access is denied; look at boto3's credentials",
    ),
    **dict.fromkeys(
        ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
        "boto3 finds no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write ~/.aws/credentials",
    ),
    **dict.fromkeys(
        (
            *("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"),
            *("HTTPClientError", "ProxyConnectionError", "SSLError", "ResponseStreamingError"),
        ),
        "it cannot be reached; look at AWS_ENDPOINT_URL and the network",
    ),
}
