"""The report shows what the folder holds, and nothing in a folder can break it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import refine.report as command
from refine.reporting import ReportError, write_report
from refine.reporting.charts import Curve, draw_curves, thin
from tests.refine.report_folders import NASTY, add_samples, document, lines_of, write_evaluation, write_run


class _Tables(HTMLParser):
    """key of a row -> the values in it, as they were written and as they are shown."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: dict[str, list[tuple[float, str]]] = {}
        self._key, self._value = "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "tr":
            self._key = found.get("data-key", "")
        elif tag == "data":
            self._value = float(found["value"])

    def handle_data(self, data):
        if self._value is not None:
            self.rows.setdefault(self._key, []).append((self._value, data))
            self._value = None


def report(*folders: Path) -> str:
    out = folders[0].parent / "page.html"
    return write_report(list(folders), out).read_text(encoding="utf-8")


def test_the_numbers_are_those_of_the_metrics(tmp_path):
    rows = _Tables(report(write_run(tmp_path / "run"))).rows
    lines = lines_of(30)
    for key in ("loss", "ntp_loss", "reward", "grad_norm", "tokens_per_second", "total_tokens"):
        values = [line[key] for line in lines if key in line]
        expected = [values[0], values[-1], min(values), max(values), sum(values[-3:]) / 3]
        assert [value for value, _ in rows[key]] == pytest.approx(expected, rel=1e-12), key
    first, last = lines[0], lines[-1]
    assert [value for value, _ in rows["eval_loss"]] == pytest.approx(
        [
            first["eval_loss"],
            last["eval_loss"],
            last["eval_loss"] - first["eval_loss"],
            last["eval_loss_low"],
            last["eval_loss_high"],
        ],
        rel=1e-12,
    )
    shown = {text for own in rows.values() for _, text in own}
    assert {"3.6000", "-0.0010", "101.5000", "122,880"} <= shown and not shown & {"-0.0000", "+0.0000"}


def test_text_of_users_is_text(tmp_path):
    run = write_run(tmp_path / "a<b>&", dataset_name_or_path=NASTY)
    (run / "environment.json").write_text(json.dumps({"machine": {"device": NASTY}}))
    add_samples(run, document("held-out", 0, first_token=NASTY), document("step", 20, first_token=NASTY))
    other = shutil.copytree(run, tmp_path / NASTY.replace("/", "|"))
    for page in (report(run), report(run, other)):
        assert "<script" not in page and "<b>&" not in page
        assert page.count("&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; $x_1$") >= 4
        assert "Content-Security-Policy" in page and "http://" not in re.sub(r'xmlns[^"]*"[^"]*"', "", page)


def test_a_document_is_shown_token_by_token(tmp_path):
    run = write_run(tmp_path / "run")
    add_samples(run, document("held-out", 0), document("held-out", 30), document("step", 20))
    page = report(run)
    assert page.count('<b class="mark">1</b><i class="e3 t" title="1.67"> w20</i>') == 3
    assert page.count("<i> w1</i>") == 0 and page.count("<i>Once</i>") == 3  # the first has no prediction
    assert page.count('<td class="same"> a</td>') == 2 * 2 * 3 and page.count("<td> c</td>") == 2 * 3
    assert "advantage <data" in page and "-0.0000" not in page
    choice = page[page.index("From the first to the last sample") :]
    assert re.search(r"<td>reward</td><td>.*0\.7500.*0\.7200.*-0\.0300", choice)
    assert "same place in 2 of 2 cases" in choice


def test_several_runs_lie_over_one_another(tmp_path):
    one, two = (
        write_run(tmp_path / name, learning_rate=rate) for name, rate in (("one", 1e-4), ("two", 3e-4))
    )
    page = report(one, two)
    differing = page[: page.index('id="curves"')]
    row = re.search(r"<tr><td>(.*?)</td>(.*?)</tr>", differing[differing.index("Settings that differ") :])
    assert row[1] == "learning_rate" and re.findall(r">([^<]+)<", row[2]) == ["0.0001", "0.0003"]
    assert "output_dir" not in differing
    loss = page[page.index("<figcaption>Next-token loss") : page.index("<figcaption>Reward")]
    assert ">one</text>" in loss and ">two</text>" in loss
    last = lines_of(30)[-1]["eval_loss"]
    compared = page[page.index('id="compared"') : page.index('class="run"')]
    assert compared.count(f'<data value="{last}">{last:.4f}</data>') == 2
    assert "var(--s0)" in loss and "var(--s1)" in loss


def test_ten_thousand_updates_stay_small_and_exact(tmp_path):
    run = write_run(tmp_path / "run", updates=10_000)
    add_samples(
        run, *(document(kind, step, 4096) for kind in ("held-out", "step") for step in range(0, 10_000, 2000))
    )
    page = report(run)
    assert len(page.encode()) < 5e6
    values = [line["reward"] for line in lines_of(10_000) if "reward" in line]
    found = [value for value, _ in _Tables(page).rows["reward"]]
    assert found[:4] == [values[0], values[-1], min(values), max(values)]


def test_a_thinned_curve_keeps_means_and_extremes():
    points = [(step, float(step % 7)) for step in range(1, 1001)]
    line = thin(points, 100)
    assert len(line.steps) == 100 and line.per_point == 10
    assert (line.least.min(), line.most.max()) == (0, 6)
    assert (line.mean * 10).sum() == pytest.approx(sum(value for _, value in points))
    assert thin(points[:5], 100).mean.tolist() == [1, 2, 3, 4, 5]


def test_curves_of_one_colour_differ_in_their_stroke():
    pytest.importorskip("matplotlib")

    def drawn(*colours):
        curves = [Curve(f"run {n}", [(1, 1.0), (2, 3.0)], color) for n, color in enumerate(colours)]
        return draw_curves("loss", curves, "nats")

    assert "stroke-dasharray" not in drawn(0, 1) and "stroke-dasharray" in drawn(0, 0)


def test_a_curve_that_spans_decades_is_labelled_in_numbers():
    pytest.importorskip("matplotlib")
    drawn = draw_curves("norm", [Curve("a", [(1, 0.1), (2, 1.0), (3, 1000.0)], 0)], "", logarithmic=True)
    assert ">1000</text>" in drawn and "mathdefault" not in drawn


def test_an_earlier_run_and_broken_files_are_shown_as_far_as_they_go(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n{"step": 31, "loss": null, "reward": "x"}\n{"step": 32, "lo')
    (run / "config.yaml").write_text("a: [")
    (run / "samples").mkdir()
    (run / "samples" / "step-000010.txt").write_text("step 10: <rollouts>")
    (run / "samples" / "step-000099.txt").write_text("of a run that was gone back from")
    (run / "samples" / "step-000020.json").write_text('{"step": 20, "kind": "step", "stretches": 3}')
    (run / "samples" / "step-000030.json").write_text("{")
    page = report(run)
    assert "metrics.jsonl: 1 broken lines are left out" in page and "config.yaml cannot be read" in page
    assert "step-000020.json is no sample of this version" in page and "step-000030.json cannot" in page
    assert "step 10: &lt;rollouts&gt;" in page and "gone back" not in page
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    assert "<h1>empty</h1>" in report(empty)


def test_needles_are_a_heat_map(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run")
    write_evaluation(run / "needles")
    alone = write_evaluation(tmp_path / "alone")
    for page in (report(run), report(alone), report(run, alone)):
        drawn = page[page.index("<figcaption>niah_single_1") :]
        drawn = drawn[: drawn.index("</figure>")]
        assert drawn.count(">100</text>") == 15 and drawn.count(">0</text>") == 5
        assert "1,024" in drawn and "2,048" in drawn and "Evaluation " in page


def test_without_matplotlib_the_rest_is_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report(write_run(tmp_path / "run"))
    assert "Charts need matplotlib" in page and "<svg" not in page and "Metrics of the updates" in page


def test_the_command_writes_and_refuses_in_one_sentence(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert command.main([str(run)]) == 0 and (run / "report.html").is_file()
    assert command.main([str(run)]) == 0, "a report replaces a report"
    own = tmp_path / "own.html"
    own.write_text("<p>mine")
    (tmp_path / "other").mkdir()
    capsys.readouterr()
    for arguments, message in (
        ([tmp_path / "none"], "none' is not there"),
        ([own], "own.html' is a file"),
        ([tmp_path / "other"], "holds neither metrics.jsonl"),
        ([run, "--output_file", own], "is there and is no report"),
        ([run, "--output_file", tmp_path], "is a folder"),
    ):
        assert command.main([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1
    assert own.read_text() == "<p>mine"
    with pytest.raises(ReportError, match="at least one"):
        write_report([], tmp_path / "page.html")


@pytest.fixture(scope="module")
def browser():
    """A real browser without a screen; skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    quiet = [
        "--no-sandbox",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=path, args=quiet)
        yield opened
        opened.close()


def test_a_browser_shows_it(browser, tmp_path):
    run = write_run(tmp_path / "run")
    add_samples(
        run, document("held-out", 0), document("held-out", 30, first_token=NASTY), document("step", 20)
    )
    write_evaluation(run / "needles")
    path = write_report([run], run / "report.html")
    grounds = set()
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page, said, asked = context.new_page(), [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(path.as_uri())
            assert said == [] and asked == [path.as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            grounds.add((scheme, page.evaluate("getComputedStyle(document.body).backgroundColor")))
            row = page.locator("table.held-out tr[data-key=eval_loss]")
            expected = f"{lines_of(30)[-1]['eval_loss']:.4f}"
            assert row.locator("data").nth(1).inner_text() == expected
            assert page.locator("svg").first.bounding_box()["width"] > 250
            panels = page.locator(".panels > div")
            assert [panels.nth(n).is_visible() for n in range(3)] == [False, True, False]
            assert NASTY in panels.nth(1).locator(".document").inner_text()
            page.locator(".tabs > label").nth(2).click()
            assert [panels.nth(n).is_visible() for n in range(3)] == [False, False, True]
            context.close()
    assert len(grounds) == 2
