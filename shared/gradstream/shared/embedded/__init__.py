"""The Redis-compatible server that gradstream starts and supervises itself, and the contract with any other."""
