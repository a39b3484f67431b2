"""Which model configurations the engine does not compute faithfully, as sentences."""

from collections.abc import Mapping

from transformers import PretrainedConfig

from gradstream.shared.errors import Unsupported

# Numbers or flags in config.json that change the math outside of what our attention and head do. None, False, 1.0 and absence are
# all "not used", each field has its own neutral values.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "alibi": (None, False),
    "quantization_config": (None,),
    "is_encoder_decoder": (None, False),
    "attention_chunk_size": (None,),
    "attention_dropout": (None, 0.0),
}


def check_config(config: PretrainedConfig) -> None:
    """Raise Unsupported, naming the field, its value and the reason, when the engine cannot run this model exactly."""
    architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if not architecture.endswith("ForCausalLM"):
        raise Unsupported(
            f"model: {architecture} is not supported; the engine runs causal models whose class name ends in ForCausalLM"
        )
    for field, neutral in _NEUTRAL.items():
        value = getattr(config, field, None)
        if value not in neutral:
            raise Unsupported(f"model: {architecture} sets {field}={value!r}, which this engine does not compute")
    others = sorted({kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"})
    if others:
        raise Unsupported(
            f"model: {architecture} has layers of type {', '.join(others)}; only full_attention is supported"
        )
    uses_window = getattr(config, "use_sliding_window", True) and getattr(config, "layer_types", None) is None
    if uses_window and getattr(config, "sliding_window", None) is not None:
        raise Unsupported(
            f"model: {architecture} attends in a sliding window of {config.sliding_window}; only full attention is supported"
        )
    if getattr(config, "rope_parameters", None) is None:
        raise Unsupported(f"model: {architecture} has no rotary position embedding; only rotary models are supported")
