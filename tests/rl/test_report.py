"""The report page: figures of the run and the tables, self-contained."""

from rorqual.rl import report, saves


def _result(rate):
    return {
        kind: {
            "temperature": 1.0,
            "solved": {"hop-recover": {"1": rate}},
            "counted": {"hop-recover": {"1": 50}},
        }
        for kind in ("sampled", "greedy")
    }


def test_the_page_holds_curve_and_tables_and_loads_nothing(tmp_path):
    for step in (1, 2):
        row = {
            "step": step, "seconds": 60.0 * step, "reward": 0.25 * step,
            "statuses": {"submitted": 90, "infra_error": 6},
            "tokens": 1000, "length": 200.0, "turns": 4.0, "rollout_seconds": 5.0, "update_seconds": 4.0,
            "zero_groups": 0.5, "clip_share": 0.0, "log_gap": 1e-7, "entropy": 0.05, "norm": 0.1,
        }  # fmt: skip
        if step == 2:
            row["held_out"] = _result(0.5)["sampled"]
        saves.append_line(tmp_path / "rl.jsonl", row)
    for name, rate in (("before", 0.4), ("after", 0.98)):
        saves.write_json(tmp_path / f"{name}.json", _result(rate))
    page = report.write(tmp_path).read_text(encoding="utf-8")
    assert "40% of 50" in page and "98% of 50" in page
    assert "12 of 192" in page  # infrastructure failures, excluded
    assert "data:image/png;base64," in page and "http" not in page


def test_a_run_without_steps_still_has_a_page(tmp_path):
    assert "Held-out" in report.write(tmp_path).read_text(encoding="utf-8")


def test_a_torn_last_line_of_the_log_is_left_out(tmp_path):
    path = tmp_path / "rl.jsonl"
    saves.append_line(path, {"step": 1})
    saves.append_line(path, {"step": 2})
    with path.open("a") as file:
        file.write('{"step": 3, "rew')
    assert [row["step"] for row in saves.read_lines(path)] == [1, 2]
    assert [row["step"] for row in saves.read_lines(path, below=2)] == [1]
