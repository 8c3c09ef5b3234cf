"""OpenAI's own client against the edge alone."""

from openai_suite import *  # noqa: F403
