"""What guidance through an autoencoder's decoder needs in memory, by the compiled program.

    python benchmarks/decoder_memory.py [--side 512] [--kinds none,decoder,both]
        [--dtypes float32,bfloat16]

One step's gradient as DPS, DSG and FreeDoM take it on Stable Diffusion 2.1: the U-Net with
classifier-free guidance (two rows), x0_hat, the decoder, a squared distance to a picture, and back
to the latent. Nothing runs and no weights are made: the program with an accelerator's rules is
compiled for this machine's CPU and its memory is what XLA says (arguments, which are the weights,
and temporaries; another backend schedules otherwise). Kinds: none, decoder, both: what of U-Net and
decoder is recomputed in the backward pass (remat). Prints one JSON line each.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp

from ogdm_jax import models, platforms
from ogdm_jax.config import Precondition
from ogdm_jax.networks import AutoencoderKL, UNet2DCondition

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compiled(side: int, kind: str, dtype: str):
    """The compiled gradient."""
    latent, struct = side // 8, jax.ShapeDtypeStruct
    unet = UNet2DCondition(
        img_resolution=latent,
        heads=(5, 10, 20, 20),
        context_dim=1024,
        linear_projection=True,
        dtype=DTYPES[dtype],
        remat=kind == "both",
    )
    vae = AutoencoderKL(dtype=DTYPES[dtype], remat=kind != "none")
    x = struct((1, latent, latent, 4), jnp.float32)
    context, picture = struct((2, 77, 1024), jnp.float32), struct((1, side, side, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    twice = lambda s: struct((2, *s.shape[1:]), s.dtype)
    weights = (
        jax.eval_shape(unet.init, key, twice(x), struct((2,), jnp.float32), context),
        jax.eval_shape(vae.init, key, picture),
    )
    wrap = models.wrap(Precondition("adm", schedule="scaled_linear"))

    def gradient(weights, x, sigma, context, picture):
        denoise = wrap(lambda *inputs: unet.apply(weights[0], *inputs))

        def distance(x):
            both = denoise(jnp.concatenate([x, x]), jnp.broadcast_to(sigma, (2,)), context)
            x0_hat = both[:1] + 7.5 * (both[1:] - both[:1])
            image = vae.apply(weights[1], vae.from_scaled(x0_hat), method="decode")
            return jnp.sum(jnp.square(image - picture)), x0_hat

        return jax.grad(distance, has_aux=True)(x)

    given = weights, x, struct((), jnp.float32), context, picture
    return jax.jit(platforms.traced_for("gpu", gradient)).lower(*given).compile()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--kinds", default="none,decoder,both")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    args = parser.parse_args()
    for dtype in args.dtypes.split(","):
        for kind in args.kinds.split(","):
            began = time.perf_counter()
            memory = compiled(args.side, kind, dtype).memory_analysis()
            sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            arguments, temporaries = (round(size / 2**30, 2) for size in sizes)
            about = {"side": args.side, "dtype": dtype, "remat": kind}
            about |= {"arguments_gib": arguments, "temporaries_gib": temporaries}
            about |= {"compile_s": round(time.perf_counter() - began, 1), "jax": jax.__version__}
            print(json.dumps(about), flush=True)


if __name__ == "__main__":
    main()
