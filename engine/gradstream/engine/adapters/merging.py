"""ReLoRA (Lialin et al. 2023): from time to time an adapter's factors are put aside for good, and fresh ones are trained.

The frozen model is shared, so nothing is added to its weights: what was trained stays with the adapter as frozen factors, before those
that are trained. After m merges an adapter of rank R computes as one of rank R * (m + 1), and trains R of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.adapters.factors import Factors
from gradstream.engine.adapters.initial import initial_weights, merge_seed
from gradstream.engine.config import Merging
from gradstream.shared.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Merge:
    """What the merge after an update needs, made before it: from then on nothing can fail. factors: of the new rank, unwritten."""

    adapter: Adapter
    factors: Factors
    fresh: Tensor
    resets_optimizer: bool

    @torch.no_grad()
    def make(self) -> None:
        """Freeze the factors as they are now and begin with fresh ones, whose b is zero: the adapter computes what it did."""
        adapter, layout = self.adapter, self.adapter.layout
        self.factors.put(adapter.factors.pairs, first=0)
        self.factors.put(layout.pairs(self.fresh), first=self.factors.frozen_rank)
        adapter.take(self.factors)
        if self.resets_optimizer:
            adapter.reset_optimizer()


def is_due(adapter: Adapter, merging: Merging) -> bool:
    """True when the adapter's next update is followed by a merge."""
    return bool(merging.interval) and (adapter.step + 1) % merging.interval == 0


def check_rank(adapter: Adapter, merging: Merging) -> None:
    """Raise InvalidRequest when one more merge would make the adapter's rank too high."""
    rank = _rank_after(adapter)
    if rank > merging.max_rank:
        raise InvalidRequest(
            f"optim_step: step {adapter.step + 1} of model {adapter.model_id} ends with a merge (merge_lora_interval: {merging.interval}), "
            f"which would make its rank {rank}, above max_merged_lora_rank: {merging.max_rank}; no step was made. Save the model, and load "
            "it on a server with a higher limit, or with merge_lora_interval: 0"
        )


def coming_merge(adapter: Adapter, *, resets_optimizer: bool) -> Merge:
    """The next merge of the adapter. The fresh factors are drawn from its seed and the number of the merge."""
    seed, rank, layout = adapter.spec.seed, _rank_after(adapter), adapter.layout
    assert seed is not None, "an adapter's spec has its seed resolved"
    device = adapter.weights.device
    return Merge(
        adapter=adapter,
        factors=Factors.empty(layout.of_rank(rank), frozen_rank=rank - layout.rank, device=device),
        fresh=initial_weights(layout, seed=merge_seed(seed, adapter.num_merges + 1)).to(device),
        resets_optimizer=resets_optimizer,
    )


def _rank_after(adapter: Adapter) -> int:
    return adapter.factors.layout.rank + adapter.layout.rank
