import re

import aiohttp
import pytest

from meshd.api.http.routes import ROUTES, Route


def test_each_method_of_a_path_has_one_route() -> None:
    pairs = [(route.method, route.path) for route in ROUTES]
    assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("route", [route for route in ROUTES if route.takes], ids=lambda route: route.path)
async def test_a_body_with_an_unknown_field_is_refused(http: aiohttp.ClientSession, route: Route) -> None:
    async with http.request(route.method, route.path, json={"no_such_field": 1}) as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, "no_such_field")


@pytest.mark.parametrize("route", [route for route in ROUTES if route.query], ids=lambda route: route.path)
async def test_a_query_with_an_unknown_parameter_is_refused(http: aiohttp.ClientSession, route: Route) -> None:
    path = re.sub(r"{.*?}", "x", route.path)
    async with http.request(route.method, f"{path}?no_such_parameter=1") as response:
        error = (await response.json())["error"]
    assert (response.status, error["param"]) == (400, "no_such_parameter")
