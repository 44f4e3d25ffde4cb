"""The pages: short where they promise it, tables as the kept rows say, links and commands that lead somewhere."""

import json
import re
import runpy
import tomllib
from types import SimpleNamespace

import pytest
import yaml

from common.command import parse
from common.config import ROOT
from common.core.errors import InputError

make_tables = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "make_tables.py")))
PAGES = make_tables.pages()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page):
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def blocks(page, language):
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def anchors(page):
    """The names by which headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_rooms_have_their_pages():
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    rooms = ("common", "scripts", "Vision", "NLU", "NLG")
    assert {"README.md", "CONTRIBUTING.md", *(f"{room}/README.md" for room in rooms)} <= names


def test_first_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@each_page
def test_tables_are_fresh(page):
    text = page.read_text(encoding="utf-8")
    assert make_tables.with_tables(text, page.name) == text, "run python scripts/make_tables.py"


def test_every_kept_file_is_shown():
    """A file of rows that no page shows is forgotten."""
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = [str(file.relative_to(ROOT)) for file in sorted(ROOT.glob("[VN]*/results/*.json"))]
    assert len(files) >= 3 and all(f"<!-- table: scores {file} " in shown for file in files)


@each_page
def test_links_resolve(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}: no such heading"


@each_page
def test_commands_name_files_that_are_there(page):
    for text in (*blocks(page, "sh"), *re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))):
        for file in re.findall(r"(?:python|sh|--config) ((?:\w+/)+\w+\.(?:py|sh|yaml))\b", text):
            assert (ROOT / file).is_file(), f"{page.name}: there is no {file}"


@each_page
def test_configs_on_pages_are_accepted(page, tmp_path):
    for text in blocks(page, "yaml"):
        if "domain:" in text:
            (tmp_path / "my.yaml").write_text(text)
            config = parse("", ["--config", str(tmp_path / "my.yaml")])
            assert config.tasks == yaml.safe_load(text)["tasks"]


@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda f: f"{f.parent.name}/{f.name}")
def test_headers_of_configs_name_files_that_are_there(config):
    """Each begins with its command; files and pages that it names exist."""
    header = "".join(re.findall(r"^#.*\n", config.read_text(encoding="utf-8").split("\n\n")[0] + "\n", re.MULTILINE))
    assert f"--config {config.relative_to(ROOT)}" in header or config.stem == "fast"
    named = re.findall(r"\b((?:configs|scripts|Vision|NLU|NLG|common)/[\w/.]*\w\.(?:py|sh|yaml|md))\b", header)
    assert named and all((ROOT / file).is_file() for file in named), named


def test_kept_rows_are_those_of_a_run_without_its_times(tmp_path):
    row = {"method": "ta", "start": None, "init": None, "label": "", "task": "a", "split": "test", "value": 0.5}
    run = {"tasks": ["a"], "rows": [row | {"seconds": 1.0, "peak_gib": 2.0, "hardware": "CPU"}]}
    (tmp_path / "results.json").write_text(json.dumps(run))
    make_tables.keep_rows(tmp_path, tmp_path / "kept" / "rows.json")
    assert json.loads((tmp_path / "kept" / "rows.json").read_text()) == {"tasks": ["a"], "rows": [row]}


def test_gains_are_differences_of_means():
    """Against the means of the rows, taken here with plain arithmetic."""
    rows = json.loads((ROOT / "NLG/results/demo.json").read_text())["rows"]

    def mean(**wanted):
        values = [row["value"] for row in rows if all(row[k] == v for k, v in wanted.items())]
        assert len(values) == 2
        return 50 * sum(values)

    *_, last = make_tables.gains("NLG/results/demo.json").splitlines()
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    start = mean(method="ta")
    adapted = [mean(method="fda", start="ta", init=init) for init in ("gauss", "weight")]
    expected = [start, *(x for mean_of in adapted for x in (mean_of, mean_of - start))]
    assert cells[:2] == ["NLG", "TA"]
    assert [float(cell.strip("()")) for cell in cells[2:]] == pytest.approx(expected, abs=0.0051)


def test_rows_are_chosen_by_name():
    names = "FDA (TSV, Weight)", "Pretrained"
    _, _, *lines = make_tables.scores("Vision/results/demo.json", *names).splitlines()
    assert [line.split("|")[1].strip() for line in lines] == list(names)
    values = [r["value"] for r in json.loads((ROOT / "Vision/results/demo.json").read_text())["rows"]
              if r["method"] == "pretrained"]  # fmt: skip
    assert len(values) == 8 and f" {100 * sum(values) / 8:.2f} |" in lines[1]
    with pytest.raises(InputError, match=r"has no row TIES; choose from Pretrained, Individual"):
        make_tables.scores("Vision/results/demo.json", "TIES")


def test_citation_has_the_version_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    paper = cited["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Shi", "Wen", "Liu"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: methods -->\n", "a table needs the lines"),
        ("<!-- table: methods -->\n<!-- table: methods -->\n<!-- end of table -->\n", "a table needs the lines"),
        ("<!-- table: method -->\n<!-- end of table -->\n", "no table of kind 'method'; choose one of scores, gains"),
    ],
)
def test_broken_markers_are_refused(text, message):
    with pytest.raises(InputError, match=f"page.md: .*{message}"):
        make_tables.with_tables(text, "page.md")
