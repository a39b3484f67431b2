"""LoRA adapters: many at once on one frozen base model."""
