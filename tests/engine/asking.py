"""Requests for tests: tiny models, random prompts, and an engine run to its end."""

from typing import Any

import torch
from transformers import PreTrainedModel

from icecache import IceCacheConfig
from icecache.engine import Engine, EngineSettings, Request, Sampling
from tests.integrations.zoo import SMALL, build, family

__all__ = ["CACHE", "engine_of", "llama", "prompt", "run"]

CACHE = IceCacheConfig.from_kwargs(**SMALL)


def llama(name: str = "llama") -> PreTrainedModel:
    """Return a tiny model, of the family llama unless another is named."""
    return build(family(name), max_position_embeddings=1024)


def prompt(seed: int, length: int) -> list[int]:
    """Return random token ids."""
    return torch.randint(3, 127, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def engine_of(model: PreTrainedModel, cache: IceCacheConfig = CACHE, **settings: Any) -> Engine:
    """Return an engine with a small prefill chunk."""
    return Engine(model, EngineSettings(**{"prefill_chunk": 32, **settings}), cache)


def run(engine: Engine, ids: list[int], sampling: Sampling | None = None, **more: Any) -> Request:
    """Serve one request alone."""
    request = engine.add(ids, Sampling(max_tokens=8) if sampling is None else sampling, **more)
    while not request.is_finished:
        engine.step()
    return request
