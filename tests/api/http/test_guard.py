"""Which requests a daemon admits, with and without an API key."""

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from meshd.api.http.guard import is_loopback


class TestWithKey:
    @pytest.fixture
    def api_key(self) -> str:
        return "a-key-of-many-letters"

    async def test_the_right_key_is_admitted(self, openai_client: AsyncOpenAI, model: str) -> None:
        assert [one.id async for one in openai_client.models.list()] == [model]

    async def test_a_wrong_key_is_refused(self, base_url: str) -> None:
        async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="a-key", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.models.list()
        assert caught.value.code == "invalid_api_key"

    @pytest.mark.parametrize("header", [{}, {"Authorization": ""}, {"Authorization": "Basic a-key-of-many-letters"}])
    @pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/mesh/v1/peers", "/openapi.json", "/nothing"])
    async def test_a_request_without_the_key_is_refused(
        self, http: aiohttp.ClientSession, path: str, header: dict[str, str]
    ) -> None:
        async with http.get(path, headers=header) as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert (await response.json())["error"]["code"] == "invalid_api_key"

    async def test_health_needs_no_key(self, http: aiohttp.ClientSession) -> None:
        async with http.get("/health") as response:
            assert response.status == 200

    async def test_with_the_key_any_host_and_origin_is_admitted(self, http: aiohttp.ClientSession, api_key: str) -> None:
        headers = {"Authorization": f"Bearer {api_key}", "Host": "mesh.example:6374", "Origin": "https://elsewhere.example"}
        async with http.get("/v1/models", headers=headers) as response:
            assert response.status == 200
            assert "Access-Control-Allow-Origin" not in response.headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:6374"}, 200),
        ({"Host": "[::1]:6374"}, 200),
        ({"Host": "rebound.example:6374"}, 403),
        ({"Host": "localhost.example"}, 403),
        ({"Host": "127.0.0.1.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:6374", "Origin": "http://localhost:6374"}, 200),
        ({"Host": "localhost:6374", "Origin": "http://localhost:3000"}, 403),
        ({"Origin": "https://elsewhere.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
async def test_without_a_key_web_pages_are_refused(http: aiohttp.ClientSession, headers: dict[str, str], status: int) -> None:
    async with http.get("/v1/models", headers=headers) as response:
        assert response.status == status
        if status == 403:
            assert (await response.json())["error"]["code"] == "forbidden_origin"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "a.localhost", "127.0.0.1:80", "127.9.9.9", "[::1]:6374"])
def test_names_of_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "[", "10.0.0.1", "0.0.0.0", "[::2]", "localhost@evil.example", "evil.example#localhost"])
def test_names_of_other_hosts(host: str) -> None:
    assert not is_loopback(host)
