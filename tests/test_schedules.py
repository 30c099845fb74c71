"""Numbers that change during training."""

import pytest

from nerf.training.schedules import highest, scheduled, stepped


@pytest.mark.parametrize(
    ("text", "step", "value"),
    [
        ("0.5", 0, 0.5),
        ("0.5", 10**6, 0.5),
        ("1e-3", 7, 1e-3),
        ("0:1,100:3", 0, 1.0),
        ("0:1,100:3", 50, 2.0),
        ("0:1,100:3", 100, 3.0),
        ("0:1,100:3", 10**6, 3.0),
        ("100:1,200:0", 0, 1.0),  # constant before the first step
        ("0:1, 10:2 ,20:0", 15, 1.0),
        ("0:-1,4:1", 2, 0.0),
    ],
)
def test_values_between_and_beyond_the_steps(text, step, value):
    assert scheduled(text, step) == pytest.approx(value)


def test_sizes_jump_at_their_step():
    assert [stepped("0:32,100:64", step) for step in (0, 99, 100, 101)] == [32, 32, 64, 64]
    assert stepped("5:8", 0) == 8


def test_the_highest_value():
    assert highest("0:0,10:3,20:1") == 3


@pytest.mark.parametrize("text", ["", "a", "1,2", "0:1,0:2", "5:1,2:1", "0:nan", "-1:2", "0:1:2"])
def test_what_is_no_schedule_is_refused(text):
    with pytest.raises(ValueError, match="expected|ascend"):
        scheduled(text, 0)
