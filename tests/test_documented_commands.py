"""Every fenced command and snippet of the documents: parsed to the end by the real parsers, with the
check of the settings behind them; the first two pages are run from top to bottom (slow).
"""

import argparse
import ast
import builtins
import contextlib
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from ogdm_jax import cli, startup
from ogdm_jax.cli import guidance, options, sample, study, train
from ogdm_jax.cli import plan as planning
from ogdm_jax.config import ConfigError
from ogdm_jax.planning import program
from ogdm_jax.sampling import churn
from ogdm_jax.training.steps import CheckpointError
from tests.support import commands, documents, sets, tiny

# What .ci/run does in new environments: here the extras that are named are looked up.
IN_CI = ("pip", "python3", ".venv/bin/pip", ".venv/bin/python -m", ".venv/bin/ruff")
IN_CI += (".venv/bin/basedpyright", "mkdocs")
# What cannot run here. Its fence is marked "elsewhere", so that a reader's program knows it, too.
ELSEWHERE = {
    "npm": "a package manager of JavaScript, which is no part of the tests",
    "gcloud": "needs a Google Cloud project",
    "sbatch": "needs Slurm",
    "kubectl": "needs a cluster",
    "docker": "needs Docker",
}
ALL = documents.commands()
LINES = sorted({line for _, mark, line in ALL + documents.papers() if mark != "elsewhere"})


# What `ogdm new` writes, as far as a plan asks for it.
MINE = b"""from ogdm_jax.configs import digits
def get_config():
    config = digits.get_config()
    config.data.source = "folder:DIR"
    return config
"""


class Parsed(Exception):
    """The words were understood; nothing is done with them."""


@pytest.fixture
def only_parsed(tmp_path, monkeypatch):
    """A folder in which a command ends once its words are parsed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(startup, "prepare", lambda: None)
    sets.folder(tmp_path / "configs", {"mine.py": MINE})
    whole = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, *args, **_):
        raise Parsed(whole(parser, *args))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    return monkeypatch


def understood(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Raises, or exits, where a command would refuse its words before it looks at any file."""
    name, rest = words[1], words[2:]
    command = name.removesuffix(".py")
    rest = [word.replace("configs/NAME.py", "configs/digits.py") for word in rest]
    if command in ("train", "plan"):
        args, typed = train.parse(rest)
        args.plan_for = args.plan_for or ("here" if command == "plan" else "")
        planning.check(args)
        _, config, _ = train.read_settings(args.config, startup.split_overrides(typed))
        if args.plan_for:
            program.source_like(config, args.image_shape, args.classes, args.images)
    elif command == "study":
        args, typed = study.parse(rest)
        study.read_ways(args, study.read_arms(args.config, typed, [0]), 0)
    elif command.startswith("benchmarks/"):
        patch.setattr(sys, "argv", [name, *rest])
        with contextlib.suppress(Parsed):
            runpy.run_path(str(tiny.ROOT / name), run_name="__main__")
    else:
        try:
            cli.main([command, *rest])
        except Parsed as parsed:
            if command == "sample":
                options.refuse_former(rest)
                guidance.read(parsed.args[0])
                churn.parse(parsed.args[0].churn)


def test_there_are_commands_and_those_marked_are_ones_that_cannot_run():
    assert len(LINES) > 60
    for page, mark, line in ALL:
        first = documents.words(line)[0]
        away = first in ELSEWHERE or "gs://" in line
        assert mark in ("", "elsewhere") and (mark == "elsewhere") == away, (page, mark, line)


@pytest.mark.parametrize("line", LINES)
def test_a_command_parses_to_the_end(line, only_parsed, capsys):
    words = documents.words(line)
    if line.startswith(IN_CI):
        asked = re.findall(r"\[(\w+(?:,\w+)*)\]", line)
        extras = (tiny.ROOT / "setup.py").read_text().partition("extras_require")[2]
        assert all(f'"{extra}": ' in extras for group in asked for extra in group.split(","))
        return
    assert words[0] in ("ogdm", "python", ".venv/bin/python"), line
    try:
        understood(words, only_parsed)
    except CheckpointError:  # its words are read: it looks at a folder
        assert words[1] == "benchmarks/dg_pays.py"
    except (SystemExit, ConfigError) as error:
        said = capsys.readouterr().err or str(error)
        assert words[1] == "convert" and "there is no such file" in said, said  # a file of others


def test_no_command_draws_over_its_input_or_over_what_the_page_drew_before():
    """It would be refused."""
    drawn, parser = {}, sample.parser()
    for page, _, line in (*ALL, *documents.papers()):
        if (words := documents.words(line))[1:] and words[1] in ("sample", "sample.py"):
            args = parser.parse_args(words[2:])
            assert args.out not in (args.input, args.measured), line
            if page != "docs/papers.md":  # its rows are apart
                assert drawn.setdefault((page, args.out), words) == words, (page, line)


@pytest.mark.parametrize(
    "page, text", [(name, text) for name, _, text in documents.fences("python")]
)
def test_the_names_of_a_snippet_are_known(page, text):
    """It compiles, what it imports is there, and it uses nothing that it does not make."""
    tree = ast.parse(text, page)
    made = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(
                    f"{node.module}.{alias.name}"
                ), alias.name
        if isinstance(node, ast.Import | ast.ImportFrom):
            made |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            made.add(node.id)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert not used - made


def test_the_snippet_of_guidance_runs():
    (text,) = [text for name, _, text in documents.fences("python") if name == "docs/guidance.md"]
    found = {}
    exec(compile(text.replace("grids.edm(50)", "grids.edm(3)"), "docs/guidance.md", "exec"), found)
    assert found["images"].shape == found["latents"].shape


def test_the_sentences_of_troubleshooting_are_those_that_the_program_prints():
    said = []
    for file in (tiny.ROOT / "ogdm_jax").rglob("*.py"):
        said += [
            " ".join(node.value.split())
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    every = "\n".join(said)
    quoted = [text for name, _, text in documents.fences("text") if "troubleshooting" in name]
    assert len(quoted) > 6
    for text in quoted:
        pieces = [piece.strip() for piece in " ".join(text.split()).split("...")]
        missing = [piece for piece in pieces if piece and piece not in every]
        assert not missing


# Shrinks the runs of the first two pages: a network of one level, three steps, few images.
SHRUNK = [f"--config.{text}" for text in tiny.SHRINK if not text.startswith(("ogdm", "network.ch"))]
QUICK = {
    "train.py": [*SHRUNK, "--config.train.duration=3 steps", "--config.parallel.devices=1"],
    "sample.py": ["--batch=64"],
    "study": ["--num=64", "--features=digits", *SHRUNK, "--config.train.duration=2 steps"],
}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/start.md", "docs/own_images.md"])
def test_a_page_runs_from_top_to_bottom(page, tmp_path):
    sets.folder(tmp_path / "DIR", [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(40)])
    (tmp_path / "configs").mkdir()
    for _, language, text in re.findall(
        r"^(```)(sh|python)\n(.*?)^```", (tiny.ROOT / page).read_text(), re.MULTILINE | re.DOTALL
    ):
        if language == "python":
            with commands.inside(tmp_path):
                exec(compile(text, page, "exec"), {})
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            command = words[1] if words else ""
            if not words or command == "plan":  # compiles the step once more
                continue
            more = QUICK.get(command, [])
            if command == "sample.py":
                words = ["0-99" if word == "0-9999" else word for word in words]
            run = commands.ogdm if words[0] == "ogdm" else commands.entry
            words = ["0" if word == "0-2" and command == "study" else word for word in words]
            done = run(tmp_path, *words[1:], *more)
            assert done.returncode in (0, None), (line, done.stderr[-600:])
    names = {"docs/start.md": ["grid.png", "samples.npz", "report.html", "runs/study/study.md"]}
    for name in names.get(page, ["configs/mine.py", "mine.png"]):
        assert Path(tmp_path, name).is_file(), name
