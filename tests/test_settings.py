"""The table of settings. `test_config.py` tests where values come from."""

import re
from pathlib import Path

import pytest

from meshd.errors import ConfigError
from meshd.settings import SETTINGS, SETTINGS_BY_NAME, Setting, Value
from meshd.values import Address, count


def test_names_and_variables_are_unique_and_spelled_alike() -> None:
    assert len(SETTINGS_BY_NAME) == len({setting.variable for setting in SETTINGS}) == len(SETTINGS)
    for setting in SETTINGS:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", setting.name)
        assert setting.variable.removeprefix("MESHD_").lower().replace("_", "-") == setting.name


def test_the_field_of_config_is_the_name_unless_the_setting_has_another() -> None:
    assert Setting(name="queue-limit", help="x").key == "queue_limit"
    assert SETTINGS_BY_NAME["peer"].key == "peers"


def test_texts_of_a_repeated_setting_are_split_at_commas_and_blanks_dropped() -> None:
    peers = SETTINGS_BY_NAME["peer"]
    expected = (Address("a", 6375), Address("b", 2), Address("c", 6375))
    assert peers.convert(["a, b:2", "", "c,"], "flag --peer") == expected
    assert peers.convert("", "flag --peer") == ()


def test_a_single_setting_takes_one_value() -> None:
    threads = Setting(name="threads", help="x", parse=count(0))
    assert threads.convert("3", "default") == threads.convert(["3"], "default") == 3
    for texts in (["3", "4"], []):
        with pytest.raises(ConfigError, match=r"threads \(from file x\) is wrong: it takes one value"):
            threads.convert(texts, "file x")


def test_every_default_of_a_plain_setting_passes_its_own_parser() -> None:
    for setting in SETTINGS:
        if setting.default is not None and not setting.many:
            assert setting.convert("off" if setting.default is False else str(setting.default), "default") == setting.default
        elif setting.default:
            assert setting.convert(list(map(str, setting.default)), "default") == setting.default


@pytest.mark.parametrize(
    ("origin", "chosen"), [("flag --name", True), ("environment MESHD_NAME", True), ("file /x", False), ("default", False)]
)
def test_a_value_from_a_flag_or_a_variable_is_chosen_for_this_command(origin: str, chosen: bool) -> None:
    assert Value(SETTINGS_BY_NAME["name"], "x", origin).chosen is chosen


def test_values_are_converted_for_json_and_secrets_are_hidden() -> None:
    rows = [
        ("key", "secret", "(set)"),
        ("key", None, None),
        ("peer", (Address("a", 1),), ["a:1"]),
        ("state", Path("/x"), "/x"),
        ("copies", 2, 2),
        ("mirror", False, False),
    ]
    assert [Value(SETTINGS_BY_NAME[name], value, "default").plain() for name, value, _ in rows] == [shown for *_, shown in rows]
