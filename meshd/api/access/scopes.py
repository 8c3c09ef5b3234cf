"""What a key may do: the scope that each route needs."""

from enum import StrEnum


class Scope(StrEnum):
    """The rights of an API key."""

    INFER = "infer"
    """Ask models: everything under /v1/ and /api/."""
    READ = "read"
    """See the cluster, but change nothing: GET under /mesh/v1/, and /metrics. For monitors and Prometheus."""
    ADMIN = "admin"
    """Everything."""


class Need(StrEnum):
    """What a request must have to be admitted."""

    NOTHING = "nothing"
    ANY_KEY = "any key"
    INFER = "infer"
    READ = "read"
    ADMIN = "admin"
    OWNER = "owner"
    """As ADMIN, and a key is needed even where the API is open to every program of this machine: what is asked for would let its
    holder in from elsewhere."""


_OPEN = frozenset({"/health"})
"""Without a key, so that supervisors can use it."""
_GRANTS = {
    Scope.INFER: frozenset({Need.INFER, Need.ANY_KEY}),
    Scope.READ: frozenset({Need.READ, Need.ANY_KEY}),
    Scope.ADMIN: frozenset({Need.INFER, Need.READ, Need.ADMIN, Need.OWNER, Need.ANY_KEY}),
}


def need_of(method: str, path: str) -> Need:
    """Return what a request needs, by its method and the path of its route (such as `/v1/models/{id}`); empty for no route."""
    if path in _OPEN:
        return Need.NOTHING
    if path.startswith(("/v1/", "/api/")):
        return Need.INFER
    if path == "/metrics" or (path.startswith("/mesh/v1/") and method in {"GET", "HEAD"}):
        return Need.READ
    if path.startswith("/mesh/v1/invites"):
        return Need.OWNER
    return Need.ADMIN if path.startswith("/mesh/v1/") else Need.ANY_KEY


def grants(scope: Scope, need: Need) -> bool:
    """Whether a key of this scope meets a need."""
    return need is Need.NOTHING or need in _GRANTS[scope]
