"""A conversation on the command line, saved after one answer and gone on with later."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from icecache.cli.session import Run, check_length, end_ids
from icecache.config import IceCacheConfig
from icecache.errors import InputError
from icecache.integrations.transformers import IceCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["encode_follow_up", "load_conversation", "save_conversation"]

# stands for the answer that the cache holds already, in text that is made around it
_ANSWER = "\u241eanswer\u241e"


def save_conversation(folder: Path, cache: IceCache, model: "PreTrainedModel", run: Run) -> None:
    """Save a cache after an answer, whose last token it has not taken in."""
    last = run.token_ids[-1]
    # a template closes the answer itself
    waiting = [] if last in end_ids(model) else [last]
    try:
        cache.save(folder, {"waiting": waiting})
    except OSError as error:
        raise InputError(f"the conversation cannot be saved: {error}") from error


def load_conversation(folder: Path, model: "PreTrainedModel", config: IceCacheConfig) -> IceCache:
    """Return a saved cache; settings that were given must be those it was made with."""
    wanted = None if config == IceCacheConfig() else config
    return IceCache.load(folder, model, wanted)


def encode_follow_up(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    cache: IceCache,
    question: str,
    max_new_tokens: int,
) -> torch.Tensor:
    """Return what follows a conversation's last answer, shape ``[1, tokens]``.

    Raises
    ------
    InputError
        The question is empty, does not fit in the model's context, or the model's template has
        no way to go on after an answer.
    """
    if not question.strip():
        raise InputError("the question is empty")
    if tokenizer.chat_template is None:
        text = f"\n\n{question.strip()}\n\nAnswer:"
    else:
        turns = [("user", "question"), ("assistant", _ANSWER), ("user", question.strip())]
        whole = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            add_generation_prompt=True,
            tokenize=False,
        )
        before, mark, text = whole.partition(_ANSWER)
        if not mark:
            raise InputError("the model's chat template leaves earlier answers out: cannot go on")
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [*cache.about.get("waiting", []), *ids]
    check_length(model, cache.num_tokens + len(ids), max_new_tokens)
    return torch.tensor([ids], device=model.device)
