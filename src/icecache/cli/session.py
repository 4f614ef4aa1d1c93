"""One prompt, one cache: chunked prefill, greedy decoding, and the distance between two runs.

Both `demo` and `generate` use it; it knows nothing of terminals.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import TextStreamer

from icecache.errors import InputError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "PREFILL_CHUNK",
    "Run",
    "check_length",
    "decode",
    "encode",
    "end_ids",
    "mean_divergence",
    "prefill",
    "replay",
]

PREFILL_CHUNK = 2048
_PROMPT = (
    "Read the following text.\n\n{document}\n\nAnswer this question in one sentence: {question}"
)

Advance = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Run:
    """A greedy answer; `log_probs` has shape ``[len(token_ids), vocabulary]``, float32."""

    token_ids: tuple[int, ...]
    text: str
    log_probs: torch.Tensor
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decode steps a second; the first token came with the prefill."""
        steps = len(self.token_ids) - 1
        return steps / self.seconds if steps > 0 and self.seconds > 0 else 0.0


def encode(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    document: str,
    question: str,
    max_new_tokens: int,
) -> torch.Tensor:
    """Return the token ids of document and question, shape ``[1, tokens]``.

    Raises
    ------
    InputError
        The question is empty, or prompt and answer are longer than the model's context.
    """
    if not question.strip():
        raise InputError("the question is empty")
    content = _PROMPT.format(document=document.strip(), question=question.strip())
    if tokenizer.chat_template is None:
        text = content + "\n\nAnswer:"
    else:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    special = tokenizer.chat_template is None
    ids: torch.Tensor = tokenizer(
        text, return_tensors="pt", add_special_tokens=special, verbose=False
    )["input_ids"]
    check_length(model, ids.shape[1], max_new_tokens)
    return ids


def check_length(model: "PreTrainedModel", tokens: int, max_new_tokens: int) -> None:
    """Raise `InputError` if prompt and answer do not fit in the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens + max_new_tokens > limit:
        raise InputError(
            f"the prompt has {tokens:,} tokens, with {max_new_tokens} new ones more than "
            f"the model's context of {limit:,}"
        )


@torch.inference_mode()
def prefill(
    model: "PreTrainedModel", ids: torch.Tensor, cache: "Cache", advance: Advance
) -> torch.Tensor:
    """Run the prompt through the model in chunks; return the last logits, ``[1, vocabulary]``.

    `advance` hears of every layer that is done with a chunk, in tokens of the whole model.
    """
    decoder = model.get_decoder()
    layers = list(getattr(decoder, "layers", [])) or [decoder]
    for chunk in torch.split(ids, PREFILL_CHUNK, dim=1):
        share = chunk.shape[1] / len(layers)
        with ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(
                    layer.register_forward_hook(lambda *_, share=share: advance(share))
                )
            output = model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: torch.Tensor = output.logits[:, -1]
    return logits


@torch.inference_mode()
def decode(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    logits: torch.Tensor,
    cache: "Cache",
    max_new_tokens: int,
    on_text: Callable[[str], None],
) -> Run:
    """Answer greedily from the prefill's last logits; `on_text` gets each finished piece."""
    ends = end_ids(model)
    streamer = _Pieces(tokenizer, on_text)
    token_ids: list[int] = []
    log_probs: list[torch.Tensor] = []
    start = time.perf_counter()
    while True:
        log_probs.append(logits[0].float().log_softmax(-1))
        token_ids.append(int(log_probs[-1].argmax()))
        if token_ids[-1] in ends:
            break
        streamer.put(torch.tensor(token_ids[-1:]))
        if len(token_ids) == max_new_tokens:
            break
        logits = _step(model, token_ids[-1], cache)
    seconds = time.perf_counter() - start
    streamer.end()
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    return Run(tuple(token_ids), text.strip(), torch.stack(log_probs), seconds)


@torch.inference_mode()
def replay(
    model: "PreTrainedModel", logits: torch.Tensor, cache: "Cache", token_ids: tuple[int, ...]
) -> torch.Tensor:
    """Return the log probabilities at each of the given tokens, ``[tokens, vocabulary]``."""
    found = [logits[0].float().log_softmax(-1)]
    steps = (_step(model, token, cache) for token in token_ids[:-1])
    found.extend(step[0].float().log_softmax(-1) for step in steps)
    return torch.stack(found)


def mean_divergence(full: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean KL(full || other) in nats over the steps after the first token.

    The first distribution is the prefill's own, where both caches attend to everything.
    """
    if len(full) < 2:
        return 0.0
    # renormalised in double precision: what float32 leaves of a sum over the vocabulary is not KL
    sure, unsure = full.double().log_softmax(-1), other.double().log_softmax(-1)
    per_step = (sure.exp() * (sure - unsure)).sum(-1)[1:]
    return float(per_step.mean())


class _Pieces(TextStreamer):  # type: ignore[misc]
    """transformers' streamer with its output handed to a function."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


def _step(model: "PreTrainedModel", token: int, cache: "Cache") -> torch.Tensor:
    ids = torch.tensor([[token]], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
    return logits


def end_ids(model: "PreTrainedModel") -> set[int]:
    """Return the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)
