"""Whole caches saved and loaded: they go on bit for bit, and with their own model alone."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from zoo import SMALL, build, family, left_padded

import icecache
from icecache.errors import InputError, SnapshotMismatch, UnsupportedModel

IDS, MASK = left_padded([47, 60])


def turn(
    model: PreTrainedModel, cache: icecache.IceCache, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate six tokens; returns all ids and the logits."""
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "gemma4"])
def test_a_second_turn_is_the_same_after_loading(tmp_path: Path, name: str) -> None:
    model = build(family(name))
    ids, mask = (IDS[1:], MASK[1:]) if name == "gemma4" else (IDS, MASK)
    with icecache.attach(model):
        cache = icecache.IceCache(model, **SMALL)
        ids, _ = turn(model, cache, ids, mask)
        cache.save(tmp_path / "snap", {"title": "x"})
        again = icecache.IceCache.load(tmp_path / "snap", model)
        assert again.settings == cache.settings
        assert again.about == {"title": "x"}
        assert again.num_tokens == cache.num_tokens
        more = torch.randint(3, 127, (len(ids), 9))
        ids = torch.cat([ids, more], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)
        first, second = (turn(model, each, ids, mask) for each in (cache, again))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert again.stats().sparse_steps == cache.stats().sparse_steps > 0


def test_only_its_own_model_and_settings_load_it(tmp_path: Path) -> None:
    model, folder = build(family("llama")), tmp_path / "snap"
    with icecache.attach(model):
        cache = icecache.IceCache(model, **SMALL)
        turn(model, cache, IDS, MASK)
        cache.save(folder)
    with pytest.raises(SnapshotMismatch, match="other settings: budget=20, not 21"):
        icecache.IceCache.load(folder, model, cache.settings.replace(budget=21))
    icecache.IceCache.load(folder, model, cache.settings)
    with pytest.raises(SnapshotMismatch, match="its class differs"):
        icecache.IceCache.load(folder, build(family("qwen2")))
    with pytest.raises(SnapshotMismatch, match="its config differs"):
        icecache.IceCache.load(folder, build(family("llama"), rope_theta=5000.0))
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(SnapshotMismatch, match="its weights differs"):
        icecache.IceCache.load(folder, model)


def test_a_model_in_another_dtype_is_another_model(tmp_path: Path) -> None:
    model = build(family("llama"))
    icecache.IceCache(model, **SMALL).save(tmp_path / "snap")
    with pytest.raises(SnapshotMismatch, match="another model"):
        icecache.IceCache.load(tmp_path / "snap", model.bfloat16())


def test_what_cannot_be_saved_says_so(tmp_path: Path) -> None:
    model = build(family("llama"))
    with pytest.raises(InputError, match="made from a config alone"):
        icecache.IceCache(model.config).save(tmp_path / "snap")
    model = build(family("lfm2"))
    with pytest.raises(UnsupportedModel, match="layer 0 is left to the model"):
        icecache.IceCache(model).save(tmp_path / "snap")
    assert list(tmp_path.iterdir()) == []


def test_no_snapshot_and_a_swapped_part(tmp_path: Path) -> None:
    model, folder = build(family("llama")), tmp_path / "snap"
    with pytest.raises(SnapshotMismatch, match="no snapshot in"):
        icecache.IceCache.load(folder, model)
    with icecache.attach(model):
        cache = icecache.IceCache(model, **SMALL)
        turn(model, cache, IDS, MASK)
    cache.save(folder)
    first, second = folder.glob("layer-000-*"), folder.glob("layer-001-*")
    next(second).write_bytes(next(first).read_bytes())
    with pytest.raises(SnapshotMismatch, match="its checksum differs"):
        icecache.IceCache.load(folder, model)
