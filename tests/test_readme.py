"""Every command in the README works: run in its order, in one empty folder, as a reader would."""

import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
import urllib.request
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from search.cli.main import main
from search.config.study_file import load_study_file

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

NO_FINALE = ("two-workers", "shared", "digits", "pictures")
"""Studies of commands whose finale shows nothing that the other commands' finales do not."""

SHORT = ("--dataset=digits", "--trials=2", "--max-epochs=1", "--max-retrain-epochs=1", "--train-images=100")
"""Added to commands that would train for minutes on the reader's machine; the last one given counts."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line]
    return [part.strip() for line in lines for part in line.split("&&")]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["search", *words])
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0, f"{words}: {err.getvalue()}"
    return out.getvalue()


def serves(words: list[str]) -> None:
    """The command prints an address that answers, until it is asked to go."""
    command = [sys.executable, "-m", "search", *words]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().removeprefix("dashboard: ").strip()
    with urllib.request.urlopen(address + "api/studies") as answer:
        assert b"first-try" in answer.read()
    process.terminate()
    process.communicate(timeout=20)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SEARCH_STORAGE", raising=False)
    monkeypatch.setenv("SEARCH_DATA_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the workers that `run` starts
    monkeypatch.setattr("data.cifar10.can_fetch", lambda _: False)
    chance = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(40):
            pixels = chance.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
    ran = 0
    for command in commands():
        words = shlex.split(command)
        if words[:3] != ["python", "-m", "search"]:
            continue
        words = words[3:]
        if words[0] == "run":
            own = [option for option in SHORT if not (option.startswith("--dataset") and "folder:pictures" in words)]
            if "--trials" in words and words[words.index("--trials") + 1] == "10":
                own = [option.replace("--trials=2", "--trials=5") for option in own]  # `replay` needs as many
            words += own
            if words[words.index("--name") + 1 if "--name" in words else 0] in NO_FINALE:
                words += ["--no-finale"]
        if words[0] == "retrain":
            words += ["--max-retrain-epochs=1"]
        if words == ["data", "--dataset", "cifar10"]:
            words[-1] = "digits"
        ran += 1
        if words == ["dashboard"]:
            serves([*words, "--port", "0"])
        else:
            run(words, monkeypatch)
    assert ran >= 12
    assert "5 of 5 configurations" in run(["status", "--name", "first-try"], monkeypatch)
    (example,) = blocks("python")
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    assert printed.getvalue().strip() in "0123456789"


def test_commands_that_install_are_run_by_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    others = {command for command in commands() if not command.startswith("python -m search")}
    assert others == {"pip install .", 'pip install -e ".[test]"', "python -m pytest"}
    for words in ("install -q .", 'install -q -e ".[test]"', "python -m pytest"):
        assert words in ci


def test_the_example_study_is_a_study(tmp_path: Path) -> None:
    (example,) = blocks("toml")
    (tmp_path / "example.toml").write_text(example)
    config = load_study_file(tmp_path / "example.toml")
    assert set(config.space.varied) == {"blocks", "lr", "augment", "activation", "weight_decay"}
    uncommented = example.replace("# block_widths", "block_widths")
    (tmp_path / "example.toml").write_text(uncommented)
    assert "block_widths" in load_study_file(tmp_path / "example.toml").space.varied


def test_files_that_the_readme_names_are_there() -> None:
    names = re.findall(r"\]\(([^)h][^)]*)\)|!\[[^]]*\]\(([^)]*)\)", README)
    for name in {first or second for first, second in names}:
        assert (ROOT / name).exists(), name
    for folder in ("data", "model", "search", "studies", "deploy", "docs", "benchmarks", "tests"):
        assert f"    {folder}/" in README
        assert (ROOT / folder).is_dir()


def tree() -> list[str]:
    """Paths of the README's tree, each below the folders above it that are indented less."""
    (lines,) = re.findall(r"^## Files\n\n((?:    .*\n)+)", README, flags=re.MULTILINE)
    paths, parents = [], list[tuple[int, str]]()
    for line in lines.splitlines():
        name, depth = line.split()[0], len(line) - len(line.lstrip())
        while parents and parents[-1][0] >= depth:
            parents.pop()
        paths.append("".join(parent for _, parent in parents) + name)
        if name.endswith("/"):
            parents.append((depth, name))
    return paths


def test_the_tree_is_true_and_shows_every_wing() -> None:
    paths = tree()
    assert [path for path in paths if not (ROOT / path).exists()] == []
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][1]["layers"]
    shown = [
        path.split("/")[1].removesuffix(".py") for path in paths if path.startswith("search/") and path != "search/"
    ]
    assert list(dict.fromkeys(shown)) == [layer for layer in layers if layer != "__main__"]
    folders = ("search", "benchmarks", "model")
    wings = [path for folder in folders for path in (ROOT / folder).iterdir() if any(path.glob("*.py"))]
    assert {f"{path.relative_to(ROOT)}/" for path in wings} <= set(paths)


def test_paths_that_contributing_names_are_there() -> None:
    """Names without a folder are those of the folder named before them in their row."""
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)[2:]
    assert 10 < len(rows) <= 20
    for row in rows:
        folder = ROOT
        for name in re.findall(r"`([\w./-]+)`", row):
            path = ROOT / name
            if name.endswith("/"):
                folder = path
            assert path.exists() or (folder / name).exists(), name


def test_paths_in_the_prose_are_there() -> None:
    pages = (
        "README.md",
        "CONTRIBUTING.md",
        "docs/many-machines.md",
        *map(str, ROOT.glob("benchmarks/results/**/*.md")),
    )
    for page in pages:
        named = re.findall(r"`((?:data|model|search|tests|benchmarks|deploy)/[\w./-]+)`", (ROOT / page).read_text())
        assert [name for name in named if not (ROOT / name).exists()] == [], page
