"""The training itself, as a library."""
