from pathlib import Path

import pytest

from meshd.cli.support.arguments import Parser, add_json, add_quant, add_settings, model_of, settings_of
from meshd.errors import InvalidRequest


@pytest.fixture
def parser() -> Parser:
    parser = Parser("try", "try something", "meshd try")
    parser.add_argument("model", nargs="?")
    add_quant(parser)
    add_settings(parser, ("threads", "peer", "exact"))
    return parser


def test_a_flag_wins_over_the_environment_and_a_fixed_value_over_both(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHD_THREADS", "3")
    assert settings_of(parser.parse_args([]))["threads"].value == 3
    args = parser.parse_args(["--threads", "5"])
    assert settings_of(args)["threads"].value == 5
    assert settings_of(args, {"threads": "7"})["threads"].value == 7


def test_a_setting_with_many_values_is_repeated_and_a_switch_needs_no_value(parser: Parser) -> None:
    settings = settings_of(parser.parse_args(["--peer", "a:1", "--peer", "b:2", "--exact"]))
    assert len(settings["peer"].value) == 2
    assert settings["exact"].value is True


def test_flags_are_not_abbreviated(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--thread", "5"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("meshd: wrong usage of `meshd try`: ")


def test_help_shows_the_default_the_variable_and_the_example(parser: Parser) -> None:
    add_json(parser)
    text = " ".join(parser.format_help().split())
    assert "default: 0 [MESHD_THREADS]" in text
    assert text.startswith("usage: meshd try")
    assert text.endswith("example: meshd try")


def test_a_path_is_relative_to_the_working_directory(parser: Parser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_of(parser.parse_args(["file:hf", "--quant", "q8"])) == f"file:{tmp_path / 'hf'}+q8"
    assert model_of(parser.parse_args(["smollm2:135m"])) == "smollm2:135m"
    with pytest.raises(InvalidRequest, match="quantised"):
        model_of(parser.parse_args(["smollm2:135m", "--quant", "q8"]))
