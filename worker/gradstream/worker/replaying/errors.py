"""Why a replay cannot be had."""


class CannotReplay(Exception):
    """The log cannot be run again as asked; str() says why and, where there is one, the way that is open."""


class Stopped(Exception):
    """The user left the debugger with `quit`."""
