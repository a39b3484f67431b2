"""The base model as the engine uses it.

Legend: T tokens of the row, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradstream.engine.adapters.adapter import LoraWeights
from gradstream.engine.adapters.layout import Site
from gradstream.engine.adapters.modules import PassSlot
from gradstream.engine.adapters.passes import AdapterPass
from gradstream.engine.attention.context import AttentionContext, PackedContext
from gradstream.engine.attention.registry import PackedAttention
from gradstream.engine.attention.seam import CONTEXT_KEYWORD
from gradstream.engine.attention.segments import Segments
from gradstream.engine.config import Numerics
from gradstream.engine.models.expert_loads import ExpertLoads
from gradstream.engine.models.flat import FlatParameters
from gradstream.engine.models.offload import ActivationOffload
from gradstream.engine.products import LinearProduct, linear


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the model's files say. digest names the weights (see models.digest)."""

    architecture: str
    vocab_size: int
    num_layers: int
    max_position: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seams:
    """Our parts in a transformers model.

    sites: what adapters can change, the head last; none where the model's own weights train. slot: where its modules find the running
    pass's adapters. flat: the trained weights, None where the model is frozen. offload: where activations wait, None for the device.
    loads: counts what experts get, None where that is not wanted.
    """

    sites: tuple[Site, ...]
    slot: PassSlot
    attention: PackedAttention
    flat: FlatParameters | None = None
    offload: ActivationOffload | None = None
    loads: ExpertLoads | None = None


class BaseModel:
    """A Hugging Face causal LM whose attention goes through our seam.

    causal_lm is the transformers model; its own lm_head is never called, the head module works with head_weight. Either adapters are
    trained: then it is frozen, and its linear layers go through our seams too; or its own weights: then flat holds them, and there are
    no sites.
    """

    def __init__(
        self, causal_lm: nn.Module, *, facts: ModelFacts, seams: Seams, numerics: Numerics | None = None
    ) -> None:
        """numerics None: the defaults."""
        self.causal_lm = causal_lm
        self.facts = facts
        self.numerics = Numerics() if numerics is None else numerics
        self.flat = seams.flat
        self.sites = seams.sites
        self.packed_attention = seams.attention
        self._slot = seams.slot
        self._offload = seams.offload
        self.loads = seams.loads
        self._trunk = causal_lm.get_submodule("model")
        self.head_weight: Tensor = causal_lm.get_parameter("lm_head.weight")

    @property
    def head_site(self) -> Site:
        """Where adapters change the unembedding."""
        return self.sites[-1]

    @property
    def device(self) -> torch.device:
        """Where passes run."""
        return self.head_weight.device if self.flat is None else self.flat.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    @property
    def num_layers(self) -> int:
        return self.facts.num_layers

    @property
    def vocab_size(self) -> int:
        return self.facts.vocab_size

    def packed(self, lengths: list[int], parents: list[int] | None = None) -> PackedContext:
        """The attention context of sequences that lie end to end. parents: the earlier ones that they continue (`Segments`)."""
        return PackedContext(Segments(lengths, device=self.device, parents=parents), self.packed_attention)

    def adapter_pass(self, slices: Sequence[tuple[int, int, LoraWeights | None]]) -> AdapterPass:
        """A pass that trains nothing, from (start, end, LoraWeights or None) in token order."""
        return AdapterPass.inference(slices, compute_dtype=self.compute_dtype)

    @contextmanager
    def collecting(self, grad: Tensor | None) -> Iterator[None]:
        """Within the block, backward passes add the gradients of the model's own weights, where these are trained, to grad."""
        if self.flat is None:
            yield
        else:
            with self.flat.collecting(grad):
                yield

    def head_grad(self, grad: Tensor | None) -> Tensor | None:
        """Where a pass adds the gradient of head_weight in such a grad; None where it is not trained."""
        return None if self.flat is None or grad is None else self.flat.head_grad(grad)

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        *,
        attention: AttentionContext,
        adapters: AdapterPass | None,
        product: LinearProduct = linear,
    ) -> Tensor:
        """hidden_TD after the final norm, of one row. Gradients flow when grad mode is on and adapters or own weights train.

        product: of the weights that adapters add to, in a pass without gradients.
        """
        assert self._slot.current is None, "a pass is already running on this model"
        self._slot.current = adapters
        self._slot.product = product
        offload = self._offload if torch.is_grad_enabled() else None
        try:
            with (
                nullcontext() if offload is None else offload.saving(),
                nullcontext() if self.loads is None else self.loads.forward_pass(),
            ):
                output = self._trunk(
                    input_ids=tokens_T[None],
                    position_ids=positions_T[None],
                    use_cache=False,
                    **{CONTEXT_KEYWORD: attention},
                )
        finally:
            self._slot.current = None
            self._slot.product = linear
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD
