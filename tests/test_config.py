from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest

from meshd.config import (
    Config,
    Settings,
    debug_wanted,
    load_config,
    require_guarded_api,
)
from meshd.errors import ConfigError
from meshd.settings import SETTINGS, RawValue, Setting
from meshd.values import Address

_SAMPLES = {
    "HOST:PORT": "127.0.0.1:1",
    "SIZE": "1GiB",
    "N": "3",
    "mdns,static,mqtt": "static",
    "BROKER": "mqtts://me:word@broker:1",
    "PREFIX|off": "home",
    "compute,attention,storage": "compute",
    "NAME": "torch",
    "LEVEL": "debug",
    "FORMAT": "json",
    "URL": "http://index/simple",
    "on|off": "on",
    "SECONDS": "2.5",
}
"""A valid value for each metavar."""


def _load(tmp_path: Path, flags: Mapping[str, RawValue] | None = None, environ: Mapping[str, str] | None = None) -> Config:
    return load_config({"state": str(tmp_path), "config": _file(tmp_path), **(flags or {})}, environ or {})


def _file(tmp_path: Path, text: str = "") -> str:
    path = tmp_path / "config.toml"
    if text or not path.exists():
        path.write_text(text)
    return str(path)


def test_every_field_of_config_has_one_setting() -> None:
    assert {field.name for field in fields(Config)} == {setting.key for setting in SETTINGS} - {"config"}
    assert len({setting.variable for setting in SETTINGS}) == len(SETTINGS)


def test_defaults_are_as_documented(tmp_path: Path) -> None:
    config = _load(tmp_path)
    assert config.api == Address("127.0.0.1", 6374)
    assert config.link == Address("0.0.0.0", 6375)
    assert config.discovery == ("mdns", "static", "mqtt")
    assert config.mqtt is None
    assert config.memory_bytes is None
    assert config.key is None
    assert config.threads == 0
    assert (config.copies, config.mirror, config.drain_timeout) == (2, False, 10.0)


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    config = _file(tmp_path, 'name = "file"\n')
    by_file = Settings({"config": config}, {})
    by_environment = Settings({"config": config}, {"MESHD_NAME": "environment"})
    by_flag = Settings({"config": config, "name": "flag"}, {"MESHD_NAME": "environment"})
    assert (by_file["name"].value, by_file["name"].origin) == ("file", f"file {config}")
    assert (by_environment["name"].value, by_environment["name"].origin) == ("environment", "environment MESHD_NAME")
    assert (by_flag["name"].value, by_flag["name"].origin) == ("flag", "flag --name")
    assert by_flag["api"].origin == "default"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_can_come_from_the_environment(setting: Setting) -> None:
    value = Settings({}, {setting.variable: _SAMPLES.get(setting.metavar, "text")})[setting.name]
    assert value.origin == f"environment {setting.variable}"
    assert value.value not in (None, ())


def test_repeated_and_comma_separated_values_are_one_list(tmp_path: Path) -> None:
    flags = {"peer": ["a:1,b", "[::1]:3"]}
    assert _load(tmp_path, flags).peers == (Address("a", 1), Address("b", 6375), Address("::1", 3))
    assert _load(tmp_path, {}, {"MESHD_DISCOVERY": "static"}).discovery == ("static",)


def test_the_file_may_hold_numbers_lists_and_either_spelling(tmp_path: Path) -> None:
    config = _file(tmp_path, 'threads = 3\npeer = ["a:1"]\nlog-level = "debug"\nmax_sessions = 2\nmirror = true\n')
    loaded = load_config({"config": config, "state": str(tmp_path)}, {})
    assert (loaded.threads, loaded.peers, loaded.log_level, loaded.max_sessions) == (3, (Address("a", 1),), "debug", 2)
    assert loaded.mirror


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('memroy = "1GiB"', "memroy; did you mean memory?"),
        ("threads = true", "setting threads"),
        ("threads = [", "can't read the config file"),
        ('config = "other.toml"', "does not exist: config"),
    ],
)
def test_the_error_for_a_wrong_file_names_it(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml") as caught:
        load_config({"config": _file(tmp_path, text)}, {})
    assert says in str(caught.value)


def test_a_file_that_is_no_text_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b'name = "\xff"\n')
    with pytest.raises(ConfigError, match=r"can't read the config file .*config\.toml"):
        load_config({"config": str(path)}, {})


def test_a_missing_file_is_an_error_only_if_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert Settings({}, {})["threads"].origin == "default"
    with pytest.raises(ConfigError, match="there is no config file"):
        Settings({"config": str(tmp_path / "absent.toml")}, {})["threads"]


@pytest.mark.parametrize(
    ("flags", "environ", "says"),
    [
        ({"memory": "4 potatoes"}, {}, "setting memory (from flag --memory) is wrong: '4 potatoes' is not a size"),
        (
            {},
            {"MESHD_THREADS": "-1"},
            "setting threads (from environment MESHD_THREADS) is wrong: '-1' is not a whole number of at least 0",
        ),
        ({"mqtt": "http://broker"}, {}, "it does not begin with mqtt://"),
        ({"copies": "0"}, {}, "setting copies (from flag --copies) is wrong: '0' is not a whole number of at least 1"),
        ({"mirror": "maybe"}, {}, "'maybe' is neither on nor off"),
        ({"drain-timeout": "-1"}, {}, "'-1' is not a number of seconds"),
        ({}, {"MESHD_API": "127.0.0.1:99999"}, "setting api (from environment MESHD_API)"),
    ],
)
def test_an_error_names_the_setting_and_its_origin(
    tmp_path: Path, flags: dict[str, RawValue], environ: dict[str, str], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, flags, environ)
    assert says in str(caught.value)


def test_hugging_faces_variables_set_its_cache(tmp_path: Path) -> None:
    assert _load(tmp_path, {}, {"HF_HOME": "/hf"}).hf_cache == Path("/hf/hub")
    assert _load(tmp_path, {}, {"HF_HOME": "/hf", "HF_HUB_CACHE": "/cache"}).hf_cache == Path("/cache")
    assert _load(tmp_path, {}, {"XDG_CACHE_HOME": "/xdg"}).hf_cache == Path("/xdg/huggingface/hub")


def test_pips_index_is_used_unless_meshd_has_its_own(tmp_path: Path) -> None:
    assert _load(tmp_path).pypi_index == "https://pypi.org/simple"
    assert _load(tmp_path, {}, {"PIP_INDEX_URL": "https://mirror/simple/"}).pypi_index == "https://mirror/simple"
    both = {"PIP_INDEX_URL": "https://mirror/simple", "MESHD_PYPI_INDEX": "https://own/simple"}
    assert _load(tmp_path, {}, both).pypi_index == "https://own/simple"


def test_models_are_below_the_cache_by_default(tmp_path: Path) -> None:
    assert _load(tmp_path, {"cache": "/c"}).models_dir == Path("/c/models")
    assert _load(tmp_path, {"cache": "/c", "models-dir": "/m"}).models_dir == Path("/m")


def test_an_api_beyond_this_machine_needs_a_key(tmp_path: Path) -> None:
    require_guarded_api(_load(tmp_path))
    require_guarded_api(_load(tmp_path, {"api": "0.0.0.0:6374", "api-key": "secret"}))
    with pytest.raises(ConfigError, match="without an API key") as caught:
        require_guarded_api(_load(tmp_path, {"api": "0.0.0.0:6374"}))
    assert "meshd key api" in caught.value.hint


def test_the_state_folders_api_key_is_used_if_no_other_is_given(tmp_path: Path) -> None:
    (tmp_path / "api.key").write_text("kept\n")
    assert _load(tmp_path).api_key == "kept"
    assert _load(tmp_path, {"api-key": "given"}).api_key == "given"


def test_a_secret_is_never_shown(tmp_path: Path) -> None:
    value = Settings({"config": _file(tmp_path), "api-key": "secret"}, {})["api-key"]
    assert value.plain() == "(set)"
    assert value.value == "secret"


def test_debug_is_off_only_for_an_empty_value_and_0() -> None:
    assert [debug_wanted({"MESHD_DEBUG": text}) for text in ("1", "", "0")] == [True, False, False]
    assert not debug_wanted({})
