"""The methods, one file each. Importing this package registers them."""

from .acam import ACAMKD
from .freekd import FreeKD
from .maskd import MasKD
from .mimic import Mimic

__all__ = ["ACAMKD", "FreeKD", "MasKD", "Mimic"]
