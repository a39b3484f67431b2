"""Continues prompts with the trainer's own weights."""
