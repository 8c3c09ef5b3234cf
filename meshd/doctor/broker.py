"""Checks the MQTT broker of `--mqtt`: that it is reached, that its certificate is good, and that it lets this client in."""

import socket
import ssl
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from meshd.doctor.check import Context, Found, ok, wrong

CONNECT_S = 5.0
_PORTS = {"mqtt": 1883, "mqtts": 8883}
_REFUSALS = {
    1: "it does not speak MQTT 3.1.1",
    2: "it refuses this client's id",
    3: "it is not available",
    4: "it does not know this user or password",
    5: "it does not allow this client in",
}
"""Return codes of CONNACK (MQTT 3.1.1, section 3.2.2.3)."""


@dataclass(frozen=True, slots=True)
class BrokerTrouble(Exception):
    """Why the broker can't be used, and what to do."""

    found: str
    mend: str


def broker(context: Context) -> Found:
    """Check the broker, if one is set."""
    url = getattr(context.config, "mqtt", None)
    if not url:
        return [ok("broker", "none is set (--mqtt)")]
    shown = shown_url(str(url))
    try:
        greet(str(url))
    except BrokerTrouble as trouble:
        return [wrong("broker", f"{shown}: {trouble.found}", trouble.mend)]
    return [ok("broker", f"{shown} lets this device in")]


def shown_url(url: str) -> str:
    """Returns: the address without the password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or _PORTS.get(parts.scheme, '')}"


def greet(url: str) -> None:
    """Connect to a broker, say CONNECT with a clean session, read CONNACK, and leave. Raises: BrokerTrouble."""
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise BrokerTrouble("that is no address of a broker", "write it as `--mqtt mqtts://HOST:8883`")
    port = parts.port or _PORTS[parts.scheme]
    with ExitStack() as stack:
        try:
            plain = stack.enter_context(socket.create_connection((parts.hostname, port), CONNECT_S))
            stream = plain if parts.scheme == "mqtt" else stack.enter_context(_secured(plain, parts.hostname))
            stream.sendall(connect_packet(unquote(parts.username or ""), unquote(parts.password or "")))
            answer = _read(stream, 4)
            stream.sendall(b"\xe0\x00")  # DISCONNECT
        except ssl.SSLCertVerificationError as error:
            mend = f"give the broker a certificate for {parts.hostname} that this device trusts"
            raise BrokerTrouble(f"its certificate is not good: {error.verify_message}", mend) from error
        except ssl.SSLError as error:
            raise BrokerTrouble(
                f"it does not speak TLS there: {error.reason}", "use `mqtt://`, or the broker's TLS port"
            ) from error
        except socket.gaierror as error:
            raise BrokerTrouble(f"its name is not known: {error.strerror}", "check --mqtt, or write an IP address") from error
        except ConnectionRefusedError as error:
            mend = f"start the broker (`sudo systemctl start mosquitto` on {parts.hostname}), or check the port in --mqtt"
            raise BrokerTrouble("it does not run: connection refused", mend) from error
        except OSError as error:
            found = "it does not answer in time" if isinstance(error, TimeoutError) else str(error.strerror or error)
            raise BrokerTrouble(found, f"check --mqtt, and the firewall of {parts.hostname}") from error
    if answer[:2] != b"\x20\x02":
        raise BrokerTrouble("what answers there is no MQTT broker", "check the port in --mqtt")
    if answer[3]:
        why = _REFUSALS.get(answer[3], f"it refuses this client (code {answer[3]})")
        raise BrokerTrouble(why, "write the user and password as `--mqtt mqtts://USER:PASSWORD@HOST`, and check the broker's ACL")


def connect_packet(user: str, password: str) -> bytes:
    """Make an MQTT 3.1.1 CONNECT with a clean session and a client id that the broker chooses (section 3.1)."""
    flags = 0x02 | (0x80 if user else 0) | (0x40 if user and password else 0)
    body = _text("MQTT") + bytes([4, flags]) + struct.pack("!H", int(CONNECT_S)) + _text("")
    body += (_text(user) if user else b"") + (_text(password) if user and password else b"")
    return b"\x10" + _length(len(body)) + body


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("!H", len(data)) + data


def _length(count: int) -> bytes:
    """Encode a packet's remaining length: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while True:
        count, digit = divmod(count, 128)
        encoded.append(digit | (0x80 if count else 0))
        if not count:
            return bytes(encoded)


def _secured(plain: socket.socket, host: str) -> ssl.SSLSocket:
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host)


def _read(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = stream.recv(count - len(data))
        if not more:
            raise ConnectionResetError(0, "it closed the connection")
        data += more
    return data
