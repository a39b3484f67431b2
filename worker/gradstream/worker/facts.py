"""An engine's fingerprint as the facts that it is made of."""


def facts(fingerprint: str) -> dict[str, str]:
    """The parts of a fingerprint by name."""
    return dict(part.split("=", 1) for part in fingerprint.split() if "=" in part)


def changed_facts(before: str, now: str) -> list[str]:
    """The names of the facts in which two fingerprints differ."""
    old, new = facts(before), facts(now)
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
