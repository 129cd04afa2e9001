"""The stable target field (2302.00670) on DiT-XL/2's latents: nothing of it is published for them.

    python train.py --config configs/imagenet256_dit_stf.py --config.data.source=latents:DIR
        --workdir SHARED_DIR

The recipe is DiT's (configs/imagenet256_dit.py). Our choice: 16 references an image from its own
class, which the loader reads beside it, each a fresh sample of its moments; the authors' references
know no classes, and of a thousand classes a batch would hold none of the right one. Where the set
fits in memory (42 GB of float16 moments with mirrors), all of a class, divided over the devices:
--config.stf.source=full --config.data.memory_limit=64.
"""

from ogdm_jax.configs import imagenet256_dit


def get_config():
    config = imagenet256_dit.get_config()
    config.methods = ("stf",)
    config.stf.source = "class"
    config.stf.bank = "read"
    config.stf.n = 16
    return config
