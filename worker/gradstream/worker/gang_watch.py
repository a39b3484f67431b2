"""The launcher's eye on the gang: its own one, which it starts anew, or one that somebody starts by hand."""

from collections.abc import Callable, Sequence

from gradstream.shared.clock import Clock
from gradstream.shared.config import Settings
from gradstream.worker.engine_watch import Leaderless, Sight
from gradstream.worker.supervise import Supervised

# A gang without its lease has nothing to finish: it could commit nothing.
_STOP_DEAF_GANG_S = 3.0

Say = Callable[[str], None]


class OwnGang:
    """Starts a gang anew that does not take the lease in time, or that lost it and stands still."""

    def __init__(self, gang: Supervised, *, settings: Settings, say: Say, clock: Clock) -> None:
        self._gang = gang
        self._settings = settings
        self._say = say
        # About the gang as it was started last: the engine's epoch before it, and whether it has taken the lease.
        self._num_gangs = 0
        self._epoch_before = 0
        self._has_reported = False
        self._last = Sight()
        self._leaderless = Leaderless(limit_s=2 * settings.lease_ttl_s, clock=clock)

    def begin(self, sight: Sight) -> None:
        """What was to be seen before the first start."""
        self._last = sight

    def check(self, sight: Sight | None) -> bool:
        """Take in one look, None while Redis is away; True when the gang leads."""
        if sight is None:
            self._leaderless.is_overdue(None, should_lead=False)
            return False
        if sight.last_batch != self._last.last_batch:
            self._gang.note_progress()
        self._restart_if_needed(sight)
        self._last = sight
        return self._has_reported and sight.card_epoch == sight.epoch

    def _restart_if_needed(self, sight: Sight) -> None:
        gang, limit_s = self._gang, self._settings.worker_connection_timeout
        if gang.num_starts != self._num_gangs:
            self._num_gangs, self._epoch_before, self._has_reported = gang.num_starts, self._last.epoch, False
        is_ours = sight.lease_owner == self._settings.lease_owner
        self._has_reported = self._has_reported or (is_ours and sight.epoch != self._epoch_before)
        should_lead = self._has_reported and gang.pid is not None
        if self._leaderless.is_overdue(sight, should_lead=should_lead):
            self._say(f"the gang runs, but does not renew its lease; it is started again. Log: {gang.spec.log_file}")
            gang.restart(timeout_s=_STOP_DEAF_GANG_S)
            return
        if self._has_reported or gang.pid is None or gang.age_s < limit_s:
            return
        self._say(
            f"the gang did not report for work within worker_connection_timeout: {limit_s:g} s; it is started again. "
            f"A model that takes longer to load needs a higher value. Log: {gang.spec.log_file}"
        )
        gang.restart(timeout_s=self._settings.stop_timeout_s)


class HandGang:
    """Tells the coming and going of gangs that others start, and how to start one."""

    def __init__(self, commands: Sequence[str], *, say: Say) -> None:
        self._commands = commands
        self._say = say
        self._epoch: int | None = None
        self._was_held = False

    def begin(self, sight: Sight) -> None:
        """What was to be seen when the server started."""
        if not sight.is_led:
            lines = "".join(f"\n  {command}" for command in self._commands)
            self._say(f"waiting for the gang; jobs wait in the queue until it leads. Start it with{lines}")

    def check(self, sight: Sight | None) -> bool:
        """Take in one look, None while Redis is away; True when a gang leads."""
        if sight is None:
            return False
        if sight.is_led and sight.epoch != self._epoch:
            again = "" if self._epoch is None else " again"
            self._say(f"a gang leads{again}: {sight.lease_owner}, epoch {sight.epoch}")
            self._epoch = sight.epoch
        elif self._was_held and not sight.lease_owner:
            self._say("no gang leads any more; jobs wait in the queue until one is started again")
        self._was_held = bool(sight.lease_owner)
        return sight.is_led
