"""Options of guidance that would do nothing are one sentence, and not accepted and ignored."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogdm_jax import models
from ogdm_jax.cli import guidance
from ogdm_jax.cli import sample as command
from ogdm_jax.config import Sample
from ogdm_jax.inverse import operators
from ogdm_jax.inverse.measured import Measured, measure
from ogdm_jax.inverse.tasks import Settings, Task
from ogdm_jax.latents import Latents
from ogdm_jax.methods import cfg, ddnm, diffpir, dps, dsg, freedom, mpgd, pigdm
from ogdm_jax.methods.session import Session
from ogdm_jax.sampling import churn as churning
from ogdm_jax.sampling import gradients
from ogdm_jax.training.workdir import TrainedModel
from tests.support import tiny
from tests.support.guidance_cases import info_at, norms

pytestmark = pytest.mark.fast

DSG = ("--guidance", "dsg", "--task", "inpaint", "--input", "digits")
DG = ("--guidance", "dg", "--dg.discriminator", "x")


@pytest.fixture(scope="module")
def trained():
    config = tiny.config(*tiny.SMALLEST)
    return TrainedModel(config, models.build(config, (8, 8, 1), 0), {}, {}, 0)


def check(trained, words, **settings):
    args = command.parser().parse_args(["--workdir", "w", *words])
    settings = Sample(**{"solver": "ddim", "eta": 1.0, "steps": 10} | settings)
    churn = churning.parse(args.churn)
    guidance.check_effect(guidance.read(args), trained, settings, churn)


@pytest.mark.parametrize(
    "words,settings,sentence",
    [
        ((*DSG, "--dsg.window", "90,100"), {}, "--dsg.window: 90 to 100 given, where no step"),
        ((*DSG, "--dsg.window", "0.003,0.01"), {"steps": 4}, "between 0.002 and 80, or more --st"),
        (
            (*DSG, "--dsg.window", "30,80", "--dsg.interval", "7"),
            {},
            "--dsg.window: 30 to 80 given, where none of every 7 steps",
        ),
        (
            (*DSG, "--dsg.repeats", "2", "--dsg.repeat_window", "90,99"),
            {},
            "--dsg.repeat_window: 90 to 99 given",
        ),
        (("--guidance", "cfg", "--cfg.window", "100,200"), {}, "--cfg.window: 100 to 200 given"),
        (
            ("--churn", "4,100,200,1"),
            {"solver": "heun", "eta": 0.0},
            "--churn: 100 to 200 given, where no step",
        ),
        ((*DSG, "--dsg.rate", "0.5", "--dsg.strength", "1"), {}, "--dsg.strength, which replaces"),
        (DSG, {"steps": 1}, "--guidance: dsg given for 1 steps, where it would guide at most the"),
        ((*DSG, "--dsg.window", "0,0.003"), {}, "higher levels in --dsg.window"),
        ((*DSG, "--dsg.interval", "10"), {}, "--guidance: dsg given for 10 steps"),
        (
            (*DG, "--dg.corrector_weight", "0"),
            {"solver": "euler", "eta": 0.0},
            "--dg.corrector_weight: given with the solver 'euler', which evaluates once",
        ),
    ],
)
def test_guidance_that_no_step_would_see(trained, words, settings, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        check(trained, words, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words,settings",
    [
        ((*DSG, "--dsg.window", "0.5,20"), {}),
        ((*DSG, "--dsg.window", "0.001,100", "--dsg.interval", "7"), {}),
        (
            (*DSG, "--preset", "inpaint_20", "--dsg.strength", "1"),
            {},
        ),  # a preset's rate is not said
        ((*DG, "--dg.corrector_weight", "1"), {"solver": "heun", "eta": 0.0}),
        ((*DG, "--preset", "second"), {"solver": "euler", "eta": 0.0}),
        ((*DSG, "--churn", "4,0,50,1", "--dsg.window", "0,0.003"), {"solver": "heun", "eta": 0.0}),
        (("--churn", "4,0.05,50,1"), {"solver": "heun", "eta": 0.0}),
        (("--churn", "0,100,200,1"), {"solver": "heun", "eta": 0.0}),  # no churn is asked for
    ],
)
def test_what_has_an_effect_is_accepted(trained, words, settings):
    check(trained, words, **settings)


@pytest.mark.parametrize(
    "words",
    [
        ("--guidance", "pigdm", "--task", "inpaint", "--input", "digits"),
        ("--guidance", "classifier", "--classifier.checkpoint", "x"),
        ("--guidance", "freedom", "--task", "inpaint", "--input", "digits"),
    ],
)
def test_guidance_without_a_bound_from_pure_noise(words):
    """With 0.1 % of error in the velocity, Pi-GDM's first x0_hat was 8,000 here; FreeDoM's first
    step has the size of x.
    """
    config = tiny.config(*tiny.SMALLEST, "precondition.kind=flow", "noise.distribution=flow")
    flow = TrainedModel(config, models.build(config, (8, 8, 1), 0), {}, {}, 0)
    with pytest.raises(ValueError, match="window: not given, and the grid 'flow'") as error:
        check(flow, words, grid="flow")
    advice = (f"--{words[1]}.window", str(error.value).rpartition(" ")[2])
    check(flow, (*words, *advice), grid="flow")
    check(flow, words)
    if words[1] == "classifier":  # the mean's shift has the step's own variance
        check(flow, words, grid="flow", solver="ancestral", eta=0.0)
    if words[1] == "freedom":
        check(flow, (*words, "--freedom.rule", "time"), grid="flow")


def session(trained, noise=0.0, eta=1.0, labels=None, config=None):
    measured = Measured("deblur", operators.gaussian_blur(3, 0.8), np.zeros((1, 8, 8, 1)), noise)
    sampling = Sample(solver="ddim", eta=eta)
    model = dataclasses.replace(trained.model, label_dim=0 if labels is None else 10)
    config = trained.config if config is None else config
    return Session(model, config, sampling, {}, labels=labels, measured=measured)


def test_options_of_methods_that_do_nothing(trained):
    labels = types.SimpleNamespace(data=types.SimpleNamespace(label_dropout=0.1))
    unconditional = session(trained, labels=np.full(3, -1), config=labels)
    conditional = session(trained, labels=np.zeros(3), config=labels)
    ancestral = session(trained, 0.1)
    sampling = Sample(solver="ancestral", variance="large")
    ancestral = dataclasses.replace(ancestral, sampling=sampling)
    for build, settings, at, sentence in (
        (ddnm.build, ddnm.Settings(eta=0.5), session(trained), "--ddnm.eta: 0.5 given with --task"),
        (diffpir.build, diffpir.Settings(strength=3.0), session(trained), "--diffpir.strength: 3"),
        (diffpir.build, diffpir.Settings(), session(trained, 0.1, 0.4), "--eta: 0.4 with diffpir"),
        (diffpir.build, diffpir.Settings(), ancestral, "--variance: large with diffpir, whose"),
        (cfg.build, cfg.Settings(), unconditional, "the images have no class"),
        (cfg.build, cfg.Settings(channels=3), conditional, "--cfg.channels: 3 given, the images"),
    ):
        with pytest.raises(ValueError, match=sentence) as error:
            build(settings, at)
        assert "\n" not in str(error.value)
    ddnm.build(ddnm.Settings(eta=0.5), session(trained, 0.1))
    diffpir.build(diffpir.Settings(strength=3.0), session(trained, 0.1))
    diffpir.build(diffpir.Settings(interval=2), session(trained, 0.1, 0.4))  # eta of the others
    cfg.build(cfg.Settings(), session(trained, labels=np.array([1, -1]), config=labels))


def test_methods_of_singular_values_name_what_latents_have_instead(trained):
    at = session(trained, 0.1)
    operator = at.measured.operator.after(lambda z: z)
    latent = dataclasses.replace(at.model, latents=Latents((8, 8, 1)))
    measured = dataclasses.replace(at.measured, operator=operator)
    at = dataclasses.replace(at, model=latent, measured=measured)
    for build, settings in ((ddnm.build, ddnm.Settings()), (pigdm.build, pigdm.Settings())):
        with pytest.raises(ValueError, match="latents .* expected a model of pixels, or .* dsg or"):
            build(settings, at)


def test_an_example_has_no_noise_to_stop_at(trained):
    follows = Task("style", lambda drawn: operators.identity(), restores=False)
    made = measure(follows, Settings(), np.zeros((1, 8, 8, 1)), np.arange(1))
    at = dataclasses.replace(session(trained), measured=made.measured(made.rows))
    with pytest.raises(ValueError, match="--dsg.stop_ratio: 1 given; expected a task with meas"):
        dsg.build(dsg.Settings(stop_ratio=1.0), at)
    assert at.measured.std == Settings.noise  # the unit of LGD's energy stays


def test_smoothed_steps_of_dsg_are_those_of_the_likelihood_and_stop_by_the_residual(trained):
    noise, info = 0.05, info_at(4, 20, 10.0)
    x, y, eps = (np.float32(v) for v in np.random.default_rng(0).normal(size=(3, 3, 8, 8, 1)))
    seen = np.ones((8, 8, 1), np.float32)
    seen[2:, 3:] = 0  # a hidden pixel is no measurement
    y = seen * (x + noise * np.sign(y))  # at x the residual ratio is 1
    at = dataclasses.replace(
        session(trained), measured=Measured("inpaint", operators.inpaint(seen), y, noise)
    )

    def step(ratio):
        rule = dsg.build(dsg.Settings(rate=1.0, samples=4, stop_ratio=ratio), at).transition.rule
        transition = lambda x0_hat, x: (x0_hat, jnp.full(3, 0.5))
        return jax.jit(lambda: rule(lambda x: x, transition, x, eps, info)[0])()

    energy = lambda x0: ((seen[None] * x0 - y) ** 2).sum((1, 2, 3)) / (2 * noise**2)
    grad = jax.jit(jax.grad(lambda x0: gradients.smoothed(energy, 4, info)(x0).sum()))(x)
    want = x - 0.5 * 8 * grad / norms(grad)[:, None, None, None]
    np.testing.assert_allclose(step(0.9), want, atol=1e-5)
    np.testing.assert_allclose(step(1.1), x + 0.5 * eps, atol=1e-6)


def test_the_released_strength_of_a_task(trained, monkeypatch):
    for task, strength in (("inpaint", 1.0), ("deblur", 8.0), ("super_resolution", 8.0)):
        at = session(trained, 0.1)
        at = dataclasses.replace(at, measured=dataclasses.replace(at.measured, task=task))
        assert diffpir.build(diffpir.Settings(), at).transition.rule.strength == strength
    monkeypatch.setattr(dps, "guidance", lambda loss, scale, **_: scale)
    for task, scale in (("inpaint", 0.5), ("phase_retrieval", 1.0), ("deblur", 0.3)):
        at = dataclasses.replace(at, measured=dataclasses.replace(at.measured, task=task))
        assert dps.build(dps.Settings(), at) == scale


@pytest.mark.parametrize(
    "module,rule,squared",
    [
        (freedom, "time", False),
        (freedom, "rms", True),
        (mpgd, "released", False),
        (mpgd, "plain", True),
    ],
)
def test_published_scales_meet_the_loss_that_they_were_published_for(
    trained, monkeypatch, module, rule, squared
):
    seen, real = [], Measured.loss
    spy = lambda self, squared=True: seen.append(squared) or real(self, squared)
    monkeypatch.setattr(Measured, "loss", spy)
    module.build(module.Settings(rule=rule), session(trained, 0.1))
    assert seen == [squared]
