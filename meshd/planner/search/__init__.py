"""Search for the best plan, search for repairs, and make the error if no plan fits.

`solve.py` is the entry point. `select.py` chooses the exact search (`exact.py`) or, for many peers, the heuristic search
(`heuristic.py`).
"""
