"""Every figure in the README is one of a recorded run."""

import json
import re
from pathlib import Path

import pytest

from bench import plots, report

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "bench" / "results").glob("*/*.json"))
AGAIN = "python -m bench.report --write"


def test_tables_of_the_readme_are_those_of_the_records() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.readme(text) == text, AGAIN
    assert report.tokenizer_section() in text
    assert re.findall(r"<!-- (\w+) -->", text) == list(report.PARTS)


@pytest.mark.parametrize("folder", sorted({path.parent for path in RECORDS}), ids=lambda p: p.name)
def test_page_beside_the_records_is_theirs(folder: Path) -> None:
    assert (folder / "README.md").read_text(encoding="utf-8") == report.page(folder), AGAIN


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: f"{p.parent.name} {p.stem}")
def test_plots_are_of_the_records_that_are_here(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    names = plots.named(path.stem, record)
    for file in (path.parent / f"{n}-{theme}.svg" for n in names for theme in plots.THEMES):
        if file.exists():
            text = file.read_text(encoding="utf-8")
            assert f"recorded {plots.facts(record)['date']}" in text, AGAIN
            assert len(text) < 100_000, file


def test_pictures_of_the_pages_are_there() -> None:
    for page in (ROOT / "README.md", *(path.parent / "README.md" for path in RECORDS)):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r'(?:srcset|src)="([^"]+)"', text):
            assert (page.parent / target).exists(), f"{page} shows {target}"


def test_losses_of_the_bundled_model() -> None:
    summary = json.loads((ROOT / "gpt2fast/bundled/summary.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    card = (ROOT / "gpt2fast/bundled/README.md").read_text(encoding="utf-8")
    for name in ("rows_of_1024", "bigram", "unigram"):
        loss = summary[f"validation_loss_{name}"]
        assert f"{loss:.2f}" in readme, name
        assert f"{loss:.3f}" in card, name
