"""A frozen linear map plus the LoRA changes of several adapters, with a hand-written backward pass.

Legend: T tokens, I in features, O out features, R rank.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstream.engine.adapters.slices import Patch
from gradstream.engine.adapters.stacked import StackedPatch
from gradstream.engine.products import LinearProduct, add_mm_, linear, mm


class Block(NamedTuple):
    """Tokens [start, end) that go through one frozen weight [O, I]. product: how, where they are all tokens."""

    start: int
    end: int
    weight_OI: Tensor
    product: LinearProduct = linear


class Groups(NamedTuple):
    """Tokens that go through one frozen weight of several, by torch's grouped product: those of group e end before ends_E[e].

    ends_E: int32, ascending, the last one is T.
    """

    ends_E: Tensor
    weight_EOI: Tensor


def lora_linear(
    x: Tensor,
    blocks: Sequence[Block] | Groups,
    bias_O: Tensor | None,
    patches: Sequence[Patch | StackedPatch],
    anchor: Tensor | None,
) -> Tensor:
    """x [..., I] -> y [..., O]: x W^T + bias, plus scale * (x a^T) b^T on each patch's tokens.

    T is the product of the leading sizes. blocks tile the tokens in order. Patches lie within blocks. With an anchor (a training pass) the
    backward pass adds the patches' gradients to their buffers instead of returning them: no leaf per factor, no accumulation node.
    """
    if anchor is None or not torch.is_grad_enabled():
        y_TO, _ = _forward(x.flatten(0, -2), blocks, bias_O, patches)
        return y_TO.view(*x.shape[:-1], -1)
    out: Tensor = _LoraLinear.apply(x, anchor, blocks, bias_O, patches)  # type: ignore[no-untyped-call]  # torch's
    return out


def _forward(
    x_TI: Tensor, blocks: Sequence[Block] | Groups, bias_O: Tensor | None, patches: Sequence[Patch | StackedPatch]
) -> tuple[Tensor, list[Tensor]]:
    """(y_TO, x a^T of each patch; scaled where it is of several adapters)."""
    if isinstance(blocks, Groups):
        y_TO = F.grouped_mm(x_TI, blocks.weight_EOI.transpose(1, 2), offs=blocks.ends_E)
        if bias_O is not None:
            y_TO += bias_O
    elif len(blocks) == 1:
        y_TO = blocks[0].product(x_TI, blocks[0].weight_OI, bias_O)
    else:
        y_TO = x_TI.new_empty(x_TI.shape[0], blocks[0].weight_OI.shape[0])
        for start, end, weight_OI, _ in blocks:
            y_TO[start:end] = mm(x_TI[start:end], weight_OI.t())
        if bias_O is not None:
            y_TO += bias_O
    lows: list[Tensor] = []
    for patch in patches:
        if isinstance(patch, StackedPatch):
            lows.append(patch.add(x_TI, y_TO))
            continue
        low_TR = mm(x_TI[patch.start : patch.end], patch.weight.a.t())
        patch.of(y_TO).addmm_(low_TR, patch.weight.b.t(), alpha=patch.scale)
        lows.append(low_TR)
    return y_TO, lows


def backward_patch(patch: Patch, *, grad_TO: Tensor, x_TI: Tensor, low_TR: Tensor) -> Tensor:
    """Add the gradient of the patch's trained ranks to its buffers; returns scale * grad b, [T, R], what x's gradient gets through a."""
    # Columns of a wider product become a tensor of their own, which two products read.
    grad_TO = grad_TO.contiguous()
    grad_low_TR = mm(grad_TO, patch.weight.b).mul_(patch.scale)
    if patch.grad is not None:
        trained = slice(patch.frozen_rank, None)
        add_mm_(patch.grad.a, grad_low_TR[:, trained].t(), x_TI)
        add_mm_(patch.grad.b, grad_TO.t(), low_TR[:, trained], patch.scale)
    return grad_low_TR


class _LoraLinear(torch.autograd.Function):
    """See lora_linear. Saves x and the low-rank activations."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch makes it)
        x: Tensor,
        _anchor: Tensor,
        blocks: Sequence[Block] | Groups,
        bias_O: Tensor | None,
        patches: Sequence[Patch | StackedPatch],
    ) -> Tensor:
        x_TI = x.flatten(0, -2)
        y_TO, lows = _forward(x_TI, blocks, bias_O, patches)
        ctx.save_for_backward(x_TI, *lows)
        ctx.blocks = blocks
        ctx.patches = patches
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # noqa: ANN401 (torch makes ctx)
        x_TI, *lows = ctx.saved_tensors
        blocks: Sequence[Block] | Groups = ctx.blocks
        grad_TO = grad.flatten(0, -2).contiguous()
        grad_x_TI: Tensor | None = None
        if ctx.needs_input_grad[0]:
            grad_x_TI = _through_blocks(grad_TO, blocks)
        for patch, low_TR in zip(ctx.patches, lows, strict=True):
            if isinstance(patch, StackedPatch):
                patch.backward(grad_TO=grad_TO, x_TI=x_TI, low=low_TR, grad_x_TI=grad_x_TI)
                continue
            span = slice(patch.start, patch.end)
            grad_low_TR = backward_patch(patch, grad_TO=patch.of(grad_TO), x_TI=x_TI[span], low_TR=low_TR)
            if grad_x_TI is not None:
                grad_x_TI[span].addmm_(grad_low_TR, patch.weight.a)
        grad_x = None if grad_x_TI is None else grad_x_TI.view(*grad.shape[:-1], -1)
        return grad_x, None, None, None, None


def _through_blocks(grad_TO: Tensor, blocks: Sequence[Block] | Groups) -> Tensor:
    """grad W for each block's tokens, [T, I]."""
    if isinstance(blocks, Groups):
        return F.grouped_mm(grad_TO, blocks.weight_EOI, offs=blocks.ends_E)
    if len(blocks) == 1:
        return mm(grad_TO, blocks[0].weight_OI)
    grad_TI = grad_TO.new_empty(grad_TO.shape[0], blocks[0].weight_OI.shape[1])
    for start, end, weight_OI, _ in blocks:
        grad_TI[start:end] = mm(grad_TO[start:end], weight_OI)
    return grad_TI
