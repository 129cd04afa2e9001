"""Settings: how one is declared (fields.py), those of every run (groups.py, network.py and
diffusion.py, together in whole.py), which have an effect (effects.py), and how they are read from a
Python file and the command line (files.py).
"""

from ogdm_jax.config.diffusion import Precondition
from ogdm_jax.config.effects import check_sense, check_typed
from ogdm_jax.config.fields import (
    ConfigError,
    Group,
    check,
    choose,
    duration,
    parse,
    require,
    setting,
    suggestion,
)
from ogdm_jax.config.files import (
    SHIPPED,
    changed,
    editable,
    from_json,
    load,
    override,
    read,
    spelled,
    to_json,
)
from ogdm_jax.config.groups import Parallel, Sample
from ogdm_jax.config.network import Network
from ogdm_jax.config.whole import Config, flatten, make, replace, resolve

__all__ = [
    "SHIPPED",
    "Config",
    "ConfigError",
    "Group",
    "Network",
    "Parallel",
    "Precondition",
    "Sample",
    "changed",
    "check",
    "check_sense",
    "check_typed",
    "choose",
    "duration",
    "editable",
    "flatten",
    "from_json",
    "load",
    "make",
    "override",
    "parse",
    "read",
    "replace",
    "require",
    "resolve",
    "setting",
    "spelled",
    "suggestion",
    "to_json",
]
