"""FlashAttention 3 and 4 from their own packages, for the GPUs that they are made for.

Legend: T tokens of the row, H query heads, G key heads, K head size.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradstream.engine.attention.registry import ATTENTION, AttentionBackend
from gradstream.engine.attention.segments import Segments


@dataclass(frozen=True, kw_only=True)
class FlashPackage:
    """module: where the function is. majors: the compute capabilities it has kernels for, by their first number."""

    module: str
    gpus: str
    majors: tuple[int, ...]
    function_name: str = "flash_attn_varlen_func"

    @cached_property
    def function(self) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """Imported when it is first called: loading takes seconds, and some versions look for a GPU."""
        function: Callable[..., Tensor | tuple[Tensor, ...]]
        function = getattr(importlib.import_module(self.module), self.function_name)
        return function

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.function).parameters)

    def version(self) -> str:
        """Name and version of the package as installed; empty when it is not."""
        names = importlib.metadata.packages_distributions().get(self.module.partition(".")[0], [])
        return ",".join(sorted({f"{name}-{importlib.metadata.version(name)}" for name in names}))

    def run(self, q_HTK: Tensor, k_GTK: Tensor, v_GTK: Tensor, segments: Segments, scaling: float) -> Tensor:
        """out_THK; half precision only. The last query of a segment is aligned with its last key."""
        if segments.key_index is not None:
            k_GTK, v_GTK = (heads.index_select(1, segments.key_index) for heads in (k_GTK, v_GTK))
        q_THK, k_TGK, v_TGK = (heads.transpose(0, 1).contiguous() for heads in (q_HTK, k_GTK, v_GTK))
        # Later versions find the longest segment themselves.
        options: dict[str, object] = {}
        if "max_seqlen_q" in self._parameters:
            options |= {"max_seqlen_q": max(segments.lengths), "max_seqlen_k": max(segments.key_lengths)}
        # Else the blocks of a gradient are added up in the order in which they are done.
        if "deterministic" in self._parameters:
            options["deterministic"] = True
        out = self.function(
            q_THK,
            k_TGK,
            v_TGK,
            cu_seqlens_q=segments.offsets,
            cu_seqlens_k=segments.key_offsets,
            softmax_scale=scaling,
            causal=True,
            **options,
        )
        # Some versions give the log-sum-exp as well.
        return out if isinstance(out, Tensor) else out[0]

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, as a sentence, or None."""
        if not self._is_installed():
            return f"the package with {self.module} is not installed; use attn_implementation: native"
        if device.type != "cuda":
            return f"it runs on {self.gpus} GPUs only, and the device is {device.type}; use attn_implementation: native"
        if torch.cuda.get_device_capability(device)[0] not in self.majors:
            name = torch.cuda.get_device_name(device)
            return f"it runs on {self.gpus} GPUs only, and this is {name}; use attn_implementation: native"
        if dtype not in {torch.bfloat16, torch.float16}:
            return f"it needs half precision, and the dtype is {dtype}; use attn_implementation: sdpa"
        return None

    def _is_installed(self) -> bool:
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False


FLASH_3 = FlashPackage(module="flash_attn_interface", gpus="Hopper", majors=(9,))
FLASH_4 = FlashPackage(module="flash_attn.cute", gpus="Hopper and Blackwell", majors=(9, 10))

ATTENTION.register("flash_attention_3")(
    AttentionBackend(run=FLASH_3.run, refusal=FLASH_3.refusal, rank=3, version=FLASH_3.version)
)
ATTENTION.register("flash_attention_4")(
    AttentionBackend(run=FLASH_4.run, refusal=FLASH_4.refusal, rank=4, version=FLASH_4.version)
)
