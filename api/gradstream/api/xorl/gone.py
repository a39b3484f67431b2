"""Calls that clients have and no server answers: each says what to do instead. Their bodies, which may hold secrets, are not read."""

from collections.abc import Awaitable, Callable, Mapping

from fastapi import APIRouter, Request, Response

from gradstream.api.errors import http_error

router = APIRouter()
_SAMPLER = "save_weights_for_sampler writes the weights in the form that inference servers load"
_HUB = f"this server uploads to no model hub and no provider; {_SAMPLER}"
_CONNECTION = "connections to inference servers are not kept open; add_inference_endpoint registers one"
_GONE: Mapping[str, str] = {
    "/api/v1/save_full_weights_safetensors": _SAMPLER,
    "/api/v1/update_dedicated_endpoint": _HUB,
    "/api/v1/update_serverless_weights": _HUB,
    "/api/v1/set_sync_quantization": "pushing weights to inference endpoints is not offered yet, so there is nothing to quantize",
    "/connect_inference_endpoint": _CONNECTION,
    "/disconnect_inference_endpoint": _CONNECTION,
}


def _refusal(path: str, instead: str) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(_request: Request) -> Response:
        return http_error(
            404, code="not_found", detail=f"{path.rpartition('/')[2]}: there is no such call here; {instead}"
        )

    return refuse


for _path, _instead in _GONE.items():
    router.add_api_route(_path, _refusal(_path, _instead), methods=["POST"], include_in_schema=False)
