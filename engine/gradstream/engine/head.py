"""Log-probabilities of target tokens without the logits of a whole batch in memory.

Legend: T tokens of the row, N tokens of a chunk, D hidden, V vocabulary, C candidates (targets) per token, R LoRA rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstream.engine.adapters.linear import backward_patch
from gradstream.engine.adapters.passes import AdapterPass
from gradstream.engine.adapters.slices import Patch
from gradstream.engine.models.base import BaseModel
from gradstream.engine.products import add_mm_, mm
from gradstream.engine.vocabulary import Product, Softmax

# Logits of one chunk: large enough that the matrix product dominates, small against a model's activations.
CHUNK_BYTES = 32 << 20
# Logits of a row that may wait for the backward pass; beyond it they are computed again.
KEEP_BYTES = 96 << 20
# Where the weight itself is trained: each chunk goes over the whole gradient of the weight once, so there are fewer of them.
TRAINED_CHUNK_BYTES = 256 << 20
TRAINED_CHUNK_TOKENS = 1024


@dataclass(slots=True)
class _Chunk:
    """Tokens [start, end), and the adapters' patches that some of them are in.

    begun: what the softmax left in the place of the logits, kept for the backward pass while there is room.
    """

    start: int
    end: int
    patches: list[Patch]
    begun_NV: Tensor | None = None


class Head:
    """The unembedding of one row. Made for one pass: `logprobs` once, then `backward` at most once.

    Products run in the compute dtype, log-softmax in float32 (float64 for a float64 model); with lm_head_fp32 the logits are not
    rounded to the compute dtype in between.
    """

    def __init__(
        self,
        base: BaseModel,
        hidden_TD: Tensor,
        adapters: AdapterPass | None,
        *,
        weight_grad_VD: Tensor | None = None,
        chunk_bytes: int | None = None,
        keep_bytes: int | None = None,
    ) -> None:
        """weight_grad_VD: float32 at least, where the backward pass adds the gradient of the weight itself; None: it is frozen.

        chunk_bytes: of the logits of one chunk; keep_bytes: of those that are kept. None for the defaults, which differ where the base
        model's own weights are trained, whether this pass has a gradient or not: a chunk's size may show in the last bit.
        """
        self._weight_VD = base.head_weight.detach()
        self._product = product_of(base)
        self._softmax = Softmax.of(base.numerics.ce_mode)
        self._weight_grad_VD = weight_grad_VD
        self._hidden_TD = hidden_TD.detach()
        self._patches = [] if adapters is None else adapters.patches(base.head_site.index)
        row_bytes = base.vocab_size * 4
        is_trained = base.flat is not None
        if chunk_bytes is None:
            chunk_bytes = min(TRAINED_CHUNK_BYTES, TRAINED_CHUNK_TOKENS * row_bytes) if is_trained else CHUNK_BYTES
        if keep_bytes is None:
            keep_bytes = TRAINED_CHUNK_BYTES if is_trained else KEEP_BYTES
        self._chunk_rows = max(1, chunk_bytes // row_bytes)
        self._keep_rows = keep_bytes // row_bytes
        self._chunks: list[_Chunk] = []
        self._targets_TC = torch.empty(0, dtype=torch.int64)
        self._lse_T = torch.empty(0)

    @torch.no_grad()
    def logprobs(self, targets_TC: Tensor, *, keep: bool) -> Tensor:
        """log p of each target, [T, C]. keep: a backward pass will follow."""
        self._targets_TC = targets_TC
        self._chunks = list(self._cut(targets_TC.shape[0]))
        parts_NC: list[Tensor] = []
        lses_N: list[Tensor] = []
        room = self._keep_rows if keep else 0
        for chunk in self._chunks:
            logits_NV = self._logits(chunk)
            targets_NC = logits_NV.gather(1, targets_TC[chunk.start : chunk.end])
            lse_N = self._softmax.lse_(logits_NV)
            parts_NC.append(targets_NC - lse_N[:, None])
            lses_N.append(lse_N)
            room -= chunk.end - chunk.start
            if room >= 0:
                chunk.begun_NV = logits_NV
        self._lse_T = torch.cat(lses_N)
        return torch.cat(parts_NC)

    @torch.no_grad()
    def backward(self, grad_TC: Tensor, may_learn_T: NDArray[np.bool_]) -> Tensor | None:
        """Gradient of the hidden states, [T, D], from that of the log-probabilities; adds those of the weight and of head adapters.

        may_learn_T: False where grad_TC is zero, as far as the host knows: chunks of no other tokens are skipped. None when all are.
        """
        chunks, self._chunks = self._chunks, []
        if not may_learn_T.any():
            return None
        grad_hidden_TD = torch.zeros_like(self._hidden_TD)
        for chunk in chunks:
            span = slice(chunk.start, chunk.end)
            if not may_learn_T[span].any():
                chunk.begun_NV = None
                continue
            is_begun = chunk.begun_NV is not None
            place_NV = self._logits(chunk) if chunk.begun_NV is None else chunk.begun_NV
            chunk.begun_NV = None
            grad_NC = grad_TC[span]
            # d logp_c / d logits = onehot(c) - softmax.
            grad_NV = self._softmax.weigh_(place_NV, self._lse_T[span], -grad_NC.sum(dim=1), is_begun)
            grad_NV.scatter_add_(1, self._targets_TC[span], grad_NC)
            grad_hidden_TD[span] = self._through(chunk, grad_NV.to(self._weight_VD.dtype))
        return grad_hidden_TD

    def _through(self, chunk: _Chunk, grad_NV: Tensor) -> Tensor:
        grad_ND = mm(grad_NV, self._weight_VD)
        x_ND = self._hidden_TD[chunk.start : chunk.end]
        if self._weight_grad_VD is not None:
            add_mm_(self._weight_grad_VD, grad_NV.t(), x_ND)
        for patch in chunk.patches:
            own = slice(max(patch.start - chunk.start, 0), patch.end - chunk.start)
            low_NR = mm(x_ND[own], patch.weight.a.t())
            grad_low_NR = backward_patch(patch, grad_TO=grad_NV[own], x_TI=x_ND[own], low_TR=low_NR)
            grad_ND[own].addmm_(grad_low_NR, patch.weight.a)
        return grad_ND

    def _logits(self, chunk: _Chunk) -> Tensor:
        return self._product.logits(self._hidden_TD[chunk.start : chunk.end], chunk.patches, at=chunk.start)

    def _cut(self, num_tokens: int) -> Iterator[_Chunk]:
        """Chunks that tile the row, whatever adapters their tokens have: the product with the frozen weight is one for all of them."""
        for start in range(0, num_tokens, self._chunk_rows):
            end = min(start + self._chunk_rows, num_tokens)
            yield _Chunk(start, end, [patch for patch in self._patches if patch.start < end and patch.end > start])


def product_of(base: BaseModel) -> Product:
    """The unembedding of a base model, as its numerics say."""
    return Product(base.head_weight.detach(), in_float32=base.numerics.lm_head_fp32)


@torch.no_grad()
def logits(base: BaseModel, hidden_TD: Tensor, adapters: AdapterPass | None) -> Tensor:
    """All logits of a few tokens, float32 [T, V]; the same products as in Head."""
    patches = [] if adapters is None else adapters.patches(base.head_site.index)
    return product_of(base).logits(hidden_TD, patches)


def target_logprobs(base: BaseModel, hidden_TD: Tensor, targets_T: Tensor, adapters: AdapterPass | None) -> Tensor:
    """log p of one target per token, [T]; by the same steps as in training, so with the same bits."""
    return Head(base, hidden_TD, adapters).logprobs(targets_T[:, None], keep=False)[:, 0]
