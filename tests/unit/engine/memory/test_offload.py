"""Activations in host memory: the same bits, and nothing but activations goes there."""

from pathlib import Path

import pytest
import torch
from tests.support.engine_builders import DENSE, MOE, Driver
from tests.support.graph_memory import training_hidden
from tests.support.switches import KINDS, driver_of, pass_of

from gradstream.engine.config import Memory
from gradstream.engine.models.build import Build, load_base
from gradstream.engine.models.offload import ActivationOffload

pytestmark = pytest.mark.config_field("enable_activation_offload")


class Counting(ActivationOffload):
    """Takes every tensor for one of an accelerator."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver.engine.state.base.causal_lm, is_far=lambda _: True, min_bytes=0)
        self.moved: list[torch.Tensor] = []

    def _pack(self, tensor):
        packed = super()._pack(tensor)
        if packed is not tensor:
            self.moved.append(tensor)
        return packed


def moving(driver: Driver) -> Counting:
    """The driver's engine, changed so that all activations move."""
    offload = Counting(driver)
    driver.engine.state.base._offload = offload
    return offload


@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("memory", [Memory(), Memory(enable_gradient_checkpointing=True)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_have_the_same_bits_and_weights_stay(kind: str, memory: Memory, path: Path) -> None:
    driver = driver_of(kind, path, memory=memory)
    offload = moving(driver)
    parameters = {value.untyped_storage().data_ptr() for value in driver.engine.state.base.causal_lm.parameters()}

    logprobs, grad = pass_of(driver)

    plain = pass_of(driver_of(kind, path))
    assert (logprobs == plain[0]).all()
    assert torch.equal(grad, plain[1])
    assert offload.moved
    assert not parameters & {tensor.untyped_storage().data_ptr() for tensor in offload.moved}


def test_of_recomputed_layers_only_the_inputs_move() -> None:
    counts = []
    for memory in (Memory(), Memory(enable_gradient_checkpointing=True)):
        driver = driver_of(KINDS[0], memory=memory)
        offload = moving(driver)
        training_hidden(driver)
        counts.append(sum(tensor.nbytes for tensor in offload.moved))
    assert 0 < 3 * counts[1] < counts[0]


def test_values_come_back_with_their_strides() -> None:
    offload = ActivationOffload(torch.nn.Linear(2, 2), is_far=lambda _: True, min_bytes=0)
    base = torch.randn(3, 5).t()
    with offload.saving():
        doubled = base.clone(memory_format=torch.preserve_format).requires_grad_() ** 2
    saved = doubled.grad_fn._saved_self
    assert torch.equal(saved, base)
    assert saved.stride() == base.stride()


def test_an_engine_that_is_told_to_offload_does_in_training_passes_only() -> None:
    driver = driver_of(KINDS[0], memory=Memory(enable_activation_offload=True))
    assert isinstance(driver.engine.state.base._offload, ActivationOffload)
    assert driver_of(KINDS[0]).engine.state.base._offload is None
    offload = moving(driver)
    with torch.no_grad():
        training_hidden(driver)
    assert not offload.moved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("is_moved", [False, True])
def test_on_a_gpu_a_forward_pass_leaves_less_there(is_moved: bool) -> None:
    memory = Memory(enable_activation_offload=is_moved)
    base = load_base(DENSE, device=torch.device("cuda"), dtype=torch.float32, build=Build(is_lora=False, memory=memory))
    tokens = torch.zeros(4096, dtype=torch.int64, device="cuda")
    context = base.packed([4096])
    before = torch.cuda.memory_allocated()
    hidden = base.hidden(tokens, context.segments.positions, attention=context, adapters=None)
    kept = torch.cuda.memory_allocated() - before
    assert (kept < 8 * hidden.nbytes) is is_moved
