"""Configuration of a server: its fields, how they are read, and what becomes of them on this machine."""

from gradstream.shared.config.handover import read_handover, write_handover
from gradstream.shared.config.load import load_settings
from gradstream.shared.config.problems import EXIT_CONFIG, ConfigError, Problem
from gradstream.shared.config.resolve import Notice, Resolved, resolve
from gradstream.shared.config.settings import Settings

__all__ = [
    "EXIT_CONFIG",
    "ConfigError",
    "Notice",
    "Problem",
    "Resolved",
    "Settings",
    "load_settings",
    "read_handover",
    "resolve",
    "write_handover",
]
