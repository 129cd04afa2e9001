"""The stable target field on the shipped digits, every image a reference.

python train.py --config configs/digits_stf.py
"""

from ogdm_jax.configs import digits


def get_config():
    config = digits.get_config()
    config.methods = ("stf",)
    config.stf.source = "full"
    config.sample.solver = "heun"
    config.sample.steps = 18
    return config
