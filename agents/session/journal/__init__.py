"""Session records that deputies keep for a coordinator, so that a session can continue when its coordinator is lost.

- `writer.py`, on the coordinator: which peers are its deputies, and what is sent to them.
- `deputy.py`, on a deputy: keeps the records in `store.py`, and reports those whose coordinator is lost.
- `locator.py`: whether this peer should take such a session over, and who coordinates a session now.
"""
