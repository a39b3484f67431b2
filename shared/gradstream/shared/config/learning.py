"""Fields of the optimizer that depend on one another, or on what is trained."""

from gradstream.shared.config.fields import FIELDS
from gradstream.shared.config.problems import Problem, as_written
from gradstream.shared.config.settings import Settings

_MUON = ("muon_lr", "muon_momentum", "muon_nesterov", "muon_ns_steps", "muon_adjust_lr_fn")
_SCHEDULE = ("lr_warmup_steps", "lr_total_steps", "lr_min_ratio")


def state_dtype(settings: Settings) -> str:
    """optimizer_dtype in use: adapters have fp32 unless another was written."""
    if settings.enable_lora and "optimizer_dtype" not in settings.explicit:
        return "fp32"
    return settings.optimizer_dtype


def learning_problems(settings: Settings) -> list[Problem]:
    """Settings of another optimizer, or of no schedule, that would have no effect; and a schedule without an end."""
    problems = []
    if settings.optimizer != "muon":
        problems += _useless(settings, _MUON, f"optimizer: muon, and optimizer is {settings.optimizer}")
    if settings.lr_schedule is None:
        problems += _useless(settings, _SCHEDULE, "lr_schedule, which is null")
    elif settings.lr_schedule == "constant":
        problems += _useless(settings, _SCHEDULE[1:], "a schedule that falls, and lr_schedule is constant")
    elif settings.lr_total_steps is None or settings.lr_total_steps <= settings.lr_warmup_steps:
        total = "null" if settings.lr_total_steps is None else settings.lr_total_steps
        problems.append(
            Problem(
                "",
                f"lr_total_steps: {total} must be above lr_warmup_steps, {settings.lr_warmup_steps}, for lr_schedule "
                f"{settings.lr_schedule}",
            )
        )
    return problems


def _useless(settings: Settings, names: tuple[str, ...], what: str) -> list[Problem]:
    return [
        Problem("", f"{name}: {as_written(getattr(settings, name))} belongs to {what}")
        for name in names
        if getattr(settings, name) != FIELDS[name].default
    ]
