"""Every setting with its default: EDM's recipe for CIFAR-10 (2206.00364, config F) on one set of
names.

Other files of this folder are short overlays. On the command line: --config.GROUP.KEY=VALUE.
Durations are "N steps", "N images", "N kimg" or "N Mimg"; images are counted over all devices.
"""

from ml_collections import ConfigDict

from ogdm_jax.methods import contract as slots


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.methods = ()  # training methods that are on, such as ("ogdm", "stf")

    config.data = ConfigDict()
    config.data.source = (
        "tfds:cifar10/train"  # digits, mnist5k, tfds:NAME/SPLIT, folder:DIR, zip:FILE, npz:FILE
    )
    config.data.data_dir = ""  # where prepared tfds sets lie; "" = tfds's own default
    config.data.batch = 512  # images per optimiser step over all devices
    config.data.conditional = False  # the network sees class labels
    config.data.label_dropout = (
        0.0  # share of labels hidden in training (for classifier-free guidance)
    )
    config.data.xflip = (
        False  # unlabelled horizontal flips; they become part of the data distribution
    )
    config.data.augment = 0.12  # probability of EDM's labelled augmentation pipe; 0 = off
    config.data.resolution = 0  # crop images to squares and resize them to this side; 0 = as stored
    config.data.channels = 0  # 1 or 3; 0 = as stored
    config.data.memory_limit = 2.0  # GiB; smaller sets are kept in memory as one array
    config.data.workers = (
        -1
    )  # processes that read larger sets; -1 = half the cores (1 to 8), 0 = threads instead

    config.network = ConfigDict()
    config.network.kind = (
        "song"  # song (DDPM++, NCSN++), dhariwal (EDM's ADM) or openai (ADM as OpenAI has it)
    )
    config.network.model_channels = 128
    config.network.channel_mult = (2, 2, 2)
    config.network.num_blocks = 4
    config.network.attn_resolutions = (16,)
    config.network.dropout = 0.13
    config.network.embedding_type = "positional"  # or fourier (NCSN++)
    config.network.encoder_type = "standard"  # or residual (NCSN++)
    config.network.resample_filter = (1, 1)  # or (1, 3, 3, 1) (NCSN++)
    config.network.num_heads = 1  # openai: attention heads
    config.network.head_channels = (
        0  # openai: width of a head, in place of their number where above 0
    )
    config.network.scale_shift = (
        True  # openai: the embedding scales and shifts (use_scale_shift_norm)
    )
    config.network.resblock_updown = False  # openai: residual blocks resample
    config.network.dtype = "float32"  # compute type; parameters stay float32
    config.network.remat = False  # recompute activations in the backward pass

    config.precondition = ConfigDict()
    config.precondition.kind = "edm"  # edm, vp, ve, iddpm, adm (eps of a discrete process)
    config.precondition.sigma_data = 0.5  # ogdm data describe SOURCE measures it
    config.precondition.schedule = "linear"  # adm, noise.law ddpm: betas, linear or cosine
    config.precondition.diffusion_steps = 1000  # and their number
    config.precondition.learned_variance = (
        False  # adm: the network has channels for it, trained by the bound of L_hybrid
    )
    config.precondition.rescale_timesteps = (
        False  # adm: the network is told t * 1000 / diffusion_steps
    )

    config.noise = ConfigDict()
    config.noise.law = "edm"  # edm (log-normal), vp, ve, ddpm (uniform over the discrete process)
    config.noise.mean = -1.2  # of ln sigma (edm)
    config.noise.std = 1.2
    # clip sigma to [sample.sigma_min, sample.sigma_max] (OGDM's code; 2 draws in 100,000)
    config.noise.clip = False
    config.noise.stratified = False  # spread the quantiles of a batch evenly

    config.optim = ConfigDict()
    config.optim.learning_rate = 1e-3
    config.optim.ramp = "10 Mimg"  # linear warm-up from 0
    config.optim.decay = "0 steps"  # linear decay to 0 over this length; 0 = constant
    config.optim.betas = (0.9, 0.999)
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0
    config.optim.accumulate = 1  # rounds per optimiser step; equals one big batch

    config.ema = ConfigDict()
    config.ema.halflife = "500 kimg"
    # half-life <= this share of the images seen; 0 = no ramp-up, as where init.workdir is set
    config.ema.rampup = 0.05

    config.init = ConfigDict()
    config.init.workdir = ""  # fine-tune: start from the last checkpoint of this training folder
    config.init.weights = "ema"  # ema or params of that checkpoint

    config.train = ConfigDict()
    config.train.duration = "200 Mimg"
    config.train.save_every = "2500 kimg"
    config.train.keep = 3  # newest checkpoints that stay
    config.train.keep_every = "0 steps"  # also keep one checkpoint per this length; 0 = none

    config.parallel = ConfigDict()
    config.parallel.plan = (
        "mesh"  # mesh (data-parallel), sharded (parameters, EMA, Adam state divided too) or pmap
    )
    config.parallel.devices = 0  # 0 = all

    config.log = ConfigDict()
    config.log.every = "50 kimg"
    config.log.tensorboard = True

    config.sample = ConfigDict()
    config.sample.every = "5 Mimg"  # sample grid during training
    config.sample.num = 64
    config.sample.solver = "heun"
    config.sample.steps = 18
    config.sample.grid = (
        "edm"  # or vp, ve, iddpm; of discrete models also respaced (guided-diffusion's), ddim, quad
    )
    config.sample.sigma_min = 0.002
    config.sample.sigma_max = 80.0
    config.sample.rho = 7.0
    config.sample.eta = 0.0  # ddim and heun: 0 = deterministic, 1 = as random as DDPM

    config.evaluate = ConfigDict()
    config.evaluate.features = (
        ""  # feature space of the distance: a labelled source, lite0, inception; "" = none
    )
    config.evaluate.weights = ""  # inception: the weights file
    config.evaluate.num = 0  # samples for it; 0 = as many as the data set has
    config.evaluate.every = "0 steps"  # evaluate during training, too; 0 = only at the end
    config.evaluate.keep_best = (
        1  # checkpoints with the smallest distances that stay, whatever train.keep says
    )

    for name, settings in slots.defaults().items():
        config[name] = ConfigDict(settings)
    return config
