"""Saving and loading on a gang: rank 0 touches the disk, every rank learns what came of it. All functions are collective."""

import msgspec
from torch import Tensor

from gradstream.engine.adapters.adapter import Adapter, FrozenAdapter
from gradstream.engine.adapters.factors import Factors
from gradstream.engine.adapters.layout import layout_for
from gradstream.engine.checkpoint.full_save import huggingface_files, training_files
from gradstream.engine.checkpoint.load import LoadOrder, load_content
from gradstream.engine.checkpoint.location import Location
from gradstream.engine.checkpoint.save import AdapterFiles, Content, SaveOrder, save_content
from gradstream.engine.checkpoint.snapshot import AdapterContent, factors_of, restore, to_tensor
from gradstream.engine.checkpoint.start import Start
from gradstream.engine.memory import room_for_adapter
from gradstream.engine.models.full import FullModel
from gradstream.engine.parallel.agree import on_leader
from gradstream.engine.state import EngineState
from gradstream.shared.ids import TenantId
from gradstream.shared.wire import LoraSpec, OptimizerSpec


def save(state: EngineState, model: Adapter | FullModel, order: SaveOrder) -> int:
    """Write model as order says; the bytes of its files, when they are on disk. Raises like `save_content`, on every rank."""

    def work() -> bytes:
        content = _content(state, model, order)
        manifest = save_content(content, order, state.config.output_dir, budget=state.disk, drafts=state.drafts)
        return msgspec.msgpack.encode(manifest.size_bytes)

    return msgspec.msgpack.decode(on_leader(state.comm, work), type=int)


def _content(state: EngineState, model: Adapter | FullModel, order: SaveOrder) -> Content:
    if isinstance(model, Adapter):
        return AdapterFiles(model, order)
    return training_files(state, model) if order.is_training else huggingface_files(state, model)


def load(
    state: EngineState,
    location: Location | Start,
    *,
    tenant: TenantId | None,
    with_optimizer: bool = False,
    expected: LoraSpec | None = None,
    optimizer: OptimizerSpec | None = None,
) -> AdapterContent:
    """The contents of a checkpoint; tenant, expected and optimizer: what it must have, None for any. Raises like `load_content`."""
    order = LoadOrder(
        location=location,
        tenant=tenant,
        base_models=state.base_names,
        base_sites=state.base.sites,
        max_lora_rank=state.config.max_lora_rank,
        max_merged_rank=state.config.merging.max_rank,
        with_optimizer=with_optimizer,
        expected=expected,
        optimizer=optimizer,
    )

    def work() -> bytes:
        return msgspec.msgpack.encode(load_content(order, state.config.output_dir))

    return msgspec.msgpack.decode(on_leader(state.comm, work), type=AdapterContent)


def put(state: EngineState, model: Adapter, content: AdapterContent) -> None:
    """Put content into an adapter of its spec, as `restore` does; raises OutOfMemory, with the adapter as it was on every rank."""
    if not content.manifest.num_merges:
        restore(model, content)
        return

    def make() -> Factors:
        with room_for_adapter(state.comm, what="load_weights"):
            return factors_of(model, content)

    restore(model, content, state.with_room(make))


def load_frozen(state: EngineState, location: Location, *, tenant: TenantId) -> FrozenAdapter:
    """A checkpoint's adapter for sampling. Raises like `load_content`, and OutOfMemory, on every rank."""
    content = load(state, location, tenant=tenant)

    def make() -> Tensor:
        with room_for_adapter(state.comm, what="sample"):
            return to_tensor(content.weights, device=state.base.device)

    weights = state.with_room(make)
    return FrozenAdapter(
        layout=layout_for(state.base.sites, content.manifest.adapter).of_rank(content.manifest.stored_rank),
        scale=content.manifest.scale,
        weights=weights,
    )
