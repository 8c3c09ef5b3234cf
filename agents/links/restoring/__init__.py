"""A link that breaks while both processes live comes back: nothing that was sent is lost or arrives twice.

history.py    what was sent and received, and what has to be sent again
restorer.py   dials the peer of a broken link, or finds out that its process has ended
"""
