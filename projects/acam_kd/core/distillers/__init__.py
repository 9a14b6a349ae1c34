"""The methods, one file each. Importing this package registers them."""

from .acam import ACAMKD
from .dkd import DKD
from .kd import KD
from .mimic import Mimic
from .nkd import NKD

__all__ = ["ACAMKD", "DKD", "KD", "NKD", "Mimic"]
