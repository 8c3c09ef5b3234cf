"""Every error that meshd raises on purpose.

MeshdError                      code, message, hint; only its subclasses are raised
 +- UsageError                  the request itself is wrong
 |   +- InvalidRequest          a field is wrong (param names it)
 |   |   +- ToolsUnsupported    it asks for tools
 |   |   +- NoChatTemplate      the model can only continue a text
 |   |   +- InvalidSampling     a sampling parameter can't be used with this model, on any peer
 |   +- ContextTooLong          prompt and answer exceed the model's context
 |   +- UnknownModel            no such model; nearest names in the hint
 |   +- UnknownSession          no such answer, or its record is gone
 |   +- ConfigError             a setting is wrong
 |   +- NotPermitted            the API key may not do this
 +- Unavailable                 a valid request that can't be met now; retry_after_s estimates when it can
 |   +- Overloaded              a queue is full
 |   |   +- RateLimited         the API key has sent too many requests
 |   +- NotReady                the model is still loading (progress in 0..1)
 |   +- DoesNotFit              no plan fits; missing_bytes says by how much
 |   +- NoPeer                  a peer that the request names is not in the cluster
 +- PeerFault                   another peer broke a rule or went away
 |   +- ProtocolViolation       its bytes break the protocol: the link closes
 |   +- PeerLost                it is gone, or silent for too long
 |   |   +- NotListening        its device answers, but no process listens at the address
 |   +- PeerRefused             it may not link with this peer
 |   |   +- AnotherKey          it has another cluster key
 |   +- RemoteFailure           it answered with an ERROR message
 |   +- Superseded              another coordinator has taken over the session
 +- LocalFault                  this device failed
     +- StorageError            disk full, file damaged, folder in use by another daemon
     +- DownloadError           a source could not be read
     +- ModelFileError          a model's file is broken; names the tensor
     +- OutOfMemory             not enough memory for a reservation
     +- Cancelled               the session was ended by its client or by shutdown

Each class has one stable `code`, which is the same in API JSON, in ERROR messages on the wire, in the log and on the command line.
"""

from typing import ClassVar, Self


class MeshdError(Exception):
    """The base class. `message` says what went wrong and why, `hint` what to do next."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def copy(self) -> Self:
        """Return the error without its traceback, which keeps every frame that it passed alive, and so whole requests."""
        twin = type(self).__new__(type(self), *self.args)
        twin.__dict__.update(self.__dict__)
        return twin


class UsageError(MeshdError):
    """The request itself is wrong."""

    code = "invalid_request"


class InvalidRequest(UsageError):
    """A field of a request is wrong; `param` names it."""

    code = "invalid_value"

    def __init__(self, message: str, *, param: str | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.param = param


class ToolsUnsupported(InvalidRequest):
    """The request asks the model to call tools, which meshd does not support."""

    code = "tools_unsupported"


class NoChatTemplate(InvalidRequest):
    """The model can continue a text, but its file does not say how to write a chat."""

    code = "no_chat_template"


class InvalidSampling(InvalidRequest):
    """A sampling parameter can't be used with this model. No other peer could use it either."""

    code = "invalid_sampling"


class ContextTooLong(UsageError):
    """Prompt and answer together exceed the context."""

    code = "context_length_exceeded"


class UnknownModel(UsageError):
    """No model has this name."""

    code = "model_not_found"


class UnknownSession(UsageError):
    """No live peer coordinates this session or has its record."""

    code = "session_not_found"


class ConfigError(UsageError):
    """A setting is wrong."""

    code = "invalid_config"


class NotPermitted(UsageError):
    """The API key of the request is valid, but has no right to do this."""

    code = "not_permitted"


class Unavailable(MeshdError):
    """The request is valid but can't be met now; `retry_after_s` estimates when it can."""

    code = "unavailable"

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    """A bounded queue is full."""

    code = "overloaded"


class RateLimited(Overloaded):
    """The API key has more requests per minute, or at once, than it may have."""

    code = "rate_limit_exceeded"


class NotReady(Unavailable):
    """The model is being fetched or loaded."""

    code = "model_loading"

    def __init__(self, message: str, *, progress: float = 0.0, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.progress = progress


class DoesNotFit(Unavailable):
    """No plan fits the live peers. At least `missing_bytes` more memory is needed."""

    code = "does_not_fit"

    def __init__(self, message: str, *, missing_bytes: int = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint, retry_after_s=10.0)
        self.missing_bytes = missing_bytes


class NoPeer(Unavailable):
    """A peer that the request names is not in the cluster now."""

    code = "no_such_peer"


class PeerFault(MeshdError):
    """Another peer broke a rule or went away."""

    code = "peer_fault"


class ProtocolViolation(PeerFault):
    """Bytes that break the protocol; the link they came on is closed."""

    code = "protocol_violation"


class PeerLost(PeerFault):
    """The peer's link broke, or it was silent past the deadline."""

    code = "peer_lost"


class NotListening(PeerLost):
    """The device at an address answers that no process listens there: the peer's process has ended, or never ran there."""


class PeerRefused(PeerFault):
    """The peer may not link with this one: it has another cluster key, another version, or a copied identity."""

    code = "peer_refused"


class AnotherKey(PeerRefused):
    """The peer's certificate is of another cluster, or of another key of this one."""


class RemoteFailure(PeerFault):
    """The peer answered with an ERROR message; `remote_code` is its code."""

    code = "remote_failure"

    def __init__(self, message: str, *, remote_code: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.remote_code = remote_code


class Superseded(PeerFault):
    """The session has another coordinator, or is in a later epoch than the sender knows."""

    code = "superseded"


class LocalFault(MeshdError):
    """This device failed."""


class StorageError(LocalFault):
    """The disk is full, a file is damaged, or a folder is in use by another daemon."""

    code = "storage_error"


class DownloadError(LocalFault):
    """A model's source could not be read."""

    code = "download_failed"


class ModelFileError(LocalFault):
    """A model's file is broken."""

    code = "bad_model_file"


class OutOfMemory(LocalFault):
    """There is not enough memory for a reservation."""

    code = "out_of_memory"


class Cancelled(LocalFault):
    """The session was ended by its client or by shutdown."""

    code = "cancelled"


def first_error(error: BaseException) -> BaseException:
    """Return the first error of an exception group, since the others usually follow from it; any other error unchanged."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
