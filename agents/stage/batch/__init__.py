"""One pass of a stage's layers over the steps of several sessions.

schedule.py    which steps the next pass takes, pure
compute.py     the pass, on the compute thread
measure.py     times of passes: metrics, traces, events, the budget of the next pass
learning.py    how far the planner's predictions are off on this device
"""
