"""The stable target field with the VE noise distribution and preconditioning, NCSN++: where
targets differ most (2302.00670).

    python train.py --config configs/cifar10_stf_ve.py --workdir runs/cifar10_stf_ve
        --config.data.data_dir=DIR

Aim: faster and better than the same run with --config.methods= [the paper's claim; no figure of
this recipe is quoted].
"""

from ogdm_jax.configs import cifar10_stf


def get_config():
    config = cifar10_stf.get_config()
    config.precondition.kind = "ve"
    config.noise.distribution = "ve"
    config.network.embedding_type = "fourier"
    config.network.encoder_type = "residual"
    config.network.resample_filter = (1, 3, 3, 1)
    return config
