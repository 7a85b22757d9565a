"""Laws of the curation job as a whole, on a small shapes world and on files that are broken on purpose."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from configs import curation
from data_prep import curate, ledger
from data_prep.shapes_world import World, write_world
from hunyuan_jax.data.dataset import open_dataset, sha256_of
from hunyuan_jax.errors import UserError
from hunyuan_jax.video_io import encode_mp4, read_video
from tests.commands import run_module

DATA = ("manifest.parquet", "rejected.parquet", "features.parquet", "files.parquet", "errors.jsonl", "dataset.json")


def run(raw: Path, output: Path, *, workers: int = 1, config: ConfigDict | None = None) -> Path:
    settings = curate.as_settings(config or curation.get_config())
    with ledger.locked(output):
        curate.curate(raw, output, settings, options=curate._beam_options(workers, []))
    return output


def table(output: Path, name: str) -> list[dict]:
    return pq.read_table(output / f"{name}.parquet").to_pylist()


def errors(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "errors.jsonl").read_text().splitlines()]


def hashes(output: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in output.iterdir() if path.name in DATA or path.suffix == ".array_record"}


def moving_square(seed: int, *, frames: int = 24, size: int = 64, step: int = 1) -> np.ndarray:
    """A textured square that moves over a textured ground."""
    rng = np.random.default_rng(seed)
    ground = np.kron(rng.integers(40, 200, (8, 8, 3)), np.ones((size // 8, size // 8, 1))).astype(np.uint8)
    video = np.stack([ground] * frames)
    colour, top = rng.integers(0, 255, 3), int(rng.integers(4, 30))
    for number, frame in enumerate(video):
        frame[top : top + 20, 2 + number * step : 22 + number * step] = colour
    return video


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("world") / "raw"
    write_world(World(clips=65, seed=3), raw, workers=1)
    return raw


@pytest.fixture(scope="module")
def curated(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(world, tmp_path_factory.mktemp("curated") / "clips")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small files, each of one shot."""
    raw = tmp_path_factory.mktemp("pair")
    for seed in (1, 2):
        (raw / f"{seed}.mp4").write_bytes(encode_mp4(moving_square(seed), fps=12))
    return raw


def test_planted_defects_are_found_and_sound_shots_stay(world: Path, curated: Path) -> None:
    reasons = {"no motion": "no motion", "blur": "blurred", "large text": "large text", "black borders": "black borders"}
    rejected, kept = table(curated, "rejected"), table(curated, "manifest")
    copies_planted, lost, sound = 0, 0, 0
    for path in sorted(world.glob("shapes-*.json")):
        sidecar = json.loads(path.read_text())
        source = f"{path.stem}.mp4"
        for shot in sidecar.get("shots", []) if not sidecar.get("defect") else []:
            middle = (shot["start_seconds"] + shot["end_seconds"]) / 2
            here = [row for row in rejected if row["source"] == source and row["start_seconds"] <= middle <= row["end_seconds"]]
            if shot.get("defect") in reasons:
                assert reasons[shot["defect"]] in here[0]["failed"]
                continue
            copies_planted += shot.get("defect") == "near-duplicate"
            sound += 1
            lost += bool(here) and here[0]["failed"] != ["near-duplicate"]
    assert lost <= 0.03 * sound
    assert sum(row["failed"] == ["near-duplicate"] for row in rejected) == copies_planted > 0
    assert len(kept) == sound - lost - copies_planted


def test_bad_files_are_dead_letters_with_a_reason(world: Path, curated: Path) -> None:
    found = {row["source"]: row["reason"] for row in errors(curated)}
    for path in world.glob("shapes-*.json"):
        defect = json.loads(path.read_text()).get("defect")
        if defect:
            assert ("cut off: it declares" if defect == "truncated" else "no video file") in found[f"{path.stem}.mp4"]


def test_a_record_holds_the_frames_and_the_caption_of_its_shot(world: Path, curated: Path) -> None:
    dataset = open_dataset(curated, kind="Clip")
    row = next(row for row in dataset.rows if row["start_seconds"] > 0)
    (clip,) = dataset.read([dataset.rows.index(row)])
    original = read_video(world / row["source"]).frames[row["first_frame"] :][: row["num_frames"]]
    stored = read_video(clip.video)
    assert stored.frames.shape == original.shape == (clip.num_frames, clip.height, clip.width, 3)
    assert stored.fps == clip.fps == 12
    assert np.abs(stored.frames.astype(int) - original).mean() < 3
    shots = json.loads((world / row["source"]).with_suffix(".json").read_text())["shots"]
    (shot,) = [shot for shot in shots if shot["start_seconds"] <= clip.start_seconds < shot["end_seconds"]]
    assert clip.caption == {**shot["caption"], "source": "sidecar"}
    assert clip.camera == shot["camera"]
    assert clip.end_seconds == pytest.approx(shot["end_seconds"], abs=1e-3)


def test_output_does_not_depend_on_the_number_of_workers(world: Path, curated: Path, tmp_path: Path) -> None:
    assert hashes(run(world, tmp_path / "clips", workers=2)) == hashes(curated)


def test_running_again_does_nothing(world: Path, curated: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in curated.iterdir() if path.name != ".lock"}
    run(world, curated)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in curated.iterdir() if path.name != ".lock"} == before


def test_added_files_join_and_what_was_there_stays(pair: Path, tmp_path: Path) -> None:
    raw, output = tmp_path / "raw", tmp_path / "clips"
    shutil.copytree(pair, raw)
    run(raw, output)
    old, rows = hashes(output), table(output, "manifest")
    (raw / "3.mp4").write_bytes(encode_mp4(moving_square(3), fps=12))
    (raw / "4.mp4").write_bytes(encode_mp4(moving_square(1), fps=12, crf=24))
    shutil.copy(raw / "2.mp4", raw / "5.mp4")
    run(raw, output)
    now = hashes(output)
    assert {name: now[name] for name in old if name.endswith("array_record")} == {
        name: old[name] for name in old if name.endswith("array_record")
    }
    assert table(output, "manifest")[: len(rows)] == rows
    assert [row["source"] for row in table(output, "manifest")] == [*(row["source"] for row in rows), "3.mp4"]
    first = next(row["id"] for row in rows if row["source"] == "1.mp4")
    assert [(row["source"], row["duplicate_of"]) for row in table(output, "rejected")] == [("4.mp4", first)]
    assert {row["source"]: (row["state"], row["copy_of"]) for row in table(output, "files")}["5.mp4"] == ("copy", "2.mp4")
    assert len(open_dataset(output, kind="Clip").read([0, 1, 2])) == 3


def test_what_is_lost_is_made_again_as_it_was(pair: Path, tmp_path: Path) -> None:
    output = run(pair, tmp_path / "clips")
    before = hashes(output)
    for lost in (*(path for path in output.iterdir() if path.suffix == ".array_record"), output / "files.parquet", output / "dataset.json"):
        lost.unlink()
        run(pair, output)
        assert hashes(output) == before, lost
    (output / "report.html").unlink()
    run(pair, output)
    assert (output / "report.html").exists()


@pytest.mark.parametrize("moment", ["write_report", "write_index", "write_json"])
def test_a_killed_run_leaves_the_old_dataset_and_the_next_one_ends_as_if_nothing_happened(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    raw, output = tmp_path / "raw", tmp_path / "clips"
    raw.mkdir()
    shutil.copy2(pair / "1.mp4", raw)
    run(raw, output)
    old = (output / "dataset.json").read_bytes()
    shutil.copy2(pair / "2.mp4", raw)
    (raw / "still.mp4").write_bytes(encode_mp4(moving_square(5, step=0), fps=12))
    uninterrupted = shutil.copytree(output, tmp_path / "uninterrupted")
    run(raw, uninterrupted)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # The last moment lies within write_index: between the manifest and dataset.json.
        patch.setattr("hunyuan_jax.data.dataset.write_json" if moment == "write_json" else f"data_prep.ledger.{moment}", killed)
        with pytest.raises(KeyboardInterrupt):
            run(raw, output)
    assert (output / "dataset.json").read_bytes() == old
    run(raw, output)
    assert hashes(output) == hashes(uninterrupted)
    assert not [path for path in output.iterdir() if ".tmp-" in path.name or path.name == ".work"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[]", "should be"),
        (b"[" * 100_000, "no JSON"),
        (b'{"shots": [{"start_seconds": 2, "end_seconds": 1}]}', "start_seconds before"),
        (b'{"shots": [{"start_seconds": 0, "end_seconds": 2, "camera": "<b>", "caption": {"short": "x"}}]}', "none of the 14 labels"),
        (b'{"shots": [{"start_seconds": 0, "end_seconds": 2, "caption": {"short": "\\ud800"}}]}', "half of a surrogate"),
        (b'{"shots": [{"start_seconds": 0, "end_seconds": 2, "caption": {"short": "x", "quality_tags": "sharp"}}]}', "list of short texts"),
    ],
)
def test_a_malformed_sidecar_costs_the_caption_and_not_the_clip(pair: Path, tmp_path: Path, content: bytes, reason: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    shutil.copy(pair / "1.mp4", raw)
    (raw / "1.json").write_bytes(content)
    output = run(raw, tmp_path / "clips")
    (row,) = table(output, "manifest")
    assert json.loads(row["caption"])["source"] == "template"
    (error,) = errors(output)
    assert (error["source"], error["stage"]) == ("1.mp4", "caption")
    assert reason in error["reason"]


def test_words_from_outside_cannot_become_markup(pair: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    evil = "<script>alert(1)</script>"
    shutil.copy(pair / "1.mp4", raw / "<img src=x>.mp4")
    (raw / "<b>bad.mp4").write_bytes(b"no video")
    entry = {"start_seconds": 0, "end_seconds": 2, "caption": {"short": evil}}
    (raw / "<img src=x>.json").write_text(json.dumps({"shots": [entry]}))
    page = (run(raw, tmp_path / "clips") / "report.html").read_text()
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;bad.mp4" in page
    for markup in ("<script", "<img src=x>", "<b>", "http://", "https://"):
        assert markup not in page


def test_an_empty_result_says_what_dropped_it_and_leaves_the_report(pair: Path, tmp_path: Path) -> None:
    config = curation.get_config()
    config.filter.max_blur = 0.01
    with pytest.raises(UserError, match="No clip is left of 2 shots; dropped for: 2 blurred"):
        run(pair, tmp_path / "clips", config=config)
    assert "blurred" in (tmp_path / "clips" / "report.html").read_text()
    assert not (tmp_path / "clips" / "dataset.json").exists()


def test_another_configuration_asks_for_another_folder(pair: Path, tmp_path: Path) -> None:
    output = run(pair, tmp_path / "clips")
    (output / "mine.txt").write_text("not ours")
    config = curation.get_config()
    config.write.crf = 20
    with pytest.raises(UserError, match="new output folder, or --restart"):
        run(pair, output, config=config)
    ledger.restart(output)
    assert {path.name for path in output.iterdir()} == {".lock", "mine.txt"}


def test_how_the_job_runs_is_no_part_of_the_fingerprint() -> None:
    config, other = curation.get_config(), curation.get_config()
    other.run.isolate = True
    assert curate.as_settings(config).fingerprint() == curate.as_settings(other).fingerprint()
    other.split.max_seconds = 9.0
    assert curate.as_settings(config).fingerprint() != curate.as_settings(other).fingerprint()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("filter.max_blr", "0.5", "filter.max_blr is unknown. Did you mean max_blur?"),
        ("fliter.max_blur", "0.5", "Did you mean filter?"),
        ("filter", "1", "Config key filter is unknown"),
        ("filter.max_blur", "sharp", "should be of type float, but 'sharp' came"),
        ("write.crf", "1.5", "should be of type int"),
    ],
)
def test_a_wrong_config_key_or_value_is_one_clear_error(key: str, value: str, said: str) -> None:
    path = curation.__file__
    with pytest.raises(UserError) as caught:
        curate.read_config(path, {key: value})
    assert said in str(caught.value)


def test_overrides_reach_the_settings() -> None:
    settings = curate.read_config(curation.__file__, {"filter.max_blur": "0.5", "split.max_seconds": "4"})
    assert (settings.filter.max_blur, settings.split.max_seconds) == (0.5, 4)


def test_a_misspelt_option_of_the_command_is_not_passed_over_to_beam() -> None:
    with pytest.raises(UserError, match=r"--wrokers is neither ours nor Beam's\. Did you mean workers"):
        curate._beam_options(1, ["--wrokers=3"])


def test_the_command_ends_with_code_2_and_one_line_for_a_missing_folder(tmp_path: Path) -> None:
    said = run_module(
        "data_prep.curate", "--input", f"{tmp_path}/none", "--output", f"{tmp_path}/out", "--config", curation.__file__, expect=2
    )
    assert said == f"error: A folder with video files was expected at {tmp_path / 'none'}, but there is none.\n"


def test_folders_without_video_and_of_other_datasets_are_refused(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "notes.txt").write_text("no video")
    with pytest.raises(UserError, match="holds no video file"):
        run(tmp_path / "raw", tmp_path / "clips")
    (tmp_path / "clips" / "dataset.json").write_text('{"kind": "Latent"}')
    with pytest.raises(UserError, match="another kind"):
        run(pair, tmp_path / "clips")


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with ledger.locked(tmp_path), pytest.raises(UserError, match="Another curation"), ledger.locked(tmp_path):
        pass
