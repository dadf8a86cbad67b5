"""How the tiny-world study reads curves, and its table and plot."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks import tiny_world as study
from benchmarks import tiny_world_report as report
from benchmarks import tiny_world_run as runs

pytestmark = pytest.mark.usefixtures("little_data")

# --- curves ---


def path(*points: tuple[float, float]) -> list[report.Point]:
    return [{"step": i, "edit": edit, "preserved": preserved} for i, (edit, preserved) in enumerate(points)]


def test_preservation_at_equal_edit_rate_by_closed_form():
    full, other = path((0, 1), (1, 0.8)), path((0, 1), (0.5, 0.7))
    assert report.matched(full, other, "preserved") == pytest.approx((0.5, 0.7 - 0.9))
    assert report.matched(other, full, "preserved") == pytest.approx((0.5, 0.9 - 0.7))
    # Straight lines 1 - 0.2 e and 1 - 0.6 e: the mean of -0.4 e over [0.05, 0.5].
    assert report.matched_over_range(full, other, "preserved") == pytest.approx((0.05, 0.5, -0.4 * 0.275))


def test_a_curve_is_read_where_it_last_passes_a_rate():
    winding = path((0, 1), (0.6, 0.9), (0.2, 0.5), (0.8, 0.3))
    assert report.at_rate(winding, 0.4, "preserved") == pytest.approx(0.5 - 0.2 / 3)
    assert report.at_rate(winding, 0.8, "preserved") == pytest.approx(0.3)
    assert report.at_rate(winding, 0.9, "preserved") is None
    assert report.at_rate(path((0.5, 0.9), (0.5, 0.4)), 0.5, "preserved") == 0.4


def test_curves_that_share_no_rate_are_not_compared():
    apart = path((0.0, 1), (0.3, 0.9)), path((0.4, 0.9), (0.9, 0.8))
    assert report.matched(*apart, "preserved") is None
    assert report.matched_over_range(*apart, "preserved") is None
    assert report.matched(path((0, 1), (0.9, 0.9)), path((0, 1), (0.01, 1)), "preserved") is None


def test_labels_keep_their_order_and_distance():
    heights = report.spread_out([0.9, 0.89, 0.5, 0.01, 0.0], 0.1)
    assert heights == sorted(heights, reverse=True)
    assert all(a - b >= 0.1 - 1e-9 for a, b in zip(heights, heights[1:], strict=False))
    assert heights[2] == 0.5 and min(heights) >= 0


# --- table and plot ---


def row(edit: float, preserved: float) -> dict[str, float]:
    return {
        "n": 8, "joint": edit * preserved, "edit": edit, "preserved": preserved, "pebble": 1.0, "outside_error": 1 - preserved, "iou": 0.5,
        "edit_share": edit,
    }  # fmt: skip


def result(name: str, seed: int, ends: tuple[float, float], base: str = "b") -> dict:
    run = study.RUNS[name.partition("+")[0]]
    kinds = {kind: row(*ends) for kind in ("all", report.OBJECT, report.BACKGROUND)}
    record = {
        "name": name, "title": run.title, "kind": run.kind, "stage": "report", "seed": seed, "overrides": list(run.overrides),
        "identity": {"base": base, "config": "c", "data": "d"}, "commit": "abc", "edits": 8, "table": kinds,
    }  # fmt: skip
    if run.kind == "train":
        points = [{"step": step, "cpu_seconds": step, "table": {"all": row(*at)}} for step, at in ((1, (0.0, 1.0)), (2, ends))]
        record |= {"curve": points, "steps": 2, "cpu_seconds": 60.0 * (seed + 1)}
        record["machine"] = {"torch": "2", "diffusers": "0", "threads": 1}
    return record


@pytest.fixture
def results(tmp_path) -> Path:
    folder = tmp_path / "report"
    for seed, shift in enumerate((0.0, 0.04, -0.04)):
        for name, (edit, preserved) in {
            "full": (0.92, 1.0), "no_cycle": (0.92, 0.4), "no_prior": (0.0, 1.0), "no_bootstrap": (0.9, 0.9), "six_full": (0.6, 0.6),
        }.items():  # fmt: skip
            runs.write_json(folder / f"{name}-{seed}.json", result(name, seed, (max(0.0, edit + shift), preserved)))
    runs.write_json(folder / "copy-0.json", result("copy", 0, (0.0, 1.0)))
    return folder


def cells(text: str, title: str, column: int) -> list[str]:
    """One column of every table row of this title, in whichever tables are wide enough."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {title} |")]
    return [row[column] for row in rows if column < len(row)]


def test_the_table_is_made_from_the_results_alone(results):
    text = report.table(report.read_results(results), limit=1.2)
    assert cells(text, "full method", 1)[0] == "**92 (88 to 96)**"
    assert cells(text, "w/o cycle", 5)[0] == "40"
    assert cells(text, "copy the source", 11)[0] == "-"
    # 1, 2 and 3 minutes of one core.
    assert cells(text, "full method", 11)[0] == "1.0 (0.5 to 1.5) **over**"
    assert "Rows are not comparable" not in text


def test_the_table_compares_at_equal_edit_rate_and_names_what_was_reached(results):
    text = report.table(report.read_results(results), limit=5)
    assert cells(text, "w/o cycle", 1)[1] == "up 8.98, down 7.23"
    assert cells(text, "w/o cycle", 2)[1] == "unclear: +0"
    assert cells(text, "w/o cycle", 3)[1] == "down: -60"
    assert cells(text, "w/o cycle", 4)[1] == "-60 at 92 (88 to 96) % edits"
    assert cells(text, "w/o prior", 4)[1] == "curves do not overlap"
    reached = [line for line in text.splitlines() if line.endswith(("| yes |", "| **no** |"))]
    assert [line.endswith("| yes |") for line in reached] == [True, True, True, True]
    runs.write_json(results / "no_cycle-2.json", result("no_cycle", 2, (0.88, 1.0)))
    text = report.table(report.read_results(results), limit=5)
    assert any("without cycle" in line and line.endswith("| **no** |") for line in text.splitlines())


def test_the_table_compares_backgrounds_by_themselves(results):
    """A run that makes fewer edits in all, and as many of backgrounds."""
    for seed in range(3):
        for name, kept in (("full", 0.9), ("no_cycle", 0.5 + seed / 10)):
            record = result(name, seed, (0.92, 1.0))
            record["table"][report.BACKGROUND] = row(1.0, kept)
            runs.write_json(results / f"{name}-{seed}.json", record)
    text = report.table(report.read_results(results), limit=5)
    assert cells(text, "w/o cycle", 7)[1] == "+0, -30 (-40 to -20)"


def verdict(folder: Path, target: str) -> str:
    """`yes` or `**no**` of the target that begins so."""
    text = report.table(report.read_results(folder), limit=5)
    lines = text.partition("## What was to be shown")[2].splitlines()
    return next(line for line in lines if line.startswith(f"| {target}")).strip("| ").split(" | ")[-1]


def test_the_targets_are_those_that_were_set(results):
    """Each a little beyond its threshold, on one seed where every seed has to reach it."""
    for seed in range(3):
        runs.write_json(results / f"full-{seed}.json", result("full", seed, (0.92, 0.95)))
        runs.write_json(results / f"no_identity-{seed}.json", result("no_identity", seed, (0.95, 0.9)))
    assert verdict(results, "full method") == "**no**"  # joint 87 %
    assert verdict(results, "without prior") == "yes"
    runs.write_json(results / "no_prior-1.json", result("no_prior", 1, (0.06, 1.0)))
    assert verdict(results, "without prior") == "**no**"
    assert verdict(results, "without identity steps") == "yes"
    runs.write_json(results / "no_identity-1.json", result("no_identity", 1, (0.9, 0.9)))
    assert verdict(results, "without identity steps") == "**no**"
    assert verdict(results, "without bootstrapping") == "**no**"  # one seed edits more
    runs.write_json(results / "no_bootstrap-1.json", result("no_bootstrap", 1, (0.9, 0.9)))
    assert verdict(results, "without bootstrapping") == "yes"


def test_a_row_of_fewer_seeds_than_the_study_says_so_wherever_it_stands(results):
    for seed in (1, 2):
        (results / f"no_cycle-{seed}.json").unlink()
    text = report.table(report.read_results(results), limit=5)
    assert len(cells(text, "w/o cycle (seed 0 alone)", 1)) == 2 and not cells(text, "w/o cycle", 1)
    assert verdict(results, "without cycle") == "so far (seed 0 alone)"
    (results / "full-2.json").unlink()  # the reference too may lack a seed that others have
    text = report.table(report.read_results(results), limit=5)
    assert len(cells(text, "full method (seed 0, 1 alone)", 1)) == 1
    assert cells(text, "copy the source", 1) == ["**0**"]  # not trained: the same for every seed


def test_a_base_is_named_by_what_it_computes_with(tmp_path):
    (tmp_path / "vae").mkdir()
    for name in ("figures.json", "history.json", "vae/config.json"):
        (tmp_path / name).write_text("{}")
    before = runs.base_digest(tmp_path)
    (tmp_path / "history.json").write_text('{"about": "other words"}')
    assert runs.base_digest(tmp_path) == before
    (tmp_path / "vae" / "config.json").write_text('{"scaling_factor": 2}')
    assert runs.base_digest(tmp_path) != before


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ([0.1, 0.2], "up"),
        ([-0.1, -0.2], "down"),
        ([-0.1, 0.2], "unclear"),
        ([0.0, 0.2], "unclear"),
        ([-0.1, 0.0], "unclear"),
        ([], "unclear"),
    ],
)
def test_a_direction_is_what_every_seed_says(changes, word):
    assert report.direction(changes) == word


def test_a_mean_over_the_shared_range_names_the_seeds_it_lacks(results):
    low = result("no_cycle", 2, (0.04, 1.0))
    runs.write_json(results / "no_cycle-2.json", low)
    text = report.table(report.read_results(results), limit=5)
    assert cells(text, "w/o cycle", 6)[1].endswith("; 1 of 3 seeds do not overlap")


def test_the_page_says_on_how_many_edits_curves_are_measured(results):
    record = result("full", 0, (0.9, 1.0))
    for point in record["curve"]:
        point["table"]["all"]["n"] = 4
    assert "measured on 4 of the held-out edits" in report.table({"full": {0: record}}, limit=5)


def test_all_runs_on_six_types_have_their_table_and_what_lacks_is_named(results):
    kept = report.read_results(results)
    assert "six_full" in kept and report.group_names(kept, "six_") == ["six_full"]
    lacking = "**Not measured yet: six_truth; copy the source; six_base; six_paired_steps; six_paired_time.**"
    assert lacking in report.table(kept, limit=5)
    tried = result("six_full+alpha2", 0, (0.7, 0.5)) | {"title": "full method, alpha2"}
    runs.write_json(results / "six_full+alpha2-0.json", tried)
    for name in ("six_truth", "six_base", "six_copy", "six_paired_steps", "six_paired_time"):
        runs.write_json(results / f"{name}-0.json", result(name, 0, (0.7, 0.5)))
    text = report.table(report.read_results(results), limit=5)
    # All, and both kinds; then what is preserved in the time of pairs; in no other table.
    assert cells(text, "full method, alpha2 (seed 0 alone)", 3) == ["70"] * 3 + ["50"]
    lacking = (f"{title} (seed 1, 2)" for title in ("base, target caption", "paired, equal steps", "paired, equal time"))
    assert f"**Not measured yet: {'; '.join(lacking)}.**" in text


def test_a_group_of_ablations_has_its_own_tables(results):
    """Against its own full method and not the study's."""
    for seed in range(2):
        for name, ends in {"fast_full": (0.96, 0.7), "fast_no_cycle": (0.98, 0.6), "fast_no_routing": (0.96, 0.75)}.items():
            runs.write_json(results / f"{name}-{seed}.json", result(name, seed, ends))
    text = report.table(report.read_results(results), limit=5)
    own = text.partition("## The cheaper step in smaller batches")[2].partition("\n## ")[0]
    assert "### Against Table 4 of the paper" in own and "### What was to be shown" in own
    assert cells(own, "w/o cycle", 3)[-1] == "down: -10" and cells(own, "w/o gradient routing", 3)[-1] == "up: +5"
    assert "Not measured yet: w/o directional term" in own or "fast_no_directional" in own
    assert "| without cycle: preserves less than full at equal edit rate, every seed | -9 at 96 % edits | yes |" in own


def test_a_run_in_the_time_of_pairs_is_read_on_straight_lines_between_evaluations(results):
    """The full method has evaluations at 1 and 2 seconds; pairs take 1.5, and 9 with the next seed, when it is done."""
    for seed, seconds in ((0, 1.5), (1, 9.0)):
        runs.write_json(results / f"six_full-{seed}.json", result("six_full", seed, (0.6, 0.5)))
        runs.write_json(results / f"six_paired_steps-{seed}.json", result("six_paired_steps", seed, (0.8, 1.0)) | {"cpu_seconds": seconds})
    kept = report.read_results(results)
    assert report.at_seconds(kept["six_full"][0], 0.5, "edit") is None, "before its first evaluation"
    text = report.table(kept, limit=5).partition("In the CPU seconds of *paired, equal steps* of the same seed (5 (2 to 9))")[2]
    assert text, "the pairs' seconds"
    other = result("six_full+float32", 0, (0.6, 0.5)) | {"title": "another machine", "config": {"train": {"mixed_precision": "no"}}}
    assert "another machine" not in report._in_the_time_of_pairs(kept | {"six_full+float32": {0: other}}, "six_")[-1]
    # (0 + 0.6) / 2 and 0.6; (1 + 0.5) / 2 and 0.5.
    title = "full method (seed 0, 1 alone)"
    assert cells(text, title, 2) == ["45 (30 to 60)"] and cells(text, title, 3) == ["62 (50 to 75)"]
    points = kept["six_full"][0]["curve"]
    assert report.steps_at_seconds(kept["six_full"][0], 1.5) == (points[0]["step"] + points[1]["step"]) / 2
    lines = report._in_the_time_of_pairs(kept | {"six_paired_steps": {0: kept["six_paired_steps"][0]}}, "six_")
    assert next(line for line in lines if line.startswith("| full method")).startswith(
        "| full method (seed 0 alone) | **15** | 30 | 75 | 2 |"
    )


def test_a_result_that_was_cut_is_named(tmp_path: Path):
    (tmp_path / "full-0.json").write_text('{"name": "fu', encoding="utf-8")
    with pytest.raises(ValueError, match=r"full-0\.json: cannot be read as JSON .*; remove it"):
        report.read_results(tmp_path)


def test_every_row_of_the_study_has_a_look_of_its_own():
    assert (
        set(report.STYLES)
        == set(report.ORDER) - {"truth", "copy", "base"}
        == set(report.ORDER) & {name for name, run in study.RUNS.items() if run.kind == "train"}
    )
    assert len({style["marker"] for style in report.STYLES.values()}) == len(report.STYLES)


def test_every_run_that_has_a_curve_is_drawn(results):
    for name in ("full+lr2", "no_cycle+lr2"):
        runs.write_json(results / f"{name}-0.json", result(name, 0, (0.5, 0.5)))
    kept = report.read_results(results)
    kept["new_row"] = kept["full+lr2"]
    drawn = report.styles(kept)
    assert set(drawn) == {"full", "no_cycle", "no_prior", "no_bootstrap", "full+lr2", "no_cycle+lr2", "new_row"}
    assert len({style["marker"] for style in drawn.values()}) == len(drawn)
    assert len({style["color"] for style in drawn.values()}) == len(drawn)


def test_rows_of_another_base_are_not_passed_off_as_comparable(results):
    runs.write_json(results / "no_cycle-1.json", result("no_cycle", 1, (0.9, 0.4), base="other"))
    assert "differ in the base" in report.table(report.read_results(results), limit=5)


def test_the_plot_is_drawn_and_needs_a_curve(results, tmp_path):
    assert report.plot(report.read_results(results), tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 1000
    assert not report.plot({"copy": report.read_results(results)["copy"]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
