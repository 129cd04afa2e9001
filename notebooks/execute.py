"""Makes NAME.ipynb of NAME.py: runs its cells in an empty folder and keeps what they show.

python notebooks/execute.py            all of them
python notebooks/execute.py 1 4        those whose names begin so
python notebooks/execute.py --check    runs them, training a tenth of the steps, and writes nothing

A cell that fails, or that writes to stderr (a warning), fails the notebook.
"""

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
# Of a run's log: they say more of the machine that made the notebook than of what one reads it for.
_TIMES = re.compile(
    r"^time  .*\n|(?<=^compiled in )[\d.]+(?= s$)|[\d,]+(?= images/s)|  [\w ]+ left$", re.MULTILINE
)
# What trains for long enough to have something to show. Whether every cell runs is seen earlier.
_STEPS = re.compile(r"(?<=train.duration=)\d+(?= steps)|(?<=log.every=)\d+(?= steps)")


def shrink(notebook: nbformat.NotebookNode) -> None:
    """Draws its pictures with 64 colours: a quarter of the bytes, and nobody sees it."""
    for output in (o for cell in notebook.cells for o in cell.get("outputs", ())):
        data = output.get("data", {})
        if "image/png" in data:
            picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
            content = io.BytesIO()
            picture.quantize(64, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
            data["image/png"] = base64.b64encode(content.getvalue()).decode()


def timeless(text: str) -> str:
    """A run's log without its times and speeds."""
    return _TIMES.sub(lambda found: "" if found[0][0] in "t " else "…", text)


def execute(source: Path, brief: bool = False) -> nbformat.NotebookNode:
    """The notebook of a .py file in the percent format, with the outputs of a fresh kernel; brief:
    of a tenth of the training.
    """
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # the same in every run
        if brief:
            cell.source = _STEPS.sub(lambda found: str(int(found[0]) // 10), cell.source)
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=900,
            kernel_name="python3",
            record_timing=False,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    for output in (o for cell in notebook.cells for o in cell.get("outputs", ())):
        if "text" in output:
            output.text = timeless(output.text.replace(f"{folder}/", ""))
    notebook.metadata.pop("language_info", None)  # it has the version of Python
    warned = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stderr"
    ]
    if warned:
        raise SystemExit(f"error: {source.name} writes to stderr: {warned[0]}")
    shrink(notebook)
    return notebook


def main() -> None:
    """Runs the notebooks that are named, in order, and says how long each took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of names (default: all)")
    parser.add_argument("--check", action="store_true", help="train little, write nothing")
    args = parser.parse_args()
    # Kernels import the package that lies beside this folder.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's word that this machine is slow
    # Kernels share what they compile, single operations too.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    began, paths = time.monotonic(), sorted(HERE.glob("[0-9]*.py"))
    for path in paths:
        if args.names and not path.name.startswith(tuple(args.names)):
            continue
        start, before = time.monotonic(), os.times()
        notebook = execute(path, args.check)
        if not args.check:
            nbformat.write(notebook, path.with_suffix(".ipynb"))
        used = sum(os.times()[2:4]) - sum(before[2:4])  # by the kernel, which has ended
        took = time.monotonic() - start
        print(f"{path.name}: {took:.0f} s, {used:.0f} s of processor time", flush=True)
    print(f"notebooks: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
