"""The tensors around one batch as files: each model before and after, and what came out for each datum."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from gradstream.engine.adapters.layout import AdapterLayout
from gradstream.engine.checkpoint.peft_format import write_tensors
from gradstream.engine.engine import Engine
from gradstream.engine.files import storage_errors
from gradstream.engine.optim.state import named_state, state_parts
from gradstream.engine.snapshot.capture import capture
from gradstream.engine.snapshot.state import FROZEN, GRAD, WEIGHTS, ModelState
from gradstream.shared import codec
from gradstream.shared.ids import FutureId, ModelId
from gradstream.shared.wire import ForwardBackwardDone, Outcome
from gradstream.worker.inspect.describe import Plain, describe, describe_payload, metrics_of
from gradstream.worker.recovery.replay import PastBatch
from gradstream.worker.replaying.errors import CannotReplay

INDEX = "index.json"
_DIRECTORY_MODE, _FILE_MODE = 0o700, 0o600


class TensorFile(msgspec.Struct, frozen=True, kw_only=True):
    """One safetensors file. tensors: dtype and shape by name. step, has_grad: of a model's state."""

    file: str
    tensors: dict[str, str]
    model: str | None = None
    future_id: str | None = None
    moment: str = ""
    step: int | None = None
    has_grad: bool | None = None


class JobIndex(msgspec.Struct, frozen=True, kw_only=True):
    """One job of the batch. recorded_metrics, metrics: then and now."""

    future_id: str
    op: str
    model: str
    payload: Plain
    outcome: Plain
    recorded_metrics: dict[str, float]
    metrics: dict[str, float]


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What index.json says: the batch, its plan, its jobs and the files."""

    batch: str
    fingerprint: str
    plan: Plain
    jobs: list[JobIndex]
    files: list[TensorFile]


class Dump:
    """Writes what surrounds one batch into a new directory, for its owner only: it holds clients' data."""

    def __init__(self, directory: Path, engine: Engine, *, fingerprint: str) -> None:
        self._directory = directory
        self._engine = engine
        self._fingerprint = fingerprint
        self._files: list[TensorFile] = []

    def open(self) -> None:
        """Make the directory. Raises CannotReplay when it holds something, StorageFailure."""
        with storage_errors(f"--dump: cannot write {self._directory}"):
            self._directory.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
            if any(self._directory.iterdir()):
                raise CannotReplay(f"--dump: {self._directory} is not empty; name a new directory")

    def models(self, past: PastBatch, moment: str) -> None:
        """The state of the batch's models: weights, accumulated gradient and moments, by the name of each weight."""
        owners = [ModelId(owner) for owner in dict.fromkeys(ended.job.owner for ended in past.ended)]
        for model in capture(self._engine.state, [owner for owner in owners if owner in self._engine.state.models]):
            self._write(
                TensorFile(
                    file=f"{model.model_id.replace(':', '+')}.{moment}.safetensors",
                    tensors={},
                    model=model.model_id,
                    moment=moment,
                    step=model.step,
                    has_grad=model.has_grad,
                ),
                self._named(model),
            )

    def finish(self, past: PastBatch, outcomes: Mapping[FutureId, Outcome]) -> None:
        """What each datum gave, then and now, and the index."""
        jobs = []
        for ended in past.ended:
            job, recorded, given = ended.job, codec.decode_outcome(ended.data), outcomes.get(ended.job.future_id)
            self._outputs(job.future_id, "recorded", recorded)
            if given is not None:
                self._outputs(job.future_id, "replayed", given)
            jobs.append(
                JobIndex(
                    future_id=job.future_id,
                    op=job.op,
                    model=job.owner,
                    payload=describe_payload(job.payload),
                    outcome=describe(given),
                    recorded_metrics=metrics_of(recorded),
                    metrics={} if given is None else metrics_of(given),
                )
            )
        index = Index(
            batch=str(past.batch),
            fingerprint=self._fingerprint,
            plan={name: describe(getattr(past.plan, name)) for name in past.plan.__struct_fields__},
            jobs=jobs,
            files=self._files,
        )
        with storage_errors(f"--dump: cannot write {self._directory}"):
            path = self._directory / INDEX
            path.write_bytes(msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n")
            path.chmod(_FILE_MODE)

    def _named(self, model: ModelState) -> dict[str, Tensor]:
        held = self._engine.state.models.peek(model.model_id)
        assert held is not None, "what was captured is held"
        layout = held.layout
        frozen = model.tensors.get(FROZEN)
        parameters = {
            f"{name}.{tensor.name}": tensor.view(model.tensors[name])
            for name in (WEIGHTS, GRAD)
            if name in model.tensors
            for tensor in layout.tensors
        }
        parts = state_parts(model.optimizer, layout, weights_dtype=model.tensors[WEIGHTS].dtype)
        views = parameters | named_state(parts, model.tensors)
        if frozen is not None and isinstance(layout, AdapterLayout):
            frozen_layout = layout.of_rank(layout.rank * (frozen.numel() // layout.num_params))
            views |= {f"{FROZEN}.{tensor.name}": tensor.view(frozen) for tensor in frozen_layout.tensors}
        return {name: view.clone() for name, view in views.items()}

    def _outputs(self, future_id: FutureId, moment: str, outcome: Outcome) -> None:
        if not isinstance(outcome, ForwardBackwardDone):
            return
        tensors = {
            f"{name}.{datum:05d}": torch.tensor(values)
            for name, column in outcome.outputs.items()
            for datum, values in enumerate(column.arrays())
        }
        file = f"{future_id.replace(':', '+')}.{moment}.safetensors"
        self._write(TensorFile(file=file, tensors={}, future_id=future_id, moment=moment), tensors)

    def _write(self, entry: TensorFile, tensors: dict[str, Tensor]) -> None:
        path = self._directory / entry.file
        with storage_errors(f"--dump: cannot write {self._directory}"):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, _FILE_MODE))
            write_tensors(path, tensors, metadata={"format": "pt"})
            with suppress(OSError):
                path.chmod(_FILE_MODE)
        shapes = {
            name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in tensors.items()
        }
        self._files.append(msgspec.structs.replace(entry, tensors=shapes))
