"""Routes that are called without FastAPI answer as they do with it."""

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from pydantic import BaseModel

from gradstream.api.direct import Direct, direct_routes
from gradstream.api.native.routes import RESOURCES as OWN
from gradstream.api.tinker.routes import RESOURCES
from gradstream.api.xorl.routes import RESOURCES as XORL


class Named(BaseModel):
    name: str


router = APIRouter()


@router.post("/plain")
async def plain(request: Request) -> Response:
    return Response((await request.body()).upper())


@router.post("/refused")
async def refused(_request: Request) -> Response:
    raise KeyError("of a subclass of LookupError")


@router.post("/rendered")
async def rendered(_request: Request) -> Named:
    return Named(name="by FastAPI")


@router.post("/item/{name}")
async def item(_request: Request) -> Response:
    return Response()


@router.post("/body")
async def body(_named: Named) -> Response:
    return Response()


@router.post("/with-dependency", dependencies=[Depends(lambda: None)])
async def with_dependency(_request: Request) -> Response:
    return Response()


@router.post("/in-a-thread")
def in_a_thread(_request: Request) -> Response:
    return Response()


async def on_lookup_error(_request: Request, error: Exception) -> Response:
    return Response(type(error).__name__, status_code=418)


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    inner = FastAPI()
    inner.include_router(router, prefix="/v1")
    routes = dict(direct_routes([router], prefix="/v1"))
    app = Direct(inner, routes=routes, handlers={LookupError: on_lookup_error})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as found:
        yield found


def test_only_handlers_that_take_the_request_alone_and_give_a_response_are_called_directly() -> None:
    assert {path for (_, path), _ in direct_routes([router])} == {"/plain", "/refused"}


async def test_a_direct_route_answers_and_everything_else_is_left_to_fastapi(client: httpx.AsyncClient) -> None:
    assert (await client.post("/v1/plain", content=b"abc")).content == b"ABC"
    assert (await client.post("/v1/rendered")).json() == {"name": "by FastAPI"}
    assert (await client.get("/v1/plain")).status_code == 405
    assert (await client.post("/plain")).status_code == 404


async def test_an_error_of_a_direct_route_finds_the_handler_of_its_nearest_class(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/refused")
    assert (answer.status_code, answer.text) == (418, "KeyError")


def test_the_calls_that_come_all_the_time_are_direct() -> None:
    ours = {path for (_, path), _ in direct_routes([resource.router for resource in (*RESOURCES, *OWN)])}
    assert {"/forward_backward", "/optim_step", "/asample", "/retrieve_future", "/session_heartbeat"} <= ours
    xorl = {path for (_, path), _ in direct_routes([resource.router for resource in XORL])}
    assert {"/api/v1/forward_backward", "/api/v1/optim_step", "/api/v1/retrieve_future"} <= xorl
