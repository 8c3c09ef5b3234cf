"""The order of a session's steps at one stage, as pure state machines: no tensors, no I/O, no clock.

events.py    what comes in and what is to be done
edges.py     numbers, credit and repeats of the steps between two stages
rules.py     what steps and RESUME must keep
session.py   the state machine of one session at one stage
"""
