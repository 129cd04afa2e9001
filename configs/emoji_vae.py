"""An autoencoder of small colour pictures for a latent model: 32x32 pixels to 8x8x4 latents.

The pictures are yours, any source of 32x32 pixels:

python train.py --config configs/emoji_vae.py --config.data.source=npz:emoji32.npz

The shipped figures are of a file that is not part of this repository: 5,634 emoji without skin
tones, made of the npm packages emoji-datasource-twitter and emoji-datasource-google 16.0.0 and
@lobehub/fluent-emoji-3d 1.1.0, on white, reduced to 32 pixels. It has `image` uint8 [N,32,32,3],
`skin_tone`, and `base`, the emoji's number, by which all pictures of one emoji are kept on one side
of a split:

--config.data.source='npz:emoji32.npz?skin_tone=0&base<1700'
--config.data.heldout='npz:emoji32.npz?skin_tone=0&base>=1700'
"""

from ogdm_jax.configs import digits_vae


def get_config():
    config = digits_vae.get_config()
    config.data.source = "npz:emoji32.npz"
    config.data.xflip = True
    config.vae.latent_channels = 4
    config.vae.kl = 1e-6
    config.network.model_channels = 32
    config.network.channel_mult = (1, 2, 2)
    config.optim.learning_rate = 1e-3
    config.ema.halflife = "20 kimg"
    config.train.duration = "10000 steps"
    config.train.save_every = "1000 steps"
    config.sample.every = "1000 steps"
    config.evaluate.features = ""
    return config
