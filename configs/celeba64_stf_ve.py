"""STF with score SDE's VE process on CelebA at 64x64: levels up to 180, NCSN++ (2302.00670).

    python train.py --config configs/celeba64_stf_ve.py --config.data.source=folder:DIR
        --workdir runs/celeba64_stf_ve
    python sample.py --workdir runs/celeba64_stf_ve --solver pc --steps 1000 --snr 0.17

DIR holds the images; they are cropped to squares and resized. The published configuration of this
set is the discrete VE; STF's paper solves it as an ODE too, so this one is continuous. 1,024
references: the paper's number is not known to us.
"""

from ogdm_jax.configs import cifar10_stf_ve_paper


def get_config():
    config = cifar10_stf_ve_paper.get_config()
    config.stf.n = 1024
    config.data.source = "folder:data/celeba64"
    config.data.resolution = 64
    config.precondition.sigma_max = config.sample.sigma_max = 180.0
    return config
