"""Saves and loads adapters, with or without their optimizer."""
