"""Models: making one under a name of the client's choice, asking about one, and dropping one."""

from pathlib import PurePath
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, small_body
from gradstream.api.catalog import check_base_model
from gradstream.api.errors import require
from gradstream.api.model_info import ModelInfo, base_name, model_info
from gradstream.api.names import Target
from gradstream.api.parts import Parts, parts_of
from gradstream.api.xorl.bodies import NamedBody
from gradstream.api.xorl.models import record_of, target_of
from gradstream.api.xorl.specs import ModelSpec, StepDefaults, default_spec
from gradstream.api.xorl.submitting import create, promised, submit
from gradstream.shared import ids
from gradstream.shared.catalog import EngineCard
from gradstream.shared.errors import InvalidRequest, Unavailable, UnknownModel, Unsupported
from gradstream.shared.hyperparameters import check_alpha, check_fits, check_optimizer_numbers
from gradstream.shared.ids import DEFAULT_MODEL, FutureId
from gradstream.shared.model_record import is_over, is_unloading
from gradstream.shared.wire import LoraSpec, OptimizerSpec, UnloadModel

router = APIRouter()


_OPTIMIZERS: tuple[str, ...] = get_args(get_type_hints(OptimizerSpec)["type"])
# What peft calls every linear layer.
_ALL_MODULES = ["all-linear"]


class LoraBody(Body):
    """rank and lora_rank, alpha and lora_alpha are the same. dropout can only be 0."""

    rank: Annotated[int, Field(ge=1)] | None = None
    lora_rank: Annotated[int, Field(ge=1)] | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: float = 0.0
    lora_dropout: float = 0.0
    target_modules: Annotated[list[str], Field(min_length=1, max_length=64)] | None = None


class OptimizerBody(Body):
    """The model's optimizer, and what its steps take when a request does not say. optimizer_kwargs: what the type adds."""

    type: str | None = None
    optimizer_dtype: Literal["fp32", "bf16"] | None = None
    learning_rate: Annotated[float, Field(ge=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] | None = None
    eps: Annotated[float, Field(ge=0)] | None = None
    # Any: checked against the optimizer's own fields.
    optimizer_kwargs: dict[str, Any] | None = None


class CreateBody(NamedBody):
    """base_model: missing means the server's. Without lora_config an adapter has the server's rank and alpha."""

    IDLE: ClassVar[frozenset[str]] = frozenset({"type"})

    base_model: str | None = None
    lora_config: LoraBody | None = None
    lora_rank: Annotated[int, Field(ge=1)] | None = None
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    optimizer_config: OptimizerBody | None = None


class ModelBody(NamedBody):
    IDLE: ClassVar[frozenset[str]] = frozenset({"type"})


@router.post("/api/v1/create_model", openapi_extra=documents(CreateBody))
async def create_model(request: Request) -> Response:
    """A new model under this name; one that was made the same way already is found, one that was made otherwise is an error."""
    parts = parts_of(request)
    body = await small_body(request, CreateBody)
    meant = target_of(body, tenant=tenant_of(request))
    return promised(meant, await made(parts, meant, body))


async def made(parts: Parts, meant: Target, body: CreateBody) -> FutureId:
    """The future of the creation of the model that the body asks for, which may be there already.

    Raises InvalidRequest when there is one that was made otherwise.
    """
    card = await parts.catalog.card()
    if body.base_model is not None:
        check_base_model(card, body.base_model)
    spec = spec_of(body, card)
    if not card.is_lora and not meant.is_default:
        raise Unsupported(
            f"model_id: this server trains the full weights of its one model, whose name is {DEFAULT_MODEL!r}; for several models it "
            "must be started with enable_lora: true"
        )
    # Twice, as the model that is there may go while it is looked at.
    for _ in range(2):
        if (future := await create(parts, meant, spec, seq_id=body.seq_id)) is not None:
            return future
        if (future := await _made_before(parts, meant, spec)) is not None:
            return future
    raise Unavailable(f"model_id: {meant.name!r} is being made and dropped by others at this moment; ask again")


async def _made_before(parts: Parts, meant: Target, spec: ModelSpec) -> FutureId | None:
    """The future of the creation of the model that there is; None when there is none after all.

    Raises InvalidRequest when it was made otherwise.
    """
    try:
        record = await record_of(parts, meant)
    except UnknownModel:
        return None
    if is_over(record):
        return None
    if "spec" in record:
        before = msgspec.json.decode(record["spec"], type=ModelSpec)
        if found := differences(before, spec):
            raise InvalidRequest(
                f"model_id: {meant.name!r} exists and was made otherwise: {'; '.join(found)}; unload it first, or take another name"
            )
    return ids.future_id(meant.model, int(record.get("made_at", "0")))


def differences(before: ModelSpec, now: ModelSpec) -> list[str]:
    """What two creations do not agree on, a sentence each. Names of the base model are not compared: they mean the same one."""
    old, new = _flat(before), _flat(now)
    return [
        f"{name} was {old.get(name)}, now {new.get(name)}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def _flat(spec: ModelSpec) -> dict[str, object]:
    fields: dict[str, object] = {}
    for part, value in (("lora", spec.lora), ("optimizer", spec.optimizer), ("optimizer_config", spec.step_defaults)):
        for name, item in msgspec.structs.asdict(value).items() if value is not None else ():
            fields[f"{part}.{name}"] = item
    return fields


def spec_of(body: CreateBody, card: EngineCard) -> ModelSpec:
    """What the body asks for, completed by the server's defaults. Raises InvalidRequest, Unsupported.

    A server of full weights reads no lora_config: clients send one to every server.
    """
    default = default_spec(card)
    optimizer, step_defaults = _optimizer(body.optimizer_config, card)
    return ModelSpec(
        base_model=body.base_model or card.model_name,
        lora=_lora(body, card) if card.is_lora else default.lora,
        optimizer=optimizer,
        step_defaults=step_defaults,
    )


def _lora(body: CreateBody, card: EngineCard) -> LoraSpec:
    lora = body.lora_config or LoraBody()
    require(
        lora.dropout == 0 and lora.lora_dropout == 0,
        "lora_config.dropout: adapters are trained without dropout here; send 0, or leave it out",
    )
    rank = int(_one("lora_config.rank", lora.rank, lora.lora_rank, body.lora_rank) or card.default_rank)
    alpha = _one("lora_config.alpha", lora.alpha, lora.lora_alpha, body.lora_alpha)
    require(
        rank <= card.max_lora_rank, f"lora_config.rank: {rank} is more than {card.max_lora_rank}, the largest rank here"
    )
    modules = card.default_modules if lora.target_modules is None else lora.target_modules
    if modules == _ALL_MODULES and card.default_modules is None:
        modules = None
    if alpha is None:
        alpha = card.default_alpha
    check_alpha(alpha, rank=rank, field="lora_config.alpha")
    return LoraSpec(
        rank=rank,
        alpha=alpha,
        target_modules=None if modules is None else sorted(set(modules)),
    )


def _one(field: str, *values: float | None) -> float | None:
    """The value that is given under one of a field's names."""
    given = {value for value in values if value is not None}
    require(len(given) <= 1, f"{field}: given as {' and as '.join(map(str, sorted(given)))}")
    return next(iter(given), None)


def _optimizer(body: OptimizerBody | None, card: EngineCard) -> tuple[OptimizerSpec, StepDefaults]:
    if body is None:
        return card.optimizer, StepDefaults()
    kind = body.type or card.optimizer.type
    require(
        kind in _OPTIMIZERS,
        f"optimizer_config.type: {kind[:140]!r} is not offered here; choose one of {', '.join(_OPTIMIZERS)}",
    )
    own = card.optimizer if kind == card.optimizer.type else OptimizerSpec(dtype=card.optimizer.dtype)
    fields: dict[str, object] = {**msgspec.structs.asdict(own), "type": kind, **(body.optimizer_kwargs or {})}
    known = set(OptimizerSpec.__struct_fields__) - {"type", "dtype", "learning_rate"}
    unknown = sorted(set(body.optimizer_kwargs or {}) - known)
    require(
        not unknown,
        f"optimizer_config.optimizer_kwargs: there is no {', '.join(unknown)}; there are {', '.join(sorted(known))}",
    )
    if kind == "muon" and body.learning_rate is not None:
        fields["learning_rate"] = body.learning_rate
    if body.optimizer_dtype is not None:
        fields["dtype"] = body.optimizer_dtype
    try:
        spec = msgspec.convert(fields, OptimizerSpec)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"optimizer_config: {error}") from error
    check_optimizer_numbers(spec, field="optimizer_config")
    for name in ("learning_rate", "eps", "weight_decay"):
        if (value := getattr(body, name)) is not None:
            check_fits(value, f"optimizer_config.{name}")
    beta1, beta2 = body.betas or (None, None)
    defaults = StepDefaults(
        learning_rate=body.learning_rate, beta1=beta1, beta2=beta2, eps=body.eps, weight_decay=body.weight_decay
    )
    return spec, defaults


@router.post("/api/v1/get_info", openapi_extra=documents(ModelBody))
async def get_info(request: Request) -> ModelInfo:
    """What a model is, and which tokenizer belongs to it."""
    parts = parts_of(request)
    meant = target_of(await small_body(request, ModelBody), tenant=tenant_of(request))
    record = await record_of(parts, meant)
    card = await parts.catalog.card()
    tokenizer_id = tokenizer_name(card, base_name(record, card))
    return model_info(record, card, model_id=meant.name, tokenizer_id=tokenizer_id)


def tokenizer_name(card: EngineCard, name: str) -> str:
    """The name of the tokenizer; the model's own where none was given, as then the card has a path of this machine."""
    return name if PurePath(card.tokenizer_id).is_absolute() else card.tokenizer_id


@router.post("/api/v1/unload_model", openapi_extra=documents(ModelBody))
async def unload_model(request: Request) -> Response:
    """Drops a model behind everything that it has queued; it can be made again under the same name.

    Once more, for as long as the model was not made again, is the same future.
    """
    parts = parts_of(request)
    body = await small_body(request, ModelBody)
    meant = target_of(body, tenant=tenant_of(request))
    record = await record_of(parts, meant)
    if is_unloading(record) and "ended_at" in record:
        return promised(meant, ids.future_id(meant.model, int(record["ended_at"])))
    return promised(meant, await submit(parts, meant, UnloadModel(), seq_id=body.seq_id))
