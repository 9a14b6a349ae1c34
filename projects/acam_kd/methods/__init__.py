"""The methods, one file each. Importing this package registers them."""

from .acam import ACAMKD
from .at import AT
from .cosine import Cosine
from .cwd import CWD
from .dkd import DKD
from .dmkd import DMKD
from .fgd import FGD
from .freekd import FreeKD
from .kd import KD
from .maskd import MasKD
from .mcmi import MCMI
from .mgd import MGD
from .mimic import Mimic
from .nkd import NKD
from .pkd import PKD
from .pskd import PSKD
from .samkd import SAMKD
from .score_weighted import ScoreWeighted
from .uskd import USKD

__all__ = [
    "ACAMKD",
    "AT",
    "CWD",
    "DKD",
    "DMKD",
    "FGD",
    "KD",
    "MCMI",
    "MGD",
    "NKD",
    "PKD",
    "PSKD",
    "SAMKD",
    "USKD",
    "Cosine",
    "FreeKD",
    "MasKD",
    "Mimic",
    "ScoreWeighted",
]
