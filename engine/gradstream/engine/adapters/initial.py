"""The values an adapter starts with."""

import hashlib

import torch
from torch import Tensor

from gradstream.engine.adapters.layout import AdapterLayout
from gradstream.shared.ids import ModelId

_SEED_BITS = 63


def resolve_seed(seed: int | None, *, engine_seed: int, model_id: ModelId) -> int:
    """The client's seed, or one made from the engine's seed and the model's id."""
    return _hash(f"{engine_seed}:{model_id}") if seed is None else seed


def merge_seed(seed: int, number: int) -> int:
    """Of the factors that are drawn at an adapter's merge number, from 1. seed: the adapter's."""
    return _hash(f"{seed}:merge:{number}")


def initial_weights(layout: AdapterLayout, *, seed: int) -> Tensor:
    """Flat fp32 CPU weights: a uniform in +-1/sqrt(in features), as nn.Linear and peft draw it; b zero.

    Each site has its own generator, seeded by (seed, site name), so one site's values do not depend on which others are trained.
    """
    flat = torch.zeros(layout.num_params, dtype=torch.float32)
    views = layout.named_views(flat)
    for site in layout.sites:
        generator = torch.Generator().manual_seed(_hash(f"{seed}:{site.name}"))
        bound = site.in_features**-0.5
        views[site.name].a.uniform_(-bound, bound, generator=generator)
    return flat


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - _SEED_BITS)
