"""Decides which layers are loaded on which peers, and loads them.

Decided here:

- Where a requested model goes: `client.py` asks the planner and sends PLACE to the chosen peers.
- Which layers get a standby copy and where, and which peer takes over the layers of a lost peer: `replication.py`, run by
  `keeper.py`.
- Which layers a peer releases when its memory is short: `loader.py`.

Decided elsewhere: `membership` decides that a peer is suspect or dead; `planner` computes which placement fits and how fast it is;
`session/plan/` chooses the plan under which a running answer continues after a loss.
"""
