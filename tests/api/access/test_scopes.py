"""Which scope each route needs."""

import pytest

from meshd.api.access.scopes import Need, Scope, grants, need_of
from meshd.api.http.routes import ROUTES


@pytest.mark.parametrize(
    ("method", "path", "need"),
    [
        ("GET", "/health", Need.NOTHING),
        ("GET", "/ready", Need.ANY_KEY),
        ("GET", "/openapi.json", Need.ANY_KEY),
        ("GET", "", Need.ANY_KEY),
        ("GET", "/metrics", Need.READ),
        ("POST", "/v1/chat/completions", Need.INFER),
        ("DELETE", "/v1/responses/{id}", Need.INFER),
        ("POST", "/api/chat", Need.INFER),
        ("GET", "/mesh/v1/peers", Need.READ),
        ("GET", "/mesh/v1/events", Need.READ),
        ("POST", "/mesh/v1/place", Need.ADMIN),
        ("DELETE", "/mesh/v1/sessions/{id}", Need.ADMIN),
        ("POST", "/mesh/v1/invites", Need.OWNER),
        ("DELETE", "/mesh/v1/invites", Need.OWNER),
    ],
)
def test_what_a_route_needs(method: str, path: str, need: Need) -> None:
    assert need_of(method, path) is need


def test_only_admin_may_change_the_cluster() -> None:
    changes = [route for route in ROUTES if route.path.startswith("/mesh/") and route.method != "GET"]
    assert len(changes) > 5
    for route in changes:
        need = need_of(route.method, route.path)
        assert [scope for scope in Scope if grants(scope, need)] == [Scope.ADMIN]


def test_a_scope_has_no_right_of_another_one() -> None:
    assert not grants(Scope.INFER, Need.READ)
    assert not grants(Scope.READ, Need.INFER)
    assert all(grants(scope, Need.NOTHING) and grants(scope, Need.ANY_KEY) for scope in Scope)
    assert all(grants(Scope.ADMIN, need) for need in Need)
