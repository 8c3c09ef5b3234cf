"""Which peers are in the cluster and in which state each is: found, alive, suspect, dead, refused or left.

`membership.py` collects what happens (sightings, links, adverts, silence), and the state machine in `peer.py` decides the state. A
peer is SUSPECT when nothing came from it for `membership._SUSPECT_S`. It is DEAD when its link has ended; `links/link_table.py`
ends a link after `Timing.silence_s` of silence.

Left to others: what follows from a state. `placement/replication.py` decides which peer takes over the layers of a lost peer, and
`session/plan/retry.py` finds a new plan for each running answer.
"""
