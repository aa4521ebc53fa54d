"""A WSGI service that says how words are pronounced, made before its workers are forked.

gunicorn --preload --workers 2 examples.service.app:app
curl 'http://127.0.0.1:8000/?word=although'
"""

from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from examples.pronounce.inference import CHECKPOINT, generate_tokens, load, to_phonemes

model = load(CHECKPOINT, fast=True)


def pronounce(word: str) -> str:
    """ARPAbet of one word."""
    return to_phonemes(generate_tokens(model, [word]))[0]


# A worker builds engines of its own at its first request; what this call has put into the engine
# cache and into Python's memory makes that quick.
pronounce("warm")


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """``/?word=...`` -> its pronunciation."""
    words = parse_qs(environ.get("QUERY_STRING", "")).get("word", ["hello"])
    start_response("200 OK", [("Content-Type", "text/plain")])
    return ["\n".join(map(pronounce, words)).encode()]
