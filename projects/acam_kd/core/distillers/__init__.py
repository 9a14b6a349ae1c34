"""The methods, one file each. Importing this package registers them."""

from .acam import ACAMKD
from .cwd import CWD
from .mimic import Mimic

__all__ = ["ACAMKD", "CWD", "Mimic"]
