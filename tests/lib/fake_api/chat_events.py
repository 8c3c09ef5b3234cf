"""The event stream of a chat completion, as a daemon sends it."""

import json

CHAT = "/v1/chat/completions"


def chat_events(*texts: str) -> list[bytes]:
    """Make the events of a stream: the role, one delta for each text, the end, the usage and `[DONE]`."""
    deltas = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}]
    deltas += [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    deltas.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(texts)}}
    return [f"data: {json.dumps(event)}\n\n".encode() for event in (*deltas, usage)] + [b"data: [DONE]\n\n"]
