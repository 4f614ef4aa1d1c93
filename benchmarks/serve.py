"""Many clients of one server: throughput, equality, memory, and the second turn of a long one.

    python benchmarks/serve.py --clients 16 --new-tokens 128

Starts `icecache serve` on a free port of this machine, once for clients one at a time and once for
all at once, so that neither finds the other's conversations; then a long conversation's first and
second turn, the second also after a restart. Prints one JSON object.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import openai
import psutil

SHORTEST, LONGEST = 200, 6000


class Answer(NamedTuple):
    """What one client got."""

    text: str
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    first_s: float
    total_s: float


class Server(NamedTuple):
    """A running server."""

    url: str
    process: psutil.Process

    def client(self) -> openai.OpenAI:
        """Return a client that waits and does not try again."""
        return openai.OpenAI(base_url=self.url, api_key="none", timeout=3600, max_retries=0)

    def resident(self) -> int:
        """Return the resident bytes of the process."""
        return int(self.process.memory_info().rss)


@contextmanager
def serving(*options: str) -> Iterator[Server]:
    """Run a server until the block is left."""
    command = [sys.executable, "-c", "from icecache.cli.main import main; main()", "serve"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--dtype", "float32", *options], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        found = next(m for line in lines if (m := re.search(r"http://\S+", line)))
        yield Server(found[0] + "/v1", psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(120)


def ask(client: openai.OpenAI, messages: list[dict[str, str]], new_tokens: int) -> Answer:
    """Stream one answer of exactly `new_tokens` tokens, unless the model ends it."""
    begin = time.perf_counter()
    stream: Any = client.chat.completions.create(
        model="embedded",
        messages=messages,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=new_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, first, usage = "", None, None
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - begin if first is None else first
            text += chunk.choices[0].delta.content
    assert usage is not None
    total = time.perf_counter() - begin
    cached = usage.prompt_tokens_details.cached_tokens
    counted = usage.completion_tokens, usage.prompt_tokens, cached
    return Answer(text, *counted, total if first is None else first, total)


def prompts(clients: int) -> list[list[dict[str, str]]]:
    """Return one conversation a client, each about its own part of the log."""
    words = (files("icecache.cli") / "data/expedition.txt").read_text(encoding="utf-8").split()
    conversations = []
    for number in range(clients):
        share = number / max(1, clients - 1)
        tokens = SHORTEST * (LONGEST / SHORTEST) ** share
        # the log has about 1.25 tokens a word; some room for the template
        length = min(len(words), int((tokens - 60) / 1.25))
        first = (len(words) - length) * (number % 4) // 4
        text = " ".join(words[first : first + length])
        content = f"Note {number}. {text}\n\nTell at length what happened, in your own words."
        conversations.append([{"role": "user", "content": content}])
    return conversations


def compare(clients: int, new_tokens: int) -> dict[str, Any]:
    """Serve the same prompts one at a time and all at once."""
    asked = prompts(clients)
    with serving() as server:
        client = server.client()
        ask(client, [{"role": "user", "content": "Hello"}], 4)
        begin = time.perf_counter()
        alone = [ask(client, messages, new_tokens) for messages in asked]
        alone_s = time.perf_counter() - begin
    with serving("--forget-seconds", "2") as server:
        client = server.client()
        ask(client, [{"role": "user", "content": "Hello"}], 4)
        before = server.resident()
        begin = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            jobs = [pool.submit(ask, server.client(), each, new_tokens) for each in asked]
            together = [job.result() for job in jobs]
        together_s = time.perf_counter() - begin
        most = server.resident()
        time.sleep(6)
        after = server.resident()
    tokens = sum(each.tokens for each in together)
    return {
        "prompt_tokens": [each.prompt_tokens for each in alone],
        "answer_tokens": tokens,
        "same_answers": sum(a.text == b.text for a, b in zip(alone, together, strict=True)),
        "alone_s": alone_s,
        "together_s": together_s,
        "speedup": alone_s / together_s,
        "tokens_per_s": tokens / together_s,
        "alone_first_s": [round(each.first_s, 2) for each in alone],
        "together_first_s": [round(each.first_s, 2) for each in together],
        "alone_total_s": [round(each.total_s, 2) for each in alone],
        "together_total_s": [round(each.total_s, 2) for each in together],
        "resident_before": before,
        "resident_at_end": most,
        "resident_after": after,
        "left_over": after / before - 1,
    }


def second_turn(new_tokens: int) -> dict[str, Any]:
    """Time a long conversation's turns, with a restart before the last."""
    with tempfile.TemporaryDirectory() as folder:
        options = ("--conversations", folder)
        messages = prompts(2)[1]
        with serving(*options) as server:
            first = ask(server.client(), messages, new_tokens)
            messages = [*messages, {"role": "assistant", "content": first.text}]
            question = [*messages, {"role": "user", "content": "Who was the leader?"}]
            second = ask(server.client(), question, new_tokens)
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        with serving(*options) as server:
            ask(server.client(), [{"role": "user", "content": "Hello"}], 4)
            again = ask(server.client(), question, new_tokens)
    return {
        "prompt_tokens": first.prompt_tokens,
        "first_turn_s": first.first_s,
        "second_turn_s": second.first_s,
        "second_share": second.first_s / first.first_s,
        "second_cached": second.cached_tokens,
        "restart_s": again.first_s,
        "restart_share": again.first_s / first.first_s,
        "restart_cached": again.cached_tokens,
        "same_answer": again.text == second.text,
        "disk_bytes": disk,
    }


def main() -> None:
    """Run what is asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--skip", choices=["clients", "turns"])
    args = parser.parse_args()
    found: dict[str, Any] = {"clients": args.clients, "cores": len(os.sched_getaffinity(0))}
    if args.skip != "clients":
        found["many"] = compare(args.clients, args.new_tokens)
    if args.skip != "turns":
        found["turns"] = second_turn(32)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
