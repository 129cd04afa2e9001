"""DG's discriminator on DiT-XL/2's latents (2211.17091): FID 2.27 -> 1.83 on ImageNet 256.

    python train.py --config configs/imagenet256_dit_dg.py --config.dg.prior=DIT
        --config.dg.extractor=32x32_classifier.pt --workdir SHARED_DIR

DIT is a run of configs/imagenet256_dit.py (published: DiT-XL-2-256x256.pt). Published [authors'
code]: the frozen classifier of latents and a conditional head of 3.2 M, half of a batch of 1,024
real, Adam of 3e-4 with L2 of 1e-7, 7 epochs, classifier-free guidance of 1.5 in the generated
images, then `--guidance cfg,dg` with the rule "mean", weight 1, from t = 100 of 1,000 up. Our
choice: 250,000 generated latents (the authors' number is not known to us), taken as the sampler
leaves them (theirs were decoded, saved as JPEG and encoded again), guided on all 4 channels (theirs
on 3), a falling rate and an average of the weights.
"""

from ogdm_jax.configs import cifar10_dg


def get_config():
    config = cifar10_dg.get_config()
    config.data.batch = 1024  # half real, half generated
    config.data.conditional = True
    config.dg.num = 250_000
    config.dg.cfg = 1.5
    config.dg.classes = 1000
    config.dg.weight = 1.0
    config.dg.time_min = 0.1
    config.sample.solver = "ancestral"
    config.sample.steps = 250
    config.sample.grid = "respaced"
    config.train.duration = "17500 steps"  # 7 passes over the real images, 512 a step
    config.train.save_every = "2500 steps"
    config.evaluate.every = "2500 steps"
    return config
