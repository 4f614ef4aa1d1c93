"""What the tests share: prompts, and engines in processes of their own, one core each."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[2]
POOL_BYTES = 1 << 30
# no network, no report of use, and no thread bound to a core: ranks share what there is
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Answers = dict[str, Any]
Run = Callable[..., Answers]


def run_script(
    python: str, name: str, task: Answers, folder: Path, timeout: float, **environment: str
) -> Answers:
    """Run a script of this folder on a task; end it and its children when it takes too long."""
    asked, answered, log = folder / "in.json", folder / "out.json", folder / "log.txt"
    asked.write_text(json.dumps(task))
    answered.unlink(missing_ok=True)
    with log.open("w") as stream:
        process = subprocess.Popen(
            [python, str(HERE / name), str(asked), str(answered)],
            env={**os.environ, **ENVIRONMENT, **environment},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(errors="replace")
    if not answered.exists():
        pytest.fail(f"{name} ended with {process.returncode}:\n{text[-6000:]}")
    return {**json.loads(answered.read_text()), "output": text}


@pytest.fixture(scope="session")
def model() -> str:
    """The folder of the embedded model, which ``make vllm-test`` has exported."""
    return os.environ["ICECACHE_VLLM_MODEL"]


@pytest.fixture(scope="session")
def text(model: str) -> list[int]:
    """The tokens of a long text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    source = REPOSITORY / "src" / "icecache" / "cli" / "data" / "expedition.txt"
    ids: list[int] = tokenizer(source.read_text())["input_ids"]
    return ids


def save_tiny(name: str, folder: Path, **more: Any) -> str:
    """Save a random model of a family, four layers of two KV heads, and return its folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        **({"sliding_window": 64} if name == "Gemma3Text" else {}),
        **more,
    )
    if name == "Gemma3Text":
        config.layer_types = ["sliding_attention", "full_attention"] * 2
    family = name.removesuffix("Text")
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def prompts(text: list[int]) -> list[list[int]]:
    """Eight prompts of very different lengths."""
    lengths = (1600, 40, 1611, 300, 900, 5, 1580, 257)
    return [text[600 * i : 600 * i + length] for i, length in enumerate(lengths)]


def selected(**settings: Any) -> dict[str, Any]:
    """Return the engine argument that selects IceCache."""
    transfer = {"kv_connector": "IceCacheConnector", "kv_role": "kv_producer"}
    return {"kv_transfer_config": {**transfer, "kv_connector_extra_config": settings}}


def fake_engine(**settings: Any) -> Any:
    """Return what the plugin reads of an engine's configuration."""
    transfer = SimpleNamespace(kv_connector="IceCacheConnector", kv_connector_extra_config=settings)
    ones = ("pipeline_parallel_size", "decode_context_parallel_size", "local_world_size")
    more = ("prefill_context_parallel_size", "data_parallel_size_local")
    return SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=SimpleNamespace(**dict.fromkeys((*ones, *more), 1)),
        model_config=SimpleNamespace(max_model_len=1000),
        use_v2_model_runner=False,
        speculative_config=None,
        cache_config=SimpleNamespace(cache_dtype="auto", enable_prefix_caching=False),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
    )


@pytest.fixture(scope="session")
def engine(model: str) -> dict[str, Any]:
    """The engine arguments that all runs share: prompts in 256-token chunks beside decodes."""
    return {
        "model": model,
        "dtype": "float32",
        "max_model_len": 8192,
        "max_num_batched_tokens": 256,
        "enforce_eager": True,
        "kv_cache_memory_bytes": POOL_BYTES,
    }


@pytest.fixture(scope="session")
def run(
    engine: dict[str, Any],
    prompts: list[list[int]],
    worker_id: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """A function that answers the prompts by one engine with more arguments, once a round.

    What one worker has asked another does not ask again.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def answer(
        arguments: dict[str, Any],
        *rounds: dict[str, Any],
        one_process: bool = True,
        asked: list[list[int]] = prompts,
    ) -> Answers:
        task: Answers = {"engine": {**engine, **arguments}, "prompts": asked}
        task |= {"rounds": rounds or [{}], "max_tokens": [24] * len(asked)}
        more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if one_process else "1"}
        name = hashlib.sha256(json.dumps([task, more]).encode()).hexdigest()[:16]
        where, kept = shared / f"engine-{name}", shared / f"engine-{name}.json"
        with FileLock(shared / f"engine-{name}.lock"):
            if not kept.exists():
                where.mkdir(exist_ok=True)
                # a model compiled in an earlier run is not found
                more["VLLM_CACHE_ROOT"] = str(where / "cache")
                found = run_script(sys.executable, "run_engine.py", task, where, 900, **more)
                kept.write_text(json.dumps(found))
        answers: Answers = json.loads(kept.read_text())
        return answers

    return answer


@pytest.fixture(scope="session")
def stock(run: Run) -> Answers:
    """What vLLM answers without us."""
    return run({})


@pytest.fixture(scope="session")
def sparse(run: Run) -> Answers:
    """A budget of 256: whole prompts, as our transformers path takes them, and then chunks."""
    return run({"max_num_batched_tokens": 8192, **selected(budget=256)}, {}, {"at_once": 256})


def tokens_of(run: Answers, number: int = 0) -> list[list[int]]:
    """Return the tokens of a round's answers."""
    return [answer["tokens"] for answer in run["rounds"][number]["answers"]]


def work_of(run: Answers) -> dict[int, tuple[int, int, int]]:
    """Return what the log says of each request: sparse steps, dense steps, host bytes freed."""
    line = (
        r"request (\d+)-\S+ ended with \d+ tokens, (\d+) sparse and (\d+) dense steps; (\d+) host"
    )
    found = [[int(group) for group in groups] for groups in re.findall(line, run["output"])]
    return {number: (sparse, dense, host) for number, sparse, dense, host in found}


def first_difference(ours: Answers, theirs: Answers) -> int:
    """Return at which step two answers part, or their length."""
    pairs = enumerate(zip(ours["tokens"], theirs["tokens"], strict=True))
    return next((i for i, (mine, other) in pairs if mine != other), len(ours["tokens"]))


def num_alike(ours: list[Answers], theirs: list[Answers], close: float) -> int:
    """Return how many answers are the same; each other one must part at a close call.

    Until then the log-probabilities of the best two, and there the two's difference, are within
    ``close``.
    """
    same = 0
    for mine, other in zip(ours, theirs, strict=True):
        first, steps = first_difference(mine, other), len(other["tokens"])
        same += first == steps
        for top, their_top in zip(mine["top"][:first], other["top"][:first], strict=True):
            assert top == pytest.approx(their_top, abs=close)
        if first < steps:
            assert other["top"][first][0] - other["top"][first][1] < close
    return same
