"""Datums of xorl clients, brought into the form that every dialect's training data has: tokens, and a target for each of them.

Legend: T tokens of one datum, K targets of one token.

- labels are those of Hugging Face: labels[t] belongs to token t. The server shifts: the datum becomes tokens[:-1] with the targets
  labels[1:], and every other field, which has a value for each token too, becomes field[1:]. target_tokens are taken as they are.
- A target of -100 is none. A weight of 0 makes one, for every loss; other weights stay what they are where the loss has weights.
- Fields that only other losses read are left out, so that the same data serves several losses.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from gradstream.api.training_data import Array, DatumArrays, TrainingData
from gradstream.api.xorl.arrays import Tensor, Values, array_of, float32, whole_numbers
from gradstream.api.xorl.losses import DEFAULT_LOSS, Asked, Param, asked_loss
from gradstream.shared.catalog import EngineCard, LossCard
from gradstream.shared.errors import InvalidRequest, PayloadTooLarge, Unsupported
from gradstream.shared.wire import IGNORE

_TARGETS = "target_tokens"
_LABELS = "labels"
_WEIGHTS = "weights"
_ADVANTAGES = "advantages"
# Other names that clients use.
_ALIASES = {"old_logprobs": "logprobs"}
_ROUTING = "routed experts: which experts a token went to is computed anew here and cannot be given; leave it out"

_NULL = msgspec.Raw(b"null")


class Chunk(msgspec.Struct):
    """Text when it has tokens; other kinds are refused by their type, whatever else they hold."""

    type: str = "encoded_text"
    tokens: list[int] | None = None


class ModelInput(msgspec.Struct, forbid_unknown_fields=True):
    """input_ids, or chunks of them. position_ids and attention_mask may only say what is so anyway."""

    input_ids: list[int] | Tensor | None = None
    chunks: list[Chunk] | None = None
    position_ids: list[int] | Tensor | None = None
    attention_mask: list[int] | Tensor | None = None


class Datum(msgspec.Struct, forbid_unknown_fields=True):
    model_input: ModelInput
    loss_fn_inputs: dict[str, Values] = {}
    routed_experts: msgspec.Raw = _NULL
    routed_expert_logits: msgspec.Raw = _NULL


class ForwardInput(msgspec.Struct, forbid_unknown_fields=True):
    """loss_fn_params and loss_fn_config are the same."""

    data: list[Datum]
    loss_fn: str = DEFAULT_LOSS
    loss_fn_params: dict[str, Param] | None = None
    loss_fn_config: dict[str, Param] | None = None
    routed_experts: msgspec.Raw = _NULL
    routed_expert_logits: msgspec.Raw = _NULL


def training_data(body: ForwardInput, card: EngineCard, *, backward: bool, max_datums: int) -> TrainingData:
    """The body as arrays; raises InvalidRequest, Unsupported or PayloadTooLarge that names the datum and the field."""
    if len(body.data) > max_datums:
        raise PayloadTooLarge(f"data: {len(body.data)} datums; one call takes at most {max_datums}")
    if _is_given(body.routed_experts) or _is_given(body.routed_expert_logits):
        raise Unsupported(_ROUTING)
    if body.loss_fn_params is not None and body.loss_fn_config is not None:
        raise InvalidRequest("loss_fn_params, loss_fn_config: they mean the same; send one of them")
    field = "loss_fn_config" if body.loss_fn_params is None else "loss_fn_params"
    asked = asked_loss(card, body.loss_fn, body.loss_fn_params or body.loss_fn_config or {}, field=field)
    readable = frozenset(spec.name for loss in card.losses for spec in loss.inputs)
    datums = [_datum(datum, asked, readable, where=f"data[{index}]") for index, datum in enumerate(body.data)]
    _check_lengths(datums, card)
    _check_targets(datums)
    return TrainingData(
        datums=datums, loss_fn=body.loss_fn, loss_config=asked.config, backward=backward, may_ignore=True
    )


def _is_given(raw: msgspec.Raw) -> bool:
    return bytes(raw) != b"null"


def _datum(datum: Datum, asked: Asked, readable: frozenset[str], *, where: str) -> DatumArrays:
    if _is_given(datum.routed_experts) or _is_given(datum.routed_expert_logits):
        raise Unsupported(f"{where}: {_ROUTING}")
    tokens = _tokens(datum.model_input, f"{where}.model_input")
    inputs = _arrays(datum.loss_fn_inputs, readable, f"{where}.loss_fn_inputs")
    if _TARGETS not in inputs and _LABELS in inputs:
        tokens, inputs = _shifted(tokens, inputs, where)
    inputs.pop(_LABELS, None)
    if _TARGETS in inputs:
        targets = whole_numbers(inputs[_TARGETS], f"{where}.loss_fn_inputs.{_TARGETS}")
        inputs[_TARGETS] = _masked(targets, inputs, asked, f"{where}.loss_fn_inputs")
    return DatumArrays(tokens=tokens, inputs=_read_by(asked.card, inputs, f"{where}.loss_fn_inputs"))


def _tokens(model_input: ModelInput, field: str) -> Array:
    """The token ids, int64 [T]."""
    if (model_input.input_ids is None) == (model_input.chunks is None):
        raise InvalidRequest(f"{field}: send the tokens as input_ids, or as chunks, one of the two")
    if model_input.input_ids is not None:
        tokens = whole_numbers(array_of(model_input.input_ids, f"{field}.input_ids"), f"{field}.input_ids")
    else:
        tokens = _chunked(model_input.chunks or [], field)
    if tokens.ndim != 1:
        raise InvalidRequest(f"{field}.input_ids: shape {list(tokens.shape)}; one datum is one sequence of tokens, [T]")
    _check_plain(model_input.position_ids, np.arange(tokens.size), f"{field}.position_ids", "0, 1, 2 and so on")
    _check_plain(model_input.attention_mask, np.ones(tokens.size), f"{field}.attention_mask", "1 for every token")
    return tokens


def _chunked(chunks: Sequence[Chunk], field: str) -> Array:
    tokens: list[int] = []
    for place, chunk in enumerate(chunks):
        if chunk.type != "encoded_text":
            raise Unsupported(
                f"{field}.chunks[{place}]: {chunk.type[:80]} chunks are not supported here; this model reads text only"
            )
        if chunk.tokens is None:
            raise InvalidRequest(f"{field}.chunks[{place}]: has no tokens")
        tokens += chunk.tokens
    return array_of(tokens, f"{field}.chunks")


def _check_plain(values: list[int] | Tensor | None, plain: Array, field: str, must_be: str) -> None:
    if values is not None and not np.array_equal(array_of(values, field), plain):
        raise Unsupported(
            f"{field}: it can only be {must_be} here; send each sequence as a datum of its own, without padding"
        )


def _arrays(values: Mapping[str, Values], readable: frozenset[str], field: str) -> dict[str, Array]:
    """Every input that some loss reads, under its own name."""
    arrays: dict[str, Array] = {}
    for given, value in values.items():
        name = _ALIASES.get(given, given)
        if name not in readable and name not in {_LABELS, _WEIGHTS}:
            names = ", ".join(sorted({*readable, _LABELS, _WEIGHTS}))
            raise InvalidRequest(f"{field}: no loss here reads {given[:80]!r}; what losses read is {names}")
        if name in arrays:
            raise InvalidRequest(f"{field}.{given}: it means the same as {name}; send one of them")
        arrays[name] = array_of(value, f"{field}.{given}")
    return arrays


def _shifted(tokens: Array, inputs: Mapping[str, Array], where: str) -> tuple[Array, dict[str, Array]]:
    """The datum that labels describe, with a target for each token: the last token has none, the first one is none."""
    if tokens.size < 2:
        raise InvalidRequest(
            f"{where}.model_input: {tokens.size} tokens; with labels a datum needs two, as the first one is only read"
        )
    for name, array in inputs.items():
        if array.ndim == 0 or array.shape[0] != tokens.size:
            count = 1 if array.ndim == 0 else array.shape[0]
            raise InvalidRequest(
                f"{where}.loss_fn_inputs.{name}: {count} values, but model_input has {tokens.size} tokens; with labels every field has "
                "a value for each token, and the server shifts all of them by one"
            )
    shifted = {name: array[1:] for name, array in inputs.items()}
    shifted[_TARGETS] = shifted.pop(_LABELS)
    return tokens[:-1], shifted


def _masked(targets: Array, inputs: Mapping[str, Array], asked: Asked, field: str) -> Array:
    """The targets, with IGNORE where the weight, or if asked for the advantage, is 0."""
    is_off = np.zeros(targets.shape, dtype=bool)
    fields = [_WEIGHTS, _ADVANTAGES] if asked.zero_advantage_is_ignored else [_WEIGHTS]
    for name in fields:
        array = inputs.get(name)
        if array is None:
            continue
        if array.shape != targets.shape:
            raise InvalidRequest(
                f"{field}.{name}: shape {list(array.shape)}, but {_TARGETS} has {list(targets.shape)}; send as many values"
            )
        is_off |= array == 0
    if targets.ndim == 2:
        is_off = np.broadcast_to(is_off.all(axis=1, keepdims=True), targets.shape)
    return np.where(is_off, IGNORE, targets) if is_off.any() else targets


def _read_by(loss: LossCard, inputs: Mapping[str, Array], field: str) -> dict[str, Array]:
    """What the loss reads, in its dtypes. A loss without weights takes those that only switch tokens on and off."""
    specs = {spec.name: spec for spec in loss.inputs}
    if _WEIGHTS in inputs and _WEIGHTS not in specs:
        weights = inputs[_WEIGHTS].reshape(-1)
        is_switch = (weights == 0) | (weights == 1)
        if not is_switch.all():
            bad = int(np.argmin(is_switch))
            raise InvalidRequest(
                f"{field}.{_WEIGHTS}[{bad}]: {float(weights[bad])}; {loss.name} only takes weights 0 and 1; scale the advantages"
            )
    return {
        name: float32(array) if specs[name].dtype == "float32" else whole_numbers(array, f"{field}.{name}")
        for name, array in inputs.items()
        if name in specs
    }


def _check_lengths(datums: Sequence[DatumArrays], card: EngineCard) -> None:
    for index, datum in enumerate(datums):
        if datum.tokens.size > card.max_row_tokens:
            raise InvalidRequest(
                f"data[{index}].model_input: {datum.tokens.size} tokens are more than the {card.max_row_tokens} of a packed row "
                "(sample_packing_sequence_len of the server's config)"
            )


def _check_targets(datums: Sequence[DatumArrays]) -> None:
    """Raise InvalidRequest for a token with some targets ignored and others not, and for a request without any target."""
    num_valid = num_with_targets = 0
    for index, datum in enumerate(datums):
        targets = datum.inputs.get(_TARGETS)
        if targets is None:
            continue
        num_with_targets += 1
        is_valid = targets != IGNORE
        if targets.ndim == 2 and not np.array_equal(is_valid.any(axis=1), is_valid.all(axis=1)):
            bad = int(np.argmax(is_valid.any(axis=1) != is_valid.all(axis=1)))
            raise InvalidRequest(
                f"data[{index}].loss_fn_inputs.{_TARGETS}[{bad}]: some of its targets are {IGNORE}; all are, or none"
            )
        num_valid += int(is_valid.sum())
    if datums and num_with_targets == len(datums) and not num_valid:
        raise InvalidRequest(
            f"data: every target is {IGNORE} or has weight 0, so there is no token to learn from; labels mark what is learned"
        )
