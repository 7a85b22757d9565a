"""Laws of spikes: a gradient far above the last ones changes nothing, none is skipped for ever, and the host is never asked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hunyuan_jax.bad_steps import LOOK_AFTER, BadSteps
from hunyuan_jax.checkpoint import Checkpoints
from hunyuan_jax.optimizer import OptimizerConfig
from hunyuan_jax.spikes import MOST_IN_A_ROW, after_step, is_spike, no_spikes
from hunyuan_jax.train_step import EmaConfig, init_state, make_step
from tests.faults import small_state
from tests.test_train_step import Parabola, batch_of, without_counts

WINDOW = 8


def fed(norms, *, above: float = 5.0, window: int = WINDOW):
    """The history after these norms, and which of them were skipped."""

    @jax.jit
    def feed(spikes, norm):
        good = jnp.isfinite(norm)
        spike = good & is_spike(spikes, norm, above=above)
        return after_step(spikes, norm, accepted=good & ~spike, spike=spike), spike

    spikes, skipped = no_spikes(window), []
    for norm in norms:
        spikes, spike = feed(spikes, jnp.float32(norm))
        skipped.append(bool(spike))
    return spikes, skipped


def test_a_norm_is_a_spike_where_it_lies_above_the_median_by_so_many_median_distances():
    """Of norms drawn anew each time, the verdict of numpy over the accepted ones."""
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=300)).astype(np.float32)
    accepted, expected = [], []
    for norm in norms:
        last = np.array(accepted[-WINDOW:])
        median = np.median(last) if accepted else 0.0
        spread = np.median(np.abs(last - median)) if accepted else 0.0
        expected.append(len(accepted) >= WINDOW and norm > median + 5.0 * spread)
        if not expected[-1]:
            accepted.append(norm)
    spikes, skipped = fed(norms)
    assert skipped == expected
    assert 5 < sum(skipped) < 100
    assert int(spikes.skipped) == sum(skipped)
    assert sorted(np.asarray(spikes.norms)) == sorted(np.array(accepted[-WINDOW:]))


def test_norms_that_hardly_differ_leave_room_of_a_few_per_cent():
    _, skipped = fed([1.0] * WINDOW + [1.04, 1.06])
    assert skipped == [False] * WINDOW + [False, True]


def test_gradients_that_have_grown_for_good_are_accepted_in_the_end():
    spikes, skipped = fed([1.0] * WINDOW + [100.0] * (MOST_IN_A_ROW + 2) + [1.0] * WINDOW)
    assert skipped == [False] * WINDOW + [True] * MOST_IN_A_ROW + [False] * (2 + WINDOW)
    assert int(spikes.skipped) == MOST_IN_A_ROW
    _, skipped = fed([1.0] * WINDOW + [100.0] * (MOST_IN_A_ROW + WINDOW) + [1000.0])  # and are what is usual from then on
    assert skipped[-2:] == [False, True]


def test_what_is_not_finite_is_no_spike_and_is_not_remembered():
    spikes, skipped = fed([1.0] * WINDOW + [np.inf, np.nan, 50.0])
    assert skipped[-3:] == [False, False, True]
    assert np.isfinite(spikes.norms).all()


def test_a_spike_changes_nothing_but_the_counts_and_training_goes_on():
    optimizer = optax.adam(0.01)
    step = jax.jit(make_step(Parabola(), optimizer, ema=EmaConfig(decay=0.5), key=jax.random.key(0), skip_above=5.0))
    state = init_state({"w": jnp.array(3.0)}, optimizer, spike_window=WINDOW)
    for _ in range(WINDOW):
        state, _ = step(state, batch_of(1.0))
    after, said = step(state, batch_of(1000.0))
    jax.tree.map(np.testing.assert_array_equal, without_counts(after), without_counts(state))
    assert [int(after.skipped), float(said["skipped"]), float(said["spikes"])] == [1, 1.0, 1.0]
    assert float(said["grad_norm"]) > 1000
    later, said = step(after, batch_of(1.0))
    assert (float(said["skipped"]), int(later.step)) == (1.0, WINDOW + 2)
    assert float(later.params["w"]) < float(state.params["w"])


def test_spikes_lead_back_to_no_checkpoint_and_do_not_break_a_row_of_bad_steps():
    bad = BadSteps(limit=2, skipped=3, spikes=1)
    rows = [(5, 2), (6, 3), (7, 3), (8, 4), (9, 4)]  # skipped in all, and spikes among them: spike, spike, bad, spike, bad
    for step, (skipped, spikes) in enumerate(rows, start=1):
        values = {"skipped": skipped, "spikes": spikes, "loss": 1.0, "grad_norm": 1.0}
        bad.add(step, {name: np.float32(value) for name, value in values.items()})
    assert len(rows) > LOOK_AFTER
    assert bad.in_a_row == []
    bad.look_at_all()
    assert [row.step for row in bad.in_a_row] == [3, 5]


def abstract_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.mark.parametrize(("saved", "wanted"), [(0, 0), (0, 4), (4, 4), (4, 6), (4, 0)])
def test_a_checkpoint_is_restored_whether_or_not_spikes_were_or_are_skipped(tmp_path, saved, wanted):
    history = fed([1.0, 2.0, 3.0], window=saved)[0] if saved else None
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(10, small_state(10).replace(spikes=history), data={})
    checkpoints.wait()
    asked = small_state(0).replace(spikes=no_spikes(wanted) if wanted else None)
    state, _ = checkpoints.restore(10, abstract_of(asked))
    checkpoints.close()
    expected = small_state(10).replace(spikes=history if saved == wanted else asked.spikes)
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_the_state_keeps_norms_only_where_they_are_asked_for():
    assert OptimizerConfig(learning_rate=1.0).spike_window == 0
    assert OptimizerConfig(learning_rate=1.0, skip_above=6.0, skip_window=50).spike_window == 50
