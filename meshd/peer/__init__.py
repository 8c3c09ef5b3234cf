"""One peer: the parts it is made from, its composition, and its agents while they run. For the daemon and for the simulator."""
