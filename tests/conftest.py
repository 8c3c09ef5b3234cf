"""Shared by all tests."""

import pytest

pytest.register_assert_rewrite("daemons", "openai_suite")
