"""One attention layer under a budget, without transformers.

python examples/layer_alone.py
"""

import torch

from icecache import IceCacheConfig, IceCacheLayer


def clustered_keys(tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Return keys of two KV heads that lie in 64 groups, as real keys do."""
    centres = 4 * torch.randn(1, 2, 64, 64, generator=generator)
    group = torch.randint(64, (tokens,), generator=generator)
    return centres[:, :, group] + torch.randn(1, 2, tokens, 64, generator=generator)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = clustered_keys(4096, generator)
    values = torch.randn(keys.shape, generator=generator)
    layer = IceCacheLayer(IceCacheConfig(), num_kv_heads=2, head_dim=64, dtype=torch.float32)
    layer.prefill(keys[:, :, :4000], values[:, :, :4000])

    for step in range(4000, 4096):
        layer.append(keys[:, :, step : step + 1], values[:, :, step : step + 1])
        query = torch.randn(1, 8, 1, 64, generator=generator)
        output = layer.attend(query)

    full = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    error = float((output - full).norm() / full.norm())
    stats = layer.stats()
    print(f"{stats.tokens} tokens, {stats.tokens_attended:.0f} attended, {stats.pages} pages")
    print(f"relative error against full attention: {error:.3f}")


if __name__ == "__main__":
    main()
