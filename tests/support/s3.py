"""A real S3 server on this machine (`rclone serve s3`), whose buckets are folders."""

import http.client
import socket
import subprocess
import time
from pathlib import Path

import pytest

KEY, SECRET = "search-tests-key", "s3cr3t/with+signs="
BUCKET = "models"
TRACES = (SECRET, "s3cr3t", KEY)
"""What every way to write the credentials down would leave."""


class S3Server:
    """A server with one bucket, which takes one pair of keys; its process can be stopped and started again."""

    def __init__(self, root: Path) -> None:
        self.root, self.url = root, f"s3://{BUCKET}/shared"
        (root / BUCKET).mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Come back, with all that was there."""
        address = f"127.0.0.1:{self._port}"
        with (self.root.parent / "rclone.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["rclone", "serve", "s3", "--addr", address, "--auth-key", f"{KEY},{SECRET}", str(self.root)],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 30
        while True:
            connection = http.client.HTTPConnection(address, timeout=5)
            try:
                connection.request("GET", "/")
                connection.getresponse()
                return
            except OSError:
                assert time.monotonic() < deadline
                assert self._process.poll() is None
                time.sleep(0.05)
            finally:
                connection.close()

    def stop(self) -> None:
        """Be out of reach."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def names(self) -> set[str]:
        """Of all objects below `url`."""
        top = self.root / BUCKET / "shared"
        return {path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file()}

    def set_up(self, monkeypatch: pytest.MonkeyPatch, secret: str = SECRET) -> None:
        """Let boto3 find the server and keys in the environment, and nothing anywhere else."""
        for name, value in {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(self.root / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.root / "none"),
            "AWS_EC2_METADATA_DISABLED": "true",
            "no_proxy": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "SEARCH_ARTIFACTS", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.delenv(name, raising=False)
