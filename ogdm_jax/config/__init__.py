"""Settings: declared as fields with help and limits (fields.py), read from a Python file and the
command line (files.py).
"""

from ogdm_jax.config.fields import (
    ConfigError,
    check,
    choose,
    duration,
    expected,
    parse,
    require,
    setting,
    suggestion,
)
from ogdm_jax.config.files import (
    SHIPPED,
    check_same_run,
    flatten,
    from_json,
    load,
    override,
    to_json,
)

__all__ = [
    "SHIPPED",
    "ConfigError",
    "check",
    "check_same_run",
    "choose",
    "duration",
    "expected",
    "flatten",
    "from_json",
    "load",
    "override",
    "parse",
    "require",
    "setting",
    "suggestion",
    "to_json",
]
