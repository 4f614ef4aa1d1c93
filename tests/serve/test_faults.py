"""What goes wrong: clients that go, memory that is not there, bodies that are nonsense."""

import http.client
import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from icecache.engine import Engine
from icecache.integrations.embedded import load
from tests.serve.running import Running, running, until
from tests.serve.test_openai import LONG, ask, chat


def post(
    server: Running, body: bytes, path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Send bytes; returns status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", path, body, {"content-type": "application/json", **headers})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def body_of(content: str = "x", **more: Any) -> bytes:
    """Return a request's bytes."""
    return json.dumps({"model": "tiny", "messages": ask(content), **more}).encode()


def head_of(body: bytes) -> bytes:
    """Return the lines before a body, for those who speak without a client."""
    lines = (
        "POST /v1/chat/completions HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Length: {len(body)}",
        "Content-Type: application/json",
    )
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def assert_alive(server: Running) -> None:
    """Assert that nothing leaked and the next request is served."""
    until(lambda: server.stats().reserved_bytes == 0)
    assert server.stats().running == server.stats().waiting == 0
    assert chat(server.client(), "x", max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_ends_its_request_and_no_other(server: Running, stream: bool) -> None:
    expected = chat(server.client(), "Other. " + LONG, max_tokens=60)
    body = body_of("Gone. " + LONG, max_tokens=400, stream=stream, temperature=0)
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}"
        )
        raw.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
        until(lambda: server.stats().running == 1)
        if stream:
            assert b"200 OK" in raw.recv(1000)
    tokens = server.stats().answer_tokens
    other = chat(server.client(), "Other. " + LONG, max_tokens=60)
    assert other.choices[0].message.content == expected.choices[0].message.content
    assert_alive(server)
    # far fewer than it had asked for
    assert server.stats().answer_tokens - tokens < 350


def test_the_openai_client_can_leave_a_stream(server: Running) -> None:
    stream = chat(server.client(), "Left. " + LONG, stream=True, max_tokens=400)
    for _, _chunk in zip(range(3), stream):
        pass
    stream.close()
    assert_alive(server)


NONSENSE = {
    "cut off": b'{"model": "tiny", "mess',
    "empty": b"",
    "no object": b"[1, 2]",
    "not text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "not a number": body_of(top_p=float("nan")),
    "huge number": b'{"model": "tiny", "seed": 1' + b"0" * 6000 + b"}",
    "half a letter": b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "half a name": b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
    "number for text": b'{"model": "tiny", "messages": [{"role": "user", "content": 5}]}',
    "text for number": body_of(max_tokens="5"),
    "truth for number": body_of(max_tokens=True),
    "no messages": b'{"model": "tiny", "messages": []}',
    "null": b"null",
    "image": body_of()[:-3] + b', {"type": "image_url", "image_url": {"url": "file:///x"}}]}]}',
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_a_clients_error(server: Running, name: str) -> None:
    status, _, body = post(server, NONSENSE[name])
    assert status == 400, body
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert b"Traceback" not in body
    assert b".py" not in body


def test_the_server_lives_after_nonsense(server: Running) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        for body in NONSENSE.values():
            assert post(server, body, path)[0] == 400
    assert_alive(server)


def test_a_body_of_ten_megabytes_is_refused_before_it_is_read(server: Running) -> None:
    status, _, body = post(server, body_of("x" * 10_000_000))
    assert (status, json.loads(body)["error"]["message"]) == (
        413,
        "the body must have at most 8,388,608 bytes",
    )
    # the same without a length, and with a false one
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    pieces = (b"x" * 100_000 for _ in range(100))
    connection.request("POST", "/v1/completions", pieces, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert post(server, b"{}", **{"content-length": "99999999999"})[0] == 413
    assert_alive(server)


def test_names_of_other_hosts_and_methods(server: Running) -> None:
    assert post(server, body_of(), host="evil.example")[0] == 400
    assert post(server, body_of(), path="/v1/../../etc/passwd")[0] == 404
    assert post(server, body_of(), path="/health")[0] == 405
    # what a web page may send across origins without asking is not JSON to the server
    assert post(server, body_of(), **{"content-type": "text/plain"})[0] == 400


@pytest.fixture(scope="module")
def locked(tiny_model: Path) -> Iterator[Running]:
    """A server with a key."""
    model, tokenizer = load(tiny_model, "float32")
    with running(model, tokenizer, key="secret-ü") as started:
        yield started


def test_without_the_key_nothing_is_done(locked: Running) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
        status, _, body = post(locked, body_of("x" * 1000), **headers)
        assert status == 401
        assert "API key" in json.loads(body)["error"]["message"]
    # even of what is too large only that is said
    assert post(locked, body_of("x" * 10_000_000))[0] == 401
    key = "secret-ü".encode().decode("latin-1")
    assert post(locked, body_of(max_tokens=2), authorization=f"Bearer {key}")[0] == 200


def test_page_and_health_need_no_key_and_figures_do(locked: Running) -> None:
    for path, status in {"/": 200, "/health": 200, "/metrics": 401, "/v1/models": 401}.items():
        connection = http.client.HTTPConnection("127.0.0.1", locked.port, timeout=60)
        connection.request("GET", path)
        assert connection.getresponse().status == status
        connection.close()


def test_memory_that_is_not_there_is_asked_for_later(tiny_model: Path) -> None:
    model, tokenizer = load(tiny_model, "float32")
    with running(model, tokenizer) as free:
        stream = chat(free.client(), LONG, stream=True, max_tokens=1000)
        next(iter(stream))
        needed = free.stats().reserved_bytes
        stream.close()
    with running(model, tokenizer, max_host_memory=int(2.5 * needed)) as server:
        streams = [
            chat(server.client(), f"{i} " + LONG, stream=True, max_tokens=1000) for i in range(2)
        ]
        for stream in streams:
            next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="host memory") as caught:
            chat(server.client(), "2 " + LONG, max_tokens=1000)
        assert int(caught.value.response.headers["retry-after"]) > 0
        # small ones still fit beside them
        assert chat(server.client(), "x", max_tokens=2).usage.completion_tokens == 2
        streams[0].close()
        until(lambda: server.stats().running == 1)
        third = chat(server.client(), "2 " + LONG, stream=True, max_tokens=1000)
        assert next(iter(third))
        for stream in (streams[1], third):
            stream.close()
        assert_alive(server)


def test_a_full_queue_asks_to_come_again(tiny_model: Path) -> None:
    model, tokenizer = load(tiny_model, "float32")
    with running(model, tokenizer, max_running=1, max_waiting=1) as server:
        first = chat(server.client(), LONG, stream=True, max_tokens=1500)
        next(iter(first))
        body = body_of("second", max_tokens=2)
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(head_of(body) + body)
            until(lambda: server.stats().waiting == 1)
            with pytest.raises(openai.RateLimitError, match="wait already"):
                chat(server.client(), "third", max_tokens=2)
            first.close()
            assert b"200 OK" in raw.recv(1000)
        assert_alive(server)


def test_a_forward_that_fails_is_said_without_traces(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load(tiny_model, "float32")
    caplog.set_level(logging.CRITICAL)
    with running(model, tokenizer) as server:
        step = Engine.step

        def fail(engine: Engine) -> Any:
            monkeypatch.setattr(Engine, "step", step)
            for request in list(engine._schedule.waiting):
                engine.abort(request)
            raise RuntimeError("out of memory at /secret/place.py")

        monkeypatch.setattr(Engine, "step", fail)
        status, _, body = post(server, body_of())
        assert status == 503
        assert b"secret" not in body
        assert b"RuntimeError" in body
        assert_alive(server)


def test_a_dead_engine_is_seen(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(tiny_model, "float32")
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    with running(model, tokenizer) as server:

        def die(engine: Engine) -> Any:
            raise KeyError("a defect")

        monkeypatch.setattr(Engine, "step", die)
        assert post(server, body_of())[0] == 503
        until(lambda: not server.worker.is_alive)
        assert post(server, body_of())[0] == 503
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 503
        connection.close()


def test_metrics_tell_what_happened(server: Running) -> None:
    chat(server.client(), "Metrics. " + LONG, max_tokens=8)
    post(server, b"{}")

    def metrics() -> dict[str, float]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return {k: float(v) for k, v in (x.rsplit(" ", 1) for x in lines if x[0] != "#")}

    time.sleep(1.5)
    found = metrics()
    assert found['icecache_refused_total{status="400"}'] >= 1
    assert found["icecache_time_to_first_token_seconds_count"] >= 1
    assert found["icecache_time_per_output_token_seconds_count"] >= 1
    assert found["icecache_answer_tokens_total"] >= 8
    assert 0 < found["icecache_sparse_share"] < 1
    assert found["icecache_conversation_bytes"] > 0
    assert found["icecache_requests_running"] == 0
    assert found["icecache_host_limit_bytes"] > 0
