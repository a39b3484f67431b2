"""Recovery times of the faults of a test run: a JSON file, and a table at the end."""

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPORT = Path(__file__).parents[2] / "outputs" / "faults" / "report.json"
# A run that is broken off leaves a report of all but the last few.
_WRITE_EVERY = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """One fault. serving_s: until API and gang served again. pause_s: the longest time in which no client was answered, which
    includes the SDK's own pauses between tries."""

    test: str
    fault: str
    serving_s: float
    pause_s: float


@dataclass(slots=True)
class Report:
    """What the tests of this run recorded."""

    recoveries: list[Recovery] = field(default_factory=list)

    def add(self, recovery: Recovery) -> None:
        self.recoveries.append(recovery)
        if len(self.recoveries) % _WRITE_EVERY == 0:
            self.write()

    def write(self, path: Path = REPORT) -> None:
        """Replace the file at path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}")
        draft.write_text(json.dumps([asdict(one) for one in self.recoveries], indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    def table(self) -> list[str]:
        """A line for each kind of fault: how many, and seconds to recovery."""
        kinds: dict[str, list[Recovery]] = {}
        for one in self.recoveries:
            kinds.setdefault(one.fault, []).append(one)
        width = max((len(kind) for kind in kinds), default=5)
        lines = [f"{'fault':{width}}  count  serving again s (median, max)  clients' pause s (median, max)"]
        for kind, members in sorted(kinds.items()):
            serving = _figures([one.serving_s for one in members])
            pause = _figures([one.pause_s for one in members])
            lines.append(f"{kind:{width}}  {len(members):5}  {serving:>29}  {pause:>30}")
        return lines


def _figures(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f}, {max(seconds):.1f}"
