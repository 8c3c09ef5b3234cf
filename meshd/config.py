"""Resolve a peer's settings into one frozen `Config`; the table of settings is in `meshd.settings`.

A value comes from the first of these that names it: flag, environment (`MESHD_*`, one for every flag), config file, default. Each
value keeps its origin, so that an error and `meshd config` can name it. This is the only file that reads the environment.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshd.errors import ConfigError
from meshd.settings import SETTINGS, SETTINGS_BY_NAME, RawValue, Setting, Value
from meshd.values import Address

API_KEY_FILE = "api.key"
"""In the state folder; made by `meshd key api`."""

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
    interfaces: tuple[str, ...]
    memory_bytes: int | None
    """The most memory that meshd may take; None: all that is free."""
    threads: int
    """0: one thread for each core that this process may use."""
    backend: str
    exact: bool
    """Activations stay in full precision."""
    models: tuple[str, ...]
    """References of models to place at the start."""
    roles: tuple[str, ...]
    copies: int
    """Peers that hold each placed layer, where memory allows; 1: no standby copies."""
    mirror: bool
    max_sessions: int
    queue_limit: int
    drain_timeout: float
    """Seconds that a stopping daemon waits for its sessions to end or move away; 0: it stops at once."""
    state: Path
    cache: Path
    models_dir: Path
    hf_cache: Path
    pypi_index: str
    log_level: str
    log_format: str

    @property
    def wanted_backend(self) -> str:
        """The backend's name in `meshd.kernels`; torch has no second name, since it always computes in full precision."""
        return EXACT_BACKEND if self.exact and not self.backend.startswith("torch") else self.backend


class Settings:
    """Resolves settings one at a time, so that a client reads only those it needs."""

    def __init__(self, flags: Mapping[str, RawValue | None] | None = None, environ: Mapping[str, str] | None = None) -> None:
        """`flags` by setting name; None means not given. `environ` defaults to the process's own."""
        self._flags = flags or {}
        self._environ = os.environ if environ is None else environ
        self._known: dict[str, Value] = {}
        self._file: dict[str, RawValue] | None = None

    def __getitem__(self, name: str) -> Value:
        """Raises: ConfigError."""
        if name not in self._known:
            self._known[name] = self._resolve(SETTINGS_BY_NAME[name])
        return self._known[name]

    def config(self) -> Config:
        """Resolve all settings. Raises: ConfigError."""
        return Config(**{setting.key: self[setting.name].value for setting in SETTINGS if setting.name != "config"})

    def named(self, name: str) -> str | None:
        """The unparsed text from the flag or the environment; None if neither gives the setting."""
        found = self._raw_flag(SETTINGS_BY_NAME[name]) or self._raw_variable(SETTINGS_BY_NAME[name])
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
    except (OSError, tomllib.TOMLDecodeError) as error:
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
        raise ConfigError(f"setting {key} (from file {path}) is wrong: {value!r} is no text, number, true, false or list of them")
    return [str(item) for item in items] if isinstance(value, list) else str(value)


def load_config(flags: Mapping[str, RawValue | None] | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Resolve all settings into a `Config`. Raises: ConfigError."""
    return Settings(flags, environ).config()


def require_guarded_api(config: Config) -> None:
    """Check that an API which other machines can reach has an API key. Raises: ConfigError."""
    if not config.api.loopback and config.api_key is None:
        raise ConfigError(
            f"the API would listen on {config.api} without an API key: everyone who can reach it could use this mesh",
            hint="make a key with `meshd key api`, then start again",
        )


def clean_environment() -> dict[str, str]:
    """This process's environment without `MESHD_*`, for a child process that gets its settings as flags."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MESHD_")}


def debug_wanted(environ: Mapping[str, str] | None = None) -> bool:
    """Whether errors are shown with their traceback (`MESHD_DEBUG=1`)."""
    return (os.environ if environ is None else environ).get("MESHD_DEBUG", "") not in {"", "0"}
