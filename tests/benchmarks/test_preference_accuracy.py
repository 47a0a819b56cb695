"""The measurement of preferences chooses settings by problems that no run of it has learnt."""

from benchmarks.preference_accuracy import CHOSEN, HELD_BACK, HELD_OUT, SETTINGS, TRAIN, after, read, split


def test_the_bundled_training_and_held_out_pairs_share_no_problem():
    rows, held_out = read(TRAIN), read(HELD_OUT)
    assert (len(rows), len(held_out)) == (420, 150)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in held_out}


def test_all_pairs_of_a_problem_are_held_back_or_none():
    rows = read(TRAIN)
    kept, held_back = split(rows, HELD_BACK)
    assert len(kept) + len(held_back) == len(rows)
    assert not {row["prompt"] for row in kept} & {row["prompt"] for row in held_back}
    assert abs(len(held_back) / len(rows) - HELD_BACK) < 0.03
    assert split(rows[::-1], HELD_BACK)[1] == held_back[::-1]  # the order of the rows says nothing


def test_a_run_is_judged_by_its_last_validation(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,val/loss,val/reward_margin,val/reward_accuracy\n0,0.69,0.0,0.5\n50,,,\n100,0.61,0.4,0.66\n", "utf-8"
    )
    assert after(tmp_path) == {"loss": 0.61, "reward_margin": 0.4, "reward_accuracy": 0.66}


def test_the_chosen_setting_is_one_of_those_tried():
    assert CHOSEN in SETTINGS
