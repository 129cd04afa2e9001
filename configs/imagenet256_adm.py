"""ADM on ImageNet at 256x256, class-conditional, with a learned variance (2105.05233), for a pod.

    python train.py --config configs/imagenet256_adm.py --config.data.source=folder:DIR
        --workdir SHARED_DIR

DIR holds a folder for each class. Aim: FID 4.59 with 250 ancestral steps and --guidance classifier
--preset adm256 (256x256_classifier.pt), 3.18 where DG's discriminator is added [both of READMEs;
not reproduced here]. The network is that of 256x256_diffusion.pt (553.8 M; `ogdm convert` reads it;
256x256_diffusion_uncond.pt, DSG's imagenet256.pt: --config.data.conditional=false). Batch and
length are remembered from the paper's appendix [not verified].
"""

from ogdm_jax.configs import lsun256_adm


def get_config():
    config = lsun256_adm.get_config()
    config.data.source = "folder:data/imagenet256"
    config.data.conditional = True
    config.network.dropout = 0.0
    config.train.duration = "1980000 steps"
    config.sample.steps = 250
    return config
