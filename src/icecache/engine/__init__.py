"""Many requests at once: packed forwards of ragged batches, each request with its own cache."""

from icecache.engine.engine import Engine
from icecache.engine.request import Finish, Output, Request, Sampling
from icecache.engine.settings import EngineSettings
from icecache.engine.stats import EngineStats

__all__ = ["Engine", "EngineSettings", "EngineStats", "Finish", "Output", "Request", "Sampling"]
