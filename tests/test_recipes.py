"""The recipes for clusters: their commands run with stand-ins for gcloud, srun and python, and name
what exists.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ogdm_jax import config as configs
from ogdm_jax import startup
from ogdm_jax.cli import train
from tests.support import tiny

RECIPES = tiny.ROOT / "recipes"
ENV = {
    "CONFIG": "configs/cifar10_ogdm.py",
    "WORKDIR": "gs://bucket/runs/x",
    "PAUSE": "0",
    "ATTEMPTS": "4",
}
MORE = "--config.data.batch=256"


def parsed(words):
    """What train.py makes of a command's words, which have to begin with it: (flags,
    configuration).
    """
    assert words[0] == "train.py"
    args, rest = train.parse(list(words)[1:])
    return args, configs.load(tiny.ROOT / args.config, startup.split_overrides(rest))


def execute(
    script: str, tmp_path: Path, programs: dict[str, str], **env: str
) -> tuple[int, list[list[str]], str]:
    """Runs a recipe with programs of ours first in PATH. Returns (exit code, calls, what it
    printed).

    programs: name -> shell code that sees its arguments and N, how often it was called before.
    """
    bin_, log = tmp_path / "bin", tmp_path / "calls"
    bin_.mkdir()
    for name, code in programs.items():
        count = f'N=$(grep -c "^{name} " {log} 2>/dev/null); '
        text = f"#!/usr/bin/env bash\n{count}\nprintf '%q ' {name} \"$@\" >> {log}\necho >> {log}\n{code}\n"
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    paths = os.environ | ENV | env | {"PATH": f"{bin_}:{os.environ['PATH']}"}
    command = ["bash", str(RECIPES / script), MORE]
    done = subprocess.run(
        command, env=paths, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    calls = [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done.returncode, calls, done.stdout + done.stderr


def check_command(words, workdir="gs://bucket/runs/x"):
    args, config = parsed(words)
    assert (
        args.config == "configs/cifar10_ogdm.py"
        and args.workdir == workdir
        and args.stopped_code == 75
    )
    assert config.data.batch == 256


@pytest.mark.parametrize("name", sorted(p.name for p in RECIPES.glob("*.sh")))
def test_scripts_are_bash(name):
    done = subprocess.run(["bash", "-n", str(RECIPES / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(RECIPES / name, os.X_OK)


@pytest.mark.parametrize("name,wanted", [("one_node.sh", 2), ("slurm.sh", 2), ("tpu_pod.sh", 3)])
def test_scripts_ask_for_what_is_missing(name, wanted, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("CONFIG", "WORKDIR", "ZONE")}
    missing = [*("CONFIG", "WORKDIR", "ZONE")][:wanted]
    for i, variable in enumerate(missing):
        given = {k: "x" for k in missing[:i]}
        command = ["bash", str(RECIPES / name)]
        done = subprocess.run(
            command, env=env | given, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode != 0 and f"{variable}: " in done.stderr


def test_one_node_starts_again_after_a_stop_or_a_crash(tmp_path):
    code, calls, out = execute(
        "one_node.sh", tmp_path, {"python": "codes=(75 139 0); exit ${codes[$N]}"}
    )
    assert code == 0 and len(calls) == 3 and calls[0] == calls[1] == calls[2], out
    check_command(calls[0][1:])


@pytest.mark.parametrize("ends", [1, 2])
def test_one_node_leaves_a_wrong_setting_at_once(tmp_path, ends):
    code, calls, _ = execute("one_node.sh", tmp_path, {"python": f"exit {ends}"})
    assert code == ends and len(calls) == 1


def test_one_node_does_not_try_for_ever(tmp_path):
    code, calls, out = execute("one_node.sh", tmp_path, {"python": "exit 134"})
    assert code == 1 and len(calls) == 4 and "4 starts did not suffice" in out


SLURM = {"scontrol": "exit 0"}


@pytest.mark.parametrize(
    "ended,restarts,code,queued",
    [(0, 0, 0, False), (75, 99, 0, True), (137, 0, 0, True), (137, 5, 137, False)],
    ids=["trained", "stopped", "a node died", "it died too often"],
)
def test_slurm_queues_again_what_is_not_finished(ended, restarts, code, queued, tmp_path):
    env = {
        "SLURM_JOB_ID": "42",
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_SUBMIT_DIR": str(tiny.ROOT),
    }
    ended, calls, out = execute("slurm.sh", tmp_path, SLURM | {"srun": f"exit {ended}"}, **env)
    assert ended == code, out
    assert [c for c in calls if c[0] == "scontrol"] == (
        [["scontrol", "requeue", "42"]] if queued else []
    )
    (srun,) = [c for c in calls if c[0] == "srun"]
    check_command(srun[srun.index("python") + 1 :])


def test_slurm_asks_for_a_task_a_gpu_and_for_a_signal_in_time():
    """JAX takes the GPU of a task's local number, so that every task must see all GPUs of its
    node.
    """
    asked = dict(
        re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (RECIPES / "slurm.sh").read_text(), re.MULTILINE)
    )
    assert asked["ntasks-per-node"] == asked["gpus-per-node"] and "gpus-per-task" not in asked
    assert int(asked["signal"].removeprefix("TERM@")) >= 60 and "requeue" in asked


GCLOUD = r"""
tpu=$(dirname "$0")/../tpu
case "$4" in
  describe) cat $tpu 2>/dev/null || exit 1 ;;
  create) echo READY > $tpu ;;
  delete) rm $tpu ;;
  ssh) case "$*" in
    *train.py*--config*) echo x >> $tpu.trained
      if [ $(wc -l < $tpu.trained) -lt 3 ]; then echo PREEMPTED > $tpu; exit 255; fi ;;
  esac ;;
esac
exit 0
"""


@pytest.mark.slow
def test_a_pod_is_made_again_after_a_preemption(tmp_path):
    code, calls, out = execute(
        "tpu_pod.sh", tmp_path, {"gcloud": GCLOUD}, ZONE="z", TMPDIR=str(tmp_path)
    )
    assert code == 0, out
    verbs = [c[4] for c in calls]
    assert verbs.count("create") == 3 and verbs.count("delete") == 2 and verbs.count("scp") == 3
    assert all("--zone" in c and c[c.index("--zone") + 1] == "z" for c in calls)
    commands = [word for c in calls if c[4] == "ssh" for word in c if word.startswith("--command=")]
    train = [c for c in commands if "train.py --config" in c]
    assert len(train) == 3 and len(set(train)) == 1
    before, _, words = train[0].removeprefix("--command=").partition(".venv/bin/python ")
    assert before == "cd ogdm_jax && "
    check_command(shlex.split(words))
    assert all("--worker=all" in c for c in calls if c[4] in ("ssh", "scp"))


def test_a_pod_gives_up_where_every_start_fails(tmp_path):
    code, calls, out = execute(
        "tpu_pod.sh", tmp_path, {"gcloud": "[ $4 = create ] && exit 1; exit 0"}, ZONE="z"
    )
    assert (
        code == 1 and [c[4] for c in calls].count("create") == 4 and "gave up after 4 starts" in out
    )


@pytest.mark.slow
def test_a_pod_on_which_the_code_did_not_arrive_is_made_again(tmp_path):
    failing = GCLOUD.replace("  ssh) case", "  scp) [ $N -lt 9 ] && exit 1 ;;\n  ssh) case")
    code, calls, out = execute(
        "tpu_pod.sh", tmp_path, {"gcloud": failing}, ZONE="z", TMPDIR=str(tmp_path)
    )
    assert code == 1, out  # two of its four starts ended before any training
    verbs = [c[4] for c in calls]
    assert verbs[:8] == ["describe", "create", "scp", "delete"] * 2
    assert verbs.count("create") == 4


@pytest.mark.parametrize("name", ["gke_tpu.yaml", "gke_gpu.yaml"])
def test_jobsets_start_what_exists(name):
    (jobset,) = yaml.safe_load_all((RECIPES / name).read_text())
    assert jobset["kind"] == "JobSet" and jobset["apiVersion"].startswith("jobset.x-k8s.io/")
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # Code 75 fails the job, and the set starts all pods anew; a pod must not be restarted alone.
    assert (
        job["backoffLimit"] == 0
        and pod["restartPolicy"] == "Never"
        and job["completionMode"] == "Indexed"
    )
    assert (
        jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
        and pod["terminationGracePeriodSeconds"] >= 60
    )
    assert job["parallelism"] == job["completions"]
    python, *command = container["command"]
    assert python == "python"
    words = [str(word).replace("$(PROCESS)", "1") for word in [*command, *container["args"]]]
    args, config = parsed(words)
    assert (
        args.workdir.startswith("gs://")
        and args.stopped_code == 75
        and "gs://BUCKET/" in config.data.source
    )
    if name == "gke_gpu.yaml":
        host = f"{jobset['metadata']['name']}-{group['name']}-0-0.{jobset['metadata']['name']}"
        assert args.coordinator == f"{host}:{container['ports'][0]['containerPort']}"
        assert args.processes == job["parallelism"] and args.process == 1
    else:
        chips = [
            int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        ]
        each = container["resources"]["limits"]["google.com/tpu"]
        assert chips[0] * chips[1] == job["parallelism"] * each
        assert args.coordinator is args.processes is args.process is None  # GKE tells JAX


def test_the_page_names_every_recipe_and_every_flag_it_shows():
    page = (tiny.ROOT / "docs" / "clusters.md").read_text()
    assert {p.name for p in RECIPES.iterdir()} <= set(re.findall(r"recipes/([\w.]+)", page))
    help_ = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=tiny.ROOT, capture_output=True, text=True
    ).stdout
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page))
    assert flags and flags <= set(re.findall(r"--[a-z][a-z-]*", help_))
