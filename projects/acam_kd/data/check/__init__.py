"""The check of a whole dataset before anything is built: all troubles at once, what is not in doubt mended.

``coco`` checks a json and its images, ``labels`` checks images and label PNGs; ``annotations``, ``segmentation`` and
``entries`` are the parts of a json. ``look`` reads headers in parallel, ``cache`` remembers them, and ``findings``
collects what is told in the end.
"""

from .annotations import Needs
from .coco import Checked, check_coco
from .findings import Say
from .labels import check_labels

__all__ = ["Checked", "Needs", "Say", "check_coco", "check_labels"]
