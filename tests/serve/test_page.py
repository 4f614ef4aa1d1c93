"""The chat page in a headless Chromium, if there is one: Debian's chromium and its driver."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.serve.running import Running
from tests.serve.test_openai import LONG

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    """A browser that asks nobody but the server."""
    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)} (apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.add_argument("--window-size=1280,800")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def shown(browser: WebDriver, name: str) -> str:
    """Return what an element shows."""
    return browser.find_element(By.ID, name).text


def ask(browser: WebDriver, question: str) -> str:
    """Ask and wait for the end of the answer."""
    number = len(browser.find_elements(By.CSS_SELECTOR, "li.assistant"))
    browser.find_element(By.ID, "question").send_keys(question)
    browser.find_element(By.ID, "send").click()
    done = "li.assistant:not(.busy)"
    WebDriverWait(browser, 120).until(
        lambda b: len(b.find_elements(By.CSS_SELECTOR, done)) == number + 1
    )
    WebDriverWait(browser, 60).until(lambda b: b.find_element(By.ID, "send").is_displayed())
    return browser.find_elements(By.CSS_SELECTOR, done)[-1].text


def test_a_document_is_dropped_asked_about_and_watched(
    browser: WebDriver, server: Running, tmp_path: Path
) -> None:
    document = tmp_path / "log.txt"
    document.write_text(LONG + "<b>not markup</b>", encoding="utf-8")
    browser.get(server.url)
    WebDriverWait(browser, 60).until(lambda b: shown(b, "model") == "tiny")
    browser.find_element(By.ID, "file").send_keys(str(document))
    WebDriverWait(browser, 60).until(lambda b: "log.txt" in shown(b, "document"))
    first = ask(browser, "What <i>happened</i>?")
    assert first
    assert browser.find_elements(By.CSS_SELECTOR, "li i, li b") == []
    tokens = int(shown(browser, "context").replace(",", ""))
    assert tokens > 300
    attended = float(shown(browser, "attended").split()[0])
    assert 60 < attended <= 96
    assert shown(browser, "resident").endswith("iB")
    assert 0 < float(shown(browser, "mass").split()[0]) < 100
    assert shown(browser, "tpot").endswith("ms")
    # the second turn is read from where the first one ended
    ask(browser, "And then?")
    assert int(shown(browser, "cached").replace(",", "")) >= tokens - 1
    assert int(shown(browser, "context").replace(",", "")) > tokens
    failures = [x for x in browser.get_log("browser") if x["level"] == "SEVERE"]
    assert [x for x in failures if "favicon" not in x["message"]] == []
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map(entry => entry.name)"
    )
    assert loaded
    assert all(name.startswith(server.url) for name in loaded)


def test_what_the_server_refuses_is_shown(browser: WebDriver, server: Running) -> None:
    browser.get(server.url)
    WebDriverWait(browser, 60).until(lambda b: shown(b, "model") == "tiny")
    browser.find_element(By.ID, "budget").send_keys("65")
    browser.execute_script("document.getElementById('budget').value = '5'")
    assert "budget must be at least" in ask(browser, "Why?")
    assert browser.find_elements(By.CSS_SELECTOR, "li.error")
