"""Entry point of ``icecache``: turns every expected failure into one line and exit code 1."""

import importlib.util
import sys

from icecache.errors import BackendUnavailable, IceCacheError

__all__ = ["main"]

_NEEDED = ("typer", "rich", "transformers")


def main() -> None:
    """Run the command line with `sys.argv`; exits with 0, 1 (failure) or 2 (wrong usage)."""
    try:
        _check_installed()
        from icecache.cli.app import app

        app()
    except IceCacheError as error:
        sys.stderr.write(f"icecache: {' '.join(str(error).split())}\n")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _check_installed() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailable(
            f"the command line needs {', '.join(missing)}: pip install 'icecache[demo]'"
        )
