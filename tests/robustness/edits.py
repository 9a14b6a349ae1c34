"""Ways to damage a file: of its bytes, and of the values of JSON."""

from __future__ import annotations

import copy
import json
import struct

from hypothesis import strategies as st

HOSTILE = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 2**70, -(2**63), 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"),
    "", " ", "\0", "\n", "a" * 5000, "../../../../etc/passwd", "/dev/zero", "/dev/stdin", "/", ".", "..", "~", "{taps}",
    "é\ud800", "\u202e", "漢字", "NaN", "1e999", "-1", "0x10", "1" * 5000, "\\", "$(touch x)", "%s%n", [], {}, [[]], [None],
    [[1, 2]], [1e308] * 8, {"": {}}, {"counts": [10**9], "size": [10**6, 10**6]}, {"counts": "~" * 99, "size": [1, 1]},
]  # fmt: skip
PIECES = [b"", b"\0", b"\xff", b"\xff\xff\xff\xff", b"\n", b"'", b'"', b"{", b"[", b"<", b"&a", b"*a", b"!!python/name:os",
          b"<!ENTITY a 'b'>", b"]]>", b"-", b"1e999", b": ", b"\r", b"\xef\xbb\xbf", b"PK\x03\x04", b"\x80\x04",
          struct.pack(">I", 2**31 - 1), struct.pack("<I", 2**31), struct.pack("<Q", 2**63)]  # fmt: skip

places = st.integers(0, 9999).map(lambda number: number / 10000)  # floats would be 0 and 0.5 most often
byte_edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "replace", "delete", "double", "swap"]),
        places,
        st.integers(1, 40),
        st.sampled_from(PIECES),
    ),
    min_size=1,
    max_size=5,
)
value_edits = st.lists(
    st.tuples(st.sampled_from(["set", "set", "delete", "double", "deep"]), places, st.integers(0, len(HOSTILE) - 1)),
    min_size=1,
    max_size=4,
)


def damaged(data: bytes, edits) -> bytes:
    """Return bytes with edits at places between 0, the beginning, and 1, the end."""
    for kind, place, length, piece in edits:
        at = int(place * len(data))
        end = min(len(data), at + length)
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << (length % 8))]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "replace":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "delete":
            data = data[:at] + data[end:]
        elif kind == "double":
            data = data[:end] + data[at:end] + data[end:]
        elif kind == "swap":
            data = data[end:] + data[:end]
    return data


def places_of(value, path=()):
    """List the paths of all values of JSON below a value."""
    found = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        found += [(*path, key), *places_of(item, (*path, key))]
    return found


def edited(content, edits):
    """Return a copy of JSON in which some values are others, are missing, or are there twice."""
    content = copy.deepcopy(content)
    for kind, place, number in edits:
        paths = places_of(content)
        if not paths:
            break
        *above, key = paths[int(place * len(paths))]
        parent = content
        for step in above:
            parent = parent[step]
        if kind == "set":
            parent[key] = copy.deepcopy(HOSTILE[number])
        elif kind == "delete":
            del parent[key]
        elif kind == "double":
            value = copy.deepcopy(parent[key])
            parent.append(value) if isinstance(parent, list) else parent.update({f"{key}2": value})
        else:
            for _ in range(300):
                parent[key] = [parent[key]]
    return content


def as_json(content) -> bytes:
    """Write JSON as Python does, with NaN and lone surrogates."""
    return json.dumps(content).encode()
