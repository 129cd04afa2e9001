"""STF with score SDE's continuous VE process and NCSN++ on CIFAR-10, where it helped most
(2302.00670; 2011.13456).

    python train.py --config configs/cifar10_stf_ve_paper.py --workdir runs/cifar10_stf_ve_paper
        --config.data.data_dir=DIR
    python sample.py --workdir runs/cifar10_stf_ve_paper --solver pc --steps 1000

The second line is score SDE's predictor and corrector, 2,000 evaluations. configs/cifar10_stf_vp.py
says what else is score SDE's; EMA is 0.999 a step here.
"""

from ogdm_jax.configs import cifar10_stf_vp


def get_config():
    config = cifar10_stf_vp.get_config()
    config.precondition.kind = "ve"
    config.noise.distribution = "ve"
    config.network.embedding_type = "fourier"
    config.network.encoder_type = "residual"
    config.network.resample_filter = (1, 3, 3, 1)
    config.sample.grid = "ve"
    config.sample.sigma_min, config.sample.sigma_max = 0.02, 100.0
    config.ema.halflife = "693 steps"  # 0.5^(1 / 693) = 0.999
    return config
