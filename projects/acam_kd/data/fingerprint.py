"""A dataset's fingerprint, by which a resumed run notices other data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..files import sha256

__all__ = ["Fingerprint"]


@dataclass(frozen=True)
class Fingerprint:
    """A few facts about the files of one split that change when the files do.

    Args:
        annotations: the hash of the json's content; empty for label images.
        files: the number of images and label images.
        bytes: their size on the disk.
        names: the hash of their names.
        sizes: the hash of their sizes.
        classes: label -> name.
    """

    annotations: str
    files: int
    bytes: int
    names: str
    sizes: str
    classes: dict[str, str]

    @classmethod
    def of(cls, annotations: str, files: Sequence[str], classes: Mapping[int, str]) -> Fingerprint:
        """Take the fingerprint.

        Args:
            annotations: the path of the json, or empty.
            files: the paths of all images and label images.
            classes: label -> name.
        """
        paths = sorted(files)
        sizes = [os.path.getsize(path) for path in paths]
        return cls(
            annotations=sha256(annotations) if annotations else "",
            files=len(paths),
            bytes=sum(sizes),
            names=_hash(map(os.path.basename, paths)),
            sizes=_hash(map(str, sizes)),
            classes={str(label): name for label, name in classes.items()},
        )

    def asdict(self) -> dict[str, Any]:
        """Return the facts as a dict of json's types."""
        return asdict(self)

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """Say what has changed since another fingerprint was taken, in a few words each."""
        now, found = self.asdict(), []
        if before.get("annotations") != now["annotations"]:
            found.append("another content of the json")
        if before.get("classes") != now["classes"]:
            found.append(f"the classes {now['classes']} (they were {before.get('classes')})")
        if before.get("files") != now["files"]:
            found.append(f"{now['files']} image files (they were {before.get('files')})")
        elif before.get("names") != now["names"]:
            found.append("other names of images")
        elif before.get("sizes") != now["sizes"]:
            found.append(f"other sizes of image files, {now['bytes']} bytes (they were {before.get('bytes')})")
        return found


def _hash(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
