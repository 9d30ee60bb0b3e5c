"""Records that know their own SHA-256: whether what they say changed on the disk is told from them alone.

Against damage, not against a forger: whoever changes a record can sign it anew, or take the signature away.
"""

from __future__ import annotations

import hashlib
import json

from remend.files.atomic import JsonObject, JsonRow

SIGNATURE = "sha256"
"""The last key of a signed record. Records of versions without it are taken as they are."""


def unsigned(record: JsonRow) -> JsonObject:
    """All but the signature."""
    return {key: value for key, value in record.items() if key != SIGNATURE}


def signed(record: JsonRow) -> JsonObject:
    """With its signature, in place of one that it had."""
    return {**unsigned(record), SIGNATURE: signature(record)}


def signature(record: JsonRow) -> str:
    """SHA-256 of all in a record but the signature itself, in hexadecimal."""
    return hashlib.sha256(json.dumps(unsigned(record)).encode()).hexdigest()


def as_signed(record: JsonRow) -> bool:
    """Whether it says what it said when it was signed; a record without a signature can't tell."""
    return SIGNATURE not in record or record[SIGNATURE] == signature(record)
