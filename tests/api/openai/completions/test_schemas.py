import pytest

from fake_api.generation_requests import completion
from meshd.errors import InvalidRequest


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
def test_each_kind_of_prompt_reaches_the_coordinator(prompt: object, prompts: list[object]) -> None:
    assert [one.prompt for one in completion(prompt=prompt)] == prompts


def test_answers_are_ordered_by_prompt() -> None:
    requests = completion(prompt=["a", "b"], n=2, seed=1, best_of=2)
    assert [(one.prompt, one.sampling.seed) for one in requests] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


def test_a_prompt_of_mixed_kinds_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="mixes"):
        completion(prompt=["a", 1])


def test_only_text_can_be_echoed_and_not_with_logprobs() -> None:
    assert len(completion(prompt=["a", "b"], echo=True)) == 2
    for fields in ({"prompt": [1, 2], "echo": True}, {"echo": True, "logprobs": 0}):
        with pytest.raises(InvalidRequest) as refused:
            completion(**fields)
        assert refused.value.param == "echo"
