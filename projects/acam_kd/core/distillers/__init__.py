"""The methods, one file each. Importing this package registers them."""

from .acam import ACAMKD
from .at import AT
from .cwd import CWD
from .mgd import MGD
from .mimic import Mimic
from .pkd import PKD

__all__ = ["ACAMKD", "AT", "CWD", "MGD", "PKD", "Mimic"]
