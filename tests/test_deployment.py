"""Dockerfile and compose files hold what they promise, as far as that shows without a Docker engine.

The compose files are read as Compose reads them (variables filled in with their defaults, the override merged), checked
against the Compose schema that check-jsonschema carries, and their commands are parsed by the real command line. At the
end the commands and health checks run as they stand, in the order of the file, against a real PostgreSQL.
"""

import json
import re
import shlex
import signal
import subprocess
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from sqlalchemy.engine import URL, make_url

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
    tool,
)

MAIN, CPU = "docker-compose.yml", "docker-compose.cpu.yml"
PROGRAMS = ("search", "worker", "dashboard")
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}")
PASSWORD = "the-password"
RESET = "what the override takes away"


def filled(text: str, values: Mapping[str, str]) -> str:
    """The text with every variable's value in its place, or its default if it has none."""

    def value(found: re.Match[str]) -> str:
        return values.get(found["name"]) or (PASSWORD if found["kind"] == "?" else found["rest"] or "")

    return VARIABLE.sub(value, text)


def read(name: str, **values: str) -> Any:
    """A compose file with variables or their defaults filled in; what `!reset` stands before is `RESET`."""

    yaml = YAML(typ="safe", pure=True)
    yaml.constructor.add_constructor("!reset", lambda constructor, node: RESET)
    return yaml.load(filled(text_of(name), values))


def merged(base: Any, override: Any) -> Any:
    """Both files as Compose puts them together, for as much of its rules as these files need: no lists are joined."""
    if not isinstance(base, dict) or not isinstance(override, dict):
        return override
    both = {key: merged(base[key], value) if key in base else value for key, value in override.items()}
    return {key: value for key, value in {**base, **both}.items() if value != RESET}


COMPOSE = read(MAIN)
SERVICES: dict[str, Any] = COMPOSE["services"]
WITHOUT_GPU = merged(COMPOSE, read(CPU))


def mounts(service: str) -> dict[str, tuple[str, bool]]:
    """Folder in the container: what is mounted there, and whether it can be written."""
    parts = [volume.split(":") for volume in SERVICES[service].get("volumes", [])]
    return {part[1]: (part[0], "ro" not in part[2:]) for part in parts}


class TestComposeFiles:
    @pytest.mark.parametrize("compose", [COMPOSE, WITHOUT_GPU], ids=[MAIN, f"{MAIN} + {CPU}"])
    def test_fit_the_compose_schema(self, compose: Any, tmp_path: Path) -> None:
        file = tmp_path / "compose.json"
        file.write_text(json.dumps(compose))
        command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def test_have_the_services(self) -> None:
        assert set(SERVICES) == {"postgres", *PROGRAMS}

    def test_services_of_the_program_share_an_image_and_the_database(self) -> None:
        for name in PROGRAMS:
            assert (SERVICES[name]["image"], SERVICES[name]["build"]) == ("block-search", ".")
            url = make_url(SERVICES[name]["environment"]["SEARCH_STORAGE"])
            database = SERVICES["postgres"]["environment"]
            assert (url.host, url.username, url.database) == (
                "postgres",
                database["POSTGRES_USER"],
                database["POSTGRES_DB"],
            )

    @pytest.mark.parametrize("service", SERVICES)
    def test_a_port_is_open_to_this_machine_alone(self, service: str) -> None:
        for port in SERVICES[service].get("ports", []):
            assert port.startswith("127.0.0.1:"), port
        assert SERVICES[service].get("network_mode") is None

    def test_only_database_and_dashboard_have_ports(self) -> None:
        assert {name for name, service in SERVICES.items() if "ports" in service} == {"postgres", "dashboard"}

    @pytest.mark.parametrize("service", SERVICES)
    def test_processes_have_no_privileges(self, service: str) -> None:
        assert SERVICES[service]["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in SERVICES[service]["security_opt"]
        assert not SERVICES[service].get("privileged")

    def test_the_program_has_an_init_process(self) -> None:
        assert all(SERVICES[name]["init"] is True for name in PROGRAMS)

    def test_one_version_of_postgresql_keeps_its_data(self) -> None:
        postgres = SERVICES["postgres"]
        image, version = postgres["image"].split(":")
        assert image == "postgres"
        assert int(version.split(".")[0]) >= 18  # the volume's folder below is that of 18 and later
        assert mounts("postgres") == {"/var/lib/postgresql": ("postgres", True)}
        assert "postgres" in COMPOSE["volumes"]
        assert "pg_isready" in postgres["healthcheck"]["test"]

    def test_services_start_in_order(self) -> None:
        healthy = {"condition": "service_healthy"}
        optional = {**healthy, "required": False}
        assert SERVICES["search"]["depends_on"] == {"postgres": healthy}
        for name in ("worker", "dashboard"):
            assert SERVICES[name]["depends_on"] == {"postgres": healthy, "search": optional}
        for name in ("postgres", "search"):
            assert SERVICES[name]["healthcheck"]["test"]

    def test_the_worker_can_be_multiplied_and_stopped(self) -> None:
        worker = SERVICES["worker"]
        assert "container_name" not in worker
        assert "ports" not in worker
        assert worker["restart"].startswith("on-failure")
        assert int(worker["stop_grace_period"].removesuffix("s")) > 10

    def test_gpus_are_reserved_where_networks_are_trained(self) -> None:
        for name, service in SERVICES.items():
            if name not in ("search", "worker"):
                assert "deploy" not in service
                continue
            (device,) = service["deploy"]["resources"]["reservations"]["devices"]
            assert device["capabilities"] == ["gpu"]
            assert device["count"] == "all"

    def test_without_gpus_only_gpus_and_the_study_differ(self) -> None:
        ours, theirs = SERVICES, WITHOUT_GPU["services"]
        assert {name for name in theirs if "deploy" in theirs[name]} == set()
        for name, service in ours.items():
            differing = {key for key in service if key != "deploy" and service[key] != theirs[name][key]}
            assert differing == ({"command"} if name == "search" else set())
        words = zip(ours["search"]["command"], theirs["search"]["command"], strict=True)
        assert [pair for pair in words if pair[0] != pair[1]] == [("--study=cifar10", "--study=cpu")]

    def test_one_service_downloads_images_and_the_others_read_them(self) -> None:
        assert mounts("search")["/data"] == ("data", True)
        assert mounts("worker")["/data"] == ("data", False)
        for name in ("search", "worker"):
            assert SERVICES[name]["environment"]["SEARCH_DATA_DIR"] == "/data"
        assert "data" in COMPOSE["volumes"]

    def test_outputs_are_shared(self) -> None:
        assert {name: mounts(name)["/work/studies"] for name in PROGRAMS} == {
            "search": ("outputs", True),
            "worker": ("outputs", True),
            "dashboard": ("outputs", False),
        }
        assert "outputs" in COMPOSE["volumes"]


class TestPassword:
    def test_is_required(self) -> None:
        for name in (MAIN, CPU):
            for found in VARIABLE.finditer(text_of(name)):
                if "PASSWORD" in found["name"]:
                    assert found["kind"] == "?", found[0]
        assert "${POSTGRES_PASSWORD:?" in text_of(MAIN)

    def test_is_handed_over_as_a_secret(self) -> None:
        assert COMPOSE["secrets"] == {"postgres_password": {"environment": "POSTGRES_PASSWORD"}}
        for name, service in SERVICES.items():
            assert service["secrets"] == ["postgres_password"]
            variable = "POSTGRES_PASSWORD_FILE" if name == "postgres" else "SEARCH_STORAGE_PASSWORD_FILE"
            assert service["environment"][variable] == "/run/secrets/postgres_password"

    def test_stands_in_no_service(self) -> None:
        assert PASSWORD in json.dumps(COMPOSE)  # or this test would look for nothing
        for compose in (COMPOSE, WITHOUT_GPU):
            assert PASSWORD not in json.dumps(compose["services"])
        for name in PROGRAMS:
            assert make_url(SERVICES[name]["environment"]["SEARCH_STORAGE"]).password is None
        for url in re.findall(r"\w+://\S+", text_of(MAIN) + text_of(CPU) + text_of(".env.example")):
            assert not re.search(r"://[^/@]*:[^/@]*@", url), url

    def test_comes_without_what_compose_refuses_beside_it(self) -> None:
        """`read_only` and a secret from a variable: Compose stops with "`file` is the sole supported option"."""
        assert not any(service.get("read_only") for service in SERVICES.values())


class TestCommands:
    @staticmethod
    def all() -> dict[str, list[str]]:
        """Every `python -m search` that the compose files run, or tell people to run, as its words after that."""
        entry = json.loads(instructions("ENTRYPOINT")[-1])
        assert entry == ["python", "-m", "search"]
        commands = {}
        for file, compose in ((MAIN, COMPOSE), (CPU, WITHOUT_GPU)):
            for name, service in compose["services"].items():
                if service["image"] == "block-search":
                    assert "entrypoint" not in service
                    commands[f"{file}: {name}"] = service["command"]
                test = service.get("healthcheck", {}).get("test", [])
                if test[1:4] == entry:
                    commands[f"{file}: health of {name}"] = test[4:]
        for number, words in enumerate(re.findall(r"python -m search ((?:.*\\\n)*.*)", text_of(MAIN))):
            comment = re.sub(r"\\\n# *", " ", words)
            if comment.split()[0].isalpha():  # and no prose
                commands[f"{MAIN}: comment {number}"] = shlex.split(comment)
        return commands

    def test_are_found(self) -> None:
        names = " ".join(self.all())
        for expected in (*PROGRAMS, "health of search", "comment"):
            assert f": {expected}" in names

    def test_are_in_the_command_line(self) -> None:
        wrong = {where: complaint for where, words in self.all().items() if (complaint := refused(words))}
        assert not wrong

    def test_speak_of_one_study(self) -> None:
        names = {word for words in self.all().values() for word in words if word.startswith("--name=")}
        assert names == {"--name=cifar10"}
        assert "--name cifar10" in text_of(MAIN)  # in the comment on workers elsewhere

    def test_read_the_variables_that_they_are_given(self) -> None:
        source = "".join(file.read_text() for folder in ("data", "search") for file in (ROOT / folder).rglob("*.py"))
        given = {name for service in PROGRAMS for name in SERVICES[service]["environment"]}
        assert [name for name in sorted(given) if f'"{name}"' not in source] == []


class TestSettings:
    def used(self) -> dict[str, set[str]]:
        """Each variable of the main file with its defaults there."""
        found: dict[str, set[str]] = {}
        for match in VARIABLE.finditer(text_of(MAIN)):
            default = match["rest"] if match["kind"] == "-" else ""
            found.setdefault(match["name"], set()).add(default)
        return found

    def explained(self) -> dict[str, str]:
        return dict(re.findall(r"^#?([A-Z][A-Z_]*)=(.*)$", text_of(".env.example"), flags=re.MULTILINE))

    def test_are_all_explained_with_their_defaults(self) -> None:
        assert {name: {default} for name, default in self.explained().items()} == self.used()

    def test_are_written_in_the_one_form_that_is_looked_for_here(self) -> None:
        assert "$" not in VARIABLE.sub("", text_of(MAIN) + text_of(CPU))

    def test_of_the_override_are_the_same(self) -> None:
        assert {match["name"] for match in VARIABLE.finditer(text_of(CPU))} <= set(self.used())

    def test_that_the_example_sets_are_none_but_the_password(self) -> None:
        lines = [line for line in text_of(".env.example").splitlines() if line and not line.startswith("#")]
        assert lines == ["POSTGRES_PASSWORD="]  # empty, which Compose refuses: nobody runs with a known password


class TestImage:
    def test_hadolint_finds_nothing(self) -> None:
        command = [tool("hadolint"), "--no-color", "--failure-threshold", "style", str(ROOT / "Dockerfile")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not done.stdout
        assert "hadolint ignore" not in text_of("Dockerfile")

    def test_python_is_pinned_and_supported_and_has_a_compiler(self) -> None:
        (base,) = instructions("FROM")
        version = re.fullmatch(r"python:(\d+)\.(\d+)", base)
        assert version
        assert (int(version[1]), int(version[2])) >= (3, 11)

    def test_the_process_is_not_root_and_owns_what_is_mounted(self) -> None:
        user, group = instructions("USER")[-1].split(":")
        assert user == group
        assert int(user) >= 1000
        (making,) = [line for line in instructions("RUN") if "useradd" in line]
        assert f"--uid {user} " in making
        folders = making.partition("--owner=search --group=search")[2].split()
        for name in PROGRAMS:
            assert set(mounts(name)) <= set(folders)
        assert f"User {user} " in text_of(".env.example")

    def test_works_in_the_folder_where_outputs_are_mounted(self) -> None:
        assert instructions("WORKDIR")[-1] == "/work"

    def test_dependencies_come_before_the_source(self) -> None:
        assert instructions("COPY") == ["pyproject.toml ./", ". ./"]


def enters(path: str) -> bool:
    """Whether .dockerignore lets a file into the image: the last pattern that fits it or a folder above decides."""
    into = True
    parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    for line in text_of(".dockerignore").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!"))
        pattern = pattern.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, part) for part in parents):
            into = line.startswith("!")
    return into


class TestWhatEntersTheImage:
    @pytest.mark.parametrize(
        "path",
        [
            ".env",
            ".env.example",
            ".git/config",
            ".venv/bin/python",
            "build/lib/search/cli/main.py",
            "data-cache/cifar-10-batches-py/data_batch_1",
            "data/cifar-10-batches-py/data_batch_1",
            "search/.env",
            "search/__pycache__/cli.cpython-312.pyc",
            "studies/cifar10/best/model.safetensors",
            "studies/search.db",
            "studies/search.db-wal",
            "tests/test_deployment.py",
            "benchmarks/results/README.md",
            "docker-compose.yml",
            "deploy/kubernetes/base/password",
            "deploy/slurm/job.sh",
        ],
    )
    def test_not(self, path: str) -> None:
        assert not enters(path)

    def test_all_that_the_package_is_built_from(self) -> None:
        project = tomllib.loads(text_of("pyproject.toml"))
        packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        suffixes = (".py", ".toml", ".cpp", ".h", ".css", ".js", ".jinja")
        files = [file for package in packages for file in (ROOT / package).rglob("*") if file.suffix in suffixes]
        needed = {str(file.relative_to(ROOT)) for file in files} | {"pyproject.toml", project["project"]["readme"]}
        assert {"search/cli/main.py", "search/report/page.html.jinja", "studies/cpu.toml"} <= needed
        assert sorted(path for path in needed if not enters(path)) == []


class TestPage:
    """docs/many-machines.md, which says which way to deploy when."""

    PAGE = "docs/many-machines.md"

    def test_links_lead_somewhere(self) -> None:
        headings = re.findall(r"^## (.*)$", text_of(self.PAGE), flags=re.MULTILINE)
        anchors = {"#" + re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}
        for target in re.findall(r"\]\(([^)]*)\)", text_of(self.PAGE)):
            if target.startswith("#"):
                assert target in anchors
            else:
                assert (ROOT / "docs" / target).exists(), target

    def test_commands_are_in_the_command_line(self) -> None:
        blocks = "".join(re.findall(r"^```console\n(.*?)^```", text_of(self.PAGE), flags=re.DOTALL | re.MULTILINE))
        commands = re.findall(r"python -m search (.*)", blocks)
        commands += [
            re.sub(" ", " --name=cifar10 ", f"{words} ", count=1) for words in re.findall(r"job\.sh (.*)", blocks)
        ]
        assert len(commands) == 4
        assert [refused(shlex.split(words, comments=True)) for words in commands] == [""] * 4


class Up(Site):
    """`docker compose up --scale worker=2` without Docker: each service's command as a process of this machine."""

    def __init__(self, home: Path, storage: URL, password_file: Path) -> None:
        super().__init__(home, storage, password_file)
        self.services = read(MAIN, TRIALS=str(TRIALS), STUDY="cpu", DATASET="digits")["services"]
        self.port = free_port()

    def given(self, service: str) -> dict[str, str]:
        """A service's own environment, with the names that only Docker knows replaced."""
        given = dict(self.services[service]["environment"])
        assert given["SEARCH_STORAGE"] == "postgresql://search@postgres:5432/search"
        return {**given, **self.access()}

    def words(self, service: str, *more: str) -> list[str]:
        """A service's command with more words behind it."""
        words = [word.replace("8080", str(self.port)) for word in self.services[service]["command"]]
        return [*entrypoint(), *words, *more]

    def start(self, log: str, service: str, *more: str) -> "subprocess.Popen[bytes]":
        return self.spawn(log, self.words(service, *more), self.given(service))

    def ended(self, service: str, *more: str) -> tuple[int, str]:
        """Exit status and last line of a service that ends by itself."""
        status = self.start("ended", service, *more).wait(timeout=100)
        return status, self.said("ended").splitlines()[-1]

    def health(self, service: str) -> tuple[int, str]:
        """Exit status and output of a service's health check."""
        kind, program, *words = self.services[service]["healthcheck"]["test"]
        assert kind == "CMD"
        if program == "pg_isready":
            return self.call("health", [postgres_tool(program), *words, f"--port={self.storage.port}"], {})
        assert program == "python"
        words = [entrypoint()[0], *(word.replace("8080", str(self.port)) for word in words)]
        return self.call("health", words, self.given(service))


@pytest.fixture
def up() -> Iterator[Up]:
    with site(Up) as here:
        yield here


@pytest.mark.slow
class TestUp:
    """Only what Docker itself does is missing: images, networks, volumes, restarts."""

    def test_before_there_is_a_study_everything_says_what_it_waits_for(self, up: Up) -> None:
        assert up.health("postgres")[0] == 0
        nothing = "search: no study 'cifar10': this storage has no study yet"
        assert up.health("search") == (2, f"{nothing}\n")
        assert up.ended("worker") == (2, nothing)
        up.password_file = up.home / "absent"
        status, text = up.health("search")
        assert (status, f"{up.password_file} cannot be read" in text, text.count("\n")) == (2, True, 1)
        up.password_file = up.home / "other"
        up.password_file.write_text("another one")
        status, text = up.ended("worker")
        assert (status, "password authentication failed" in text, "another one" in text) == (2, True, False)

    @pytest.mark.timeout(600)
    def test_a_study_from_nothing_to_a_model_with_a_worker_that_is_stopped(self, up: Up) -> None:
        assert up.health("postgres")[0] == 0
        search = up.start("search", "search", *QUICK)
        up.until(lambda: search.poll() is not None or up.health("search")[0] == 0)
        assert search.poll() is None, up.said("search")

        dashboard = up.start("dashboard", "dashboard")
        stopped, stays = (up.start(f"worker {number}", "worker") for number in (1, 2))
        up.until(lambda: up.health("dashboard")[0] == 0)
        up.until(lambda: up.works(stopped))
        lines = up.command_lines()
        assert lines.count("-m search") == 4
        assert not any(trace in lines for trace in TRACES)
        begun = time.monotonic()
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(timeout=30) == 130
        assert time.monotonic() - begun < 10  # as the compose file says next to `stop_grace_period`
        assert "interrupted; nothing stored is lost" in up.said("worker 1")
        assert stays.wait(timeout=300) == 0, up.said("worker 2")
        assert search.wait(timeout=100) == 0, up.said("search")

        up.check_budget_is_exact()
        budget = up.status()["budget"]
        outputs = up.work / "studies" / "cifar10"
        model = (outputs / "best" / "model.safetensors").read_bytes()
        summary = json.loads((outputs / "summary.json").read_text())
        assert summary["budget"] == budget
        assert summary["holdout_reads"] == 1

        # A second `up`, as after a restart of the machine.
        assert up.ended("search", *QUICK)[0] == 0
        assert up.ended("worker") == (0, "0 configurations done by this worker")
        assert up.health("search")[0] == 0
        assert up.status()["budget"] == budget
        assert (outputs / "best" / "model.safetensors").read_bytes() == model
        assert json.loads((outputs / "summary.json").read_text())["holdout_reads"] == 1

        assert dashboard.poll() is None, up.said("dashboard")
        dashboard.terminate()
        assert dashboard.wait(timeout=20) in (0, 130)
        assert not list(up.data.iterdir())  # digits come with the program
        up.check_password_is_nowhere()
        assert not any("Traceback" in up.said(log) for log in up.running)
