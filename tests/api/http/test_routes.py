import aiohttp
import pytest

from fake_api.api_keys import LOCAL
from meshd.api.http.routes import ROUTES, Route


def test_each_method_of_a_path_has_one_route() -> None:
    pairs = [(route.method, route.path) for route in ROUTES]
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.takes and route.path.startswith("/mesh/")], ids=lambda route: route.path
)
async def test_the_clusters_own_routes_refuse_unknown_fields(http: aiohttp.ClientSession, route: Route) -> None:
    owner = {"x-api-key": LOCAL}
    async with http.request(route.method, route.path, json={"no_such_field": 1}, headers=owner) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, "no_such_field")
