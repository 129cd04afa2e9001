"""Makes edm2_phema.npz with the released code of EDM2 (github.com/NVlabs/edm2), in an environment
with PyTorch.

    python tests/golden/makers/edm2_phema.py FOLDER_OF_EDM2 OUT.npz
"""

import json
import sys

import numpy as np


def main(folder: str, out: str) -> None:
    sys.path.insert(0, folder)
    import torch
    from training import phema
    from training.training_loop import learning_rate_schedule

    config = {
        "batch": 64,
        "steps": 48,
        "stds": [0.05, 0.1, 0.25],
        "ref_lr": 0.01,
        "ref_batches": 20,
        "rampup_Mimg": 0.00064,
    }
    batch, steps = config["batch"], config["steps"]
    stds = np.array([0.01, 0.03, 0.05, 0.1, 0.2, 0.28])
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.standard_normal((steps, 5)), axis=0)
    net = torch.nn.Linear(5, 1, bias=False).double()
    averages = phema.PowerFunctionEMA(net, stds=config["stds"])
    for number in range(steps):
        with torch.no_grad():
            net.weight.copy_(torch.tensor(path[number])[None])
        averages.update(cur_nimg=(number + 1) * batch, batch_size=batch)
    ofs, widths = (a.ravel() for a in np.meshgrid(np.arange(8, 129, 8) * 1.0, [0.05, 0.1]))
    wanted = np.array([0.03, 0.07, 0.1, 0.15, 0.2])
    columns = {
        "stds": stds,
        "exponents": phema.std_to_exp(stds),
        "path": path,
        "averages": np.stack([ema.weight.detach().numpy()[0] for ema in averages.emas]),
        "ofs": ofs,
        "widths": widths,
        "wanted": wanted,
        "products": phema.power_function_correlation(
            ofs[:, None], widths[:, None], np.full((1, 5), 128.0), wanted[None]
        ),
        "coefficients": phema.solve_posthoc_coefficients(ofs, widths, np.full(5, 128.0), wanted),
        "learning_rates": np.array(
            [
                learning_rate_schedule(
                    number * batch,
                    batch,
                    config["ref_lr"],
                    config["ref_batches"],
                    config["rampup_Mimg"],
                )
                for number in range(steps)
            ]
        ),
    }
    np.savez_compressed(out, config=json.dumps(config), **columns)


if __name__ == "__main__":
    main(*sys.argv[1:])
