"""API keys for tests of a server."""

import os

from meshd.api.access.key_file import KeyFile
from meshd.api.access.scopes import Scope

LOCAL = "a-local-key"
"""The key of the user's own commands."""


def make_key(file: KeyFile, name: str = "phone", scope: Scope = Scope.INFER, **limits: int) -> dict[str, str]:
    """Make a key. Returns: the headers that carry it."""
    text, _ = file.add(name, os.urandom, scope=scope, created=1, **limits)
    return {"Authorization": f"Bearer {text}"}
