"""Reading what the user points at; whatever is wrong with it becomes one `InputError`."""

from pathlib import Path

from icecache.errors import InputError

__all__ = ["MAX_PROMPT_BYTES", "read_prompt"]

MAX_PROMPT_BYTES = 16 * 1024 * 1024


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
