import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import end_to_end  # noqa: E402
import teacher  # noqa: E402
from prompts import Prompt, choose_prompts  # noqa: E402
from row_log import RowLog  # noqa: E402

from icecache import IceCacheConfig  # noqa: E402
from icecache.errors import InputError  # noqa: E402

STEPS = 6


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        # larger than the usual 0.02, so that attention is sharp enough to matter
        initializer_range=0.3,
        eos_token_id=None,
    )
    found = transformers.LlamaForCausalLM(config).eval()
    teacher.use_stores(found)
    return found


@pytest.fixture
def prompt() -> Prompt:
    token_ids = torch.randint(97, (300,), generator=torch.Generator().manual_seed(1))
    return Prompt("task", "0", token_ids.tolist())


def test_greedy_answer_is_that_of_generate(model: Any, prompt: Prompt) -> None:
    ids = torch.tensor(prompt.token_ids)
    answer, log_probs = teacher.greedy_answer(model, teacher.prefill(model, ids, []), STEPS, [])
    model.set_attn_implementation("sdpa")
    expected = model.generate(ids[None], max_new_tokens=STEPS, do_sample=False)[0, len(ids) :]
    teacher.use_stores(model)
    assert answer == expected.tolist()
    assert log_probs.shape == (STEPS, 97)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(STEPS))


def test_rows_and_totals(model: Any, prompt: Prompt) -> None:
    methods = end_to_end.make_methods(["icecache", "topk", "paper", "full"], [128, 64], {})
    rows = end_to_end.measure_prompt(prompt, model, model, methods, STEPS)
    assert [(row["method"], row["budget"]) for row in rows] == [
        (name, budget) for budget in (128, 64) for name in ("icecache", "topk", "paper", "full")
    ]
    for row in rows:
        assert row["tokens"] == 300
        assert 0 <= row["top1"] <= 1
        assert abs(row["kl"]) < 1e-6 if row["method"] == "full" else row["kl"] > 0
    totals = end_to_end.totals(rows)
    found = totals["mean"]["64"]
    assert totals["ratio"]["64"] == found["icecache"]["kl"] / found["topk"]["kl"]
    assert found["icecache"]["prompts"] == 1


def test_budget_above_the_context_has_no_divergence(model: Any, prompt: Prompt) -> None:
    methods = end_to_end.make_methods(["icecache", "topk"], [512], {})
    rows = end_to_end.measure_prompt(prompt, model, model, methods, STEPS)
    assert all(abs(row["kl"]) < 1e-6 for row in rows)
    assert all(row["top1"] == 1.0 for row in rows)


def test_stores_follow_the_first_of_so_many_layers() -> None:
    make = teacher.IceStore.maker(IceCacheConfig(budget=64, layer_reuse=3))
    stores = [make(*torch.randn(2, 1, 100, 16)) for _ in range(7)]
    leaders = [stores.index(store.leader) if store.leader else None for store in stores]
    assert leaders == [None, 0, 0, None, 3, 3, None]
    token = torch.randn(3, 1, 1, 16)
    for store in stores:
        store.step(*token, scaling=0.25)
    assert [store.layer.stats().reused_steps for store in stores] == [0, 1, 1, 0, 1, 1, 0]


def test_banned_tokens_are_never_answered(model: Any, prompt: Prompt) -> None:
    ids = torch.tensor(prompt.token_ids)
    free, _ = teacher.greedy_answer(model, teacher.prefill(model, ids, []), STEPS, [])
    banned = sorted(set(free))
    answer, _ = teacher.greedy_answer(model, teacher.prefill(model, ids, banned), STEPS, banned)
    assert not set(answer) & set(banned)


def test_divergence_by_hand() -> None:
    full, other = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    torch.testing.assert_close(teacher.divergence(full.log(), other.log()), expected)


def fake_row(prompt: Prompt) -> list[dict[str, Any]]:
    row = {"task": prompt.task, "id": prompt.id, "budget": 64, "kl": 0.5, "top1": 1.0}
    return [{**row, "method": name} for name in ("icecache", "topk")]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    prompts = [Prompt("task", str(i), [1]) for i in range(3)]

    def interrupted(prompt: Prompt) -> list[dict[str, Any]]:
        if prompt.id == "1":
            raise KeyboardInterrupt
        return fake_row(prompt)

    with pytest.raises(KeyboardInterrupt):
        end_to_end.run(prompts, interrupted, RowLog(path, {"steps": 1}))
    measured = []

    def measure(prompt: Prompt) -> list[dict[str, Any]]:
        measured.append(prompt.id)
        return fake_row(prompt)

    report = end_to_end.run(prompts, measure, RowLog(path, {"steps": 1}))
    assert measured == ["1", "2"]
    assert report["mean"]["64"]["topk"]["prompts"] == 3
    assert report["ratio"] == {"64": 1.0}
    assert all(row["commit"] for row in report["rows"])
    with pytest.raises(InputError, match="other settings"):
        RowLog(path, {"steps": 2})


class WordTokenizer:
    """One token a word."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text.split())))}


@pytest.fixture
def longbench(tmp_path: Path) -> Path:
    for task, lengths in {"a": [5, 50, 20], "b": [500], "c": [30, 10], "d": [12]}.items():
        samples = [
            {"task": task, "id": f"{task}{i}", "prompt": "x " * length, "answers": []}
            for i, length in enumerate(lengths)
        ]
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (tmp_path / f"{task}.jsonl").write_text(text)
    return tmp_path


def choose(folder: Path, count: int, **options: Any) -> list[str]:
    chosen = choose_prompts(folder, WordTokenizer(), count, 10, 50, **options)  # type: ignore[arg-type]
    return [prompt.id for prompt in chosen]


def test_prompts_fit_and_spread_over_the_tasks(longbench: Path) -> None:
    assert choose(longbench, 3) == ["a1", "c0", "d0"]
    assert choose(longbench, 5) == ["a1", "c0", "d0", "a2", "c1"]
    assert choose(longbench, 2) == ["a1", "c0"]
    assert choose(longbench, 1, tasks=["c"]) == ["c0"]


def test_too_few_prompts_are_refused(longbench: Path) -> None:
    with pytest.raises(InputError, match="5 prompts"):
        choose(longbench, 6)
    with pytest.raises(InputError, match="LongBench"):
        choose(longbench, 1, tasks=["none"])
