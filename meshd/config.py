"""Finds the values of a peer's settings and makes one frozen `Config`. `meshd.settings` has the table of settings.

A value comes from the first of these that has one: flag, environment (`MESHD_*`, one variable for every flag), config file,
default. Each value keeps its origin, which errors and `meshd config` show. Only this file reads the environment.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshd.errors import ConfigError
from meshd.settings import SETTINGS, SETTINGS_BY_NAME, RawValue, Setting, Value
from meshd.values import Address, BrokerUrl

API_KEY_FILE = "api.key"
"""A file of the state folder. `meshd key api` creates it."""
API_KEYS_FILE = "api-keys.json"
"""A file of the state folder: the API keys that `meshd key api add` made, hashed."""

EXACT_BACKEND = "onnxruntime-exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One peer's resolved settings; `meshd.settings.SETTINGS` describes each."""

    name: str
    key: str | None
    api: Address
    api_key: str | None
    link: Address
    peers: tuple[Address, ...]
    discovery: tuple[str, ...]
    mqtt: BrokerUrl | None
    mqtt_ca: Path | None
    mqtt_telemetry: float
    """Seconds between two publications of telemetry. 0: neither telemetry nor events are published."""
    mqtt_home_assistant: str
    """Home Assistant's discovery prefix. Empty: no discovery messages are published."""
    interfaces: tuple[str, ...]
    memory_bytes: int | None
    """The most memory that meshd may use, in bytes. None: all free memory."""
    threads: int
    """Compute threads. 0: one for each core that this process may use."""
    backend: str
    exact: bool
    """Whether activations keep their full precision."""
    models: tuple[str, ...]
    """References of the models to place at the start."""
    roles: tuple[str, ...]
    copies: int
    """Number of peers that hold each placed layer, if memory allows. 1: no standby copies."""
    mirror: bool
    max_sessions: int
    queue_limit: int
    drain_timeout: float
    """Seconds that a stopping daemon waits for its sessions to end or to move to other peers. 0: it does not wait."""
    state: Path
    cache: Path
    models_dir: Path
    hf_cache: Path
    pypi_index: str
    log_level: str
    log_format: str
    log_file: Path | None
    """None: standard error."""

    @property
    def wanted_backend(self) -> str:
        """The backend's name for `meshd.kernels.registry`. Torch has no `-exact` variant: it always computes in full precision."""
        return EXACT_BACKEND if self.exact and not self.backend.startswith("torch") else self.backend


class Settings:
    """Finds the values of settings one at a time, so that a command reads only the settings that it needs."""

    def __init__(self, flags: Mapping[str, RawValue | None] | None = None, environ: Mapping[str, str] | None = None) -> None:
        """`flags` maps names of settings to values; None means not given. `environ` defaults to the process's environment."""
        self._flags = flags or {}
        self._environ = os.environ if environ is None else environ
        self._known: dict[str, Value] = {}
        self._file: dict[str, RawValue] | None = None

    def __getitem__(self, name: str) -> Value:
        """Find the value of a setting. Raises: ConfigError."""
        if name not in self._known:
            self._known[name] = self._resolve(SETTINGS_BY_NAME[name])
        return self._known[name]

    def config(self) -> Config:
        """Find the values of all settings. Raises: ConfigError."""
        return Config(**{setting.key: self[setting.name].value for setting in SETTINGS if setting.name != "config"})

    def named(self, name: str) -> str | None:
        """Return a setting's text from the flag or the environment, not parsed. Returns: None if neither has it."""
        found = self._raw_flag(SETTINGS_BY_NAME[name]) or self._raw_variable(SETTINGS_BY_NAME[name])
        return str(found[0]) if found else None

    def user_folder(self, kind: str) -> Path:
        """Return the platform's folder for this user's files of meshd; `kind` is `config`, `state` or `cache`."""
        import platformdirs

        return Path(getattr(platformdirs, f"user_{kind}_dir")("meshd", appauthor=False))

    def hf_home(self) -> Path:
        """Return the folder in which Hugging Face's tools keep their cache. It is the same on every platform."""
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
            raise ConfigError(f"can't read the API key in {path}: {error.strerror}", hint="fix the file's permissions") from None


def _read_file(path: Path, *, must_exist: bool) -> dict[str, RawValue]:
    import tomllib

    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError:
        if must_exist:
            raise ConfigError(f"there is no config file {path}", hint="give --config a file that exists, or leave it out") from None
        return {}
    except (OSError, ValueError) as error:  # also of bytes that are no UTF-8
        raise ConfigError(f"can't read the config file {path}: {error}", hint="correct it, or name another with --config") from None
    return {_known_key(key, path): _file_value(key, value, path) for key, value in table.items()}


def _known_key(key: str, path: Path) -> str:
    name = key.replace("_", "-")
    if name in SETTINGS_BY_NAME and name != "config":
        return name
    import difflib

    near = difflib.get_close_matches(name, SETTINGS_BY_NAME, 1)
    hint = f"did you mean {near[0]}?" if near else "`meshd config` lists the settings"
    raise ConfigError(f"file {path} has a setting that does not exist: {key}", hint=hint)


def _file_value(key: str, value: object, path: Path) -> RawValue:
    items = value if isinstance(value, list) else [value]
    if any(not isinstance(item, int | float | str) for item in items):
        raise ConfigError(
            f"setting {key} (from file {path}) is wrong: {value!r} is not a text, a number, a boolean or a list of them"
        )
    return [str(item) for item in items] if isinstance(value, list) else str(value)


def load_config(flags: Mapping[str, RawValue | None] | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Make a `Config` from flags, environment and config file. Raises: ConfigError."""
    return Settings(flags, environ).config()


def require_guarded_api(config: Config) -> None:
    """Check that an API which other machines can reach has an API key. Raises: ConfigError."""
    if not config.api.loopback and config.api_key is None and not (config.state / API_KEYS_FILE).exists():
        raise ConfigError(
            f"the API would listen on {config.api} without an API key: everyone who can reach it could use this mesh",
            hint="make a key with `meshd key api add NAME`, then start again",
        )


def given_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """Return the names of the variables in this process's environment that give settings a value."""
    known = {setting.variable for setting in SETTINGS}
    return sorted(known.intersection(os.environ if environ is None else environ))


def logs_to_journal(environ: Mapping[str, str] | None = None) -> bool:
    """Whether standard error goes to systemd's journal (systemd.exec(5), `$JOURNAL_STREAM`)."""
    stream = (os.environ if environ is None else environ).get("JOURNAL_STREAM", "")
    try:
        known = os.fstat(2)
    except OSError:
        return False
    return stream == f"{known.st_dev}:{known.st_ino}"


def take_from_environment(*names: str) -> dict[str, str]:
    """Remove variables from this process's environment, which child processes inherit. Returns: those that were set."""
    return {name: os.environ.pop(name) for name in names if name in os.environ}


def clean_environment() -> dict[str, str]:
    """Copy this process's environment without `MESHD_*`, for a child process that gets its settings as flags."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MESHD_")}


def debug_wanted(environ: Mapping[str, str] | None = None) -> bool:
    """Whether errors are shown with their traceback (`MESHD_DEBUG=1`)."""
    return (os.environ if environ is None else environ).get("MESHD_DEBUG", "") not in {"", "0"}
