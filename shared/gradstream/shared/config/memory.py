"""Which settings of what is kept in memory, and of what is trained, belong together."""

from collections.abc import Mapping

from gradstream.shared.config.problems import Problem
from gradstream.shared.config.settings import Settings


def memory_problems(settings: Settings, changes: Mapping[str, object]) -> list[Problem]:
    """What contradicts itself. changes: the values in use of fields that nobody set."""
    is_recomputing = changes.get("enable_gradient_checkpointing", settings.enable_gradient_checkpointing)
    sentences = []
    if settings.enable_reentrant and not is_recomputing:
        sentences.append(
            "enable_reentrant: true is a kind of gradient checkpointing; set enable_gradient_checkpointing: true, or use false"
        )
    if settings.enable_reentrant and settings.basic_modules:
        names = ", ".join(settings.basic_modules)
        sentences.append(
            f"basic_modules: {names} as units within the units of enable_reentrant: true would change the last bits of gradients; "
            "use enable_reentrant: false"
        )
    if settings.enable_lora and not settings.freeze_router:
        sentences.append(
            "freeze_router: false trains routers, and adapters have no place there; use true, or enable_lora: false"
        )
    return [Problem("", sentence) for sentence in sentences]
