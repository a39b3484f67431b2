"""The body of asample, and the wire payload that it becomes."""

import msgspec

from gradstream.api.body import typed
from gradstream.api.config import ApiConfig
from gradstream.api.errors import require
from gradstream.api.tinker.sampling_targets import prompt_targets
from gradstream.api.tinker.training_json import ModelInput, Tensor, text_tokens
from gradstream.shared.catalog import EngineCard
from gradstream.shared.errors import InvalidRequest, Unsupported
from gradstream.shared.hyperparameters import check_fits
from gradstream.shared.wire import Sample, SamplingParams

_MAX_STOPS = 64
_MAX_STOP_CHARS = 1024
_MAX_TOP_K = 2**31 - 1
# Far above what clients ask for, and far below what one value in Redis may have: what a result takes must be bounded before it is made.
_MAX_ANSWER_BYTES = 64 * 1024 * 1024


class SamplingParamsBody(msgspec.Struct, forbid_unknown_fields=True):
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[int | str] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class SampleBody(msgspec.Struct, forbid_unknown_fields=True):
    """All fields of all SDK versions; record_stability_info is refused by name."""

    prompt: ModelInput
    sampling_params: SamplingParamsBody
    num_samples: int = 1
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: str | None = None
    seq_id: int | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Tensor | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None
    type: str | None = None


_DECODER = msgspec.json.Decoder(SampleBody)


def parse_sample(raw: bytes) -> SampleBody:
    """The body in raw; raises InvalidRequest naming the first wrong field."""
    return typed(_DECODER, raw)


def sample_payload(body: SampleBody, *, path: str | None, card: EngineCard, config: ApiConfig) -> Sample:
    """The wire payload; raises InvalidRequest or Unsupported, naming the field, for what the engine would not take."""
    _check_offered(body)
    _check_counts(body, config)
    tokens = text_tokens(body.prompt, "prompt")
    require(tokens.size > 0, "prompt: has no tokens; send at least one")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= card.vocab_size:
        bad = int(tokens.argmin()) if low < 0 else int(tokens.argmax())
        raise InvalidRequest(
            f"prompt.tokens[{bad}]: token id {int(tokens[bad])} is outside the vocabulary; ids are 0 to "
            f"{card.vocab_size - 1}"
        )
    params = _params(body.sampling_params, num_prompt_tokens=int(tokens.size), card=card)
    _check_answer_size(body, num_prompt_tokens=int(tokens.size), max_tokens=params.max_tokens)
    return Sample(
        path=path,
        prompt=tokens.astype("<i4").tobytes(),
        params=params,
        num_samples=body.num_samples,
        prompt_logprobs=bool(body.prompt_logprobs),
        topk_prompt_logprobs=body.topk_prompt_logprobs,
        topk_sample_logprobs=body.topk_sample_logprobs,
        prompt_logprobs_last_n=_last_n(body, num_prompt_tokens=int(tokens.size)),
        target_prompt_logprobs=None
        if body.target_prompt_logprobs is None
        else prompt_targets(
            body.target_prompt_logprobs, num_prompt_tokens=int(tokens.size), vocab_size=card.vocab_size
        ),
        prompt_alt_tokens_k=body.prompt_alt_tokens_k,
    )


def _check_offered(body: SampleBody) -> None:
    if body.record_stability_info:
        raise Unsupported(
            "record_stability_info: it is of use to the loss stable_reinforce alone, whose definition is not published, so this "
            "server has neither; leave it out, as the answer's logprobs are what importance_sampling, ppo and cispo need"
        )


def _last_n(body: SampleBody, *, num_prompt_tokens: int) -> int | None:
    last_n = body.prompt_logprobs_last_n
    if last_n is not None:
        require(bool(body.prompt_logprobs), "prompt_logprobs_last_n: it is about prompt_logprobs; ask for those too")
        require(
            1 <= last_n < num_prompt_tokens,
            f"prompt_logprobs_last_n: {last_n} is not between 1 and {num_prompt_tokens - 1}, the prompt's tokens but the first",
        )
    return last_n


def _check_counts(body: SampleBody, config: ApiConfig) -> None:
    limits = {
        "num_samples": (body.num_samples, 1, config.max_num_samples),
        "topk_prompt_logprobs": (body.topk_prompt_logprobs, 0, config.max_topk),
        "topk_sample_logprobs": (body.topk_sample_logprobs, 0, config.max_topk),
        "prompt_alt_tokens_k": (body.prompt_alt_tokens_k, 0, config.max_topk),
    }
    for field, (value, low, high) in limits.items():
        require(low <= value <= high, f"{field}: {value} is not between {low} and {high}")


def _check_answer_size(body: SampleBody, *, num_prompt_tokens: int, max_tokens: int) -> None:
    """An id and a log-probability take eight bytes: of every new token, of each candidate beside it and of each beside a prompt token."""
    sampled_bytes = 8 * body.num_samples * max_tokens * (1 + body.topk_sample_logprobs)
    prompt_bytes = 8 * num_prompt_tokens * (1 + body.topk_prompt_logprobs + body.prompt_alt_tokens_k)
    require(
        sampled_bytes + prompt_bytes <= _MAX_ANSWER_BYTES,
        f"num_samples, sampling_params.max_tokens, topk_sample_logprobs: the answer may take {sampled_bytes + prompt_bytes} bytes, and "
        f"one has {_MAX_ANSWER_BYTES} at most; ask for fewer samples, tokens or candidates in one request",
    )


def _params(body: SamplingParamsBody, *, num_prompt_tokens: int, card: EngineCard) -> SamplingParams:
    room = card.max_context_tokens - num_prompt_tokens
    require(
        room >= 1,
        f"prompt: {num_prompt_tokens} tokens leave no room in the context of {card.max_context_tokens}",
    )
    max_tokens = room if body.max_tokens is None else body.max_tokens
    require(
        1 <= max_tokens <= room,
        f"sampling_params.max_tokens: {max_tokens} is not between 1 and {room}, what the prompt's {num_prompt_tokens} tokens "
        f"leave of the context of {card.max_context_tokens}",
    )
    check_fits(body.temperature, "sampling_params.temperature")
    require(
        body.temperature >= 0,
        f"sampling_params.temperature: {body.temperature} is not a number from 0 up",
    )
    require(0 < body.top_p <= 1, f"sampling_params.top_p: {body.top_p} is not above 0 and at most 1")
    require(
        body.top_k == -1 or 1 <= body.top_k <= _MAX_TOP_K,
        f"sampling_params.top_k: {body.top_k} is neither -1 (off) nor a positive count",
    )
    require(
        body.seed is None or -(2**63) <= body.seed < 2**63, f"sampling_params.seed: {body.seed} does not fit in int64"
    )
    stops = _stops(body.stop, card)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=body.seed,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        stop_token_ids=stops.token_ids,
        stop_texts=stops.texts,
    )


class _Stops(msgspec.Struct, frozen=True):
    token_ids: list[int] | None
    texts: list[str] | None


def _stops(stop: str | list[int | str] | None, card: EngineCard) -> _Stops:
    """None stays None (only EOS stops); an empty list becomes two empty lists (nothing stops)."""
    if stop is None:
        return _Stops(None, None)
    items = [stop] if isinstance(stop, str) else stop
    if not items:
        return _Stops([], [])
    require(len(items) <= _MAX_STOPS, f"sampling_params.stop: {len(items)} entries; at most {_MAX_STOPS} are read")
    texts = [item for item in items if isinstance(item, str)]
    token_ids = [item for item in items if isinstance(item, int)]
    require(not (texts and token_ids), "sampling_params.stop: mixes texts and token ids; send one kind")
    for text in texts:
        require(
            0 < len(text) <= _MAX_STOP_CHARS,
            f"sampling_params.stop: a text must have 1 to {_MAX_STOP_CHARS} characters",
        )
    for token_id in token_ids:
        require(
            0 <= token_id < card.vocab_size,
            f"sampling_params.stop: token id {token_id} is outside the vocabulary; ids are 0 to {card.vocab_size - 1}",
        )
    return _Stops(token_ids or None, texts or None)
