"""Sampling grids against the printed grids of the EDM paper's code and the respacing rules of
guided-diffusion.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax.diffusion import grids, precondition, process
from ogdm_jax.diffusion.denoiser import Denoiser
from ogdm_jax.sampling.sampler import sample

pytestmark = pytest.mark.fast

EDM18 = """80 57.58598 40.78557 28.37458 19.35245 12.91008 8.400935 5.315195 3.256822 1.923340 1.088171 .5853481
.2964423 .1395165 .05994731 .02293452 .00752802 .002 0"""
EIGHT = {
    "vp": "152.16697 40.401971 13.106689 5.1394199 2.3501170 1.1523328 .49590634 .010485993 0",
    "ve": "100 29.619363 8.7730666 2.5985265 .76966698 .22797046 .067523397 .02 0",
    "iddpm": "80.203702 4.1995382 2.0517294 1.2498002 .80242565 .48907988 .23940617 .0064254128 0",
    "edm": "80 34.992189 13.698575 4.6370750 1.2866143 .26747536 .035186651 .002 0",
}


def numbers(text: str) -> np.ndarray:
    return np.array([float(word) for word in text.split()])


def test_edm_grid_golden():
    np.testing.assert_allclose(grids.edm(18), numbers(EDM18), rtol=1e-6)


@pytest.mark.parametrize("name", EIGHT)
def test_eight_point_goldens(name):
    np.testing.assert_allclose(getattr(grids, name)(8), numbers(EIGHT[name]), rtol=5e-8)


@pytest.mark.parametrize("name", ["edm", "vp", "ve", "iddpm", "ddim"])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 100])
def test_grids_fall_to_zero(name, n):
    grid = getattr(grids, name)(n)
    assert isinstance(grid, np.ndarray) and grid.dtype == np.float64 and grid.shape == (n + 1,)
    assert (np.diff(grid) < 0).all() and grid[-1] == 0 and np.isfinite(grid).all()


def test_ddim_grid_is_the_respaced_process():
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(
        grids.ddim(10)[:-1], np.sqrt(1 / bar[np.arange(900, -1, -100)] - 1), rtol=1e-12
    )
    np.testing.assert_allclose(
        grids.ddim(25), grids.ddim(25, betas=process.betas("linear")), rtol=0
    )
    for n in (10, 20, 25, 50):  # strides that divide T: the same as guided-diffusion's "ddimN"
        np.testing.assert_array_equal(
            grids.ddim_timesteps(n), process.space_timesteps(1000, f"ddim{n}")
        )
    assert grids.ddim_timesteps(20, spacing="even")[[0, 1, 2, -1]].tolist() == [0, 53, 105, 999]
    cosine = np.cumprod(1 - process.betas("cosine"))
    np.testing.assert_allclose(
        grids.ddim(5, betas="cosine")[-2], np.sqrt(1 / cosine[0] - 1), rtol=1e-12
    )


@pytest.mark.parametrize("name", ["edm", "vp", "ve", "iddpm", "ddim"])
@pytest.mark.parametrize("n", [0, -3, 2.5])
def test_bad_number_of_steps(name, n):
    with pytest.raises(ValueError, match=rf"n={n}; expected an integer"):
        getattr(grids, name)(n)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: grids.edm(5, sigma_min=0.0), "sigma_min=0.0"),
        (lambda: grids.edm(5, sigma_min=1.0, sigma_max=0.5), "0 < sigma_min < sigma_max"),
        (lambda: grids.edm(5, rho=0), "rho=0"),
        (lambda: grids.ve(5, sigma_max=np.inf), "sigma_max=inf"),
        (lambda: grids.iddpm(2000), "at most 992"),
        (lambda: grids.ddim(1001), "at most 1000"),
        (lambda: grids.ddim(5, spacing="log"), "uniform, quad, even, trailing"),
        (lambda: grids.ddim(900, spacing="quad"), "twice"),
        (lambda: grids.ddim(5, betas="quadratic"), "'linear', 'cosine'"),
        (lambda: grids.ddim(5, betas=[0.1, 2.0]), r"in \(0, 1\]"),
    ],
)
def test_bad_settings_name_the_field(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_clip_range_follows_the_denoiser():
    def denoise(x, sigma, label=None):
        return x

    assert grids.clip_range(denoise, 0.002, 80.0) == (0.002, 80.0)
    assert grids.clip_range(Denoiser(denoise, 0.02, 50), 0.002, 80.0) == (0.02, 50.0)


def test_one_step_of_a_discrete_process_starts_at_its_top():
    """The published rules keep index 0 alone there, a grid [.01, 0] that denoises nothing."""
    for spacing in grids.SPACINGS:
        assert grids.ddim_timesteps(1, 1000, spacing).tolist() == [999]
    top = process.Discrete.make().sigma[-1]
    for grid in (grids.respaced("1"), grids.respaced([1]), grids.ddim(1)):
        np.testing.assert_allclose(grid, [top, 0.0])
    np.testing.assert_allclose(
        grids.ddim(1, "cosine", steps=50)[0], grids.respaced("", "cosine", 50)[0]
    )


def test_trailing_spacing_counts_from_the_top():
    """arXiv 2305.08891 table 2."""
    at = lambda n, steps=1000: grids.ddim_timesteps(n, steps, "trailing").tolist()
    assert at(5) == [199, 399, 599, 799, 999] and at(1000) == list(range(1000))
    assert at(2) == [499, 999] and at(3, 10) == [2, 6, 9]
    for n in range(1, 41):
        kept = grids.ddim_timesteps(n, 40, "trailing")
        assert kept[-1] == 39 and (np.diff(kept) > 0).all() and kept[0] >= 0 and len(kept) == n
    with pytest.raises(ValueError, match="spacing=.other.; expected uniform, quad, even, trail"):
        grids.ddim_timesteps(5, spacing="other")


def test_a_grid_with_step_0_ends_there_where_asked():
    """set_alpha_to_one false with linspace: the published last step goes from step 0 to step 0, a
    step of no length, whatever the solver.
    """
    table = process.Discrete.make("scaled_linear")
    whole = grids.ddim(10, table, "linspace")
    ends = grids.ddim(10, table, "linspace", end="first")
    np.testing.assert_array_equal(ends, whole[:-1])
    assert ends[-1] == table.sigma[0]
    small = process.Discrete.make("scaled_linear", 20)  # where t - T // N is the grid's next step
    eps = lambda z, t: np.tanh(z * (1 + t / 40))
    z = start = np.linspace(-2, 2, 4, dtype=np.float32).reshape(1, 2, 2, 1)
    bar = small.alpha_bar
    for t in range(19, -1, -1):  # DDIM as diffusers writes it, in the coordinate of unit variance
        low, out = bar[max(t - 1, 0)], eps(z, t)
        clean = (z - np.sqrt(1 - bar[t]) * out) / np.sqrt(bar[t])
        z = np.sqrt(low) * clean + np.sqrt(1 - low) * out
    levels = grids.ddim(20, small, "linspace", end="first")
    network = lambda x, t, label=None: jnp.tanh(x * (1 + t[:, None, None, None] / 40))
    denoise = precondition.adm(network, small)
    x = sample(denoise, jnp.asarray(start) * float(np.sqrt(1 + levels[0] ** -2)), levels, "ddim")
    np.testing.assert_allclose(x / np.sqrt(1 + levels[-1] ** 2), z, atol=2e-5)
