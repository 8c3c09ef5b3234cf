"""Applies changed settings to a running daemon, where that is possible without a restart."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from logging import getLogger
from typing import Literal

from meshd.config import Config, logs_to_journal
from meshd.logs import configure_logging
from meshd.peer.peer import Peer
from meshd.settings import SETTINGS

log = getLogger(__name__)

LIVE = ("log-level", "log-format", "log-file", "max-sessions", "queue-limit", "copies", "mirror", "drain-timeout")
"""Settings that take effect at once. Others decide what is measured, bound, opened or promised to peers at the start."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What reading the settings again has changed."""

    applied: tuple[str, ...]
    """Names of settings that have a new value, which is valid now."""
    needs_restart: tuple[str, ...]
    """Names of settings that have a new value, which is valid after a restart."""


@dataclass(slots=True)
class Reloader:
    """Owns the settings that are valid now."""

    config: Config
    peer: Peer
    read: Callable[[], Config]
    """Reads the settings again, from the same flags, the same environment, and the files as they are now."""

    def reload(self) -> Reloaded:
        """Read the settings again, and apply those that can change. Raises: ConfigError, and nothing has changed."""
        new = self.read()
        by_field = {setting.key: setting.name for setting in SETTINGS}
        changed = [
            by_field[field.name]
            for field in fields(Config)
            if field.name != "key" and getattr(new, field.name) != getattr(self.config, field.name)
        ]
        applied = tuple(name for name in changed if name in LIVE)
        waiting = tuple(name for name in changed if name not in LIVE)
        self._apply(new, log_changed=any(name.startswith("log-") for name in applied))
        valid = {setting.key: getattr(new, setting.key) for setting in SETTINGS if setting.name in LIVE}
        self.config = replace(self.config, **valid)
        log.info("settings are read again: %s", describe(applied, waiting))
        return Reloaded(applied, waiting)

    def _apply(self, new: Config, *, log_changed: bool) -> None:
        if log_changed:
            log_format: Literal["text", "json"] = "json" if new.log_format == "json" else "text"
            configure_logging(new.log_level, log_format, file=new.log_file, journal=logs_to_journal())
        coordinator = self.peer.coordinator
        coordinator.admission.limit(running=new.max_sessions, waiting=new.queue_limit)
        coordinator.retrier.mirror = new.mirror
        self.peer.keeper.copies = new.copies
        self.peer.keeper.changed()


def describe(applied: tuple[str, ...], waiting: tuple[str, ...]) -> str:
    """Say in a few words what has changed."""
    parts = [f"{', '.join(applied)} changed"] if applied else []
    parts += [f"{', '.join(waiting)} need a restart"] if waiting else []
    return "; ".join(parts) or "nothing has changed"
