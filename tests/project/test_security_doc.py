"""docs/security.md covers every message, and the tests that it names exist."""

import re
from pathlib import Path

from meshd.protocol.messages import REGISTRY

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()


def test_every_message_has_a_row_that_says_who_may_send_it() -> None:
    rows = [line.split("|")[1] for line in TEXT.splitlines() if re.match(r"\| [A-Z_, ]+ \|", line)]
    named = [name.strip() for row in rows for name in row.split(",")]
    assert len(named) == len(set(named)), "each message has one row"
    registered = {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", message.__name__).upper() for message in REGISTRY.values()}
    assert registered == set(named), registered ^ set(named)


def test_the_tests_of_the_attacks_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 15
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]
    assert not missing
