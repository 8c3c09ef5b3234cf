"""One pass of a stage's layers over the steps of several sessions.

schedule.py    which steps the next pass takes, pure
pacing.py      how much of a prompt a pass takes beside decode steps
compute.py     the pass, on the compute thread
parked.py      passes that wait for peers that hold a part of their KV
measure.py     times of passes: metrics, traces, events
learning.py    how far the planner's predictions are off on this device
"""
