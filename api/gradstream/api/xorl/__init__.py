"""The xorl dialect: a server that clients call with model names of their own choice, at the same addresses as the tinker dialect.

How to add a call:
- Write a module with `router = APIRouter()` and ordinary handlers that take the Request and return a Response or a pydantic model.
  Each route is declared with its whole public path: `@router.post("/api/v1/kill_session")`, `@router.post("/sleep")`. Put the module
  into RESOURCES of `routes.py`. `api/dialect.py` does the rest; a POST path that tinker has too may need a line in its RULES.
- Read a small body with `small_body(request, SomeBody)` of `api/body.py`, where SomeBody derives from `NamedBody` (bodies.py): it has
  model_id (session_id is another name for it; missing it is `default`), seq_id, and refuses fields that it does not know. The class
  variable IDLE names fields that clients send without meaning; they are dropped before the check.
- `target_of(body, tenant=tenant_of(request))` (models.py) is the model meant, a `Target` of `api/names.py`: its name, the id under which the
  job log and the records know it, and the tenant. Everything inside works with the id; everything a client reads shows the name.
- `submit(parts, target, payload, seq_id=body.seq_id)` (submitting.py) puts a job behind everything that was accepted for the model
  before, and returns the future's id; `promised(target, future_id)` is the answer {request_id, model_id}. The server numbers the
  jobs. seq_id only tells a repetition of a request: the same number and payload, arrived before anybody polled that future. Where a
  repetition would give another payload (a name made from the time), pass `request_digest=digest_of(raw)`. The model `default` is made
  at its first use; for any other name `submit` raises UnknownModel. UnloadModel is a job like any other, and the model can be made again.
- `record_of(parts, target)` (models.py) is the model's record, or UnknownModel. Fields beside those of every model: dialect ("xorl"),
  name, spec (JSON: what the model was made as) and step_defaults (JSON: learning_rate and so on, of optimizer_config). session is
  the model's own id.
- `outcome_json` (results.py) is what retrieve_future answers when a job is done; add a case there for a new kind of job.
- Errors are raised as GradstreamErrors whose message names the field, as everywhere.
"""
