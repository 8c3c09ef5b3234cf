"""Copies of the source tree with another protocol version, to run daemons of different builds in one cluster."""

import shutil
from pathlib import Path

from meshd.protocol.messages import PROTOCOL_VERSION

_ROOT = Path(__file__).parents[3]
_PACKAGES = ("meshd", "agents", "protocol", "kernels", "tui")
_GREETING = '''

@message(4000)
class Greeting(Message, frozen=True, kw_only=True):
    """A message of a later build."""

    words: str
'''


def next_minor(root: Path) -> Path:
    """Make a build that is one minor version ahead.

    It has a new message, which it sends on each new link, also to peers that do not know it, and new fields in messages and in a
    profile, which it sends with other values than their defaults. Returns: the folder for PYTHONPATH.
    """
    build = _copied(root)
    major, minor = PROTOCOL_VERSION
    base, messages = build / "protocol/messages/base.py", build / "protocol/messages"
    _patch(base, (f"PROTOCOL_VERSION = ({major}, {minor})", f"PROTOCOL_VERSION = ({major}, {minor + 1})"))
    (messages / "link.py").write_text((messages / "link.py").read_text() + _GREETING)
    _patch(
        messages / "steps.py",
        ("    finish: TokensFinish | None = None\n", "    finish: TokensFinish | None = None\n    lag_ms: Millis = 0\n"),
        ("    size: Size\n", "    size: Size\n    priority: Count = 7\n"),
        ("    Epoch,\n", "    Epoch,\n    Millis,\n"),
    )
    finish = "            finish=output.finish,\n"
    _patch(build / "agents/stage/sender.py", (finish, f"{finish}            lag_ms=7,\n"))
    _patch(messages / "session.py", ("    answered: Tokens", '    tier: str = ""\n    answered: Tokens'))
    stages = build / "agents/session/stages/client.py"
    _patch(stages, ("            prompt_tokens=", '            tier="gold",\n            prompt_tokens='))
    _patch(build / "meshd/types.py", ('    api: Address = ""\n', '    api: Address = ""\n    site: Label = "attic"\n'))
    _patch(
        build / "agents/membership/membership.py",
        (
            "        self.publisher.register()\n",
            "        self.publisher.register()\n"
            "        from meshd.protocol.messages.link import Greeting\n"
            '        self.links.register(Greeting, lambda sender, message, payload: log.info("greeted: %s", message.words))\n',
        ),
        (
            "        self.publisher.greet(peer)\n",
            "        self.publisher.greet(peer)\n"
            "        from meshd.protocol.messages.link import Greeting\n"
            '        self.links.send(peer, Greeting(words="good morning"))\n',
        ),
    )
    return build


def next_major(root: Path) -> Path:
    """Make a build that is one major version ahead and otherwise the same. Returns: the folder for PYTHONPATH."""
    build = _copied(root)
    major, minor = PROTOCOL_VERSION
    _patch(build / "protocol/messages/base.py", (f"PROTOCOL_VERSION = ({major}, {minor})", f"PROTOCOL_VERSION = ({major + 1}, 0)"))
    return build


def _copied(root: Path) -> Path:
    for package in _PACKAGES:
        shutil.copytree(_ROOT / package, root / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def _patch(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{path}: {old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    path.write_text(text)
