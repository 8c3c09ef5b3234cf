"""Ids for tests, made from a word: they have the shape that the wire demands."""

import base64
import hashlib

from meshd.types import ModelId, PeerId, SessionId


def session_id(word: str) -> SessionId:
    return SessionId(hashlib.sha256(word.encode()).hexdigest()[:32])


def model_id(word: str) -> ModelId:
    return ModelId(hashlib.sha256(word.encode()).hexdigest()[:32])


def peer_id(word: str) -> PeerId:
    return PeerId(base64.b32encode(hashlib.sha256(word.encode()).digest()).decode().lower().rstrip("="))
