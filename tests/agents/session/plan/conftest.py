"""The fixture `site`: an answer of which one token has arrived."""

import pytest

from in_process.answers import AnswerSite
from in_process.peers import Peers


@pytest.fixture
async def site(peers: Peers) -> AnswerSite:
    site = AnswerSite(peers.start("a"))
    await site.open(10)
    site.answer.tokens_arrived(site.tokens(0, 7))
    return site
