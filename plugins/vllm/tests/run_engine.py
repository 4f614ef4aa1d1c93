"""One vLLM engine in a process of its own: prompts in, tokens and figures out, as JSON.

``python run_engine.py IN.json OUT.json``; IN: ``engine`` (arguments of `vllm.LLM`), ``prompts``
(token ids), ``max_tokens``, ``new_tokens`` of each prompt optionally.
"""

import json
import logging
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


class Kept(logging.Handler):
    """Keeps vLLM's own lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(asked: Path, answered: Path) -> None:
    task = json.loads(asked.read_text())
    kept = Kept()
    logging.getLogger("vllm").addHandler(kept)
    llm = LLM(**task["engine"])
    sampling = [
        SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True, logprobs=5)
        for most in task["max_tokens"]
    ]
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    answers = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "top": [
                sorted((each.logprob for each in step.values()), reverse=True)[:2]
                for step in output.outputs[0].logprobs
            ],
            "cached": output.num_cached_tokens,
        }
        for output in outputs
    ]
    answered.write_text(json.dumps({"answers": answers, "log": kept.lines}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
