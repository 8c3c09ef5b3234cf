"""What `meshd service install` writes: a unit for systemd, a property list for launchd. Pure, apart from looking up programs."""

import plistlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NAME = "meshd.service"
LABEL = "io.meshd.daemon"
WATCHDOG_S = 60
"""Longer than any pause of the event loop that was seen, also on a device that swaps."""
START_S = 300
"""The first start measures the device, for about 10 s on a fast device and minutes on a slow one."""
_RESTART_S, _STARTS, _WITHIN_S = 5, 5, 300
"""Five starts within five minutes that all fail will not be helped by a sixth."""
_LEAVE_S = 15
"""Time beyond the drain: the goodbye to clients and peers, and to free memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One installed daemon."""

    command: tuple[str, ...]
    """The program and its arguments; without keys."""
    drain_s: float
    writable: tuple[Path, ...]
    """Folders that the daemon writes to."""
    user: str | None = None
    """The user that a system service runs as. None: a service of the user who installs it."""
    log: Path | None = None
    """File of the log, for launchd, which has no journal."""

    @property
    def stop_s(self) -> int:
        """Time after which a daemon that was asked to stop is killed."""
        return int(self.drain_s) + _LEAVE_S


def systemd_unit(service: Service) -> str:
    """Write the unit (systemd.service(5), systemd.exec(5))."""
    system = service.user is not None
    kill = shutil.which("kill") or "/bin/kill"
    return "\n".join(
        [
            "# Written by `meshd service install`, which overwrites changes: put yours into a drop-in (`systemctl edit meshd`).",
            "[Unit]",
            "Description=meshd: one language model across this device and others",
            *(["After=network-online.target", "Wants=network-online.target"] if system else []),
            f"StartLimitIntervalSec={_WITHIN_S}",
            f"StartLimitBurst={_STARTS}",
            "",
            "[Service]",
            "Type=notify",
            "NotifyAccess=main",
            f"ExecStart={' '.join(map(quoted, service.command))}",
            f"ExecReload={kill} -HUP $MAINPID",
            *([f"User={service.user}"] if system else []),
            "Environment=PYTHONUNBUFFERED=1",
            "Restart=on-failure",
            f"RestartSec={_RESTART_S}",
            "# Wrong settings stay wrong: a restart does not help.",
            "RestartPreventExitStatus=2",
            f"TimeoutStartSec={START_S}",
            f"TimeoutStopSec={service.stop_s}",
            f"WatchdogSec={WATCHDOG_S}",
            "# The daemon first: its children end with it.",
            "KillMode=mixed",
            "UMask=0077",
            "NoNewPrivileges=yes",
            "LockPersonality=yes",
            "RestrictRealtime=yes",
            "RestrictSUIDSGID=yes",
            "SystemCallArchitectures=native",
            "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
            *(_of_the_system(service) if system else []),
            "",
            "[Install]",
            f"WantedBy={'multi-user' if system else 'default'}.target",
            "",
        ]
    )


def _of_the_system(service: Service) -> list[str]:
    """Options that only the system's manager can apply."""
    return [
        "CapabilityBoundingSet=",
        "PrivateTmp=yes",
        "ProtectClock=yes",
        "ProtectControlGroups=yes",
        "ProtectHostname=yes",
        "ProtectKernelLogs=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "ProtectSystem=strict",
        f"ReadWritePaths={' '.join(quoted(str(path)) for path in service.writable)}",
    ]


def quoted(word: str) -> str:
    """Quote a word for a unit's command line (systemd.service(5), "Command lines"): `%` and `$` would be expanded."""
    word = word.replace("%", "%%").replace("$", "$$")
    if word and re.fullmatch(r"[\w@+=:,./%$-]+", word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def launchd_plist(service: Service) -> bytes:
    """Write the property list (launchd.plist(5))."""
    entries: dict[str, object] = {
        "Label": LABEL,
        "ProgramArguments": [*service.command, "--log-file", str(service.log)],
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,
        "ExitTimeOut": service.stop_s,
        "Umask": 0o077,
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": 8192},
    }
    return plistlib.dumps(entries | ({"UserName": service.user} if service.user is not None else {}))


def command_of(python: str, settings: Sequence[str]) -> tuple[str, ...]:
    """Return the command of the daemon. `python` is this program's own interpreter: a virtual environment's finds its packages."""
    return python, "-P", "-m", "meshd", "up", *settings
