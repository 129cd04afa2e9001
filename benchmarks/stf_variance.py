"""How noisy is the training target? Trace of its covariance given x, against sigma, for DSM and
STF.

    python benchmarks/stf_variance.py [--out runs/stf_variance.png]

V(sigma) = E |T - E[y | x]|^2 per number of an image, T the target: the clean image y (denoising
score matching), or the stable target over n references (2302.00670). E[y | x] is exact: for the
shipped digits the posterior mean over the whole set, which is the distribution images are drawn
from; for a Gaussian mixture in 64 dimensions its closed form. References are independent draws, the
source among them; n = full uses every image of the set once (no variance). Prints the table as
Markdown and draws the curves (extra `plots`).
"""

import argparse
from pathlib import Path

from ogdm_jax import startup

SIGMAS = (0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50)
SIZES = (64, 512, 2048)
COLUMNS = ("DSM", *(f"STF {n}" for n in SIZES), "STF full")
QUERIES = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=64, help="reference batches per noise level, 64 queries each"
    )
    parser.add_argument("--out", default="runs/stf_variance.png")
    args = parser.parse_args()
    startup.prepare()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ogdm_jax import data
    from ogdm_jax.methods.stf import stable_target
    from ogdm_jax.pixels import to_float

    digits = to_float(jnp.asarray(data.open_source("digits").images)).reshape(-1, 64)
    # eight modes of the digits' size, well apart
    centres = jax.random.normal(jax.random.key(7), (8, 64))
    width = 0.1

    def mixture(key, n):
        which, noise = jax.random.split(key)
        picked = centres[jax.random.randint(which, (n,), 0, len(centres))]
        return picked + width * jax.random.normal(noise, (n, 64))

    def mixture_mean(x, sigma):
        variance = width**2 + sigma**2
        away = x[:, None] - centres[None]
        weights = jax.nn.softmax(-0.5 * jnp.sum(away**2, -1) / variance, -1)
        return weights @ centres + width**2 / variance * (x - weights @ centres)

    def posterior(x, sigma):
        return stable_target(x, sigma, digits)[0]

    cases = {
        "digits": (
            lambda key, n: digits[jax.random.randint(key, (n,), 0, len(digits))],
            posterior,
            True,
        ),
        "mixture": (mixture, mixture_mean, False),
    }

    def variances(draw, mean, whole, key, sigma):
        """V of every target, from one reference batch."""
        of_data, of_noise = jax.random.split(key)
        references = draw(of_data, SIZES[-1])
        clean = references[:QUERIES]
        x = clean + sigma * jax.random.normal(of_noise, clean.shape)
        exact = mean(x, sigma)
        targets = {"DSM": clean} | {
            f"STF {n}": stable_target(x, sigma, references[:n])[0] for n in SIZES
        }
        if whole:
            targets["STF full"] = stable_target(x, sigma, digits, chunk=500)[0]
        return {name: jnp.mean((target - exact) ** 2) for name, target in targets.items()}

    found = {}
    for name, (draw, mean, whole) in cases.items():
        one = jax.jit(lambda key, sigma, d=draw, m=mean, w=whole: variances(d, m, w, key, sigma))
        rows = []
        for sigma in SIGMAS:
            keys = jax.random.split(jax.random.key(0), args.rounds)
            rounds = [one(key, jnp.float32(sigma)) for key in keys]
            rows.append({k: float(np.mean([r[k] for r in rounds])) for k in rounds[0]})
        found[name] = rows
        columns = [c for c in COLUMNS if c in rows[0]]
        print(
            f"\n{name}: covariance trace of the target per number; in brackets DSM's divided by "
            "it\n"
        )
        print("| sigma | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
        for sigma, row in zip(SIGMAS, rows, strict=True):
            gain = lambda k, row=row: (
                f" ({row['DSM'] / row[k]:.0f})" if k != "DSM" and row[k] > 1e-9 else ""
            )
            print(f"| {sigma} | " + " | ".join(f"{row[k]:.2e}{gain(k)}" for k in columns) + " |")
    draw_curves(found, Path(args.out))


def draw_curves(found: dict[str, list[dict[str, float]]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(found), figsize=(10, 3.6), sharey=True, layout="constrained"
    )
    for panel, (name, rows) in zip(axes, found.items(), strict=True):
        for column in (c for c in COLUMNS if c in rows[0]):
            values = [max(row[column], 1e-12) for row in rows]
            label = column + (" (0 to rounding)" if column == "STF full" else "")
            panel.loglog(SIGMAS, values, marker="o", markersize=3, label=label)
        panel.set(title=name, xlabel="sigma", ylim=(1e-8, 2))
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("covariance trace of the target / number")
    axes[0].legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
