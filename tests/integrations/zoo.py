"""Tiny random models of many families; weights large enough that attention decides the logits."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["COMMON", "SMALL", "ZOO", "Family", "Greedy", "build", "family", "greedy", "left_padded"]

# settings under which a context of sixty tokens is far beyond the budget
SMALL: dict[str, Any] = {
    "budget": 20,
    "sink": 4,
    "window": 8,
    "leaf_size": 4,
    "leaf_target": 3,
    "page_size": 8,
}

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_CHUNKED = ["chunked_attention", "full_attention", "chunked_attention", "full_attention"]


@dataclass(frozen=True)
class Family:
    """One architecture: what its tiny config needs, and what IceCache manages of it."""

    name: str
    model_type: str
    managed: int = 4
    reference: str = "sdpa"
    extra: dict[str, Any] = field(default_factory=dict)


def _sliding(window: int = 16, **extra: Any) -> dict[str, Any]:
    return {"layer_types": _MIXED, "sliding_window": window, **extra}


ZOO = (
    Family("llama", "llama"),
    Family("mistral", "mistral", extra={"sliding_window": None}),
    Family("mistral-sliding", "mistral", managed=0, extra={"sliding_window": 16}),
    Family("ministral", "ministral", managed=2, extra=_sliding()),
    Family("qwen2", "qwen2"),
    Family("qwen3", "qwen3"),
    Family("qwen3_moe", "qwen3_moe", extra=_EXPERTS),
    Family("mixtral", "mixtral", extra=_EXPERTS),
    Family("gemma", "gemma"),
    Family(
        "gemma2",
        "gemma2",
        managed=2,
        reference="eager",
        extra=_sliding(attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
    ),
    Family("gemma3", "gemma3_text", managed=2, extra=_sliding(query_pre_attn_scalar=16)),
    Family(
        "gemma4",
        "gemma4_text",
        managed=1,
        extra=_sliding(
            global_head_dim=32,
            num_global_key_value_heads=1,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=128,
        ),
    ),
    Family("phi", "phi", extra={"num_key_value_heads": 4}),
    Family("phi3", "phi3", extra={"sliding_window": None}),
    Family("gpt_oss", "gpt_oss", managed=2, reference="eager", extra=_sliding(**_EXPERTS)),
    Family("granite", "granite", extra={"attention_multiplier": 0.3}),
    Family("glm4", "glm4"),
    Family("olmo2", "olmo2"),
    Family("olmo3", "olmo3", managed=2, extra=_sliding()),
    Family("cohere2", "cohere2", managed=2, extra=_sliding(logit_scale=1.0)),
    Family("smollm3", "smollm3", extra={"use_sliding_window": False}),
    Family("starcoder2", "starcoder2", extra={"sliding_window": None}),
    Family("gpt_neox", "gpt_neox"),
    Family("gpt2", "gpt2", extra={"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}),
    Family(
        "llama4",
        "llama4_text",
        managed=2,
        extra={
            "layer_types": _CHUNKED,
            "attention_chunk_size": 16,
            "intermediate_size_mlp": 64,
            **_EXPERTS,
        },
    ),
    Family("nemotron", "nemotron", extra={"initializer_range": 0.1}),
    Family("exaone4", "exaone4", managed=2, extra=_sliding()),
    Family(
        "gemma3n",
        "gemma3n_text",
        managed=1,
        extra=_sliding(
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=128,
            intermediate_size=[64] * 4,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0] * 4,
        ),
    ),
    Family(
        "vaultgemma",
        "vaultgemma",
        managed=2,
        reference="eager",
        extra=_sliding(attn_logit_softcapping=2.0, query_pre_attn_scalar=16),
    ),
    Family(
        "lfm2",
        "lfm2",
        managed=2,
        extra={"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    ),
    Family("stablelm", "stablelm"),
    Family("cohere", "cohere", extra={"logit_scale": 1.0}),
    Family("opt", "opt", extra={"ffn_dim": 64, "word_embed_proj_dim": 64}),
    Family("ernie4_5", "ernie4_5"),
    Family(
        "qwen3_next",
        "qwen3_next",
        managed=1,
        extra={
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "shared_expert_intermediate_size": 32,
            **_EXPERTS,
        },
    ),
)

# these look supported; only their attention call shows that they are not
REFUSED = (
    Family("diffllama", "diffllama"),
    Family(
        "mimo_v2_flash",
        "mimo_v2_flash",
        managed=2,
        reference="eager",
        extra=_sliding(
            v_head_dim=8,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=16,
            swa_v_head_dim=8,
            n_routed_experts=4,
            **_EXPERTS,
        ),
    ),
)


def family(name: str) -> Family:
    """Return the family called `name`."""
    return next(member for member in (*ZOO, *REFUSED) if member.name == name)


def build(family: Family, **extra: Any) -> PreTrainedModel:
    """Return the family's tiny model in float32, the same one every time."""
    config = AutoConfig.for_model(family.model_type, **{**COMMON, **family.extra, **extra})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=family.reference)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-1.0, 2.0, parameter.numel()))
    return model.float().eval()


class Greedy(NamedTuple):
    """Generated ids ``[batch, tokens]`` and logits ``[steps, batch, vocab]``."""

    ids: torch.Tensor
    logits: torch.Tensor


def greedy(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    steps: int = 10,
    **kwargs: Any,
) -> Greedy:
    """Generate `steps` tokens greedily."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return Greedy(out.sequences, torch.stack(out.logits))


def left_padded(lengths: list[int], seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random ids and their mask, ``[batch, longest]``, rows padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(3, 127, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()
