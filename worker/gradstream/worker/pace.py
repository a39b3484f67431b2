"""When a snapshot is worth its copy."""

from dataclasses import dataclass

from gradstream.shared.clock import Clock

# After a snapshot that could not be written, the next try.
_RETRY_S = 10.0
# Of training, for each second that training stood still for a copy.
_TRAINING_PER_COPY = 10.0
# A cut is due after so many batches even if no model changed, as samples do not: behind it the log can be trimmed.
MAX_BATCHES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """budget_s: of training that a recovery may have to repeat; more where the last copy stopped training for over a tenth of it. 0: a copy
    after every batch, whatever it costs.
    idle_s: of rest after which changed models are copied anyway.
    """

    budget_s: float = 60.0
    idle_s: float = 5.0
    num_kept: int = 2


class Pace:
    """What has run since the last cut, and what that cut cost. Its owner sees to it that one thread at a time calls."""

    def __init__(self, cadence: Cadence, *, clock: Clock) -> None:
        self._cadence = cadence
        self._clock = clock
        self._num_batches = 0
        self._cost_s = 0.0
        self._copy_s = 0.0
        self._rest_since_s = clock.monotonic_s()
        self._not_before_s = 0.0

    def ran(self, *, has_changed: bool, elapsed_s: float) -> None:
        """A batch ended. has_changed: it would have to be repeated."""
        self._rest_since_s = self._clock.monotonic_s()
        self._num_batches += 1
        if has_changed:
            self._cost_s += elapsed_s

    def copied(self, copy_s: float) -> None:
        """A cut was begun, for which training stood still so long."""
        self._copy_s = copy_s
        self._cost_s, self._num_batches = 0.0, 0

    def failed(self) -> None:
        """The cut could not be written."""
        self._not_before_s = self._clock.monotonic_s() + _RETRY_S

    def is_due(self, *, has_changed: bool) -> bool:
        """True when a cut should be taken now. has_changed: models did since the last one."""
        now_s = self._clock.monotonic_s()
        if now_s < self._not_before_s:
            return False
        if self._num_batches >= MAX_BATCHES:
            return True
        budget_s = self._cadence.budget_s
        if budget_s:
            budget_s = max(budget_s, _TRAINING_PER_COPY * self._copy_s)
        return has_changed and (self._cost_s >= budget_s or now_s - self._rest_since_s >= self._cadence.idle_s)
