"""OpenAI's own client against the HTTP server of the fixtures."""

from fake_api.openai_suite import *  # noqa: F403
from fake_api.responses_suite import *  # noqa: F403
