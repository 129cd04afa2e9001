"""Self-perceptual fine-tuning on the shipped digits, from a finished default run.

python train.py && python train.py --config configs/digits_sp.py
"""

from ogdm_jax.configs import digits


def get_config():
    config = digits.get_config()
    config.methods = ("sp",)
    config.init.workdir = "runs/digits"
    config.optim.learning_rate = 2e-4
    config.optim.ramp = "0 steps"
    config.ema.rampup = 0.0
    config.train.duration = "300 steps"
    config.optim.decay = "train.duration"
    config.sample.solver = "heun"
    config.sample.steps = 18
    return config
