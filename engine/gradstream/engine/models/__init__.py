"""Base models: how they are found, loaded and converted."""
