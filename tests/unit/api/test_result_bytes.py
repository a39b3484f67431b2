"""The bytes of one result do not depend on who renders it."""

import numpy as np
import pytest

from gradstream.api.tinker.results import render
from gradstream.shared.columns import Column
from gradstream.shared.wire import ForwardBackwardDone

LETTERS = "qhzamykcbx"


@pytest.mark.parametrize("letters", [LETTERS, LETTERS[::-1]], ids=["one order", "the other"])
def test_maps_of_a_protobuf_result_go_in_the_order_of_their_names(letters: str) -> None:
    """Protobuf's own order differs from process to process: a result fetched again after a restart would look like another one."""
    column = Column.of([np.array([-1.0], dtype=np.float32)], dtype="float32")
    outputs = {f"output {letter}": column for letter in letters}
    metrics = {f"metric {letter}": 1.5 for letter in letters}
    content = render(ForwardBackwardDone(outputs=outputs, metrics=metrics), accepts_protobuf=True).content
    for names in (list(outputs), list(metrics)):
        assert sorted(names, key=lambda name: content.index(name.encode())) == sorted(names)
