"""The scripts that start runs: what they hold, what they hand on, and what they do when told to stop."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cptrain.config.preset import presets_folder
from cptrain.train.settings import TrainSettings

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = (
    LAUNCH / "quickstart.sh",
    LAUNCH / "venv.sh",
    LAUNCH / "slurm.sbatch",
    ROOT / "tools/test.sh",
    ROOT / ".ci/run",
)
SLURM = {
    "SLURM_JOB_ID": "42",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_NODELIST": "node[1-4]",
}


def without_comments(path: Path) -> str:
    return re.sub(r"(^|\s)#(?!SBATCH).*", "", path.read_text(), flags=re.MULTILINE)


def write_command(path: Path, body: str) -> None:
    """An executable bash script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


# --- what they hold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_launch_script_is_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("file", ["slurm.sbatch", "kubernetes.yaml", "quickstart.sh"])
def test_launch_holds_no_settings(file: str) -> None:
    sections = "|".join(field.name for field in dataclasses.fields(TrainSettings))
    commands = without_comments(LAUNCH / file).partition("<<END")[0]  # what follows is printed, not run
    assert not re.search(rf"--({sections})\.", commands)


def test_launch_kubernetes_says_the_number_of_nodes_alike_everywhere() -> None:
    text = (LAUNCH / "kubernetes.yaml").read_text()
    assert len(set(re.findall(r"(\d+)  # nodes$", text, re.MULTILINE))) == 1
    assert len(re.findall(r"# nodes$", text, re.MULTILINE)) == 3


def test_launch_kubernetes_has_as_many_gpus_as_its_preset_asks_for() -> None:
    text = (LAUNCH / "kubernetes.yaml").read_text()
    preset = re.search(r"- --config\n +- (\w+)\n", text)
    nodes = re.search(r"--nnodes=(\d+)", text)
    ranks, gpus = re.search(r"--nproc-per-node=(\d+)", text), re.search(r"nvidia.com/gpu: (\d+)", text)
    assert preset and nodes and ranks and gpus
    assert ranks[1] == gpus[1]
    assert f"# ranks: {int(nodes[1]) * int(ranks[1])}\n" in (presets_folder() / f"{preset[1]}.toml").read_text()


@pytest.mark.parametrize("file", ["launch/quickstart.sh", "README.md"])
def test_launch_more_steps_are_offered_than_the_preset_takes_under_its_schedule(file: str) -> None:
    offered = re.search(
        r"--config debug .*--training\.steps (\d+) --lr_scheduler\.total_steps (\d+)$",
        (ROOT / file).read_text(),
        re.MULTILINE,
    )
    taken = re.search(r"^\[training\][^\[]*^steps = (\d+)", (presets_folder() / "debug.toml").read_text(), re.MULTILINE)
    assert offered and taken
    assert int(offered[1]) > int(offered[2]) == int(taken[1])


def test_launch_ci_runs_the_same_checks() -> None:
    assert (ROOT / ".ci/run").read_text().splitlines()[-1].startswith("exec bash ")
    assert "tools/test.sh" in (ROOT / ".ci/run").read_text()


# --- the virtual environment ------------------------------------------------------------------------------------------

FAKE_PYTHON = f"""
echo "$*" >> "{{log}}"
case "$*" in
  *"-m venv"*) mkdir -p "${{{{@: -1}}}}/bin"; cp "$0" "${{{{@: -1}}}}/bin/python" ;;
  *"-m pip"*) [ ! -e "{{log}}.pip-fails" ] ;;
  *version_info*) exec {sys.executable} "$@" ;;
esac
"""


class Checkout:
    """A folder with launch/venv.sh and a Python that only notes what it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "calls.log"
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, folder / name)
        write_command(folder / "bin/python3", FAKE_PYTHON.format(log=self.log))

    def set_up(self, extra: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        script = f'set -euo pipefail; root="{self.folder}"; . "{LAUNCH}/venv.sh"; set_up "{extra}"'
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        return subprocess.run(
            ["bash", "-c", script], env={"PATH": path, **environment}, capture_output=True, text=True, check=False
        )

    def installs(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if "-m pip install" in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize(("extra", "what"), [("", ""), ("dev", "[dev]")])
def test_launch_venv_installs_the_checkout_under_the_constraints(checkout: Checkout, extra: str, what: str) -> None:
    assert checkout.set_up(extra).returncode == 0
    [install] = checkout.installs()
    assert install.endswith(f"--constraint {checkout.folder}/constraints.txt --editable {checkout.folder}{what}")


@pytest.mark.parametrize(
    ("first", "second", "installs"), [("", "", 0), ("dev", "dev", 0), ("dev", "", 0), ("", "dev", 1)]
)
def test_launch_venv_installs_only_what_is_missing(checkout: Checkout, first: str, second: str, installs: int) -> None:
    checkout.set_up(first)
    assert checkout.set_up(second).returncode == 0
    assert len(checkout.installs()) == installs
    assert "-m venv" not in checkout.log.read_text()


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_launch_venv_installs_again_when_a_file_changed(checkout: Checkout, file: str) -> None:
    checkout.set_up("dev")
    (checkout.folder / file).write_text("# changed\n")
    checkout.set_up("dev")
    assert len(checkout.installs()) == 1


def test_launch_venv_installs_again_after_a_failure(checkout: Checkout) -> None:
    fails = Path(f"{checkout.log}.pip-fails")
    fails.touch()
    assert checkout.set_up("").returncode != 0
    fails.unlink()
    assert checkout.set_up("").returncode == 0
    assert len(checkout.installs()) == 1


def test_launch_venv_is_made_anew_in_a_moved_checkout(checkout: Checkout) -> None:
    checkout.set_up("")
    (checkout.folder / ".venv/cptrain-root").write_text("/elsewhere\n")
    checkout.set_up("")
    assert f"-m venv --clear {checkout.folder}/.venv" in checkout.log.read_text()


def test_launch_venv_is_made_anew_after_an_installation_that_was_killed(checkout: Checkout) -> None:
    checkout.set_up("")
    python = checkout.folder / ".venv/bin/python"
    working = python.read_text()
    write_command(python, '#!/bin/bash\ncase "$*" in *"pip install"*) kill -9 $PPID ;; esac\n')
    assert checkout.set_up("dev").returncode != 0
    write_command(python, working)
    assert checkout.set_up("dev").returncode == 0
    assert f"-m venv --clear {checkout.folder}/.venv" in checkout.log.read_text()
    assert not (checkout.folder / ".venv/cptrain-installing").exists()


def test_launch_venv_keeps_one_that_the_user_made(checkout: Checkout) -> None:
    write_command(checkout.folder / ".venv/bin/python", FAKE_PYTHON.format(log=checkout.log))
    checkout.set_up("")
    assert "-m venv" not in checkout.log.read_text()
    assert len(checkout.installs()) == 1


@pytest.mark.parametrize("named", [False, True])
def test_launch_venv_says_which_python_it_needs(checkout: Checkout, named: bool) -> None:
    old = checkout.folder / "old"
    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(11, 15))):
        write_command(
            old / name, f"exec {sys.executable} -c 'import sys; sys.version_info = (3, 10); exec(sys.argv[1])' \"$2\""
        )
    environment = {"PYTHON": str(old / "python3")} if named else {"PATH": f"{old}:/usr/bin:/bin"}
    result = checkout.set_up("", **environment)
    assert result.returncode == 1
    assert "Python 3.11" in result.stderr
    assert not (checkout.folder / ".venv").exists()


# --- Slurm ------------------------------------------------------------------------------------------------------------


class Slurm:
    """A folder of commands that stand for Slurm's, torchrun and python, and write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        commands = folder / ".venv/bin"
        write_command(
            commands / "scontrol",
            'case $1 in show) printf "node%s\\n" 1 2 3 4 ;; '
            f'*) echo "$* $(cd "{folder}"; ls saved)" >> "{folder}/scontrol" ;; esac',
        )
        write_command(commands / "python", f'echo "$@" >> "{folder}/python"; [[ "$*" != *wrong* ]]')
        write_command(
            commands / "srun", f'echo "$@" > "{folder}/srun"; while [[ $1 == -* ]]; do shift; done; exec "$@"'
        )
        # As torchrun does: passes the signal on, waits for its ranks, fails.
        write_command(
            commands / "torchrun",
            f'echo "$@" > "{folder}/torchrun"; [[ "$*" == *endless* ]] || exit 0\n'
            f"trap 'sleep 0.3; touch \"{folder}/saved\"; exit 1' USR1\n"
            f'touch "{folder}/ready"; while :; do sleep 0.1; done',
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(LAUNCH / "slurm.sbatch"), *arguments],
            env=os.environ | SLURM | {"SLURM_SUBMIT_DIR": str(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def calls(self, command: str) -> str:
        path = self.folder / command
        return path.read_text() if path.exists() else ""


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, what it wrote to stderr)"""
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


def test_launch_slurm_starts_a_rank_per_gpu_of_every_node(slurm: Slurm) -> None:
    assert finish(slurm.start("--config", "llama_1m", "--job.name", "x"))[0] == 0
    call = slurm.calls("torchrun")
    assert "--nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:20042" in call
    assert call.endswith("-m cptrain.train --config llama_1m --job.name x\n")


def test_launch_slurm_hands_the_cpus_of_the_job_to_its_step(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, options in (("64", "--wait=600 --cpus-per-task=64"), ("", "--wait=600")):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", cpus)
        assert finish(slurm.start("--config", "llama_1m"))[0] == 0
        assert slurm.calls("srun").startswith(f"{options} torchrun ")


def test_launch_slurm_checks_the_settings_first(slurm: Slurm) -> None:
    assert finish(slurm.start("--config", "wrong"))[0] != 0
    assert slurm.calls("python") == "-m cptrain.train --config wrong --dry-run --world-size 32\n"
    assert slurm.calls("torchrun") == ""


def test_launch_slurm_asks_what_to_train(slurm: Slurm) -> None:
    code, errors = finish(slurm.start())
    assert code == 2
    assert "--config NAME" in errors


def test_launch_slurm_waits_for_the_save_and_requeues_before_the_time_is_up(slurm: Slurm) -> None:
    job = slurm.start("--config", "endless")
    while not (slurm.folder / "ready").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    finish(job)
    assert slurm.calls("scontrol") == "requeue 42 saved\n"


def test_launch_slurm_does_not_requeue_a_finished_run(slurm: Slurm) -> None:
    finish(slurm.start("--config", "llama_1m"))
    assert slurm.calls("scontrol") == ""


def test_launch_slurm_lets_torchrun_hand_on_the_signal(slurm: Slurm) -> None:
    finish(slurm.start("--config", "llama_1m"))
    handled = re.search(r"--signals-to-handle (\S+)", slurm.calls("torchrun"))
    assert handled
    assert {"SIGUSR1", "SIGTERM"} <= set(handled[1].split(","))
