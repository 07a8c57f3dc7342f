"""The report in a browser: no errors, a head by click and by keyboard, a phone's width,
a dark room, paper."""

import shutil

import pytest
import torch

import residual_kernels as rk
from residual_kernels.analysis import TextDictionary
from residual_kernels.data.images.dataset import Images
from residual_kernels.demo.story import DIGITS, digit_images
from residual_kernels.report import gather, write_report
from residual_kernels.report.facts import Source

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("chromium and chromedriver are not both installed", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
support_ui = pytest.importorskip("selenium.webdriver.support.ui", reason="selenium is not installed")
OWNED = "<img src=x onerror=\"document.title='owned'\">"
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)


class Pictures(Images):
    class_names = (OWNED, *DIGITS[1:])

    def __init__(self, pictures, labels):
        self.pictures, self.labels = pictures, labels
        self.names = [OWNED] * len(pictures)

    def _open(self, index):
        return self.pictures[index]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A report of a few digits, as a file: address; its still pictures are not drawn."""
    model, preprocess, tokenizer = rk.load_bundled()
    pictures, labels = digit_images()
    pictures, labels = pictures[:90], labels[:90]
    images = Pictures(pictures, labels)
    batch = torch.stack([preprocess(picture) for picture in pictures])
    cache = rk.encode(model.visual, [(batch, labels)], kinds=("head", "mlp"), class_names=images.class_names)
    vectors = rk.ZeroShotHead.from_text(model, tokenizer, DIGITS, ["the number {}"])
    head = rk.ZeroShotHead(vectors.class_vectors, images.class_names, float(vectors.logit_scale))
    bases = rk.fit_bases(model.visual, cache, ("head", "mlp")).truncate(components=5)
    residual = rk.ResiDual(model.visual, bases, "sum", init="normal")
    known = TextDictionary.bundled(model, tokenizer)
    words = TextDictionary((OWNED, *known.words[1:]), known.vectors)  # a name that must not become markup
    facts = gather(residual, head, cache, Source("bundled", OWNED, "run"), dictionary=words)
    path = tmp_path_factory.mktemp("page") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("residual_kernels.figures.save", lambda *_: [])
        write_report(facts, path, cache, images)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    """The page, loaded anew at 1280 pixels in a light room; at the end the console must be empty."""

    def load(width=1280, scheme="light"):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        emulate(browser, scheme)
        browser.get(address)
        ready = "return document.documentElement.dataset.ready === 'true'"
        support_ui.WebDriverWait(browser, 20).until(lambda one: one.execute_script(ready))
        return browser

    yield load
    assert browser.get_log("browser") == []


def emulate(browser, scheme):
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": n, "value": v} for n, v in features.items()]}
    )


def js(browser, expression):
    return browser.execute_script(f"return {expression}")


def drawn(browser):
    """How many charts have an x axis with labels."""
    return js(
        browser,
        "[...document.querySelectorAll('[data-chart]')].filter(p => p.querySelector('[id*=xtick] "
        "text')).length",
    )


def panel(browser):
    return js(browser, "document.getElementById('panel').innerText")


def test_it_loads_whole_and_says_nothing_to_the_console(page):
    browser = page()
    assert js(browser, "document.documentElement.dataset.ready") == "true"
    assert js(browser, "document.querySelectorAll('[data-chart]').length") == drawn(browser) == 7
    assert js(browser, "[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert js(browser, "document.images.length") >= 12 * 16
    assert js(browser, "document.title") != "owned"
    assert (
        js(
            browser,
            "performance.getEntriesByType('resource').filter(e => !/^(data|blob):/.test(e.name)).length",
        )
        == 0
    )
    assert js(browser, "document.querySelectorAll('.grid button').length") == 54
    assert js(
        browser, "[...document.querySelectorAll('.grid button')].every(b => b.ariaLabel && b.textContent)"
    )
    assert js(browser, "document.querySelectorAll('.card').length") >= 12
    # what a class is called is shown as it is, tags and all
    assert OWNED in js(browser, "document.querySelector('#classes table').textContent")


def test_a_click_on_a_head_shows_its_components(page):
    browser = page()
    button = browser.find_element("css selector", ".grid tbody tr:nth-child(3) td:nth-of-type(5) button")
    before = panel(browser)
    button.click()
    assert panel(browser).startswith("Layer 2, head 4")
    assert panel(browser) != before
    assert button.get_attribute("aria-pressed") == "true"
    assert js(browser, "document.querySelectorAll('.grid [aria-pressed=true]').length") == 1
    assert js(browser, "document.querySelectorAll('#panel tbody tr').length") == 5
    assert js(browser, "document.querySelectorAll('#panel .card img').length") > 0
    label = button.get_attribute("aria-label")
    browser.find_element("css selector", "[name=measure][value=lost]").find_element("xpath", "..").click()
    assert button.get_attribute("aria-label").startswith("layer 2, head 4: worth")
    assert button.get_attribute("aria-label") != label


def test_the_keyboard_does_it_too(page):
    from selenium.webdriver.common.keys import Keys

    browser = page()
    js(browser, "document.querySelector('[name=measure]:checked').focus()")
    send = browser.switch_to
    send.active_element.send_keys(Keys.TAB)
    assert js(browser, "document.activeElement.matches('.grid button')")
    for key in (*[Keys.ARROW_UP] * 6, *[Keys.ARROW_LEFT] * 9):  # it stops at the edges
        send.active_element.send_keys(key)
    assert js(browser, "document.activeElement.ariaLabel").startswith("layer 0, head 0:")
    send.active_element.send_keys(Keys.ARROW_DOWN)
    send.active_element.send_keys(Keys.ARROW_RIGHT)
    assert js(browser, "document.activeElement.ariaLabel").startswith("layer 1, head 1:")
    send.active_element.send_keys(Keys.ENTER)
    assert panel(browser).startswith("Layer 1, head 1")
    for _ in range(9):
        send.active_element.send_keys(Keys.ARROW_RIGHT)
    send.active_element.send_keys(Keys.SPACE)
    assert panel(browser).startswith("Layer 1, MLP")
    assert js(browser, "document.querySelectorAll('.grid button[tabindex=\"0\"]').length") == 1


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_scrolls_one_way_only(page, width):
    browser = page(width)
    assert js(browser, "document.documentElement.scrollWidth") <= width
    assert js(browser, "[...document.querySelectorAll('.grid button')].every(b => b.offsetWidth >= 24)")
    wide = (
        "[...document.querySelectorAll('.chart svg')].filter(s => s.getBoundingClientRect().right > "
        "innerWidth + 1)"
    )
    assert js(browser, f"{wide}.length") == 0
    browser.find_element("css selector", ".grid tbody tr:nth-child(1) td:nth-of-type(1) button").click()
    assert js(browser, "document.documentElement.scrollWidth") <= width
    cut = "[...document.querySelectorAll('#panel .scroll')].filter(s => s.scrollWidth > s.clientWidth + 1)"
    assert js(browser, "document.querySelectorAll('#panel .scroll').length") == 1
    assert js(browser, f"{cut}.length") == 0  # class names are whole


def test_a_dark_room(page):
    """Text stands out from its ground by 4.5 to 1 in both schemes,
    and charts follow when the scheme changes."""
    contrast = """(() => {
      const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
        .map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
        return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
      const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      const ground = light(getComputedStyle(document.body).backgroundColor);
      const text = ['h2', '.kicker', '.findings p', '.hint', '.tiles dt', 'nav a', '.terms dd']
        .map(s => ratio(light(getComputedStyle(document.querySelector(s)).color), ground));
      const cells = [...document.querySelectorAll('.grid button')]
        .map(b => ratio(light(getComputedStyle(b).color), light(getComputedStyle(b).backgroundColor)));
      return [Math.min(...text), Math.min(...cells), ground];
    })()"""
    axis = "getComputedStyle(document.querySelector('#chart-dimension [id*=xtick] text')).fill"
    browser = page(scheme="dark")
    text, cells, ground = js(browser, contrast)
    assert ground < 0.05
    assert text >= 4.5
    assert cells >= 4.5
    dark = js(browser, axis)
    emulate(browser, "light")
    text, cells, ground = js(browser, contrast)
    assert ground > 0.9
    assert text >= 4.5
    assert cells >= 4.5
    assert js(browser, axis) != dark


def test_paper(page):
    browser = page()
    pdf = browser.print_page()
    assert len(pdf) > 50_000
    assert drawn(browser) == 7
