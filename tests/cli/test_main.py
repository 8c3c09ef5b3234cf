import asyncio
import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from aiohttp import web

from fake_api.rows_server import Api
from meshd import __version__
from meshd.cli import VERBS, verb_and_parser
from meshd.cli.support.arguments import Parser

Meshd = Callable[..., CompletedProcess[str]]
HEAVY = {"torch", "onnxruntime", "onnx", "numpy", "zeroconf", "aiohttp", "tokenizers", "rich", "huggingface_hub"}


def _python(code: str, *words: str) -> CompletedProcess[str]:
    command = [sys.executable, "-P", "-W", "error", "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_no_arguments_print_the_help_and_do_nothing(meshd: Meshd) -> None:
    outcome = meshd()
    assert outcome.returncode == 0
    assert all(verb in outcome.stdout for verb in VERBS)
    assert outcome.stdout == meshd("--help").stdout


def test_the_version_is_printed(meshd: Meshd) -> None:
    assert meshd("--version").stdout == f"meshd {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(meshd: Meshd, verb: str) -> None:
    outcome = meshd(verb, "--help")
    assert outcome.returncode == 0
    assert f"usage: meshd {verb}" in outcome.stdout
    assert "example:\n  " in outcome.stdout
    assert "meshd" in outcome.stdout.split("example:")[1]


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_is_a_valid_command(verb: str) -> None:
    module, parser = verb_and_parser(verb)
    for line in module.EXAMPLE.splitlines():
        words = shlex.split(re.sub(r"  +\(.*\)$|^\(.*\)$", "", line.strip()))
        if words:
            _parse(words, verb, parser)


def _parse(words: list[str], verb: str, parser: Parser) -> None:
    """Parse an example. Another verb may have a part in it, a variable or `sudo` may stand before it, and a file after it."""
    words = words[: words.index("<")] if "<" in words else words
    _, name, *rest = words[words.index("meshd") :]
    (parser if name == verb else verb_and_parser(name)[1]).parse_args(rest)


@pytest.mark.parametrize("command", ["key revoke", "key owner", "key api add", "key mqtt rm", "service install", "debug trace"])
def test_the_help_of_a_command_has_an_example_of_this_command(meshd: Meshd, command: str) -> None:
    examples = meshd(*command.split(), "--help").stdout.split("example:\n")[1].splitlines()
    assert examples
    assert all(f"meshd {command} " in line for line in examples)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_an_unknown_flag_in_one_line(meshd: Meshd, verb: str) -> None:
    words = {"key": ["key", "show"]}.get(verb, [verb])
    outcome = meshd(*words, "--no-such-flag")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith(f"meshd: wrong usage of `meshd {verb}")
    assert outcome.stderr.count("\n") == 1


def test_an_unknown_verb_names_the_nearest(meshd: Meshd) -> None:
    outcome = meshd("statsu")
    assert outcome.returncode == 2
    assert outcome.stderr == "meshd: unknown verb 'statsu': did you mean status?; see `meshd --help`\n"


def test_an_error_is_one_line_with_its_cause_and_remedy(meshd: Meshd) -> None:
    outcome = meshd("status", "--api", "http://127.0.0.1:1")
    assert outcome.returncode == 1
    assert outcome.stderr == (
        "meshd: no daemon answers at http://127.0.0.1:1: Connection refused; start one with `meshd up`, or name it with --api\n"
    )


def test_a_wrong_setting_is_wrong_usage(meshd: Meshd) -> None:
    outcome = meshd("status", "--api", "ftp://x")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("meshd: setting api (from flag --api) is wrong")


def test_an_unexpected_error_is_one_line_too(meshd: Meshd, api: Api) -> None:
    api.answer("GET", "/mesh/v1/self", {"surprise": True})
    for rows in ("peers", "links", "models", "sessions"):
        api.answer("GET", f"/mesh/v1/{rows}", {"data": []})
    outcome = meshd("status", "--api", api.url)
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("meshd: unexpected error: KeyError")
    assert outcome.stderr.count("\n") == 1


def test_debug_adds_the_traceback(meshd: Meshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHD_DEBUG", "1")
    assert "Traceback" in meshd("status", "--api", "http://127.0.0.1:1").stderr


@pytest.mark.parametrize(
    "words",
    [("status",), ("config",), ("run", "m", "hello"), ("--help",), ("plan", "m"), ("up", "--help"), ("debug", "story", "s")],
)
def test_a_client_starts_without_the_heavy_libraries(tmp_path: Path, words: tuple[str, ...]) -> None:
    code = (
        "import sys, meshd.cli\n"
        "try: meshd.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"print('loaded:', *{HEAVY!r} & set(sys.modules))"
    )
    ended = _python(code, *words, "--state", str(tmp_path)) if words != ("--help",) else _python(code, *words)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("loaded:\n")


def test_a_closed_output_pipe_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-P", "-m", "meshd", "config", "--state", str(tmp_path)]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_ctrl_c_ends_a_waiting_command_at_once_and_quietly(api: Api, tmp_path: Path) -> None:
    asked = threading.Event()

    async def never(_: web.Request) -> web.Response:
        asked.set()
        await asyncio.sleep(60)
        raise AssertionError

    api.routes["GET", "/mesh/v1/self"] = never
    command = [sys.executable, "-P", "-m", "meshd", "status", "--api", api.url, "--state", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert asked.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=5)
    assert (process.returncode, out, err) == (130, b"", b"")


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, "free some disk space"), (errno.EMFILE, "ulimit -n"), (errno.EIO, "disk")]
)
def test_a_fault_of_the_system_names_the_file_and_a_next_step(
    number: int, hint: str, meshd: Meshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number), "/models/index.json")

    monkeypatch.setattr("meshd.cli.config.run", fail)
    outcome = meshd("config")
    assert outcome.returncode == 1
    assert outcome.stderr.startswith(f"meshd: /models/index.json: {os.strerror(number)}; ")
    assert hint in outcome.stderr


@pytest.mark.parametrize("words", [[], ["--help"], ["up"], ["status", "--json"], ["demo"]])
def test_on_windows_every_verb_says_that_it_is_not_supported(words: list[str]) -> None:
    script = (
        "import sys\n"
        "sys.modules.update({name: None for name in ('fcntl', 'resource', 'termios', 'pwd', 'grp')})  # as on Windows\n"
        "from meshd.cli import main\n"
        "sys.platform = 'win32'\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    outcome = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 1
    assert outcome.stderr == ("meshd: Windows is not supported: use Linux or macOS, or the Windows Subsystem for Linux (WSL)\n")
