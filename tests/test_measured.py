"""Pictures that were measured already are taken as they are; several samples of one measurement."""

import json

import numpy as np
import pytest
from PIL import Image

from ogdm_jax import models, startup
from ogdm_jax.cli import guidance
from ogdm_jax.cli import sample as command_line
from ogdm_jax.config import ConfigError
from ogdm_jax.inverse import files, measured, operators, tasks
from ogdm_jax.inverse.measured import measure, taken
from ogdm_jax.pixels import to_float, to_uint8
from tests.support import tiny
from tests.support.commands import arrays, picture_size

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A training folder with fresh weights."""
    run = tiny.build("methods=()", *tiny.SMALLEST)
    return tiny.folder(tmp_path_factory.mktemp("prior"), run)


@pytest.fixture
def command(monkeypatch, capsys, workdir, tmp_path):
    """ogdm sample: its JSON, or its one sentence."""
    monkeypatch.setattr(startup, "prepare", lambda: None)
    monkeypatch.chdir(tmp_path)

    def call(text: str):
        words = f"--workdir {workdir} --devices 1 --guidance dsg --steps 2 {text}"
        try:
            command_line.main(words.split())
        except SystemExit as stop:
            assert stop.code == 1
            return capsys.readouterr().err.strip()
        return next(
            json.loads(line)
            for line in capsys.readouterr().out.splitlines()
            if line.startswith("{")
        )

    return call


def picture(path, side: int = 8, seed: int = 0, channels: int = 1) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, channels), np.uint8)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
    return pixels


HALF = np.ones((8, 8), np.uint8)
HALF[:, :4] = 0


@pytest.fixture
def cases(tmp_path):
    """{words of the task: (file, y)} of pictures that were measured elsewhere."""
    Image.fromarray(HALF).save(tmp_path / "mask.png")
    np.save(tmp_path / "kernel.npy", np.eye(3) / 3)
    small, whole = picture(tmp_path / "small.png", 4, 1), picture(tmp_path / "whole.png")
    np.save(tmp_path / "whole.npy", to_float(whole)[..., 0])
    y = to_float(whole)
    return {
        "super_resolution --task.factor 2": ("small.png", to_float(small)),
        "deblur": ("whole.png", y),
        "denoise": ("whole.png", y),
        "high_dynamic_range": ("whole.npy", y),
        f"motion_deblur --task.kernel {tmp_path}/kernel.npy": ("whole.png", y),
        f"nonlinear_deblur --task.kernel {tmp_path}/kernel.npy": ("whole.png", y),
        f"inpaint --task.mask {tmp_path}/mask.png": ("whole.png", y * HALF[..., None]),
    }


def restoration(words: str):
    """What the command would restore, without a model."""
    args = command_line.parser().parse_args(["--workdir", "x", "--guidance", "dsg", *words.split()])
    request = guidance.read(args)

    class Run:
        model = models.Model(None, None, SHAPE, 0)
        buffers, class_names = {}, ()

    seeds = command_line.parse_seeds(args.seeds, 64 if args.num is None else args.num)
    return guidance._measure(request, Run, seeds, None, 0)[0]


def test_what_was_measured_is_taken_as_it_is(cases, tmp_path):
    for task, (name, y) in cases.items():
        found = restoration(f"--task {task} --measured {tmp_path / name}")
        assert found.images is None and len(found.seeds) == 1, task
        np.testing.assert_array_equal(found.y, y[None])
        figures = found.judge(np.zeros((1, *SHAPE), np.float32))
        assert "psnr" not in figures and "ssim" not in figures
        assert np.isfinite(figures["residual"]).all() and "residual_ratio" in figures
        assert found.about == {"measured": str(tmp_path / name), "pictures": 1}
        assert found.names.tolist() == [name]
    assert figures["hidden"].tolist() == [0.5]  # the last one is inpaint


def test_the_truth_explains_its_own_measurement(tmp_path):
    """What `measure` made, written as a picture and read again, is the same measurement."""
    x = to_float(picture(tmp_path / "x.png"))[None]
    settings = tasks.Settings(factor=2, noise=0.0)
    task = tasks.make_task("super_resolution", settings, SHAPE)
    made = measure(task, settings, x, np.arange(1))
    Image.fromarray(to_uint8(np.clip(made.y, -1, 1))[0, ..., 0]).save(tmp_path / "y.png")
    found = files.read_measured(str(tmp_path / "y.png"), task, SHAPE, 4, files.Classes(0))
    np.testing.assert_allclose(found.values, np.clip(made.y, -1, 1), atol=1 / 127.5)
    again = taken(task, settings, found.values, np.arange(1))
    clipped = abs(np.clip(made.y, -1, 1) - made.y).max()
    assert again.judge(x)["residual"][0] <= 0.5 / 127.5 + clipped


def test_amplitudes_are_an_array(tmp_path):
    x = np.random.default_rng(0).uniform(-1, 1, (2, *SHAPE)).astype(np.float32)
    y = np.asarray(operators.phase_retrieval().forward(x))
    np.save(tmp_path / "y.npy", y)
    found = restoration(f"--task phase_retrieval --measured {tmp_path / 'y.npy'}")
    np.testing.assert_array_equal(found.y, y)
    assert found.judge(x)["residual"].max() < 1e-6
    picture(tmp_path / "y.png")
    with pytest.raises(ValueError, match="phase_retrieval measures no picture; expected a .npy"):
        restoration(f"--task phase_retrieval --measured {tmp_path / 'y.png'}")
    np.save(tmp_path / "y.npy", y.astype(np.uint8))
    with pytest.raises(ValueError, match="is uint8, the numbers of a picture; phase_retrieval"):
        restoration(f"--task phase_retrieval --measured {tmp_path / 'y.npy'}")


@pytest.mark.fast
def test_images_are_measured_and_judged_some_at_a_time(monkeypatch):
    x = np.random.default_rng(0).uniform(-1, 1, (5, 4, 4, 1)).astype(np.float32)
    sizes = []

    def forward(x):
        sizes.append(len(x))
        return 0.5 * x

    task = tasks.Task("denoise", lambda drawn: operators.Operator("half", forward))
    whole = measure(task, tasks.Settings(), x, np.arange(5))
    figures = whole.judge(0.9 * x)
    monkeypatch.setattr(measured, "_AT_A_TIME", 2)
    sizes.clear()
    parts = measure(task, tasks.Settings(), x, np.arange(5))
    np.testing.assert_allclose(parts.y, whole.y, atol=1e-6)
    for name, values in parts.judge(0.9 * x).items():
        np.testing.assert_allclose(values, figures[name], rtol=1e-5, err_msg=name)
    assert max(sizes) == 2 and {len(values) for values in figures.values()} == {5}


def test_photons_are_counted_of_pictures():
    with pytest.raises(ConfigError, match="^--task.poisson: 1.0 given; expected --task inpaint or"):
        tasks.make_task("phase_retrieval", tasks.Settings(poisson=1.0), SHAPE)


def test_three_samples_of_one_measurement(cases, tmp_path):
    for option in ("--measured", "--input"):
        mask = f"--task inpaint --task.mask {tmp_path}/mask.png" if option == "--measured" else ""
        words = f"{mask or '--task inpaint'} {option} {tmp_path / 'whole.png'}"
        three = restoration(f"{words} --num 3")
        assert three.seeds.tolist() == [0, 1, 2] and three.names.tolist() == ["whole.png"] * 3
        for part in (three.y, three.drawn["mask"]):  # one mask and one noise
            np.testing.assert_array_equal(part, part[:1].repeat(3, 0))
        one = restoration(f"{words} --seeds 5-5")
        assert one.seeds.tolist() == [5] and len(restoration(words).seeds) == 1
    np.testing.assert_array_equal(restoration(f"{words} --num 2").y[:1], restoration(words).y)


def test_pictures_are_taken_in_turn(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png", seed=i)
    words = f"--task denoise --input {tmp_path}"
    assert restoration(words).names.tolist() == ["0.png", "1.png", "2.png"]
    assert restoration(words).about == {"input": str(tmp_path), "pictures": 3}
    found = restoration(f"{words} --num 5")
    assert found.names.tolist() == ["0.png", "1.png", "2.png", "0.png", "1.png"]
    np.testing.assert_array_equal(found.y[3:], found.y[:2])
    few = restoration(f"{words} --num 2")
    assert few.about == {"input": str(tmp_path), "pictures": 2, "pictures_left": 1}
    np.testing.assert_array_equal(few.y, found.y[:2])
    some = found.take(np.array([4, 0]))
    assert some.names.tolist() == ["1.png", "0.png"] and some.seeds.tolist() == [4, 0]


@pytest.mark.slow_cases("grid.png")
@pytest.mark.parametrize("out", ["grid.png", "all.npz", "folder"])
def test_the_command_restores_what_was_measured(command, cases, tmp_path, out):
    words = f"--task super_resolution --task.factor 2 --measured small.png --num 3 --out {out}"
    said = command(words)
    assert said["images"] == 3 and said["pictures"] == 1 and said["measured"] == "small.png"
    assert "psnr" not in said and "ssim" not in said and np.isfinite(said["residual"])
    path = tmp_path / out
    each = json.loads(
        (path.with_suffix(".json") if path.suffix else path / "figures.json").read_text()
    )
    assert each["seeds"] == [0, 1, 2] and each["pictures"] == ["small.png"] * 3
    assert "psnr" not in each and len(each["residual"]) == 3
    if out == "grid.png":
        assert picture_size(path) == (6 * 129 - 1 + 2 * 14, 18 + 128 + 18)  # three pairs
    elif out == "all.npz":
        found = arrays(path)
        assert set(found) == {"measurement", "result", "seeds"}
        assert found["measurement"].shape == (3, 4, 4, 1) and found["result"].shape == (3, *SHAPE)
        assert abs(found["result"][0] - found["result"][1]).max() > 0.01  # other seeds
    else:
        assert len(list(path.glob("img*.png"))) == 3


@pytest.mark.slow_cases("motion_deblur*whole.png")
@pytest.mark.parametrize(
    "task",
    [
        "motion_deblur --task.kernel kernel.npy --measured whole.png",
        "inpaint --task.mask mask.png --measured whole.png",
        "motion_deblur --task.kernel kernel.npy --input whole.png",
    ],
)
def test_kernels_and_masks_of_files_restore(command, cases, task):
    said = command(f"--task {task} --num 2 --out two.npz")
    assert said["images"] == 2 and said["pictures"] == 1 and np.isfinite(said["residual"])
    assert ("psnr" in said) == ("--input" in task)
    assert said.get("hidden") == (0.5 if "inpaint" in task else None)


BAD = {
    "--task denoise --measured none.png": "--measured: 'none.png' is no file",
    "--task denoise --measured whole.png --input whole.png": "--measured, --input: both given",
    "--measured whole.png": "--measured: given, but there is no --task",
    "--input whole.png": "--input: given, but there is no --task",
    "--task denoise": "--input: not given; expected the picture .* or --measured",
    "--task style --measured whole.png": "--measured: given for --task style",
    "--task inpaint --measured whole.png": "--task.mask: random given with --measured",
    "--task inpaint --task.mask box --measured whole.png": "--task.mask: box given with",
    "--task motion_deblur --measured whole.png": "--task.kernel: not given for --task motion",
    "--task nonlinear_deblur --measured whole.png": "--task.kernel: not given for --task nonlin",
    "--task super_resolution --measured small.png": r"small.png' is 4x4x1, and is not resized; "
    r"expected 2x2x1 .* --task.factor 2 fits it",
    "--task denoise --measured small.png": "is 4x4x1, and is not resized; expected 8x8x1 .*; crop",
    "--task denoise --measured wide.png": "is 4x8x1, and is not resized",
    "--task denoise --measured colour.png": "--measured: .*has colour where grey images",
    "--task denoise --measured mixed": "--measured: .* is 4x4 where a.png is 8x8$",
    "--task denoise --measured empty": "--measured: .* has no images",
    "--task denoise --measured page.png": "--measured: .*no readable image",
    "--task denoise --measured raw.npy": "--measured: .* numbers up to 255; expected",
    "--task denoise --measured nan.npy": "--measured: 'nan.npy' holds NaN",
    "--task denoise --measured five.npy": "--measured: 'five.npy' is",
}


def test_what_cannot_be_a_measurement_is_refused(command, cases, tmp_path):
    picture(tmp_path / "colour.png", channels=3)
    Image.new("L", (8, 4)).save(tmp_path / "wide.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    picture(tmp_path / "mixed" / "a.png")
    picture(tmp_path / "mixed" / "b.png", 4)
    (tmp_path / "page.png").write_text("<html>")
    np.save(tmp_path / "raw.npy", np.full((8, 8), 255.0))
    np.save(tmp_path / "nan.npy", np.full((8, 8), np.nan))
    np.save(tmp_path / "five.npy", np.zeros((1, 1, 2, 8, 8)))
    for words, sentence in BAD.items():
        said = command(words)
        assert isinstance(said, str) and said.startswith("error: ") and "\n" not in said, words
        with pytest.raises(ConfigError, match=sentence):
            raise ConfigError(said.removeprefix("error: "))
