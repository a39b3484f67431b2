"""What the launcher says of gangs that others start."""

from gradstream.worker.engine_watch import Sight
from gradstream.worker.gang_watch import HandGang

NOBODY = Sight(epoch=3, card_epoch=3)
LED = Sight(epoch=4, card_epoch=4, lease_owner="one")
TAKING_OVER = Sight(epoch=5, card_epoch=4, lease_owner="two")
LED_AGAIN = Sight(epoch=5, card_epoch=5, lease_owner="two")


def watch() -> tuple[HandGang, list[str]]:
    said: list[str] = []
    return HandGang(["torchrun ..."], say=said.append), said


def test_a_server_without_a_gang_says_how_to_start_one() -> None:
    gang, said = watch()
    gang.begin(NOBODY)
    assert said == ["waiting for the gang; jobs wait in the queue until it leads. Start it with\n  torchrun ..."]
    assert not gang.check(NOBODY)


def test_a_gang_that_leads_already_is_not_asked_for() -> None:
    gang, said = watch()
    gang.begin(LED)
    assert gang.check(LED)
    assert said == ["a gang leads: one, epoch 4"]


def test_the_coming_and_going_of_gangs_is_said_once_each() -> None:
    gang, said = watch()
    for sight in (LED, LED, None, LED, NOBODY, NOBODY, TAKING_OVER, TAKING_OVER, LED_AGAIN, LED_AGAIN):
        assert gang.check(sight) == (sight in (LED, LED_AGAIN))
    assert said == [
        "a gang leads: one, epoch 4",
        "no gang leads any more; jobs wait in the queue until one is started again",
        "a gang leads again: two, epoch 5",
    ]
