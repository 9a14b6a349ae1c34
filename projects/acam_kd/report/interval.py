"""The 95% interval of a mean of paired differences, and the verdict that a rule gives on it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = ["half_width", "t_quantile", "verdict"]

# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom, from the usual tables.
T_QUANTILES = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
NORMAL_QUANTILE = 1.9600


def t_quantile(degrees: int) -> float:
    """Return the 97.5% quantile of Student's t; beyond 30 degrees of freedom that of the normal distribution."""
    if degrees < 1:
        raise ValueError(f"there is no t distribution of {degrees} degrees of freedom")
    return T_QUANTILES[degrees - 1] if degrees <= len(T_QUANTILES) else NORMAL_QUANTILE


def half_width(values: Sequence[float]) -> float | None:
    """Return half of the 95% interval of the mean, t s / sqrt(n).

    It is None for fewer than two values, and if a value is not finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def verdict(values: Sequence[float], threshold: float) -> str:
    """Say if a gain is there and large enough.

    Args:
        values: differences from the control, one a seed.
        threshold: the mean gain that is asked for, at least 0.

    Returns:
        GO if the lower bound of the interval is above 0 and the mean reaches the threshold, NO-GO if the upper bound
        is below the threshold, else INCONCLUSIVE.

    Example:
        >>> verdict([2.0, 2.5, 3.0], threshold=1.0)
        'GO'
    """
    half = half_width(values)
    if half is None:
        return "INCONCLUSIVE"
    mean = statistics.mean(values)
    if mean - half > 0 and mean >= threshold:
        return "GO"
    return "NO-GO" if mean + half < threshold else "INCONCLUSIVE"
