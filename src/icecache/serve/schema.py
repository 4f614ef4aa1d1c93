"""What clients send: OpenAI's bodies, checked before any work is done.

What is known and cannot be done (logprobs, several answers, tools) is refused by name; what is
unknown too, so that a misspelt field does not pass silently.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

__all__ = ["ChatBody", "CompletionBody", "Message", "StreamOptions"]

_MOST_STOPS = 8


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be text that UTF-8 can hold") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = Field(default=None, max_length=64)
    refusal: None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class _Body(_Strict):
    """What both kinds of requests have."""

    model: Text
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 31)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(1 << 63), le=(1 << 63) - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None
    # not OpenAI's: tokens that a KV head attends in a step, and a live view in the stream
    budget: int | None = Field(default=None, ge=1, le=1 << 31)
    live: bool = False
    # taken where they ask for nothing, refused by name where they do
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> list[str]:
        """The texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def _refused(self) -> dict[str, bool]:
        """Return, by name, whether something is asked for that cannot be done."""
        return {
            "n": self.n not in (None, 1),
            "presence_penalty": bool(self.presence_penalty),
            "frequency_penalty": bool(self.frequency_penalty),
            "logit_bias": bool(self.logit_bias),
        }

    @model_validator(mode="after")
    def _refuse(self) -> "_Body":
        for name, is_asked in self._refused().items():
            if is_asked:
                raise ValueError(f"{name} is not supported; leave it out")
        return self


class ChatBody(_Body):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 31)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    response_format: dict[str, Any] | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Tokens of the answer at most, None if the client does not say."""
        return self.max_completion_tokens or self.max_tokens

    def _refused(self) -> dict[str, bool]:
        wants_format = self.response_format not in (None, {"type": "text"})
        return {
            **super()._refused(),
            "logprobs": bool(self.logprobs or self.top_logprobs),
            "tools": bool(self.tools),
            "response_format": wants_format,
        }


class CompletionBody(_Body):
    """Body of ``/v1/completions``."""

    prompt: (
        Text
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=1)]
        | Annotated[list[list[TokenId]], Field(min_length=1, max_length=1)]
    )
    logprobs: int | None = None
    echo: bool | None = None
    suffix: Text | None = None
    best_of: int | None = None

    @property
    def most_tokens(self) -> int:
        """Tokens of the answer at most; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def text_or_ids(self) -> str | list[int]:
        """The prompt, a text or token ids."""
        if isinstance(self.prompt, str):
            return self.prompt
        first = self.prompt[0]
        return self.prompt if isinstance(first, int) else first  # type: ignore[return-value]

    def _refused(self) -> dict[str, bool]:
        return {
            **super()._refused(),
            "logprobs": self.logprobs is not None,
            "echo": bool(self.echo),
            "suffix": bool(self.suffix),
            "best_of": self.best_of not in (None, 1),
        }
