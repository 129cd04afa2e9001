"""Makes score_sde_*.npz and fullsize/score-sde-*.json.gz with the authors' own code.

    python tests/golden/makers/score_sde.py SCORE_SDE_PYTORCH OUT

Needs torch (made with 2.13 on a CPU) and a checkout of yang-song/score_sde_pytorch; no test runs it.
Its CUDA extension is not built: the authors' own Python form of upfirdn2d runs instead. Weights are
those of README.md section 2; the one random tensor, Fourier's `W`, is 16 v like EDM's frequencies.
"""

import gzip
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.cpp_extension

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.support.golden_support import hash_values  # noqa: E402

del sys.path[0]  # the authors have a folder of the name configs, too

EPS = {"ve": 1e-5, "vp": 1e-3, "subvp": 1e-3}  # of the authors' samplers


class Settings(dict):
    """What ml_collections.ConfigDict is to the authors' configurations."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def original(folder: str) -> dict[str, Any]:
    """The authors' modules, without the extension and without ml_collections."""
    torch.utils.cpp_extension.load = lambda *args, **kwargs: None
    sys.modules["ml_collections"] = types.SimpleNamespace(ConfigDict=Settings)  # type: ignore
    sys.path.insert(0, folder)
    names = ("models.utils", "models.layers", "models.up_or_down_sampling", "models.ncsnpp")
    return {name: importlib.import_module(name) for name in (*names, "sde_lib")}


def small(module: str) -> Any:
    """A released configuration with 16 pixels, 16 channels, two levels and one block a level."""
    config = importlib.import_module(f"configs.{module}").get_config()
    config.data.image_size, config.device = 16, "cpu"
    config.model.update(nf=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,))
    return config


def rules(network: Any, offset: int, gain: float) -> tuple[list, list, list]:
    """Names, shapes and rules of README.md section 2, and the weights written into the network."""
    state = network.state_dict()
    names, said = sorted(state), []
    for rank, name in enumerate(names):
        value, p = state[name], offset + rank
        if name == "sigmas":
            said.append({"p": p, "kind": "constructed", "scale": None, "shift": 0.0})
            continue
        if name.endswith(".W") and value.ndim == 1:
            kind, scale, shift = "frequencies", 16.0, 0.0
        elif value.ndim >= 2:
            kind, shift = "weight", 0.0
            scale = gain / float(np.sqrt(np.prod(value.shape[1:], dtype=np.int64)))
        elif name.endswith(".weight"):
            kind, scale, shift = "norm", 0.1, 1.0
        else:
            kind, scale, shift = "bias", 0.1, 0.0
        numbers = (shift + scale * hash_values(value.numel(), p)).reshape(value.shape)
        value.copy_(torch.from_numpy(numbers.astype(np.float32)))
        said.append({"p": p, "kind": kind, "scale": scale, "shift": shift})
    return names, [list(state[name].shape) for name in names], said


def exact(modules: dict[str, Any]) -> None:
    """Lets float64 through where the authors' code is written for float32."""
    sampling = modules["models.up_or_down_sampling"]
    single = sampling._setup_kernel
    sampling._setup_kernel = lambda k: single(k).astype(np.float64)

    def embedding(timesteps, embedding_dim, max_positions=10000):
        half = embedding_dim // 2
        rates = torch.exp(-np.log(max_positions) / (half - 1) * torch.arange(half).double())
        angles = timesteps.double()[:, None] * rates[None]
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)

    modules["models.layers"].get_timestep_embedding = embedding


def golden(modules: dict[str, Any], module: str, kind: str, offset: int) -> dict[str, Any]:
    """The arrays of one file."""
    config = small(module)
    network = modules["models.ncsnpp"].NCSNpp(config).eval()
    names, shapes, said = rules(network, offset, gain=1.0)
    sde = {
        "vesde": lambda m: modules["sde_lib"].VESDE(m.sigma_min, m.sigma_max, m.num_scales),
        "vpsde": lambda m: modules["sde_lib"].VPSDE(m.beta_min, m.beta_max, m.num_scales),
        "subvpsde": lambda m: modules["sde_lib"].subVPSDE(m.beta_min, m.beta_max, m.num_scales),
    }[config.training.sde](config.model)
    continuous = config.training.continuous
    t = torch.tensor([EPS[kind], 0.05, 0.3, 1.0])
    if not continuous:  # the times of whole steps
        t = torch.tensor([0, 40, 333, 999]) / 999
    clean = np.clip(0.5 * hash_values(4 * 3 * 16 * 16, offset + 900), -1, 1).reshape(4, 3, 16, 16)
    clean = clean if config.data.get("centered") else (clean + 1) / 2
    noise = hash_values(clean.size, offset + 901).reshape(clean.shape)
    mean, std = sde.marginal_prob(torch.from_numpy(clean.astype(np.float32)), t)
    x = mean + std[:, None, None, None] * torch.from_numpy(noise.astype(np.float32))
    seen = {}

    def run(network: Any, x: Any, t: Any) -> tuple[Any, Any]:
        def told(x: Any, labels: Any) -> Any:
            seen["labels"] = labels
            return network(x, labels)

        told.eval = told.train = lambda: None
        score = modules["models.utils"].get_score_fn(sde, told, continuous=continuous)
        with torch.no_grad():
            value = score(x, t.clone())
            return network(x, seen["labels"]), value

    out, score = run(network, x, t)
    labels, single = seen["labels"], modules["models.layers"].get_timestep_embedding
    kernel = modules["models.up_or_down_sampling"]._setup_kernel
    exact(modules)
    t64 = t.double()
    if not continuous:  # a little above the step's number, which the authors' code cuts off
        t64 = (torch.round(t64 * 999) + 1e-9) / 999
    if hasattr(sde, "sqrt_1m_alphas_cumprod"):
        betas = torch.linspace(sde.beta_0 / sde.N, sde.beta_1 / sde.N, sde.N, dtype=torch.float64)
        sde.sqrt_1m_alphas_cumprod = torch.sqrt(1 - torch.cumprod(1 - betas, dim=0))
    out64, score64 = run(network.double(), x.double(), t64)
    labels64 = seen["labels"]
    modules["models.layers"].get_timestep_embedding = single
    modules["models.up_or_down_sampling"]._setup_kernel = kernel
    pairs = {"out": (out, out64), "score": (score, score64)}
    about = {
        "source": "yang-song/score_sde_pytorch",
        "configuration": module,
        "sde": kind,
        "continuous": continuous,
        "centered": bool(config.data.get("centered")),
        "scale_by_sigma": config.model.scale_by_sigma,
        "model": {k: v for k, v in config.model.items() if not callable(v)},
        "image_size": 16,
        "gain": 1.0,
        "p_offset": offset,
        "f32_vs_f64": {
            name: {
                "max_abs_diff": float((a.double() - b).abs().max()),
                "max_abs": float(b.abs().max()),
                "rms": float(b.square().mean().sqrt()),
            }
            for name, (a, b) in pairs.items()
        },
    }
    return {
        "config": json.dumps(about),
        "param_names": json.dumps(names),
        "param_shapes": json.dumps(shapes),
        "param_rule": json.dumps(said),
        "parameter_order": json.dumps(
            [n for n, p in network.named_parameters() if p.requires_grad]
        ),
        "buffer/sigmas": network.sigmas.float().numpy(),
        "x": x.numpy(),
        "t": t.numpy(),
        "labels": labels.numpy(),
        "labels_f64": labels64.numpy(),
        "out": out.numpy(),
        "out_f64": out64.numpy(),
        "score": score.numpy(),
        "score_f64": score64.numpy(),
    }


def listed(modules: dict[str, Any], module: str) -> dict[str, Any]:
    """Names and shapes of a released configuration at full size."""
    config = importlib.import_module(f"configs.{module}").get_config()
    config.device = "cpu"
    network = modules["models.ncsnpp"].NCSNpp(config)
    buffers = dict(network.named_buffers())
    return {
        "constructor": {
            "cls": "NCSNpp",
            "configuration": module,
            "kwargs": {
                "img_resolution": config.data.image_size,
                "img_channels": config.data.num_channels,
                "model_channels": config.model.nf,
                "channel_mult": config.model.ch_mult,
                "embedding_type": config.model.embedding_type,
                "resample_filter": config.model.fir_kernel if config.model.fir else [1, 1],
            },
        },
        "source": "yang-song/score_sde_pytorch",
        "param_count": sum(p.numel() for p in network.parameters()),
        "entries": [
            [name, list(v.shape), "buffer" if name in buffers else "param"]
            for name, v in network.state_dict().items()
        ],
    }


SMALL = {  # file: (configuration, process, first number of its weights)
    "score_sde_ve_ncsnpp": ("ve.cifar10_ncsnpp_continuous", "ve", 3000),
    "score_sde_vp_ddpmpp": ("vp.cifar10_ddpmpp_continuous", "vp", 4000),
    "score_sde_subvp_ncsnpp": ("subvp.cifar10_ncsnpp_continuous", "subvp", 5000),
    "score_sde_ve_discrete": ("ve.cifar10_ncsnpp", "ve", 6000),
    "score_sde_vp_discrete": ("vp.cifar10_ddpmpp", "vp", 7000),
}
FULL = {
    "score-sde-cifar10-ve-ncsnpp-continuous": "ve.cifar10_ncsnpp_continuous",
    "score-sde-cifar10-ve-ncsnpp-deep-continuous": "ve.cifar10_ncsnpp_deep_continuous",
    "score-sde-cifar10-vp-ddpmpp-continuous": "vp.cifar10_ddpmpp_continuous",
    "score-sde-cifar10-vp-ddpmpp-deep-continuous": "vp.cifar10_ddpmpp_deep_continuous",
    "score-sde-celeba64-ve-ncsnpp": "ve.celeba_ncsnpp",
}


def main() -> None:
    """Writes all files."""
    folder, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    modules = original(folder)
    for name, (module, kind, offset) in SMALL.items():
        arrays = golden(modules, module, kind, offset)
        np.savez_compressed(out / f"{name}.npz", **arrays)
        print(name, json.loads(arrays["config"])["f32_vs_f64"], arrays["labels"])
    for name, module in FULL.items():
        text = json.dumps(listed(modules, module)).encode()
        (out / "fullsize" / f"{name}.json.gz").write_bytes(gzip.compress(text, 9, mtime=0))


if __name__ == "__main__":
    main()
