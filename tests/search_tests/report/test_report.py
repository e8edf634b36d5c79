import datetime
import functools
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from optuna.trial import FrozenTrial, TrialState, create_trial

from search.analysis.forecast import forecast
from search.analysis.outcomes import TrialsOverhead, outcome
from search.analysis.selection import CostLimits
from search.analysis.starts import start_value
from search.config.space import parameter_distributions
from search.config.study_file import parse_study
from search.events import Budget
from search.report import ReportData, collect, render, write_report
from search.results import Confirmation, RetrainResult, from_json
from search.study import FALLBACK_WARNING, DatasetRecord, StudyRecord, best_trial
from search.summary import DatasetSummary, Summary
from support import finale

COMPLETE, PRUNED, FAIL, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING
CLASSES = ("cat", "dog", "ship")
BEGIN = datetime.datetime(2026, 11, 22, 9, 0)  # noqa: DTZ001  (as Optuna stores it)
VOID = {"meta", "br", "input"}


def record(classes: tuple[str, ...] = CLASSES, dataset: str = "cifar10", **changes: Any) -> StudyRecord:
    table = {
        "description": "Small ones.",
        "trials": 40,
        "trial": {"epochs": 4},
        "space": {
            "blocks": {"low": 2, "high": 4},
            "lr": {"low": 0.01, "high": 1.0, "log": True},
            "augment": {"low": 0.0, "high": 0.4, "step": 0.1},
            "activation": ["relu", "gelu"],
            "pools": 1,
        },
        "retrain": {"epochs": 8},
        **changes,
    }
    images = DatasetRecord(dataset, "0123456789abcdef" * 4, classes, 900, 100, fallback=dataset == "digits")
    return StudyRecord("tried", parse_study(table, "here"), images)


def trial(
    n: int, state: TrialState = COMPLETE, epochs: int = 4, of: StudyRecord | None = None, **changes: Any
) -> FrozenTrial:
    """A trial whose number decides its parameters and its accuracy."""
    forms = parameter_distributions((of or record()).config.space)
    params = {"blocks": 2 + n % 3, "lr": 0.02 * 1.1 ** (n % 30), "augment": 0.1 * (1 + n % 3), "activation": "gelu"}
    params = {name: changes.pop(name, params.get(name)) for name in forms}
    value = changes.pop("value", 0.6 + (n * 7 % 40) / 400)
    made = create_trial(
        state=state,
        value=value if state == COMPLETE else None,
        params=params,
        distributions=forms,
        user_attrs={
            "config": {
                "network": {"widths": [8, 16], "convs": 2, "pooled": [True, False], "activation": "gelu"},
                "fit": {"epochs": 4, "optimizer": "sgd", "lr": 0.1, "batch_size": 32, "augment": 0.2},
            },
            "parameters": 10_000 + 100 * n,
            "flops": 5_000_000 + n,
            "device": "NVIDIA H100",
            "worker": f"node:{n % 3}",
            "seconds": 20.0,
            **changes,
        },
        intermediate_values={epoch: value * (1 - 0.5 / epoch) for epoch in range(1, epochs + 1)},
    )
    made.number = n
    made.datetime_start = BEGIN + datetime.timedelta(seconds=25 * n)
    made.datetime_complete = None if state == RUNNING else made.datetime_start + datetime.timedelta(seconds=20)
    return made


def many() -> list[FrozenTrial]:
    """Of everything something."""
    return [
        trial(0, start=0),
        *(trial(n) for n in range(1, 30)),
        *(trial(n, would_stop=2, value=0.5) for n in range(30, 33)),
        *(trial(n, PRUNED, epochs=2) for n in range(33, 37)),
        trial(37, PRUNED, epochs=0, fault="infeasible"),
        trial(38, PRUNED, epochs=1, fault="non-finite loss"),
        trial(39, FAIL, epochs=1, fault="error", cause="secret cause", traceback="Traceback: secret trace"),
        trial(40, RUNNING, epochs=1),
    ]


def collected(
    trials: list[FrozenTrial],
    of: StudyRecord | None = None,
    confirmation: Confirmation | None = None,
    retrain: RetrainResult | None = None,
    storage: str = "sqlite:///studies/search.db",
    **attributes: Any,
) -> ReportData:
    of = of or record()
    study = optuna.create_study(direction="maximize")
    study.add_trials(trials)
    for name, value in attributes.items():
        study.set_user_attr(name, value)
    return collect(study, of, budget_of(trials, of), confirmation, retrain, summary_of(of, trials), storage)


def budget_of(trials: list[FrozenTrial], of: StudyRecord) -> Budget:
    count = Counter(outcome(trial) for trial in trials)
    pruned = count["pruned"] + count["infeasible"]
    waiting = max(0, of.config.trials - count["complete"] - pruned - count["running"])
    return Budget(of.config.trials, count["complete"], pruned, count["infeasible"], count["failed attempt"],
                  count["running"], waiting)  # fmt: skip


def summary_of(of: StudyRecord, trials: list[FrozenTrial]) -> Summary:
    count = budget_of(trials, of)
    return Summary(
        study=of.name,
        objective=of.config.objective,
        limits=CostLimits(),
        dataset=DatasetSummary(of.dataset.name, of.dataset.fingerprint, 900, 100, of.dataset.fallback),
        storage="sqlite:///studies/search.db",
        budget=count,
        best=None,
        front=None,
        confirm=None,
        retrain=None,
        retrain_progress=None,
        holdout_reads=0,
        seconds=2817.0,
        trial_seconds=2000.0,
        overhead=TrialsOverhead(share=0.012, median_seconds=0.14, trials=40),
        start_up=None,
        known_good=start_value(of.config, trials),
        forecast=forecast(trials, count, workers=1, single=True),
        space_hash="feedbeef",
        environment={"python": "3.11.7", "torch": "2.15", "commit": "abc123def456"},
        warnings=(FALLBACK_WARNING,) if of.dataset.fallback else (),
    )


def whole(**changes: Any) -> ReportData:
    """Of a study that is through."""
    trials = many()
    best = sorted(trials[1:30], key=lambda t: -(t.value or 0))[:3]
    reads = [
        {"when": "2026-11-22", "by": "search.finale.retrain", "trial": best[1].number, "seed": s}
        for s in (500010, 500011)
    ]
    retrain = finale.retrain(best[1].number, CLASSES, **changes)
    return collected(trials, confirmation=finale.confirmation(best), retrain=retrain, holdout_reads=reads)


class Page(HTMLParser):
    """What a browser makes of a page: elements, text, figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.shown: list[str] = []
        self.figures: list[Any] = []
        self._open: list[str] = []
        self._json = False
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._json = ("type", "application/json") in attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            if self._json:
                self.figures.append(json.loads(data))
        elif self._open and self._open[-1] != "style":
            self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())


@pytest.fixture(scope="module", autouse=True)
def _without_plotly() -> Iterator[None]:
    """Its five megabytes are left out of all pages but those that a browser opens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.report.page.get_plotlyjs", lambda: "")
        yield


def rendered(data: ReportData) -> tuple[Page, str]:
    files = render(data)
    return Page(files["report.html"]), files["report.md"]


def both(data: ReportData) -> tuple[str, str]:
    """The text of page and Markdown, the latter without its escapes."""
    page, text = rendered(data)
    return page.text, re.sub(r"\\(.)", r"\1", text).replace("**", "")


def test_the_answer_comes_first() -> None:
    for text in both(whole()):
        start = text[: text.index("A tie:")]
        for part in ("91.46 %", "mean of 2 seeds, 95 % interval 91.21 % to 91.71 %",
                     "2 blocks of 2 parallel convolutions",
                     "GELU", "scored 70.20 %", "reaches 69.12 %, 1.08 points less"):  # fmt: skip
            assert part in start


def test_the_whole_report_tells_all_of_it() -> None:
    for text in both(whole()):
        for part in (
            "A tie: trial 17 has the best mean, but trial 11 cannot be told from it",
            "+0.20 (\N{MINUS SIGN}0.20 to +0.80)",
            "Converged: the last doubling gained +0.21 points",
            "more than 0.41 points",
            "+0.040 (\N{MINUS SIGN}0.010 to +0.090)",
            "an image and its mirror image: yes",
            "2.13 %",
            "1,234,567",
            "1,280 images/s",
            "Spearman",
            "published, chosen on the test set",
            "88.51 %", "48,096,818", "64.10 %", "12,728",
            "known good start 1, trial 0",
            "are taken for",
            "Faults: infeasible (1), non-finite loss (1), error (1)",
            "feedbeef", "0123456789abcdef", "abc123def456", "700001, 700002, 700003", "500010, 500011",
            "python -m search run --study tried.toml --name tried-again --dataset cifar10",
            "NVIDIA H100",
        ):  # fmt: skip
            assert part in text, part
        assert "secret" not in text


def test_sections_come_in_the_order_in_which_they_are_asked_for() -> None:
    titles = ["Confirmation over fresh seeds", "Retrain", "Test accuracy by class", "Calibration, size and speed",
              "The search", "Parameters", "Accuracy and cost", "Budget, workers and time", "Pruning", "Warnings",
              "Beside known networks", "To repeat it"]  # fmt: skip
    assert re.findall(r"^## (.*)$", render(whole())["report.md"], re.MULTILINE)[1:] == titles


def test_every_picture_shows_something() -> None:
    page, _ = rendered(whole())
    assert len(page.figures) > 15
    for figure in page.figures:
        assert figure["data"]
        for trace in figure["data"]:
            assert trace.get("x"), trace
        assert "template" not in figure["layout"]


def test_an_empty_study_says_so() -> None:
    for text in both(collected([])):
        for part in ("not tested yet", "empty: no trial has begun", "No trial has begun.", "Not retrained yet."):
            assert part in text


@pytest.mark.parametrize(
    ("trials", "more", "said"),
    [
        ([trial(0), trial(1, RUNNING, epochs=1)], {}, "running: 1 of 40 configurations done, 1 under way"),
        ([trial(0)], {}, "running: 1 of 40 configurations done, none under way"),
        ([trial(0, RUNNING, epochs=0)], {}, "No trial has an accuracy yet."),
        ([trial(0, FAIL, epochs=0)], {}, "No configuration has run to its end."),
        ([trial(0, PRUNED, epochs=0, fault="infeasible")], {}, "No trial has an accuracy yet."),
        ([trial(0, value=math.inf)], {}, "No configuration has run to its end."),
        ([trial(n) for n in range(40)], {}, "the search is done; nothing was retrained yet"),
        ([trial(n) for n in range(40)], {"confirmation": {"done": 4}}, "running: 4 of 6 confirmation runs done"),
        ([trial(n) for n in range(40)], {"confirmation": {}}, "the search is done and confirmed"),
        (
            [trial(n) for n in range(40)],
            {"retrain_progress": {"what": "on the fit images", "epoch": 3, "epochs": 16, "seed": 5, "eta_seconds": 90}},
            "running: the retrain, on the fit images, epoch 3 of 16, about 1 min 30 s left",
        ),
    ],
)  # fmt: skip
def test_a_study_under_way_says_how_far_it_is(trials: list[FrozenTrial], more: dict[str, Any], said: str) -> None:
    if "confirmation" in more:
        more = {"confirmation": finale.confirmation(trials[:2], **more["confirmation"])}
    for text in both(collected(trials, **more)):
        assert said in text
        assert "not tested yet" in text


def test_a_validation_accuracy_is_not_sold_as_a_test_accuracy() -> None:
    data = collected([trial(0, value=0.987)])
    page, text = rendered(data)
    assert "not tested yet" in text.split("\n\n")[2]
    assert "Best validation accuracy so far: 98.70 %" in page.text
    assert "it flatters" in page.text


def test_a_confirmation_that_has_begun_has_no_means_yet() -> None:
    trials = [trial(n) for n in range(40)]
    made = finale.confirmation(trials[:2], done=0, noise=None, noise_of_difference=None, best_mean=None, winner=None,
                               tie=False, tied=[], optimism=None)  # fmt: skip
    rows = [replace(row, accuracies={}, mean=None, std=None, n=0, behind=None) for row in made.configurations]
    made = replace(made, configurations=tuple(rows))
    for text in both(collected(trials, confirmation=made)):
        assert "No configuration has finished a run." in text
        assert "n/a" in text


def test_the_retrain_of_an_earlier_version_is_told_as_far_as_it_goes() -> None:
    old = {"trial": 0, "epochs": 18, "converged": None, "train_accuracy": 0.99, "device": "cpu", "seconds": 60.0,
           "test_accuracy": {"mean": 0.9146, "std": None, "n": 1}, "parameters": 10, "flops": 20}  # fmt: skip
    for text in both(collected([trial(0)], retrain=from_json(RetrainResult, old))):
        assert "91.46 %" in text
        assert "one seed" in text
        assert "Whether a longer training would score higher was not found out." in text


def test_one_seed_has_an_interval_of_another_kind() -> None:
    one = {"mean": 0.9146, "std": None, "n": 1, "low": 0.909, "high": 0.92, "interval": "images"}
    for text in both(whole(test_accuracy=one)):
        assert "one seed, 95 % interval 90.90 % to 92.00 % for this network over other such images" in text


@pytest.mark.parametrize(
    ("changes", "said", "warning"),
    [
        ({}, "Watched on the fit images alone: 4 and 8 epochs.", None),
        (
            {"converged": False, "stopped_by": "max epochs"},
            "Not converged, as no more epochs were allowed: the last doubling gained +0.21 points.",
            "Retrain not converged",
        ),
        (
            {"converged": False, "stopped_by": "time", "epochs": 11},
            "went to the final trainings, longer than any that was watched",
            "Retrain not converged",
        ),
        (
            {"converged": None, "stopped_by": "time"},
            "Whether a doubling would help was not found out, as the study's minutes were up.",
            "Convergence of the retrain not known",
        ),
    ],
)
def test_convergence_is_told_in_words(changes: dict[str, Any], said: str, warning: str | None) -> None:
    data = whole(**changes)
    for text in both(data):
        assert said in text
    assert warning in warned(data) if warning else "onverge" not in warned(data)


def test_a_confirmation_with_one_seed_knows_no_noise() -> None:
    trials = [trial(n) for n in range(4)]
    made = finale.confirmation(trials, noise=None, noise_of_difference=None, tie=False, tied=[0])
    for text in both(collected(trials, confirmation=made)):
        assert "how much of that is noise is not known" in text


def test_a_study_with_one_parameter() -> None:
    of = record(space={"lr": {"low": 0.01, "high": 1.0, "log": True}})
    page, _ = rendered(collected([trial(n, of=of) for n in range(12)], of))
    assert "All parameters together" not in page.text
    assert "Importance" in page.text


def test_a_study_in_which_nothing_varies() -> None:
    of = record(space={"lr": 0.1})
    assert "Nothing is varied." in rendered(collected([trial(0, of=of)], of))[0].text


def test_importances_are_not_told_of_few_or_equal_trials() -> None:
    for trials in ([trial(n) for n in range(9)], [trial(n, value=0.5) for n in range(20)]):
        assert "Importances are not told" in rendered(collected(trials))[0].text
    found = collected([trial(n) for n in range(20)]).importances
    assert sum(found.values()) == pytest.approx(1)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def warned(data: ReportData) -> str:
    page = rendered(data)[0].text
    return page[page.rindex("Warnings") : page.rindex("Beside known networks")]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("blocks", 4, "blocks 4 is the high end of 2 to 4"),
        ("blocks", 3, None),
        ("blocks", 2, "blocks 2 is the low end of 2 to 4"),
        ("lr", 0.0101, "lr 0.0101 is the low end of 0.01 to 1"),
        ("lr", 0.02, None),
        ("lr", 0.97, "lr 0.97 is the high end of 0.01 to 1"),
        ("lr", 0.9, None),
        ("augment", 0.4, "augment 0.4 is the high end of 0 to 0.4"),
        ("augment", 0.3, None),
        ("augment", 0.0, None),  # nothing lies beyond
        ("activation", "relu", None),
    ],
)
def test_the_winner_on_the_edge_of_a_range(name: str, value: Any, said: str | None) -> None:
    middle = {"blocks": 3, "lr": 0.1, "augment": 0.2, "activation": "gelu"}
    trials = [*(trial(n, value=0.5) for n in range(45)), trial(45, value=0.9, **{**middle, name: value})]
    text = warned(collected(trials))
    assert said in text if said else "the range" not in text


def test_the_edge_is_looked_for_at_the_trial_that_was_taken() -> None:
    middle = {"blocks": 3, "lr": 0.1, "augment": 0.2}
    trials = [trial(0, value=0.9, **{**middle, "blocks": 4}), trial(1, value=0.8, **middle)]
    assert "high end" in warned(collected(trials))
    assert "high end" not in warned(collected(trials, confirmation=finale.confirmation(trials)))


def test_a_per_block_width_has_edges_and_counts_once() -> None:
    of = record(
        space={"blocks": {"low": 1, "high": 2}, "pools": 1, "block_widths": {"low": 16, "high": 64, "step": 16}}
    )
    trials = [trial(n, of=of, blocks=2, block_width_1=64, block_width_2=32) for n in range(19)]
    text = warned(collected(trials, of))
    assert "block_width_1 64 is the high end of 16 to 64" in text
    assert "block_width_2" not in text
    assert "19 trials ran to their end; 20 would be 10 for each of the 2 parameters" in text


@pytest.mark.parametrize(("complete", "few"), [(0, False), (39, True), (40, False)])
def test_too_few_trials_for_the_parameters_are_told(complete: int, few: bool) -> None:
    assert ("Too few trials" in warned(collected([trial(n) for n in range(complete)]))) is few


def test_graver_warnings() -> None:
    reads = [{"when": "now", "by": "search.finale.retrain", "trial": 1, "seed": seed} for seed in (1, 2, 2)]
    stops = [trial(n, value=0.9 - n / 1000, **({"would_stop": 2} if n < 10 else {})) for n in range(45)]
    made = finale.retrain(0, tuple("0123456789"), converged=False, stopped_by="time")
    of = record(tuple("0123456789"), "digits")
    data = collected(stops, of, retrain=made, holdout_reads=reads)
    text = warned(data)
    assert text.index("digits") < text.index("were read 3 times") < text.index("minutes were up")
    assert "pruning looks harmful: 5 of 10 trials" in text
    whole_text = rendered(data)[0].text
    assert "Not converged, as the study's minutes were up: the last doubling gained +0.21 points" in whole_text
    assert "88.51" not in whole_text  # that is CIFAR-10's


def test_one_read_for_each_seed_is_no_warning() -> None:
    assert "read more than once" not in warned(whole())


NASTY = (
    "</script><img src=x onerror=alert(1)> a|b `c` *d* _e_ [x](http://y) <!-- ]]> &lt;b&gt;", '" onload="x',
    "$x$ ~~a~~ \\ <a@b.c>", "<script>alert(1)</script>", "# h", "- l", "1. x", "```", "http://x.org", "![i](j)",
    "\\|", "+ l", "===",
)  # fmt: skip


def shape(text: str) -> list[str]:
    """The kinds of all tokens of a Markdown text."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)
    inner = [child.type for token in tokens for child in token.children or [] if child.type != "softbreak"]
    kinds = [kind for kind in inner if kind not in ("text", "text_special")]
    return [token.type for token in tokens] + kinds


def told_by(text: str) -> ReportData:
    """A small study in which ``text`` stands wherever text comes from outside."""
    classes = (text, f"{text}2", "ship")
    of = record(classes, description=text)
    trials = [trial(0, worker=text, device=text, fault=text), *(trial(n) for n in range(1, 12))]
    made = finale.retrain(0, classes, device=text, latency_precision=text)
    data = collected(trials, of, finale.confirmation(trials[:2]), made, storage=text)
    summary = replace(data.summary, warnings=(text,), environment={"commit": text, "platform": text})
    return replace(data, summary=summary, reads=({"when": text, "by": text},))


def hold_to_the_usual(text: str) -> None:
    """Whatever the text, a report has the elements that it has with a plain word."""
    files, plain = render(told_by(text)), usual()
    page, usual_page = Page(files["report.html"]), Page(plain["report.html"])
    assert page.tags == usual_page.tags
    # A cell's class follows from its length.
    assert [n for n, _ in page.attributes if n != "class"] == [n for n, _ in usual_page.attributes if n != "class"]
    assert " ".join(text.split()) in page.text
    assert shape(files["report.md"]) == shape(plain["report.md"])


@functools.cache
def usual() -> dict[str, str]:
    return render(told_by("plain"))


@pytest.mark.parametrize("text", NASTY)
def test_markup_in_a_study_is_text(text: str) -> None:
    hold_to_the_usual(text)


@settings(max_examples=10, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30))
def test_any_text_in_a_study_is_text(text: str) -> None:
    hold_to_the_usual(f"a{text}a")


def test_what_plotly_would_take_for_markup_is_escaped_in_figures() -> None:
    page, _ = rendered(told_by("<b>x</b>"))
    assert "<b>" not in json.dumps(page.figures)


def test_the_page_asks_for_nothing_outside() -> None:
    page, _ = rendered(whole())
    assert (
        "content",
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:",
    ) in (page.attributes)
    assert not {"link", "img", "iframe", "object", "base", "form"} & set(page.tags)
    assert [
        value for name, value in page.attributes if name in ("src", "href") and not (value or "").startswith("#")
    ] == []
    style = render(whole())["report.html"].partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_every_link_leads_somewhere_and_every_figure_has_a_name() -> None:
    page, _ = rendered(whole())
    names = [value for name, value in page.attributes if name == "id"]
    assert len(set(names)) == len(names)
    assert {value for name, value in page.attributes if name == "href"} <= {f"#{name}" for name in names}
    figures = [value for name, value in page.attributes if name == "data-figure"]
    assert len(figures) == len(page.figures)
    assert set(figures) <= set(names)
    assert page.tags.count("h1") == 1


def test_the_same_data_gives_the_same_report() -> None:
    data = whole()
    assert render(data) == render(data)


def test_two_thousand_trials_stay_small() -> None:
    trials = [trial(n, PRUNED, epochs=2) if n % 4 == 0 else trial(n) for n in range(2000)]
    files = render(collected(trials, record(trials=2000)))
    assert len(files["report.html"]) < 2_000_000  # and plotly.js, some 5 MB
    assert len(files["report.md"]) < 30_000


def test_writing_puts_two_files_and_nothing_else(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trials(many())
    of = record()
    out = tmp_path / "studies" / "tried"
    for _ in range(2):
        data = collect(study, of, budget_of(many(), of), None, None, summary_of(of, many()), "sqlite:///x.db")
        paths = write_report(out, data)
        assert paths == [out / "report.html", out / "report.md"]
        assert sorted(out.iterdir()) == sorted(paths)
    best = best_trial(study)
    assert best is not None
    assert f"trial {best.number}" in (out / "report.md").read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, of = optuna.create_study(direction="maximize"), record()
    data = collect(study, of, budget_of([], of), None, None, summary_of(of, []), "sqlite:///x.db")
    page, _ = write_report(tmp_path, data)
    before = page.read_bytes()

    def half(self: Path, text: str, **options: Any) -> int:
        self.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, data)
    assert page.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("state", ["empty", "whole"])
def test_a_browser_opens_the_page_without_complaint(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BROWSER is not None
    monkeypatch.undo()
    from plotly.offline import get_plotlyjs

    monkeypatch.setattr("search.report.page.get_plotlyjs", get_plotlyjs)
    page = tmp_path / "report.html"
    page.write_text(render(whole() if state == "whole" else collected([]))["report.html"], encoding="utf-8")
    ended = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000", "--window-size=390,900", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert [line for line in ended.stderr.splitlines() if "CONSOLE" in line] == []
    drawn = len(re.findall(r'<div class="plot[^"]*js-plotly-plot"', ended.stdout))
    assert drawn == ended.stdout.count('type="application/json"') > 0
    assert ended.stdout.count('class="main-svg"') >= drawn
