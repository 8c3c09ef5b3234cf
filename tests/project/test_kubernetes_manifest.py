"""The DaemonSet of docs/examples fits Kubernetes' schema, and its flags are meshd's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from meshd.config import Settings
from meshd.settings import SETTINGS_BY_NAME

FILE = Path(__file__).parents[2] / "docs" / "examples" / "kubernetes.yaml"
SCHEMA = Draft7Validator(json.loads(Path(__file__).with_name("kubernetes_schema.json").read_text()))


@pytest.fixture
def manifest() -> Any:
    return yaml.safe_load(FILE.read_text())


def test_the_manifest_fits_the_schema(manifest: Any) -> None:
    assert [error.message for error in SCHEMA.iter_errors(manifest)] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("hostNetworks", True), ("hostNetwork", "yes"), ("containers", None), ("affinity", {"podAffinity": {}})],
)
def test_a_manifest_with_a_mistake_does_not(manifest: Any, name: str, value: object) -> None:
    manifest["spec"]["template"]["spec"][name] = value
    assert not SCHEMA.is_valid(manifest)


def test_the_flags_and_variables_are_settings_with_valid_values(manifest: Any) -> None:
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    flags = dict(word.removeprefix("--").split("=", 1) for word in container["args"])
    flags["name"] = "node-1"
    assert flags.keys() <= SETTINGS_BY_NAME.keys()
    config = Settings(flags, {"MESHD_MQTT": "mqtts://meshd:x@broker.example", "MESHD_KEY": "mesh-X"}).config()
    variables = {entry["name"] for entry in container["env"]}
    assert {"MESHD_KEY", "MESHD_MQTT"} == {name for name in variables if name.startswith("MESHD_")}
    assert config.discovery == ("mqtt",)
    grace = manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > config.drain_timeout
