"""The models that the decode benchmark runs, and the prompts it gives them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from icecache.errors import InputError
from icecache.integrations.embedded import EMBEDDED, load

_SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
_QWEN = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=151936,
    max_position_embeddings=32768,
    rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
)
SHAPES: dict[str, Any] = {"smollm2-shape": _SMOLLM2, "qwen-0.5b-shape": _QWEN}

_THINGS = ("lamp", "boat", "violin", "garden", "letter", "engine", "mirror")
_PLACES = ("Oslo", "Lima", "Kyoto", "Cairo", "Perth")
_PEOPLE = ("Anna", "Omar", "Julia", "Kenji", "Rosa", "Peter")
_SENTENCES = (
    "Item {i}: the {thing} from {place} was sold to {person} for {price} dollars.",
    "In {place}, {person} wrote a long letter about the {thing} and the price of {price} dollars.",
    "Nobody knows why {person} kept the {thing} of item {i} in a house near {place}.",
    "{person} came back from {place} with {price} dollars and a {thing}, which was later lost.",
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under measurement; without a tokenizer its weights are random."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def is_random(self) -> bool:
        return self.tokenizer is None

    @property
    def decoder(self) -> Any:
        """The config of the part that decodes."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Layers, KV heads and the width of a head."""
        config = self.decoder
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return config.num_hidden_layers, kv_heads, head_dim


def check_model(name: str) -> None:
    """Raise `InputError` for a name that is neither known nor a folder; nothing is loaded."""
    if name not in (EMBEDDED, *SHAPES) and not Path(name).expanduser().is_dir():
        known = ", ".join((EMBEDDED, *SHAPES))
        raise InputError(f"--model must be one of {known}, or the folder of a model, got {name!r}")


def load_subject(name: str, dtype: torch.dtype, seed: int = 0) -> Subject:
    """Load a model, or make one of a known shape with random weights; nothing is downloaded."""
    check_model(name)
    if name not in SHAPES:
        return Subject(name, *load(name, dtype))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=dtype)
    return Subject(name, model.eval(), None)


def prompt_ids(subject: Subject, tokens: int, text: Path | None = None, seed: int = 0) -> Tensor:
    """`tokens` token ids of a text file or of a made-up story: `[1, tokens]`.

    A model with random weights has no tokenizer: its prompt is random token ids.
    """
    if subject.tokenizer is None:
        if text is not None:
            raise InputError(f"--text needs a model with a tokenizer, got {subject.name!r}")
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(subject.decoder.vocab_size, (1, tokens), generator=generator)
    words = made_up_text(tokens) if text is None else _read(text)
    # `verbose` would warn of more tokens than the model was trained for
    found = subject.tokenizer(words, return_tensors="pt", verbose=False)["input_ids"]
    if found.shape[1] < tokens:
        raise InputError(
            f"--text must hold as many tokens as the longest real context, {tokens}; "
            f"{text} has {found.shape[1]}"
        )
    return found[:, :tokens]


def made_up_text(tokens: int) -> str:
    """Sentences of more than `tokens` tokens in all, the same on every run."""
    return " ".join(
        _SENTENCES[i * 7 % 11 % len(_SENTENCES)].format(
            i=i,
            thing=_THINGS[i * i % 7],
            place=_PLACES[i * 3 % 5],
            person=_PEOPLE[i * (i + 1) // 2 % 6],
            price=i * 37 % 911,
        )
        # no sentence has fewer words than eight
        for i in range(tokens // 8 + 1)
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--text must be a UTF-8 text, got {path}: {error.reason}") from error
