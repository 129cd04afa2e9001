"""Every setting with its default: EDM's recipe for CIFAR-10 (2206.00364, configuration F).

Other files of this folder are short overlays; so is yours, anywhere:

    from ogdm_jax.configs import base

    def get_config():
        config = base.get_config()
        config.data.source = "folder:pictures"
        return config

`python train.py --config configs/base.py --dry-run` prints all settings as one types them
(--config.GROUP.KEY=VALUE); the files of ogdm_jax/config and each method's `Settings` say what they
mean.
"""

from ml_collections import ConfigDict

from ogdm_jax import config
from ogdm_jax.methods import discovery


def get_config() -> ConfigDict:
    """All groups and those of the training methods; locked, so that no name can be misspelled."""
    return config.editable(discovery.defaults())
