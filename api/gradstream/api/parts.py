"""The parts that request handlers work with, built once per app."""

from dataclasses import dataclass

from fastapi import Request

from gradstream.api.admission import Admission
from gradstream.api.catalog import Catalog
from gradstream.api.config import ApiConfig
from gradstream.api.limits import ByteBudget
from gradstream.api.metrics import Metrics
from gradstream.api.outbound import Outbound
from gradstream.api.parked import Parked
from gradstream.api.receiving import Receiving
from gradstream.api.recovery import Recovery
from gradstream.shared.clock import Clock
from gradstream.shared.joblog.port import Intake
from gradstream.shared.keys import WatchedKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything a handler may use. One event loop; the intake is open for as long as the app serves.

    keys: None when the server has no API keys.
    """

    intake: Intake
    clock: Clock
    config: ApiConfig
    catalog: Catalog
    admission: Admission
    bodies: ByteBudget
    receiving: Receiving
    metrics: Metrics
    parked: Parked
    recovery: Recovery
    keys: WatchedKeys | None
    outbound: Outbound


def build_parts(intake: Intake, *, clock: Clock, config: ApiConfig) -> Parts:
    """The parts around an intake."""
    metrics = Metrics()
    return Parts(
        intake=intake,
        clock=clock,
        config=config,
        catalog=Catalog(intake, clock=clock, ttl_s=config.card_ttl_s),
        admission=Admission(intake, clock=clock, hold_s=config.admit_hold_s, metrics=metrics),
        bodies=ByteBudget(config.max_inflight_body_bytes),
        receiving=Receiving(),
        metrics=metrics,
        parked=Parked(),
        recovery=Recovery(intake, clock=clock),
        keys=None if config.keys_file is None else WatchedKeys(config.keys_file, clock=clock),
        outbound=Outbound(),
    )


def parts_of(request: Request) -> Parts:
    """The parts of the app that serves this request."""
    parts = request.app.state.parts
    assert isinstance(parts, Parts)
    return parts
