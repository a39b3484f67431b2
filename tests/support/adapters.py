"""Adapters that change a tiny model noticeably, and their effect on its logits."""

import torch

from gradstream.engine.adapters.adapter import Owner, new_adapter
from gradstream.engine.checkpoint.save import AdapterFiles, save_content
from gradstream.engine.head import logits
from gradstream.shared.ids import LOCAL_TENANT, ModelId, SessionId
from gradstream.shared.wire import LoraSpec

CPU = torch.device("cpu")


def noisy_adapter(base, *, model="s:train:0", tenant=LOCAL_TENANT, spec=None, alpha=24.0, noise_seed=1):
    """An adapter with random weights and moments, three steps old."""
    owner = Owner(
        model_id=ModelId(model), tenant=tenant, session_id=SessionId("s"), spec=spec or LoraSpec(rank=5, seed=3)
    )
    adapter = new_adapter(owner, base_sites=base.sites, lora_alpha=alpha, engine_seed=0, device=CPU)
    generator = torch.Generator().manual_seed(noise_seed)
    shape = adapter.weights.shape
    adapter.weights.add_(torch.randn(shape, generator=generator) * 0.03)
    adapter.exp_avg.copy_(torch.randn(shape, generator=generator))
    adapter.exp_avg_sq.copy_(torch.rand(shape, generator=generator))
    adapter.step = 3
    return adapter


def save_adapter(adapter, order, output_dir, **where):
    """The manifest of the adapter's checkpoint, which is saved as order says; where: budget, drafts and clock of `save_content`."""
    return save_content(AdapterFiles(adapter, order), order, output_dir, **where)


@torch.no_grad()
def forward_logits(base, tokens, weights=None):
    """float32 [T, V] of one sequence by our own pass."""
    adapters = base.adapter_pass([(0, len(tokens), weights)])
    positions = torch.arange(len(tokens))
    hidden = base.hidden(tokens, positions, attention=base.packed([len(tokens)]), adapters=adapters)
    return logits(base, hidden, adapters)
