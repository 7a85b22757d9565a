"""Laws of the data plan: any step alone, every row once an epoch, shares kept, no bucket without rows."""

from collections import Counter

import pytest

from hunyuan_jax.data import schedule as schedules
from hunyuan_jax.data.buckets import Bucket, sample_cost, token_count
from hunyuan_jax.data.schedule import PERIOD, Schedule
from hunyuan_jax.errors import UserError

SMALL = Bucket(frames=1, height=16, width=16, batch=3, share=3.0)
LARGE = Bucket(frames=9, height=16, width=16, batch=2, share=1.0)
UNUSED = Bucket(frames=5, height=16, width=16, batch=2, share=0.0)
ROWS = (tuple(range(10)), tuple(range(4, 11)), ())


def plan(seed: int = 0) -> Schedule:
    return Schedule(seed, (SMALL, LARGE, UNUSED), ROWS)


def forget() -> None:
    schedules._order_of_period.cache_clear()
    schedules._order_of_epoch.cache_clear()


def test_any_step_alone_is_the_step_in_sequence():
    in_sequence = [plan().step(number) for number in range(3 * PERIOD)]
    for number in (3 * PERIOD - 1, 0, PERIOD, 77):
        forget()
        assert plan().step(number) == in_sequence[number]


def test_another_seed_is_another_plan():
    assert [plan(0).step(n) for n in range(8)] != [plan(1).step(n) for n in range(8)]


def test_every_row_is_read_once_in_every_epoch():
    read = [Counter(), Counter()]
    for number in range(4 * PERIOD):
        step = plan().step(number)
        read[step.bucket].update(zip(step.epochs, step.rows, strict=True))
    for bucket, times in enumerate(read):
        assert set(times.values()) == {1}
        last = max(epoch for epoch, _ in times)
        assert last > 5
        assert {pair for pair in times if pair[0] < last} == {(epoch, row) for epoch in range(last) for row in ROWS[bucket]}


def test_epochs_have_different_orders():
    steps = [plan().step(number) for number in range(PERIOD)]
    pairs = [pair for step in steps if step.bucket == 0 for pair in zip(step.epochs, step.rows, strict=True)]
    orders = {tuple(row for epoch, row in pairs if epoch == wanted) for wanted in range(5)}
    assert len(orders) == 5


def test_every_period_keeps_the_shares():
    for period in range(3):
        used = Counter(plan().step(period * PERIOD + place).bucket for place in range(PERIOD))
        assert used == {0: PERIOD * 3 // 4, 1: PERIOD // 4}


@pytest.mark.parametrize("shares", [(1.0,), (1.0, 1.0, 1.0), (1e-6, 1.0), (0.0, 1.0, 2.0), tuple([1e-6] * 40 + [1.0] * 3)])
def test_shares_split_a_period_to_the_last_step(shares):
    counts = schedules._steps_per_period(shares)
    assert sum(counts) == PERIOD
    assert all((count >= 1) == (share > 0) for count, share in zip(counts, shares, strict=True))


def test_batches_have_the_size_of_their_bucket():
    for number in range(PERIOD):
        step = plan().step(number)
        assert len(step.rows) == len(step.epochs) == (3, 2)[step.bucket]


def test_a_batch_larger_than_the_data_spans_epochs():
    step = Schedule(0, (Bucket(frames=1, height=16, width=16, batch=5),), ((7, 8),)).step(0)
    assert step.epochs == (0, 0, 1, 1, 2)
    assert set(step.rows[:2]) == set(step.rows[2:4]) == {7, 8}


def test_a_bucket_with_a_share_needs_rows():
    with pytest.raises(UserError, match="No clip fits bucket 9x16x16"):
        Schedule(0, (SMALL, LARGE), (ROWS[0], ()))


@pytest.mark.parametrize("buckets", [(), (UNUSED,)])
def test_a_plan_needs_a_bucket_with_a_share(buckets):
    with pytest.raises(UserError, match="at least one bucket"):
        Schedule(0, buckets, tuple(() for _ in buckets))


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"batch": 0}, {"share": -1.0}, {"intervals": (0,)}, {"resize": (8, 16)}])
def test_impossible_buckets_are_refused(wrong):
    with pytest.raises(UserError, match="Bucket"):
        Bucket(**{"frames": 1, "height": 16, "width": 16, "batch": 1, **wrong})


def test_a_bucket_knows_the_source_frames_it_spans():
    bucket = Bucket(frames=9, height=16, width=16, batch=1, intervals=(4, 2))
    assert (bucket.span(1), bucket.span(2), bucket.span(4)) == (9, 17, 33)
    assert bucket.fits(17)
    assert not bucket.fits(16)


def test_cost_grows_faster_than_tokens():
    assert token_count(129, 720, 1280) == 33 * 45 * 80
    assert token_count(1, 256, 256) == 256
    small, large = token_count(129, 256, 256), token_count(129, 720, 1280)
    assert sample_cost(large) / sample_cost(small) > 2 * large / small
