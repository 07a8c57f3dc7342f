"""How is a file damaged? By accident and by one who means harm, as a random number generator says.

Bytes are flipped, cut off, repeated or filled in; values of JSON and YAML are removed, exchanged or wrapped;
headers of safetensors are rewritten, with a right checksum too.
"""

import copy
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NASTY: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a\nb",
    "\x1b[2J",
    "\ud800",
    "a" * 5000,
    [],
    [[]],
    {},
    {"a": 1},
    [1, "a"],
    {"schema": 1},
    [None] * 3,
]


def nodes(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where every value of a JSON text stands."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from nodes(one, (*path, key))


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one thing in it removed, added, exchanged or wrapped."""
    value = copy.deepcopy(value)
    path = rng.choice(list(nodes(value)))
    if not path:
        return rng.choice([*NASTY, [value]])
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    what = rng.randrange(6)
    if what == 0:
        del holder[path[-1]]
    elif what == 1 and isinstance(holder, list):
        holder.insert(path[-1], copy.deepcopy(rng.choice([*NASTY, holder[path[-1]]])))
    elif what == 2:
        deep: list = []
        for _ in range(rng.choice([3, 40, 500])):
            deep = [deep]
        holder[path[-1]] = deep
    elif what == 3 and type(holder[path[-1]]) is int:
        holder[path[-1]] += rng.choice([-1, 1, 10**6])
    elif what == 4 and isinstance(holder, dict):
        holder[rng.choice([*map(str, holder), "\x1b[2J", "a" * 9999])] = copy.deepcopy(rng.choice(NASTY))
    else:
        holder[path[-1]] = copy.deepcopy(rng.choice(NASTY))
    return value


def hostile_text(text: str, rng: random.Random) -> str:
    """A JSON text with what no writer of JSON makes: names that come twice,
    numbers of 10,000 digits, depth."""
    places = [k for k, letter in enumerate(text) if letter in "{[:,"] or [0]
    at = rng.choice(places) + 1
    more = rng.choice(
        [
            "9" * 10_000,
            "1e99999",
            "NaN",
            "-Infinity",
            "[" * 100_000,
            '{"a":' * 50_000,
            '"a": 1, "a": 2,',
            '"schema": 1, "schema": 99,',
            '"\\ud800"',
            "\x00",
            "\ufeff",
            '"' + "a" * 10**6 + '"',
        ]
    )
    return text[:at] + more + text[at:]


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes with some flipped, cut off, repeated or filled in."""
    held, at = bytearray(data), rng.randrange(len(data))
    what = rng.randrange(6)
    if what == 0:
        return bytes(held[:at])
    if what == 1:
        held[at] ^= 1 << rng.randrange(8)
    elif what == 2:
        held[at : at + rng.randrange(1, 64)] = bytes(rng.randrange(1, 64))
    elif what == 3:
        held[at:at] = held[at : at + rng.randrange(1, 64)]
    elif what == 4:
        claimed = rng.choice([0, 1, len(held), 2**31, 2**63, 2**64 - 1])  # a size that a header claims
        place = rng.choice([0, at, max(0, len(held) - 22 + rng.randrange(14))])
        held[place : place + 8] = struct.pack("<Q", claimed)
    else:
        return bytes(held) + bytes(rng.randrange(1, 99))
    return bytes(held)


def damaged_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header, or our header in it, has something exchanged."""
    from residual_kernels import files

    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.3:
        header = changed(header, rng)
    else:
        ours = json.loads(header["__metadata__"][files.METADATA])
        text = hostile_text(json.dumps(ours), rng) if rng.random() < 0.3 else json.dumps(changed(ours, rng))
        header["__metadata__"][files.METADATA] = text
    front = json.dumps(header).encode()
    return len(front).to_bytes(8, "little") + front + data[8 + size :]


def forge(path: Path, rng: random.Random) -> None:
    """Puts our own writer's file of exchanged tensors or header in the place: its checksum is right."""
    import torch

    from residual_kernels import files

    data = path.read_bytes()
    outer = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    what = json.loads(outer["__metadata__"][files.METADATA])["what"]
    tensors, header = files.map_tensors(path, what)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    rest = {key: value for key, value in header.items() if key not in ("schema", "what", "sha256")}
    name = rng.choice(sorted(tensors))
    change = rng.randrange(6)
    if change == 0:
        del tensors[name]
    elif change == 1:
        tensors[name] = tensors[name][:-1] if tensors[name].ndim else tensors[name][None]
    elif change == 2:
        tensors[name] = tensors[name].to(rng.choice([torch.int8, torch.float16, torch.bool]))
    elif change == 3:
        tensors[name] = torch.zeros(0, 2**40)
    elif change == 4:
        tensors[f"{name}.more"] = tensors[name]
    elif rest:
        found = changed(rest, rng)
        rest = found if isinstance(found, dict) else {}
    files.save_tensors(path, tensors, what, {str(key): value for key, value in rest.items()})


def damage(path: Path, rng: random.Random) -> str:
    """Damages the file; says how."""
    before, how = path.read_bytes(), rng.randrange(3)
    if how == 0 or path.suffix in (".zip", ".tar", ".txt"):
        path.write_bytes(damaged_bytes(before, rng))
        return "bytes"
    if path.suffix == ".safetensors":
        path.write_bytes(damaged_header(before, rng)) if how == 1 else forge(path, rng)
        return "header" if how == 1 else "forged"
    if path.suffix == ".yaml":  # JSON is YAML too
        import yaml

        before = json.dumps(yaml.safe_load(before)).encode()
    if how == 1:
        path.write_text(hostile_text(before.decode(), rng), errors="surrogatepass")
        return "text"
    path.write_text(json.dumps(changed(json.loads(before), rng)))
    return "structure"
