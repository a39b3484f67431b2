"""Query strings as typed values, refused by name when they are wrong."""

from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradstream.api.body import sentence
from gradstream.shared.errors import InvalidRequest

MAX_PAGE = 1000


class Query(BaseModel):
    """A query string: unknown names are refused, values are read from text."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ScopeQuery(Query):
    """access_scope: a tenant's access ends at what it owns, so both mean the same here."""

    access_scope: Literal["owned", "accessible"] = "owned"


class PageQuery(Query):
    """limit: more than MAX_PAGE is answered with MAX_PAGE, which the cursor then says."""

    limit: Annotated[int, Field(ge=1, le=2**31 - 1)] = 20
    offset: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0

    @property
    def page(self) -> int:
        return min(self.limit, MAX_PAGE)


class ScopedPageQuery(PageQuery):
    access_scope: Literal["owned", "accessible"] = "owned"
    project_id: Annotated[str, Field(max_length=256)] | None = None


QueryT = TypeVar("QueryT", bound=Query)


def query(request: Request, model: type[QueryT]) -> QueryT:
    """The request's query string; raises InvalidRequest that names every wrong part."""
    try:
        return model.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise InvalidRequest(sentence(error)) from error


# Any: an OpenAPI fragment is free-form JSON.
def takes(model: type[Query]) -> dict[str, Any]:
    """The OpenAPI parameters of a handler that reads its query string itself."""
    schema = model.model_json_schema()
    required = schema.get("required", [])
    return {
        "parameters": [
            {"name": name, "in": "query", "required": name in required, "schema": field}
            for name, field in schema.get("properties", {}).items()
        ]
    }
