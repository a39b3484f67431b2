"""A card with the engine's own losses."""

import msgspec
import pytest
from tests.support.cards import UNIFORM_CARD

from gradstream.engine import losses
from gradstream.engine.losses._base import LOSSES
from gradstream.engine.registry import import_siblings
from gradstream.shared.catalog import EngineCard

import_siblings(losses)


@pytest.fixture
def card() -> EngineCard:
    """Rows of 64 tokens, a vocabulary of 1000, adapters of rank 32 and alpha 16 unless asked otherwise."""
    return msgspec.structs.replace(
        UNIFORM_CARD, losses=[LOSSES[name].card for name in sorted(LOSSES)], max_row_tokens=64
    )
