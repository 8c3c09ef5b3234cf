"""The file of a peer's API keys in its state folder. The command line changes it, and the daemon reads it whenever it changes."""

from collections.abc import Callable
from contextlib import suppress

import msgspec

from meshd.api.access.keys import MAX_KEYS, ApiKey, digest_of, generate
from meshd.api.access.scopes import Scope
from meshd.config import API_KEYS_FILE
from meshd.errors import ConfigError, StorageError
from meshd.state import FileSignature, StateFolder

USED_FILE = "api-keys-used.json"
"""When each key was used last: prefix -> seconds since 1970. The daemon writes it, so that the keys' own file has one writer."""
_MAX_BYTES = 1 << 20
_LOCK = "api-keys"


class _Content(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    keys: tuple[ApiKey, ...] = ()


class KeyFile:
    """Reads and changes the keys. A change is atomic, and two commands at the same time do not undo one another's changes."""

    def __init__(self, folder: StateFolder) -> None:
        self._folder = folder
        self._path = folder.path / API_KEYS_FILE

    def signature(self) -> FileSignature | None:
        """See `StateFolder.signature`."""
        return self._folder.signature(API_KEYS_FILE)

    def load(self) -> tuple[ApiKey, ...] | None:
        """Read the keys. Returns: None if there is no file: none has ever been made. Raises: StorageError if it is broken."""
        data = self._folder.read(API_KEYS_FILE)
        if data is None:
            return None
        try:
            content = msgspec.json.decode(data[: _MAX_BYTES + 1], type=_Content)
        except msgspec.MsgspecError as error:
            raise self._broken(str(error)) from error
        keys = content.keys
        if content.version != 1 or len(keys) > MAX_KEYS:
            raise self._broken(f"version {content.version} with {len(keys)} keys")
        if len({key.prefix for key in keys}) < len(keys) or len({key.name for key in keys}) < len(keys):
            raise self._broken("a prefix or a name occurs twice")
        return keys

    def add(
        self,
        name: str,
        random_bytes: Callable[[int], bytes],
        *,
        scope: Scope,
        created: int,
        expires: int | None = None,
        rate: int | None = None,
        concurrency: int | None = None,
    ) -> tuple[str, ApiKey]:
        """Make a key. Returns: the whole key, which is stored nowhere, and what is stored.

        Raises: ConfigError if the name is taken or there are too many keys; StorageError.
        """
        with self._folder.exclusive(_LOCK):
            keys = self.load() or ()
            if any(key.name == name for key in keys):
                raise ConfigError(
                    f"there is an API key {name!r} already", hint=f"choose another name, or `meshd key api rm {name}`"
                )
            if len(keys) >= MAX_KEYS:
                raise ConfigError(f"there are {MAX_KEYS} API keys already", hint="remove some with `meshd key api rm`")
            text, prefix = generate(random_bytes)
            while any(key.prefix == prefix for key in keys):
                text, prefix = generate(random_bytes)
            made = ApiKey(
                name=name,
                prefix=prefix,
                sha256=digest_of(text).hex(),
                scope=scope,
                created=created,
                expires=expires,
                rate=rate,
                concurrency=concurrency,
            )
            self._store((*keys, made))
        return text, made

    def remove(self, which: str) -> tuple[ApiKey, int]:
        """Remove the key with this name or prefix. Returns: the key, and how many remain. Raises: ConfigError, StorageError."""
        with self._folder.exclusive(_LOCK):
            keys = self.load() or ()
            found = next((key for key in keys if which in (key.name, key.prefix, key.prefix.removeprefix("meshd-"))), None)
            if found is None:
                raise ConfigError(f"no API key has the name or prefix {which!r}", hint="`meshd key api list` shows all keys")
            rest = tuple(key for key in keys if key is not found)
            self._store(rest)
        return found, len(rest)

    def last_used(self) -> dict[str, int]:
        """Return when each key was used last, in seconds since 1970, by its prefix. Empty if that can't be read."""
        with suppress(StorageError, msgspec.MsgspecError):
            return msgspec.json.decode(self._folder.read(USED_FILE) or b"{}", type=dict[str, int])
        return {}

    def store_last_used(self, times: dict[str, int]) -> None:
        """Store when each key was used last. Raises: StorageError."""
        self._folder.write(USED_FILE, msgspec.json.encode(times))

    def _store(self, keys: tuple[ApiKey, ...]) -> None:
        self._folder.write(
            API_KEYS_FILE, msgspec.json.format(msgspec.json.encode(_Content(version=1, keys=keys)), indent=2) + b"\n"
        )

    def _broken(self, why: str) -> StorageError:
        return StorageError(
            f"{self._path} is broken: {why}",
            hint="restore it, or remove it (no key in it is valid then) and make new keys with `meshd key api add NAME`",
        )
