"""The errors that a client can see.

GradstreamError
  UserError               the client must change something          category user
    InvalidRequest        a value, shape, dtype or length is wrong
    UnknownModel          no such model, sampler, future or checkpoint
    SequenceConflict      the seq_id was used with another payload, or by a refused request
    NonFinite             a loss or gradient of this job is not finite
    CheckpointExists      the name is taken and overwrite was not asked for
    Unsupported           a known feature that this server does not offer
    PayloadTooLarge       a body, array or count is over its limit
    BudgetExceeded        the tenant has as many models, samplers or bytes as it may have
    Forbidden             the tenant may not do this, whatever it names
  ServerError             the server could not do it               category server
    ModelLost             the model's training state went with a crashed gang
    SequenceGap           jobs were held for a seq_id that never came
    QueueFull             back-pressure: come back later             retryable
    Unavailable           no worker, or Redis is away                retryable
    EngineFailure         the op broke on the gang
    OutOfMemory           the device has no room for the job
    StorageFailure        a checkpoint could not be written or read
    StorageLimit          the save would take more disk space than the server is given
"""

from typing import ClassVar, Literal

Category = Literal["user", "server", "unknown"]


class GradstreamError(Exception):
    """A failure with a stable code. The message says what was wrong, with the value, and what would be right."""

    code: ClassVar[str] = "error"
    category: ClassVar[Category] = "unknown"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UserError(GradstreamError):
    code = "user_error"
    category = "user"


class InvalidRequest(UserError):
    code = "invalid_request"


class UnknownModel(UserError):
    code = "unknown_model"


class SequenceConflict(UserError):
    code = "sequence_conflict"


class NonFinite(UserError):
    code = "non_finite"


class CheckpointExists(UserError):
    code = "checkpoint_exists"


class Unsupported(UserError):
    code = "unsupported"


class PayloadTooLarge(UserError):
    code = "payload_too_large"


class BudgetExceeded(UserError):
    code = "budget_exceeded"


class Forbidden(UserError):
    code = "forbidden"


class ServerError(GradstreamError):
    code = "server_error"
    category = "server"


class ModelLost(ServerError):
    code = "model_lost"


class SequenceGap(ServerError):
    code = "sequence_gap"


class QueueFull(ServerError):
    """Back-pressure. retry_after_s is the server's estimate of when there is room."""

    code = "queue_full"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(ServerError):
    code = "unavailable"
    retryable = True


class EngineFailure(ServerError):
    code = "engine_failure"


class OutOfMemory(ServerError):
    code = "out_of_memory"


class StorageFailure(ServerError):
    code = "storage_failure"


class StorageLimit(ServerError):
    code = "storage_limit"
