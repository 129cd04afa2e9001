"""STF on CIFAR-10 as the authors' code trains it: EDM's recipe, references of the loader, eight for
each image of a device (1,024 for 128), under augmentation whose labels do not count (2302.00670).

    python train.py --config configs/cifar10_stf_paper.py --workdir runs/cifar10_stf_paper
        --config.data.data_dir=DIR

NCSN++: --config.network.embedding_type=fourier --config.network.encoder_type=residual
--config.network.resample_filter='(1,3,3,1)'. Aim: FID 1.90 with NCSN++, 1.92 with DDPM++ at 35
evaluations [authors' README; not yet reproduced here].
"""

from ogdm_jax.configs import cifar10_stf
from ogdm_jax.methods import stf


def get_config():
    config = cifar10_stf.get_config()
    config.stf.update(stf.preset("official"))
    return config
