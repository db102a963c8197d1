"""A server process of ours, and what can be seen of it from outside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

PATIENCE = 60.0  # seconds that a server gets to come to rest


class ServerProcess:
    """`compress serve MODEL --port 0 FLAGS`, ready; a context manager that kills what is left."""

    def __init__(self, model: str, flags: list[str], work: Path, name: str) -> None:
        self._report = work / f"{name}-engine.json"
        self.log = work / f"{name}.log"
        command = [sys.executable, "-m", "load.checked_serve", str(self._report)]
        command += ["serve", model, "--port", "0", "--json", *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, cwd=Path(__file__).parents[1]
            )
        assert self.process.stdout is not None
        said = self._first_object(self.process.stdout)
        self.url: str = said["url"]
        self.model: str = said["model"]
        self._seen = psutil.Process(self.process.pid)

    def _first_object(self, stdout: Any) -> dict[str, Any]:
        """The JSON object that says that it is ready, on however many lines."""
        text = ""
        for line in stdout:
            text += line.decode()
            try:
                return json.loads(text)
            except ValueError:
                continue
        raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}")

    def metrics(self) -> dict[str, float]:
        """Its metrics by name, summed over labels, without their prefix."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            text = response.read().decode()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removeprefix("compress:")
                found[name] = found.get(name, 0.0) + sample.value
        return found

    def healthy(self) -> bool:
        """Whether /health and /ready are green."""
        for route in ("/health", "/ready"):
            try:
                with urllib.request.urlopen(self.url + route, timeout=60) as response:
                    if response.status != 200:
                        return False
            except OSError:
                return False
        return True

    def rest(self) -> dict[str, float]:
        """Wait until nothing runs or waits; its metrics then.  Raises TimeoutError."""
        deadline = time.monotonic() + PATIENCE
        while True:
            found = self.metrics()
            busy = found["num_requests_running"] + found["num_requests_waiting"]
            if not busy and not found["kv_cache_usage_perc"]:
                return found
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"after {PATIENCE:.0f} s of rest {busy:g} requests are unfinished, and "
                    f"{found['kv_cache_usage_perc']:.2%} of the cache is in use"
                )
            time.sleep(0.1)

    def check(self) -> dict[str, Any]:
        """What the idle engine says of its own books."""
        self._report.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + PATIENCE
        while not self._report.exists():
            if time.monotonic() > deadline:
                raise TimeoutError("the server did not examine its engine")
            time.sleep(0.05)
        return json.loads(self._report.read_text())

    def memory(self) -> int:
        """Bytes of its own that are in memory (RssAnon): without mapped files."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("Linux has RssAnon")

    def open_files(self, expected: int | None = None) -> int:
        """Open file descriptors; waits a moment for `expected`, while connections close."""
        deadline = time.monotonic() + 5.0
        while expected is not None and self._seen.num_fds() > expected:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return self._seen.num_fds()

    def threads(self) -> int:
        """Threads of the process."""
        return self._seen.num_threads()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """End it, if it runs; nothing of it stays."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
