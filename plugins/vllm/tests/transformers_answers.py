"""The same prompts through our transformers path, from the main environment.

``python transformers_answers.py IN.json OUT.json``; IN as for `run_engine.py`, and ``cache``, the
settings of `icecache.attach`.
"""

import json
import sys
from pathlib import Path

import torch

from icecache import attach
from icecache.integrations.embedded import load


def main(asked: Path, answered: Path) -> None:
    task = json.loads(asked.read_text())
    model, _ = load("embedded", torch.float32)
    # as with ignore_eos
    model.generation_config.eos_token_id = None
    answers = []
    for ids, most in zip(task["prompts"], task["max_tokens"], strict=True):
        with attach(model, **task["cache"]) as attached:
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=most,
                prefill_chunk_size=task.get("chunk"),
                output_logits=True,
                return_dict_in_generate=True,
            )
            sparse = attached.cache.stats().sparse_steps // model.config.num_hidden_layers
        top = torch.stack(out.logits).log_softmax(-1)[:, 0].topk(2).values
        tokens = out.sequences[0, len(ids) :].tolist()
        answers.append({"tokens": tokens, "top": top.tolist(), "sparse": sparse, "cached": 0})
    answered.write_text(json.dumps({"answers": answers}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
