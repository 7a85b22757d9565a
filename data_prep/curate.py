"""Curation, an Apache Beam job: raw video files -> a dataset of single-shot clips, and a report of what was dropped and why.

    python -m data_prep.curate --input DIR --output DIR --config configs/curation.py [--workers 2] [--config.filter.max_blur=0.6]

    find -> split, score (one pass of decoding per file) -> filter -> drop near-duplicates -> caption -> cut -> shards
                      |                                   |                |                  |        |
                 errors.jsonl                    rejected.parquet   rejected.parquet    errors.jsonl   errors.jsonl

What it leaves in the output folder, beside the dataset (see hunyuan_jax/data/dataset.py):

    rejected.parquet  every dropped shot: all gates it failed, its scores, a thumbnail        errors.jsonl  what could not be used
    features.parquet  embedding and thumbnail of every kept clip     files.parquet  every file that was looked at, with its sha256
    report.html, report.json

Running again does nothing; added files are curated alone and join as a new group of shards. `dataset.json` names the groups
that are finished and is written last, so a job that is killed leaves what was there, and rows of unfinished groups count for
nothing. The output does not depend on the number of workers. Options that are not ours go to Beam, e.g. --runner=...; workers
have to see both folders.
"""

import argparse
import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import logging
import re
import shlex
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

if __name__ == "__main__":
    # Beam warns on import about a Google library that nobody needs here; what goes wrong in a run is an exception.
    logging.getLogger().setLevel(logging.ERROR)

import apache_beam as beam
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.transforms.environments import SubprocessSDKEnvironment
from ml_collections import ConfigDict
from tqdm import tqdm

from data_prep import ledger as ledgers
from data_prep.caption import CaptionConfig, CaptionFile
from data_prep.dedup import DedupConfig, MarkNearDuplicates, kept_point
from data_prep.filter import FilterConfig, apply_gates
from data_prep.ledger import Found, Growth, Ledger
from data_prep.report import Tables, funnel
from data_prep.score import Measured, MeasureFile, ScoreConfig, content_sha256
from data_prep.split import VERSION, Shot, SplitConfig
from data_prep.write import CutClips, Row, WriteConfig, WriteRows, WriteShard, read_rows, rejected_row, with_shard
from hunyuan_jax.errors import UserError, run_command
from hunyuan_jax.video_io import MediaError

_PARTS = 8  # files that the rows of one table are spread over on their way back


# --- Settings -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class FindConfig:
    """What is taken for a video file."""

    extensions: tuple[str, ...]  # in lower case, with the dot


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the job runs; changes nothing in what it writes."""

    isolate: bool  # decode in a child process, so that a file that crashes the decoder costs only itself
    timeout_seconds: int  # of one file, where it is isolated


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """The sections of configs/curation.py, one for each part of the job."""

    find: FindConfig
    split: SplitConfig
    score: ScoreConfig
    filter: FilterConfig
    dedup: DedupConfig
    caption: CaptionConfig
    write: WriteConfig
    run: RunConfig

    def fingerprint(self) -> str:
        """Changes when the output for the same input may change."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if name != "run"}
        return hashlib.sha256(json.dumps([VERSION, settings], sort_keys=True).encode()).hexdigest()[:16]


C = TypeVar("C")
_KINDS: dict[Any, tuple[type, ...]] = {float: (int, float), int: (int,), bool: (bool,)}


def checked(kind: type[C], values: Mapping[str, Any], where: str) -> C:
    """Builds a dataclass from `values`. Raises `UserError` for a key that is unknown (with the nearest right one), missing or
    of another type."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(f"Config key {where}{key} is unknown.{_nearest(key, fields)}")
    if missing := sorted(set(fields) - set(values)):
        raise UserError(f"Config key {where}{missing[0]} is missing. Take configs/curation.py as a pattern.")
    for key, value in values.items():
        if not isinstance(value, _KINDS.get(fields[key], (object,))) or (fields[key] is not bool and isinstance(value, bool)):
            raise UserError(
                f"Config key {where}{key} should be of type {getattr(fields[key], '__name__', fields[key])}, but {value!r} came."
            )
    return kind(**values)


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else f" Known are {', '.join(sorted(known))}."


def read_config(path: str, overrides: Mapping[str, str]) -> CurationConfig:
    """Loads FILE[:ARGUMENT] and sets `overrides` (dotted key -> text). Raises `UserError` for what does not fit."""
    name, _, argument = path.partition(":")
    spec = importlib.util.spec_from_file_location("curation_config", name)
    if spec is None or spec.loader is None or not Path(name).is_file():
        raise UserError(f"A configuration file was expected at {name}, but there is none. The repository has configs/curation.py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument or None)
    except (SyntaxError, ImportError, NameError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no configuration: {error}") from error
    for key, text in overrides.items():
        _override(config, key, text)
    return as_settings(config)


def as_settings(config: ConfigDict) -> CurationConfig:
    """Checks every section and key of a configuration."""
    kinds = {field.name: field.type for field in dataclasses.fields(CurationConfig)}
    for section in config:
        if section not in kinds:
            raise UserError(f"Config section {section} is unknown.{_nearest(section, kinds)}")
    if missing := sorted(set(kinds) - set(config)):
        raise UserError(f"Config section {missing[0]} is missing. Take configs/curation.py as a pattern.")
    return CurationConfig(**{name: checked(kind, dict(config[name]), f"{name}.") for name, kind in kinds.items()})  # type: ignore[arg-type]


def _override(config: ConfigDict, key: str, text: str) -> None:
    *sections, last = key.split(".")
    place = config
    for section in sections:
        if section not in place:
            raise UserError(f"Config section {section} in --config.{key} is unknown.{_nearest(section, place)}")
        place = place[section]
    if not isinstance(place, ConfigDict) or last not in place or isinstance(place[last], ConfigDict):
        raise UserError(f"Config key {key} is unknown.{_nearest(last, place if isinstance(place, ConfigDict) else ())}")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    with place.ignore_type():
        place[last] = value


# --- The job ------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What one run of the pipeline works on. Folders are strings, since every worker gets them."""

    folder: str
    output: str
    work: str
    group: str
    config: CurationConfig


def curation(pipeline: beam.Pipeline, job: Job, sources: Sequence[str], ledger: Ledger) -> None:
    """The pipeline: every row that comes out of it lies in the work folder afterwards, and every shard in the output."""
    config = job.config
    timeout = config.run.timeout_seconds if config.run.isolate else None

    hashed, unreadable = (
        pipeline
        | "find" >> beam.Create(list(sources))
        | "spread files" >> beam.Reshuffle()
        | "hash" >> beam.Map(_hashed, folder=job.folder).with_exception_handling(exc_class=OSError)
    )
    known = pipeline | "known files" >> beam.Create([(row["sha256"], (0, row["source"])) for row in ledger.tables.files if row["sha256"]])
    firsts, copies = (
        (hashed, known)
        | "all files" >> beam.Flatten()
        | "same content" >> beam.GroupByKey()
        | "first of a content" >> beam.FlatMap(_first_and_copies).with_outputs("copies", main="firsts")
    )

    measured, unusable = firsts | "split and score" >> beam.ParDo(
        MeasureFile(job.folder, job.work, split=config.split, score=config.score)
    ).with_exception_handling(use_subprocess=config.run.isolate, timeout=timeout)
    shots = measured | "shots" >> beam.FlatMap(lambda file: file.shots) | "gates" >> beam.Map(apply_gates, config.filter)
    failed, passed = shots | "failed" >> beam.Filter(_is_dropped), shots | "passed" >> beam.Filter(_is_kept)

    kept = pipeline | "clips of earlier runs" >> beam.Create([kept_point(row["id"], row["embedding"]) for row in ledger.tables.features])
    marked = {"shots": passed, "kept": kept} | "near-duplicates" >> MarkNearDuplicates(config.dedup)
    copied, unique = marked | "copied" >> beam.Filter(_is_dropped), marked | "unique" >> beam.Filter(_is_kept)

    captioned, uncaptioned = (
        unique
        | "by file" >> beam.Map(lambda shot: (shot.source, shot))
        | "group by file" >> beam.GroupByKey()
        | "caption" >> beam.ParDo(CaptionFile(job.folder, config.caption)).with_outputs("errors", main="shots")
    )
    cut, uncut = captioned | "cut" >> beam.ParDo(CutClips(job.folder, job.work, config.write)).with_exception_handling(exc_class=MediaError)
    clips = beam.pvalue.AsSingleton(cut | "count" >> beam.combiners.Count.Globally())
    written = (
        cut
        | "by shard" >> beam.Map(with_shard, clips, config.write)
        | "group by shard" >> beam.GroupByKey()
        | "write shard" >> beam.ParDo(WriteShard(job.output, job.work, job.group, config.write), clips)
    )

    dropped = (failed, copied) | "dropped" >> beam.Flatten() | "rejected rows" >> beam.Map(lambda shot: ("rejected", rejected_row(shot)))
    files = (
        (measured | "file rows" >> beam.Map(_file_row), copies)
        | "files" >> beam.Flatten()
        | "of files" >> beam.Map(lambda row: ("files", row))
    )
    faults = [
        letters | f"dead letters of {stage}" >> beam.Map(_dead_letter, stage=stage)
        for stage, letters in (("find", unreadable), ("split", unusable), ("write", uncut))
    ]
    errors = (*faults, uncaptioned) | "errors" >> beam.Flatten() | "of errors" >> beam.Map(lambda row: ("errors", row))
    _ = (
        (written, dropped, files, errors)
        | "rows" >> beam.Flatten()
        | "by table" >> beam.Map(_by_part)
        | "group by table" >> beam.GroupByKey()
        | "write rows" >> beam.ParDo(WriteRows(job.work))
    )


def _is_dropped(shot: Shot) -> bool:
    return bool(shot.failed)


def _is_kept(shot: Shot) -> bool:
    return not shot.failed


def _hashed(source: str, *, folder: str) -> tuple[str, tuple[int, str]]:
    return content_sha256(Path(folder) / source), (1, source)


def _first_and_copies(group: tuple[str, Iterable[tuple[int, str]]]) -> Iterator[Any]:
    """Of files with the same content the first is measured: one of an earlier run, else the first by name."""
    sha256, (first, *others) = group[0], sorted(group[1])
    if first[0]:
        yield first[1], sha256
    for new, source in others:
        if new:
            row = {"source": source, "state": "copy", "copy_of": first[1], "sha256": sha256, "frames": 0, "shots": 0}
            yield beam.pvalue.TaggedOutput("copies", row)


def _file_row(file: Measured) -> Row:
    return {"source": file.source, "state": "read", "copy_of": "", "sha256": file.sha256, "frames": file.frames, "shots": len(file.shots)}


def _dead_letter(letter: tuple[Any, tuple[Any, ...]], *, stage: str) -> Row:
    """A file that could not be used, and why. The element is a path or a tuple that begins with it."""
    element, (kind, _, trace) = letter[0], letter[1][:3]
    reason = str(trace[-1]).strip().partition(": ")[2]
    ours = getattr(kind, "__name__", "") == MediaError.__name__
    return {
        "source": element if isinstance(element, str) else element[0],
        "stage": stage,
        "reason": reason if ours else f"{getattr(kind, '__name__', kind)}: {reason}",
    }


def _by_part(row: tuple[str, Row]) -> tuple[tuple[str, int], Row]:
    key = row[1].get("source", row[1].get("id", row[1].get("name")))
    return (row[0], zlib.crc32(str(key).encode()) % _PARTS), row[1]


# --- Running it -----------------------------------------------------------------------------------------------------------------


def _run(job: Job, sources: Sequence[str], ledger: Ledger, options: PipelineOptions) -> dict[str, float]:
    """Runs the pipeline with a progress bar; returns what its parts took, in seconds summed over the workers."""
    (Path(job.work) / "records").mkdir(parents=True)
    (Path(job.work) / "rows").mkdir()
    pipeline = beam.Pipeline(options=options, runner=_runner(options, Path(job.work) / "workers.log"))
    curation(pipeline, job, sources, ledger)
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(Path(job.work) / "progress", 2 * len(sources), done), daemon=True)
    watcher.start()
    try:
        result = pipeline.run()
        result.wait_until_finish()
    except Exception as error:
        # A worker's full disk arrives as text only; the errno in it says what the user can mend.
        number = re.search(r"\[Errno (\d+)\]", str(error))
        if number and not isinstance(error, OSError):
            raise OSError(int(number.group(1)), str(error).splitlines()[-1], job.output) from error
        raise
    finally:
        done.set()
        watcher.join()
    return {found.key.metric.name.removesuffix("_ms"): found.committed.sum / 1000 for found in result.metrics().query()["distributions"]}


def _runner(options: PipelineOptions, log: Path) -> FnApiRunner | None:
    """Beam's local runner with processes that log to a file, where several are asked for; else None, for what `options` say."""
    workers = options.view_as(DirectOptions).direct_num_workers
    given = options.view_as(DirectOptions).direct_running_mode != "in_memory"
    if options.view_as(StandardOptions).runner != "FnApiRunner" or workers == 1 or given:
        return None
    command = f"{shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main 2>> {shlex.quote(str(log.resolve()))}"
    return FnApiRunner(default_environment=SubprocessSDKEnvironment.from_command_string(command))


def _watch(progress: Path, total: int, done: threading.Event) -> None:
    """Each file counts twice: when it is measured and when its clips are cut."""
    with tqdm(total=total, desc="curate", unit="step") as bar:
        finished = False
        while not finished:
            finished = done.wait(0.5)
            bar.n = min(total, progress.stat().st_size) if progress.exists() else 0
            # A file without any clip to cut never takes its second step.
            bar.total = bar.n if finished else total
            bar.refresh()


def _growth(job: Job, found: Mapping[str, Found], sources: Sequence[str]) -> Growth:
    """What the workers have left in the work folder, with a row for each file that could not be used."""
    work = Path(job.work)
    rows = {row["source"]: row for row in read_rows(work, "files")}
    bad = {"state": "bad", "copy_of": "", "sha256": "", "frames": 0, "shots": 0}
    files = [{**rows.get(source, {"source": source, **bad}), **dataclasses.asdict(found[source])} for source in sources]
    tables = {name: read_rows(work, name) for name in ("manifest", "features", "rejected", "errors")}
    return Growth(group=job.group, shards=read_rows(work, "shards"), tables=Tables(files=files, **tables))


def _beam_options(workers: int, extra: Sequence[str]) -> PipelineOptions:
    """Beam's own local runner by default: its other one would fetch a program from the network. Raises `UserError` for options
    that nobody knows."""
    given = {option.partition("=")[0] for option in extra}
    defaults = {"--runner": "FnApiRunner", "--direct_num_workers": str(workers)}
    options = PipelineOptions([*(f"{name}={value}" for name, value in defaults.items() if name not in given), *extra])
    known = options.get_all_options()
    for option in extra:
        name = option.partition("=")[0].lstrip("-")
        if option.startswith("--") and name not in known:
            ours = ["input", "output", "config", "workers", "restart"]
            raise UserError(f"Option --{name} is neither ours nor Beam's.{_nearest(name, [*ours, *known])}")
    return options


def _group_name(ledger: Ledger, found: Mapping[str, Found], sources: Sequence[str]) -> str:
    seed = json.dumps([ledger.groups, [(source, found[source].size) for source in sources]])
    return hashlib.sha256(seed.encode()).hexdigest()[:6]


def _check_same_config(ledger: Ledger, config: CurationConfig, output: Path) -> None:
    if ledger.made_from and ledger.made_from["config"] != config.fingerprint():
        raise UserError(
            f"{output} was curated with another configuration or version. Choose a new output folder, or --restart to replace it."
        )


def curate(folder: Path, output: Path, config: CurationConfig, *, options: PipelineOptions) -> None:
    """Curates what is new in `folder` into `output`; says what it does."""
    began = time.perf_counter()
    found, others = ledgers.scan(folder, config.find.extensions)
    ledger = ledgers.load(output)
    _check_same_config(ledger, config, output)
    ledgers.clean(output, ledger)
    for row in (lost := ledgers.lost_shards(output, ledger)):
        print(f"curate: {row['name']} is lost or damaged and is made again")
        ledgers.remake_shard(folder, output, row, ledger, config.write)
    sources, changed = ledgers.new_files(ledger, found)
    clips = len(ledger.tables.manifest)
    if changed:
        print(f"curate: {len(changed)} files have changed since they were curated ({changed[0]} ...); their clips stay as they are")
    if not sources:
        _finish_report(output, ledger, time.perf_counter() - began)
        print(f"curate: nothing {'else ' if lost else ''}to do: {len(found)} files are curated, {clips} clips in {output}")
        return
    print(f"curate: {len(sources)} new of {len(found)} video files in {folder} ({others} other files); {clips} clips so far")
    job = Job(folder=str(folder), output=str(output), work=str(output / ".work"), group=_group_name(ledger, found, sources), config=config)
    parts = _run(job, sources, ledger, options)
    made_from = {"config": config.fingerprint(), "settings": {**dataclasses.asdict(config), "run": {}}, "version": VERSION}
    seconds = {"all": time.perf_counter() - began, **{f"{name}, summed over workers": value for name, value in parts.items()}}
    tables = ledgers.publish(output, ledger, _growth(job, found, sources), made_from=made_from, seconds=seconds)
    shutil.rmtree(job.work)
    _say_result(tables, output, time.perf_counter() - began)


def _finish_report(output: Path, ledger: Ledger, seconds: float) -> None:
    if not (output / "report.html").exists() or not (output / "report.json").exists():
        print("curate: the report is lost and is made again")
        ledgers.write_report(output, ledger.tables, seconds={"all": seconds})


def _say_result(tables: Tables, output: Path, seconds: float) -> None:
    counts = funnel(tables)
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped_for"].items()) or "none"
    page, went = output / "report.html", f"dropped for: {dropped}; {counts['files']['bad']} bad files"
    if not counts["kept"]:
        raise UserError(f"No clip is left of {counts['shots']} shots; {went}. See {page} and loosen a gate.")
    print(f"curate: kept {counts['kept']} of {counts['shots']} shots in {seconds:.1f} s; {went}")
    print(f"curate: the report is {page}")


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str], list[str]]:
    """Our options, the overrides (dotted key -> text), and what is left for Beam."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.curate", description="Raw video files -> single-shot clips.", allow_abbrev=False
    )
    parser.add_argument("--input", type=Path, required=True, help="folder with video files, and NAME.json beside NAME.mp4 for captions")
    parser.add_argument("--output", type=Path, required=True, help="folder of the dataset; one that exists grows by the new files")
    parser.add_argument("--config", required=True, help="configs/curation.py or one like it; --config.SECTION.KEY=VALUE changes a value")
    parser.add_argument("--workers", type=int, default=1, help="processes; the result does not depend on it")
    parser.add_argument("--restart", action="store_true", help="remove what was curated into the output folder before")
    overrides = [option for option in argv[1:] if option.startswith("--config.")]
    args, extra = parser.parse_known_args([option for option in argv[1:] if option not in overrides])
    if wrong := [option for option in overrides if "=" not in option]:
        raise UserError(f"{wrong[0]} should be followed by =VALUE.")
    return args, dict(option.removeprefix("--config.").split("=", 1) for option in overrides), extra


def main(argv: list[str]) -> None:
    """The command; see this file's docstring."""
    args, overrides, extra = _parse(argv)
    if not 1 <= args.workers <= 1024:
        raise UserError(f"--workers must be between 1 and 1024, not {args.workers}.")
    config = read_config(args.config, overrides)
    options = _beam_options(args.workers, extra)
    ledgers.scan(args.input, config.find.extensions)
    with ledgers.locked(args.output):
        if args.restart:
            ledgers.restart(args.output)
        curate(args.input, args.output, config, options=options)


if __name__ == "__main__":
    run_command(main)
