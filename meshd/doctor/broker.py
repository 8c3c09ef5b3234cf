"""Checks the MQTT broker of `--mqtt`: that it is reached, that its certificate is good, and that it lets this client in."""

import socket
import ssl
import struct
from contextlib import ExitStack
from dataclasses import dataclass

from meshd.doctor.check import Context, Found, ok, wrong
from meshd.values import BrokerUrl

CONNECT_S = 5.0
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
    """Check the broker, if one is used."""
    config = context.config
    if config.mqtt is None or "mqtt" not in config.discovery:
        return [ok("broker", "none is used (--mqtt)")]
    try:
        greet(config.mqtt, str(config.mqtt_ca or ""))
    except BrokerTrouble as trouble:
        return [wrong("broker", f"{config.mqtt}: {trouble.found}", trouble.mend)]
    return [ok("broker", f"{config.mqtt} lets this device in")]


def greet(url: BrokerUrl, ca_file: str = "") -> None:
    """Connect to a broker, say CONNECT with a clean session, read CONNACK, and leave. Raises: BrokerTrouble."""
    with ExitStack() as stack:
        try:
            context = ssl.create_default_context(cafile=ca_file or None) if url.tls else None
        except OSError as error:
            raise BrokerTrouble(
                f"{ca_file} holds no certificate that can be read: {error.strerror or error}", "check --mqtt-ca"
            ) from error
        try:
            stream = stack.enter_context(socket.create_connection((url.host, url.port), CONNECT_S))
            if context is not None:
                stream = stack.enter_context(context.wrap_socket(stream, server_hostname=url.host))
            stream.sendall(connect_packet(url.user, url.password))
            answer = _read(stream, 4)
            stream.sendall(b"\xe0\x00")  # DISCONNECT
        except ssl.SSLCertVerificationError as error:
            mend = f"give the broker a certificate for {url.host}, and its authority to `meshd up` with --mqtt-ca FILE"
            raise BrokerTrouble(f"its certificate is not good: {error.verify_message}", mend) from error
        except ssl.SSLError as error:
            raise BrokerTrouble(
                f"it does not speak TLS there: {error.reason}", "use `mqtt://`, or the broker's TLS port"
            ) from error
        except socket.gaierror as error:
            raise BrokerTrouble(f"its name is not known: {error.strerror}", "check --mqtt, or write an IP address") from error
        except ConnectionRefusedError as error:
            mend = f"start the broker (`sudo systemctl start mosquitto` on {url.host}), or check the port in --mqtt"
            raise BrokerTrouble("it does not run: connection refused", mend) from error
        except OSError as error:
            found = "it does not answer in time" if isinstance(error, TimeoutError) else str(error.strerror or error)
            raise BrokerTrouble(found, f"check --mqtt, and the firewall of {url.host}") from error
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


def _read(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = stream.recv(count - len(data))
        if not more:
            raise ConnectionResetError(0, "it closed the connection")
        data += more
    return data
