"""Every attention back-end against the one that is written out."""

import importlib.util

import pytest
import torch

from gradstream.engine.attention.choose import choose_attention
from gradstream.engine.attention.flash import FlashPackage
from gradstream.engine.attention.reference import reference_attention
from gradstream.engine.attention.registry import ATTENTION
from gradstream.engine.attention.segments import MASK_ROWS, Segments
from gradstream.shared.errors import Unsupported

CPU = torch.device("cpu")
SHAPES = {
    "one segment": [7],
    "equal lengths": [5, 5, 5],
    "mixed": [3, 9, 1, 9, 3],
    "equal but apart": [4, 2, 4],
    "single tokens": [1, 1, 1],
    "short ones between long ones": [3, 300, 5, 300, 4],
}
choose_attention("auto", device=CPU, dtype=torch.float32)
RUNNABLE = [name for name in ATTENTION if ATTENTION[name].refusal(CPU, torch.float64) is None and name != "reference"]


def _heads(count: int, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, tokens, 8, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("name", RUNNABLE)
def test_outputs_and_gradients_equal_the_reference(name: str, lengths: list[int], key_heads: int) -> None:
    segments = Segments(lengths, device=CPU)
    total = sum(lengths)
    inputs = [_heads(4, total, 0), _heads(key_heads, total, 1), _heads(key_heads, total, 2)]
    weights = torch.randn(total, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    results = []
    for run in (reference_attention, ATTENTION[name].run):
        out = run(*inputs, segments, 0.3)
        grads = torch.autograd.grad((out * weights).sum(), inputs)
        results.append([out, *grads])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# Lengths, and the earlier segment that each continues.
SHARED = {
    "two of one": ([6, 3, 3], [-1, 0, 0]),
    "uneven": ([4, 1, 5, 2], [-1, 0, 0, 0]),
    "two prompts": ([4, 2, 2, 3, 4, 4], [-1, 0, 0, -1, 3, 3]),
    "levels": ([2, 3, 1, 2, 2, 5], [-1, 0, 1, 1, 0, -1]),
    "more than a mask": ([7, MASK_ROWS + 9, 2 * MASK_ROWS, 4], [-1, 0, 1, 0]),
}


def _whole(lengths: list[int], parents: list[int], number: int) -> torch.Tensor:
    """The tokens of a segment behind those of all that it continues."""
    tokens = torch.arange(sum(lengths)).split(lengths)
    own = tokens[number]
    while (number := parents[number]) >= 0:
        own = torch.cat([tokens[number], own])
    return own


@pytest.mark.config_field("shared_prompt_tokens")
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize(("lengths", "parents"), SHARED.values(), ids=SHARED.keys())
@pytest.mark.parametrize("name", [*RUNNABLE, "reference"])
def test_a_segment_that_continues_another_gives_what_both_give_as_one(
    name: str, lengths: list[int], parents: list[int], key_heads: int
) -> None:
    segments = Segments(lengths, device=CPU, parents=parents)
    total = sum(lengths)
    inputs = [_heads(4, total, 0), _heads(key_heads, total, 1), _heads(key_heads, total, 2)]
    weights = torch.randn(total, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    out = ATTENTION[name].run(*inputs, segments, 0.3)
    grads = torch.autograd.grad((out * weights).sum(), inputs)

    wants = []
    for number, length in enumerate(lengths):
        whole = _whole(lengths, parents, number)
        assert segments.positions[whole].tolist() == list(range(len(whole)))
        parts = (heads.index_select(1, whole) for heads in inputs)
        wants.append(reference_attention(*parts, Segments([len(whole)], device=CPU), 0.3)[-length:])
    want = torch.cat(wants)
    torch.testing.assert_close(out, want)
    for grad, want_grad in zip(grads, torch.autograd.grad((want * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, want_grad)


@pytest.mark.parametrize("parents", [[-1], [-1, 1], [0, -1], [-1, -2]])
def test_a_segment_continues_earlier_ones_only(parents: list[int]) -> None:
    with pytest.raises(ValueError, match="earlier segment"):
        Segments([2, 2], device=CPU, parents=parents)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backward", [False, True], ids=["outputs", "gradients"])
@pytest.mark.parametrize(("lengths", "parents"), SHARED.values(), ids=SHARED.keys())
def test_on_a_gpu_shared_segments_equal_the_reference(lengths: list[int], parents: list[int], backward: bool) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    total = sum(lengths)
    shapes = [(4, total, 64), (2, total, 64), (2, total, 64)]
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    segments = Segments(lengths, device=device, parents=parents)
    want = reference_attention(*inputs, segments, 0.1)
    want_grads = torch.autograd.grad(want.float().square().sum(), inputs)
    for name in ATTENTION:
        if ATTENTION[name].refusal(device, dtype) is not None:
            continue
        out = ATTENTION[name].run(*inputs, segments, 0.1)
        if not backward:
            torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
            continue
        for grad, want_grad in zip(torch.autograd.grad(out.float().square().sum(), inputs), want_grads, strict=True):
            assert (grad - want_grad).norm() <= 2e-2 * want_grad.norm(), name


@pytest.mark.parametrize("name", ["reference", *RUNNABLE])
def test_a_change_in_one_segment_leaves_the_others_bits(name: str) -> None:
    segments = Segments([5, 6, 5], device=CPU)
    q, k, v = _heads(4, 16, 0).detach(), _heads(2, 16, 1).detach(), _heads(2, 16, 2).detach()
    before = ATTENTION[name].run(q, k, v, segments, 1.0)
    k[:, 5:11] += 100.0
    v[:, 5:11] *= -3.0
    after = ATTENTION[name].run(q, k, v, segments, 1.0)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[11:], after[11:])
    assert not torch.equal(before[5:11], after[5:11])


def test_short_segments_are_padded_to_one_call_on_cpus_while_that_computes_little_more() -> None:
    def calls(lengths: list[int], num_features: int, device: str = "cpu") -> list[tuple[int, bool]]:
        grouping = Segments(lengths, device=torch.device(device)).grouping(num_features)
        return [(group.num_segments, group.padding is not None) for group in grouping.groups]

    assert calls([3, 300, 5, 300, 4], 64) == [(3, True), (2, False)]
    assert calls([40, 64, 50, 64], 64) == [(4, True)]
    assert calls([40, 64, 50, 64], 4096) == [(1, False), (2, False), (1, False)]
    assert calls([40, 64, 50, 64], 64, "meta") == [(1, False), (2, False), (1, False)]


def test_what_pads_a_segment_is_its_own_last_token_so_that_a_nan_stays_in_its_segment() -> None:
    segments = Segments([3, 9, 4], device=CPU)
    q, k, v = (_heads(4, 16, seed) for seed in range(3))
    weights = torch.randn(16, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    clean = ATTENTION["segment_sdpa"].run(q, k, v, segments, 0.3)
    wants = torch.autograd.grad((clean * weights).sum(), (q, k, v))
    broken = [x.detach().clone() for x in (q, k, v)]
    for x in broken:
        x[:, 3:12] = float("nan")
        x.requires_grad_()

    out = ATTENTION["segment_sdpa"].run(*broken, segments, 0.3)

    others = [0, 1, 2, 12, 13, 14, 15]
    assert torch.equal(out[others], clean[others])
    for got, want in zip(torch.autograd.grad((out * weights).sum(), broken), wants, strict=True):
        assert torch.equal(got[:, others], want[:, others])


def test_a_later_token_never_changes_an_earlier_one() -> None:
    segments = Segments([6], device=CPU)
    q, k, v = _heads(2, 6, 0).detach(), _heads(2, 6, 1).detach(), _heads(2, 6, 2).detach()
    before = reference_attention(q, k, v, segments, 1.0)
    k[:, 3:] += 1.0
    assert torch.equal(before[:3], reference_attention(q, k, v, segments, 1.0)[:3])


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(Unsupported, match=r"'flash9' is not known.*segment_sdpa"):
        choose_attention("flash9", device=CPU, dtype=torch.float32)


def test_a_cuda_backend_is_refused_on_cpu() -> None:
    with pytest.raises(Unsupported, match="attention: varlen"):
        choose_attention("varlen", device=CPU, dtype=torch.float32)


def test_segments_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        Segments([3, 0], device=CPU)


def varlen_reference(
    q_THK, k_TGK, v_TGK, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic=False, **options
):
    """The function of the flash-attention packages, by the reference: a segment's last query is at its last key."""
    assert deterministic
    assert options.pop("causal") is True
    scale = options.pop("softmax_scale")
    assert not options
    assert cu_seqlens_q.dtype is cu_seqlens_k.dtype is torch.int32
    sizes, key_sizes = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max(sizes), max(key_sizes)) == (max_seqlen_q, max_seqlen_k)
    outs = []
    for q_NHK, k_MGK, v_MGK in zip(q_THK.split(sizes), k_TGK.split(key_sizes), v_TGK.split(key_sizes), strict=True):
        before = q_NHK.new_zeros(len(k_MGK) - len(q_NHK), *q_NHK.shape[1:])
        heads = (x.transpose(0, 1) for x in (torch.cat([before, q_NHK]), k_MGK, v_MGK))
        outs.append(reference_attention(*heads, Segments([len(k_MGK)], device=CPU), scale)[len(before) :])
    return torch.cat(outs), torch.zeros(1)


@pytest.mark.config_field("attn_implementation")
def test_a_flash_package_is_called_with_tokens_first_and_where_the_segments_end() -> None:
    package = FlashPackage(module=__name__, gpus="no", majors=(), function_name="varlen_reference")
    segments = Segments([3, 9, 1], device=CPU)
    q, k, v = _heads(4, 13, 0), _heads(2, 13, 1), _heads(2, 13, 2)
    want = reference_attention(q, k, v, segments, 0.3)
    torch.testing.assert_close(package.run(q, k, v, segments, 0.3), want)
    shared = Segments([3, 9, 1], device=CPU, parents=[-1, 0, 0])
    torch.testing.assert_close(package.run(q, k, v, shared, 0.3), reference_attention(q, k, v, shared, 0.3))


@pytest.mark.config_field("attn_implementation")
@pytest.mark.parametrize(
    ("name", "module"), [("flash_attention_3", "flash_attn_interface"), ("flash_attention_4", r"flash_attn\.cute")]
)
def test_a_flash_backend_without_its_package_is_refused_with_its_name(name: str, module: str) -> None:
    if importlib.util.find_spec(module.split("\\", maxsplit=1)[0].split(".", maxsplit=1)[0]) is not None:
        pytest.skip("the package is here")
    with pytest.raises(Unsupported, match=rf"^attention: {name}: the package with {module} is not installed"):
        choose_attention(name, device=CPU, dtype=torch.bfloat16)
