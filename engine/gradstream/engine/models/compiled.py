"""torch.compile as the engine uses it: whether it can run here, and with settings under which results do not depend on the past."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from gradstream.shared.errors import Unsupported

_Function = TypeVar("_Function", bound=Callable[..., Any])  # Any: whatever is compiled

# Variants of one function (with and without gradients, one token or several, dtypes) that may exist in a process.
_NUM_VARIANTS = 256
# Kernels are chosen from what is known at compile time, not by racing them; sums are not split by the first size that was seen.
_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "deterministic": True,
    "split_reductions": False,
}  # Any: torch's


def compiler_refusal(device: torch.device) -> str | None:
    """Why nothing can be compiled for device, as a sentence, or None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton  # noqa: PLC0415 (importing it looks for a GPU)

        return None if has_triton() else "torch.compile for GPUs needs the package triton, which is not there"
    # Late, since it takes seconds that nobody else should wait for.
    from torch._inductor import cpp_builder, exc  # noqa: PLC0415 (torch has no public question)

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "torch.compile for CPUs needs a C++ compiler (g++ or clang++), and none was found"
    return None


def compiler_version() -> str:
    """A digest of what the C++ compiler says of itself."""
    from torch._inductor import cpp_builder  # noqa: PLC0415 (takes seconds)

    said = cpp_builder.get_compiler_version_info(cpp_builder.get_cpp_compiler())
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def require_compiler(device: torch.device, *, asked: str, instead: str) -> None:
    """Raise Unsupported, with the setting that asked for a compiler and the one that needs none, where nothing can be compiled."""
    if (refusal := compiler_refusal(device)) is not None:
        raise Unsupported(f"{asked}: {refusal}; use {instead}")


def compiled(function: _Function) -> _Function:
    """function as one kernel for any sizes, made when it is first called."""
    _configure()
    return cast("_Function", torch.compile(function, dynamic=True, fullgraph=True, options=_OPTIONS))


def compile_layers(
    causal_lm: nn.Module, *, apart: tuple[type[nn.Module], ...], units: Sequence[str] = (), backend: str = "inductor"
) -> None:
    """Compile every decoder layer in place, for any number of tokens. Modules of the types in apart run as they are, between kernels.

    units: paths of further modules that are compiled; those inside a layer are so already. backend: torch's name of what makes the kernels;
    "aot_eager" makes none and needs no compiler.
    """
    _configure()
    options = _OPTIONS if backend == "inductor" else None
    further = [causal_lm.get_submodule(path) for path in units if not path.startswith("model.layers.")]
    for layer in [*causal_lm.get_submodule("model.layers").children(), *further]:
        for module in layer.modules():
            if isinstance(module, apart):
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[no-untyped-call]  # torch's
        layer.compile(dynamic=True, backend=backend, options=options)


def _configure() -> None:
    import torch._dynamo  # noqa: PLC0415 (takes a second)
    import torch._inductor.config  # noqa: PLC0415

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _NUM_VARIANTS)  # noqa: SLF001
    # In this process: a rank starts no processes of its own.
    torch._inductor.config.compile_threads = 1  # noqa: SLF001
