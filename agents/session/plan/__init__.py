"""Plans for sessions: the first one, and every change of plan afterwards.

- `retry.py`: when to search for a plan, and how long to retry while none is possible.
- `route.py`: makes plans over the layers that are loaded, and first has missing layers loaded.
- `open_ended.py`: first plans of answers whose length nobody asked for.
- `candidates.py`: chooses the cheapest of the possible plans.
- `resume.py`: from which position each stage of the new plan computes.
- `move.py` and `drain.py`: changes of plan without a loss.
"""
