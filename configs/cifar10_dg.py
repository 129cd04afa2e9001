"""DG's discriminator for CIFAR-10 (2211.17091): a shallow head on a frozen ADM classifier of noisy
32-pixel images.

    python train.py --config configs/cifar10_dg.py --workdir runs/cifar10_dg
        --config.dg.prior=runs/cifar10_edm --config.dg.extractor=32x32_classifier.pt
        --config.evaluate.weights=INCEPTION

The paper: FID 1.97 -> 1.77 of EDM at 35 evaluations, with 50,000 samples and weight 2 on Heun's
first evaluation. The authors train without decay and average; both are added here, and half of
every batch is real. Without an extractor the network is trained from scratch: give
--config.network.channel_mult and the like the size of a whole encoder.
"""

import dataclasses

from ml_collections import ConfigDict

from ogdm_jax.configs import base
from ogdm_jax.discriminator.settings import Settings
from ogdm_jax.methods import discovery


def get_config():
    config = base.get_config().unlock()
    for name in ("noise", "precondition", *discovery.training()):
        del config[name]  # a denoiser's
    for name in ("xflip", "augment", "label_dropout"):
        del config.data[name]  # follow from the prior
    config.task = "discriminator"
    config.dg = ConfigDict(dataclasses.asdict(Settings()))
    config.dg.num = 50_000
    config.data.source = ""  # "" = what the prior was trained on
    config.data.batch = 128  # half real, half generated
    # of the head on the extractor's features, or of the whole encoder without one
    config.network = ConfigDict()
    config.network.model_channels = 128
    config.network.channel_mult = (1,)
    config.network.num_blocks = 2
    config.network.attn_resolutions = (8,)
    config.network.head_channels = 64
    config.network.dropout = 0.0
    config.network.dtype = "float32"
    config.network.remat = False
    config.optim.learning_rate = 3e-4
    config.optim.ramp = "0 steps"
    config.optim.decay = "train.duration"
    config.optim.weight_decay = 1e-7  # coupled to the gradient (Adam with L2)
    config.ema.halflife = "50 kimg"
    config.train.duration = "6 Mimg"  # 60 passes over both sides
    config.train.save_every = "500 kimg"
    config.sample.every = "100 kimg"  # held-out loss and accuracy
    config.evaluate.features = "inception"
    config.evaluate.num = 10_000
    config.evaluate.every = "500 kimg"
    config.evaluate.keep_best = 3
    return config.lock()
