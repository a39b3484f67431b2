"""docs/losses.md from the losses' own docstrings and cards: `python -m tools.losses_docs`."""

import inspect
from pathlib import Path

from gradstream.engine import losses
from gradstream.engine.losses._base import LOSSES, REFUSED, Loss
from gradstream.engine.registry import import_siblings
from gradstream.shared.catalog import LossInput, LossParam

PAGE = Path(__file__).parent.parent / "docs" / "losses.md"
_HEAD = """# Losses

`forward_backward(data, loss_fn, loss_fn_config)` takes these. Every loss is a plain sum over tokens and datums, never a mean: scale weights
or advantages yourself. Gradients of several calls add up until `optim_step`. Each call returns `logprobs` and `elementwise_loss`, both in
the shape of `target_tokens`, and `loss:sum` with the metrics named below.

Arrays are float32 (bfloat16 is widened exactly) and may come dense or, in two dimensions, as sparse rows (CSR) with 0 where nothing is stored.
All datums of one call have the same number K of targets per token. Provenance spans are accepted; no loss here reads them.
A custom loss runs on the client's side: `forward_backward_custom` asks for the log-probabilities with `forward_only`, differentiates
your function, and sends the derivative back as signed weights of cross_entropy.

`optim_step` is AdamW, or the optimizer that the model was made with ([optimizers.md](optimizers.md)), with the hyper-parameters of each call. Its metrics are `grad_norm` (before clipping), `lr` and `step`. The SDK's
"dimuon" optimizer is refused: its update rule is not published, and an imitation under its name would train differently in silence.

This page is made by `python -m tools.losses_docs`.
"""


def as_markdown() -> str:
    """The whole page."""
    return (
        _HEAD
        + "".join(_chapter(name, LOSSES[name]) for name in sorted(LOSSES))
        + "\n## Not offered\n\n"
        + "".join(f"- `{name}`: {REFUSED[name].removeprefix('loss_fn: ')}.\n" for name in sorted(REFUSED))
    )


def _chapter(name: str, loss: Loss) -> str:
    module = inspect.getmodule(loss.compute)
    doc = inspect.cleandoc((module.__doc__ if module is not None else None) or "")
    metrics = ", ".join(f"`{metric}`" for metric in loss.card.metrics) or "none beside `loss:sum`"
    rows = [_input_row(spec) for spec in loss.card.inputs] + [_param_row(spec) for spec in loss.card.params]
    table = "| name | kind | default | range |\n|---|---|---|---|\n" + "".join(rows)
    return f"\n## {name}\n\n```text\n{doc}\n```\n\n{table}\nMetrics: {metrics}.\n"


def _input_row(spec: LossInput) -> str:
    default = "required" if spec.required else "none"
    if spec.required_by:
        default = f"required with {' or '.join(f'`{name}`' for name in spec.required_by)}"
    elif spec.fallback is not None:
        default = f"the parameter `{spec.fallback}`"
    elif spec.default is not None:
        default = str(spec.default)
    values = "token ids" if spec.dtype == "int64" else _range(spec.minimum, spec.maximum)
    return f"| `{spec.name}` | {spec.dtype} per token | {default} | {values} |\n"


def _param_row(spec: LossParam) -> str:
    bounds = ", ".join(map(str, spec.choices)) or _range(spec.minimum, spec.maximum)
    return f"| `{spec.name}` | parameter | {'off' if spec.default is None else spec.default} | {bounds} |\n"


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "any"
    return f"{'' if low is None else f'from {low:g}'}{'' if high is None else f' to {high:g}'}".strip()


import_siblings(losses)

if __name__ == "__main__":
    PAGE.write_text(as_markdown(), encoding="utf-8")
