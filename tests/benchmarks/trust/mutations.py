"""Artifacts with one thing changed: in the plan's text or its entries, in the bytes of weights, in a checkpoint."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PAYLOADS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 2**31, 2**64, 10**400, "", "a", "b", "\0", "a\0b",
    "../../../etc/passwd", "[bold]x[/y]", "\x1b[31mred", "\uff41", "a@2", "\ud800", "x" * 100_000, "b99999",
    "peers", "a+b", "int64", "load", "quint8", "os", "copy", "ladder", "mean", [], {}, [[]], [0], [2**40] * 3,
    ["a"] * 5000, [True],
    {"kind": "module", "location": "os", "name": "system", "arguments": {"command": "touch RAN"}},
    {"kind": "file", "location": "stranger.py", "name": None, "arguments": {}},
    {"kind": "hf", "location": "some/model", "name": None, "arguments": {"trust_remote_code": True}},
    {"kind": "timm", "location": "resnet18", "name": None, "arguments": {"checkpoint_path": "stranger.pt"}},
)  # fmt: skip


def _places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all entries of nested JSON data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in items for place in ((*path, key), *_places(value, (*path, key)))]


def _entry_changed(data: Any, random_: random.Random) -> Any:
    """JSON data in which one entry is another, is gone, twice there, or has another's place."""
    data = copy.deepcopy(data)
    place, other = random_.choice(_places(data)), random_.choice(_places(data))
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    value = data
    for key in other:
        value = value[key]
    kind = random_.randrange(5)
    if kind < 2:
        holder[place[-1]] = random_.choice(PAYLOADS)
    elif kind == 2:
        holder[place[-1]] = copy.deepcopy(value)
    elif kind == 3:
        del holder[place[-1]]
    elif isinstance(holder, list):
        holder.append(copy.deepcopy(holder[place[-1]]))
    else:
        holder[str(random_.choice(PAYLOADS))[:50]] = holder.pop(place[-1])
    return data


def _bytes_changed(data: bytes, random_: random.Random) -> bytes:
    kind, at = random_.randrange(6), random_.randrange(max(1, len(data)))
    match kind:
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes([random_.randrange(256)]) + data[at + 1 :]
        case 2:
            return data[:at] + random_.randbytes(random_.randrange(1, 50)) + data[at:]
        case 3:
            return data[:at] + data[at + random_.randrange(1, 50) :]
        case 4:
            end = random_.randrange(at, len(data) + 1)
            return data[:at] + data[at:end] * random_.randrange(2, 4) + data[end:]
    return data[:at] + b"[" * 100_000 + data[at:]


def plan_text(folder: Path, random_: random.Random) -> None:
    """Other bytes in the plan."""
    file = folder / "plan.json"
    file.write_bytes(_bytes_changed(file.read_bytes(), random_))


def plan_entry(folder: Path, random_: random.Random) -> None:
    """Another entry in the plan; in half of the cases without a checksum that would tell."""
    file = folder / "plan.json"
    data = _entry_changed(json.loads(file.read_text()), random_)
    if isinstance(data, dict) and random_.random() < 0.5:
        data.pop("checksum", None)
    file.write_text(json.dumps(data))


def weights_bytes(folder: Path, random_: random.Random) -> None:
    """Other bytes in the weights."""
    file = folder / "weights.safetensors"
    data = file.read_bytes()
    if random_.random() < 0.5:  # in the header
        length = 8 + int.from_bytes(data[:8], "little")
        file.write_bytes(_bytes_changed(data[:length], random_) + data[length:])
    else:
        file.write_bytes(_bytes_changed(data, random_))


def weights_header(folder: Path, random_: random.Random) -> None:
    """Another entry in the header of the weights, metadata included."""
    file = folder / "weights.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if random_.random() < 0.5:
        header["__metadata__"] = _entry_changed(header["__metadata__"], random_)
        if isinstance(text := header["__metadata__"].get("fxcollab.order"), str) and text.startswith('["a'):
            header["__metadata__"]["fxcollab.order"] = json.dumps(_entry_changed(json.loads(text), random_))
    else:
        header = _entry_changed(header, random_)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def state(values: dict[str, Tensor], random_: random.Random) -> dict[str, Any]:
    """A state dict in which one entry is gone, renamed, of another shape or type, or another's."""
    values = dict(values)
    name, other = random_.choice(list(values)), random_.choice(list(values))
    value = values[name]
    match random_.randrange(7):
        case 0:
            del values[name]
        case 1:
            new = str(random_.choice((f"peers.b{random_.choice(PAYLOADS)}.w", "peers.b1", "x", "", "peers."))[:5000])
            values[new.encode(errors="replace").decode()] = value  # safetensors takes no surrogates
        case 2:
            values[name] = value.new_zeros(random_.choice([(0,), (), (1, *value.shape), (7, 7)]))
        case 3:
            types = (torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float64, torch.complex64)
            values[name] = value.to(random_.choice(types))
        case 4:
            values[f"{random_.choice(('module.', 'net.', 'peers.', 'b1.'))}{name}"] = values.pop(name)
        case 5:
            del values[name], values[other if other != name else next(key for key in values if key != name)]
        case 6:
            branch = random_.choice(("b1", "b9", "b0_1", "b1_9", "b" + "9" * 5000, "b" + "_".join("1" * 40)))
            values = {key.replace("peers.b1.", f"peers.{branch}."): value for key, value in values.items()}
    return values


def checkpoint(values: dict[str, Tensor], file: Path, random_: random.Random) -> None:
    """A checkpoint with another entry, or with other bytes."""
    save_file({key: value.clone() for key, value in state(values, random_).items()}, file)
    if random_.random() < 0.2:
        file.write_bytes(_bytes_changed(file.read_bytes(), random_))


IN_FOLDER: tuple[Callable[[Path, random.Random], None], ...] = (plan_text, plan_entry, weights_bytes, weights_header)
