"""The page of a run in a browser: it draws, sorts, copies, and asks for nothing from outside."""

import csv
import io
import shutil
from importlib.util import find_spec

import pytest

from common.evaluation.rows import read_results, values_by_name
from common.report.page import State, write_page
from common.report.reading import read_run
from pico_run import write_pico_run
from pico_vision import PICO_TASKS, pico_config

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = find_spec("playwright")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium, or no Playwright to drive it")
SECTIONS = [
    "results",
    "accuracy",
    "seconds",
    "matching",
    "adaptation",
    "vectors",
    "analyses",
    "origin",
    "cost",
    "config",
]
CRASH = '</script><script>document.title = "gone"</script>'


@pytest.fixture(scope="module")
def run(pico_inputs, tmp_path_factory):
    """The folder of a run that is finished."""
    return write_pico_run(pico_config(pico_inputs, tmp_path_factory.mktemp("runs")), "pico")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """opened(file, width, scheme): the page when all is drawn; the test fails at an error or a request to anywhere."""
    wrong, contexts = [], []

    def open_page(file, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: wrong.append(asked.url) if asked.url[:5] not in ("file:", "data:") else None)
        page.goto(file.as_uri())
        page.wait_for_selector("body[data-drawn=yes]", timeout=120_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def test_every_section_is_there_and_every_figure_has_drawn_something(opened, run):
    page = opened(run / "report.html")
    assert page.eval_on_selector_all("section", "all => all.map(s => s.id)") == [f"run0-{name}" for name in SECTIONS]
    drawn = page.eval_on_selector_all(
        ".chart",
        """all => all.map(c => [...c.querySelectorAll('[class*=role-mark] path, [class*=role-mark] line')]
        .filter(mark => mark.getBoundingClientRect().width + mark.getBoundingClientRect().height > 0).length)""",
    )
    # a start each, seconds, 2 blocks of 2 initialisations, 4 adapted models, sizes, angles, origin, stages
    assert len(drawn) == 2 + 1 + 4 + 4 + 2 + 1 + 1 and min(drawn) > 0
    image = page.locator("#run0-analyses img")
    assert image.evaluate("i => i.naturalWidth") == 40 and image.get_attribute("alt").startswith("A red field. ")
    assert page.locator("#run0-analyses figcaption").text_content() == "Nothing <b>but</b> red."
    assert not page.locator("meta[http-equiv=refresh]").count() and "Finished." in page.locator(".state").text_content()


def test_a_head_sorts_by_mouse_and_keyboard_and_gives_the_order_back(opened, run):
    page = opened(run / "report.html")
    rows, tasks = read_results(run / "results.json")
    shown = {name: v[-1] for name, v in values_by_name(rows, tasks).items() if "rest" not in name}
    names = "all => all.map(th => th.textContent)"
    written = page.eval_on_selector_all(".sortable tbody th", names)
    assert written[:3] == ["Pretrained", "FDA (Pretrained, Gauss)", "FDA (Pretrained, Weight)"]
    head = page.get_by_role("columnheader", name="Avg")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    order = page.eval_on_selector_all(".sortable tbody th", names)
    assert [shown[name] for name in order] == sorted(shown.values(), reverse=True)
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    order = page.eval_on_selector_all(".sortable tbody th", names)
    assert [shown[name] for name in order] == sorted(shown.values())
    page.reload()
    assert page.get_by_role("columnheader", name="Avg").get_attribute("aria-sort") == "ascending", "kept over a reload"
    page.get_by_role("columnheader", name="Avg").get_by_role("button").press("Space")
    assert page.eval_on_selector_all(".sortable tbody th", names) == written
    page.wait_for_selector("body[data-drawn=yes]")


def test_numbers_are_copied_as_csv_and_latex(opened, run):
    page = opened(run / "report.html")
    rows, tasks = read_results(run / "results.json")
    values = values_by_name(rows, tasks)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for kind in ("CSV", "LaTeX"):
        page.locator("summary", has_text=kind).click()
        page.get_by_role("button", name=f"Copy {kind}").click()
        page.wait_for_selector(f"details:has(summary:text-is('{kind}')) .copy-said:text-is('copied')")
    assert page.evaluate("navigator.clipboard.readText()").startswith("% \\usepackage{booktabs}")
    table = list(csv.DictReader(io.StringIO(page.get_by_label("CSV of the table").input_value())))
    for line in table:
        found = [float(line[name]) for name in [*tasks, "avg"]]
        assert found == pytest.approx([100 * v for v in values[line["model"]]])
    assert [line["model"] for line in table] == [name for name in values if "rest" not in name]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen_and_text_can_be_read(opened, run, scheme):
    page = opened(run / "report.html", 390, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    paper, ink = page.evaluate(
        "[document.body, document.body].map((b, i) => getComputedStyle(b)[['backgroundColor', 'color'][i]])"
    )
    light = [sum(map(int, colour.strip("rgb()").split(","))) for colour in (paper, ink)]
    assert light[0] > 3 * light[1] if scheme == "light" else light[1] > 3 * light[0]
    label = page.locator(".chart svg .role-axis-label text").first.get_attribute("fill")
    assert label == page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--soft').trim()")


def test_several_runs_are_on_one_page(opened, run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    page = opened(write_page(tmp_path / "both.html", [read_run(run), read_run(other)]))
    assert page.eval_on_selector_all(
        "#together .sortable tbody tr td:first-child", "all => all.map(td => td.textContent)"
    ) == [name for name in ("pico", "other") for _ in range(7)]
    said = page.locator("#together .findings").text_content()
    assert said.startswith("the same scores in other and pico: TA, FDA (") and "rest" not in said
    assert page.locator("section").count() == 1 + 2 * len(SECTIONS)
    assert page.locator("nav p").all_text_contents() == ["pico", "other"]
    assert page.locator("nav li").count() == 1 + 2 * len(SECTIONS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_runs_of_long_names_are_read_on_a_phone(opened, run, tmp_path, scheme):
    other = tmp_path / "a_run_whose_name_is_longer_than_a_phone_is_wide"
    shutil.copytree(run, other)
    page = opened(write_page(tmp_path / "both.html", [read_run(run), read_run(other)]), 390, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    wide = "all => all.map(e => e.getBoundingClientRect().width)"
    assert max(page.eval_on_selector_all("#together td.run", wide)) < 120, "room is left for the numbers"
    aligned = "all => [...new Set(all.map(e => getComputedStyle(e).textAlign))]"
    assert page.eval_on_selector_all("#together td.run, #together thead th:nth-child(-n+2)", aligned) == ["left"]
    soft = page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--soft').trim()")
    symbols = page.locator("#together .chart .role-legend-symbol path")
    assert symbols.count() >= 2
    assert {symbols.nth(i).get_attribute("fill") for i in range(symbols.count())} == {soft}


def test_every_task_has_its_name_beside_the_angles(opened, run):
    page = opened(run / "report.html", 390)
    labels = page.locator("#run0-vectors .chart").last.locator(".role-axis-label text").all_text_contents()
    assert sorted(labels) == sorted(2 * PICO_TASKS)
    hidden = "all => all.filter(t => getComputedStyle(t).opacity === '0' || t.getAttribute('opacity') === '0').length"
    assert page.eval_on_selector_all("#run0-vectors .chart .role-axis-label text", hidden) == 0


def test_names_in_a_figure_do_not_lie_upon_each_other(opened, run):
    page = opened(run / "report.html")
    boxes = page.eval_on_selector_all(
        "#run0-seconds .chart .mark-text text",
        """all => all.filter(t => t.textContent).map(t => t.getBoundingClientRect())
        .map(r => [r.left, r.right, r.top, r.bottom])""",
    )
    assert boxes
    for i, (left, right, top, bottom) in enumerate(boxes):
        assert all(r < left or right < le or b < top or bottom < t for le, r, t, b in boxes[:i])


def test_names_cannot_break_the_page(opened, run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    for file in [copied / "results.json", copied / "run.json", copied / "task_vectors.json"]:
        file.write_text(file.read_text().replace("MNIST", CRASH.replace('"', '\\"')))
    page = opened(write_page(tmp_path / "page.html", [read_run(copied)], State("going", CRASH), 10))
    assert page.title() == "run" and CRASH in page.locator(".state").text_content()
    assert page.get_by_role("columnheader", name=CRASH).count() >= 1
    assert page.locator("meta[http-equiv=refresh]").get_attribute("content") == "10"
