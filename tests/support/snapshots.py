"""Model states, heads of cuts, and comparison of states, for tests of snapshots."""

from pathlib import Path

import torch

from gradstream.engine.adapters.adapter import Owner
from gradstream.engine.engine import Engine
from gradstream.engine.snapshot.cut import CutHead
from gradstream.engine.snapshot.state import ModelState
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.ids import FutureId, ModelId, SessionId, TenantId
from gradstream.shared.wire import LoraSpec, Outcome, RestoreSnapshot
from gradstream.worker.internal import internal_batch


def head(number: int, *, epoch: int = 1) -> CutHead:
    return CutHead(
        epoch=epoch,
        number=number,
        cursor=f"{number}-0",
        log_segment="00000001-000001.seg",
        log_offset=10 * number,
        fingerprint="f",
        engine="main",
        created_ms=1000 + number,
    )


def model_state(
    name: str, *, seed: int = 0, size: int = 64, has_grad: bool = False, tenant: str = "local"
) -> ModelState:
    """A model of random values that no engine made."""
    generator = torch.Generator().manual_seed(seed)
    names = ["weights", "exp_avg", "exp_avg_sq", *(["grad"] if has_grad else [])]
    return ModelState(
        owner=Owner(
            model_id=ModelId(name),
            tenant=TenantId(tenant),
            session_id=SessionId("s"),
            spec=LoraSpec(rank=4, seed=seed, train_mlp=False),
            user_metadata={"who": '\u00e4 "b"'},
        ),
        scale=0.1,
        step=seed,
        has_grad=has_grad,
        layout_digest="d",
        tensors={name: torch.randn(size, generator=generator) for name in names},
    )


def assert_same_state(left: ModelState, right: ModelState) -> None:
    """Equal to the bit."""
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        assert tensor.dtype == right.tensors[name].dtype
        assert torch.equal(tensor.view(torch.uint8), right.tensors[name].view(torch.uint8)), name
    facts = (
        "owner",
        "scale",
        "step",
        "has_grad",
        "layout_digest",
        "kind",
        "optimizer",
        "reduction",
        "valid_tokens",
        "is_asleep",
    )
    assert {name: getattr(left, name) for name in facts} == {name: getattr(right, name) for name in facts}


def snapshot(engine: Engine, directory: Path, *, number: int = 1) -> RestoreSnapshot:
    """Write all models of engine as a cut; the payload that restores them and nothing else."""
    models = list(engine.state.models)
    SnapshotStore(directory).write(head(number), engine.capture(models), live=models)
    return RestoreSnapshot(directory=str(directory), epoch=1, number=number, drop_others=True)


def restore(engine: Engine, payload: RestoreSnapshot) -> Outcome:
    """The outcome of the gang's own job."""
    future = FutureId("gang:restore")
    return engine.execute(internal_batch(payload, future_id=future, epoch=1))[future]
