"""A look at many files at once, in several threads, with a line of progress and a cache of what was found."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from time import monotonic
from typing import Any

from ..images import AUTO, DEEP, RANGES, Header, look
from .cache import FileFacts, State, file_state
from .findings import Findings

__all__ = ["check_depth", "headers_of", "look_at"]

DETECTRON2 = "detectron2"
ASPECT = 50
"""A longer side of so many shorter ones: resized to a model's sizes, less than a pixel may be left."""
DIM = 2**14
"""If 16 bits hold no larger value than this, an image scaled by 256 is nearly black."""


def look_at(
    paths: Sequence[str], facts_of: Callable[[str], Any], *, kind: str, root: str, words: str
) -> list[tuple[State | None, Any]]:
    """Return state and facts of many files; those of unchanged files come from the cache.

    Args:
        paths: the files.
        facts_of: reads the facts of one file, as json's types; a list whose last item says why it cannot be read.
        kind: of the facts, for the cache.
        root: the folder of the files, for the cache.
        words: the line of progress, as ``"my data: images"``.
    """
    cache = FileFacts(kind, root)
    states = [file_state(path) for path in paths]
    found = [cache.get(path, state) for path, state in zip(paths, states)]
    new = [index for index, facts in enumerate(found) if facts is None and states[index] is not None]
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        results = pool.map(facts_of, [paths[index] for index in new])
        for index, facts in zip(new, _progress(results, len(new), words)):
            found[index] = facts
            if not facts[-1]:  # what cannot be read today may be readable tomorrow, with the same time
                cache.put(paths[index], states[index], facts)
    cache.save()
    return list(zip(states, found))


def _progress(items: Iterator[Any], total: int, words: str) -> Iterator[Any]:
    """Pass items on; on a terminal, show how many of them there were."""
    terminal, last = sys.stderr.isatty() and total > 100, monotonic()
    for number, item in enumerate(items, 1):
        if terminal and (monotonic() - last > 0.2 or number == total):
            last = monotonic()
            end = "\n" if number == total else ""
            print(f"\r{words} {number}/{total}", end=end, file=sys.stderr, flush=True)
        yield item


def headers_of(paths: Sequence[str], root: str, words: str) -> list[tuple[State | None, Header | None]]:
    """Return state and header of image files; both are None for a file that does not exist."""
    looked = look_at(paths, lambda path: [*astuple(look(path))], kind="images", root=root, words=words)
    return [(state, Header(*facts) if facts else None) for state, facts in looked]


def check_header(header: Header, place: str, findings: Findings, *, image_range: str, reader: str) -> bool:
    """Refuse an image that cannot be read as it should be; return False if its size is not known."""
    if header.problem:
        hint = "make it smaller, or cut it into parts" if "exceeds limit" in header.problem else ""
        findings.refuse("image file", place, f", which cannot be read ({header.problem})", "a whole image file", hint)
        return False
    if max(header.width, header.height) > ASPECT * min(header.width, header.height):
        findings.refuse(
            "shape of image", place, f"of {header.width} x {header.height} pixels",
            f"a longer side of at most {ASPECT} shorter ones", "cut it into parts",
        )  # fmt: skip
    if reader == DETECTRON2:
        _check_detectron2(header, place, findings)
    elif header.depth:
        _check_range(header, place, findings, image_range)
    return True


def _check_detectron2(header: Header, place: str, findings: Findings) -> None:
    """Refuse files that Detectron2's own reader would clip in silence or turn twice."""
    if header.depth not in ("", DEEP):
        findings.refuse(
            "depth of image", place, f"of {header.depth} (mode {header.mode})",
            "8 bits, since Detectron2 cuts larger values off", "scale its values to 0 to 255, and save it with 8 bits",
        )  # fmt: skip
    if header.format == "TIFF" and header.orientation != 1:
        findings.refuse(
            "orientation of image", place, f"in TIFF format with orientation {header.orientation}",
            "none, since Detectron2 turns it twice", "turn its pixels, and save it without the entry",
        )  # fmt: skip


def _check_range(header: Header, place: str, findings: Findings, image_range: str) -> None:
    """Refuse values of more than 8 bits that the range does not cover, or whose range is not known."""
    values = f"of {header.depth} with values from {header.low:g} to {header.high:g}"
    if image_range == AUTO and header.depth not in ("16 bits", DEEP):
        findings.refuse(
            "depth of image", place, values, "a range that is known", "give {image_range}: 8bit, 16bit or 0-1"
        )
    elif header.depth == DEEP and image_range not in (AUTO, "16bit"):
        findings.refuse("depth of image", place, values, "16bit for such files", "give {image_range} auto")
    elif not (header.low >= 0 and header.high <= (RANGES[image_range] or RANGES["16bit"])):
        white = RANGES[image_range] or RANGES["16bit"]
        findings.refuse("depth of image", place, values, f"values from 0 to {white:g}", "change {image_range}")


def check_depth(headers: Sequence[Header], findings: Findings, *, image_range: str, reader: str) -> None:
    """Say how images of more than 8 bits are scaled; refuse a dataset that would be nearly black then."""
    deep = [header for header in headers if header.depth and not header.problem]
    theirs = reader == DETECTRON2  # which refuses the others
    deep = [header for header in deep if header.depth == DEEP] if theirs else deep
    if not deep:
        return
    high = max(header.high for header in deep)
    if image_range == AUTO and high < DIM and all(header.depth in ("16 bits", DEEP) for header in deep):
        other = "" if theirs else ", or give {image_range} 16bit or 8bit"
        findings.refuse(
            "depth of image", f"{len(deep)} images", f"of 16 bits whose largest value is {high:g}",
            "values up to 65535", f"scaled by 256 they would be nearly black: scale the files{other}",
        )  # fmt: skip
        return
    rule = {"8bit": "taken as they are", "0-1": "times 255"}.get(image_range, "divided by 256")
    findings.notices.append(f"the values of {len(deep)} images of more than 8 bits are {rule}")
