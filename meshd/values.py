"""Parsers of setting values: sizes, addresses, counts, names, paths.

Each takes text, and raises a ValueError that says what is wrong with the text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)", re.IGNORECASE)
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+)(?::(\d{1,5}))?")
_SWITCHES = {word: on for on, words in ((True, "on yes true 1"), (False, "off no false 0")) for word in words.split()}
_MQTT_PORTS = {"mqtt": 1883, "mqtts": 8883}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port to listen on or to dial."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        return self.host in {"localhost", "::1"} or self.host.startswith("127.")


@dataclass(frozen=True, slots=True)
class BrokerUrl:
    """Where an MQTT broker is, and as whom to connect. As text it has no password."""

    host: str
    port: int
    tls: bool
    user: str = ""
    password: str = field(default="", repr=False)

    @property
    def with_password(self) -> str:
        """The URL with all that `parse_broker` reads."""
        user = ":".join(quote(part, safe="") for part in (self.user, self.password) if part)
        return f"{'mqtts' if self.tls else 'mqtt'}://{user}{'@' if user else ''}{Address(self.host, self.port)}"

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        return f"{'mqtts' if self.tls else 'mqtt'}://{user}{Address(self.host, self.port)}"


def parse_broker(text: str) -> BrokerUrl:
    """Parse `mqtt://host`, or `mqtts://user:password@host:port` for TLS. No error repeats the text, which may have a password."""
    if text.strip().partition("://")[0] not in _MQTT_PORTS:
        raise ValueError("it does not begin with mqtt:// or mqtts://")
    try:
        parts = urlsplit(text.strip())
        host, port = parts.hostname, parts.port or _MQTT_PORTS[parts.scheme]
    except ValueError:
        raise ValueError("it has no valid host and port") from None
    if not host or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(
            "it is not like mqtts://user:password@host:port; in a password, write @ as %40, / as %2F, : as %3A, # as %23"
        )
    return BrokerUrl(host, port, parts.scheme == "mqtts", unquote(parts.username or ""), unquote(parts.password or ""))


def parse_topic_level(text: str) -> str:
    """Parse the first level of a topic, such as `homeassistant`; `off` becomes the empty text."""
    if text.strip().lower() in _SWITCHES and not _SWITCHES[text.strip().lower()]:
        return ""
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is neither `off` nor letters, digits, '.', '_' and '-'")
    return text


def parse_text(text: str) -> str:
    """Remove white space at both ends. Blank text is an error."""
    if not text.strip():
        raise ValueError("it is empty")
    return text.strip()


def parse_size(text: str) -> int:
    """Parse a size: `4GiB` and `4G` are 4 * 2**30 bytes, `4GB` is 4 * 10**9 bytes, `4096` is a number of bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size like 4GiB")
    number, prefix, binary, byte = match.groups()
    base = 1000 if byte and not binary else 1024
    size = int(float(number) * base ** " KMGT".index(prefix.upper() or " "))
    if size <= 0:
        raise ValueError(f"{text!r} is not a size above 0")
    return size


def parse_address(text: str, default_port: int) -> Address:
    """Parse `host`, `host:port`, `[IPv6]:port` or `http://host:port`."""
    match = _ADDRESS.fullmatch(text.strip().removeprefix("http://").rstrip("/"))
    port = int(match[2]) if match and match[2] else default_port
    if match is None or port > 65535:
        raise ValueError(f"{text!r} is not HOST:PORT")
    return Address(match[1].strip("[]"), port)


def parse_name(text: str) -> str:
    """Parse a peer's name. It has no comma, colon or space, since stage lists are written as `name:0-12,name:12-30`."""
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not a name of letters, digits, '.', '_' and '-' (63 at most)")
    return text


def parse_path(text: str) -> Path:
    """Make a path absolute; `~` is the user's home."""
    return Path(text).expanduser().absolute()


def parse_url(text: str) -> str:
    """Parse an http(s) URL, and remove a slash at its end."""
    if not text.startswith(("http://", "https://")):
        raise ValueError(f"{text!r} is not an http(s) URL")
    return text.rstrip("/")


def address(default_port: int) -> Callable[[str], Address]:
    """Make a parser of addresses whose port may be omitted."""
    return lambda text: parse_address(text, default_port)


def count(least: int) -> Callable[[str], int]:
    """Make a parser of whole numbers that are at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ValueError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def parse_seconds(text: str) -> float:
    """Parse a time in seconds, at least 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{text!r} is not a number of seconds of at least 0")
    return seconds


def parse_switch(text: str) -> bool:
    """Parse `on`, `yes`, `true`, `1` or `off`, `no`, `false`, `0`, in upper or lower case."""
    on = _SWITCHES.get(text.strip().lower())
    if on is None:
        raise ValueError(f"{text!r} is neither on nor off")
    return on


def choice_of(*choices: str) -> Callable[[str], str]:
    """Make a parser that accepts only these words."""

    def parse(text: str) -> str:
        if text in choices:
            return text
        raise ValueError(f"{text!r} is none of {', '.join(choices)}")

    return parse
