"""The coordinator's messages to and from the stages of its answers, and the watch for stages that are stuck."""
