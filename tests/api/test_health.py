from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families


async def test_health(http: aiohttp.ClientSession) -> None:
    async with http.get("/health") as response:
        assert response.status == 200
        assert await response.json() == {"status": "ok"}


async def test_ready(http: aiohttp.ClientSession) -> None:
    async with http.get("/ready") as response:
        assert response.status == 200
        assert (await response.json())["status"] == "ready"


async def test_not_ready_while_a_model_loads(http: aiohttp.ClientSession, coordinator: Any) -> None:
    coordinator.ready = (False, 0.25, "words: 1 of 4 layers")
    async with http.get("/ready") as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert await response.json() == {"status": "loading", "progress": 0.25, "waiting_for": "words: 1 of 4 layers"}


async def test_metrics_count_requests_by_route_and_outcome(http: aiohttp.ClientSession) -> None:
    for path in ("/v1/models", "/v1/models/words", "/v1/models/none", "/one", "/two"):
        async with http.get(path):
            pass
    async with http.get("/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        families = {family.name: family for family in text_string_to_metric_families(await response.text())}
    counted = {
        (sample.labels["route"], sample.labels["outcome"]): sample.value
        for sample in families["meshd_requests"].samples
        if sample.name == "meshd_requests_total"
    }
    assert counted == {
        ("/v1/models", "ok"): 1,
        ("/v1/models/{id}", "ok"): 1,
        ("/v1/models/{id}", "model_not_found"): 1,
        ("unknown", "unknown_route"): 2,
    }
