"""A real service in a process of its own, as `rlfseg serve` starts it, and small things to ask it with."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import yaml
from numpy.typing import NDArray
from PIL import Image

from rlfseg.datasets.shapes import draw_scene
from rlfseg.images import rle_decode

Array = NDArray[Any]
COMMAND = [sys.executable, "-m", "jobs.serve"]


class Service:
    """A running service: its address, its processes and what it wrote, and how `/readyz` answered at first."""

    def __init__(self, url: str, key: str, process: subprocess.Popen[bytes], temp: Path, log: Path):
        self.url, self.key, self.process, self.temp, self.log = url, key, process, temp, log
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=120)
        self.before = list[int]()

    def segment(self, images: Sequence[bytes], phrases: Sequence[str], **options: Any) -> httpx.Response:
        """POST as a form."""
        files = [("images", (f"{n}.png", data)) for n, data in enumerate(images)]
        return self.http.post("/v1/segment", files=files, data={"phrases": list(phrases), **options})

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Processes of its `Front` or `Model` replicas."""
        name = f"ServeReplica:rlfseg:{deployment}"
        return [p for p in psutil.Process(self.process.pid).children(recursive=True) if name in _title(p)]

    def proxies(self) -> list[psutil.Process]:
        """Processes that listen."""
        return [p for p in psutil.Process(self.process.pid).children(recursive=True) if "ProxyActor" in _title(p)]

    def metrics(self) -> dict[str, float]:
        """Everything that Prometheus would read: `name{labels}` -> value."""
        until = time.monotonic() + 60  # it answers before it has greeted
        while not (told := re.search("^rlfseg: metrics at (http://.*)$", self.log.read_text(), re.MULTILINE)):
            assert time.monotonic() < until
            time.sleep(0.1)
        lines = httpx.get(told[1]).text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    def written(self) -> Iterator[tuple[Path, bytes]]:
        """All that it and Ray logged."""
        for path in [self.log, *self.temp.rglob("*")]:
            if path.is_file() and path.suffix in (".log", ".out", ".err", ".txt", ".json"):
                yield path, path.read_bytes()


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def started(
    folder: Path, root: Path, settings: dict[str, Any], *, key: str = "", wait: float = 240
) -> Iterator[Service]:
    """`rlfseg serve` with these settings, on a free port if they name none; stopped by SIGTERM.

    Args:
        folder: For settings and log.
        root: The repository.
        settings: Of ServeConfig.
        key: API key to ask with.
        wait: Seconds until it must be ready.

    Yields:
        The service, ready.
    """
    settings = {"port": free_port()} | settings
    file, log = folder / "serve.yaml", folder / "serve.log"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    with tempfile.TemporaryDirectory(prefix="rs-", ignore_cleanup_errors=True) as temp:  # a socket's path is short
        # Metrics are exported every second instead of every ten
        env = os.environ | {"RAY_TMPDIR": temp, "PYTHONPATH": str(root), "RAY_metrics_report_interval_ms": "1000"}
        with log.open("wb") as output:
            command = [*COMMAND, "--config", str(file)]
            process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=output, stderr=output, start_new_session=True
            )
        service = Service(f"http://127.0.0.1:{settings['port']}", key, process, Path(temp) / "ray", log)
        try:
            _wait_until_ready(service, time.monotonic() + wait)
            yield service
        finally:
            service.http.close()
            code = stop(process)
        assert code in (0, None), f"exit code {code}:\n{log.read_text()[-3000:]}"


def _wait_until_ready(service: Service, until: float) -> None:
    while time.monotonic() < until:
        if service.process.poll() is not None:
            break
        with suppress(httpx.NetworkError):
            service.before.append(service.http.get("/readyz").status_code)
            if service.before[-1] == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"the service is not ready:\n{service.log.read_text()[-3000:]}")


def stop(process: subprocess.Popen[bytes]) -> int | None:
    """Asks it to stop, and makes sure that nothing of it is left; its exit code, None if it had ended before."""
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# --- pictures ------------------------------------------------------------------------------------------------------


def scene(index: int, size: tuple[int, int] = (64, 64)) -> Array:
    """A drawn picture, uint8 [H, W, 3]."""
    image = Image.fromarray(draw_scene(index, split="test").image)
    return np.asarray(image.resize(size[::-1]))


def phrases_of(index: int) -> list[str]:
    """What is on it."""
    return [p.caption for p in draw_scene(index, split="test").phrases]


def png(array: Array, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    return saved(Image.fromarray(array), kind, **options)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The same of Pillow's."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def base64_of(data: bytes) -> str:
    """As JSON carries it."""
    return base64.b64encode(data).decode()


def mask_of(entry: dict[str, Any]) -> Array:
    """The mask of an entry with RLE."""
    height, width = entry["mask"]["size"]
    return rle_decode(entry["mask"]["counts"], (height, width))
