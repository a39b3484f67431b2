"""Which lane runs next while both have work: training and sampling get the same time, but for samples that begin."""

from collections.abc import Collection

from gradstream.worker.fairness import Lane

# The most that one lane may be ahead of the other, in s: what it took beyond that is not held against it, so that no lane stands still for
# long after one heavy batch or slice.
_MOST_AHEAD_S = 1.0


class Lanes:
    """How much longer training ran than sampling while both had work.

    The lane that is behind runs next; of equals the one that did not run last. A sample that begins does not wait for that: its slice comes
    after one batch of training. Training catches up later, unless samples begin all the time: then it gets every other turn. What a lane
    did while the other had nothing to do does not count, and neither does what it was ahead before. Times are measured, so whose turn it
    was is in the log, as all plans are.
    """

    def __init__(self, *, last: Lane | None = None) -> None:
        """last: the lane that ran last."""
        self.last = last
        # How far training was ahead before the last turn, and what that took.
        self._before_s = 0.0
        self._last_s = 0.0

    def choose(self, wanted: Collection[Lane], *, is_joining: bool = False) -> Lane | None:
        """The lane of the next turn. wanted: the lanes that have work. is_joining: a sample waits that can begin now."""
        if len(set(wanted)) < 2:
            return next(iter(wanted), None)
        ahead_s = self._ahead_s(wanted)
        if ahead_s and not (is_joining and self.last is Lane.TRAIN):
            return Lane.SAMPLE if ahead_s > 0 else Lane.TRAIN
        return next(lane for lane in wanted if lane is not self.last)

    def take(self, lane: Lane, wanted: Collection[Lane]) -> None:
        """This lane has the turn."""
        self._before_s, self._last_s = self._ahead_s(wanted), 0.0
        self.last = lane

    def ran(self, elapsed_s: float) -> None:
        """The turn took this long."""
        self._last_s = elapsed_s

    def _ahead_s(self, wanted: Collection[Lane]) -> float:
        if len(set(wanted)) < 2:
            return 0.0
        last_s = self._last_s if self.last is Lane.TRAIN else -self._last_s
        return min(max(self._before_s + last_s, -_MOST_AHEAD_S), _MOST_AHEAD_S)
