"""Persons who withdraw: gone from every table and file, never loaded again, and nobody else touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sqlalchemy import Engine, text

from app.errors import InputError, StoreError
from app.loading import images, omop
from app.settings import Settings
from app.store import artifacts, cohorts, tasks
from app.store.places import place
from app.store.work import InlineWork
from app.tasks import TaskSpec, builtin
from tests.app.loading.extracts import DEATH_HEADER, PERIODS, PERSONS, VISIT_HEADER, extract, one, rows
from tests.app.loading.scans import chest, write_nifti
from workers.stages.forget import forget, read_list
from workers.stages.label import label

Make = Callable[..., InlineWork]

BASE = 77_700_000
"""Ids that nothing else in a store looks like."""
GONE = (BASE + 2, BASE + 4)


def long_ids(lines: list[str], column: int) -> list[str]:
    """The lines of an extract with other person ids."""
    body = [line.split(",") for line in lines[1:]]
    for cells in body:
        cells[column] = str(BASE + int(cells[column]))
    return [lines[0], *(",".join(cells) for cells in body)]


def delivery(folder: Path) -> Path:
    conditions = extract(folder / "short") / "condition_occurrence.csv"
    return extract(
        folder / "omop",
        person=[PERSONS[0], *(line.replace(",p", f",mrn{BASE}-") for line in long_ids(PERSONS, 0)[1:])],
        observation_period=long_ids(PERIODS, 1),
        condition_occurrence=long_ids(conditions.read_text().splitlines(), 1),
        visit_occurrence=long_ids(
            [VISIT_HEADER, "1,2,9201,2014-01-02,,2014-01-09,,0,0,", "2,3,9201,2014-01-02,,,,0,,"], 1
        ),
        death=long_ids([DEATH_HEADER, "2,2018-05-06,,0,0", "2,2019-01-01,,0,0", "3,2018-05-06,,0,0"], 0),
    )


@dataclass(frozen=True, slots=True)
class Whole:
    """A store with something of every person in every table."""

    omop: Path
    manifest: Path
    checkpoint: int
    label_set: int
    embedding: str


@pytest.fixture
def whole(tmp_path: Path, work: Make, engine: Engine, settings: Settings) -> Whole:
    folder = delivery(tmp_path)
    omop.load(work(path=str(folder), max_rejects=1))
    for i in range(1, 6):
        write_nifti(tmp_path / f"scan{min(i, 4)}.nii.gz", chest(seed=min(i, 4)))  # two persons share one
    lines = [f"{BASE + i},2014-0{i}-11 09:1{i}:00,scan{min(i, 4)}.nii.gz" for i in range(1, 6)]
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("\n".join(["person_id,acquired_at,path", *lines]) + "\n")
    images.load(work(path=str(manifest)))
    cohorts.build(work(name="c", where=f"i.person_id <> {BASE + 1} OR i.person_id = {GONE[0]}"))
    specs = [TaskSpec.from_dict({"name": f"t{i}", "concepts": [300 + i], "prior": "keep"}) for i in range(1, 21)]
    tasks.build(work(name="t", cohort="c", specs=[s.to_dict() for s in [*specs, builtin("mortality")]]))
    label(work(name="l", cohort="c", tasks="t"))
    return derive(work, engine, settings, folder, manifest, tmp_path)


def derive(work: Make, engine: Engine, settings: Settings, folder: Path, manifest: Path, tmp_path: Path) -> Whole:
    """What pretraining, embedding, judging and reporting leave behind."""
    scans = rows(engine, "SELECT image_occurrence_id, path FROM omop.image_occurrence ORDER BY 1")
    keys = np.array([row[0] for row in scans], np.int64)
    vectors = np.arange(len(keys) * len(keys), dtype=np.float32).reshape(len(keys), -1)
    tensors = {"image_occurrence_id": keys, "embedding": vectors, "mean": vectors[0], "sd": vectors[0]}
    save_file(tensors, tmp_path / "e.safetensors")
    path, sha256 = artifacts.publish(settings, tmp_path / "e.safetensors", "embeddings")
    (tmp_path / "page.html").write_text(f"a page with {GONE[0]}")
    page, page_sha = artifacts.publish(settings, tmp_path / "page.html", "reports")
    cache = (settings.home or tmp_path) / "cache" / "recipe"
    cache.mkdir(parents=True)
    run = (settings.home or tmp_path) / "runs" / "1" / "1"
    run.mkdir(parents=True)
    (run / "truth.csv").write_text(f"person_id,task\n{GONE[0]},a\n{BASE + 1},a\n")
    (run / "set_aside.csv").write_text("path,rule\nDOE^JANE/1.dcm,not_an_image\n")
    with engine.begin() as connection:
        for image, name in scans:
            digest = name.encode().hex().ljust(64, "0")
            connection.execute(
                text("UPDATE omop.image_occurrence SET sha256 = decode(:d, 'hex') WHERE image_occurrence_id = :i"),
                {"d": digest, "i": image},
            )
            (cache / f"{name}.json").write_text(json.dumps({"content_sha256": digest}))
            (cache / f"{name}.npy").write_bytes(b"voxels")
        label_set, cohort = connection.execute(text("SELECT label_set_id, cohort_id FROM label.label_set")).one()
        checkpoint = connection.scalar(
            text(
                "INSERT INTO model.checkpoint (name, sha256, arm, encoder, width, recipe, seed, step, num_steps, "
                "is_final, label_set_id, cohort_id, path, num_bytes, code_version) "
                "VALUES ('trained', 'abc', 'tte', 'tiny', 5, '{}', "
                "0, 1, 1, true, :l, :c, 'x', 1, '0') RETURNING checkpoint_id"
            ),
            {"l": label_set, "c": cohort},
        )
        connection.execute(text("SELECT model.add_embedding_partition(:c, 5)"), {"c": checkpoint})
        connection.execute(
            text(
                "INSERT INTO model.embedding (checkpoint_id, image_occurrence_id, embedding) "
                "SELECT :c, image_occurrence_id, '[1,2,3,4,5]' FROM omop.image_occurrence"
            ),
            {"c": checkpoint},
        )
        connection.execute(
            text(
                "INSERT INTO model.embedding_set (checkpoint_id, cohort_id, path, sha256, mean, sd, num_scans, "
                "num_failed, shared_volumes) VALUES (:c, :cohort, :path, :sha, '{}', '{}', 5, 0, 2)"
            ),
            {"c": checkpoint, "cohort": cohort, "path": path, "sha": sha256},
        )
        connection.execute(
            text(
                "INSERT INTO model.prediction (checkpoint_id, head, inputs, label_set_id, position, "
                "cohort_member_id, split, kind, value) SELECT :c, 'cox', 'image', :l, 0, cohort_member_id, split, "
                "'net', 0.5 FROM label.cohort_member"
            ),
            {"c": checkpoint, "l": label_set},
        )
        connection.execute(text("INSERT INTO label.feature SELECT cohort_member_id, 'age', 1 FROM label.cohort_member"))
        connection.execute(
            text("INSERT INTO model.report (name, path, sha256) VALUES ('l', :p, :s)"), {"p": page, "s": page_sha}
        )
    return Whole(folder, manifest, int(checkpoint or 0), int(label_set), path)


def mentions(engine: Engine, needle: str) -> list[str]:
    """Tables with a column person_id that holds the number, or a text or JSON in which it stands."""
    found = []
    columns = rows(
        engine,
        "SELECT table_schema || '.' || table_name, column_name, data_type FROM information_schema.columns "
        "JOIN information_schema.tables USING (table_schema, table_name) WHERE table_schema IN "
        "('omop', 'label', 'model', 'ops') AND table_type = 'BASE TABLE'",
    )
    for table, column, kind in columns:
        if kind in ("bigint", "text", "jsonb", "ARRAY", "character varying"):
            hits = one(engine, f"SELECT count(*) FROM {table} WHERE strpos({column}::text, :needle) > 0", needle=needle)
            if hits:
                found.append(f"{table}.{column}")
    return sorted(found)


def listed(tmp_path: Path, *lines: object) -> str:
    path = tmp_path / "withdrawn.txt"
    path.write_text("\n".join(map(str, lines)) + "\n")
    return str(path)


COUNTS = (
    "SELECT position, split, status, n, persons, round(person_days::numeric, 3) "
    "FROM label.task_status_count ORDER BY 1, 2, 3"
)
OTHERS = """
SELECT person_id, 'event', count(*) FROM omop.event WHERE person_id <> ALL (:gone) GROUP BY 1
UNION ALL SELECT person_id, 'scan', count(*) FROM omop.image_occurrence WHERE person_id <> ALL (:gone) GROUP BY 1
UNION ALL SELECT person_id, 'label', count(*) FROM label.tte JOIN label.cohort_member USING (cohort_member_id)
WHERE person_id <> ALL (:gone) GROUP BY 1
UNION ALL SELECT person_id, 'prediction', count(*)
FROM model.prediction JOIN label.cohort_member USING (cohort_member_id)
WHERE person_id <> ALL (:gone) GROUP BY 1
UNION ALL SELECT person_id, 'vector', count(*)
FROM model.embedding JOIN omop.image_occurrence USING (image_occurrence_id)
WHERE person_id <> ALL (:gone) GROUP BY 1
ORDER BY 1, 2
"""


def test_nothing_of_the_forgotten_is_left_and_all_of_the_others(
    whole: Whole, tmp_path: Path, work: Make, engine: Engine, settings: Settings
) -> None:
    others = rows(engine, OTHERS, gone=list(GONE))
    assert one(engine, "SELECT sum(num_events) FROM omop.concept_count") == one(
        engine, "SELECT count(*) FROM omop.event"
    )
    assert len(mentions(engine, str(GONE[0]))) > 8
    result = forget(work(path=listed(tmp_path, *GONE, 123_456)))
    assert (result["given"], result["found"], result["checkpoints"]) == (3, 2, ["trained"])
    for person in GONE:
        assert mentions(engine, str(person)) == []
    assert rows(engine, OTHERS, gone=list(GONE)) == others
    assert one(engine, "SELECT sum(num_events) FROM omop.concept_count") == one(
        engine, "SELECT count(*) FROM omop.event"
    )
    assert result["rows"]["omop.event"] == 10 and result["rows"]["omop.image_occurrence"] == 2
    assert result["rows"]["label.tte"] == result["rows"]["model.prediction"] == 2
    assert result["files"] == {"artifacts": 2, "volumes": 1, "path lists": 1, "csv rows": 1}
    home = settings.home or tmp_path
    assert {p.stem.split(".")[0] for p in home.rglob("*.npy")} == {"scan1", "scan3", "scan4"}  # 4 is another's, too
    assert str(GONE[0]) not in (home / "runs/1/1/truth.csv").read_text()
    path, sha256 = rows(engine, "SELECT path, sha256 FROM model.embedding_set")[0]
    kept = load_file(artifacts.fetch(settings, path, sha256))
    assert len(kept["embedding"]) == len(kept["image_occurrence_id"]) == 3 and len(kept["mean"]) == 5
    assert not (place(settings).path(whole.embedding)).exists()
    assert one(engine, "SELECT count(*) FROM ops.forgotten_file") == 0
    assert one(engine, "SELECT sum(num_events) FROM omop.concept_count") == one(
        engine, "SELECT count(*) FROM omop.event"
    )
    assert rows(engine, "SELECT DISTINCT num_read = num_loaded + num_rejected FROM ops.load") == [(True,)]


def test_counts_of_labels_are_those_of_a_fresh_label_set(
    whole: Whole, tmp_path: Path, work: Make, engine: Engine
) -> None:
    forget(work(path=listed(tmp_path, *GONE)))
    after = rows(engine, COUNTS)
    members = (
        one(engine, "SELECT num_members FROM label.label_set"),
        one(engine, "SELECT num_events FROM label.label_set"),
    )
    with engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE model.checkpoint CASCADE")
        connection.exec_driver_sql("DELETE FROM label.label_set")
    label(work(name="l", cohort="c", tasks="t"))
    assert rows(engine, COUNTS) == after
    assert rows(engine, "SELECT num_members, num_events FROM label.label_set") == [members]


def test_a_dry_run_counts_the_same_and_changes_nothing(
    whole: Whole, tmp_path: Path, work: Make, engine: Engine
) -> None:
    path = listed(tmp_path, f"mrn{BASE}-2", f"mrn{BASE}-4")
    before = mentions(engine, str(GONE[0]))
    counted = forget(work(path=path, by="person_source_value", dry_run=True))
    assert mentions(engine, str(GONE[0])) == before and one(engine, "SELECT count(*) FROM ops.forgotten") == 0
    done = forget(work(path=path, by="person_source_value"))
    assert counted["found"] == done["found"] == 2
    assert counted["rows"] == {k: n for k, n in done["rows"].items() if "keys" not in k}
    again = forget(work(path=path, by="person_source_value"))
    assert (again["found"], again["rows"], again["files"], again["remembered"]) == (0, {}, {}, 0)


def test_later_loads_leave_the_forgotten_out_and_count_them(
    whole: Whole, tmp_path: Path, work: Make, engine: Engine, settings: Settings
) -> None:
    forget(work(path=listed(tmp_path, *GONE, BASE + 1_000)))
    with (whole.omop / "condition_occurrence.csv").open("a") as file:
        file.write(f"22,{BASE + 1},301,2016-01-01,,,,0,,0\n")
    result = omop.load(work(path=str(whole.omop), max_rejects=0.1))
    by_table = {table["table"]: table["rejects_by_rule"] for table in result["tables"]}
    assert by_table["person"] == {"forgotten": 2}
    assert by_table["condition_occurrence"]["forgotten"] == 8
    scans = images.load(work(path=str(whole.manifest)))
    assert scans["rejects_by_rule"] == {"forgotten": 2}
    for person in GONE:
        assert mentions(engine, str(person)) == []
    # an id that is given anew to a known source value is the same person
    moved = delivery(tmp_path / "anew")
    for file in moved.iterdir():
        file.write_text(file.read_text().replace(str(GONE[0]), str(BASE + 9)))
    omop.load(work(path=str(moved), max_rejects=1, allow_shrink=True))
    assert mentions(engine, str(BASE + 9)) == []
    (settings.home or tmp_path).joinpath("forget.key").unlink()
    with pytest.raises(StoreError, match="copy it"):
        omop.load(work(path=str(whole.omop)))


def test_an_attempt_that_died_before_the_files_went_is_finished_by_the_next(
    whole: Whole, tmp_path: Path, work: Make, engine: Engine, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.stages import forget as stage

    path = listed(tmp_path, *GONE)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_remove_files", lambda work, ids: (_ for _ in ()).throw(OSError("the power went")))
        with pytest.raises(OSError, match="power"):
            forget(work(path=path))
    assert (place(settings).path(whole.embedding)).exists()
    result = forget(work(path=path))
    assert result["files"] == {"artifacts": 2, "volumes": 1, "path lists": 1, "csv rows": 1}
    assert not (place(settings).path(whole.embedding)).exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [("", "at least one"), ("1\nabc\n", "line 2"), ("99999999999999999999\n", "line 1"), (b"\xff\xfe1\n", "UTF-8")],
)
def test_a_list_that_cannot_be_read_is_refused_without_repeating_it(
    tmp_path: Path, content: str | bytes, match: str
) -> None:
    path = tmp_path / "list"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=match) as refused:
        read_list(path, "person_id")
    assert "abc" not in str(refused.value)


def test_a_list_may_have_a_header_blank_lines_and_repeats(tmp_path: Path) -> None:
    path = tmp_path / "list"
    path.write_text("person_id\r\n 7\n\n007\n-3\n")
    assert read_list(path, "person_id") == ["7", "-3"]


def test_a_person_of_a_meds_data_set_is_forgotten_too(tmp_path: Path, work: Make, engine: Engine) -> None:
    from app.loading import meds
    from tests.app.loading.meds_sets import data_set, person

    folder = data_set(tmp_path / "meds", {"0": person(1), "1": person(2)})
    meds.load(work(path=str(folder)))
    forget(work(path=listed(tmp_path, 2)))
    counts = "SELECT num_read, num_loaded, rejects_by_rule ->> 'forgotten' FROM ops.load WHERE state = 'published'"
    assert rows(engine, counts) == [(14, 7, "7")]
    assert rows(engine, "SELECT DISTINCT person_id FROM omop.static_fact") == [(1,)]
    longer = data_set(tmp_path / "again", {"0": person(1), "1": person(2), "2": person(3)})
    assert meds.load(work(path=str(longer), max_rejects=0))["persons"] == 2
    assert rows(engine, counts) == [(21, 14, "7")]
    assert rows(engine, "SELECT person_id FROM omop.person ORDER BY 1") == [(1,), (3,)]
    assert rows(engine, "SELECT count(row_key) FROM ops.reject WHERE rule = 'forgotten'") == [(0,)]
