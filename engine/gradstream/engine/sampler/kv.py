"""Keys and values of the sequences that are being continued, and how attention reads and writes them."""

# Shape letters: S rows (one per sequence), C capacity in tokens, T tokens of a pass, H query heads, G key/value heads, M query heads
# per key head, K head size, L longest sequence of a pass.

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gradstream.engine.attention.context import AttentionContext
from gradstream.engine.memory import is_lack_of_room

# Buffers grow to a multiple of this many tokens, and by half of what they have, so that a sequence is copied seldom.
_BLOCK_TOKENS = 64


class KVCache:
    """For each layer one buffer of keys and one of values, [S, G, C, K]; row s holds the tokens of one sequence from 0 on.

    Behind its tokens a row holds zeros: attention masks that part, but a masked NaN of a row's former owner would still spread.
    """

    def __init__(self) -> None:
        self._num_rows = 0
        self._capacity = 0
        self._layers: dict[int, _Buffers] = {}

    def clear(self) -> None:
        """Give the memory back."""
        self._num_rows = 0
        self._capacity = 0
        self._layers = {}

    def reserve(self, *, num_rows: int, num_tokens: int, max_places: int) -> None:
        """Make room for num_rows sequences of num_tokens each, the ones that are kept among them.

        Room of former sequences is kept for later ones, unless the whole would then be above max_places.
        """
        if num_rows <= self._num_rows and num_tokens <= self._capacity:
            return
        rows, capacity = max(num_rows, self._num_rows), self._capacity
        if num_tokens > capacity:
            capacity = _whole_blocks(max(num_tokens, capacity + capacity // 2))
        if rows * capacity > max_places:
            rows, capacity = num_rows, _whole_blocks(num_tokens)
        try:
            self._resize(rows, capacity)
        except (RuntimeError, MemoryError) as error:
            if not is_lack_of_room(error):
                raise
        else:
            return
        # After the block above, in which the error holds what was made for a layer.
        self._resize(num_rows, _whole_blocks(num_tokens))

    def shrink(self, *, num_rows: int, num_tokens: int) -> None:
        """Give back what num_rows sequences of num_tokens do not need, as far as there is room for the copies."""
        try:
            self._resize(num_rows, _whole_blocks(num_tokens))
        except (RuntimeError, MemoryError) as error:
            if not is_lack_of_room(error):
                raise

    def _resize(self, rows: int, capacity: int) -> None:
        """Raises what torch raises when there is no room; some layers have the new size then, and none has lost a token."""
        # Layers that are larger than this do no harm.
        self._num_rows, self._capacity = min(rows, self._num_rows), min(capacity, self._capacity)
        for layer, old in self._layers.items():
            self._layers[layer] = _Buffers(*(_resized(buffer, rows, capacity) for buffer in old))
        self._num_rows, self._capacity = rows, capacity

    def layer(self, layer: int, like_GTK: Tensor) -> "_Buffers":
        """The buffers of a layer; made on first use, with the heads, head size, dtype and device of like."""
        if layer not in self._layers:
            shape = (self._num_rows, like_GTK.shape[0], self._capacity, like_GTK.shape[2])
            self._layers[layer] = _Buffers(like_GTK.new_zeros(shape), like_GTK.new_zeros(shape))
        return self._layers[layer]

    def move(self, *, source: int, target: int, num_tokens: int) -> None:
        """Put the first num_tokens of one row in place of another row."""
        for buffers in self._layers.values():
            for buffer in buffers:
                buffer[target, :, :num_tokens] = buffer[source, :, :num_tokens]
                buffer[target, :, num_tokens:] = 0.0


class _Buffers(NamedTuple):
    """One layer's keys and values, each [S, G, C, K]."""

    keys: Tensor
    values: Tensor


def _whole_blocks(num_tokens: int) -> int:
    return -(-num_tokens // _BLOCK_TOKENS) * _BLOCK_TOKENS


def _resized(buffer_SGCK: Tensor, num_rows: int, capacity: int) -> Tensor:
    rows, num_heads, tokens, head_size = buffer_SGCK.shape
    resized = buffer_SGCK.new_zeros(num_rows, num_heads, capacity, head_size)
    rows, tokens = min(rows, num_rows), min(tokens, capacity)
    resized[:rows, :, :tokens] = buffer_SGCK[:rows, :, :tokens]
    return resized


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpan:
    """Tokens start .. start + length of a packed pass go into rows first_row .. first_row + num_rows (the samples share them)."""

    start: int
    length: int
    first_row: int
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPass:
    """Attention of a packed pass over whole prompts: the trainer's own, and the keys and values are kept beside it."""

    cache: KVCache
    spans: list[PromptSpan]
    packed: AttentionContext

    def attend(self, layer: int, q_HTK: Tensor, k_GTK: Tensor, v_GTK: Tensor, *, scaling: float) -> Tensor:
        """[T, H, K]: what the trainer's attention gives."""
        buffers = self.cache.layer(layer, k_GTK)
        for buffer_SGCK, new_GTK in ((buffers.keys, k_GTK), (buffers.values, v_GTK)):
            for span in self.spans:
                rows = buffer_SGCK[span.first_row : span.first_row + span.num_rows]
                rows[:, :, : span.length] = new_GTK[:, span.start : span.start + span.length]
                rows[:, :, span.length :] = 0.0
        return self.packed.attend(layer, q_HTK, k_GTK, v_GTK, scaling=scaling)


class DecodePass:
    """Attention of one new token for each of T sequences; token t belongs to row rows[t], which holds lengths[t] tokens so far.

    Sequences of one length in the order of their rows need no mask. Rows below the highest one that take no part cost time but change nothing.
    """

    def __init__(self, cache: KVCache, *, rows: list[int], lengths: list[int], device: torch.device) -> None:
        self._cache = cache
        self._num_rows = max(rows) + 1
        self._longest = max(lengths) + 1
        self._rows_T = torch.tensor(rows, device=device)
        self._lengths_T = torch.tensor(lengths, device=device)
        self._is_in_row_order = rows == list(range(len(rows)))
        self._is_even = self._is_in_row_order and min(lengths) == max(lengths)
        self._mask_S11L: Tensor | None = None

    def attend(self, layer: int, q_HTK: Tensor, k_GTK: Tensor, v_GTK: Tensor, *, scaling: float) -> Tensor:
        """[T, H, K]: each new token attends to its own sequence, itself included; its keys and values are kept.

        The H / G query heads that share a key head are treated as so many queries of it, so keys are never repeated in memory.
        """
        num_heads, num_tokens, head_size = q_HTK.shape
        keys_SGCK, values_SGCK = self._cache.layer(layer, k_GTK)
        self._keep(keys_SGCK, k_GTK)
        self._keep(values_SGCK, v_GTK)
        if self._mask_S11L is None and not self._is_even:
            self._mask_S11L = self._mask(q_HTK.dtype)
        q_TGMK = q_HTK.transpose(0, 1).reshape(num_tokens, k_GTK.shape[0], -1, head_size)
        out = F.scaled_dot_product_attention(
            self._by_row(q_TGMK),
            keys_SGCK[: self._num_rows, :, : self._longest],
            values_SGCK[: self._num_rows, :, : self._longest],
            attn_mask=self._mask_S11L,
            scale=scaling,
        )
        return self._by_token(out).reshape(num_tokens, num_heads, head_size)

    def _keep(self, buffer_SGCK: Tensor, new_GTK: Tensor) -> None:
        if self._is_even:
            buffer_SGCK[: self._num_rows, :, self._longest - 1] = new_GTK.transpose(0, 1)
        else:
            buffer_SGCK[self._rows_T, :, self._lengths_T] = new_GTK.transpose(0, 1)

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """[S, 1, 1, L], added to the scores in every layer: nothing for a row's own tokens, minus infinity behind them."""
        device = self._rows_T.device
        # Idle rows attend to their first token, so that no row of the softmax is empty.
        last_S = torch.zeros(self._num_rows, dtype=torch.long, device=device)
        last_S[self._rows_T] = self._lengths_T
        is_behind_SL = torch.arange(self._longest, device=device) > last_S[:, None]
        mask_SL = torch.zeros(is_behind_SL.shape, dtype=dtype, device=device).masked_fill_(is_behind_SL, -torch.inf)
        return mask_SL[:, None, None]

    def _by_row(self, value_TGMK: Tensor) -> Tensor:
        if self._is_in_row_order:
            return value_TGMK
        value_SGMK = value_TGMK.new_zeros(self._num_rows, *value_TGMK.shape[1:])
        value_SGMK[self._rows_T] = value_TGMK
        return value_SGMK

    def _by_token(self, value_SGMK: Tensor) -> Tensor:
        return value_SGMK if self._is_in_row_order else value_SGMK[self._rows_T]
