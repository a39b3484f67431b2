"""target_prompt_logprobs of an asample body as a wire table."""

import numpy as np

from gradstream.api.tinker.training_json import Tensor
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.targets import PromptTargets

_FIELD = "target_prompt_logprobs"
_INT32 = np.iinfo(np.int32)


def prompt_targets(tensor: Tensor, *, num_prompt_tokens: int, vocab_size: int) -> PromptTargets:
    """The table, checked; raises InvalidRequest naming the field."""
    if tensor.dtype != "int64" or tensor.shape is None or len(tensor.shape) != 2:
        raise InvalidRequest(
            f"{_FIELD}: dtype {tensor.dtype}, shape {tensor.shape}; it must be int64 of shape [{num_prompt_tokens - 1}, K]"
        )
    token_ids = _int64(tensor.data, "data")
    if token_ids.size and not _INT32.min <= token_ids.min() <= token_ids.max() <= _INT32.max:
        raise InvalidRequest(f"{_FIELD}.data: a token id is outside the vocabulary; ids are 0 to {vocab_size - 1}")
    crow, col = tensor.sparse_crow_indices, tensor.sparse_col_indices
    targets = PromptTargets(
        shape=(tensor.shape[0], tensor.shape[1]),
        token_ids=token_ids.astype("<i4").tobytes(),
        crow_indices=None if crow is None else _int64(crow, "sparse_crow_indices").tobytes(),
        col_indices=None if col is None else _int64(col, "sparse_col_indices").tobytes(),
    )
    targets.check(_FIELD, num_rows=num_prompt_tokens - 1, vocab_size=vocab_size)
    return targets


def _int64(values: list[int] | list[int | float], name: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    if any(isinstance(value, float) for value in values):
        raise InvalidRequest(f"{_FIELD}.{name}: holds fractions; send whole numbers")
    try:
        return np.array(values, dtype="<i8")
    except OverflowError as error:
        raise InvalidRequest(f"{_FIELD}.{name}: a value does not fit in int64") from error
