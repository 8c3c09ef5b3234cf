"""The probe of the broker, on a real mosquitto and on what is no broker."""

import socket
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from meshd.agents.cluster_service import CheckResult, CheckStatus
from meshd.doctor.broker import BrokerTrouble, broker, connect_packet, greet
from meshd.doctor.check import Context
from meshd.values import parse_broker
from mqtt.mosquitto import MISSING, PROGRAM, Mosquitto

needs_mosquitto = pytest.mark.skipif(PROGRAM is None, reason=MISSING)


def _serve(answer: bytes) -> tuple[int, socket.socket]:
    """Answer one connection with these bytes."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with server.accept()[0] as client:
            client.recv(1024)
            client.sendall(answer)

    threading.Thread(target=run, daemon=True).start()
    return server.getsockname()[1], server


def _trouble(url: str, ca_file: str = "") -> BrokerTrouble:
    with pytest.raises(BrokerTrouble) as raised:
        greet(parse_broker(url), ca_file)
    return raised.value


def _found(context: Context, url: str, ca_file: Path | None = None) -> CheckResult:
    config = replace(context.config, mqtt=parse_broker(url), mqtt_ca=ca_file, discovery=("static", "mqtt"))
    (result,) = broker(replace(context, config=config))
    return result


def test_the_packet_is_that_of_the_specification() -> None:
    assert connect_packet("", "") == b"\x10\x0c\0\4MQTT\4\2\0\5\0\0"
    assert connect_packet("ab", "c") == b"\x10\x13\0\4MQTT\4\xc2\0\5\0\0\0\2ab\0\1c"


@needs_mosquitto
def test_the_user_and_password_of_the_settings_are_used_and_not_shown(tmp_path: Path, context: Context) -> None:
    passwords = tmp_path / "passwords"
    passwords.touch()
    subprocess.run(["mosquitto_passwd", "-b", str(passwords), "me", "a-secret"], check=True)
    with Mosquitto(tmp_path, lines=("allow_anonymous false", f"password_file {passwords}")) as started:
        right = _found(context, started.url.replace("//", "//me:a-secret@"))
        wrong = _found(context, started.url.replace("//", "//me:a-guess@"))
    assert right.status is CheckStatus.OK, right
    assert wrong.status is CheckStatus.WRONG
    assert "does not allow this client in" in wrong.found
    assert "--mqtt mqtts://USER:PASSWORD@HOST" in wrong.mend
    assert "a-secret" not in repr(right)
    assert "a-guess" not in repr(wrong)


@needs_mosquitto
def test_the_certificate_is_checked_with_the_authority_of_the_settings(tmp_path: Path, context: Context) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-days", "2", "-subj", "/CN=broker"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "crt")]
    subprocess.run(command, check=True, capture_output=True)
    lines = ("allow_anonymous true", f"certfile {tmp_path}/crt", f"keyfile {tmp_path}/key")
    with Mosquitto(tmp_path, lines=lines) as started:
        url = started.url.replace("mqtt:", "mqtts:")
        unknown, trusted = _found(context, url), _found(context, url, tmp_path / "crt")
    assert "its certificate is not good" in unknown.found
    assert "--mqtt-ca FILE" in unknown.mend
    assert trusted.status is CheckStatus.OK, trusted


@pytest.mark.parametrize("text", [None, "no certificate"])
def test_a_file_of_authorities_that_cannot_be_read(tmp_path: Path, unused_tcp_port: int, text: str | None) -> None:
    if text is not None:
        (tmp_path / "ca").write_text(text)
    assert _trouble(f"mqtts://127.0.0.1:{unused_tcp_port}", str(tmp_path / "ca")).mend == "check --mqtt-ca"


def test_a_broker_that_is_not_used_is_not_asked(context: Context, unused_tcp_port: int) -> None:
    config = replace(context.config, mqtt=parse_broker(f"mqtt://127.0.0.1:{unused_tcp_port}"), discovery=("static",))
    (result,) = broker(replace(context, config=config))
    assert result.status is CheckStatus.OK


def test_a_broker_that_does_not_run(unused_tcp_port: int) -> None:
    trouble = _trouble(f"mqtt://127.0.0.1:{unused_tcp_port}")
    assert "connection refused" in trouble.found
    assert "sudo systemctl start mosquitto" in trouble.mend


@pytest.mark.parametrize("scheme", ["mqtt", "mqtts"])
def test_what_is_no_broker(scheme: str) -> None:
    port, server = _serve(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with server:
        assert _trouble(f"{scheme}://127.0.0.1:{port}").mend


def test_a_name_that_is_not_known() -> None:
    assert "not known" in _trouble("mqtt://nosuch.invalid").found
