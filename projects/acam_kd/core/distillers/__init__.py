"""The methods, one file each. Importing this package registers them."""

from .acam import ACAMKD
from .at import AT
from .cwd import CWD
from .dmkd import DMKD
from .fgd import FGD
from .mgd import MGD
from .mimic import Mimic
from .pkd import PKD

__all__ = ["ACAMKD", "AT", "CWD", "DMKD", "FGD", "MGD", "PKD", "Mimic"]
