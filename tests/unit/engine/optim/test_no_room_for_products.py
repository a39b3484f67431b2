"""Muon's products need more memory than anything else of an update; where there is none, nothing has been stored."""

import pytest
import torch
from tests.support.trained import FlatModel, assert_same_bits
from torch import Tensor

from gradstream.engine.optim import muon, update
from gradstream.shared.wire import OptimizerSpec

SHAPES = {"matrix.first": (4, 4), "matrix.second": (8, 16), "matrix.third": (8, 4)}


@pytest.mark.parametrize("kept_numbers", [0, 1 << 24], ids=["large", "small"])
def test_an_update_whose_largest_product_has_no_room_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, kept_numbers: int
) -> None:
    def orthogonalized(matrices_BMN: Tensor, **_: object) -> Tensor:
        if matrices_BMN.numel() >= 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return matrices_BMN

    model = FlatModel(SHAPES, OptimizerSpec(type="muon"))
    model.grad.fill_(1)
    before = model.content()
    monkeypatch.setattr(update, "_KEPT_NUMBERS", kept_numbers)
    monkeypatch.setattr(muon, "orthogonalized", orthogonalized)
    with pytest.raises(torch.OutOfMemoryError):
        model.step_with(torch.ones_like(model.weights))
    assert_same_bits(model.content(), before)
