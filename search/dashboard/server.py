"""Serve optuna-dashboard for one storage until interrupted."""

import errno
import functools
import itertools
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import optuna_dashboard
import waitress
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage, get_storage
from optuna.trial import FrozenTrial
from optuna_dashboard import _note, _serializer

from data.errors import UserError
from search.artifacts.store import open_store
from search.attributes import ARTIFACTS

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

THREADS = 8


def serve(
    storage: BaseStorage, folder: Path, host: str = "127.0.0.1", port: int = 8080, *, ready: Callable[[str], None]
) -> None:
    """Serve the dashboard until interrupted.

    Other processes may add trials meanwhile; these appear within ten seconds.

    Args:
        storage: the storage whose studies are shown.
        folder: one study's output folder, or the parent folder of several; it may be missing.
        host, port: where to listen; port 0 takes a free one.
        ready: receives the address as soon as it can be opened.

    Raises:
        UserError: the port is taken or not allowed, or the host is not this machine's.
    """
    if not 0 <= port <= 65535:
        # The system would take such a number modulo 65536.
        raise UserError(f"port {port} is none; choose one from 1 to 65535 with --port")
    _quicken()
    # With Optuna's cache: the dashboard asks for all trials every few seconds, and finished ones do not change.
    app = _application(get_storage(storage), folder)
    try:
        # Not with waitress, which leaves its socket open if it cannot listen.
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(_refusal(error, host, port)) from error
    with listening:
        server = waitress.create_server(app, sockets=[listening], threads=THREADS, ident=None)
        try:
            ready(_address(host, int(listening.getsockname()[1])))
            server.run()  # returns when interrupted
        finally:
            server.close()


FILES_OF_A_STUDY = re.compile(r"(?:GET|POST|DELETE) /(?:api/)?artifacts/(\d+)\b|DELETE /api/studies/(\d+)")
"""Requests that concern a study's files: for a file, or to delete the study together with its files."""


def _application(storage: BaseStorage, folder: Path) -> "WSGIApplication":
    """optuna-dashboard that serves each study's files from that study's own store.

    An application takes one store for all studies. So a study with its own store also gets its own application for the
    requests for its files; all other requests go to the application that looks into folders.
    """
    in_folders: WSGIApplication = optuna_dashboard.wsgi(storage, artifact_store=ArtifactFolders(folder))
    opened = functools.cache(open_store)

    @functools.cache
    def in_store(url: str, name: str) -> "WSGIApplication":
        store = opened(url).below(name).below("artifacts")
        application: WSGIApplication = optuna_dashboard.wsgi(storage, artifact_store=store)
        return application

    def application(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        request = FILES_OF_A_STUDY.match(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        chosen = in_folders
        if request is not None:
            study = int(request[1] or request[2])
            try:
                if url := storage.get_study_user_attrs(study).get(ARTIFACTS):
                    chosen = in_store(url, storage.get_study_name_from_id(study))
            except KeyError:
                pass  # no such study; the application will say so
            except UserError as error:
                start_response("503 Service Unavailable", [("Content-Type", "text/plain; charset=utf-8")])
                return [f"{error}\n".encode()]
        return chosen(environ, start_response)

    return application


class ArtifactFolders:
    """Optuna's artifact store over the outputs of one or more studies: ``artifacts/`` and ``*/artifacts/``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _holder(self, artifact_id: str) -> FileSystemArtifactStore:
        own = self._folder / "artifacts"
        for candidate in (own, *sorted(self._folder.glob("*/artifacts"))):
            if (candidate / artifact_id).is_file():
                return FileSystemArtifactStore(candidate)
        return FileSystemArtifactStore(own)

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Open a trial's file."""
        return self._holder(artifact_id).open_reader(artifact_id)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Store a file uploaded in the browser."""
        own = self._folder / "artifacts"
        own.mkdir(parents=True, exist_ok=True)
        FileSystemArtifactStore(own).write(artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        """Delete a file."""
        self._holder(artifact_id).remove(artifact_id)


def _refusal(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken by another program; choose another one with --port"
    if error.errno == errno.EACCES:
        return f"port {port} may not be used by this user; choose one above 1023 with --port"
    # Python's own text repeats the address.
    reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
    return f"the dashboard cannot listen on {host!r}: {reason}"


def _address(host: str, port: int) -> str:
    """What to type into a browser on this machine."""
    name = "localhost" if host in ("", "0.0.0.0", "::") else host
    return f"http://[{name}]:{port}/" if ":" in name else f"http://{name}:{port}/"


def _quicken() -> None:
    """Replace two look-ups that go through all of a study's attributes for every trial.

    The results are the same. With notes and files of 2,000 trials (SQLite, two CPU cores) a study's page takes 0.5 s
    instead of 6 s; the original time grows with the square of the number of trials.
    """
    _note.get_note_from_system_attrs = _note_of
    _serializer.list_trial_artifacts = _files_of


def _note_of(attributes: Mapping[str, Any], trial_id: int | None) -> dict[str, Any]:
    """`optuna_dashboard._note.get_note_from_system_attrs`, but looking up its keys."""
    version = attributes.get(_note.note_ver_key(trial_id))
    prefix = _note.note_str_key_prefix(trial_id)
    keys = itertools.takewhile(attributes.__contains__, (f"{prefix}{index}" for index in itertools.count()))
    body = "" if version is None else "".join(attributes[key] for key in keys)
    return {"version": int(version or 0), "body": body}


def _files_of(
    study_attributes: Mapping[str, Any], trial_attributes: Mapping[str, Any], trial: FrozenTrial
) -> list[dict[str, Any]]:
    """`optuna_dashboard._serializer.list_trial_artifacts`, but reading the study's attributes once for all trials."""
    # A request passes the same mapping for every trial. Keeping it alive stops another one from taking its identity.
    if getattr(_latest, "attributes", None) is not study_attributes:
        _latest.attributes, _latest.files = study_attributes, _files_by_trial(study_attributes)
    own = (value for key, value in trial_attributes.items() if key.startswith("artifacts:"))
    files = [json.loads(value) for value in itertools.chain(_latest.files.get(trial._trial_id, ()), own)]
    return [meta for meta in files if meta is not None]


_latest = threading.local()


def _files_by_trial(attributes: Mapping[str, Any]) -> dict[int, list[str]]:
    files: dict[int, list[str]] = {}
    for key, value in attributes.items():
        if key.startswith("dashboard:artifacts:"):
            files.setdefault(int(key.split(":")[2]), []).append(value)
    return files
