"""Whether an engine is of the base model and the kind that a snapshot's models were trained with."""

from collections.abc import Callable

from gradstream.engine.snapshot.cut import Cut
from gradstream.shared.errors import Unsupported
from gradstream.shared.ids import OwnerId
from gradstream.shared.joblog.port import BatchId, FutureStatus
from gradstream.worker.recovery.past import Past

# States of models that have nothing to lose.
_OVER = frozenset({"lost", "failed", "unloaded"})


def check_kind(cut: Cut, past: Past, fingerprint: str, *, state_of: Callable[[OwnerId], str]) -> None:
    """Raise Unsupported when the engine with this fingerprint would lose all models of a snapshot and of the log after it.

    One start with a wrong config would end them for good: what a gang lost is lost for those that come after it. state_of: of a model,
    by its record.
    """
    changed = changed_facts(cut.head.fingerprint, fingerprint)
    if "weights" in changed:
        is_lora = "weights=full" not in fingerprint.split(" ")
        reason = (
            "they are of full weights (enable_lora: false)" if is_lora else "they are LoRA adapters (enable_lora: true)"
        )
    elif "model" in changed:
        reason = "they are of another base model, model_path has other weights now"
    else:
        return
    if held := {model for model in _held(cut, past) if state_of(model) not in _OVER}:
        count = f"{len(held)} model{'s' if len(held) > 1 else ''}"
        raise Unsupported(
            f"output_dir: it holds {count} (the first is {min(held)}) that this config cannot serve: {reason}. Use the config "
            "that they were trained with, another output_dir, or give them up by one start with --server.recovery none"
        )


def changed_facts(before: str, now: str) -> list[str]:
    """The names of the facts in which two fingerprints differ."""
    old, new = (dict(fact.split("=", 1) for fact in text.split(" ") if "=" in fact) for text in (before, now))
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _held(cut: Cut, past: Past) -> set[OwnerId]:
    """The models that there are at the end of the log."""
    held: set[OwnerId] = set(cut.models)
    for batch in past.after(BatchId(*cut.id)):
        for ended in batch.ended:
            if ended.status is not FutureStatus.DONE:
                continue
            if ended.job.op == "create_model":
                held.add(ended.job.owner)
            elif ended.job.op == "unload_model":
                held.discard(ended.job.owner)
    return held
