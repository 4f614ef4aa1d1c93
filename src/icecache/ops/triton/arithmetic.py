"""Functions that several kernels call."""

import triton
import triton.language as tl

__all__ = ["count_bits", "divisor", "everywhere", "logsumexp", "quantize", "safe", "squash", "tanh"]


@triton.jit
def count_bits(masks):
    """Return how many bits of each int64 are set."""
    x = masks - ((masks >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return (x + (x >> 32)) & 127


@triton.jit
def everywhere(flag, like):
    """Return a scalar bool for each element of an int tensor; the interpreter spreads ints only."""
    return like * 0 + flag.to(tl.int32) != 0


@triton.jit
def tanh(x):
    """Return tanh without libdevice, which the interpreter does not have."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def squash(logits, SOFTCAP: tl.constexpr):
    """Apply a softcap; 0 is none."""
    if SOFTCAP > 0:
        logits = SOFTCAP * tanh(logits / SOFTCAP)
    return logits


@triton.jit
def safe(largest):
    """Return what to subtract before exp: 0 where there is nothing."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def divisor(total):
    """Return what to divide by: 1 where there is nothing."""
    return tl.where(total > 0, total, 1.0)


@triton.jit
def logsumexp(x, axis: tl.constexpr):
    """Return log-sum-exp along an axis; -inf of nothing."""
    largest = safe(tl.max(x, axis))
    total = tl.sum(tl.exp(x - tl.expand_dims(largest, axis)), axis)
    return tl.where(total > 0, largest + tl.log(divisor(total)), -float("inf"))


@triton.jit
def quantize(x):
    """Return int8 codes and the scale of one vector."""
    # plain division is approximate when compiled, and codes must be the twin's
    scale = tl.div_rn(tl.max(tl.abs(x), 0), 127.0)
    codes = tl.floor(tl.div_rn(x, divisor(scale)) + 0.5)
    codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
    return tl.where(scale > 0, codes, 0.0).to(tl.int8), scale
