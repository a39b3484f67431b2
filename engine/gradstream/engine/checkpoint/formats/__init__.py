"""Formats of full-weight checkpoints that can be trained on, one file each."""
