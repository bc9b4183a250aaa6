"""The report's page as a person uses it, in headless Chromium: every control is used, and what it shows is checked.

The tests marked slow cover the controls that fewer people use: together they take some 15 s.
"""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from elfs_ray.stages.report.run import run_report
from elfs_ray.storage import filesystem
from elfs_ray.storage.run_dir import RunDir
from tests.tables import digits_config, write_later, write_selected

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no chromium is installed", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")

NUM_CHOSEN = 100
LEFT_OUT = pa.table({"sample_id": [0, 21]})
PER_PAGE = 30
HOSTILE = """</script><script>window.harmed = 1</script><img src=x onerror="window.harmed = 1">&lt;"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Write the tables of a run that chose every tenth digit, hardest first, and its report."""
    folder = tmp_path_factory.mktemp("run")
    run_dir = RunDir(folder)
    write_selected(run_dir, {11: f"/digits/{HOSTILE}11\n.png"})
    run_report(digits_config(folder, f"report.images_per_grid={PER_PAGE}"), run_dir)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report_of_rounds(tmp_path_factory) -> Path:
    """Write the report of a run from which another 20 digits were selected after its own 100 had been labelled."""
    folder = tmp_path_factory.mktemp("rounds")
    run_dir = RunDir(folder)
    write_selected(run_dir)
    labelled = folder / "labelled<b>.txt"
    labelled.write_text("/digits/0.png\n/digits/21.png\n")
    filesystem.write_table(run_dir.path("coresets", "round2", "select", "left_out", "part.parquet"), LEFT_OUT)
    write_later(run_dir, "round2", np.arange(1000, 900, -5), labelled=str(labelled))
    run_report(digits_config(folder, f"report.images_per_grid={PER_PAGE}"), run_dir)
    return folder / "report.html"


@pytest.fixture
def page(browser, report):
    yield from opened(browser, report)


@pytest.fixture
def page_of_rounds(browser, report_of_rounds):
    yield from opened(browser, report_of_rounds)


def opened(browser, report: Path):
    """Yield the page, opened as a file without a network; nothing may fail, and nothing may be loaded."""
    context = browser.new_context(offline=True, viewport={"width": 1000, "height": 900})
    page = context.new_page()
    troubles, requests = [], []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert troubles == []
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
    assert page.evaluate("window.harmed") is None
    context.close()


def text(page, name: str) -> str:
    return page.locator(f"#{name}").inner_text()


def tiles(page) -> list[str]:
    return [tile.get_attribute("title") for tile in page.locator(".tile").all()]


def slide_to(page, rank: int) -> None:
    page.locator("#first").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", rank
    )


def picture_of_map(page) -> str:
    return page.evaluate("map.toDataURL()")


def test_the_answer_and_all_images_of_the_list_are_shown(page):
    assert text(page, "shown") == f"{NUM_CHOSEN} images" and "100 of 1,003 images chosen" in page.inner_text("h1")
    seen = []
    for number in range(1, 5):
        assert text(page, "page") == f"page {number} of 4"
        seen += tiles(page)
        if number < 4:
            page.click("#next")
    assert page.is_disabled("#next")
    page.click("#previous")
    assert text(page, "page") == "page 3 of 4"
    assert (
        seen[:3] == ["/digits/0.png", f"/digits/{HOSTILE}11\n.png", "/digits/21.png"] and len(set(seen)) == NUM_CHOSEN
    )
    assert page.locator(".tile img").count() == PER_PAGE


def test_the_slider_shortens_the_list_in_gallery_and_map(page):
    assert page.input_value("#first") == page.get_attribute("#first", "max") == str(NUM_CHOSEN)
    before = picture_of_map(page)
    slide_to(page, 12)
    assert text(page, "first-label") == "the first 12 of the list" and len(tiles(page)) == 12
    assert text(page, "on-map").startswith("12 chosen and ") and picture_of_map(page) != before
    page.locator("#first").press("ArrowLeft")
    assert text(page, "shown") == "11 images"


@pytest.mark.slow
def test_one_group_is_shown_by_the_list_and_by_the_legend(page):
    page.select_option("#group", "3")
    in_group = len(tiles(page))
    assert 0 < in_group < NUM_CHOSEN and text(page, "on-map").startswith(f"{in_group} chosen")
    assert f"group 3: {in_group} of " in page.locator("#group option:checked").inner_text()
    button = page.locator("#legend button[value='3']")
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert text(page, "shown") == f"{NUM_CHOSEN} images" and page.input_value("#group") == "-1"
    page.click("#legend button[value='5']")
    assert page.input_value("#group") == "5" and all("group 5" in label for label in labels_of(page))


def labels_of(page) -> list[str]:
    return [tile.get_attribute("aria-label") for tile in page.locator(".tile").all()]


@pytest.mark.slow
def test_a_name_is_looked_up(page):
    page.fill("#search", "21.PNG")
    assert tiles(page) == ["/digits/21.png"]
    assert text(page, "on-map").startswith("1 chosen")
    page.fill("#search", "nothing")
    assert text(page, "shown") == "0 images" and text(page, "page") == "page 1 of 1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "names", "why"),
    [
        ("hard", {"/digits/1.png", "/digits/2.png"}, "left out as too hard"),
        ("easy", {"/digits/999.png", "/digits/1001.png", "/digits/1002.png"}, "left out as too easy"),
    ],
)
def test_images_that_were_left_out_are_shown_with_the_reason(page, kind, names, why):
    page.select_option("#show", kind)
    assert set(tiles(page)) == names and page.locator(".tile img").count() == len(names)
    assert all(why in label for label in labels_of(page))


@pytest.mark.slow
def test_images_near_the_centre_and_a_sample_are_shown(page):
    page.select_option("#show", "near")
    assert all("near the centre of its group" in label for label in labels_of(page))
    page.select_option("#group", "4")
    assert len(tiles(page)) == 8
    page.select_option("#group", "-1")
    page.select_option("#show", "pool")
    assert text(page, "shown") == "1,000 images"  # the whole pool: it is smaller than the sample
    assert page.locator("#show option").count() == 5  # none is labelled already


def test_the_map_shows_what_is_pointed_at(page):
    slide_to(page, 3)
    x, y = page.evaluate("place(items[2])")
    page.hover("#map", position={"x": x, "y": y})
    assert text(page, "detail").split("\n")[0] == "/digits/21.png"
    assert "chosen, number 3 of 100; " in text(page, "detail") and "; group 1" in text(page, "detail")
    assert page.locator("#detail img").get_attribute("alt") == "/digits/21.png"
    page.click("#map", position={"x": x, "y": y})
    assert text(page, "selected") == "1 image selected"


@pytest.mark.slow
def test_the_map_zooms_and_moves(page):
    whole = page.evaluate("place(items[2])")
    page.click("#zoom-in")
    near = page.evaluate("place(items[2])")
    assert near != whole
    page.click("#zoom-out")
    assert page.evaluate("place(items[2])") == pytest.approx(whole)
    page.locator("#map").focus()
    page.hover("#map", position={"x": 300, "y": 200})
    page.mouse.wheel(0, -100)
    page.wait_for_function("view.zoom > 1")
    start = page.evaluate("place(items[2])")
    page.mouse.down()
    page.mouse.move(*(np.array(page.evaluate("[map.getBoundingClientRect().x, map.getBoundingClientRect().y]")) + 250))
    page.mouse.up()
    moved = page.evaluate("place(items[2])")
    assert moved == pytest.approx([start[0] - 50, start[1] + 50], abs=2)
    assert text(page, "selected") == "0 images selected"
    page.click("#zoom-reset")
    assert page.evaluate("place(items[2])") == pytest.approx(whole)


@pytest.mark.slow
def test_the_map_obeys_the_keyboard(page):
    page.locator("#map").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert text(page, "detail").startswith("/digits/21.png")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert text(page, "selected") == "1 image selected"
    page.keyboard.press("+")
    assert page.evaluate("view.zoom") == 1.5
    page.keyboard.press("-")
    assert page.evaluate("view.zoom") == 1


@pytest.mark.slow
def test_the_gallery_obeys_the_keyboard(page):
    page.locator(".tile").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    assert text(page, "detail").startswith("/digits/21.png")
    assert page.locator(".tile[aria-selected=true]").get_attribute("title") == "/digits/21.png"
    page.keyboard.press("ArrowDown")
    columns = int(page.evaluate("[...gallery.children].indexOf(document.activeElement)")) - 2
    assert columns > 3
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.title") == tiles(page)[-1]
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.title") == tiles(page)[-1]  # one stop for the whole gallery


def test_selected_names_are_copied_as_lines_of_the_list(page):
    page.locator(".tile").nth(2).click()
    page.locator(".tile").nth(1).click()
    assert text(page, "selected") == "2 images selected"
    page.click("#copy")
    assert text(page, "selected") == "2 names copied"
    assert pasted(page) == f"/digits/21.png\n/digits/{HOSTILE}11%0A.png\n"
    page.locator(".tile").nth(2).click()
    assert text(page, "selected") == "1 image selected"
    page.click("#clear")
    assert text(page, "selected") == "0 images selected" and page.is_disabled("#copy")
    slide_to(page, 40)
    page.click("#all")
    assert text(page, "selected") == "40 images selected"


def pasted(page) -> str:
    page.evaluate("document.body.append(Object.assign(document.createElement('textarea'), {id: 'paste'}))")
    page.locator("#paste").press("Control+v")
    return page.input_value("#paste")


def test_a_hostile_name_is_text_everywhere(page):
    page.locator(".tile").nth(1).hover()
    assert page.locator("#detail code").text_content() == f"/digits/{HOSTILE}11\n.png"
    assert page.locator("#detail img").get_attribute("alt") == f"/digits/{HOSTILE}11\n.png"


def test_a_later_selection_has_its_section_and_is_shown(page_of_rounds):
    page = page_of_rounds
    section = page.locator("#lists + p + .scroll").inner_text()
    assert "0.875" in section and "0.750" in section and "100 were labelled already" in section
    assert "labelled<b>.txt" in section
    before = picture_of_map(page)
    page.click(".show-list[value='coresets/round2']")
    assert page.evaluate("document.activeElement.id") == "list" and page.input_value("#list") == "1"
    assert tiles(page) == [f"/digits/{i}.png" for i in range(1000, 900, -5)]
    assert text(page, "first-label") == "all 20 of the list" and picture_of_map(page) != before
    assert "number 1 of 20" in text(page, "detail")
    slide_to(page, 3)
    assert len(tiles(page)) == 3 and text(page, "on-map").startswith("3 chosen and ")
    page.select_option("#show", "labelled")
    assert tiles(page) == ["/digits/0.png", "/digits/21.png"]
    page.select_option("#list", "0")
    assert text(page, "shown") == f"{NUM_CHOSEN} images" and page.input_value("#show") == "chosen"
    assert page.locator("#show option[value='labelled']").count() == 0
    assert "number 1 of 100" in text(page, "detail")


@pytest.mark.slow
def test_the_groups_are_those_of_the_list_that_is_shown(page_of_rounds):
    page = page_of_rounds
    page.select_option("#list", "1")
    page.click("#groups button[value='4']")
    in_group = len(tiles(page))
    assert 0 < in_group < 20
    assert page.locator("#group option:checked").inner_text().startswith(f"group 4: {in_group} of ")
    page.select_option("#list", "0")
    assert len(tiles(page)) > in_group and page.input_value("#group") == "4"


@pytest.mark.slow
def test_the_details_are_folded_and_open(page):
    summary = page.get_by_text("How long it took")
    assert not page.get_by_text("Total", exact=True).is_visible()
    summary.click()
    assert page.get_by_text("Total", exact=True).is_visible()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_needs_no_scrolling_to_the_side(browser, report, scheme):
    context = browser.new_context(offline=True, viewport={"width": 400, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")
    context.close()


def test_the_answer_and_the_first_images_need_no_script(browser, report):
    context = browser.new_context(offline=True, java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.inner_text("h1") == "100 of 1,003 images chosen"
    assert page.locator("#gallery img").count() == PER_PAGE and not page.locator("#first").is_visible()
    context.close()
