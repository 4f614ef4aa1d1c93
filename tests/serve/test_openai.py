"""What OpenAI's own client gets from the server."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.serve.running import Running

LINE = "Day {}: the wind came from the north and we mended boots. "
LONG = "".join(LINE.format(day) for day in range(20))


def ask(content: str) -> list[Any]:
    """Return messages of one question."""
    return [{"role": "user", "content": content}]


def chat(client: openai.OpenAI, content: str, **more: Any) -> Any:
    """Ask one question greedily."""
    settings = {"max_tokens": 12, "temperature": 0, **more}
    return client.chat.completions.create(model="tiny", messages=ask(content), **settings)


def streamed(client: openai.OpenAI, content: str, **more: Any) -> tuple[str, list[Any]]:
    """Return a stream's text and all of its chunks."""
    options = {"include_usage": True}
    chunks = list(chat(client, content, stream=True, stream_options=options, **more))
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def encoded(tokenizer: PreTrainedTokenizerBase, content: str) -> list[int]:
    """Return a question's tokens."""
    text = tokenizer.apply_chat_template(ask(content), add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_answer_is_the_models_own(tiny_model: Any, server: Running) -> None:
    """Within the budget: transformers' own generate says the same."""
    from icecache.integrations.embedded import load

    model, tokenizer = load(tiny_model, "float32")
    ids = encoded(tokenizer, "Why?")
    out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    expected = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    found = chat(server.client(), "Why?")
    assert found.choices[0].message.content == expected
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == len(ids)
    assert found.usage.completion_tokens == 12
    assert found.object == "chat.completion"


def test_a_stream_is_the_same_in_pieces(client: openai.OpenAI) -> None:
    text, chunks = streamed(client, LONG)
    assert text == chat(client, LONG).choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len([c for c in chunks if c.choices]) > 6
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 12
    assert len({c.id for c in chunks}) == 1


def test_a_second_turn_names_its_cached_tokens(client: openai.OpenAI, server: Running) -> None:
    first = chat(client, "A talk. " + LONG)
    messages = [
        *ask("A talk. " + LONG),
        {"role": "assistant", "content": first.choices[0].message.content},
        *ask("And then?"),
    ]
    second = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=12, temperature=0
    )
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    held = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens == held


@pytest.mark.parametrize("stream", [False, True])
def test_stops_end_the_answer_before_them(client: openai.OpenAI, stream: bool) -> None:
    whole = chat(client, "Why so?", max_tokens=30).choices[0].message.content
    # across the border of two tokens
    stop = whole[9:16]
    if stream:
        text, chunks = streamed(client, "Why so?", max_tokens=30, stop=["never seen", stop])
        reason = chunks[-2].choices[0].finish_reason
    else:
        choice = chat(client, "Why so?", max_tokens=30, stop=["never seen", stop]).choices[0]
        text, reason = choice.message.content, choice.finish_reason
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"


def test_a_stop_that_does_not_come_takes_nothing_away(client: openai.OpenAI) -> None:
    whole = chat(client, "Why so?").choices[0].message.content
    almost = whole[-3:] + "\u2603"
    assert chat(client, "Why so?", stop=almost).choices[0].message.content == whole
    assert streamed(client, "Why so?", stop=almost)[0] == whole


def test_seeds_repeat_a_draw(client: openai.OpenAI) -> None:
    def draw(seed: int) -> str:
        found = chat(client, "Why?", temperature=1.5, top_p=0.95, seed=seed)
        return str(found.choices[0].message.content)

    assert draw(1) == draw(1) != draw(2)
    assert draw(-7) == draw(-7)


def test_plain_completions(client: openai.OpenAI, server: Running) -> None:
    settings: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}
    first = client.completions.create(prompt="The wind", **settings)
    ids = server.tokenizer("The wind")["input_ids"]
    assert first.usage.prompt_tokens == len(ids)
    for same in (ids, ["The wind"], [ids]):
        again = client.completions.create(prompt=same, **settings)
        assert again.choices[0].text == first.choices[0].text
    pieces = list(client.completions.create(prompt="The wind", stream=True, **settings))
    assert "".join(p.choices[0].text for p in pieces) == first.choices[0].text
    assert client.completions.create(model="tiny", prompt="x").usage.completion_tokens == 16


def test_each_request_has_its_budget(client: openai.OpenAI) -> None:
    content = "Budget. " + LONG
    extra: dict[str, Any] = {"stream": True, "max_tokens": 4, "temperature": 0}

    def attended(**body: Any) -> float:
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=ask(content), extra_body={"live": True, **body}, **extra
            )
        )
        return float(chunks[-1].model_extra["icecache"]["attended_tokens"])

    assert 60 < attended() <= 96
    assert 96 < attended(budget=128) <= 128
    with pytest.raises(openai.BadRequestError, match="budget must be at least"):
        attended(budget=5)


def test_a_live_stream_tells_what_is_held(client: openai.OpenAI) -> None:
    chunks = list(chat(client, "Live. " + LONG, stream=True, extra_body={"live": True}))
    told = [chunk.model_extra["icecache"] for chunk in chunks if "icecache" in chunk.model_extra]
    # while the prompt was read, too
    assert told[0]["phase"] == "prefill"
    assert 0 < told[0]["context_tokens"] < told[0]["prompt_tokens"]
    decoding = [each for each in told if each["phase"] == "decode"]
    assert 0.0 < decoding[-1]["mass_captured"] < 1.0
    assert decoding[-1]["resident_bytes"] > 0
    assert decoding[-1]["seconds_per_token"] > 0


def test_many_clients_get_their_own_answers(server: Running) -> None:
    questions = [LINE.format(n) * (1 + 3 * (n % 7)) for n in range(12)]
    alone = [chat(server.client(), "Alone? " + q, max_tokens=10) for q in questions]
    with ThreadPoolExecutor(12) as pool:
        # each begins otherwise than before, so that nothing is stored, and then is the same again
        jobs = [
            pool.submit(streamed, server.client(), "Alone? " + q, max_tokens=10) for q in questions
        ]
        together = [job.result()[0] for job in jobs]
    assert together == [found.choices[0].message.content for found in alone]
    assert server.stats().reserved_bytes == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"logprobs": True}, "logprobs is not supported"),
        ({"n": 2}, "n is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"extra_body": {"max_tokns": 5}}, "max_tokns"),
        ({"max_tokens": 401}, "max_tokens must be at most 400"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        chat(client, "x", **more)
    assert "Traceback" not in caught.value.response.text


def test_what_asks_for_nothing_is_taken(client: openai.OpenAI) -> None:
    neutral = {"n": 1, "presence_penalty": 0, "logprobs": False, "user": "me", "tools": []}
    assert chat(client, "x", **neutral).choices[0].message.content


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "icecache"
    with pytest.raises(openai.NotFoundError, match=r"no model '\.\./\.\./etc/passwd' here"):
        client.models.retrieve("../../etc/passwd")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"


def test_a_prompt_beyond_the_context_is_refused(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match=r"more than the model's context of 2,048"):
        chat(client, LONG * 20)
    with pytest.raises(openai.BadRequestError, match="far more than fit"):
        chat(client, "a" * 100_000)
    assert server.stats().reserved_bytes == 0
