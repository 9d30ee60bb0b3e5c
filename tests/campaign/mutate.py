"""Damage a file: by its structure where it has one that is known, else by its bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml

BITS_OF_JSON = (
    1e400,
    float("nan"),
    None,
    True,
    -1,
    0,
    0.5,
    10**30,
    "",
    [],
    {},
    "x" * 20_000,
    "\ud800",
    "[/b]",
    "\x1b[31m",
)
PATHS = "../..", "/dev/zero", "/", "/etc/passwd", "a/b", "~", "reference", "n" * 300, "\x00"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
RAW = (
    "{", "]", "'", "\n  - x", "\t", "%", "!!python/object/apply:os.system ['touch HACKED']\n", "&a *a", "? ", "---\n",
    "\ufeff", "\x00", "[" * 3000, "{a: " * 1000, "9" * 5000, "\nsteps: 3\nsteps: 4\n", BOMB, "{{ cycler.__init__ }}",
    "!!bool x", "!!int 0x", "!!timestamp x", "!!float q", "!!binary ~", "!!set {a, b}", "!!%70ython/none ", "!x ",
    "%TAG ! tag:yaml.org,2002:python/\n---\n", "0x" + "f" * 5000, "2026-13-45", "1:99:99", "\"\\ud800\"", "<<: *a",
)  # fmt: skip


def damaged(path: Path, random: Random) -> bytes:
    """Another content for a file."""
    content = path.read_bytes()
    if path.suffix in (".json", ".yaml") and random.random() < 0.75:
        return by_structure(yaml.safe_load(content), random)  # JSON is YAML
    if path.suffix == ".jsonl" and random.random() < 0.6:
        lines = content.splitlines()
        at = random.randrange(len(lines))
        lines[at] = by_structure(json.loads(lines[at]), random)
        return b"\n".join(lines) + b"\n"
    if path.suffix == ".safetensors" and random.random() < 0.5:
        return _header(content, random)
    return by_bytes(content, random)


def by_structure(value: Any, random: Random) -> bytes:
    """JSON with something else in one place to three, or with text that is no JSON put in."""
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        value = _changed(value, random)
    text = json.dumps(value, ensure_ascii=random.random() < 0.9, default=str).encode("utf-8", "surrogatepass")
    if random.random() < 0.15:
        at = random.randrange(len(text) + 1)
        text = text[:at] + random.choice(RAW).encode() + text[at:]
    return text


def hostile(random: Random, old: object) -> object:
    """What nobody expects in the place of a value."""
    which = random.random()
    if which < 0.55:
        return random.choice(BITS_OF_JSON)
    if which < 0.7:
        return random.choice(PATHS)
    if which < 0.75:
        deep: Any = 1
        for _ in range(random.choice([5, 300])):
            deep = [deep] if random.random() < 0.5 else {"a": deep}
        return deep
    if isinstance(old, (int, float)) and not isinstance(old, bool):
        return old * random.choice([-1, 0.001, 1000, 10**9])
    return {"a": old} if random.random() < 0.5 else [old, old]


def _changed(value: Any, random: Random) -> Any:
    inside = [*(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())]
    if not inside or random.random() < 0.08:
        return hostile(random, value)
    key, old = random.choice(inside)
    new = value.copy()
    which = random.random()
    if isinstance(old, (dict, list)) and old and which < 0.6:
        new[key] = _changed(old, random)
    elif which < 0.85:
        new[key] = hostile(random, old)
    elif which < 0.95:
        del new[key]
    elif isinstance(value, dict):
        new[random.choice([f"{key}x", key.upper(), "", "__class__", "name"])] = new.pop(key)
    else:
        new += value
    return new


def by_bytes(content: bytes, random: Random) -> bytes:
    """Bits flipped, a piece cut out, zeroed, doubled or put in, or the end cut off; often near the beginning."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 5])):
        end = len(data) if random.random() < 0.5 else min(len(data), 400)
        at, size = random.randrange(end + 1), random.choice([1, 4, 8, 100])
        which = random.randrange(6)
        if which == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif which == 1:
            del data[at : at + size]
        elif which == 2:
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif which == 3:
            data[at:at] = data[at : at + size]
        elif which == 4:
            numbers = (2**31, 2**32 - 1, 2**63, 2**64 - 1, 0, 1)
            put = random.choice([struct.pack("<Q", random.choice(numbers)), random.randbytes(size), b"\xff" * size])
            data[at : at + len(put)] = put
        elif random.random() < 0.3:
            del data[at:]
    return bytes(data)


def _header(content: bytes, random: Random) -> bytes:
    """Safetensors with another header, or other numbers."""
    (size,) = struct.unpack("<Q", content[:8])
    tensors = json.loads(content[8 : 8 + size])
    body = bytearray(content[8 + size :])
    if random.random() < 0.3 and len(body) > 8:  # NaN, an infinity, or any other bits, aligned
        at = 4 * random.randrange(len(body) // 4)
        body[at : at + 4] = random.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", random.randbytes(4)])
        return content[: 8 + size] + bytes(body)
    header = by_structure(tensors, random)
    names = [name for name in tensors if name != "__metadata__"]
    if names and random.random() < 0.5:
        one, other = random.sample(names, 2) if len(names) > 1 else (names[0], names[0])
        tensors[one], tensors[other] = tensors[other], tensors[one]
        if random.random() < 0.5:
            tensors[one]["dtype"] = random.choice(["I64", "BF16", "F16", "U8", "F64", "BOOL", "F8_E4M3"])
        header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + bytes(body)


def pick(files: Sequence[Path], random: Random) -> Path:
    """One of them."""
    return random.choice(sorted(files))
