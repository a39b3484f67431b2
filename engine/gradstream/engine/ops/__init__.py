"""The engine's operations, one file each."""
