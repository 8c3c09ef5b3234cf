"""Search for the best plan, for repairs, and for what to report if no plan fits.

`solve.py` is the entry. `select.py` chooses between the exact search (`exact.py`) and, for many peers, the heuristic one
(`heuristic.py`).
"""
