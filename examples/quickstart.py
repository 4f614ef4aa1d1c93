"""Answer from a document while attending 128 tokens a step.

python examples/quickstart.py
"""

import icecache
from icecache.integrations.embedded import load

DOCUMENT = "\n".join(
    [f"Day {day}. Wind from the north, nothing to report, all dogs well." for day in range(1, 41)]
    + ["Day 41. The cook hid the spare key under the blue lamp."]
    + [f"Day {day}. Snow, nothing to report, all dogs well." for day in range(42, 61)]
)


def main() -> None:
    # any causal model of transformers and its tokenizer will do here
    model, tokenizer = load("embedded")
    question = f"{DOCUMENT}\n\nWhere did the cook hide the spare key?"
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    with icecache.attach(model, budget=128) as attachment:
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    prompt_tokens = inputs["input_ids"].shape[1]
    print(tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True))

    stats = attachment.cache.stats()
    print(f"{stats.tokens} tokens in context, {stats.tokens_attended:.0f} attended a step")


if __name__ == "__main__":
    main()
