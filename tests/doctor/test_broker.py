"""The probe of the broker, on a real mosquitto and on what is no broker."""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from meshd.doctor.broker import BrokerTrouble, connect_packet, greet, shown_url


@contextmanager
def _mosquitto(folder: Path, port: int, *lines: str) -> Iterator[None]:
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if program is None:
        pytest.skip("mosquitto is not installed")
    config = folder / "mosquitto.conf"
    # As root it would change to a user of its own, who may not read this folder.
    user = ["user root"] if os.geteuid() == 0 else []
    config.write_text("\n".join([*user, f"listener {port} 127.0.0.1", *lines]) + "\n")
    process = subprocess.Popen([program, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                time.sleep(0.05)
            else:
                break
        yield
    finally:
        process.terminate()
        process.wait(10)


def _serve(answer: bytes) -> tuple[int, socket.socket]:
    """Answer one connection with these bytes."""
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with server.accept()[0] as client:
            client.recv(1024)
            client.sendall(answer)

    threading.Thread(target=run, daemon=True).start()
    return server.getsockname()[1], server


def _trouble(url: str) -> BrokerTrouble:
    with pytest.raises(BrokerTrouble) as raised:
        greet(url)
    return raised.value


def test_the_packet_is_that_of_the_specification() -> None:
    assert connect_packet("", "") == b"\x10\x0c\0\4MQTT\4\2\0\5\0\0"
    assert connect_packet("ab", "c") == b"\x10\x13\0\4MQTT\4\xc2\0\5\0\0\0\2ab\0\1c"


def test_a_broker_that_lets_this_client_in(tmp_path: Path, unused_tcp_port: int) -> None:
    with _mosquitto(tmp_path, unused_tcp_port, "allow_anonymous true"):
        greet(f"mqtt://127.0.0.1:{unused_tcp_port}")


def test_a_broker_that_asks_for_a_password(tmp_path: Path, unused_tcp_port: int) -> None:
    with _mosquitto(tmp_path, unused_tcp_port, "allow_anonymous false"):
        trouble = _trouble(f"mqtt://127.0.0.1:{unused_tcp_port}")
    assert "does not allow this client in" in trouble.found
    assert "--mqtt mqtts://USER:PASSWORD@HOST" in trouble.mend


def test_a_broker_whose_certificate_is_not_trusted(tmp_path: Path, unused_tcp_port: int) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*command, "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "crt")], check=True, capture_output=True)
    lines = ("allow_anonymous true", f"certfile {tmp_path}/crt", f"keyfile {tmp_path}/key")
    with _mosquitto(tmp_path, unused_tcp_port, *lines):
        trouble = _trouble(f"mqtts://127.0.0.1:{unused_tcp_port}")
        assert "its certificate is not good" in trouble.found
        assert "certificate" in trouble.mend


def test_a_broker_that_does_not_run(unused_tcp_port: int) -> None:
    trouble = _trouble(f"mqtt://127.0.0.1:{unused_tcp_port}")
    assert "connection refused" in trouble.found
    assert "sudo systemctl start mosquitto" in trouble.mend


@pytest.mark.parametrize("make", [lambda port: f"mqtt://127.0.0.1:{port}", lambda port: f"mqtts://127.0.0.1:{port}"])
def test_what_is_no_broker(make: Callable[[int], str]) -> None:
    port, server = _serve(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with server:
        assert _trouble(make(port)).mend


def test_an_address_that_is_none() -> None:
    assert "--mqtt mqtts://HOST:8883" in _trouble("broker.lan").mend
    assert "not known" in _trouble("mqtt://nosuch.invalid").found


def test_the_password_is_not_shown() -> None:
    assert shown_url("mqtts://user:secret@broker.lan") == "mqtts://broker.lan:8883"
