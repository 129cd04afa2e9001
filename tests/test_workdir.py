"""A trained model as people use it: its text, its denoiser, its samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ogdm_jax import models, places
from ogdm_jax.cli import animation
from ogdm_jax.config import ConfigError
from ogdm_jax.methods import mpgd
from ogdm_jax.pixels import to_uint8
from ogdm_jax.sampling import generate
from ogdm_jax.training.workdir import Path, TrainedModel
from tests.support import networks, tiny

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    config = tiny.config("methods=", *tiny.SMALLEST, "sample.solver=euler", "sample.steps=2")
    model = models.build(config, (8, 8, 1), 10)
    params, buffers = networks.born(jax.eval_shape(model.init, jax.random.key(0)))
    return TrainedModel(config, model, params, buffers, 1200)


def test_it_is_told_in_one_short_line(trained):
    count = f"{models.parameter_count(trained.params):,}"
    assert repr(trained) == f"TrainedModel(digits, 8x8x1, {count} parameters, step 1,200)"


def test_samples_depend_on_their_seed_alone(trained):
    images = trained.sample(5, batch=1)
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.float32
    again = trained.sample(seeds=[4, 2], batch=1, devices=jax.local_devices()[:1])
    np.testing.assert_allclose(again, images[[4, 2]], atol=1e-5)
    assert np.abs(trained.sample(2, steps=3, batch=1) - images[:2]).max() > 1e-4


def test_the_denoiser_holds_the_weights(trained):
    x = np.zeros((2, 8, 8, 1), np.float32)
    assert trained.denoiser(x, np.ones(2, np.float32)).shape == x.shape


@pytest.mark.parametrize(
    "words,message",
    [
        ({"n": 0}, "n: 0 given; expected at least 1 image"),
        ({"batch": 0}, "batch: 0 given; expected at least 1 image"),
        ({"seeds": []}, r"seeds: \[\] given; expected whole numbers from 0"),
        ({"seeds": 3}, "seeds: 3 given; expected whole numbers from 0"),
        ({"seeds": [0, -1]}, "seeds: .* given; expected whole numbers from 0"),
        ({"seeds": [2**32]}, "seeds: .* given; expected whole numbers from 0"),
        ({"seeds": [1.5]}, "seeds: .* given; expected whole numbers from 0"),
        ({"label": 3}, "--label: 3 given, but the model is unconditional"),
        ({"solver": "magic"}, "sample.solver: unknown 'magic'; expected one of euler, heun"),
        ({"stepz": 3}, "no setting 'stepz'; expected some of solver, steps"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(trained, words, message):
    with pytest.raises(ConfigError, match=message):
        trained.sample(**words)


def test_guidance_that_is_given_again_compiles_nothing(trained):
    traced = []

    def loss(x0_hat):
        traced.append(None)
        return jnp.sum(jnp.square(x0_hat), (1, 2, 3))

    words = {"devices": jax.local_devices()[:1], "solver": "ancestral"}
    guided = mpgd.guidance(loss, 0.1)
    first = trained.sample(1, guidance=guided, **words)
    count = len(traced)
    other = dataclasses.replace(guided)  # the same rules
    np.testing.assert_array_equal(trained.sample(1, guidance=[other], **words), first)
    assert len(traced) == count > 0
    again = trained.sample(1, guidance=mpgd.guidance(loss, 0.2), **words)  # others
    assert len(traced) > count and np.abs(again - first).max() > 1e-4


@pytest.mark.parametrize("label", [[4, -1], np.array([4, -1]), (4, -1)])
def test_each_image_may_have_its_class(label):
    seeds = np.arange(2)
    np.testing.assert_array_equal(generate.labels_for(seeds, 10, label), [4, -1])
    np.testing.assert_array_equal(generate.labels_for(seeds, 10, np.int64(4)), [4, 4])
    for wrong in ([4, 10], [4, -2], [4], [[4, 4]], 4.5):
        with pytest.raises(ConfigError, match="--label: .* given; expected 0 to 9, or -1"):
            generate.labels_for(seeds, 10, wrong)


def test_a_path_ends_at_the_images_of_its_seeds(trained):
    path = trained.path([3, 1])
    assert path.states.shape == (3, 2, 8, 8, 1) and path.x0_hats.shape == (2, 2, 8, 8, 1)
    np.testing.assert_allclose(path.images, trained.sample(seeds=[3, 1], batch=2), atol=1e-5)
    # Euler's last step, to sigma 0, is the denoiser itself.
    np.testing.assert_allclose(path.images, path.x0_hats[-1], atol=1e-5)
    np.testing.assert_allclose(path.images, path.states[-1], atol=1e-5)
    noise = np.float32(path.states[0] * np.sqrt(80**2 / 0.75**2 + 1))
    first = trained.denoiser(noise, np.float32([80, 80]))
    np.testing.assert_allclose(path.x0_hats[0], first, atol=1e-4)


@pytest.mark.parametrize("ending", ["webp", "gif"])
@pytest.mark.default
def test_an_animation_has_a_frame_for_every_level(trained, tmp_path, ending):
    file = tmp_path / f"a.{ending}"
    path = trained.path(np.arange(5))
    assert animation.write(places.place(file), path) == 3
    with Image.open(file) as film:
        assert film.n_frames == 3 and film.size == (8 * 65 - 1 + 14, 18 + 2 * 65 - 1)
        film.seek(2)
        assert film.info.get("duration", 1500) == 1500  # a WebP says when its frames begin
        pixels = np.asarray(film.convert("L"))[18 : 18 + 64 : 8, :64:8].astype(int)
    wanted = to_uint8(np.clip(path.images[0, ..., 0], -1, 1)).astype(int)
    assert np.abs(pixels - wanted).max() <= (0 if ending == "webp" else 4)


def test_decoded_pictures_are_shown_without_latents(tmp_path):
    few = np.zeros((2, 1, 4, 4, 4), np.float32)
    pictures = np.zeros((1, 1, 8, 8, 3), np.float32)
    path = Path(np.array([9.0, 0.0]), few, pictures, pictures[0])
    assert animation.write(places.place(tmp_path / "a.webp"), path) == 2
    with Image.open(tmp_path / "a.webp") as film:
        assert film.size == (64, 18 + 64)
