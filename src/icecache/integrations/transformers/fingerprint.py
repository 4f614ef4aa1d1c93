"""Which model a snapshot belongs to: its config, and a sample of all its weights."""

import hashlib
import json

import torch
from transformers import PreTrainedModel

__all__ = ["fingerprint"]

_SAMPLED = 64
# what may change without a change of the keys and values that the model makes
_FREE = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """Return the checksums of a model's config and weights.

    Of every weight, name, shape, dtype and some numbers evenly spread over it are taken: a model
    that was trained further differs in them, and reading all would take as long as loading it.
    """
    config = {name: x for name, x in model.config.to_dict().items() if name not in _FREE}
    text = json.dumps(config, sort_keys=True, default=str)
    weights = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        step = max(1, weight.numel() // _SAMPLED)
        sample = weight.detach().view(-1)[::step] if weight.is_contiguous() else weight.detach()
        weights.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        weights.update(sample.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "class": type(model).__name__,
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "weights": weights.hexdigest(),
    }
