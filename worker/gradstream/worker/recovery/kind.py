"""Whether an engine is of the base model and the kind that a snapshot's models were trained with, and means the same by their jobs."""

from collections.abc import Callable, Collection

from gradstream.engine.snapshot.cut import Cut
from gradstream.shared.errors import Unsupported
from gradstream.shared.ids import OwnerId
from gradstream.shared.joblog.port import BatchId, FutureStatus
from gradstream.worker.facts import changed_facts, facts
from gradstream.worker.recovery.past import Past
from gradstream.worker.recovery.replay import PastBatch

# States of models that have nothing to lose.
_OVER = frozenset({"lost", "failed", "unloaded"})
# Facts of a fingerprint that say what a job computes where it does not say so itself, with the fields that they come from: of jobs that make
# a model's state, and of all others. What is not named here is about bits, and may leave them as they were.
_MAKING = {"lora_alpha": "lora_alpha", "seed": "seed", "modules": "lora_target_modules", "optimizer": "optimizer"}
_GOING_ON = {"schedule": "lr_schedule", "merging": "merge_lora_interval", "router": "freeze_router"}
_MAKERS = frozenset({"create_model", "load_weights", "reset_model"})


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


def check_meaning(todo: Collection[PastBatch], fingerprint: str, *, state_of: Callable[[OwnerId], str]) -> None:
    """Raise Unsupported when jobs that must run again would be other ones under the config of the engine with this fingerprint.

    Their models would be lost for good, although the log has all that it takes. state_of: of a model, by its record.
    """
    changes = {text: changed_facts(text, fingerprint) for text in {past.fingerprint for past in todo} if text}
    for past in todo:
        fields = {**_GOING_ON, **(_MAKING if past.plan.kind in _MAKERS else {})}
        changed = [name for name in changes.get(past.fingerprint, ()) if name in fields]
        if not (past.is_stateful and changed):
            continue
        if held := {ended.job.owner for ended in past.ended if state_of(ended.job.owner) not in _OVER}:
            was, now = facts(past.fingerprint), facts(fingerprint)
            told = [
                f"{fields[name]} was {was.get(name, 'not set')} and is {now.get(name, 'not set')}" for name in changed
            ]
            raise Unsupported(
                f"{', '.join(fields[name] for name in changed)}: the server did not stop in order, so jobs of {min(held)} must run again, and "
                f"they ran under another config: {', '.join(told)}. Start with what it was, stop with Ctrl-C or SIGTERM, which takes a "
                "snapshot, and change it then; or give all models up by one start with --server.recovery none"
            )


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
