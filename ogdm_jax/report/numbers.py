"""Numbers for people; apart from the charts, so that who draws none starts without matplotlib."""

import math


def nice(value: float) -> str:
    """A number for people: 4 significant digits, no 1e+00 forms between 0.001 and a million."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
