"""Write docs/state-machines.md: one diagram for each state machine, from its table.

python -P tests/project/diagrams.py
"""

from pathlib import Path

from meshd.agents.machine import diagram
from meshd.agents.membership import peer
from meshd.agents.membership.peer_events import PeerState
from meshd.agents.placement.weights import transfer
from meshd.agents.session import session
from meshd.agents.stage.flow import session as stage_session
from meshd.agents.stage.mirror import copy as mirror_copy

PAGE = Path(__file__).resolve().parents[2] / "docs/state-machines.md"

MACHINES = (
    ("A peer, as another peer sees it", "agents/membership/peer.py", peer.TRANSITIONS, PeerState.UNKNOWN),
    ("A session, on the peer that coordinates it", "agents/session/session.py", session.TRANSITIONS, session.SessionState.NEW),
    (
        "A session's stage, on the peer that computes it",
        "agents/stage/flow/session.py",
        stage_session.TRANSITIONS,
        stage_session.StageState.IDLE,
    ),
    (
        "A copy of a stage's KV on another peer",
        "agents/stage/mirror/copy.py",
        mirror_copy.TRANSITIONS,
        mirror_copy.MirrorState.OFFERED,
    ),
    (
        "A range of a model's file, on the peer that fetches it",
        "agents/placement/weights/transfer.py",
        transfer.TRANSITIONS,
        transfer.TransferState.WANTED,
    ),
)


_INTRODUCTION = (
    "`make diagrams` writes this page from the tables of the state machines. Do not edit it: a test compares it with the tables."
)


def page() -> str:
    """Return the whole page."""
    parts = ["# State machines", "", _INTRODUCTION]
    for title, path, table, initial in MACHINES:
        parts += ["", f"## {title}", "", f"`{path}`", "", "```mermaid", diagram(table, initial), "```"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
