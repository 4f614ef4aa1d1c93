"""What a whole cache holds and did."""

from dataclasses import dataclass

from icecache.cache.stats import LayerStats

__all__ = ["CacheStats"]


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Statistics of one `IceCache`: sums over the managed layers, and each of them.

    Parameters
    ----------
    budget : int
        Tokens that a KV head may attend exactly in a step.
    num_layers : int
        Of the model; those that IceCache does not manage have no entry in `layers`.
    layers : dict of int to LayerStats
        By layer index.
    """

    budget: int
    num_layers: int
    layers: dict[int, LayerStats]

    @property
    def tokens(self) -> int:
        """Tokens of the longest row, padding excluded."""
        return max((layer.tokens for layer in self.layers.values()), default=0)

    @property
    def pages(self) -> int:
        """Pages of all layers."""
        return sum(layer.pages for layer in self.layers.values())

    @property
    def device_bytes(self) -> int:
        """Bytes on the model's device."""
        return sum(layer.device_bytes for layer in self.layers.values())

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return sum(layer.host_bytes for layer in self.layers.values())

    @property
    def index_bytes(self) -> int:
        """Bytes of summaries and trees, wherever they are."""
        return sum(layer.index_bytes for layer in self.layers.values())

    @property
    def sparse_steps(self) -> int:
        """Attention calls within the budget, summed over layers."""
        return sum(layer.sparse_steps for layer in self.layers.values())

    @property
    def reused_steps(self) -> int:
        """Sparse steps that attended to another layer's selection, summed over layers."""
        return sum(layer.reused_steps for layer in self.layers.values())

    @property
    def dense_steps(self) -> int:
        """Attention calls over everything (prompts, short contexts), summed over layers."""
        return sum(layer.dense_steps for layer in self.layers.values())

    @property
    def tokens_attended(self) -> float:
        """Tokens a KV head attended exactly in the last sparse step, mean over the layers."""
        ran = [layer.tokens_attended for layer in self.layers.values() if layer.sparse_steps]
        return sum(ran) / len(ran) if ran else 0.0
