"""Verification finds tampering, refuses what is not a record and touches nothing outside.

Bundles are the same bytes every time.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_records import (
    GOAL,
    IMITATION,
    folder_of,
    synthetic_cell,
    synthetic_updates,
    write_record,
    write_suite,
)

from scpo_bench.records.files import (
    COMPRESSED_UPDATES_FILE,
    RUN_FILE,
    UPDATES_FILE,
    RecordError,
)
from scpo_bench.records.schema import Update
from scpo_bench.submissions import contents
from scpo_bench.submissions.bundle import bundle
from scpo_bench.submissions.contents import MANIFEST_FILE, Refused, safe_parts
from scpo_bench.submissions.verify import verify

PLANNED = [
    synthetic_cell(agent, task, seed, 4)
    for task, agent, seeds in (
        (IMITATION, "scpo", 3),
        (IMITATION, "sgd", 2),
        (GOAL, "scpo", 2),
        (GOAL, "sgd", 2),
    )
    for seed in range(seeds)
]
"""Of the fixture ``results``, and one seed that has no record."""


@pytest.fixture
def run_folder(tmp_path):
    cell = synthetic_cell("scpo", IMITATION, 0, 6)
    return write_record(tmp_path / "results", "s", cell, synthetic_updates(cell, 6))


@pytest.fixture
def results(tmp_path):
    root = tmp_path / "results"
    write_suite(root, "s", (IMITATION, GOAL), ("scpo", "sgd"), seeds=2, updates=4)
    return root


def edit_run(folder: Path, **fields: object) -> None:
    path = folder / RUN_FILE
    content = json.loads(path.read_text())
    for name, value in fields.items():
        *parents, last = name.split("__")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    path.write_text(json.dumps(content, indent=1) + "\n")


def edit_lines(folder: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    path = folder / COMPRESSED_UPDATES_FILE
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join(change(lines)), mtime=0))


def test_honest_records_are_consistent(results):
    """What the harness writes passes as a run, as a suite and as a results folder."""
    folder = folder_of(results, "s", synthetic_cell("scpo", IMITATION, 0, 4))
    for path, runs in ((folder, 1), (results / "s", 8), (results, 8)):
        report = verify(path)
        assert report.ok, report.problems
        assert (report.tier, report.runs, report.finished, report.sealed) == (
            "consistent",
            runs,
            runs,
            False,
        )
        assert "consistent" in str(report)


def numbers_of(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all numbers and booleans in a JSON value."""
    if isinstance(value, dict):
        return [found for key, inner in value.items() for found in numbers_of(inner, (*path, key))]
    return [path] if isinstance(value, int | float) else []


def test_every_changed_number_in_the_updates_is_found(run_folder):
    """Each number of a line, timing included, is changed by itself and found every time."""
    original = (run_folder / COMPRESSED_UPDATES_FILE).read_bytes()
    lines = gzip.decompress(original).splitlines()
    paths = numbers_of(json.loads(lines[3]))
    assert len(paths) > 25
    for path in paths:
        content = json.loads(lines[3])
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        value = inner[path[-1]]
        inner[path[-1]] = (not value) if isinstance(value, bool) else value + 1
        changed = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        edit_lines(run_folder, lambda old, new=changed: [*old[:3], new + b"\n", *old[4:]])
        report = verify(run_folder)
        assert not report.ok, path
        (run_folder / COMPRESSED_UPDATES_FILE).write_bytes(original)
    assert verify(run_folder).ok


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("cell__seed", 1, "key"),
        ("cell__steps", 599, "key"),
        ("cell__cost_limit", 0.5, "key"),
        ("cell__config", {"learning_rate": 1.0}, "key"),
        ("key", "0" * 64, "key"),
        ("digest", "0" * 64, "digest"),
        ("digest", None, "digest"),
        ("updates", 6, "updates"),
        ("updates", 8, "updates"),
        ("status", "failed", "digest"),
        ("ended", "2025-12-13T09:00:00+00:00", "ended"),
        ("ended", "2025-12-13T10:00:00+00:00", "wall_time_s"),
        ("ended", "yesterday", "ended"),
    ],
)
def test_a_changed_run_file_is_found(run_folder, field, value, named):
    """Every field of run.json that something depends on is checked against it."""
    edit_run(run_folder, **{field: value})
    report = verify(run_folder)
    assert not report.ok
    assert any(named in line for line in report.problems), report.problems


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines, lines[-1][:20]],
        lambda lines: [*lines, b"\n"],
        lambda lines: [lines[0].replace(b'{"', b'{ "'), *lines[1:]],
        lambda lines: [lines[0].replace(b'"update":0', b'"update":0,"update":0'), *lines[1:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [],
    ],
    ids=[
        "cut",
        "doubled",
        "half a line more",
        "empty line",
        "space",
        "repeated field",
        "swapped",
        "emptied",
    ],
)
def test_a_changed_length_or_form_is_found(run_folder, change):
    """Lines removed, added, reordered or written in another way, even if each number stays."""
    edit_lines(run_folder, change)
    assert not verify(run_folder).ok


def test_a_forged_digest_does_not_help(tmp_path):
    """Violations edited away with key and digest recomputed still contradict the other fields."""
    cell = synthetic_cell("sgd", IMITATION, 0, 10)
    honest = synthetic_updates(cell, 10)
    violating = next(u.update for u in honest if u.iterate_violates)

    def forge(**fields: object) -> list[Update]:
        return [
            Update(**{**u.model_dump(), **fields}) if u.update == violating else u for u in honest
        ]

    forgeries = {
        "iterate_violates": {"iterate_violates": False},
        "iterate_cost": {"iterate_violates": None},
        "violating_episodes": {
            "violating_episodes": 0 if honest[violating].violating_episodes else 1
        },
        "violating_steps": {"violating_steps": 0 if honest[violating].violating_steps else 1},
        "interaction_steps": {"interaction_steps": 0},
        "cost_mean": {"cost_mean": 1e6},
        "episodes": {"episodes": 0},
        "probe_steps": {"probe_steps": 10**6},
        "cost_sum": {"cost_sum": -1.0},
        "steps_per_s": {"wall_time_s": 0.001},
    }
    for i, (named, fields) in enumerate(forgeries.items()):
        folder = write_record(tmp_path / str(i), "s", cell, forge(**fields))
        problems = verify(folder).problems
        assert any(named in line for line in problems), (named, problems)


def test_killed_and_failed_runs_are_consistent(tmp_path):
    """A run killed in the middle of a line, or failed before its first update, is still honest."""
    killed = synthetic_cell("sgd", IMITATION, 0, 10)
    folder = write_record(
        tmp_path, "s", killed, synthetic_updates(killed, 10)[:5], status="running"
    )
    with open(folder / UPDATES_FILE, "ab") as file:
        file.write(b'{"cost_max":1')
    failed = synthetic_cell("sgd", IMITATION, 1, 10)
    folder = write_record(tmp_path, "s", failed, [], status="failed", error="ValueError: no")
    (folder / "traceback.txt").write_text("Traceback ...")
    report = verify(tmp_path)
    assert report.ok, report.problems
    assert (report.runs, report.finished) == (2, 0)
    notes = "\n".join(report.notes)
    assert "the last line is incomplete" in notes
    assert "failed (ValueError: no)" in notes
    assert "traceback.txt" in notes


def test_copies_and_strays_are_found(results):
    """One run counted twice, or lines without a run, would shift every average."""
    source = folder_of(results, "s", synthetic_cell("scpo", IMITATION, 0, 4))
    copy = results / "s" / "again" / "seed-0"
    copy.mkdir(parents=True)
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    stray = results / "s" / "stray"
    stray.mkdir()
    (stray / UPDATES_FILE).write_bytes(b"")
    problems = "\n".join(verify(results).problems)
    assert "the same run as" in problems
    assert "belongs to no run" in problems


def test_both_forms_at_once_are_found(run_folder):
    """It must always be clear which file of updates counts."""
    (run_folder / UPDATES_FILE).write_bytes(
        gzip.decompress((run_folder / COMPRESSED_UPDATES_FILE).read_bytes())
    )
    assert any("one of them" in line for line in verify(run_folder).problems)


def test_missing_updates_are_found(run_folder):
    """A finished run without its updates, or one that counts some, hides what happened."""
    (run_folder / COMPRESSED_UPDATES_FILE).unlink()
    assert any("no file of them" in line for line in verify(run_folder).problems)
    edit_run(run_folder, status="failed", digest=None)
    assert any("no file of them" in line for line in verify(run_folder).problems)
    edit_run(run_folder, updates=0)
    assert verify(run_folder).ok
    edit_run(run_folder, cell__steps=10**400)
    assert any("steps: expected at most" in line for line in verify(run_folder).problems)


# What is refused.


def one_line(path: Path) -> str:
    with pytest.raises(RecordError) as caught:
        verify(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


class Payload:
    """Unpickling one of these creates a file, which shows that something was unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path(self.target),))

    def __init__(self, target: Path) -> None:
        self.target = str(target)


def test_pickles_and_other_files_are_refused(run_folder, tmp_path):
    """By any name: a pickle called updates.jsonl is read as text and fails as such."""
    canary = tmp_path / "canary"
    data = pickle.dumps(Payload(canary))
    extra = run_folder / "model.pkl"
    extra.write_bytes(data)
    assert "model.pkl: not part of a record" in one_line(run_folder)
    extra.unlink()
    (run_folder / COMPRESSED_UPDATES_FILE).write_bytes(gzip.compress(data, mtime=0))
    assert not verify(run_folder).ok
    (run_folder / RUN_FILE).write_bytes(data)
    assert not verify(run_folder).ok
    assert not canary.exists()


def test_links_are_refused(run_folder, tmp_path):
    """A link could make verification read, and a report show, any file on this machine."""
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (run_folder / RUN_FILE).unlink()
    (run_folder / RUN_FILE).symlink_to(secret)
    assert "symbolic link" in one_line(run_folder)
    (run_folder / RUN_FILE).unlink()
    (run_folder / "more").symlink_to(tmp_path, target_is_directory=True)
    assert "symbolic link" in one_line(run_folder)


def test_names_with_control_characters_are_refused(run_folder):
    """A name could otherwise steer the terminal that shows it."""
    (run_folder / "\x1b[2J").mkdir()
    (run_folder / "\x1b[2J" / UPDATES_FILE).write_text("")
    assert "control characters" in one_line(run_folder)


def test_devices_are_refused(run_folder):
    """Opening a pipe would block forever."""
    (run_folder / COMPRESSED_UPDATES_FILE).unlink()
    os.mkfifo(run_folder / COMPRESSED_UPDATES_FILE)
    assert "neither a file nor a folder" in one_line(run_folder)


def test_huge_updates_are_not_read(run_folder, monkeypatch):
    """A line of 1 GB, plain or as a compression bomb, is reported without filling the memory."""
    path, compressed = run_folder / UPDATES_FILE, run_folder / COMPRESSED_UPDATES_FILE
    lines = compressed.read_bytes()
    compressed.unlink()
    with open(path, "wb") as file:
        file.truncate(1_000_000_000)
    assert "1000000000 bytes" in one_line(run_folder)
    path.unlink()
    for data in (b"0" * 1_000_000, b"0\n" * 500_000):
        # A gzip file may consist of many members: these expand to 1 GB.
        compressed.write_bytes(1000 * gzip.compress(data, mtime=0))
        tracemalloc.start()
        problems = verify(run_folder).problems
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        tracemalloc.stop()
        assert problems[0].startswith(f"{COMPRESSED_UPDATES_FILE}: expands to more than 50000000 ")
    # Nor are lines read without end, each of which is valid.
    monkeypatch.setattr("scpo_bench.records.files.MAX_UPDATES", 1)
    compressed.write_bytes(lines)
    assert "line 2: " in verify(run_folder).problems[0]


@pytest.mark.parametrize(
    "value", ["[" * 100_000 + "]" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000]
)
def test_deep_json_is_a_problem_not_a_crash(run_folder, value):
    """Nesting that exhausts a recursive parser is reported like any other damage."""
    text = (run_folder / RUN_FILE).read_text()
    (run_folder / RUN_FILE).write_text(
        text.replace('"provenance": {', '"provenance": {"x": ' + value + ",")
    )
    report = verify(run_folder)
    assert not report.ok
    assert all(len(line) < 400 and "\n" not in line for line in report.problems)


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_found(run_folder, token):
    """NaN compares false with every limit: unchecked it would pass as safe.

    In free-form fields no key can be computed from it.
    """

    def put(lines: list[bytes]) -> list[bytes]:
        return [
            lines[0],
            lines[1].replace(b'"iterate_cost":0.0', f'"iterate_cost":{token}'.encode()),
            *lines[2:],
        ]

    text = (run_folder / RUN_FILE).read_text()
    edit_lines(run_folder, put)
    assert "iterate_cost" in verify(run_folder).problems[0]
    (run_folder / RUN_FILE).write_text(text.replace('"config": {}', f'"config": {{"x": {token}}}'))
    assert not verify(run_folder).ok


def test_too_much_of_anything_is_refused(results, tmp_path, monkeypatch):
    """Deeply nested folders, a run.json of megabytes or a million files are not results."""
    deep = tmp_path / "deep" / "/".join("d" * 15)
    deep.mkdir(parents=True)
    assert "folders more than 12 deep" in one_line(tmp_path / "deep")
    large = tmp_path / "large"
    large.mkdir()
    (large / RUN_FILE).write_text(" " * 2_000_000)
    assert "2000000 bytes" in one_line(large)
    monkeypatch.setattr(contents, "MAX_FILES", 10)
    assert "more than 10 files" in one_line(results)


def test_nothing_to_verify(tmp_path):
    """A mistyped path is named."""
    assert "not found" in one_line(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no records" in one_line(tmp_path / "empty")


def test_own_output_beside_records_is_ignored(results):
    """Figures and tables generated from the records are tolerated beside them; a script is not."""
    (results / "s" / "plots").mkdir()
    (results / "s" / "plots" / "a.png").write_bytes(b"")
    (results / "s" / "leaderboard.md").write_text("")
    (results / ".locks").mkdir()
    (results / ".locks" / "s-0123").write_bytes(b"")
    report = verify(results)
    assert report.ok
    assert len(report.notes) == 2
    (results / "s" / "run.py").write_text("")
    assert "run.py" in one_line(results)


def test_runs_set_aside_are_ignored(results, tmp_path):
    """Folders that the launcher set aside (name~key) are not part of results or bundles."""
    folder = folder_of(results, "s", synthetic_cell("scpo", IMITATION, 0, 4))
    folder.rename(folder.with_name("seed-0~0123456789ab"))
    report = verify(results)
    assert report.ok
    assert report.runs == 7
    assert any("set aside" in note for note in report.notes)
    output = bundle(results, "s", tmp_path / "b")
    assert verify(output).runs == 7
    shutil.copytree(folder.with_name("seed-0~0123456789ab"), output / "seed-0~0")
    assert "seed-0~0" in one_line(output)


# Bundles.


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tgz", "b"])
def test_bundles_verify_and_repeat(results, tmp_path, name):
    """Packed twice it is the same bytes; planned but missing runs stay visible in it."""
    output = bundle(results, "s", tmp_path / name, PLANNED)
    report = verify(output)
    assert report.ok, report.problems
    assert (report.sealed, report.runs) == (True, 8)
    again = bundle(
        results,
        "s",
        tmp_path / "again" / name if name == "b" else tmp_path / f"again-{name}",
        PLANNED,
    )
    if output.is_file():
        assert (
            hashlib.sha256(output.read_bytes()).digest()
            == hashlib.sha256(again.read_bytes()).digest()
        )
        assert output.read_bytes()[4:8] == bytes(4)  # no time in the header
        with tarfile.open(output) as tar:
            names = tar.getnames()
            assert names[0] == f"s/{MANIFEST_FILE}"
            assert {Path(n).name for n in names} == {
                MANIFEST_FILE,
                RUN_FILE,
                COMPRESSED_UPDATES_FILE,
            }
            assert {(m.uid, m.uname, m.mtime) for m in tar.getmembers()} == {(0, "", 0)}
            manifest = json.load(tar.extractfile(names[0]))  # type: ignore[arg-type]
    else:
        manifest = json.loads((output / MANIFEST_FILE).read_text())
    assert [row["seeds_missing"] for row in manifest["rows"] if row["agent"] == "scpo"] == [0, 1]


def test_a_bundle_inside_a_results_folder_is_verified_as_one(results, tmp_path):
    """Somebody's bundle beside one's own records is checked against its manifest.

    Its problems are reported with its name.
    """
    bundle(results, "s", results / "theirs")
    bundle(results, "s", results / "theirs.tar.gz")
    report = verify(results)
    assert report.ok, report.problems
    assert (report.runs, report.finished, report.sealed) == (16, 16, False)
    notes = "\n".join(report.notes)
    assert "theirs: a bundle of 8 runs, every file as in its manifest" in notes
    assert "theirs.tar.gz: ignored; a packed bundle is verified by itself" in notes
    run_file = next((results / "theirs").rglob(RUN_FILE))
    run_file.write_text(run_file.read_text().replace('"threads": 1', '"threads": 2'))
    assert all(line.startswith("theirs: ") and "hash" in line for line in verify(results).problems)
    (results / "theirs" / "notes.md").write_text("")
    assert "bundle theirs: notes.md: not part of a record" in one_line(results)
    (results / "theirs" / "notes.md").unlink()
    (run_file.parent / MANIFEST_FILE).write_text("{}")
    place = run_file.parent.relative_to(results / "theirs")
    assert f"bundle theirs: {place}/{MANIFEST_FILE}: not part" in one_line(results)
    # A folder with nothing but bundles is a results folder, too.
    other = tmp_path / "other"
    bundle(results, "s", other / "theirs")
    assert verify(other).runs == 8


def test_bundles_hold_records_only(results, tmp_path):
    """No traceback (it names the author's paths), no figure, no script."""
    folder = folder_of(results, "s", synthetic_cell("scpo", IMITATION, 0, 4))
    (folder / "traceback.txt").write_text("File /home/me/secret.py")
    output = bundle(results, "s", tmp_path / "b")
    assert {p.name for p in output.rglob("*") if p.is_file()} == {
        MANIFEST_FILE,
        RUN_FILE,
        COMPRESSED_UPDATES_FILE,
    }


def test_bundling_needs_consistent_records_and_a_new_path(results, tmp_path):
    """Nothing is overwritten, and damage is named before it is published."""
    (tmp_path / "there").mkdir()
    with pytest.raises(RecordError, match="exists already"):
        bundle(results, "s", tmp_path / "there")
    with pytest.raises(RecordError, match="not found"):
        bundle(results, "other", tmp_path / "b")
    shutil.copytree(results / "s", results / "t")
    with pytest.raises(RecordError, match="a record of suite 's', not 't'"):
        bundle(results, "t", tmp_path / "b")
    (results / "s" / "scpo_bench.DoubleIntegratorImitation-v0").rename(results / "s" / "a:b")
    with pytest.raises(
        RecordError, match=r"folder: expected scpo_bench\.DoubleIntegratorImitation-v0/scpo/seed-0"
    ):
        bundle(results, "s", tmp_path / "b")
    (results / "s" / "a:b").rename(results / "s" / "scpo_bench.DoubleIntegratorImitation-v0")
    edit_run(folder_of(results, "s", synthetic_cell("scpo", IMITATION, 0, 4)), updates=3)
    with pytest.raises(RecordError, match="not consistent"):
        bundle(results, "s", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_tampering_with_a_bundle_is_found(results, tmp_path):
    """The manifest covers aggregates, provenance, the bytes of files, missing and extra files."""
    output = bundle(results, "s", tmp_path / "b")
    manifest = output / MANIFEST_FILE
    text = manifest.read_text()

    def problems(change: Callable[[dict], None]) -> str:
        content = json.loads(text)
        change(content)
        manifest.write_text(json.dumps(content))
        try:
            return "\n".join(verify(output).problems)
        finally:
            manifest.write_text(text)

    assert "violating_iterates" in problems(
        lambda m: m["rows"][1].update(violating_iterates=0, verdict="safe throughout")
    )
    assert "score" in problems(lambda m: m["rows"][0].update(score=m["rows"][0]["score"] + 1e-3))
    assert "rows" in problems(lambda m: m["rows"].pop())
    assert "rows" in problems(
        lambda m: m["planned"].append(synthetic_cell("sgd", GOAL, 9, 4).model_dump())
    )
    assert "score" in problems(lambda m: m["rows"][0].update(score=10**400))
    assert "seeds_missing" in problems(lambda m: m["rows"][0].update(seeds_missing=False))
    assert "suite" in problems(lambda m: m.update(suite="other"))
    name = next(iter(json.loads(text)["files"]))
    assert "bytes" in problems(lambda m: m["files"][name].update(bytes=1))
    assert "not in the manifest" in problems(lambda m: m["files"].pop(name))
    assert "missing" in problems(
        lambda m: m["files"].update({"../../etc/passwd": {"sha256": "0" * 64, "bytes": 1}})
    )
    run_file = next(output.rglob(RUN_FILE))
    original = run_file.read_text()
    # Same length, and nothing else depends on it: only the hash can tell.
    run_file.write_text(original.replace('"threads": 1', '"threads": 2'))
    assert "hash" in "\n".join(verify(output).problems)
    # The leaderboard of damaged records differs, too; only the damage is worth a line.
    edit_run(run_file.parent, updates=3)
    assert "leaderboard" not in "\n".join(verify(output).problems)
    run_file.write_text(original)
    assert verify(output).ok
    (run_file.parent / "notes.md").write_text("")
    assert "notes.md" in one_line(output)


def test_planned_cells_taken_out_of_a_bundle_are_found(results, tmp_path):
    """Removing failures from the plan would hide them; the rows then no longer agree."""
    output = bundle(results, "s", tmp_path / "b", PLANNED)
    manifest = output / MANIFEST_FILE
    content = json.loads(manifest.read_text())
    content["planned"].remove(PLANNED[2].model_dump(mode="json"))
    manifest.write_text(json.dumps(content))
    assert any("seeds_" in line for line in verify(output).problems)


def archive_of(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member, data in members:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return path


def member(name: str, type: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, link
    return info


@pytest.mark.parametrize(
    ("hostile", "named"),
    [
        (member("../run.json"), "not a path inside"),
        (member("a/../../run.json"), "not a path inside"),
        (member("/tmp/run.json"), "not a path inside"),
        (member("a\\..\\run.json"), "not a path inside"),
        (member("C:/run.json"), "not a path inside"),
        (member("/".join("d" * 20) + "/run.json"), "not a path inside"),
        (member("a\x1b[2J/run.json"), "not a path inside"),
        (member("s/run.json", tarfile.SYMTYPE, "/etc/passwd"), "not a plain file"),
        (member("s/run.json", tarfile.LNKTYPE, "../../x"), "not a plain file"),
        (member("s/run.json", tarfile.FIFOTYPE), "not a plain file"),
        (member("s/run.json", tarfile.CHRTYPE), "not a plain file"),
        (member("s/run.json", tarfile.DIRTYPE), "not a plain file"),
        (member("s/agent.py"), "not part of a record"),
        (member("s/model.pkl"), "not part of a record"),
    ],
    ids=lambda value: repr(value.name)[:30] if isinstance(value, tarfile.TarInfo) else "",
)
def test_hostile_archives_are_refused(tmp_path, monkeypatch, hostile, named):
    """One line each, and no file is written where the archive wants it."""
    inner = tmp_path / "temporary"
    inner.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(inner))
    path = archive_of(tmp_path / "b.tar.gz", [(member("s/manifest.json"), b"{}"), (hostile, b"x")])
    assert named in one_line(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.tar.gz", "temporary"]
    assert list(inner.iterdir()) == []


def test_archives_that_repeat_a_name_are_refused(tmp_path):
    """The second must not replace the first after that was checked."""
    path = archive_of(
        tmp_path / "b.tar.gz", [(member("s/run.json"), b"{}"), (member("s/run.json"), b"{}")]
    )
    assert "'s/run.json' appears twice" in one_line(path)


def test_archive_bombs_are_refused(tmp_path, monkeypatch):
    """What expands far, as a file or hidden in an extended header, is read to a limit only."""
    monkeypatch.setattr(contents, "MAX_ARCHIVE_EXPANDED_BYTES", 200_000)
    path = archive_of(tmp_path / "b.tar.gz", [(member("s/updates.jsonl"), bytes(300_000))])
    assert "expands to more" in one_line(path)
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 300_000
    path.write_bytes(gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + bytes(300_000), mtime=0))
    assert "expands to more" in one_line(path)
    monkeypatch.setitem(contents.MAX_BYTES, UPDATES_FILE, 1000)
    path = archive_of(tmp_path / "c.tar.gz", [(member("s/updates.jsonl"), bytes(2000))])
    assert "2000 bytes" in one_line(path)
    monkeypatch.setattr(contents, "MAX_MEMBERS", 0)
    assert "more than 0 files" in one_line(path)
    monkeypatch.setattr(contents, "MAX_ARCHIVE_BYTES", 10)
    assert "larger than 10 bytes" in one_line(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 a zip",
        gzip.compress(b"no tar", mtime=0),
        gzip.compress(b"x" * 1024, mtime=0)[:-6],
    ],
)
def test_files_that_are_no_archive(tmp_path, content):
    """Anything else is refused in one line."""
    path = tmp_path / "b.tar.gz"
    path.write_bytes(content)
    assert str(path) in one_line(path)


def test_truncated_and_headless_archives(results, tmp_path):
    """A broken download is named; an archive without a manifest is not a bundle."""
    whole = bundle(results, "s", tmp_path / "b.tar.gz")
    cut = tmp_path / "cut.tar.gz"
    for share in (0.1, 0.5, 0.9):
        data = whole.read_bytes()
        cut.write_bytes(data[: int(share * len(data))])
        one_line(cut)
    # A whole .gz of a part of the archive.
    data = gzip.decompress(whole.read_bytes())
    cut.write_bytes(gzip.compress(data[:700]))  # within the first file
    assert "unexpected end of data" in one_line(cut)
    path = archive_of(tmp_path / "c.tar.gz", [(member("s/run.json"), b"{}")])
    assert "has no manifest.json" in one_line(path)


def test_safe_parts():
    """Only relative paths that stay below their root are safe."""
    assert safe_parts("a/b/run.json") == ("a", "b", "run.json")
    for name in ("", "/a", "..", "a/../b", "a\\b", "a:b", "~/a", "a\x00b", "a" * 300):
        assert safe_parts(name) is None, name


def test_refusals_are_record_errors():
    """So that the command line shows them as one line with exit status 2."""
    assert issubclass(Refused, RecordError)
