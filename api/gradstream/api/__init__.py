"""The HTTP edge of gradstream."""
