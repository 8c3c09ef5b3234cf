from typing import Any

import aiohttp
import msgspec

from fake_api.words import CARD
from meshd.agents.service import AvailableModel
from meshd.types import SamplingDefaults

DETAILS = {"loaded": True, "context_length": CARD.spec.context_length, "quantisation": "F32", "sampling": {}}
ROW = {"id": "words", "object": "model", "created": CARD.created, "owned_by": "meshd", "meshd": DETAILS}


async def test_the_list_has_the_models_that_can_answer(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/models") as response:
        assert await response.json() == {"object": "list", "data": [ROW]}


async def test_a_model_is_found_by_its_name_its_reference_and_its_id(http: aiohttp.ClientSession) -> None:
    for name in ("words", CARD.id, CARD.ref):
        async with http.get(f"/v1/models/{name}") as response:
            assert await response.json() == ROW


async def test_the_error_for_an_unknown_model_lists_the_known_ones(http: aiohttp.ClientSession) -> None:
    for name in ("other", "org/other:4b", "WORDS"):
        async with http.get(f"/v1/models/{name}") as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert f"no model {name!r} can answer" in error["message"]
        assert error["message"].endswith("words")


async def test_a_model_that_a_request_would_load_is_listed_as_such(http: aiohttp.ClientSession, coordinator: Any) -> None:
    card = msgspec.structs.replace(CARD, sampling=SamplingDefaults(temperature=0.2))
    coordinator.available = [AvailableModel(card=card, loaded=False)]
    expected = ROW | {"meshd": DETAILS | {"loaded": False, "sampling": {"temperature": 0.2}}}
    async with http.get("/v1/models") as response:
        assert (await response.json())["data"] == [expected]
    async with http.get("/v1/models/words") as response:
        assert await response.json() == expected
