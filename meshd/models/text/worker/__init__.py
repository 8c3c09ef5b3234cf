"""The text worker: a process that reads tokenizers, renders templates and encodes prompts, which can be ended at any time."""
