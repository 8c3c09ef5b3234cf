"""The DaemonSet of docs/examples fits Kubernetes' schema, and its flags are meshd's own."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from meshd.config import Settings
from meshd.settings import SETTINGS_BY_NAME

FILE = Path(__file__).parents[2] / "docs" / "examples" / "kubernetes.yaml"


@pytest.fixture
def manifest() -> Any:
    return yaml.safe_load(FILE.read_text())


def test_the_manifest_fits_the_schema(manifest: Any) -> None:
    schema = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate, which has the schemas, is not installed")
    schema.validate(manifest, schema.latest_version(), strict=True)
    manifest["spec"]["template"]["spec"]["hostNetworks"] = True
    with pytest.raises(schema.ValidationError):
        schema.validate(manifest, schema.latest_version(), strict=True)


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
