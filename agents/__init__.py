"""The actors of a peer. Each owns its state, handles events and issues commands.

- `links`: authenticated connections with other peers, and their measurement.
- `membership`: which peers are alive, suspect or dead.
- `device`: what this device can do, and the thread that computes.
- `placement`: which layers are loaded on which peers, and which peer takes over a lost stage.
- `stage`: this peer's part of sessions: steps, KV and copies of KV.
- `session`: requests on the peer that took them: plans, recovery, answers.
- `observe`: live events, and the story of each session: what happened to it on this peer.
- `admin`: the rows and operations of the API and the command line.
"""
