"""The gang, its launcher and the command line."""
