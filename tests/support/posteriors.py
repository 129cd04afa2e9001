"""Linear measurements of Gaussian images, whose posterior is known: what restorers are held against."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ogdm_jax.sampling.sampler import sample
from tests.support.oracles import column

SIDE = 4
NUMBERS = SIDE * SIDE


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """x0 ~ N(mean, C) of SIDE x SIDE grey images, y = A x0 + std noise.

    Attributes:
      covariance: C, [16, 16].
      operator: A.
      std: of y's noise.
      mean: of every pixel.
    """

    covariance: np.ndarray
    operator: object
    std: float
    mean: float = 0.1

    @classmethod
    def of(cls, operator, std, spread=0.5, correlation=0.0, mean=0.1):
        """Pixels of this spread; neighbours at distance d have correlation ** d."""
        at = np.stack(np.meshgrid(*[np.arange(SIDE)] * 2, indexing="ij"), -1).reshape(NUMBERS, 2)
        far = np.abs(at[:, None] - at[None]).sum(-1)
        return cls(spread**2 * np.power(float(correlation), far), operator, std, mean)

    def denoise(self, x, sigma, label=None):
        """E[x0 | x] in the basis where C is diagonal."""
        values, basis = np.linalg.eigh(self.covariance)
        values, basis = jnp.asarray(values, x.dtype)[None], jnp.asarray(basis, x.dtype)
        flat = (x.reshape(len(x), -1) - self.mean) @ basis
        flat = flat * values / (values + column(sigma, flat) ** 2)
        return self.mean + (flat @ basis.T).reshape(x.shape)

    def matrix(self):
        """A, [m, 16]."""
        units = jnp.eye(NUMBERS).reshape(NUMBERS, SIDE, SIDE, 1)
        return np.asarray(self.operator.forward(units), np.float64).reshape(NUMBERS, -1).T

    def draw(self, n, seed=0):
        """(x0, y) of n images."""
        rng = np.random.default_rng(seed)
        root = np.linalg.cholesky(self.covariance + 1e-12 * np.eye(NUMBERS))
        x0 = self.mean + rng.normal(size=(n, NUMBERS)) @ root.T
        x0 = jnp.asarray(x0.reshape(n, SIDE, SIDE, 1), jnp.float32)
        y = self.operator.forward(x0)
        noise = self.std * jnp.asarray(rng.normal(size=y.shape), jnp.float32)
        return x0, y + (noise if self.operator.hide is None else self.operator.hide(noise))

    def posterior(self, y):
        """(mean [n,...], covariance [16,16]) of x0 given y."""
        a = self.matrix()
        gain = (
            self.covariance
            @ a.T
            @ np.linalg.pinv(a @ self.covariance @ a.T + (self.std**2 + 1e-12) * np.eye(len(a)))
        )
        flat = np.asarray(y, np.float64).reshape(len(y), -1)
        mean = self.mean + (flat - self.mean * a.sum(1)) @ gain.T
        spread = self.covariance - gain @ a @ self.covariance
        return mean.reshape(len(y), SIDE, SIDE, 1), spread

    def restore(self, guidance, y, sigmas, solver="ddim", eta=1.0, seed=1):
        """Images that a sampling method makes of y, one for each."""

        @jax.jit
        def run(z, y):
            settings = {"eta": eta} if solver != "ancestral" else {}
            key = jax.random.key(seed)
            return sample(
                self.denoise, z, sigmas, solver, key=key, guidance=guidance(y), **settings
            )

        latents = jax.random.normal(jax.random.key(seed + 100), (len(y), SIDE, SIDE, 1))
        return np.asarray(run(latents, y))

    def residual(self, x, y):
        """||y - A x|| / (std sqrt(m)) over all images: 1 for the truth."""
        miss = np.asarray(y) - np.asarray(self.operator.forward(jnp.asarray(x)))
        if self.operator.hide is not None:
            miss = np.asarray(self.operator.hide(jnp.asarray(miss)))
        count = float(np.sum(np.asarray(self.operator.count(y))))
        return float(np.sqrt(np.sum(miss**2) / count) / self.std)


def rms(v):
    """Root mean square of everything."""
    return float(np.sqrt(np.mean(np.square(np.asarray(v)))))
