import json

import msgspec

from meshd.api.http.reply import Rows, json_response


class Point(msgspec.Struct):
    x: float


def test_structs_and_plain_data_become_json() -> None:
    for body, text in ((Point(1.5), '{"x":1.5}'), ({"ü": [None, True]}, '{"ü":[null,true]}'), ([], "[]")):
        response = json_response(body)
        assert response.body == text.encode()
        assert (response.status, response.content_type) == (200, "application/json")


def test_status_and_headers_are_those_of_the_caller() -> None:
    response = json_response({}, status=503, headers={"Retry-After": "1"})
    assert (response.status, response.headers["Retry-After"]) == (503, "1")


def test_rows_are_a_list_object() -> None:
    body = json_response(Rows([{"a": 1}])).body
    assert isinstance(body, bytes)
    assert json.loads(body) == {"object": "list", "data": [{"a": 1}]}
