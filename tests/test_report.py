"""Laws of the report: one page that needs nothing else, believes nothing it is told, and says what is missing."""

import base64
import hashlib
import html.parser
import json
import re

import numpy as np
import pytest

from hunyuan_jax import charts, report
from hunyuan_jax.errors import UserError
from hunyuan_jax.video_io import encode_mp4

HOSTILE = '<script>alert("x")</script><img src=https://evil.example/x onerror=alert(1)>\'"&'
ATTRIBUTES = {"colour": "red", "shape": "circle", "direction": "up"}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def run(tmp_path):
    """A run directory with everything in it, hostile words wherever words come from outside."""
    folder = tmp_path / "run"
    frames = np.full((5, 32, 32, 3), 90, np.uint8)
    wrong = ATTRIBUTES | {"shape": HOSTILE}
    videos = []
    for i in range(3):
        name = f"{i:05d}.mp4"
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        (folder / "videos" / name).write_bytes(encode_mp4(frames, fps=8))
        prompt = f"{HOSTILE} {i}"
        videos.append({"file": name, "prompt": prompt, "seen": i > 0, "expected": ATTRIBUTES, "read": wrong if i == 2 else ATTRIBUTES})
    write(folder / "videos" / "index.json", [{"file": row["file"], "prompt": row["prompt"], "seen": row["seen"]} for row in videos])
    accuracy = {"colour": 1.0, "shape": 2 / 3, "direction": 1.0}
    times = [{"t": t / 10, "loss": 1 - t / 20} for t in range(1, 10)]
    parts = {"all": accuracy, "seen": accuracy, "unseen": {"colour": 0.5, "shape": 0.25, "direction": 0.75}}
    write(folder / "evaluation.json", {"vae_psnr_db": 28.64, "flow_loss_by_time": times, "accuracy": parts, "videos": videos})
    write(folder / "timings.json", [{"step": "raw", "seconds": 60.0, "peak_gib": 0.5}, {"step": "t2v", "seconds": 540.5, "peak_gib": 3.25}])
    dropped = {"dropped_for": {HOSTILE: 4}, "passed_gates": 46, "kept": 44}
    write(folder / "clips" / "report.json", {"files": {"found": 20, "bad": 1, "copies": 1}, "shots": 50} | dropped)
    for name in ("vae", "t2v"):
        write(folder / name / "config.json", {"task": name, "note": HOSTILE})
        write(folder / name / "environment.json", {"python": "3.11.9", "devices": [HOSTILE], "packages": {"jax": "0.10.2"}})
        lines = [{"step": s, "seconds": 1.0 * s, "loss": 2.0 / s, f"loss/{HOSTILE}": 1.0, "odd": None, "kl": 0.5} for s in range(1, 100)]
        psnr, seams = f"held_out/psnr/{HOSTILE}_db", f"held_out/seam_error/{HOSTILE}"
        lines[0] |= {psnr: 20.0, seams: 9.5}
        lines[-1] |= {psnr: 28.5, seams: 2.25, "held_out/": 1.0, "held_out/ssim/x": None}
        lines[-1] |= {"time/goodput": 0.75, "time/productive_seconds": 90.0, "time/lost_seconds": 30.0, "time/away_seconds": 0.0}
        lines[-1] |= {"time/samples_per_second": 3.0, "time/frames_per_second": 9.0, "memory/host_gib": 1.5}
        lines[-1] |= {f"grad_norm/double_blocks/{layer:02}": 1.0 + layer for layer in range(20)}
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 100, "lo')
        (folder / name / "previews").mkdir()
        (folder / name / "previews" / "step_00000400.mp4").write_bytes(encode_mp4(frames, fps=8))
    return folder


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def page_of(folder):
    report.write_report(folder)
    return Page((folder / "report.html").read_text())


def test_hostile_words_stay_words(run):
    page = page_of(run)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert not [tag for tag, _ in page.tags if tag == "img"]
    for words in (f"{HOSTILE} 0", f"dropped: {HOSTILE}", f"\u2717 {HOSTILE}"):
        assert words in page.text


def test_the_page_needs_nothing_else(run):
    page = page_of(run)
    sources = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "poster", "action", "data") if name in attrs]
    assert sources
    assert all(source.startswith(("data:", "#")) or source == "clips/report.html" for source in sources)
    assert not re.search(r"@import|url\(", report._STYLE)


def test_the_policy_admits_the_page_s_own_script_only(run):
    text = page_of(run) and (run / "report.html").read_text()
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(attrs["content"] for _, attrs in Page(text).tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_every_clip_and_preview_plays_in_the_page(run):
    videos = [attrs for tag, attrs in page_of(run).tags if tag == "video"]
    assert len(videos) == 3 + 2
    for attrs in videos:
        assert {"controls", "loop", "muted", "playsinline"} <= attrs.keys()
        assert base64.b64decode(attrs["src"].removeprefix("data:video/mp4;base64,"))[4:8] == b"ftyp"


def test_summary_has_exactly_these_figures(run):
    report.write_report(run)
    assert json.loads((run / "summary.json").read_text()) == {
        "seconds": 600.5,
        "peak_gib": 3.25,
        "vae_psnr_db": 28.64,
        "accuracy": {"colour": 1.0, "shape": 2 / 3, "direction": 1.0},
        "accuracy_unseen": {"colour": 0.5, "shape": 0.25, "direction": 0.75},
    }


def test_seen_and_unseen_stand_apart_and_mistakes_are_marked(run):
    text = page_of(run) and (run / "report.html").read_text()
    rows = re.findall(r"<tr><th>([^<]+)<small>(\d+) clips</small></th><td>([\d.]+)", text)
    assert rows == [("All prompts", "3", "100.0"), ("Seen together in training", "2", "100.0"), ("Never seen together", "1", "50.0")]
    cards = re.findall(r'class="card ([^"]+)"', text)
    assert [("unseen" in card.split(), "mistake" in card.split()) for card in cards] == [(True, False), (False, False), (False, True)]


def test_reconstructions_before_and_after_stand_beside_published_ones(run):
    text = page_of(run) and (run / "report.html").read_text()
    assert text.count("<h3>Reconstruction</h3>") == 1  # of the VAE, not of the DiT
    row = re.search(r"<thead><tr><th>held-out clips</th>(.*?)</tr></thead><tbody><tr><th>(.*?)</th>(.*?)</tr>", text)
    assert row[1] == "<th>PSNR, dB</th><th>seams, grey levels</th>"
    assert row[3] == "<td><b>28.5</b> <small>from 20</small></td><td><b>2.25</b> <small>from 9.5</small></td>"
    assert "<tr><th>HunyuanVideo</th><td>4 x 8 x 8</td><td>16</td><td>33.14</td><td>35.39</td></tr>" in text


def test_where_the_time_went_stands_in_order_with_its_share(run):
    text = page_of(run) and (run / "report.html").read_text()
    assert text.count("<h3>Where the time went, over all processes of the run</h3>") == 2
    bars = re.findall(r'<div class="bar"><span>(productive|lost|away)</span>.*?<span>([^<]*)</span></div>', text)
    assert bars == 2 * [("productive", "1 min 30 s, 75.0 %"), ("lost", "30.0 s, 25.0 %")]
    assert "productive_seconds" not in text


def test_what_is_watched_has_its_charts_and_of_many_layers_a_few_lines(run):
    text = page_of(run) and (run / "report.html").read_text()
    keys = {title: re.findall(r'<span class="key c\d">(\S+) <b>', keys) for title, keys in re.findall(
        r'<figcaption><b>([^<]*)</b>(.*?)</figcaption>', text)}  # fmt: skip
    assert keys["Throughput"] == ["samples", "frames"]
    assert keys["Memory of a process"] == ["host_gib"]
    blocks = re.findall(r"<details><summary>Norms of gradients(.*?)</details>", text)
    assert [part.count("<figure") for part in blocks] == [1, 1]
    assert text.count("<b>grad norm/double blocks</b>") == 2  # there alone
    assert keys["grad norm/double blocks"] == ["00", "05", "10", "14", "19"]
    assert keys["Goodput, the share of time that the model kept"] == ["last"]


def test_an_empty_run_says_what_is_missing(tmp_path):
    page = page_of(tmp_path)
    for name in ("videos/index.json", "evaluation.json", "t2v/metrics.jsonl", "vae/metrics.jsonl", "clips/report.json", "timings.json"):
        assert f"{name} is missing" in page.text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seconds"] is None
    assert summary["accuracy"] == {"colour": None, "shape": None, "direction": None}


def test_a_damaged_part_is_named_and_the_rest_is_shown(run):
    (run / "clips" / "report.json").write_text('{"files"')
    (run / "timings.json").write_text("{}")
    (run / "videos" / "00001.mp4").write_bytes(b"no video")
    page = page_of(run)
    assert "clips/report.json cannot be read" in page.text
    assert "timings.json does not hold what it should" in page.text
    assert "00001.mp4 cannot be read" in page.text
    assert sum(tag == "video" for tag, _ in page.tags) == 4


def test_a_clip_named_outside_its_folder_is_not_read(run):
    (run / "secret.mp4").write_bytes((run / "videos" / "00000.mp4").read_bytes())
    write(run / "videos" / "index.json", [{"file": "../secret.mp4", "prompt": "x"}])
    assert "secret.mp4 cannot be read" in page_of(run).text


def test_no_run_directory_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="run directory was expected"):
        report.write_report(tmp_path / "nothing")


def test_what_does_not_fit_into_the_page_stays_beside_it(run, monkeypatch):
    monkeypatch.setattr(report, "EMBEDDED_BYTES", 2 * (run / "videos" / "00000.mp4").stat().st_size)
    page = page_of(run)
    assert sum(tag == "video" for tag, _ in page.tags) == 2
    assert "lies beside this page" in page.text


def test_the_mean_of_a_straight_line_is_that_line_and_of_noise_is_calmer():
    straight = [(float(n), 3.0 * n) for n in range(400)]
    assert charts.smoothed(straight)[50:-50] == pytest.approx(np.array(straight)[50:-50])
    noise = np.random.default_rng(0).normal(size=400)
    assert np.std([y for _, y in charts.smoothed(list(enumerate(noise)))]) < 0.4 * noise.std()


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0.0, 1.0, False), (3.0, 3.7, False), (-5.0, 5.0, False), (1e-4, 50.0, True), (2.0, 90.0, True)]
)
def test_axes_have_a_few_round_ticks_inside_their_range(low, high, log):
    scale = charts.Scale(low, high, 0.0, 100.0, log)
    ticks = scale.ticks()
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert scale(low) == pytest.approx(0.0)
    assert scale(high) == pytest.approx(100.0)


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-9, 1e9], [-1.0, -1.0, -1.0], [2.0] * 50])
def test_a_chart_of_any_finite_values_can_be_drawn(values):
    drawing = charts.chart("x", "", [charts.Series("last", list(enumerate(values)))])
    assert "nan" not in drawing
    assert "inf" not in drawing
