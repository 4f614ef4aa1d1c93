"""What the tests share: prompts, and engines run one at a time in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


def save_tiny(name: str, folder: Path) -> str:
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
    engine: dict[str, Any], prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A function that answers the prompts by an engine with more arguments."""

    def answer(arguments: dict[str, Any], *, one_process: bool = True, **task: Any) -> Answers:
        full: Answers = {"engine": {**engine, **arguments}, "prompts": prompts, **task}
        full["max_tokens"] = [24] * len(prompts)
        where = tmp_path_factory.mktemp("engine")
        alone = "0" if one_process else "1"
        more = {"VLLM_ENABLE_V1_MULTIPROCESSING": alone}
        return run_script(sys.executable, "run_engine.py", full, where, 900, **more)

    return answer


@pytest.fixture(scope="session")
def stock(run: Run) -> Answers:
    """What vLLM answers without us."""
    return run({})
