"""bench.gpu has to be right before it meets a GPU: on a CPU, with a tiny shape."""

import pytest
import torch

from bench import bare_machine, gpu
from bench.gpu_model import SHAPES, Shape, Work, qwen3
from bench.limits import TrainingCost

WORK = Work(num_sequences=2, context=16, rank=4, steps=1)
CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_tiny_model_trains_and_has_figures(mode):
    figure = gpu.measure("tiny", mode, WORK, device="cpu", limit_tflops=1.0)
    assert figure.error is None
    assert figure.tokens_per_s > 0
    assert figure.tokens_per_s == pytest.approx(32 / figure.step_ms * 1000, rel=0.01)
    cost = TrainingCost.of(SHAPES["tiny"].config())
    flops = figure.tokens_per_s * cost.flops([16], is_lora=mode == "lora") / 16
    assert figure.share_of_matmul == pytest.approx(flops / 1e12, abs=1e-4)


def test_a_model_that_fails_is_a_figure_that_says_why(monkeypatch):
    def no_room(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "_steps", no_room)
    figure = gpu.measure("tiny", "lora", WORK, device="cpu", limit_tflops=1.0)
    assert figure.error == "CUDA out of memory"


@pytest.mark.parametrize("is_tied", [True, False])
def test_every_weight_matrix_but_the_embedding_counts_and_the_head_once(is_tied):
    shape = Shape(hidden=32, intermediate=48, layers=3, heads=4, key_heads=2, head_size=16, vocab=100, is_tied=is_tied)
    model = qwen3(shape, device=CPU, dtype=torch.float32)
    matrices = {
        name: value.numel()
        for name, value in model.named_parameters()
        if value.dim() == 2 and "embed_tokens" not in name and "lm_head" not in name
    }
    assert TrainingCost.of(shape.config()).num_gemm == sum(matrices.values()) + model.lm_head.weight.numel()


def test_flops_are_those_of_a_hand_count():
    shape = Shape(hidden=8, intermediate=16, layers=1, heads=2, key_heads=1, head_size=4, vocab=10)
    params = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 10 * 8
    # Scores and their product with the values, 2 * 4 multiplications and additions each a head and key, for half of 6 keys, three times.
    attention = 3 * 2 * (2 * 2 * 4) * 3
    cost = TrainingCost.of(shape.config())
    assert cost.flops([6, 6], is_lora=False) == 2 * 6 * (6 * params + attention)
    assert cost.flops([6], is_lora=True) == 6 * (4 * params + attention)


def test_published_shapes_have_about_as_many_parameters_as_their_names_say():
    total = {
        name: TrainingCost.of(shape.config()).num_gemm + (0 if shape.is_tied else shape.vocab * shape.hidden)
        for name, shape in SHAPES.items()
    }
    assert total["0.6B"] == pytest.approx(0.6e9, rel=0.02)
    assert total["1.7B"] == pytest.approx(1.72e9, rel=0.02)
    assert total["8B"] == pytest.approx(8.19e9, rel=0.02)


def test_absent_packages_are_named():
    assert bare_machine.absent(("torch", "no_such_package_here")) == ["no_such_package_here"]
