"""The network between the processes and the queue server fails in every way (queue.md section 10, fault 7).

It fails in a proxy, for one role's connections or for all; the loopback interface of the machine stays as it is.
"""

import time

import pytest
from tests.faults.conftest import Proxied, cases
from tests.support.faults_proxy import Weather
from tests.support.faults_server import Role

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

_WEATHERS = {
    "cut": Weather(is_cut=True),
    "replies vanish": Weather(replies_lost=True),
    "requests vanish": Weather(requests_lost=True),
    "200 ms": Weather(delay_s=0.1),
    "every twentieth chunk breaks its connection": Weather(loss=0.05),
}
# How often a weather must have struck before it ends.
_STRIKES = {
    "cut": 20,
    "requests vanish": 3,
    "replies vanish": 3,
    "200 ms": 100,
    "every twentieth chunk breaks its connection": 5,
}
# Of these make test takes the first, of the weathers the first two.
_WHO = {"all": None, "API": Role.API, "gang": Role.RANK0}


@pytest.mark.parametrize("who", cases(_WHO, num_short=1))
@pytest.mark.parametrize("weather", cases(_WEATHERS, num_short=2))
def test_bad_weather_only_delays(proxied: Proxied, weather: str, who: str) -> None:
    """Pass: nothing is lost, nothing happens twice, and work goes on by itself afterwards."""
    run, role = proxied.run, _WHO[who]
    run.until_answered(count=10)
    with proxied.proxy.weather(_WEATHERS[weather], who=None if role is None else str(role)):
        strikes = proxied.proxy.num_hurt + _STRIKES[weather]
        run.server.until(lambda: proxied.proxy.num_hurt >= strikes, what=f"{weather} has struck", timeout_s=240)
    run.recovered(f"{weather}: {who} and queue", at_s=time.monotonic())
    run.until_answered(count=20)
    run.verdict(min_rounds=8)
