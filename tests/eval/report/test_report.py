"""Reports: the page in a real browser, the table, the JSON file, and what must not get into one."""

import base64
import hashlib
import io
import json
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megadit.eval.picture_sets import Generated, fingerprint
from megadit.eval.report.collect import collect, failures
from megadit.eval.report.thumbnails import COLOURS, with_boxes
from megadit.eval.report.write import write_report
from megadit.eval.units import complete

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CAPTION = 'a <b>bold</b> & "quoted" bench, number'


def write_score(
    folder: Path, metric: str, value: float, settings: dict[str, Any] | None = None, **changes: Any
) -> None:
    score = {
        "metric": metric,
        "version": 1,
        "value": value,
        "stderr": 0.0123,
        "n": len(complete(folder)),
        "higher_is_better": False,
        "weights": {"network.pth": "ab"},
        "settings": {"pictures": fingerprint(Generated(folder)), **(settings or {})},
        "groups": {},
        "rows": None,
    }
    (folder / "scores").mkdir(exist_ok=True)
    (folder / "scores" / f"{metric.replace('/', '_')}.json").write_text(json.dumps(score | changes))


def write_geneval(folder: Path, value: float) -> None:
    """Rows of which the images of odd prompts are wrong."""
    rows = [
        {
            "prompt": unit.prompt,
            "image": unit.image,
            "correct": unit.prompt % 2 == 0,
            "reason": "" if unit.prompt % 2 == 0 else "expected bench>=2, found 1\nexpected red <i>dog</i>",
            "details": {"bench": [[2.0, 2.0, 20.0, 12.0, 0.91]], "dog": [[5.0, 10.0, 22.0, 22.0, 0.5]]},
        }
        for unit in complete(folder)
    ]
    groups = {tag: value + place / 100 for place, tag in enumerate(TAGS)}
    errors = dict.fromkeys(TAGS, 0.05)
    changes = {"higher_is_better": True, "groups": groups, "groups_stderr": errors, "rows": "geneval.jsonl"}
    write_score(folder, "geneval", value, **changes)
    (folder / "scores" / "geneval.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


@pytest.fixture
def make_folder(generated: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A scored folder of GenEval's kind, with the facts that `generate` writes."""

    def make(name: str, seed: int) -> Path:
        folder = tmp_path / "runs" / name / "geneval"
        folder.parent.mkdir(parents=True)
        shutil.move(generated(num_prompts=12, seed=seed), folder)
        prompts = [
            {"index": index, "prompt": f"{CAPTION} {index}", "tag": TAGS[index % 6], "include": []}
            for index in range(12)
        ]
        (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
        manifest = json.loads((folder / "manifest.json").read_text()) | {
            "task": {"id": "geneval", "version": 1},
            "prompts_sha256": "f00d",
            "checkpoint": {"run": "tiny", "images_seen": 12_800 * (seed + 1), "sha256": name},
            "weights": "ema_0.999",
            "sampler": {"name": "euler", "num_steps": 28, "shift": 3.0},
            "guidance_scale": 4.0,
            "versions": {"torch": "2.13.0"},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        write_geneval(folder, 0.5 + seed / 10)
        write_score(folder, "fid/adm", 30.0 - seed, stderr=None)
        return folder

    return make


class Elements(HTMLParser):
    """Texts and attributes of a page by tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.sources: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids.add(found.get("id") or "")
        self.sources += [found[name] or "" for name in ("src", "href") if name in found]

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def test_the_page_in_a_browser(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    """What chromium makes of the page: tables, pictures that it could decode, captions as text."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)} (Debian package chromium)")
    page = write_report([make_folder("sp", 0), make_folder("mup", 1)], tmp_path / "out")
    # The page has no script; this one, in a copy, says which pictures the browser could decode.
    probe = (
        "<script>onload = () => { document.title = [...document.images].filter(i => i.naturalWidth > 0).length"
        " + ' of ' + document.images.length + ' pictures, ' + (document.documentElement.scrollWidth"
        " - document.documentElement.clientWidth) + ' too wide' }</script></body>"
    )
    html = page.read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert policy in html
    copy = html.replace(policy, f"{policy}; script-src 'unsafe-inline'").replace("</body>", probe)
    (tmp_path / "copy.html").write_text(copy, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900"]
    command = [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path}/copy.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    elements = Elements(dom)
    assert {"scores", "groups-1", "pairs", "sheet-1", "sheet-2", "settings"} <= elements.ids
    num_pictures = 2 * 12 + 2 * 24 + 2 * 6  # pairs, sheets, what GenEval judged wrong
    assert f"{num_pictures} of {num_pictures} pictures, 0 too wide" in elements.texts
    assert f"{CAPTION} 3" in elements.texts and "b" not in elements.tags and "i" not in elements.tags
    assert "0.500 \u00b1 0.012" in elements.texts and "29" in elements.texts
    assert any(text.startswith("expected bench>=2, found 1") for text in elements.texts)


def test_the_page_asks_nobody(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    page = write_report([make_folder("sp", 0)], tmp_path / "out").read_text(encoding="utf-8")
    elements = Elements(page)
    assert elements.sources and all(source.startswith("data:image/") for source in elements.sources)
    assert "url(" not in page and "@import" not in page and "script" not in elements.tags
    assert "pairs" not in elements.ids  # one run is beside nothing
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "results.json", "table.md"]


def test_table_and_results(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    write_report([make_folder("sp", 0), make_folder("mup", 1)], tmp_path / "out")
    lines = (tmp_path / "out" / "table.md").read_text(encoding="utf-8").splitlines()
    assert "| | sp | mup | |" in lines
    assert "| fid/adm | 30 | **29** | lower is better, n = 24 |" in lines
    assert "| geneval | 0.500 \u00b1 0.012 | **0.600 \u00b1 0.012** | higher is better, n = 24 |" in lines
    assert "| counting | 0.520 \u00b1 0.050 | **0.620 \u00b1 0.050** |  |" in lines
    assert "| checkpoint.images_seen | 12800 | 25600 | differs |" in lines
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["scores"]["geneval"]["value"] for run in results["runs"]] == [0.5, 0.6]
    assert results["remarks"] == []


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"weights": {"network.pth": "cd"}}, "fid/adm: weights differs between runs"),
        ({"version": 2}, "fid/adm: version differs between runs"),
        ({"settings": {"reference": {"name": "b", "sha256": "2"}}}, "fid/adm: the reference differs between runs"),
    ],
)
def test_numbers_that_do_not_compare(
    changes: dict[str, Any], remark: str, make_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folders = [make_folder("sp", 0), make_folder("mup", 1)]
    write_score(folders[0], "fid/adm", 3.0, settings={"reference": {"name": "a", "sha256": "1"}})
    write_score(folders[1], "fid/adm", 2.0, **({"settings": {"reference": {"name": "c", "sha256": "1"}}} | changes))
    write_report(folders, tmp_path / "out")
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["remarks"]
    assert found == f"{remark}; these numbers do not compare"
    assert found in (tmp_path / "out" / "index.html").read_text()


def test_runs_of_different_prompts_are_not_shown_in_pairs(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folders = [make_folder("sp", 0), make_folder("mup", 1)]
    manifest = json.loads((folders[1] / "manifest.json").read_text())
    (folders[1] / "manifest.json").write_text(json.dumps(manifest | {"prompts_sha256": "cafe"}))
    elements = Elements(write_report(folders, tmp_path / "out").read_text())
    assert "pairs" not in elements.ids and "remarks" in elements.ids


def test_failures_are_of_different_prompts(make_folder: Callable[..., Path]) -> None:
    (run,) = collect([make_folder("sp", 0)])
    found = failures(run, "geneval", 4)
    assert [(failure.unit.prompt, failure.tag) for failure in found] == [
        *((1, "two_object"), (7, "two_object"), (3, "colors"), (9, "colors")),
        *((5, "color_attr"), (11, "color_attr")),
    ]
    assert len(failures(run, "geneval", 1)) == 3


def test_boxes_are_where_the_objects_are(tmp_path: Path) -> None:
    Image.new("RGB", (64, 32), "white").save(tmp_path / "a.png")
    url = with_boxes(tmp_path / "a.png", {"bench": [[10.0, 8.0, 30.0, 24.0, 0.9]]})
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))).astype(int)
    assert image.shape == (160, 320, 3)
    wanted = np.array([int(COLOURS[0][place : place + 2], 16) for place in (1, 3, 5)])
    near = np.abs(image - wanted).max(axis=2) < 60
    rows, columns = np.nonzero(near)
    assert abs(columns.min() - 50) <= 2 and abs(columns.max() - 150) <= 30  # a label may be wider than its box
    assert abs(rows.min() - 40) <= 2 and abs(rows.max() - 120) <= 2


def test_what_must_not_get_into_a_report(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = make_folder("sp", 0), tmp_path / "out"
    with pytest.raises(ValueError, match="is given twice"):
        write_report([folder, folder / "." / ".." / folder.name], out)
    write_score(folder, "fid/adm", 3.0, settings={"pictures": hashlib.sha256(b"others").hexdigest()[:16]})
    with pytest.raises(ValueError, match=r"fid_adm.json is a score of other images than .* score them again"):
        write_report([folder], out)
    write_score(folder, "fid/adm", 3.0)
    complete(folder)[5].path.unlink()
    with pytest.raises(ValueError, match="is incomplete: 23 of 24 images are there"):
        write_report([folder], out)
    with pytest.raises(ValueError, match="is not a folder of generated images"):
        write_report([tmp_path], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["runs/sp/geneval"], ["geneval"]),
        (["runs/sp/geneval", "runs/mup/geneval"], ["sp", "mup"]),
        (["a/1/x/images", "a/2/y/images"], ["1/x", "2/y"]),
        (["a/out", "a/out/more"], ["out", "out/more"]),
        (["a/x", "a/b/x"], ["x", "b/x"]),
    ],
)
def test_runs_are_called_by_what_tells_them_apart(
    places: list[str], names: list[str], generated: Callable[..., Path], tmp_path: Path
) -> None:
    folder = generated(num_prompts=2)
    for place in places:
        for source in folder.iterdir():
            target = tmp_path / place / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
    assert [run.name for run in collect([tmp_path / place for place in places])] == names


def test_a_folder_without_scores_has_its_images(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder("sp", 0)
    shutil.rmtree(folder / "scores")
    elements = Elements(write_report([folder], tmp_path / "out").read_text())
    assert {"no-scores", "sheet-1"} <= elements.ids
