"""The limits of one key, by a clock that the test sets."""

import weakref

import msgspec
import pytest

from meshd.api.access.keys import ApiKey
from meshd.api.access.limits import KeyUse
from meshd.api.access.scopes import Scope
from meshd.errors import RateLimited

KEY = ApiKey(name="phone", prefix="meshd-abc123", sha256="0" * 64, scope=Scope.INFER, created=1)


class Answer:
    status = "in_progress"

    async def cancel(self) -> None:
        self.status = "cancelled"


def test_a_key_without_limits_has_none() -> None:
    use = KeyUse(KEY)
    for _ in range(1000):
        use.admit(0.0)
    assert use.running == 1000


def test_no_more_than_the_rate_begin_in_any_minute() -> None:
    use = KeyUse(msgspec.structs.replace(KEY, rate=3))
    for now in (0.0, 20.0, 40.0):
        use.admit(now)
    with pytest.raises(RateLimited, match="3 requests a minute") as caught:
        use.admit(50.0)
    assert caught.value.retry_after_s == pytest.approx(10.0)
    use.admit(60.0)
    with pytest.raises(RateLimited) as caught:
        use.admit(60.0)
    assert caught.value.retry_after_s == pytest.approx(20.0)
    assert caught.value.code == "rate_limit_exceeded"


def test_a_refused_request_does_not_count() -> None:
    use = KeyUse(msgspec.structs.replace(KEY, rate=1))
    use.admit(0.0)
    for now in range(1, 60):
        with pytest.raises(RateLimited):
            use.admit(float(now))
    use.admit(60.0)


def test_a_place_is_free_when_a_request_has_ended() -> None:
    use = KeyUse(msgspec.structs.replace(KEY, concurrency=2))
    first, _ = use.admit(0.0), use.admit(0.0)
    with pytest.raises(RateLimited, match="2 requests at once"):
        use.admit(0.0)
    first.close()
    first.close()
    use.admit(0.0)
    with pytest.raises(RateLimited):
        use.admit(0.0)


def test_an_answer_in_the_background_holds_its_place_until_it_ends() -> None:
    use = KeyUse(msgspec.structs.replace(KEY, concurrency=1))
    answer = Answer()
    request = use.admit(0.0)
    request.answers.append(answer)
    request.close()
    with pytest.raises(RateLimited):
        use.admit(0.0)
    answer.status = "completed"
    use.admit(0.0)


async def test_a_revoked_key_gives_back_the_answers_that_are_to_be_cancelled() -> None:
    use = KeyUse(KEY)
    answers = [Answer(), Answer()]
    ended, running = use.admit(0.0), use.admit(0.0)
    ended.answers.append(answers[0])
    running.answers.append(answers[1])
    ended.close()
    assert set(use.revoke("revoked")) == set(answers)
    assert running.revoked == "revoked"


def test_ended_answers_of_a_key_without_limits_are_not_kept() -> None:
    use, ended = KeyUse(KEY), Answer()
    kept = weakref.ref(ended)
    admission = use.admit(0.0)
    admission.answers.append(ended)
    admission.close()
    ended.status = "completed"
    del ended, admission
    use.admit(1.0).close()
    assert kept() is None
