"""Sessions on the peer that coordinates them: their state, their plans, their stages, and their journal on other peers.

- Which requests run and which wait: `admission.py`.
- What an answer does after each event: `session.py`, the state machine. `answer.py` carries out its commands.
- Under which plan an answer continues after a loss or a move: `plan/`.
- Whether a stage is stuck: `stages/stall.py`.
- Which peer takes over an answer whose coordinator is lost: `journal/locator.py`. `coordinator.py` on that peer takes it over.
"""
