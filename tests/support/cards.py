"""An engine card for tests that need no engine."""

from gradstream.shared.catalog import EngineCard, LossCard, LossInput, LossParam

VOCAB_SIZE = 1000
CONTEXT_TOKENS = 128
MAX_CANDIDATES = 8
MODEL_NAME = "tests/uniform"

_TARGETS = LossInput(name="target_tokens", dtype="int64")
_OLD_LOGPROBS = LossInput(name="logprobs", dtype="float32")
_ADVANTAGES = LossInput(name="advantages", dtype="float32")

UNIFORM_CARD = EngineCard(
    model_name=MODEL_NAME,
    model_aliases=["uniform-alias"],
    tokenizer_id="models/uniform",
    architecture="UniformForCausalLM",
    vocab_size=VOCAB_SIZE,
    max_context_tokens=CONTEXT_TOKENS,
    max_lora_rank=64,
    num_ranks=1,
    epoch=1,
    fingerprint="uniform-1",
    losses=[
        LossCard(
            name="cross_entropy",
            inputs=[_TARGETS, LossInput(name="weights", dtype="float32", required=False, default=1.0)],
            max_candidates=MAX_CANDIDATES,
        ),
        LossCard(
            name="ppo",
            inputs=[
                _TARGETS,
                _OLD_LOGPROBS,
                _ADVANTAGES,
                LossInput(
                    name="clip_low_threshold",
                    dtype="float32",
                    required=False,
                    fallback="clip_low_threshold",
                    minimum=0.0,
                ),
            ],
            params=[
                LossParam(name="clip_low_threshold", default=0.8, minimum=0.0, maximum=1.0),
                LossParam(name="clip_high_threshold", default=1.2, minimum=1.0),
            ],
        ),
    ],
    refused_losses={"stable_reinforce": "loss_fn: 'stable_reinforce' is not offered here; use ppo"},
)
