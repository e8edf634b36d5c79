"""deploy/slurm/job.sh holds what it promises: by itself, with the real program, and in a cluster if there is one.

Slurm's part is played as far as the script sees it: variables, signals, and a `scontrol` that writes down what it is
asked for. First a `python` that ends as told stands for the program, so that every way to end is tried in no time; then
the program itself works at a real PostgreSQL.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from support.database import TRACES
from support.deployment import QUICK, ROOT, TRIALS, Site, refused, site, text_of, tool

SCRIPT = "deploy/slurm/job.sh"
JOB = {"SLURM_JOB_ID": "45", "SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "1"}
STORAGE = {"SEARCH_STORAGE": "postgresql://search@nowhere/search"}

SBATCH = {
    "job-name": r"[\w-]+",
    "ntasks": "1",
    "cpus-per-task": r"\d+",
    "mem": r"\d+G",
    "gres": "gpu:1",
    "output": r"[\w%-]+\.log",
    "open-mode": "append",
    "requeue": "",
    "signal": r"B:USR1@\d+",
}
"""Options of sbatch since 17.11 at the latest, in the form that its manual gives. What a site decides is none of them:
partition, account, qos, time, constraint."""


def header() -> list[str]:
    """What sbatch reads: it stops at the first line that is neither empty nor a comment."""
    lines = text_of(SCRIPT).splitlines()
    end = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    return lines[:end]


def options() -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH ").split() for line in header() if line.startswith("#SBATCH")]
    pairs = [words[0].removeprefix("--").partition("=") for words in lines if len(words) == 1]
    assert len(pairs) == len(lines)
    return {name: value for name, _, value in pairs}


def examples() -> list[list[str]]:
    """What the comment tells to type, as the words after `sbatch` or `python -m search`."""
    lines = [line.removeprefix("#").strip() for line in header()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("sbatch ", "python "))]


class TestScript:
    def test_shellcheck_finds_nothing(self) -> None:
        done = subprocess.run([tool("shellcheck"), ROOT / SCRIPT], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout

    def test_sbatch_can_run_it(self) -> None:
        assert text_of(SCRIPT).startswith("#!/bin/bash\n")
        assert os.access(ROOT / SCRIPT, os.X_OK)

    def test_options_are_those_of_sbatch(self) -> None:
        assert set(options()) == set(SBATCH)
        for name, value in options().items():
            assert re.fullmatch(SBATCH[name], value), name
        assert text_of(SCRIPT).count("\n#SBATCH ") == len(SBATCH)  # sbatch sees all of them

    def test_it_hears_of_the_time_limit_early_enough(self) -> None:
        seconds = int(options()["signal"].partition("@")[2])
        assert seconds >= 60 + 30  # Slurm may be a minute late, `run` takes up to 15 s and then writes its summary

    def test_examples_are_in_the_command_line(self) -> None:
        commands = []
        for program, *words in examples():
            if program == "python":
                commands.append(words[2:])
                continue
            of_script = words[words.index(SCRIPT) + 1 :]
            commands.append([of_script[0], "--name=cifar10", *of_script[1:]])
        assert [words[0] for words in commands] == ["data", "run", "worker"]
        assert [refused(words) for words in commands] == ["", "", ""]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator["Desk"]:
    desk = Desk(tmp_path)
    yield desk
    for process in desk.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


STANDS_FOR_PYTHON = """#!/bin/bash
echo "$*" >> calls
case $3 in
  status) exit $(cat status 2>/dev/null || echo 0) ;;
  data) exit $(cat data 2>/dev/null || echo 0) ;;
esac
next=$(head -n 1 ends) && sed -i 1d ends
[[ $next == wait* ]] || exit "$next"
trap '/bin/sleep 0.3; exit ${next#wait}' TERM
touch waits
while :; do /bin/sleep 0.02; done
"""
"""Ends as the next line of the file `ends` says; `wait130`: with 130 on SIGTERM."""


class Desk:
    """A folder with programs that stand for others, and the script in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, list[subprocess.Popen[str]]()
        self.add("python", STANDS_FOR_PYTHON)
        self.add("scontrol", '#!/bin/bash\necho "$*" >> requeued\n')
        self.add("sleep", "#!/bin/bash\necho slept >> slept\n")

    def add(self, program: str, text: str) -> None:
        path = self.folder / program
        path.write_text(text)
        path.chmod(0o755)

    def tell(self, *ends: object) -> None:
        (self.folder / "ends").write_text("".join(f"{end}\n" for end in ends))

    def start(self, *words: str, **variables: str) -> "subprocess.Popen[str]":
        given = {"PATH": f"{self.folder}:{os.environ['PATH']}", **JOB, **STORAGE, **variables}
        self.started.append(
            subprocess.Popen(
                ["bash", ROOT / SCRIPT, *words],
                env={name: value for name, value in given.items() if value},
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return self.started[-1]

    def run(self, *words: str, **variables: str) -> tuple[int, str, str]:
        process = self.start(*words, **variables)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def until(self, name: str) -> None:
        deadline = time.monotonic() + 20
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def calls(self) -> list[str]:
        """What the program was called with: its command and the words behind it."""
        return [call.removeprefix("-m search ") for call in self.lines("calls")]

    @property
    def worked(self) -> int:
        return sum(call.startswith(("run", "worker")) for call in self.calls)


class TestWhatIsMissing:
    @pytest.mark.parametrize(
        ("words", "variables", "said"),
        [
            ([], {}, "say what to do"),
            (["status"], {}, "say what to do"),
            (["run"], {"SLURM_JOB_ID": ""}, "Slurm runs this: sbatch deploy/slurm/job.sh run"),
            (["run"], {"SEARCH_STORAGE": ""}, "set SEARCH_STORAGE="),
            (["worker"], {"SEARCH_STORAGE": "sqlite:///studies/search.db"}, "SEARCH_STORAGE must be postgresql://"),
        ],
    )
    def test_is_said_in_one_line(self, words: list[str], variables: dict[str, str], said: str, desk: Desk) -> None:
        desk.tell(0)
        status, out, err = desk.run(*words, **variables)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"job.sh: {said}")
        assert desk.calls == []

    def test_python_too(self, desk: Desk) -> None:
        bash = shutil.which("bash")
        assert bash
        done = subprocess.run(
            [bash, ROOT / SCRIPT, "run"],
            env={"PATH": str(desk.folder / "nowhere"), **JOB, **STORAGE},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "activate the environment" in done.stderr


class TestWhatIsCalled:
    def test_a_worker_waits_for_its_study(self, desk: Desk) -> None:
        desk.tell(0)
        assert desk.run("worker", "--max-trials=3")[0] == 0
        assert desk.calls == ["data --dataset=cifar10", "status --name=cifar10", "worker --name=cifar10 --max-trials=3"]
        assert not any(refused(shlex.split(call)) for call in desk.calls)

    def test_the_search(self, desk: Desk) -> None:
        desk.tell(0)
        assert desk.run("run", "--trials=9", STUDY_NAME="mine", DATASET="digits")[0] == 0
        assert desk.calls == ["data --dataset=digits", "run --name=mine --dataset=digits --trials=9"]
        assert not any(refused(shlex.split(call)) for call in desk.calls)

    def test_the_search_may_have_a_database_of_its_own(self, desk: Desk) -> None:
        desk.tell(0)
        assert desk.run("run", SEARCH_STORAGE="sqlite:///studies/search.db")[0] == 0

    def test_images_that_are_missing_end_it(self, desk: Desk) -> None:
        (desk.folder / "data").write_text("2")
        assert desk.run("worker")[0] == 2
        assert desk.calls == ["data --dataset=cifar10"]

    def test_a_study_that_never_comes_ends_it(self, desk: Desk) -> None:
        (desk.folder / "status").write_text("2")
        assert desk.run("worker")[0] == 2
        assert desk.calls.count("status --name=cifar10") == 60
        assert desk.lines("slept") == ["slept"] * 59
        assert desk.worked == 0

    def test_the_log_says_which_job_and_which_start_it_was(self, desk: Desk) -> None:
        desk.tell(0, 0)
        assert "job 42_3, start 1\n" in desk.run("worker")[1]
        alone = {"SLURM_ARRAY_JOB_ID": "", "SLURM_ARRAY_TASK_ID": "", "SLURM_RESTART_COUNT": "2"}
        assert "job 45, start 3\n" in desk.run("run", **alone)[1]

    def test_that_job_goes_back_into_the_queue_and_no_other(self, desk: Desk) -> None:
        """The number of the whole array is that of one of its tasks, too."""
        for variables in ({"SLURM_JOB_ID": "42"}, {"SLURM_ARRAY_JOB_ID": "", "SLURM_ARRAY_TASK_ID": ""}):
            desk.tell("wait130")
            process = desk.start("worker", **variables)
            desk.until("waits")
            (desk.folder / "waits").unlink()
            process.send_signal(signal.SIGUSR1)
            process.communicate(timeout=20)
        assert desk.lines("requeued") == ["requeue 42_3", "requeue 45"]


class TestEnds:
    @pytest.mark.parametrize(
        ("ends", "status", "starts"),
        [
            ([0], 0, 1),
            ([2], 2, 1),
            ([130], 130, 1),
            ([143], 143, 1),
            ([1, 137, 0], 0, 3),
            ([137, 2], 2, 2),
            ([1, 1, 139], 139, 3),
        ],
    )
    def test_by_itself(self, ends: Sequence[int], status: int, starts: int, desk: Desk) -> None:
        desk.tell(*ends)
        assert desk.run("worker")[0] == status
        assert desk.worked == starts
        assert desk.lines("requeued") == []

    @pytest.mark.parametrize("command", ["run", "worker"])
    def test_near_the_time_limit_it_goes_back_into_the_queue(self, command: str, desk: Desk) -> None:
        desk.tell("wait130")
        process = desk.start(command)
        desk.until("waits")
        process.send_signal(signal.SIGUSR1)  # `B:` in --signal: to the script alone
        out, _ = process.communicate(timeout=20)
        assert (process.returncode, desk.worked, desk.lines("requeued")) == (130, 1, ["requeue 42_3"])
        assert "back into the queue" in out

    @pytest.mark.parametrize("all_of_them", [False, True])
    def test_stopped_it_leaves_the_rest_to_slurm(self, all_of_them: bool, desk: Desk) -> None:
        desk.tell("wait130")
        process = desk.start("worker")
        desk.until("waits")
        if all_of_them:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        process.communicate(timeout=20)
        assert (process.returncode, desk.worked, desk.lines("requeued")) == (130, 1, [])

    def test_signals_in_a_row_change_nothing(self, desk: Desk) -> None:
        """`scontrol requeue` itself ends in a SIGTERM, and the limit's signal may come together with a preemption's."""
        desk.tell("wait130")
        process = desk.start("worker")
        desk.until("waits")
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            process.send_signal(number)
            time.sleep(0.05)
        process.communicate(timeout=20)
        assert (process.returncode, desk.worked, desk.lines("requeued")) == (130, 1, ["requeue 42_3"])

    def test_done_near_the_time_limit_is_done(self, desk: Desk) -> None:
        desk.tell("wait0")
        process = desk.start("worker")
        desk.until("waits")
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=20)
        assert (process.returncode, desk.lines("requeued")) == (0, [])

    def test_a_crash_on_the_way_out_goes_back_into_the_queue_at_once(self, desk: Desk) -> None:
        desk.tell("wait1", 0)
        process = desk.start("worker")
        desk.until("waits")
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=20)
        assert (process.returncode, desk.worked, desk.lines("requeued")) == (1, 1, ["requeue 42_3"])

    def test_while_it_waits_for_its_study(self, desk: Desk) -> None:
        (desk.folder / "status").write_text("2")
        desk.add("sleep", "#!/bin/bash\ntouch waits\nexec /bin/sleep 60\n")
        process = desk.start("worker")
        desk.until("waits")
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=20)
        assert (process.returncode, desk.worked, desk.lines("requeued")) == (130, 0, ["requeue 42_3"])


class Slurm(Site):
    """Array tasks of the script, with real work."""

    def submit(self, log: str, *words: str, task: int = 0, restarts: int = 0) -> "subprocess.Popen[bytes]":
        """Start the script as slurmd does."""
        programs = self.home / "programs"
        programs.mkdir(exist_ok=True)
        scontrol = programs / "scontrol"
        scontrol.write_text(f'#!/bin/bash\necho "$*" >> {shlex.quote(str(self.home))}/requeued\n')
        scontrol.chmod(0o755)
        given = {
            **self.given(),
            "PATH": f"{programs}:{self.given()['PATH']}",
            "SLURM_JOB_ID": str(100 + task),
            "SLURM_CPUS_PER_TASK": "1",
            **({"SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": str(task)} if task else {}),
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        }
        return self.spawn(log, ["bash", str(ROOT / SCRIPT), *words], given)

    def given(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**self.access(), "PATH": path, "DATASET": "digits"}

    @property
    def requeued(self) -> list[str]:
        file = self.home / "requeued"
        return file.read_text().splitlines() if file.exists() else []

    def ask(self, *words: str) -> str:
        """What one of Slurm's own commands says."""
        status, text = self.call("slurm", words, self.given())
        assert status == 0, text
        return text

    def sbatch(self, *words: str) -> str:
        """The number of a job in the real cluster, which may have no GPU."""
        return self.ask("sbatch", "--parsable", "--gres=none", "--cpus-per-task=1", "--mem=2G", *words).strip()

    def state(self, job: str) -> tuple[str, int]:
        """Of a job, or of one task of an array; and how often it was requeued."""
        shown = self.ask("scontrol", "show", "job", job)
        (state,), (restarts,) = re.findall(r"JobState=(\w+)", shown), re.findall(r"Restarts=(\d+)", shown)
        return state, int(restarts)


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    with site(Slurm) as here:
        yield here


@pytest.mark.slow
class TestWork:
    @pytest.mark.timeout(600)
    def test_a_study_whose_workers_meet_the_time_limit_and_a_preemption(self, slurm: Slurm) -> None:
        # As an array may be: there before the study.
        limited, preempted = (slurm.submit(f"worker {task}", "worker", task=task) for task in (1, 2))
        # Trials of a second or so: a fast machine is done with shorter ones before `status` has looked at a worker.
        longer = (*QUICK, "--train-images=1000")
        search = slurm.submit("search", "run", "--study=cpu", f"--trials={TRIALS}", *longer)
        slurm.until(lambda: slurm.works(limited) or limited.poll() is not None)
        lines = slurm.command_lines()
        assert not any(trace in lines for trace in TRACES)
        assert "--storage" not in lines

        begun = time.monotonic()
        limited.send_signal(signal.SIGUSR1)
        assert limited.wait(timeout=30) == 130
        assert time.monotonic() - begun < 12
        assert slurm.requeued == ["requeue 100_1"]
        again = slurm.submit("worker 1", "worker", task=1, restarts=1)

        slurm.until(lambda: slurm.works(preempted) or preempted.poll() is not None)
        os.killpg(preempted.pid, signal.SIGTERM)
        assert preempted.wait(timeout=30) == 130
        assert slurm.requeued == ["requeue 100_1"]

        assert search.wait(timeout=300) == 0, slurm.said("search")
        assert again.wait(timeout=100) == 0, slurm.said("worker 1")
        slurm.check_budget_is_exact()
        assert (slurm.work / "studies" / "cifar10" / "best" / "model.safetensors").exists()
        assert "start 1\n" in slurm.said("worker 1")
        assert "start 2\n" in slurm.said("worker 1")
        assert slurm.said("worker 1").count("interrupted; nothing stored is lost") == 1
        slurm.check_password_is_nowhere()

    def test_a_wrong_password_is_said_and_nothing_is_requeued(self, slurm: Slurm) -> None:
        slurm.password_file = slurm.home / "other"
        slurm.password_file.write_text("another one")
        process = slurm.submit("search", "run")
        assert process.wait(timeout=100) == 2
        assert "password authentication failed" in slurm.said("search")
        assert "another one" not in slurm.said("search")
        assert slurm.requeued == []


def cluster_is_missing() -> str:
    """Why nothing can be tried in a real cluster; empty if it can."""
    if shutil.which("sbatch") is None:
        return "Slurm is not installed"
    nodes = subprocess.run(["sinfo", "--noheader", "--format=%n"], capture_output=True, text=True, check=False)
    if set(nodes.stdout.split()) != {socket.gethostname().partition(".")[0]}:
        return "there is no Slurm cluster of this machine alone; the test's database listens on 127.0.0.1"
    return ""


@pytest.mark.slow
class TestCluster:
    @pytest.mark.timeout(600)
    def test_an_array_with_a_task_that_is_requeued_and_one_that_is_cancelled(self, slurm: Slurm) -> None:
        if missing := cluster_is_missing():
            pytest.skip(missing)
        script = str(ROOT / SCRIPT)
        quick = ("--study=cpu", f"--trials={TRIALS}", *QUICK[:2])
        jobs = [slurm.sbatch(script, "run", *quick, "--workers=0", "--no-finale")]
        try:
            jobs.append(slurm.sbatch("--array=1-2", script, "worker"))
            requeued, cancelled = f"{jobs[1]}_1", f"{jobs[1]}_2"

            def both_work() -> bool:
                status, text = slurm.stated()
                return status == 0 and [one["state"] for one in json.loads(text)["workers"]] == ["working"] * 2

            slurm.until(both_work)
            slurm.ask("scontrol", "requeue", requeued)
            slurm.ask("scancel", cancelled)
            slurm.until(lambda: slurm.state(requeued) == ("PENDING", 1))
            slurm.until(lambda: slurm.state(cancelled) == ("CANCELLED", 0))
            budget = slurm.status()["budget"]
            assert (budget["running"], budget["failed_attempts"] <= 2) == (0, True)
            assert budget["waiting"] > 0

            jobs.append(slurm.sbatch("--array=3", script, "worker"))
            for job in (jobs[0], f"{jobs[2]}_3"):
                slurm.until(lambda job=job: slurm.state(job)[0] == "COMPLETED", 200)
            slurm.check_budget_is_exact()
            slurm.until(lambda: slurm.state(requeued) == ("COMPLETED", 1), 200)  # Slurm waits two minutes before that
            said = "".join(path.read_text() for path in slurm.work.glob("block-search-*.log"))
            assert said.count("interrupted; nothing stored is lost") == 2
            assert "worker of study cifar10" in said
            assert f"job {requeued}, start 2\n" in said
            assert not any(trace in said for trace in TRACES)
        finally:
            slurm.ask("scancel", *jobs)
