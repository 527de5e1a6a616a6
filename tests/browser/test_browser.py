"""The app in a real browser, as a visitor uses it. `make test-browser` runs these."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from guidancekit import APG
from guidancekit.recipe import read_recipe
from guidancekit.registry import parse

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SLOW = 60_000  # milliseconds: for machines that do something else besides
NARROW, WIDE = {"width": 390, "height": 844}, {"width": 1440, "height": 1000}


@pytest.fixture(scope="session")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"found none of {', '.join(BROWSERS)}: install Debian's chromium."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    page = browser.new_page(viewport=WIDE)
    page.set_default_timeout(SLOW)
    elsewhere = []
    page.on("request", lambda request: _note(request.url, url, elsewhere))
    page.goto(url)
    page.wait_for_selector("#generate")
    page.get_by_label("rescale").first.wait_for()  # the controls are drawn after the page
    page.locator("#steps input[type=number]").fill("4")
    yield page
    page.close()
    assert elsewhere == [], "the app needs no other server"


def _note(address: str, own: str, elsewhere: list[str]) -> None:
    if not address.startswith((own, "data:", "blob:")):
        elsewhere.append(address)


def box(page: Page, name: str) -> Locator:
    """A box for text, by its name."""
    return page.locator(f"#{name}").get_by_role("textbox")


def done(page: Page, where: str = "#status", words: str = "Done") -> None:
    expect(page.locator(where)).to_contain_text(words, timeout=SLOW)


def downloaded(page: Page, name: str, folder: Path) -> Path:
    with page.expect_download() as waiting:
        page.locator(f"a[download^='{name}']").first.click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def test_compare_and_move_the_slider(page, tmp_path):
    box(page, "prompt").press("Enter")
    done(page)
    wipe = page.locator("#wipe")
    handle = wipe.get_by_test_id("slider").locator(".icon-wrap")
    before = handle.bounding_box()
    page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
    page.mouse.down()
    page.mouse.move(before["x"] + 120, before["y"] + before["height"] / 2, steps=4)
    page.mouse.up()
    assert handle.bounding_box()["x"] > before["x"] + 60
    expect(page.locator("#figures")).to_contain_text("network evaluations")
    assert read_recipe(downloaded(page, "b-apg", tmp_path)).steps == 4


def test_controls_write_the_method(page):
    page.get_by_label("rescale").first.fill("0.5")
    expect(box(page, "guidance-a")).to_have_value("CFG(rescale=0.5)")
    page.locator("input[aria-label=method]").first.click()
    page.get_by_role("option", name="apg", exact=True).click()
    expect(box(page, "guidance-a")).to_have_value("APG()")
    page.get_by_label("eta").first.wait_for()
    box(page, "guidance-a").fill("FDG(scale_low=2.0)")
    box(page, "guidance-a").press("Enter")
    page.get_by_label("levels").first.wait_for()


def test_a_grid_and_one_of_its_cells(page):
    page.get_by_role("tab", name="Grid").click()
    box(page, "x-values").fill("2, 8")
    box(page, "y-values").fill("cfg, apg")
    expect(page.locator("#grid-status")).to_contain_text("4 pictures", timeout=SLOW)
    page.click("#draw")
    done(page, "#grid-status")
    sheet = page.locator("#sheet img").bounding_box()
    page.mouse.click(sheet["x"] + sheet["width"] * 0.8, sheet["y"] + sheet["height"] * 0.75)
    expect(page.locator("#cell-figures")).to_contain_text("APG", timeout=SLOW)


def test_a_run_is_stopped_and_the_next_one_works(page):
    steps = page.locator("#steps input[type=number]")
    steps.fill("150")
    page.click("#generate")
    expect(page.locator("#status")).to_contain_text("step", timeout=SLOW)
    page.click("#stop")
    done(page, words="Stopped")
    steps.fill("2")
    page.click("#generate")
    done(page)


def test_a_recipe_is_loaded_from_a_picture_and_code_copied_that_works(page, tmp_path):
    box(page, "guidance-b").fill("APG(scale=9.0)")
    page.locator("#seed input").fill("5")
    page.click("#generate")
    done(page)
    picture = downloaded(page, "b-apg", tmp_path)
    assert parse(read_recipe(picture).guidance) == APG(scale=9.0)

    page.get_by_text("Copy as code").click()
    code = page.locator("#code .cm-content").nth(1).inner_text()
    script = tmp_path / "made.py"
    script.write_text(code.replace("\xa0", " "))
    # Sums on a CPU are rounded as its threads share them: as many as the app has in these tests.
    alike = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(script)]
    subprocess.run(command, cwd=tmp_path, env=alike, check=True, capture_output=True)
    made, seen = (np.asarray(Image.open(each)) for each in (tmp_path / "picture.png", picture))
    assert np.array_equal(made, seen)

    page.reload()
    page.get_by_label("rescale").first.wait_for()
    page.get_by_text("Load a recipe").click()
    page.locator("#recipe input[type=file]").set_input_files(picture)
    done(page, words="The recipe is loaded")
    expect(box(page, "guidance-a")).to_have_value("APG(scale=9.0)")
    expect(page.locator("#seed input")).to_have_value("5")
    page.get_by_label("eta").first.wait_for()


def test_a_broken_file_is_a_message(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    page.get_by_text("Load a recipe").click()
    page.locator("#recipe input[type=file]").set_input_files(broken)
    expect(page.get_by_text("broken.png cannot be read")).to_be_visible(timeout=SLOW)


def test_it_reads_well_on_a_phone(browser, url):
    page = browser.new_page(viewport=NARROW)
    page.set_default_timeout(SLOW)
    page.goto(url)
    page.wait_for_selector("#generate")
    page.get_by_label("rescale").first.wait_for()
    wider = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wider <= 0, "nothing sticks out at the side"
    assert page.locator("#generate").bounding_box()["y"] < NARROW["height"], "in sight at once"
    page.close()
