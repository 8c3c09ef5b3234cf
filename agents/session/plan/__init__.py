"""Plans for sessions: the first one, and every change of plan afterwards.

- `retry.py`: when a plan is looked for, and again while none is possible.
- `route.py`: over which peers and layers; layers that no peer has are loaded first.
- `candidates.py`: which of the possible plans, by their cost.
- `resume.py`: from which position each stage of the new plan computes.
- `move.py` and `drain.py`: changes of plan without a loss.
"""
