"""Reading what the user points at; whatever is wrong with it becomes one `InputError`."""

import re
from pathlib import Path

from icecache.errors import InputError

__all__ = ["MAX_PROMPT_BYTES", "parse_bytes", "read_prompt"]

MAX_PROMPT_BYTES = 16 * 1024 * 1024
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(name: str, text: str | None) -> int | None:
    """Return a size such as ``48GiB``, ``500MB`` or ``1000`` in bytes, None of None.

    Raises
    ------
    InputError
        The text is no size.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), flags=re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise InputError(f"{name} must be a size such as 48GiB, 500MB or 1000, got {text!r}")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** _UNITS[found[2].upper()])


def read_prompt(path: Path) -> str:
    """Return the text of a UTF-8 file of at most `MAX_PROMPT_BYTES` bytes.

    Raises
    ------
    InputError
        The file is missing, not a file, too large, not text, or empty.
    """
    if not path.exists():
        raise InputError(f"prompt file does not exist: {path}")
    if not path.is_file():
        raise InputError(f"prompt file is not a file: {path}")
    size = path.stat().st_size
    if size > MAX_PROMPT_BYTES:
        raise InputError(
            f"prompt file is too large: {path} has {size:,} bytes, "
            f"the limit is {MAX_PROMPT_BYTES:,}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"prompt file is not UTF-8 text: {path} ({error.reason} at byte {error.start:,})"
        ) from error
    except OSError as error:
        raise InputError(f"prompt file cannot be read: {path} ({error.strerror})") from error
    if "\0" in text:
        raise InputError(f"prompt file is not text: {path} holds NUL characters")
    if not text.strip():
        raise InputError(f"prompt file is empty: {path}")
    return text
