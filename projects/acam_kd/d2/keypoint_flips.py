"""Left and right in the names of keypoints, which a horizontal flip swaps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

__all__ = ["Pairs", "flip_pairs", "without_partner"]

Pairs = tuple[tuple[str, str], ...]
OPPOSITE = {"left": "right", "right": "left", "l": "r", "r": "l"}
SIDES = {"word": r"^(left|right)$", "letter": r"^[lr]$", "joined": r"^(left|right)(?=.)|(?<=.)(left|right)$"}
"""The spellings of a side in a part of a name, as in left_eye, L_eye and lefteye."""
PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z][a-z]*|[a-z]+|[^A-Za-z]+")
"""The parts of a name: words, also in camel case, and everything between them."""


def flip_pairs(names: Sequence[str]) -> Pairs:
    """Find the pairs of names that differ only by left and right.

    Example:
        >>> flip_pairs(["nose", "left_eye", "right_eye", "L_ear", "R_ear", "hip_l", "hip_r", "leftKnee", "rightKnee"])
        (('left_eye', 'right_eye'), ('L_ear', 'R_ear'), ('hip_l', 'hip_r'), ('leftKnee', 'rightKnee'))
    """
    spelt = {name.casefold(): name for name in names}
    pairs: list[tuple[str, str]] = []
    for name in names:
        mirrored = [_mirrored(name, spelling) for spelling in SIDES]
        partner = next((spelt[each.casefold()] for each in mirrored if each != name and each.casefold() in spelt), name)
        if partner != name and not {name, partner} & set(chain(*pairs)):
            pairs.append((name, partner))
    return tuple(pairs)


def without_partner(names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """List the names that say left or right and are in no pair.

    The letter l or r, or a side that is joined to a word, counts only if another name is its mirror image: else it may
    well be something other than a side.
    """
    spelt = {name.casefold() for name in names}
    spellings = {"word"}
    for spelling in SIDES:
        mirrored = {name: _mirrored(name, spelling) for name in names}
        if any(mirror != name and mirror.casefold() in spelt for name, mirror in mirrored.items()):
            spellings.add(spelling)
    paired = set(chain(*pairs))
    return [name for name in names if name not in paired and any(_mirrored(name, each) != name for each in spellings)]


def _mirrored(name: str, spelling: str) -> str:
    """Swap left and right in a name; without a side of that spelling it stays as it is."""

    def opposite(match: re.Match[str]) -> str:
        side = match[0]
        other = OPPOSITE[side.lower()]
        return other.upper() if side.isupper() else other.capitalize() if side[0].isupper() else other

    return "".join(re.sub(SIDES[spelling], opposite, part, flags=re.IGNORECASE) for part in PARTS.findall(name))
