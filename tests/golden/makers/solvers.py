"""Makes sampler_unipc.npz and sampler_pc.npz with the authors' own code, in float64.

    python tests/golden/makers/solvers.py UNIPC SCORE_SDE_PYTORCH OUT

Needs torch (made with 2.13 on a CPU), scipy, and checkouts of wl-zhao/UniPC and
yang-song/score_sde_pytorch; no test runs it. Both sample the mixture of `oracles.two_bumps`, whose
denoiser is exact; everything is stored in the coordinate x = x_vp / alpha, images as [B,H,W,C].
"""

import importlib
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.support.golden_support import hash_values  # noqa: E402

del sys.path[0]
torch.set_default_dtype(torch.float64)
MU = torch.tensor(np.stack([0.5 * hash_values(4, 300 + k).reshape(1, 2, 2) for k in range(3)]))
WEIGHTS, SCALES = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.3, 0.5, 0.2])


def denoise(x, sigma):
    """E[x0 | x] of the mixture; x [B,1,2,2], sigma a number."""
    v = SCALES**2 + sigma**2
    away = x[:, None] - MU
    log = WEIGHTS.log() - 0.5 * (away**2).sum((2, 3, 4)) / v - 2 * v.log()
    means = MU + (SCALES**2 / v)[:, None, None, None] * away
    return (log.softmax(1)[..., None, None, None] * means).sum(1)


def last(x):
    return np.moveaxis(np.asarray(x), 1, -1)


def unipc(folder: str) -> dict:
    sys.path.insert(0, f"{folder}/example/score_sde_pytorch")
    module = importlib.import_module("uni_pc")
    betas = torch.linspace(1e-4, 0.02, 1000)
    schedule = module.NoiseScheduleVP("discrete", betas=betas, dtype=torch.float64)
    z = torch.tensor(hash_values(3 * 4, 71).reshape(3, 1, 2, 2))

    def eps(x, t):
        a = schedule.marginal_alpha(t[:1])
        sigma = schedule.marginal_std(t[:1]) / a
        return (x / a - denoise(x / a, sigma)) / sigma

    found = {"latents": last(z)}
    for spacing in ("time_uniform", "logSNR"):
        for steps in (3, 6, 10):
            sampler = module.UniPC(eps, schedule)
            t = sampler.get_time_steps(spacing, 1.0, 1e-3, steps, "cpu")
            a = schedule.marginal_alpha(t)
            sigmas = schedule.marginal_std(t) / a
            found[f"{spacing}_{steps}_sigmas"] = sigmas.numpy()
            for order in (1, 2, 3):
                for variant in ("bh1", "bh2"):
                    sampler = module.UniPC(eps, schedule, variant=variant)
                    words = {"steps": steps, "order": order, "skip_type": spacing, "t_end": 1e-3}
                    x = sampler.sample(z * sigmas[0] * a[0], **words) / a[-1]
                    found[f"{spacing}_{steps}_{order}_{variant}"] = last(x)
    return found


def pc(folder: str) -> dict:
    sys.path.insert(0, folder)
    utils = types.ModuleType("models.utils")
    utils.from_flattened_numpy = utils.to_flattened_numpy = utils.get_score_fn = None
    models = types.ModuleType("models")
    models.utils = utils
    sys.modules |= {"models": models, "models.utils": utils}
    sde_lib, sampling = (importlib.import_module(name) for name in ("sde_lib", "sampling"))
    drawn = []

    def draw(*shape):
        drawn.append(torch.tensor(hash_values(4, 900 + len(drawn)).reshape(1, 1, 2, 2)))
        return drawn[-1]

    torch.randn, torch.randn_like = draw, draw
    found = {}
    for name, sde, eps in (
        ("ve", sde_lib.VESDE(0.02, 10.0, 12), 1e-5),
        ("vp", sde_lib.VPSDE(0.1, 20.0, 40), 1e-3),
    ):
        a = torch.ones(sde.N) if name == "ve" else sde.sqrt_alphas_cumprod
        sigmas = sde.discrete_sigmas if name == "ve" else sde.sqrt_1m_alphas_cumprod / a

        def score(x, t, sde=sde, a=a, sigmas=sigmas):
            i = (t[0] * (sde.N - 1)).long()
            return (denoise(x / a[i], sigmas[i]) - x / a[i]) / sigmas[i] ** 2 / a[i]

        utils.get_score_fn = lambda *args, score=score, **words: score
        for count in (1, 2):
            drawn.clear()
            predictor, corrector = (
                sampling.get_predictor("reverse_diffusion"),
                sampling.get_corrector("langevin"),
            )
            words = {"snr": 0.16, "n_steps": count, "eps": eps, "device": "cpu"}
            run = sampling.get_pc_sampler(
                sde, (1, 1, 2, 2), predictor, corrector, lambda x: x, **words
            )
            x, evaluations = run(None)
            noise = torch.stack(drawn[1:]).reshape(sde.N, count + 1, 1, 1, 2, 2)
            # The predictors' noise, then the correctors': the numbers that `langevin.pc` gives them.
            ordered = torch.cat([noise[:, -1], noise[:, :-1].flatten(0, 1)])
            start = drawn[0] * (sde.sigma_max if name == "ve" else 1 / a[-1])
            found |= {
                f"{name}_{count}_x": last(x),
                f"{name}_{count}_noise": np.moveaxis(ordered.numpy(), 2, -1),
                f"{name}_{count}_start": last(start),
                f"{name}_{count}_nfe": np.int64(evaluations),
            }
        found[f"{name}_sigmas"] = np.append(sigmas.numpy()[::-1], 0.0)
    return found


def main(unipc_folder: str, score_sde_folder: str, out: str) -> None:
    about = {
        "sampler_unipc": ({"betas": "linear, 1000", "oracle": "two_bumps"}, unipc(unipc_folder)),
        "sampler_pc": ({"snr": 0.16, "oracle": "two_bumps"}, pc(score_sde_folder)),
    }
    for name, (config, found) in about.items():
        np.savez_compressed(Path(out) / f"{name}.npz", config=json.dumps(config), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
