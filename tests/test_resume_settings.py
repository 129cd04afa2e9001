"""What may differ when a run is resumed: freely, by --override, or never."""

import json

import jax
import pytest
from etils import epath

from ogdm_jax import data
from ogdm_jax.config import ConfigError
from ogdm_jax.methods import discovery
from ogdm_jax.training import arrays, optim, resume
from ogdm_jax.training.checkpoint import Checkpoints, Snapshot, describe, find
from tests.support import bucket as buckets
from tests.support import tiny

PLAIN = (*tiny.SMALLEST, "methods=")


def differ(*more: str, before: tuple[str, ...] = PLAIN):
    old, new = tiny.config(*before), tiny.config(*before, *more)
    fixed, decided = resume.differences(old, new, discovery.settings_types())
    return sorted(fixed), sorted(decided)


@pytest.mark.fast
@pytest.mark.parametrize(
    "text",
    [
        "optim.accumulate=2",
        "network.remat=true",
        "parallel.plan=pmap",
        "parallel.devices=1",
        "log.every=1 steps",
        "log.tensorboard=true",
        "data.workers=2",
        "data.memory_limit=0",
        "data.data_dir=/somewhere",
        "sample.steps=2",
        "sample.solver=euler",
        "sample.sigma_max=70.0",  # the sampler's alone: nothing clips to it here
        "evaluate.num=100",
        "evaluate.features=digits",
        "train.keep=1",
        "train.keep_every=5 steps",
        "train.save_every=1 steps",
        "train.duration=40 steps",
        "ogdm.gamma=3.0",  # a method that is off
        "optim.ramp=0 kimg",  # as many steps
        "noise.clip=false",
        "init.step=5",
    ],
)
def test_what_changes_no_mathematics_is_free(text):
    before = (*PLAIN, "noise.clip=false")
    assert differ(text, before=before) == ([], [])


@pytest.mark.fast
@pytest.mark.parametrize(
    "text,before",
    [
        ("optim.learning_rate=1e-4", PLAIN),
        ("optim.decay=40 steps", PLAIN),
        ("optim.decay=train.duration", PLAIN),
        ("optim.ramp=5 steps", PLAIN),
        ("optim.betas=(0.8,0.9)", PLAIN),
        ("data.batch=16", PLAIN),
        ("data.source=mnist5k", PLAIN),
        ("data.xflip=true", PLAIN),
        ("seed=3", PLAIN),
        ("network.dropout=0.1", PLAIN),
        ("network.dtype=bfloat16", PLAIN),
        ("noise.mean=-1.0", PLAIN),
        ("ema.halflife=7 kimg", PLAIN),
        ("methods=stf", PLAIN),
        ("sample.sigma_max=70.0", PLAIN),  # noise.clip clips to it
        ("ogdm.gamma=3.0", tiny.SMALLEST),
        ("init.workdir=other", PLAIN),  # an average that starts at good weights has no ramp-up
    ],
)
def test_what_a_person_decides(text, before):
    assert differ(text, before=before) == ([], [text.partition("=")[0]])


@pytest.mark.fast
@pytest.mark.parametrize(
    "text",
    [
        "network.model_channels=16",
        "network.kind=dhariwal",
        "precondition.kind=vp",
        "precondition.sigma_data=0.6",
        "data.conditional=true",
        "task=discriminator",
    ],
)
def test_what_cannot_differ(text):
    assert differ(text) == ([text.partition("=")[0]], [])


@pytest.mark.fast
def test_every_setting_is_one_of_the_three():
    """A setting that is declared without a word is one that makes another network."""
    fixed = {
        key for key, (_, decided) in resume._values(tiny.config(), {}, set()).items() if not decided
    }
    groups = {key.partition(".")[0] for key in fixed}
    assert groups == {"network", "precondition", "data", "task", "ema"}
    assert {key for key in fixed if key.startswith("data.")} == {"data.conditional"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, its run) of a checkpoint of step 3 of a run with OGDM."""
    folder, run = tmp_path_factory.mktemp("saved"), tiny.build(*tiny.SMALLEST)
    about = describe(run.config, run.source.shape, 10, data.fingerprint(run.source))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, run.init(), about, {"step": 3})
    return folder, run


def accept(folder, *more: str, override: bool = False):
    config = tiny.config(*tiny.SMALLEST, *more)
    types = discovery.settings_types()
    return resume.check(epath.Path(folder), find(folder), config, types, override)


def test_refusals_say_what_can_be_done(saved):
    folder, _ = saved
    with pytest.raises(ConfigError) as error:
        accept(folder, "optim.learning_rate=0.1")
    assert str(error.value) == (
        "--workdir holds a run of another configuration: optim.learning_rate (0.001 there, 0.1 "
        "now); expected them as they were, or --override to go on with the new ones"
    )
    changed = accept(folder, "optim.learning_rate=0.1", override=True)
    assert changed == {"optim.learning_rate": (0.001, 0.1)}
    with pytest.raises(ConfigError, match="model_channels .8 there, 16 now.*new --workdir: --conf"):
        accept(folder, "network.model_channels=16", override=True)


@pytest.mark.parametrize(
    "text,tensor", [("ogdm.channel_base=32", "carry/ogdm"), ("methods=", "carry/ogdm")]
)
def test_decided_settings_of_another_state_are_refused(saved, text, tensor):
    folder, run = saved
    changed = accept(folder, text, override=True)
    other = tiny.build(*tiny.SMALLEST, text)
    shapes = jax.eval_shape(other.create, other.key)
    with pytest.raises(ConfigError, match=rf"--override: .*another state.*{tensor}.*new --workdir"):
        resume.check_state(find(folder), shapes, changed)
    resume.check_state(find(folder), jax.eval_shape(run.create, run.key), changed)


def test_weight_decay_cannot_be_switched_on(saved):
    changed = accept(saved[0], "optim.weight_decay=0.1", override=True)
    other = tiny.build(*tiny.SMALLEST, "optim.weight_decay=0.1")
    with pytest.raises(ConfigError, match="--override: optim.weight_decay"):
        resume.check_state(find(saved[0]), jax.eval_shape(other.create, other.key), changed)


def test_another_data_set_is_refused_by_what_it_holds(saved):
    snapshot, known = find(saved[0]), data.fingerprint(data.open_source("digits"))
    assert resume.check_data(snapshot, known, False) == ""
    other = known | {"class_names": ["one", *known["class_names"][1:]]}
    with pytest.raises(ConfigError, match="data.source: is another data set.*class 0 was"):
        resume.check_data(snapshot, other, False)
    assert "class 0 was" in resume.check_data(snapshot, other, True)
    # the name alone says nothing: a folder may have moved
    assert accept(saved[0], "data.source=mnist5k") == {}


@pytest.mark.fast
def test_history_has_a_line_for_each_decision(tmp_path):
    resume.note(epath.Path(tmp_path), 3, "override", changed={"a.b": (1.0, float("inf"))})
    resume.note(epath.Path(tmp_path), 5, "went back", set_aside=[7, 9])
    lines = [json.loads(line) for line in (tmp_path / resume.HISTORY).read_text().splitlines()]
    assert lines == [
        {"step": 3, "what": "override", "changed": {"a.b": [1.0, "inf"]}},
        {"step": 5, "what": "went back", "set_aside": [7, 9]},
    ]


@pytest.mark.fast
def test_going_back_in_a_bucket_which_has_no_empty_folders(tmp_path, monkeypatch):
    there, run = buckets.install(tmp_path, monkeypatch) / "run", epath.Path("gs://bucket/run")
    for name in ("checkpoints/3", "checkpoints/5", "ema/00000003.npz", "ema/00000005.npz"):
        file = there / name if name.endswith("npz") else there / name / "commit_success.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    (there / "distances.json").write_text("[]")  # of step 5 as it was
    kept = Snapshot(tiny.config(), (8, 8, 1), 0, 3, run / "checkpoints" / "3")
    resume.set_aside(run, kept, lambda _: None)
    aside = there / "set_aside" / "1"
    assert [p.name for p in (there / "checkpoints").iterdir()] == ["3"]
    assert (aside / "5" / "commit_success.txt").read_text() == "checkpoints/5"
    assert (aside / "ema" / "00000005.npz").read_text() == "ema/00000005.npz"
    assert [p.name for p in (there / "ema").iterdir()] == ["00000003.npz"]
    assert (aside / "distances.json").exists() and not (there / "distances.json").exists()


@pytest.mark.fast
@pytest.mark.parametrize("text,steps", [("0 steps", 0), ("5 steps", 5), ("train.duration", 5)])
def test_a_schedule_of_the_run_ends_with_it(text, steps):
    config = tiny.config("train.duration=5 steps", f"optim.decay={text}")
    assert config.steps(config.optim.decay) == steps
    rate = optim.rate_of(config)
    assert float(rate(4)) == pytest.approx(1e-3 * (0.2 if steps else 1))


@pytest.mark.fast
def test_a_schedule_shorter_than_the_run_is_refused():
    config = tiny.config("train.duration=5 steps", "optim.decay=2 steps")
    with pytest.raises(ConfigError, match="config.optim.decay: '2 steps' given; expected a length"):
        optim.rate_of(config)
    with pytest.raises(ConfigError, match="ema.halflife: 'train.duration' is no duration"):
        tiny.config("ema.halflife=train.duration")
    with pytest.raises(ConfigError, match="config.ogdm.decay: 2 given; expected 0, or at least"):
        tiny.build("methods=ogdm", "ogdm.decay=2", "train.duration=5 steps")


def test_the_tree_of_an_item(saved):
    tree = arrays.item_tree(find(saved[0]).path, "state")
    assert set(tree) == {"step", "opt_state", "carry"}
