"""`meshd service install|status|remove`: have the daemon start at boot, under systemd or launchd."""

import contextlib
import getpass
import os
import pwd
import re
import shutil
import subprocess
import sys
from argparse import REMAINDER, Namespace
from pathlib import Path

from meshd.cli.support import units
from meshd.cli.support.arguments import Parser, add_commands, add_json, add_settings, settings_of
from meshd.cli.support.output import print_json, show
from meshd.config import clean_environment, given_variables
from meshd.errors import ConfigError, LocalFault, StorageError, Unavailable
from meshd.settings import SETTINGS
from meshd.values import parse_path

EXAMPLE = (
    "meshd service install -- --name attic --memory 4GiB\n  sudo meshd service install --system\n  meshd service status\n"
    "  meshd service remove"
)
_SECRETS = {
    "key": "store it first with `meshd key join CODE`",
    "api-key": "make one with `meshd key api`",
    "mqtt": 'write `mqtt = "mqtts://..."` into the config file, which only you need to be able to read',
}
"""Settings that are refused, and where each belongs."""
_CALL_S = 400.0
"""Longer than the first start may take (`units.START_S`): the call returns when the daemon is ready."""
_HINT = "is this a session of that user, with a service manager? `meshd service install --print` shows what would be written"
_SHOWN = ("LoadState", "UnitFileState", "ActiveState", "SubState", "MainPID", "NRestarts", "Result", "StatusText")


def add_arguments(parser: Parser) -> None:
    texts = {
        "install": "start the daemon now and at each boot",
        "status": "show whether the service is installed and runs",
        "remove": "stop the daemon, and start it no more at boot",
    }
    commands = add_commands(parser, texts, EXAMPLE)
    for command in commands.values():
        command.add_argument("--system", action="store_true", help="a service of the system; without it, of this user")
    install = commands["install"]
    install.add_argument("--user", metavar="NAME", help="user that a system service runs as; default: the one who called sudo")
    install.add_argument("--print", action="store_true", help="print what would be written, and change nothing")
    install.add_argument("settings", nargs=REMAINDER, metavar="-- SETTINGS", help="flags of `meshd up`, such as --name attic")
    add_json(commands["status"])


def run(args: Namespace) -> int:
    manager = _Launchd(args.system) if sys.platform == "darwin" else _Systemd(args.system)
    if args.command == "install":
        return _install(manager, args)
    return _status(manager, args.json) if args.command == "status" else _remove(manager)


def _install(manager: "_Systemd | _Launchd", args: Namespace) -> int:
    service = _service(args, manager.log)
    text = manager.text(service)
    if args.print:
        show(text.decode().rstrip())
        return 0
    manager.require()
    before = manager.path.read_bytes() if manager.path.exists() else None
    if before == text and manager.runs():
        show(f"{manager.path} is installed already, and the daemon runs")
        return 0
    _make_folders(service)
    _write(manager.path, text)
    try:
        manager.start(changed=before is not None)
    except LocalFault:
        _undo(manager, before)
        raise
    show(f"{manager.path}: {'written anew' if before is not None else 'written'}; the daemon runs and starts at each boot")
    for line in manager.hints():
        show(f"  {line}")
    ignored = given_variables()
    if ignored:
        show(f"  not seen by the service: {', '.join(ignored)}; give them as flags after --, or in the config file")
    return 0


def _undo(manager: "_Systemd | _Launchd", before: bytes | None) -> None:
    """Leave things as they were before an installation that failed: nothing, or the daemon with its unit of before."""
    with contextlib.suppress(LocalFault):  # else it would be started again and again, and at each boot
        manager.stop()
    if before is None:
        manager.path.unlink(missing_ok=True)
    else:
        manager.path.write_bytes(before)
    with contextlib.suppress(LocalFault):
        manager.forget() if before is None else manager.start(changed=False)


def _service(args: Namespace, log: Path | None) -> units.Service:
    """Check the settings, and describe the service. Raises: ConfigError."""
    words = args.settings[1:] if args.settings[:1] == ["--"] else list(args.settings)
    user = _user(args) if args.system else None
    if user is not None:
        words += _folders_of(user, words)
    parser = Parser("up", "the settings of the service", EXAMPLE)
    add_settings(parser, (setting.name for setting in SETTINGS))
    given = parser.parse_args(words)
    for secret, how in _SECRETS.items():
        if getattr(given, f"setting_{secret.replace('-', '_')}") is not None:
            raise ConfigError(f"--{secret} is not written into a unit, which others can read", hint=how)
    config = settings_of(given, environ=clean_environment()).config()  # a service does not see the variables of this shell
    folders = [config.state, config.cache, config.models_dir, config.hf_cache]
    if config.log_file is not None:
        folders.append(config.log_file.parent)
    writable = tuple(dict.fromkeys(folder.absolute() for folder in folders))
    command = units.command_of(sys.executable, _with_whole_paths(words))
    return units.Service(command=command, drain_s=config.drain_timeout, writable=writable, user=user, log=log)


def _with_whole_paths(words: list[str]) -> list[str]:
    """Write the paths among flags of settings in full: a service starts in another folder."""
    whole: list[str] = []
    paths = {f"--{setting.name}" for setting in SETTINGS if setting.parse is parse_path}
    for word in words:
        flag, equals, value = word.partition("=")
        if whole and whole[-1] in paths:
            whole.append(str(parse_path(word)))
        else:
            whole.append(f"{flag}={parse_path(value)}" if equals and flag in paths else word)
    return whole


def _user(args: Namespace) -> str:
    """Return the user that a system service runs as. Raises: ConfigError."""
    name: str | None = args.user or os.environ.get("SUDO_USER")
    if name is None:
        raise ConfigError("a system service needs a user to run as", hint="name one with --user NAME")
    try:
        pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(f"there is no user {name}", hint="name another with --user NAME") from None
    return name


def _folders_of(user: str, words: list[str]) -> list[str]:
    """Return flags with the user's own folders, for those that `words` do not set: root's would be taken otherwise."""
    home = Path(pwd.getpwnam(user).pw_dir)
    state, cache, config = (
        ("Library/Application Support/meshd", "Library/Caches/meshd", "Library/Application Support/meshd")
        if sys.platform == "darwin"
        else (".local/state/meshd", ".cache/meshd", ".config/meshd")
    )
    own = {"--state": home / state, "--cache": home / cache, "--hf-cache": home / ".cache/huggingface/hub"}
    if (home / config / "config.toml").exists():
        own["--config"] = home / config / "config.toml"
    set_ = {word.partition("=")[0] for word in words}
    return [part for flag, path in own.items() if flag not in set_ for part in (flag, str(path))]


def _make_folders(service: units.Service) -> None:
    """Make the folders that a system service may write to, for its user: systemd refuses to start it without them."""
    if service.user is None:
        return
    owner = pwd.getpwnam(service.user)
    for folder in service.writable:
        missing = [part for part in (folder, *folder.parents) if not part.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for part in missing:
            os.chown(part, owner.pw_uid, owner.pw_gid)


def _write(path: Path, text: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    except OSError as error:
        hint = "use sudo for a service of the system" if isinstance(error, PermissionError) else "check the folder"
        raise StorageError(f"{path} can't be written: {error.strerror}", hint=hint) from error


def _status(manager: "_Systemd | _Launchd", as_json: bool) -> int:
    row = {"installed": manager.path.exists(), "path": str(manager.path), "scope": manager.scope} | manager.state()
    if as_json:
        print_json(row)
    elif not row["installed"]:
        show(f"no service is installed ({manager.path}); install one with `meshd service install`")
    else:
        show("\n".join(f"{name.replace('_', ' '):<10}{value}" for name, value in row.items() if value not in (None, "")))
    return 0 if row["running"] else 1


def _remove(manager: "_Systemd | _Launchd") -> int:
    if not manager.path.exists():
        show(f"no service is installed ({manager.path})")
        return 0
    manager.require()
    manager.stop()
    manager.path.unlink(missing_ok=True)
    manager.forget()
    show(f"{manager.path} is removed; the keys and models of this device stay")
    return 0


def _call(*words: str) -> str:
    """Run a command of the service manager. Returns: its output. Raises: LocalFault with what it says."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_CALL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LocalFault(f"`{' '.join(words)}` can't be run: {error}", hint="run `meshd up` yourself") from error
    if done.returncode:
        why = " ".join((done.stderr or done.stdout).split()) or f"exit status {done.returncode}"
        raise LocalFault(f"`{' '.join(words)}` failed: {why}", hint=_HINT)
    return done.stdout


class _Systemd:
    """The user's systemd, or with `system` that of the machine."""

    log: Path | None = None

    def __init__(self, system: bool) -> None:
        self.scope = "system" if system else "user"
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        self.path = (Path("/etc/systemd/system") if system else config / "systemd/user") / units.NAME
        self._words = ("systemctl",) if system else ("systemctl", "--user")

    def text(self, service: units.Service) -> bytes:
        """Return the content of the unit."""
        return units.systemd_unit(service).encode()

    def require(self) -> None:
        """Check that systemd can be asked. Raises: Unavailable."""
        if shutil.which("systemctl") is None:
            raise Unavailable(
                "this system has no systemd: there is no systemctl",
                hint="start `meshd up` with your own supervisor; `meshd service install --print` shows the unit",
            )

    def runs(self) -> bool:
        """Return whether the daemon runs and is started at each boot."""
        state = self.state()
        return bool(state["running"]) and state["enabled"] == "enabled"

    def start(self, *, changed: bool) -> None:
        """Start the daemon, or start it anew if the unit has changed. Waits until it is ready. Raises: LocalFault."""
        _call(*self._words, "daemon-reload")
        _call(*self._words, "enable", units.NAME)
        _call(*self._words, "restart" if changed else "start", units.NAME)

    def stop(self) -> None:
        """Stop the daemon. Raises: LocalFault."""
        _call(*self._words, "disable", "--now", units.NAME)

    def forget(self) -> None:
        """Have systemd forget the unit whose file is gone."""
        _call(*self._words, "daemon-reload")
        with contextlib.suppress(LocalFault):  # it was never failed
            _call(*self._words, "reset-failed", units.NAME)

    def state(self) -> dict[str, object]:
        """Return what systemd knows of the unit. What it does not tell is None."""
        try:
            shown = _call(*self._words, "show", units.NAME, f"--property={','.join(_SHOWN)}")
        except LocalFault as error:
            return {"running": False, "enabled": None, "problem": error.message}
        found = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
        return {
            "running": found.get("ActiveState") in ("active", "reloading"),
            "enabled": found.get("UnitFileState") or None,
            "state": f"{found.get('ActiveState', '')} ({found.get('SubState', '')})",
            "pid": int(found.get("MainPID", "0")) or None,
            "restarts": int(found.get("NRestarts", "0")),
            "result": found.get("Result") or None,
            "says": found.get("StatusText") or None,
        }

    def hints(self) -> list[str]:
        """Return what to type next."""
        scope = "" if self.scope == "system" else "--user "
        lines = [f"journalctl {scope}-u meshd -f        its log", "meshd service status              whether it runs"]
        if self.scope == "user" and not Path("/var/lib/systemd/linger", getpass.getuser()).exists():
            lines.append("sudo loginctl enable-linger $USER  so that it runs while you are not logged in")
        return [*lines, "meshd key join CODE --replace      to join another cluster; `meshd key show` on its device prints CODE"]


class _Launchd:
    """launchd of the user, or with `system` of the machine."""

    def __init__(self, system: bool) -> None:
        self.scope = "system" if system else "user"
        home = Path.home()
        folder = Path("/Library/LaunchDaemons") if system else home / "Library/LaunchAgents"
        self.path = folder / f"{units.LABEL}.plist"
        self.log: Path | None = Path("/Library/Logs/meshd.log") if system else home / "Library/Logs/meshd.log"
        self._domain = "system" if system else f"gui/{os.getuid()}"

    def text(self, service: units.Service) -> bytes:
        """Return the content of the property list."""
        return units.launchd_plist(service)

    def require(self) -> None:
        """Check that launchd can be asked. Raises: Unavailable."""
        if shutil.which("launchctl") is None:
            raise Unavailable("this system has no launchd: there is no launchctl", hint="start `meshd up` with your own supervisor")

    def runs(self) -> bool:
        """Return whether the daemon runs."""
        return bool(self.state()["running"])

    def start(self, *, changed: bool) -> None:
        """Load the property list, and start the daemon, anew if it runs. Raises: LocalFault."""
        self.stop()
        _call("launchctl", "bootstrap", self._domain, str(self.path))

    def stop(self) -> None:
        """Stop and unload the daemon, if it is loaded. Raises: LocalFault."""
        if self.state()["enabled"]:
            _call("launchctl", "bootout", f"{self._domain}/{units.LABEL}")

    def forget(self) -> None:
        """Do nothing: launchd knows only what is loaded."""

    def state(self) -> dict[str, object]:
        """Return what launchd knows of the daemon."""
        try:
            shown = _call("launchctl", "print", f"{self._domain}/{units.LABEL}")
        except LocalFault as error:
            return {"running": False, "enabled": None, "problem": error.message}
        pid = re.search(r"^\s*pid = (\d+)", shown, re.MULTILINE)
        return {"running": pid is not None, "enabled": "loaded", "pid": int(pid[1]) if pid else None}

    def hints(self) -> list[str]:
        """Return what to type next."""
        return [f"tail -f {self.log}", "meshd service status", "meshd key join CODE --replace      to join another cluster"]
