"""Passes are queued on the device without a look at what it computed; results are fetched once."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tests.support.engine_builders import DENSE, VOCAB, open_engine
from tests.support.switches import Ops

from gradstream.engine.accumulation import is_finite_sum
from gradstream.engine.adapters.adapter import Adapter, new_adapter
from gradstream.engine.config import Numerics
from gradstream.engine.datums import datums_of
from gradstream.engine.models.base import BaseModel
from gradstream.engine.parallel.comm import Comm
from gradstream.engine.passes import AdapterWork, on_host, run_adapters
from gradstream.engine.trained import Owner
from gradstream.engine.transfer import to_host
from gradstream.shared.columns import Column
from gradstream.shared.ids import LOCAL_TENANT, ModelId, SessionId
from gradstream.shared.wire import IGNORE, ForwardBackward, LoraSpec, Plan

# A prompt that two datums have in common, tokens without a target, and tokens that are switched off.
LENGTHS = [24, 20, 9]
LOSSES = ["cross_entropy", "importance_sampling", "ppo", "drgrpo", "gspo"]


def _base(device: str) -> BaseModel:
    base = open_engine(DENSE, numerics=Numerics(merge_qkv=False)).state.base
    base.causal_lm.to(device)
    base.head_weight = base.causal_lm.get_parameter("lm_head.weight")
    return base


def _adapter(base: BaseModel, number: int) -> Adapter:
    name = f"m{number}"
    owner = Owner(
        model_id=ModelId(name), tenant=LOCAL_TENANT, session_id=SessionId(name), spec=LoraSpec(rank=8, seed=number)
    )
    return new_adapter(owner, base_sites=base.sites, lora_alpha=16.0, engine_seed=0, device=base.device)


def _payload(loss: str, lengths: Sequence[int], seed: int) -> ForwardBackward:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, VOCAB, 12)
    tokens = [np.concatenate([prompt, rng.integers(0, VOCAB, length)])[:length].astype(np.int32) for length in lengths]
    targets = [rng.integers(0, VOCAB, length) for length in lengths]
    targets[0][:5] = IGNORE
    floats = {"cross_entropy": ["weights"], "gspo": ["logprobs", "advantages", "sequence_ratio_mask"]}
    inputs = {"target_tokens": Column.of(targets, dtype="int64")}
    for name in floats.get(loss, ["logprobs", "advantages"]):
        values = [np.abs(rng.normal(size=length)).clip(0, 1).astype(np.float32) for length in lengths]
        values[-1][:4] = 0.0
        inputs[name] = Column.of(values, dtype="float32")
    return ForwardBackward(tokens=Column.of(tokens, dtype="int32"), inputs=inputs, loss_fn=loss, backward=True)


def _work(base: BaseModel, loss: str) -> list[AdapterWork]:
    """Three adapters of equally many tokens, which are computed together, and one of others."""
    payloads = [_payload(loss, LENGTHS, seed) for seed in range(3)] + [_payload(loss, LENGTHS[1:], 3)]
    return [
        AdapterWork(
            adapter=_adapter(base, number),
            datums=datums_of(payload, vocab_size=VOCAB, max_tokens=512),
            is_backward=True,
        )
        for number, payload in enumerate(payloads)
    ]


def _plan(**changes: object) -> Plan:
    return Plan(kind="forward_backward", future_ids=[], row_budget_tokens=4096, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shared_prompt_tokens", [0, 8])
def test_no_pass_looks_at_a_number_that_the_device_computed(loss: str, shared_prompt_tokens: int) -> None:
    """On a device without numbers every look is an error."""
    base = _base("meta")
    work = _work(base, loss)
    jobs = run_adapters(base, Comm.single(), work, _plan(shared_prompt_tokens=shared_prompt_tokens))
    verdicts = [
        is_finite_sum(one.adapter, job.grad) for one, job in zip(work, jobs, strict=True) if job.grad is not None
    ]
    assert {tensor.device.type for job in jobs for tensor in (job.logprobs_NC, job.grad)} == {"meta"}
    assert [verdict.device.type for verdict in verdicts] == ["meta"] * 4
    with pytest.raises(RuntimeError, match="meta"):
        bool(verdicts[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shared_prompt_tokens", [0, 8])
def test_passes_on_a_gpu_are_queued_without_waiting_and_fetched_by_one_wait(shared_prompt_tokens: int) -> None:
    base = _base("cuda")
    work, plan = _work(base, "ppo"), _plan(shared_prompt_tokens=shared_prompt_tokens)
    run_adapters(base, Comm.single(), work, plan)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        jobs = run_adapters(base, Comm.single(), work, plan)
        verdicts = [is_finite_sum(one.adapter, job.grad) for one, job in zip(work, jobs, strict=True)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    outputs, are_finite = on_host(jobs, verdicts)
    assert are_finite == [True] * 4
    for output, job in zip(outputs, jobs, strict=True):
        assert torch.equal(output.logprobs_NC, job.logprobs_NC.cpu())


def test_what_is_fetched_is_what_was_computed() -> None:
    tensors = [torch.randn(3, 2), torch.tensor(True), torch.zeros(0, 1), torch.tensor(False)]
    with Ops() as ops:
        fetched = to_host(tensors)
    assert not ops.counts
    assert all(one is other for one, other in zip(fetched, tensors, strict=True))
    assert to_host([]) == []
