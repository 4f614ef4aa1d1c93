"""The figures of a live view."""

from typing import Any

from icecache.engine import Request

__all__ = ["figures"]


def figures(request: Request) -> dict[str, Any]:
    """Return what a request's caches hold and do now."""
    stats = [layer.stats() for layer in request.layers]
    attended = [each.tokens_attended for each in stats]
    tpot = request.seconds_per_token
    return {
        "phase": request.phase.value,
        "prompt_tokens": len(request.prompt),
        "context_tokens": request.num_tokens,
        "cached_tokens": request.num_cached,
        "attended_tokens": round(sum(attended) / len(attended), 1) if attended else None,
        "resident_bytes": sum(each.host_bytes for each in stats),
        "mass_captured": None if request.watch is None else request.watch.mass,
        "seconds_per_token": None if tpot is None else round(tpot, 4),
    }
