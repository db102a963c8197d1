"""A real browser for tests of pages; they are skipped where none is installed."""

import shutil

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
    "disable-background-networking", "disable-component-update", "disable-sync",
)  # fmt: skip


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A WebDriver that logs what its pages print and ask for."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no Chromium with a chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        started = webdriver.Chrome(options=options, service=Service(driver))
    except WebDriverException as error:
        pytest.skip(f"Chromium does not start: {error.msg}")
    started.set_script_timeout(60)
    yield started
    started.quit()


class Page:
    """An open page."""

    def __init__(self, driver):
        self.driver = driver
        self.run = driver.execute_script

    def __getitem__(self, name):
        return self.driver.find_element("id", name)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def number(self, name):
        """The number in full that stands behind a text."""
        return float(self[name].get_property("value"))

    def press(self, name, *keys):
        self[name].send_keys(*keys)

    def put(self, name, value):
        """Set a control as a user's input would."""
        self.run(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', { bubbles: true }));", name, str(value),
        )  # fmt: skip

    def wait(self, milliseconds=0):
        """Beyond the next frame, in which observers of sizes have drawn."""
        self.driver.execute_async_script(
            "const [time, done] = arguments; requestAnimationFrame(() => setTimeout(done, time))",
            milliseconds,
        )

    def resize(self, width, height, scheme="light"):
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
