"""The Kubernetes manifests hold what they promise, as far as that shows without a cluster.

They are looked at three times: as their files stand, and as `kubectl kustomize` (which needs no cluster) puts them
together with GPUs and without. They are checked against Kubernetes' own schemas, which kubernetes-validate carries;
what one refers to must be in another; commands are parsed by the real command line. At the end the pods run as
processes, in the order that a cluster holds them to, against a real PostgreSQL.
"""

import copy
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from sqlalchemy.engine import URL, make_url

from search.launch.local import LEAVE_SECONDS
from support.database import TRACES
from support.deployment import (
    QUICK,
    ROOT,
    TRIALS,
    Site,
    entrypoint,
    free_port,
    instructions,
    postgres_tool,
    refused,
    site,
    text_of,
)

FOLDER = "deploy/kubernetes"
OLDEST = "1.31"
"""That the kustomization names: elastic indexed jobs and pod failure policies are stable since then."""
PROGRAM = "app.kubernetes.io/name"
COMPONENT = "app.kubernetes.io/component"

Object = dict[str, Any]


def loaded(file: str) -> list[Object]:
    return list(yaml.safe_load_all(text_of(f"{FOLDER}/{file}")))


(KUSTOMIZATION,) = loaded("base/kustomization.yaml")


def from_files() -> list[Object]:
    """The base as kustomize puts it together, for as much of its rules as it needs."""
    objects = [item for file in KUSTOMIZATION["resources"] for item in loaded(f"base/{file}")]
    for made in KUSTOMIZATION["configMapGenerator"]:
        data = dict(literal.split("=", 1) for literal in made["literals"])
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": made["name"]}, "data": data})
    for made in KUSTOMIZATION["secretGenerator"]:
        data = dict.fromkeys(made["files"], "dGhlLXBhc3N3b3JkCg==")
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": made["name"]}, "data": data}
        objects.append({**secret, "type": "Opaque"})
    for item in objects:
        item["metadata"].setdefault("labels", {}).update(KUSTOMIZATION["labels"][0]["pairs"])
    return objects


def kustomize(folder: str, password: str | None, scratch: Path) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl, which puts the manifests together, is not installed")
    copy = shutil.copytree(ROOT / FOLDER, scratch / "kubernetes", ignore=shutil.ignore_patterns("password"))
    if password is not None:
        (copy / "base" / "password").write_text(f"{password}\n")
    return subprocess.run([program, "kustomize", copy / folder], capture_output=True, text=True, check=False)


def rendered(folder: str, scratch: Path) -> list[Object]:
    done = kustomize(folder, "the-password", scratch)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


class Manifests:
    """Objects by what others call them."""

    def __init__(self, objects: list[Object]) -> None:
        self.objects = objects

    def of(self, kind: str) -> dict[str, Object]:
        chosen = [item for item in self.objects if item["kind"] == kind]
        named = {item["metadata"]["name"]: item for item in chosen}
        assert len(named) == len(chosen)
        return named

    @property
    def workloads(self) -> dict[str, Object]:
        return {name: item for kind in ("StatefulSet", "Deployment", "Job") for name, item in self.of(kind).items()}

    @property
    def pods(self) -> dict[str, Object]:
        return {name: item["spec"]["template"] for name, item in self.workloads.items()}

    def containers(self) -> Iterator[tuple[str, Object, Object]]:
        """A name, the container, its pod."""
        for name, pod in self.pods.items():
            for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
                yield f"{name}/{container['name']}", container, pod["spec"]

    def of_program(self) -> Iterator[tuple[str, Object, Object]]:
        for name, container, pod in self.containers():
            if container["image"].partition(":")[0] == "block-search":
                yield name, container, pod

    def environment(self, container: Object) -> dict[str, str]:
        """What a container finds, as the cluster makes it."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            found |= self.of("ConfigMap")[source["configMapRef"]["name"]]["data"]
        for item in container.get("env", []):
            if "value" in item:
                found[item["name"]] = re.sub(r"\$\((\w+)\)", lambda name: found[name[1]], item["value"])
            elif field := item["valueFrom"].get("fieldRef"):
                assert field["fieldPath"] == "metadata.name"
                found[item["name"]] = "worker-0-abcde"
            else:
                part, _, what = item["valueFrom"]["resourceFieldRef"]["resource"].partition(".")
                found[item["name"]] = container["resources"][part][what]
        return found

    def words(self, container: Object, environment: dict[str, str] | None = None) -> list[str]:
        """Command and arguments with `$(NAME)` replaced."""
        known = self.environment(container) if environment is None else environment
        words = [*container.get("command", ["python", "-m", "search"]), *container.get("args", [])]
        return [re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], word) for word in words]


@pytest.fixture(scope="module", params=["files", "base", "cpu"])
def manifests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    if request.param == "files":
        return Manifests(from_files())
    return Manifests(rendered(request.param, tmp_path_factory.mktemp("rendered")))


def chosen(labels: Object, selector: Object) -> bool:
    return bool(selector) and selector.items() <= labels.items()


class TestManifests:
    @pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
    def test_fit_kubernetes_schemas(self, version: str, manifests: Manifests) -> None:
        for item in manifests.objects:
            kubernetes_validate.validate(item, version, strict=True)
        wrong = copy.deepcopy(manifests.workloads["worker"])
        wrong["spec"]["template"]["spec"]["containers"][0]["enviroment"] = []
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, version, strict=True)

    def test_are_these(self, manifests: Manifests) -> None:
        assert set(manifests.workloads) == {"postgres", "search", "worker", "dashboard"}
        assert {item["kind"] for item in manifests.objects} == {
            "ConfigMap",
            "Deployment",
            "Job",
            "NetworkPolicy",
            "PersistentVolumeClaim",
            "Secret",
            "Service",
            "StatefulSet",
        }
        assert f"Kubernetes {OLDEST} or later" in text_of(f"{FOLDER}/base/kustomization.yaml")

    def test_all_files_belong_to_it(self) -> None:
        files = {path.name for path in (ROOT / FOLDER / "base").iterdir()} - {"password"}
        assert files == {"kustomization.yaml", *KUSTOMIZATION["resources"]}

    def test_kustomize_makes_of_the_files_what_is_looked_at_here(self, tmp_path: Path) -> None:
        def sorted_(objects: list[Object]) -> list[Object]:
            without = [{key: value for key, value in item.items() if item["kind"] != "Secret"} for item in objects]
            return sorted(without, key=json.dumps)

        def plain(objects: list[Object]) -> list[Object]:
            return sorted_(json.loads(json.dumps(objects, sort_keys=True)))

        assert plain(rendered("base", tmp_path)) == plain(from_files())

    def test_without_gpus_only_what_that_needs_differs(self, tmp_path: Path) -> None:
        def flat(value: Any, path: str) -> dict[str, Any]:
            if isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value):
                value = {item["name"]: item for item in value}
            if not isinstance(value, dict):
                return {path: value}
            return {deep: end for key, item in value.items() for deep, end in flat(item, f"{path}/{key}").items()}

        def all_of(folder: str) -> dict[str, Any]:
            objects = rendered(folder, tmp_path / folder)
            return {path: end for item in objects for path, end in flat(item, item["metadata"]["name"]).items()}

        ours, theirs = all_of("base"), all_of("cpu")
        amounts = ("requests/cpu", "requests/memory", "limits/cpu", "limits/memory", "limits/nvidia.com/gpu")
        jobs = {
            f"{name}/spec/template/spec/{path}"
            for name in ("search", "worker")
            for path in ("tolerations", *(f"containers/{name}/resources/{amount}" for amount in amounts))
        }
        assert {path for path in {*ours, *theirs} if ours.get(path) != theirs.get(path)} == {
            *jobs,
            "files/spec/accessModes",
            "settings/data/STUDY",
            "worker/spec/completions",
            "worker/spec/parallelism",
        }
        assert theirs["settings/data/STUDY"] == "cpu"


class TestReferences:
    def test_workloads_choose_their_own_pods(self, manifests: Manifests) -> None:
        for name, item in manifests.workloads.items():
            labels = item["spec"]["template"]["metadata"]["labels"]
            assert labels == {PROGRAM: "block-search", COMPONENT: name}
            if item["kind"] != "Job":  # a job makes labels of its own for that
                assert chosen(labels, item["spec"]["selector"]["matchLabels"])

    def test_services_reach_the_ports_of_one_workload(self, manifests: Manifests) -> None:
        assert set(manifests.of("Service")) == {"postgres", "dashboard"}
        for name, service in manifests.of("Service").items():
            selector = service["spec"]["selector"]
            (pod,) = [pod for pod in manifests.pods.values() if chosen(pod["metadata"]["labels"], selector)]
            (container,) = pod["spec"]["containers"]
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert container["name"] == name
            for port in service["spec"]["ports"]:
                assert ports[port["targetPort"]] == port["port"]
        for name, item in manifests.of("StatefulSet").items():
            assert item["spec"]["serviceName"] == name
            assert manifests.of("Service")[name]["spec"]["clusterIP"] == "None"

    def test_volumes_are_there(self, manifests: Manifests) -> None:
        for name, container, pod in manifests.containers():
            volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
            templates = manifests.of("StatefulSet").get(name.partition("/")[0], {"spec": {}})["spec"]
            known = {*volumes, *(item["metadata"]["name"] for item in templates.get("volumeClaimTemplates", []))}
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= known, name
            for volume in volumes.values():
                if "persistentVolumeClaim" in volume:
                    assert volume["persistentVolumeClaim"]["claimName"] in manifests.of("PersistentVolumeClaim")
                elif "secret" in volume:
                    assert volume["secret"]["secretName"] in manifests.of("Secret")
                    assert volume["secret"]["defaultMode"] == 0o440  # the group's, which fsGroup makes the process's
                else:
                    assert volume == {"name": volume["name"], "emptyDir": {}}

    def test_variables_are_there(self, manifests: Manifests) -> None:
        for _, container, _ in manifests.containers():
            known = manifests.environment(container)
            for word in manifests.words(container):  # a KeyError if one is not
                for name in re.findall(r"\$(\w+)", word):
                    assert name in known

    def test_probes_ask_at_open_ports(self, manifests: Manifests) -> None:
        probes = [
            (container, probe)
            for _, container, _ in manifests.containers()
            for kind, probe in container.items()
            if kind.endswith("Probe")
        ]
        assert len(probes) == 3
        for container, probe in probes:
            if "httpGet" in probe:
                assert probe["httpGet"]["port"] in {port["name"] for port in container["ports"]}
            else:
                assert probe["exec"]["command"][0] == "pg_isready"
                assert "--host=127.0.0.1" in probe["exec"]["command"]  # not by the socket, see the file

    def test_the_program_finds_database_password_and_folders(self, manifests: Manifests) -> None:
        (database,) = manifests.pods["postgres"]["spec"]["containers"]
        made = manifests.environment(database)
        (key,) = manifests.of("Secret")["postgres"]["data"]
        for name, container, pod in manifests.of_program():
            given = manifests.environment(container)
            url = make_url(given["SEARCH_STORAGE"])
            (port,) = manifests.of("Service")[str(url.host)]["spec"]["ports"]
            assert (url.username, url.database, url.port) == (made["POSTGRES_USER"], made["POSTGRES_DB"], port["port"])
            assert url.password is None
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            kinds = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            file = Path(given["SEARCH_STORAGE_PASSWORD_FILE"])
            assert file.name == key
            assert "secret" in kinds[str(file.parent)]
            assert "persistentVolumeClaim" in kinds[container["workingDir"]], name  # studies/ lands there
            assert "persistentVolumeClaim" in kinds[str(Path(given["SEARCH_DATA_DIR"]).parent)]
            assert "emptyDir" in kinds[given["HOME"]]

    def test_one_version_of_postgresql_keeps_its_data(self, manifests: Manifests) -> None:
        images = {item["image"] for _, item, _ in manifests.containers() if item["image"].startswith("postgres")}
        assert images == {"postgres:18"}
        assert "image: postgres:18\n" in text_of("docker-compose.yml")
        (container,) = manifests.pods["postgres"]["spec"]["containers"]
        (claim,) = manifests.of("StatefulSet")["postgres"]["spec"]["volumeClaimTemplates"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts["/var/lib/postgresql"] == claim["metadata"]["name"]  # the folder of 18 and later
        (secret,) = [volume["secret"] for volume in manifests.pods["postgres"]["spec"]["volumes"] if "secret" in volume]
        assert secret["secretName"] == "postgres"
        assert manifests.environment(container)["POSTGRES_PASSWORD_FILE"] == "/run/secrets/postgres/password"
        assert mounts["/run/secrets/postgres"] == "secret"

    def test_the_image_is_this_version(self, manifests: Manifests) -> None:
        version = tomllib.loads(text_of("pyproject.toml"))["project"]["version"]
        assert {container["image"] for _, container, _ in manifests.of_program()} == {f"block-search:{version}"}
        assert f"docker build --tag block-search:{version} ." in text_of(f"{FOLDER}/base/kustomization.yaml")


class TestSafety:
    def test_pods_may_run_where_only_restricted_ones_may(self, manifests: Manifests) -> None:
        user = int(instructions("USER")[-1].partition(":")[0])
        for name, pod in manifests.pods.items():
            context = pod["spec"]["securityContext"]
            number = 999 if name == "postgres" else user
            assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (number, number, number)
            assert context["runAsNonRoot"] is True
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert pod["spec"]["automountServiceAccountToken"] is False
            assert not any(pod["spec"].get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))

    def test_containers_have_no_privileges_and_write_to_volumes_alone(self, manifests: Manifests) -> None:
        for name, container, _ in manifests.containers():
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name

    def test_nothing_is_open_to_the_world(self, manifests: Manifests) -> None:
        for service in manifests.of("Service").values():
            assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
        for _, container, pod in manifests.containers():
            assert not any("hostPort" in port for port in container.get("ports", []))
            assert "hostNetwork" not in pod
        policies = {name: policy["spec"] for name, policy in manifests.of("NetworkPolicy").items()}
        for name, policy in policies.items():
            assert policy["podSelector"]["matchLabels"] == {COMPONENT: name}
            assert policy["policyTypes"] == ["Ingress"]
        assert "ingress" not in policies["dashboard"]
        (rule,) = policies["postgres"]["ingress"]
        assert rule["ports"] == [{"port": "postgres"}]
        (source,) = rule["from"]
        assert source == {"podSelector": {"matchLabels": {PROGRAM: "block-search"}}}

    def test_the_password_is_in_no_file_that_git_takes(self, tmp_path: Path) -> None:
        assert "Secret" not in {item["kind"] for file in KUSTOMIZATION["resources"] for item in loaded(f"base/{file}")}
        assert f"/{FOLDER}/base/password" in text_of(".gitignore").splitlines()
        done = kustomize("base", None, tmp_path)
        assert done.returncode != 0
        assert "password" in done.stderr

    def test_names_stay_where_contents_change(self, manifests: Manifests) -> None:
        """A job that refers to another name is another job, which Kubernetes refuses."""
        assert set(manifests.of("Secret")) == {"postgres"}
        assert set(manifests.of("ConfigMap")) == {"settings"}


def verdict(job: Object, status: int, disrupted: bool = False) -> str:
    """What a job does about a pod that ended so: the first rule that fits says."""
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        on_exit, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if on_exit and on_exit["operator"] == "In" and status in on_exit["values"]:
            return str(rule["action"])
        if disrupted and {"type": "DisruptionTarget", "status": "True"} in conditions:
            return str(rule["action"])
    return "Count"


class TestJobs:
    @pytest.mark.parametrize("name", ["search", "worker"])
    def test_know_why_a_pod_ended(self, name: str, manifests: Manifests) -> None:
        job = manifests.of("Job")[name]
        assert {status: verdict(job, status) for status in (1, 2, 130, 137, 139, 143)} == {
            1: "Count",
            2: "FailJob",
            130: "Ignore",
            137: "Count",
            139: "Count",
            143: "Ignore",
        }
        assert {verdict(job, status, disrupted=True) for status in (1, 2, 130, 137)} == {"Ignore"}
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # or the policy is refused
        assert "ttlSecondsAfterFinished" not in job["spec"]  # logs stay

    def test_workers_can_come_and_go(self, manifests: Manifests) -> None:
        job = manifests.of("Job")["worker"]["spec"]
        assert job["completionMode"] == "Indexed"
        assert job["completions"] == job["parallelism"]
        assert job["backoffLimitPerIndex"] > 0
        assert "backoffLimit" not in job
        assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 30
        assert manifests.of("Job")["search"]["spec"].get("completionMode", "NonIndexed") == "NonIndexed"

    def test_the_search_has_time_to_stop_its_workers(self, manifests: Manifests) -> None:
        grace = manifests.pods["search"]["spec"]["terminationGracePeriodSeconds"]
        assert grace >= LEAVE_SECONDS + 30

    def test_have_an_init_process(self, manifests: Manifests) -> None:
        for _, _, pod in manifests.of_program():
            assert pod["shareProcessNamespace"] is True

    def test_have_gpus_where_networks_are_trained(self, manifests: Manifests) -> None:
        on_gpus = manifests.environment(manifests.pods["search"]["spec"]["containers"][0])["STUDY"] != "cpu"
        for name, container, pod in manifests.containers():
            limits = container.get("resources", {}).get("limits", {})
            trains = name in ("search/search", "worker/worker")
            assert limits.get("nvidia.com/gpu") == ("1" if trains and on_gpus else None), name
            tolerated = [item["key"] for item in pod.get("tolerations", [])]
            assert tolerated == (
                ["nvidia.com/gpu"] if name.partition("/")[0] in ("search", "worker") and on_gpus else []
            )
            if trains:
                given = manifests.environment(container)
                cores = container["resources"]["requests"]["cpu"]
                assert given["OMP_NUM_THREADS"] == given["TORCHINDUCTOR_COMPILE_THREADS"] == cores

    def test_share_files_between_nodes_where_there_are_many(self, manifests: Manifests) -> None:
        (claim,) = manifests.of("PersistentVolumeClaim").values()
        many = manifests.of("Job")["worker"]["spec"]["completions"] > 1
        assert claim["spec"]["accessModes"] == ["ReadWriteMany" if many else "ReadWriteOnce"]


class TestCommands:
    def all(self, manifests: Manifests) -> dict[str, list[str]]:
        """Every `python -m search`, as its words after that."""
        commands = {}
        for name, container, _ in manifests.of_program():
            words = manifests.words(container)
            if words[0] == "sh":
                known = manifests.environment(container)
                (line,) = re.findall(r"python -m search ([^;]*);", words[2])
                words = shlex.split(re.sub(r"\$(\w+)", lambda name, known=known: known[name[1]], line))
                commands[name] = words
            else:
                assert words[:3] == ["python", "-m", "search"]
                commands[name] = words[3:]
        return commands

    def test_are_found(self, manifests: Manifests) -> None:
        commands = {name: words[0] for name, words in self.all(manifests).items()}
        assert commands == {
            "search/images": "data",
            "search/search": "run",
            "worker/study": "status",
            "worker/worker": "worker",
            "dashboard/study": "status",
            "dashboard/dashboard": "dashboard",
        }

    def test_are_in_the_command_line(self, manifests: Manifests) -> None:
        wrong = {name: complaint for name, words in self.all(manifests).items() if (complaint := refused(words))}
        assert not wrong

    def test_speak_of_one_study(self, manifests: Manifests) -> None:
        names = {word for words in self.all(manifests).values() for word in words if word.startswith("--name=")}
        assert names == {"--name=cifar10"}

    def test_shell_lines_are_sound(self, manifests: Manifests) -> None:
        for _, container, _ in manifests.containers():
            words = manifests.words(container)
            if words[0] == "sh":
                assert words[1] == "-c"
                subprocess.run(["sh", "-n", "-c", words[2]], check=True)

    def test_that_the_comments_name_fit(self) -> None:
        text = re.sub(r"\n#", "\n", text_of(f"{FOLDER}/base/kustomization.yaml"))
        known = Manifests(from_files())
        assert "kubectl apply --kustomize deploy/kubernetes/base" in text
        for target in re.findall(r"(\w+/\w+)", " ".join(re.findall(r"kubectl (?:logs|exec|port-forward).*", text))):
            kind, _, name = target.partition("/")
            if kind in ("job", "deployment", "service"):
                assert name in known.of(kind.capitalize())
        (patch,) = re.findall(r"kubectl patch job worker --patch '(.*)'", text)
        changes = json.loads(patch)["spec"]
        assert changes["completions"] == changes["parallelism"]
        assert re.findall(r"kubectl delete job (.*)", text) == ["search worker"]


class Cluster(Site):
    """The pods' containers as processes of this machine; what only a cluster has, such as names, is replaced."""

    def __init__(self, home: Path, storage: URL, password_file: Path) -> None:
        super().__init__(home, storage, password_file)
        self.manifests = Manifests(from_files())
        self.port = free_port()
        self.programs = home / "programs"
        self.programs.mkdir()
        self.add("python", f'exec {sys.executable} "$@"')
        self.add("pg_isready", f'exec {postgres_tool("pg_isready")} --port={storage.port} "$@"')
        self.add("sleep", "exec /bin/sleep 0.5")

    def add(self, name: str, line: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def container(self, name: str) -> Object:
        return next(container for full, container, _ in self.manifests.containers() if full == name)

    def given(self, name: str) -> dict[str, str]:
        given = self.manifests.environment(self.container(name))
        places = {"TRIALS": str(TRIALS), "STUDY": "cpu", "DATASET": "digits", "HOME": str(self.home / "tmp")}
        places |= self.access()
        if "SEARCH_STORAGE" in given:
            assert set(places) <= set(given)
            given |= places
        threads = {key: "1" for key in given if key.endswith("_THREADS")}
        return {**given, **threads, "PATH": f"{self.programs}:/usr/bin:/bin"}

    def start(self, name: str, *more: str, log: str | None = None) -> "subprocess.Popen[bytes]":
        given = self.given(name)
        words = self.manifests.words(self.container(name), given)
        if words[:3] == ["python", "-m", "search"]:
            words = [*entrypoint(), *words[3:]]
        words = [word.replace("8080", str(self.port)).replace("--host=postgres", "--host=127.0.0.1") for word in words]
        return self.spawn(log or name.replace("/", " "), [*words, *more], given)

    def probe(self, name: str, kind: str) -> bool:
        probe = self.container(name)[kind]
        if "exec" in probe:
            return self.call("probes", probe["exec"]["command"], self.given(name))[0] == 0
        address = f"http://127.0.0.1:{self.port}{probe['httpGet']['path']}"
        try:
            with urllib.request.urlopen(address, timeout=probe["timeoutSeconds"]):
                return True
        except OSError:
            return False


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with site(Cluster) as here:
        yield here


@pytest.mark.slow
class TestPods:
    @pytest.mark.timeout(600)
    def test_a_study_from_nothing_to_a_model_with_a_worker_that_is_evicted(self, cluster: Cluster) -> None:
        # All pods come at once; nothing but their init containers holds them to an order.
        waits = [cluster.start(name) for name in ("worker/study", "dashboard/study", "search/database")]
        assert cluster.probe("postgres/postgres", "startupProbe")
        assert cluster.probe("postgres/postgres", "readinessProbe")
        assert waits[2].wait(timeout=20) == 0, cluster.said("search database")
        assert cluster.start("search/images").wait(timeout=100) == 0, cluster.said("search images")
        assert [wait.poll() for wait in waits[:2]] == [None, None]  # there is no study yet
        search = cluster.start("search/search", *QUICK)
        assert [wait.wait(timeout=100) for wait in waits[:2]] == [0, 0]
        assert "no study 'cifar10'" in cluster.said("worker study")

        evicted, stays = (cluster.start("worker/worker", log=f"worker {index}") for index in (0, 1))
        dashboard = cluster.start("dashboard/dashboard")
        cluster.until(lambda: cluster.works(evicted) or evicted.poll() is not None)
        lines = cluster.command_lines()
        assert lines.count("-m search") >= 4
        assert not any(trace in lines for trace in TRACES)
        begun = time.monotonic()
        evicted.send_signal(signal.SIGTERM)
        status = evicted.wait(timeout=30)
        assert time.monotonic() - begun < 10  # as worker.yaml says next to the grace period
        assert verdict(cluster.manifests.of("Job")["worker"], status) == "Ignore"
        again = cluster.start("worker/worker", log="worker 0")

        cluster.until(lambda: cluster.probe("dashboard/dashboard", "readinessProbe"))
        for process, log in ((stays, "worker 1"), (again, "worker 0"), (search, "search search")):
            assert process.wait(timeout=300) == 0, cluster.said(log)
        cluster.check_budget_is_exact()
        assert (cluster.work / "studies" / "cifar10" / "best" / "model.safetensors").exists()
        assert dashboard.poll() is None, cluster.said("dashboard dashboard")
        dashboard.terminate()
        assert dashboard.wait(timeout=20) in (0, 130)
        assert not list(cluster.data.iterdir())  # digits come with the program
        cluster.check_password_is_nowhere()

    def test_wrong_input_fails_a_job_at_once(self, cluster: Cluster) -> None:
        cluster.password_file = cluster.home / "other"
        cluster.password_file.write_text("another one")
        for name in ("search", "worker"):
            status = cluster.start(f"{name}/{name}").wait(timeout=100)
            assert verdict(cluster.manifests.of("Job")[name], status) == "FailJob"
            assert "password authentication failed" in cluster.said(f"{name} {name}")
