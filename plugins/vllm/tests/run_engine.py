"""One vLLM engine in a process of its own: prompts in, tokens and figures out, as JSON.

``python run_engine.py IN.json OUT.json``; IN: ``engine`` (arguments of `vllm.LLM`), ``prompts``
(token ids), ``max_tokens`` (of each), ``rounds``, in each of which the engine answers all prompts:
``preempt_at`` (steps after which all running requests are thrown out and start again) and
``at_once`` (tokens that a step may take, of the engine's ``max_num_batched_tokens``).
Requests are numbered through all rounds.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def answer_of(output: Any) -> dict[str, Any]:
    """Return tokens, and the log-probabilities of the best two at each step."""
    completion = output.outputs[0]
    tops = (sorted(each.logprob for each in step.values()) for step in completion.logprobs)
    return {
        "tokens": list(completion.token_ids),
        "top": [top[:-3:-1] for top in tops],
        "cached": output.num_cached_tokens,
    }


def answer_all(
    engine: Any, task: dict[str, Any], first: int, how: dict[str, Any]
) -> dict[str, Any]:
    """Return the answers of a round, its requests numbered from ``first``, and its steps."""
    for number, (ids, most) in enumerate(zip(task["prompts"], task["max_tokens"], strict=True)):
        sampling = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True, logprobs=2)
        sampling.detokenize = not task["engine"].get("skip_tokenizer_init", False)
        engine.add_request(str(first + number), {"prompt_token_ids": ids}, sampling)
    answers: dict[int, dict[str, Any]] = {}
    step = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                answers[int(output.request_id)] = answer_of(output)
        step += 1
        if step in how.get("preempt_at", ()):
            engine.reset_prefix_cache(reset_running_requests=True)
    return {"answers": [answers[number] for number in sorted(answers)], "steps": step}


def main(asked: Path, answered: Path) -> None:
    task = json.loads(asked.read_text())
    engine = LLM(**task["engine"]).llm_engine
    is_alone = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    rounds = []
    for index, how in enumerate(task["rounds"]):
        if "at_once" in how:
            engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = how["at_once"]
        rounds.append(answer_all(engine, task, index * len(task["prompts"]), how))
        if is_alone:
            # tells the worker of the last end; a process of its own takes this step by itself
            engine.step()
    answered.write_text(json.dumps({"rounds": rounds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
