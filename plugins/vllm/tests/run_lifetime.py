"""Two hundred requests of which a third is aborted, in this process, so that all can be looked at.

``python run_lifetime.py IN.json OUT.json``; IN: ``engine`` (arguments of `vllm.LLM`),
``num_requests``, ``seed``, ``preempt_at``. Run with
``VLLM_ENABLE_V1_MULTIPROCESSING=0``.
"""

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import get_kv_transfer_group


def main(asked: Path, answered: Path) -> None:
    task = json.loads(asked.read_text())
    draw = Random(task["seed"])
    engine = LLM(**task["engine"]).llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    ledger, pool = scheduler.connector.reservations, scheduler.kv_cache_manager.block_pool
    layers = get_kv_transfer_group().layers
    seen: dict[str, Any] = {"aborted": 0, "finished": 0, "most_held": 0, "most_reserved": 0}
    seen |= {"withheld": 0, "most_running": 0, "limit": ledger.limit, "worst": 0.0}
    seen["free_before"] = pool.get_num_free_blocks()
    names = {}
    for number in range(task["num_requests"]):
        ids = [draw.randrange(3, 500) for _ in range(draw.randint(10, 260))]
        sampling = SamplingParams(temperature=0.0, max_tokens=draw.randint(2, 10), ignore_eos=True)
        sampling.detokenize = False
        names[number] = engine.add_request(str(number), {"prompt_token_ids": ids}, sampling)
    waiting = set(names)
    step = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                seen["finished"] += 1
                waiting.discard(int(output.request_id))
        step += 1
        num_running = len(scheduler.running)
        seen["most_running"] = max(seen["most_running"], num_running)
        has_blocks = pool.get_num_free_blocks() > 0
        seen["withheld"] += bool(scheduler.waiting and num_running < 64 and has_blocks)
        # what has ended goes at the start of the next step, before anything begins
        running = {name: layers._running[name].host_bytes() for name in ledger._held}
        held = sum(running.values())
        over = (bytes_ / ledger._held[name] for name, bytes_ in running.items() if bytes_)
        seen["worst"] = max(seen["worst"], max(over, default=0.0))
        seen["most_held"] = max(seen["most_held"], held)
        seen["most_reserved"] = max(seen["most_reserved"], ledger.reserved)
        if waiting and draw.random() < 0.6:
            number = draw.choice(sorted(waiting))
            engine.abort_request([names[number]], internal=True)
            waiting.discard(number)
            seen["aborted"] += 1
        if step in task["preempt_at"]:
            engine.reset_prefix_cache(reset_running_requests=True)
    engine.step()
    seen["steps"] = step
    seen["held"], seen["reserved"] = layers.host_bytes, ledger.reserved
    seen["known"] = ledger.num_known + layers.num_running
    seen["free_after"] = pool.get_num_free_blocks()
    answered.write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
