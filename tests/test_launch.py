"""Launch: the files run as they stand, in a real shell, and what can't run isn't written."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import BPE

from espalier import files, launch, planner, recipe, records
from espalier.budget import hardware
from espalier.errors import BudgetError, RecipeError
from espalier.launch import Job
from espalier.pipeline import PretrainRecipe
from espalier.run import FINAL, STATE
from espalier.train.parallel import Parallel
from espalier.world import World

SETTINGS = {"setup": "", "command": "espalier"}
STORAGE = "s3://runs"


@pytest.fixture
def job(recipe_file):
    """The tiny recipe with overrides, on a row of the catalogue."""

    def job(*overrides: str, key: str = "h100-80g", **settings: object) -> Job:
        resolved = recipe.load(PretrainRecipe, recipe_file, list(overrides))
        return Job.of(resolved, key, **SETTINGS | settings)

    return job


@pytest.fixture
def cloud_job(job):
    """A job of which all data is on every machine."""
    return lambda *overrides, **settings: job("data.sources=stdlib", *overrides, **settings)


def script(job: Job, folder: Path, **settings) -> str:
    return launch.slurm(job, folder, runs=settings.pop("runs", folder), **settings)


def directives(text: str) -> dict[str, str]:
    """The options that sbatch reads: up to the first command."""
    head = re.match(r"(?:#.*\n)*", text)[0]
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", head, re.MULTILINE))


def seconds(limit: str) -> int:
    days, clock = limit.split("-")
    hours, minutes, rest = map(int, clock.split(":"))
    return ((int(days) * 24 + hours) * 60 + minutes) * 60 + rest


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


class Cluster:
    """A shell with a Slurm of which srun starts its command and says by which process, and scontrol takes notes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tools = folder, folder / "tools"
        executable(self.tools / "srun", f'echo $$ > {folder}/pid\necho "$1" >> {folder}/srun\nshift\nexec "$@"')
        executable(self.tools / "scontrol", f'echo "$@" >> {folder}/scontrol')

    def start(self, text: str, *, restarts: int = 0) -> subprocess.Popen:
        path = self.folder / "job.sbatch"
        path.write_text(text)
        environment = os.environ | {
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "n[3-4]",
            "SLURM_RESTART_COUNT": str(restarts),
            "HF_HUB_OFFLINE": "1",
        }
        (self.folder / "pid").unlink(missing_ok=True)
        with (self.folder / "log").open("w") as log:
            return subprocess.Popen(["bash", str(path)], env=environment, stdout=log, stderr=log)

    def step(self) -> int:
        """The process of the job's step, once there is one."""
        end = time.monotonic() + 10
        while not (pid := self.read("pid").strip()):
            assert time.monotonic() < end
            time.sleep(0.002)
        return int(pid)

    @property
    def requeued(self) -> list[str]:
        return self.read("scontrol").splitlines()

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


def test_a_run_is_saved_requeued_and_goes_on(cluster, job, finished, logged_steps, shared_home, monkeypatch, tmp_path):
    """The real thing, in processes of its own: SIGTERM to the step, as Slurm sends it, then the second attempt."""
    monkeypatch.setenv("ESPALIER_HOME", str(shared_home))
    one = job(command=f"{shlex.quote(sys.executable)} -m espalier")
    text = script(one, tmp_path)
    one.write(tmp_path, ".sbatch", text)
    run = tmp_path / "tiny"

    first = cluster.start(text)
    step, end = cluster.step(), time.monotonic() + 60
    while logged_steps(run) < 3:
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    os.kill(step, signal.SIGTERM)
    assert first.wait(60) == 143 and "SIGTERM: saving" in cluster.read("log")
    assert cluster.requeued == ["requeue 42"]
    assert records.read(run / STATE, None)["status"] == "stopped"

    second = cluster.start(text, restarts=1)
    assert second.wait(60) == 0 and "Resumed at step" in cluster.read("log")
    assert cluster.requeued == ["requeue 42"]
    assert records.read(run / STATE, None)["status"] == "finished" and (run / FINAL).is_dir()


@pytest.mark.parametrize("code, ended", [(0, 0), (10, 0), (1, 1), (2, 2), (5, 5), (8, 8), (130, 130), (137, 137)])
def test_a_spent_budget_is_success_and_an_error_keeps_its_code(cluster, job, tmp_path, code, ended):
    executable(cluster.tools / "espalier", f"exit {code}")
    done = cluster.start(script(job(), tmp_path))
    assert done.wait(10) == ended and cluster.requeued == []


@pytest.mark.parametrize("restarts", [0, 1, 3])
def test_a_job_goes_on_as_often_as_was_said(cluster, job, tmp_path, restarts):
    executable(cluster.tools / "espalier", "kill -TERM $$")
    text = script(job(), tmp_path, restarts=restarts)
    for attempt in range(restarts + 2):
        assert cluster.start(text, restarts=attempt).wait(10) == 143
        assert len(cluster.requeued) == min(attempt + 1, restarts)


def test_a_job_that_is_cancelled_is_not_requeued(cluster, job, tmp_path):
    """`scancel` signals the script as well as the step."""
    executable(cluster.tools / "espalier", "exec sleep 20")
    shell = cluster.start(script(job(), tmp_path))
    step = cluster.step()
    for process in (shell.pid, step):
        os.kill(process, signal.SIGTERM)
    assert shell.wait(10) == -signal.SIGTERM
    assert cluster.requeued == []


def test_the_setup_comes_first_and_its_failure_ends_the_job(cluster, job, tmp_path):
    executable(cluster.tools / "espalier", 'echo "made ready: $READY"')
    good = cluster.start(script(job(setup="export READY=yes"), tmp_path))
    assert good.wait(10) == 0 and cluster.read("log") == "made ready: yes\n"
    (cluster.folder / "srun").unlink()
    bad = cluster.start(script(job(setup="(exit 7)"), tmp_path))
    assert bad.wait(10) == 7 and not (cluster.folder / "srun").exists()


def test_strange_folders_reach_the_run_whole(cluster, job, tmp_path, monkeypatch):
    strange = tmp_path / "it's a $HOME; really"
    strange.mkdir()
    monkeypatch.chdir(strange)
    said = tmp_path / "said"
    executable(cluster.tools / "espalier", f'pwd > {said}; printf "%s\\n" "$@" >> {said}')
    one, runs = job(), tmp_path / "runs"
    assert cluster.start(script(one, Path("out"), runs=runs)).wait(10) == 0
    file = strange / "out" / "tiny.recipe.yaml"
    assert said.read_text().splitlines() == [str(strange), "run", str(file), "--runs", str(runs)]
    assert one.write(Path("out"), ".sbatch", "") == Path("out/tiny.sbatch") and file.exists()


def test_the_script_is_sound_and_asks_for_the_machine(cluster, job, tmp_path):
    one = job(cpus=6, memory=20)
    text = script(one, tmp_path, gres="gpu:h100", partition="large", account="ml")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    stated = directives(text)
    assert stated["signal"] == "TERM@300" and stated["open-mode"] == "append" and "requeue" in stated
    assert stated["output"] == f"{tmp_path}/tiny-%j.log"
    wanted = {"cpus-per-task": "6", "mem": "20G", "gres": "gpu:h100:1", "partition": "large", "account": "ml"}
    assert stated.items() >= wanted.items()
    executable(cluster.tools / "espalier", "")
    cluster.start(text).wait(10)
    assert (tmp_path / "srun").read_text() == "--cpus-per-task=6\n"
    plain = directives(script(job(), tmp_path))
    assert plain["gres"] == "gpu:1" and not {"partition", "account"} & plain.keys()


def test_processors_are_asked_for_as_the_row_has_them_or_as_stated(job, tmp_path):
    rows = hardware.catalogue(files.home())
    whole, two = job(key="epyc-9654"), job("budget.usd=1", key="vcpu", cpus=2, memory=9)
    assert "gres" not in directives(script(whole, tmp_path))
    assert whole.cpus == rows["epyc-9654"].count and two.row.count == 2
    assert two.row.usd_per_hour == pytest.approx(2 * rows["vcpu"].usd_per_hour)
    assert (two.memory, two.row.memory_bytes) == (9, 9e9)


@pytest.mark.parametrize("hours", [0.01, 0.4, 5, 30, 400])
def test_the_time_limit_holds_the_budget_its_margin_and_the_notice(job, tmp_path, hours):
    for margin, notice in ((0, 60), (0.25, 300), (1, 1000)):
        text = script(job(f"budget.hours={hours}"), tmp_path, margin=margin, notice=notice, restarts=0)
        least = hours * 3600 * (1 + margin) + notice + launch.EARLY
        assert least <= seconds(directives(text)["time"]) < least + 60


def test_money_and_energy_limit_time_as_hours_do(job):
    row = hardware.catalogue(files.home())["h100-80g"]
    by_time = job("budget.hours=2")
    for limit in (f"budget.usd={2 * row.usd_per_hour}", f"budget.kwh={2 * row.watts / 1000}"):
        assert job(limit).seconds == pytest.approx(by_time.seconds) == pytest.approx(7200)
    assert by_time.usd == pytest.approx(2 * row.usd_per_hour) and by_time.basis == "budget"
    assert job("budget.usd=2", "budget.usd_per_hour=4").seconds == pytest.approx(1800)
    assert job("budget.hours=3", "budget.usd=1").usd == pytest.approx(1), "the first one reached"


def test_without_a_limit_of_time_the_stages_are_estimated(job):
    one = job("budget.flops=1e18")
    work = planner.estimate(one.recipe, planner.at_prices(one.recipe, one.row)).total.flops
    rate = one.row.peak_flops["bfloat16"] * hardware.USUAL_MFU
    assert one.seconds == pytest.approx(work / rate) and one.basis == "estimated"
    longer = job("stages.0.duration=12800 tokens", "stages.1.duration=12800 tokens")
    assert longer.seconds == pytest.approx(10 * one.seconds)
    with pytest.raises(BudgetError, match="a budget that has no limit"):
        job("stages.0.duration=50%", "stages.1.duration=50%")


def test_several_devices_cost_more_a_second_and_take_less_time(job):
    one, four = job("budget.flops=1e18"), job("budget.flops=1e18", devices=2, nodes=2)
    assert four.seconds == pytest.approx(one.seconds / 4) and four.usd == pytest.approx(one.usd)
    assert job("budget.usd=8", devices=4).seconds == pytest.approx(job("budget.usd=8").seconds / 4)
    assert (four.cpus, four.processes, four.nodes) == (2 * one.cpus, 2, 2)


def test_what_does_not_fit_one_device_may_fit_several(job):
    large = ("stages.1.hidden_size=2048", "stages.1.num_hidden_layers=48")
    with pytest.raises(BudgetError, match="memory"):
        job(*large, key="t4")
    with pytest.raises(BudgetError, match="each of 2 ranks"):
        job(*large, key="t4", devices=2)
    assert job(*large, key="t4", devices=4).ranks == job(*large, key="t4", devices=2, nodes=2).ranks == 4


def test_what_each_device_holds_is_priced_as_the_recipe_shares_the_model(job):
    large = ("stages.1.hidden_size=2048", "stages.1.num_hidden_layers=48")
    with pytest.raises(BudgetError, match="each of 4 ranks"):
        job(*large, "train.parallel.shard=2", key="t4", devices=4)  # two copies, of two shards each
    assert job(*large, "train.parallel.tensor=2", key="t4", devices=4).ranks == 4
    asked = [job(*large, f"train.parallel.shard={shard}", devices=4).memory for shard in (1, 2, 4)]
    assert asked[0] > asked[1] > asked[2], "RAM to be asked for"


def test_a_job_is_refused_where_its_run_would_be(job):
    """Not only when its machines have been waited for."""
    stated = ("stages.1.hidden_size=2048", "stages.1.num_hidden_layers=48", "train.parallel.shard=2")
    resolved = job(*stated, devices=4).recipe
    for key in ("t4", "l4", "a100-40g"):
        row = hardware.named(key, home=files.home()).part(4)
        parallel = Parallel(World(0, 4, 0, 4), 2, 2)
        try:
            planner.require_memory_of_ranks(resolved, row, parallel)
        except BudgetError as refusal:
            with pytest.raises(BudgetError) as refused:
                job(*stated, key=key, devices=4)
            assert str(refused.value) == str(refusal)
        else:
            job(*stated, key=key, devices=4)


def test_rows_that_cannot_be_dealt_out_are_refused(job):
    with pytest.raises(RecipeError, match="a multiple of 3"):
        job(devices=3)
    assert job("train.parallel.tensor=2", "stages.1.hidden_size=64", devices=8).ranks == 8, "a group has the same rows"
    with pytest.raises(RecipeError, match=r"train\.parallel\.tensor"):
        job("train.parallel.tensor=2", devices=1, nodes=2)
    with pytest.raises(RecipeError, match="--nodes"):
        job(key="epyc-9654", devices=2)


@pytest.mark.parametrize("devices, nodes", [(4, 1), (1, 2), (2, 2)])
def test_every_node_starts_its_processes_and_knows_where_to_meet(cluster, job, tmp_path, devices, nodes):
    one = job(devices=devices, nodes=nodes)
    text = script(one, tmp_path, restarts=5, notice=120)
    stated = directives(text)
    assert stated["nodes"] == str(nodes) and stated["ntasks-per-node"] == "1" and stated["gres"] == f"gpu:{devices}"
    hosts = '[ "$1 $2 $3" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"'
    executable(cluster.tools / "scontrol", hosts)
    executable(cluster.tools / "espalier", f'printf "%s\\n" "$@" > {tmp_path}/said; exit 10')
    assert cluster.start(text, restarts=2).wait(10) == 0
    meeting = ["--nodes", "2", "--meet", "n3:20042", "--job", "42-2"] if nodes > 1 else []
    file = str(tmp_path / "tiny.recipe.yaml")
    said = ["launch", "here", file, "--runs", str(tmp_path), "--processes", str(devices), *meeting]
    assert (tmp_path / "said").read_text().splitlines() == [*said, "--max-restarts", "5", "--grace", "120"]


def test_what_cannot_run_there_is_refused(job):
    with pytest.raises(RecipeError, match="Did you mean 'h100-80g'"):
        job(key="h100-80")
    with pytest.raises(BudgetError, match="memory"):
        job("stages.1.hidden_size=40960", "stages.1.num_hidden_layers=64", key="t4")
    with pytest.raises(BudgetError, match="memory"):
        job(key="vcpu", memory=0.1)


def test_a_limit_too_short_for_the_run_is_refused_and_its_mend_helps(job, tmp_path):
    ten = job("budget.hours=10")
    with pytest.raises(BudgetError) as refused:
        script(ten, tmp_path, hours=0.5, restarts=3)
    enough = int(re.search(r"--restarts (\d+)", refused.value.mend)[1])
    assert enough + 1 == math.ceil(36_000 / (1800 - 300 - launch.EARLY))
    with pytest.raises(BudgetError):
        script(ten, tmp_path, hours=0.5, restarts=enough - 1)
    assert directives(script(ten, tmp_path, hours=0.5, restarts=enough))["time"] == "0-00:30:00"
    with pytest.raises(BudgetError, match="time to train"):
        script(ten, tmp_path, hours=0.1, notice=300)


@pytest.mark.parametrize("name", ["partition", "account", "gres", "output"])
def test_a_value_that_sbatch_would_cut_is_refused(job, tmp_path, name):
    settings = {"runs": tmp_path / "my runs"} if name == "output" else {name: "a\n#SBATCH --nodes=9"}
    with pytest.raises(RecipeError, match=f"--{name}"):
        script(job(), tmp_path, **settings)


def test_the_task_is_one_that_skypilot_reads(cloud_job, tmp_path):
    text = launch.skypilot(
        cloud_job("name='12_'", cpus=4, memory=20, setup="pip install x\npip check"),
        tmp_path,
        storage=STORAGE,
        infra="aws/us-east-1",
        use_spot=True,
        max_hourly_cost=3.5,
    )
    task = yaml.safe_load(text)
    assert task["name"] == "12" and task["setup"] == "pip install x\npip check"
    assert task["resources"] == {
        "infra": "aws/us-east-1",
        "accelerators": "H100:1",
        "cpus": "4+",
        "memory": "20+",
        "use_spot": True,
        "max_hourly_cost": 3.5,
        "job_recovery": {"recover_on_exit_codes": [143]},
    }
    assert task["file_mounts"] == {
        "~/12_.recipe.yaml": str(tmp_path / "12_.recipe.yaml"),
        "/espalier": {"source": STORAGE, "mode": "MOUNT_CACHED"},
    }
    assert not {"workdir", "volumes"} & task.keys()


@pytest.mark.parametrize("code, ended", [(0, 0), (10, 0), (1, 1), (8, 8), (143, 143)])
def test_the_task_runs_and_says_how_it_ended(cloud_job, tmp_path, code, ended):
    task = yaml.safe_load(launch.skypilot(cloud_job(), tmp_path, storage=STORAGE))
    executable(tmp_path / "tools" / "espalier", f'printf "%s\\n" "$@"\nexit {code}')
    environment = os.environ | {"PATH": f"{tmp_path}/tools:{os.environ['PATH']}", "HOME": "/home/sky"}
    done = subprocess.run(["bash", "-c", task["run"]], env=environment, capture_output=True, text=True)
    assert done.returncode == ended
    assert done.stdout.split() == ["run", "/home/sky/tiny.recipe.yaml", "--runs", "/espalier/runs"]


def test_the_machines_of_a_task_meet_at_the_first(cloud_job, tmp_path):
    two = cloud_job(devices=2, nodes=2)
    with pytest.raises(RecipeError, match="a volume that all machines share"):
        launch.skypilot(two, tmp_path, storage=STORAGE)
    task = yaml.safe_load(launch.skypilot(two, tmp_path, storage="my-volume"))
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:2"
    executable(tmp_path / "tools" / "espalier", 'echo "$@"\nexit 10')
    path = {"PATH": f"{tmp_path}/tools:{os.environ['PATH']}", "HOME": "/home/sky"}
    cloud = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_TASK_ID": "sky-1"}
    done = subprocess.run(["bash", "-c", task["run"]], env=os.environ | path | cloud, capture_output=True, text=True)
    assert done.returncode == 0 and "--processes 2 --nodes 2 --meet 10.0.0.7:29500 --job sky-1" in done.stdout


def test_a_volume_is_mounted_where_a_bucket_would_be(cloud_job, tmp_path):
    task = yaml.safe_load(launch.skypilot(cloud_job(), tmp_path, storage="my-volume"))
    assert task["volumes"] == {"/espalier": "my-volume"} and list(task["file_mounts"]) == ["~/tiny.recipe.yaml"]


def test_every_gpu_has_a_name_or_has_to_be_given_one(cloud_job, tmp_path):
    rows = hardware.catalogue(files.home())
    assert launch.ACCELERATORS.keys() <= rows.keys()
    for key, row in rows.items():
        one = cloud_job(key=key)
        if row.kind == "cuda" and key not in launch.ACCELERATORS:
            with pytest.raises(RecipeError, match="--accelerator"):
                launch.skypilot(one, tmp_path, storage=STORAGE)
        stated = yaml.safe_load(launch.skypilot(one, tmp_path, storage=STORAGE, accelerator="Mine"))["resources"]
        assert stated.get("accelerators") == ("Mine:1" if row.kind == "cuda" else None)


def test_files_that_the_machine_lacks_are_refused(job, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")

    def task(*overrides: str, workdir: Path | None) -> dict:
        return yaml.safe_load(launch.skypilot(job(*overrides), tmp_path, storage=STORAGE, workdir=workdir))

    assert task("data.sources=[texts,'hub:a/b',stdlib]", workdir=tmp_path)["workdir"] == str(tmp_path)
    for path, workdir in (("texts", None), ("others", tmp_path), (tmp_path / "texts", tmp_path), ("~/x", tmp_path)):
        with pytest.raises(RecipeError, match=re.escape(f"found {path}, a file")):
            task(f"data.sources={json.dumps(['stdlib', str(path)])}", workdir=workdir)


def test_a_tokenizer_is_a_file_too(job, tmp_path):
    Tokenizer(BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RecipeError, match=re.escape(f"found {tmp_path}, a file")):
        one = job("data.sources=stdlib", f"data.tokenizer={tmp_path}")
        launch.skypilot(one, tmp_path, storage=STORAGE, workdir=tmp_path)
