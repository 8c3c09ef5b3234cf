"""Tracks which peers are in the cluster and the state of each: found, alive, suspect, dead, refused or left.

`membership.py` collects what happens (sightings, links, adverts, silence), and the state machine in `peer.py` decides the state. A
peer is SUSPECT when nothing has come from it for `membership._SUSPECT_S`. It is DEAD when its link has ended without a
goodbye; `links/link_table.py` ends a link after `Timing.silence_s` of silence.

What follows from a state is decided elsewhere: `placement/replication.py` decides which peer takes over the layers of a lost peer,
and `session/plan/retry.py` finds a new plan for each running answer.
"""
