"""Servers of vLLM as processes of their own: started, asked, ended."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ENVIRONMENT

__all__ = ["Server", "ask", "flags", "free_port", "get", "metric", "metrics_after", "running",
           "wait_until_healthy"]  # fmt: skip


class Server(NamedTuple):
    """A process that leads its group, and what it and its children say."""

    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def said(self) -> str:
        """What was said so far."""
        return self.log.read_text(errors="replace")


@contextmanager
def running(command: list[str], log: Path, **environment: str) -> Iterator[Server]:
    """Run a Python program, and end it and its children at the end."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **ENVIRONMENT, **environment},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Server(process, log)
    finally:
        # a child may be left when its parent has ended
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)


def flags(**values: Any) -> list[str]:
    """Return the words of a command line; True is a flag without a value."""
    words = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def get(url: str, body: dict[str, Any] | None = None, timeout: float = 600) -> str:
    """Return what a URL answers; with a body it is posted."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text: str = answer.read().decode()
    return text


def ask(url: str, prompt: list[int], max_tokens: int) -> list[int]:
    """Return the greedy tokens that follow a prompt."""
    body = {"model": "model", "prompt": prompt, "temperature": 0, "max_tokens": max_tokens}
    body |= {"ignore_eos": True, "return_token_ids": True}
    ids: list[int] = json.loads(get(f"{url}/v1/completions", body))["choices"][0]["token_ids"]
    return ids


def wait_until_healthy(url: str, *servers: Server) -> None:
    """Wait until the first of some servers answers; fail if one of them ends before."""
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and all(s.process.poll() is None for s in servers):
        with suppress(OSError):
            get(f"{url}/health", timeout=5)
            return
        time.sleep(0.5)
    said = "\n\n".join(server.said[-6000:] for server in servers)
    pytest.fail(f"the server did not come up:\n{said}")


def metrics_after(url: str, num_requests: int) -> str:
    """Return ``/metrics`` when it has counted so many requests; their last report comes behind."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        page = get(f"{url}/metrics")
        if sum(metric(page, "request_sparse_steps_count").values()) >= num_requests:
            return page
        time.sleep(0.1)
    pytest.fail(f"{num_requests} requests were not counted:\n{page}")


def metric(page: str, name: str) -> dict[str, float]:
    """Return a metric's value by engine."""
    lines = re.findall(rf'^icecache:{name}{{engine="(\d)".*}} (\S+)$', page, re.MULTILINE)
    return {engine: float(value) for engine, value in lines}
