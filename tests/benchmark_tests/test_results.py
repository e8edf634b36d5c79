"""The index of results is complete, and the commands that pages name are there."""

import re
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *RESULTS.rglob("*.md")]


def test_every_result_is_in_the_index_and_every_link_leads_to_one() -> None:
    links = set(re.findall(r"\]\(([^)]*)\)", (RESULTS / "README.md").read_text()))
    pages = {str(page.relative_to(RESULTS)) for page in RESULTS.rglob("*.md")} - {"README.md"}
    assert pages <= links
    assert [link for link in links if not (RESULTS / link).exists()] == []


def test_every_benchmark_that_a_page_names_is_a_module() -> None:
    named = {name for page in PAGES for name in re.findall(r"benchmarks\.[a-z]+\.[a-z_]+", page.read_text())}
    assert {"benchmarks.training.throughput", "benchmarks.searching.replay", "benchmarks.service.faults"} <= named
    assert sorted(name for name in named if find_spec(name) is None) == []
