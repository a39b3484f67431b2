"""A sample job as a request of the sampler, after everything that needs the model was checked."""

import numpy as np
from numpy.typing import NDArray

from gradstream.engine.adapters.adapter import FrozenAdapter
from gradstream.engine.sampler.choice import Choice, key_of
from gradstream.engine.sampler.request import PromptQuestions, SampleRequest
from gradstream.engine.sampler.stops import stop_rule
from gradstream.engine.sampler.text import model_text
from gradstream.engine.state import EngineState
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.hyperparameters import check_fits
from gradstream.shared.targets import cells
from gradstream.shared.wire import Job, Sample, SamplingParams

MAX_SAMPLES = 1024
MAX_CANDIDATES = 256


def to_request(state: EngineState, job: Job, payload: Sample, adapter: FrozenAdapter | None) -> SampleRequest:
    """The request of a job. max_tokens is cut to what the context leaves room for.

    Random numbers come from the seed, or from the job's future id when there is none, so that a replay draws the same tokens.
    Raises InvalidRequest, naming the field, or Unsupported (stop texts without a tokenizer).
    """
    params = payload.params
    prompt = _prompt(payload.prompt, vocab_size=state.base.vocab_size, max_tokens=state.max_context_tokens)
    _check(payload)
    text = model_text(state.config.tokenizer_path or state.config.model_path)
    keys = [key_of(seed=params.seed, job=job.future_id, sample_index=index) for index in range(payload.num_samples)]
    return SampleRequest(
        name=job.future_id,
        adapter=adapter,
        prompt=prompt,
        # The last new token is never run through the model, so it needs no place in the context.
        max_tokens=min(params.max_tokens, state.max_context_tokens - len(prompt) + 1),
        choice=Choice(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p),
        stop=stop_rule(params, eos_token_ids=text.eos_token_ids, decoder=text.decoder),
        keys=tuple(keys),
        questions=_questions(payload, job, num_tokens=len(prompt), vocab_size=state.base.vocab_size),
        topk_sample=payload.topk_sample_logprobs,
    )


def _questions(payload: Sample, job: Job, *, num_tokens: int, vocab_size: int) -> PromptQuestions:
    last_n, targets = payload.prompt_logprobs_last_n, payload.target_prompt_logprobs
    if last_n is not None:
        if not payload.prompt_logprobs:
            raise InvalidRequest("prompt_logprobs_last_n: it is about prompt_logprobs; ask for those too")
        _within("prompt_logprobs_last_n", last_n, 1, num_tokens - 1)
    if targets is not None:
        targets.check("target_prompt_logprobs", num_rows=num_tokens - 1, vocab_size=vocab_size)
    return PromptQuestions(
        logprobs=payload.prompt_logprobs,
        topk=payload.topk_prompt_logprobs,
        last_n=last_n,
        targets=None if targets is None else cells(targets),
        num_drawn=payload.prompt_alt_tokens_k,
        # Never the key of a sample, whose indices start at 0.
        key=key_of(seed=payload.params.seed, job=job.future_id, sample_index=-1),
    )


def _prompt(data: bytes, *, vocab_size: int, max_tokens: int) -> NDArray[np.int32]:
    if len(data) % 4:
        raise InvalidRequest(f"prompt: {len(data)} bytes; it must hold whole int32 tokens")
    tokens = np.frombuffer(data, dtype="<i4")
    if not 1 <= len(tokens) <= max_tokens:
        raise InvalidRequest(
            f"prompt: {len(tokens)} tokens; it must have 1 to {max_tokens}, the context of this server"
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        outside = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise InvalidRequest(f"prompt: token {outside} is outside the vocabulary; ids are 0 to {vocab_size - 1}")
    return tokens.astype(np.int32)


def _check(payload: Sample) -> None:
    _within("num_samples", payload.num_samples, 1, MAX_SAMPLES)
    _within("topk_prompt_logprobs", payload.topk_prompt_logprobs, 0, MAX_CANDIDATES)
    _within("topk_sample_logprobs", payload.topk_sample_logprobs, 0, MAX_CANDIDATES)
    _within("prompt_alt_tokens_k", payload.prompt_alt_tokens_k, 0, MAX_CANDIDATES)
    _check_params(payload.params)


def _check_params(params: SamplingParams) -> None:
    if params.max_tokens < 1:
        raise InvalidRequest(f"sampling_params.max_tokens: {params.max_tokens}; it must be at least 1")
    check_fits(params.temperature, "sampling_params.temperature")
    if params.temperature < 0:
        raise InvalidRequest(f"sampling_params.temperature: {params.temperature}; it must be 0 (greedy) or above")
    if not 0 < params.top_p <= 1:
        raise InvalidRequest(f"sampling_params.top_p: {params.top_p}; it must be above 0 and at most 1")
    if params.top_k < -1:
        raise InvalidRequest(f"sampling_params.top_k: {params.top_k}; it must be -1 (all), or a count")
    if params.stop_texts and not all(params.stop_texts):
        raise InvalidRequest("sampling_params.stop: a stop text is empty")


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name}: {value}; it must be {low} to {high}")
