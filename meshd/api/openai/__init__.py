"""OpenAI's API: models, chats, text completions and responses."""
