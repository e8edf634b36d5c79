"""Shared helpers: isolation from the machine, a tiny CIFAR-10, a site that serves it, and folders of images."""

import hashlib
import io
import pickle
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10

from data.images import IMAGE_SIZE, LabelledImages

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
PER_BATCH = 20
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class TinyCifar10:
    """A CIFAR-10 of 5 x 20 training and 20 test images in torchvision's layout, with its archive."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    files: dict[str, bytes]
    archive: bytes

    def write(self, data_dir: Path) -> Path:
        """Put the files where torchvision looks for them; returns ``data_dir``."""
        (data_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (data_dir / FOLDER / name).write_bytes(content)
        return data_dir


@dataclass
class Site:
    """What the fake download site does, and what it was asked."""

    url: str
    answer: str = "whole"
    requests: list[str] = field(default_factory=list)
    downloads: int = 0
    gate: threading.Event = field(default_factory=threading.Event)


ImageMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def refused_port() -> Iterator[int]:
    """A port of 127.0.0.1 that refuses every connection: bound, so nobody else takes it, but not listening."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture(autouse=True)
def apart_from_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused_port: int) -> None:
    """No test reads the user's settings or caches, goes through a proxy or asks a real site."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("SEARCH_DATA_DIR", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{refused_port}/{ARCHIVE}")


@pytest.fixture
def black_hole(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """CIFAR-10's site takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/{ARCHIVE}"
        monkeypatch.setattr(CIFAR10, "url", url)
        yield url


@pytest.fixture(scope="session")
def published() -> TinyCifar10:
    return _publish(np.random.default_rng(0))


@pytest.fixture
def tiny_cifar10(published: TinyCifar10, monkeypatch: pytest.MonkeyPatch) -> TinyCifar10:
    """torchvision takes the tiny CIFAR-10 for the published one; its site refuses connections."""
    sums = {name: _md5(content) for name, content in published.files.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in _batch_names()])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    monkeypatch.setattr(CIFAR10, "tgz_md5", _md5(published.archive))
    return published


@pytest.fixture
def site(tiny_cifar10: TinyCifar10, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site on 127.0.0.1 that serves the tiny archive, in the way that ``site.answer`` says.

    whole: as it should. wrong: a page of a login portal. half, half-chunked: breaks off half-way, with and without
    an announced length. stalls: stands still half-way. gated: sends the second half once ``site.gate`` is set.
    missing: 404. babble: does not speak HTTP.
    """
    released = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        state = Site(f"http://127.0.0.1:{server.server_address[1]}/{ARCHIVE}")
        server.RequestHandlerClass = _handler(state, tiny_cifar10.archive, released)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(CIFAR10, "url", state.url)
        yield state
        released.set()
        state.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def file_as_folder(tmp_path: Path) -> Path:
    """A path below a regular file: nothing can be made there, not even by root."""
    (tmp_path / "regular-file").write_text("not a folder")
    return tmp_path / "regular-file" / "below"


@pytest.fixture
def make_source() -> Callable[..., LabelledImages]:
    """Maker of random images, ``per_class`` of each class (a number, or one for each class), in shuffled order.

    The first pixels of an image spell its number, so that every image is different and can be recognised.
    """

    def make(per_class: int | list[int] = 20, classes: int = 10, size: int = IMAGE_SIZE) -> LabelledImages:
        counts = [per_class] * classes if isinstance(per_class, int) else per_class
        generator = torch.Generator().manual_seed(7)
        labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        labels = labels[torch.randperm(len(labels), generator=generator)]
        images = torch.randint(0, 256, (len(labels), 3, size, size), dtype=torch.uint8, generator=generator)
        number = torch.arange(len(labels))
        images[:, 0, 0, 0], images[:, 1, 0, 0] = (number // 256).to(torch.uint8), (number % 256).to(torch.uint8)
        return LabelledImages(images, labels, tuple(f"class {i}" for i in range(len(counts))), mirror=True)

    return make


@pytest.fixture
def numbers_of() -> Callable[[Tensor], list[int]]:
    """The numbers that `make_source` spelled into images."""

    def read(images: Tensor) -> list[int]:
        return [int(image[0, 0, 0]) * 256 + int(image[1, 0, 0]) for image in images]

    return read


@pytest.fixture
def pixels_of() -> Callable[[Tensor], list[bytes]]:
    """Each image as bytes: something that can be counted and compared as a set."""

    def read(images: Tensor) -> list[bytes]:
        return [image.contiguous().numpy().tobytes() for image in images]

    return read


@pytest.fixture
def make_folder() -> ImageMaker:
    """Maker of ``root/CLASS/NNN.png``: random images, different from each other, of 32x32 pixels."""

    def make(root: Path, per_class: int = 12, classes: tuple[str, ...] = ("ant", "bee"), seed: int = 0) -> Path:
        chance = np.random.default_rng(seed)
        for name in classes:
            (root / name).mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                pixels = chance.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / f"{number:03}.png")
        return root

    return make


def _batch_names() -> list[str]:
    return [f"data_batch_{number}" for number in range(1, 6)]


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _publish(chance: np.random.Generator) -> TinyCifar10:
    files: dict[str, bytes] = {}
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for name in (*_batch_names(), "test_batch"):
        rows = chance.integers(0, 256, (PER_BATCH, 3 * 32 * 32), dtype=np.uint8)
        labels = [int(label) for label in chance.permutation(np.arange(PER_BATCH) % 10)]
        entry: dict[str, Any] = {"batch_label": name, "labels": labels, "data": rows, "filenames": ["x"] * PER_BATCH}
        files[name] = pickle.dumps(entry, protocol=2)
        parts[name] = torch.from_numpy(rows).reshape(-1, 3, 32, 32), torch.tensor(labels)
    meta = {"label_names": list(CLASSES), "num_cases_per_batch": PER_BATCH, "num_vis": 3072}
    files["batches.meta"] = pickle.dumps(meta, protocol=2)
    return TinyCifar10(
        images=torch.cat([parts[name][0] for name in _batch_names()]),
        labels=torch.cat([parts[name][1] for name in _batch_names()]),
        test_images=parts["test_batch"][0],
        test_labels=parts["test_batch"][1],
        files=files,
        archive=_archive(files),
    )


def _archive(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _handler(site: Site, archive: bytes, released: threading.Event) -> type[BaseHTTPRequestHandler]:
    def send(handler: BaseHTTPRequestHandler, body: bytes, length: int | None) -> None:
        handler.send_response(200)
        if length is None:
            handler.send_header("Transfer-Encoding", "chunked")
            body = f"{2 * len(body):x}\r\n".encode() + body
        else:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)
            handler.wfile.flush()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        site.requests.append(handler.command)
        # torchvision asks for the archive twice, first for its address only: a GET with the header `Method: HEAD`.
        site.downloads += handler.command == "GET" and handler.headers.get("Method") != "HEAD"
        half = archive[: len(archive) // 2]
        handler.close_connection = True
        if site.answer == "whole":
            send(handler, archive, len(archive))
        elif site.answer == "wrong":
            send(handler, b"<html>Please log in</html>", 26)
        elif site.answer == "half":
            send(handler, half, len(archive))
        elif site.answer == "half-chunked":
            send(handler, half, None)
        elif site.answer == "stalls":
            send(handler, half, len(archive))
            if handler.command == "GET":
                released.wait(20)
        elif site.answer == "gated":
            send(handler, half, len(archive))
            if handler.command == "GET":
                site.gate.wait(60)
                handler.wfile.write(archive[len(half) :])
        elif site.answer == "missing":
            handler.send_error(404)
        elif site.answer == "babble":
            handler.wfile.write(b"220 this is no web server\r\n")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            try:
                answer(self)
            except ConnectionError:
                self.close_connection = True  # the client has read enough

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler
