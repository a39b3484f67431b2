"""What `gradstream bisect` looks for: conditions on a job as it was recorded, on its replay, and on its model's state after it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from torch import Tensor

from gradstream.engine.snapshot.state import EXP_AVG, EXP_AVG_SQ, GRAD, WEIGHTS
from gradstream.shared import codec
from gradstream.shared.errors import NonFinite
from gradstream.shared.joblog.port import BatchId, Ended
from gradstream.shared.wire import Failed, ForwardBackwardDone, Outcome
from gradstream.worker.inspect.describe import loss_of, metrics_of
from gradstream.worker.replaying.results import JobResult

# A model's tensors by name, flat: weights, grad, and those that its optimizer has.
State = Mapping[str, Tensor]
TENSORS = (WEIGHTS, GRAD, EXP_AVG, EXP_AVG_SQ, "momentum", "compensation")
# What a condition looks at. A job's record is scanned; the others need a replay.
Needs = Literal["record", "replay", "state"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """A job at its end. result: of its replay. state: of its model after its batch. Both None in a scan; state also without a model."""

    batch: BatchId
    kind: str
    ended: Ended
    result: JobResult | None = None
    state: State | None = None

    @cached_property
    def outcome(self) -> Outcome:
        """As it was recorded."""
        return codec.decode_outcome(self.ended.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """name: as the user gave it. holds: of an event, what is the case in words, None when it does not hold.

    in_state: the same of a model's state alone, for conditions that go on holding once they do; None for the others.
    """

    name: str
    needs: Needs
    holds: Callable[[Event], str | None]
    in_state: Callable[[str, State], str | None] | None = None


def loss_above(limit: float) -> Condition:
    """The recorded loss exceeds a limit."""

    def holds(event: Event) -> str | None:
        loss = loss_of(event.outcome)
        return None if loss is None or not loss > limit else f"the loss is {loss:.9g}"

    return Condition(name=f"the loss is above {limit:g}", needs="record", holds=holds)


def digest_differs() -> Condition:
    """A replay gives something else than was recorded."""

    def holds(event: Event) -> str | None:
        return event.result.what if event.result is not None and event.result.verdict == "differs" else None

    return Condition(name="the digest differs", needs="replay", holds=holds)


def recorded_non_finite() -> Condition:
    """A recorded metric or output is nan or inf, or the job was refused because a number would have become so."""
    return Condition(name="a recorded number is not finite", needs="record", holds=_recorded)


def state_non_finite() -> Condition:
    """Weights, moments or the accumulated gradient hold nan or inf; or something recorded does."""

    def in_state(model: str, state: State) -> str | None:
        bad = [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]
        return f"{', '.join(bad)} of {model} hold nan or inf" if bad else None

    def holds(event: Event) -> str | None:
        found = _recorded(event)
        return found if found or event.state is None else in_state(event.ended.job.owner, event.state)

    return Condition(name="a number is not finite", needs="state", holds=holds, in_state=in_state)


def _recorded(event: Event) -> str | None:
    match event.outcome:
        case Failed(code=code, message=message):
            return message if code == NonFinite.code else None
        case ForwardBackwardDone(outputs=outputs):
            for name, column in outputs.items():
                for datum, values in enumerate(column.arrays()):
                    if not np.isfinite(values).all():
                        return (
                            f"{name} of datum {datum} is not finite at position {int(np.argmin(np.isfinite(values)))}"
                        )
        case _:
            pass
    bad = {name: value for name, value in metrics_of(event.outcome).items() if not np.isfinite(value)}
    return next((f"{name} is {value}" for name, value in bad.items()), None)
