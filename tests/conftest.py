"""Shared by all tests."""

import signal

import pytest

pytest.register_assert_rewrite("daemons", "openai_suite")

# Run by nohup or as a shell's background job, these are ignored, which the processes that tests start would inherit and respect.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
