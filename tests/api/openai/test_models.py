import aiohttp

from fake_api.words import CARD

ROW = {"id": "words", "object": "model", "created": CARD.created, "owned_by": "meshd"}


async def test_the_list_has_the_models_that_can_answer_now(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/models") as response:
        assert await response.json() == {"object": "list", "data": [ROW]}


async def test_a_model_is_found_by_its_name_and_by_its_id(http: aiohttp.ClientSession) -> None:
    for name in ("words", CARD.id):
        async with http.get(f"/v1/models/{name}") as response:
            assert await response.json() == ROW


async def test_the_error_for_an_unknown_model_lists_the_known_ones(http: aiohttp.ClientSession) -> None:
    for name in ("other", "org/other:4b", "WORDS"):
        async with http.get(f"/v1/models/{name}") as response:
            error = (await response.json())["error"]
        assert (response.status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert f"no model {name!r} can answer now" in error["message"]
        assert error["message"].endswith("words")
