"""Calls that are this server's own, below /api/v1/gradstream."""
