"""The page of a trace: what is in it; and in a real browser, how it behaves:  pytest -m browser  (half a minute)."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from browser import Browser
from PIL import Image

import ldm
from ldm.trace import Trace
from ldm.trace.page import heat, uri

PROMPT = "red heart, twemoji style"
WIDTHS = {"phone": 360, "desk": 1200}


@pytest.fixture(scope="module")
def traces():
    pipe = ldm.Pipeline.from_pretrained()
    return [pipe.trace(PROMPT, steps=steps, seed=1, progress=False) for steps in (6, 4)]


@pytest.fixture(scope="module")
def files(traces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return traces[0].to_html(folder / "one.html"), traces[0].to_html(folder / "two.html", beside=traces[1])


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def data(file):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.S)
    return json.loads(found)


class TestText:
    def test_what_it_knows(self, traces, tmp_path):
        file = traces[0].to_html(tmp_path / "run.html", beside=traces[1])
        assert file == tmp_path / "run.html"
        runs = data(file)
        for run, trace in zip(runs, traces, strict=True):
            n = len(trace)
            assert run["prompt"] == PROMPT and dict(run["settings"])["Steps"] == str(n)
            assert run["words"] == ["red", "heart", "twemoji", "style"] and run["grid"] == [8, 8]
            assert run["sigmas"] == [[float(step.sigma), float(step.sigma_next)] for step in trace]
            assert run["curves"]["scale"] == pytest.approx([7.5] * n, rel=1e-5)
            assert len(base64.b64decode(run["heat"])) == (n + 1) * 4 * 64
            for what in ("x0", "x"):
                for shown, image in zip(run[what], trace.pictures(what), strict=True):
                    opened = Image.open(io.BytesIO(base64.b64decode(shown.removeprefix("data:image/png;base64,"))))
                    assert opened.tobytes() == image.tobytes()

    def test_nothing_is_fetched(self, traces, tmp_path):
        text = traces[0].to_html(tmp_path / "run.html").read_text()
        assert set(re.findall(r"\w+://[^\"'\s]*", text)) == {"http://www.w3.org/2000/svg"}  # a name, not a place
        assert not re.search(r"@import|url\(|<link|src=", text)

    def test_a_run_without_guidance_or_words(self, tmp_path):
        trace = ldm.Pipeline.from_pretrained().trace("", steps=2, guidance_scale=1, progress=False)
        (run,) = data(trace.to_html(tmp_path / "run.html"))
        assert run["words"] == [] and run["heat"] == "" and run["curves"]["cosine"] == [None, None]

    def test_names(self, traces, tmp_path):
        names = [traces[0].to_html(tmp_path / "run.html", force=force).name for force in (False, False, True)]
        assert names == ["run.html", "run-2.html", "run.html"]
        with pytest.raises(ValueError, match="picture=1: the run made 1"):
            traces[0].to_html(tmp_path / "run.html", picture=1)

    def test_signs_in_a_prompt(self, traces, tmp_path):
        """What would end the data, or the title, is in them."""
        sign = '</script><script>alert(1)</script> & @DATA@ \\ "'
        one = traces[0]
        trace = Trace(one.tensors, [one.texts[0].replace(PROMPT, sign)], one.words, len(one))
        file = trace.to_html(tmp_path / "run.html")
        assert data(file)[0]["prompt"] == sign and file.read_text().count("</script>") == 2
        assert "<title>&lt;/script&gt;" in file.read_text()

    def test_maps(self):
        """Each word by its own largest value, in the steps and over the run; fine ones are shrunk."""
        words = torch.tensor([[[0.1, 0.2]], [[0.0, 0.01]]]).expand(2, 2, 1, 2).clone()  # (n,words,h,w)
        words[1, 0] = torch.tensor([[0.4, 0.2]])
        trace = Trace({f"{i:04}.words.0": words[i] for i in range(2)}, [""], [["a", "b"]], 2)
        steps, whole = [[[[64, 128]], [[0, 255]]], [[[255, 128]], [[0, 255]]]], [[[255, 204]], [[0, 255]]]
        assert heat(trace, 0, [0, 1]).tolist() == [*steps, whole]
        fine = Trace({"0000.words.0": torch.rand(1, 70, 100)}, [""], [["a"]], 1)
        assert heat(fine, 0, [0]).shape == (2, 1, 18, 25)

    def test_large_pictures_are_jpeg(self):
        assert uri(Image.new("RGB", (128, 96))).startswith("data:image/png")
        assert uri(Image.new("RGB", (129, 96))).startswith("data:image/jpeg")


def test_no_browser(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"no browser: none of chromium, .* is installed here"):
        Browser()


@pytest.mark.browser
class TestBrowser:
    @pytest.fixture(params=WIDTHS)
    def one(self, request, browser, files):
        browser.open(files[0], WIDTHS[request.param])
        yield browser
        assert browser.complaints() == []

    def shown(self, browser):
        """What is painted of the two pictures, the first word's map and the first chart."""
        return [browser.pixels(place) for place in (".x0 img", ".x img", ".words .map", ".charts svg")]

    def differ(self, before, after):
        return [float(np.abs(a - b).max()) > 20 for a, b in zip(before, after, strict=True)]

    def step(self, browser):
        return browser.run("[Number(slider.value), where.textContent, document.querySelector('.x0 img').alt]")

    def test_the_pictures_are_those_of_the_steps(self, one, traces):
        """Their pixels on the screen are those of the trace, enlarged."""
        for i in (0, 3):
            one.run(f"move({i + 1})")
            for what in ("x0", "x"):
                painted, image = one.pixels(f".{what} img"), traces[0].pictures(what)[i]
                middles = [[int((k + 0.5) * painted.shape[axis] / 16) for k in range(2, 14)] for axis in (0, 1)]
                expected = np.asarray(image).astype(int)[2:14, 2:14]
                assert np.abs(painted[np.ix_(*middles)] - expected).max() <= 2

    @pytest.mark.parametrize("where", ["slider", "page"])
    def test_arrow_keys(self, one, where):
        if where == "slider":
            one.run("slider.focus()")
        before = self.shown(one)
        one.press("ArrowRight")
        assert self.step(one)[0] == 2 and "step 2 of 6" in self.step(one)[1] and "step 2" in self.step(one)[2]
        after = self.shown(one)
        assert all(self.differ(before, after))
        one.press("ArrowLeft")
        assert self.step(one)[0] == 1 and not any(self.differ(before, self.shown(one)))
        one.press("End")
        assert self.step(one)[0] == 6
        one.press("ArrowRight")
        assert self.step(one)[0] == 6
        one.press("Home")
        assert self.step(one)[0] == 1

    def test_input_event(self, one):
        before = self.shown(one)
        one.run("slider.value = 5; slider.dispatchEvent(new Event('input'))")
        assert self.step(one)[0] == 5 and all(self.differ(before, self.shown(one)))

    def test_dragging(self, one):
        """With the mouse, to the middle of the slider."""
        before = self.shown(one)
        box = one.run(
            "(() => { const b = slider.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            one("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
        assert self.step(one)[0] in (3, 4) and all(self.differ(before, self.shown(one)))

    def test_words_over_the_whole_run(self, one):
        before = self.shown(one)
        one.run("whole.click()")
        assert self.differ(before, self.shown(one)) == [False, False, True, False]

    def test_playing_to_the_end(self, one):
        one.press(" ")
        assert one.run("play.textContent") == "Pause"
        one.run("new Promise((done) => setInterval(() => timer === null && done(), 50))")
        assert self.step(one)[0] == 6 and one.run("play.textContent") == "Play"

    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize("dark", [False, True])
    @pytest.mark.parametrize("width", WIDTHS.values())
    def test_layout(self, browser, files, which, dark, width):
        """Nothing sticks out, text is readable on its ground, two runs stand side by side where there is room."""
        browser.open(files[which], width, dark=dark)
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run(
            "[...document.querySelectorAll('main *')].every((e) => e.getBoundingClientRect().right <= innerWidth)"
        )
        painted = browser.pixels()
        assert np.median(painted) < 40 if dark else np.median(painted) > 240
        for colour in ("--ink", "--quiet", "--accent"):
            assert contrast(browser, colour) > 4.5  # WCAG 2.2, AA
        tops = browser.run(
            "[...document.querySelectorAll('.runs > section')].map((s) => s.getBoundingClientRect().top)"
        )
        assert len(tops) == 1 + which and (len(set(tops)) == 1) == (width > 600 or not which)
        assert browser.complaints() == []

    def test_two_runs_of_different_length(self, browser, files, traces):
        browser.open(files[1], 1200)
        browser.press("End")
        alts = browser.run("[...document.querySelectorAll('.x0 img')].map((image) => image.alt)")
        assert [alt.split("step ")[1] for alt in alts] == ["6", "4"]
        captions = browser.run("[...document.querySelectorAll('.x0 figcaption')].map((caption) => caption.textContent)")
        assert [caption.endswith(", its last step") for caption in captions] == [False, True]
        assert "Steps: 6" in browser.run("document.querySelectorAll('.runs > section p')[0].textContent")
        assert browser.complaints() == []

    def test_what_a_screen_reader_is_told(self, one, traces):
        one.press("ArrowRight")
        nodes = one("Accessibility.getFullAXTree")["nodes"]
        seen = [node for node in nodes if not node["ignored"]]
        told = [(node["role"]["value"], node.get("name", {}).get("value", "").strip()) for node in seen]
        assert ("slider", "Step") in told and ("button", "Play") in told
        assert ("checkbox", "words over the whole run") in told and ("heading", PROMPT) in told
        images = [name for role, name in told if role == "image"]
        assert len(images) == 2 + 4 + 4 and all(images)
        assert any(name.startswith("heart: where the net looks at it in step 2, most in the") for name in images)
        cosine = f"{traces[0].curves()['cosine'][1, 0]:.3g}"
        assert f"Cosine of eps_cond and eps_uncond; step 2: cosine {cosine}" in images
        assert one.run("slider.getAttribute('aria-valuetext')").startswith("step 2 of 6, sigma")

    def test_complaints_are_heard(self, browser, files, tmp_path):
        """What the other tests find none of: an error, and a request."""
        page = files[0].read_text()
        (tmp_path / "error.html").write_text(page.replace('"use strict";', '"use strict"; setTimeout(() => none());'))
        allowed = re.sub(r"<meta http-equiv.*?>", "", page)
        (tmp_path / "request.html").write_text(allowed.replace("<main>", '<img src="http://localhost:9/x.png"><main>'))
        for name in ("error", "request"):
            browser.open(tmp_path / f"{name}.html", 1200)
            browser.press("ArrowRight")
            assert browser.complaints()


def contrast(browser, colour):
    """Of a colour on the page's ground: WCAG 2.2's ratio of relative luminances."""
    script = f"""(() => {{ const e = document.body.appendChild(document.createElement("i"));
        e.style.color = "var({colour})"; const c = getComputedStyle(e).color; e.remove();
        return [c, getComputedStyle(document.body).backgroundColor]; }})()"""
    lights = []
    for value in browser.run(script):
        rgb = np.array([int(v) for v in re.findall(r"\d+", value)[:3]]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        lights.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(lights) / min(lights)
