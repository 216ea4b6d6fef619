"""Secrets of keys: `tm_` and 256 random bits, of which only the SHA-256 is kept.

A fast hash is right here: nobody can go through 2^256 secrets. The public id is of other random bits.
"""

import hashlib
import secrets
from typing import Final, NamedTuple

__all__ = ["SECRET_PREFIX", "NewSecret", "hash_secret", "new_key_id", "new_secret"]

SECRET_PREFIX: Final = "tm_"
"""What secrets begin with, so that scanners of leaked secrets can know them."""

_MAX_CHARS: Final = 256


class NewSecret(NamedTuple):
    """A secret, to be shown once, and what is kept of it."""

    secret: str
    secret_hash: bytes


def new_secret() -> NewSecret:
    """A secret that nobody has seen."""
    secret = SECRET_PREFIX + secrets.token_urlsafe(32)
    return NewSecret(secret, hash_secret(secret))


def hash_secret(secret: str) -> bytes:
    """The SHA-256 of a secret. Texts that can be none (too long, not ASCII) give the hash of no secret."""
    given = secret if len(secret) <= _MAX_CHARS and secret.isascii() else ""
    return hashlib.sha256(given.encode()).digest()


def new_key_id() -> str:
    """A public id: `key_` and 64 random bits."""
    return f"key_{secrets.token_hex(8)}"
