import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from jaxnet.curvature import _lanczos


def flat(basis):
    return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(basis)], axis=1)


def matrix(seed, n):
    a = np.random.default_rng(seed).normal(size=(n, n))
    return jnp.asarray(a + a.T)


def split(v):
    return {"a": v[:2], "b": v[2:].reshape(-1, 1)}


def join(tree):
    return jnp.concatenate([tree["a"], tree["b"].reshape(-1)])


def run(a, num_steps, room, key=0):
    start = split(jax.random.normal(jax.random.key(key), (len(a),)))
    state = _lanczos.init(start, room)
    for _ in range(num_steps):
        state = advance(a, state)
    return state


@jax.jit
def advance(a, state):
    return _lanczos.step(lambda v: split(a @ join(v)), state)


@hypothesis.settings(deadline=None, max_examples=10)
@hypothesis.given(st.integers(0, 2**31), st.sampled_from([4, 12]))
def test_the_defining_identity(seed, n):
    """A Qᵀ = Qᵀ T + β q eₖᵀ, with orthonormal rows in Q."""
    with jax.enable_x64(True):
        a, k = matrix(seed, n), n - 1
        state = run(a, k, k)
        q, t = flat(state.basis), np.asarray(state.projected)
        np.testing.assert_allclose(q @ q.T, np.eye(k + 1), atol=1e-12)
        residual = np.zeros((n, k))
        residual[:, -1] = float(state.beta) * q[k]
        np.testing.assert_allclose(a @ q[:k].T, q[:k].T @ t + residual, atol=1e-11)


def test_the_identity_survives_a_restart(x64):
    a = matrix(0, 30)
    state = run(a, 10, 10)
    kept = jnp.array([9, 8, 7, 0])
    state = _lanczos.restart(state, _lanczos.ritz(state), kept)
    for _ in range(6):
        state = advance(a, state)
    q, t = flat(state.basis), np.asarray(state.projected)
    np.testing.assert_allclose(q @ q.T, np.eye(11), atol=1e-12)
    residual = np.zeros((30, 10))
    residual[:, -1] = float(state.beta) * q[10]
    np.testing.assert_allclose(a @ q[:10].T, q[:10].T @ t + residual, atol=1e-11)


def test_what_products_have_to_agree_on_is_known_before_the_next_one(x64):
    a = matrix(1, 30)
    full = run(a, 10, 10)
    for state in (full, _lanczos.restart(full, _lanczos.ritz(full), jnp.array([9, 8, 0]))):
        j = int(state.size)
        q = flat(state.basis)
        np.testing.assert_allclose(np.asarray(state.coupling)[:j], q[:j] @ a @ q[j], atol=1e-12)
        assert state.disagreement < 1e-12
    skew = matrix(2, 30)
    skew = jnp.triu(skew, 1) - jnp.triu(skew, 1).T
    state = run(a + 1e-3 * skew, 2, 10)
    q = flat(state.basis)
    np.testing.assert_allclose(state.disagreement, abs(2e-3 * q[0] @ skew @ q[1]), rtol=1e-9)


def test_a_breakdown_goes_on_in_a_new_direction(x64):
    a = jnp.diag(jnp.array([3.0, 3, 3, 1, 1]))  # two distinct values: every Krylov space has two dimensions
    state = run(a, 5, 5)
    np.testing.assert_allclose(flat(state.basis)[:5] @ flat(state.basis)[:5].T, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(np.linalg.eigvalsh(state.projected), [1, 1, 3, 3, 3], atol=1e-12)
    assert state.disagreement < 1e-14


def test_norms_neither_overflow_nor_underflow():
    for scale in (1e-30, 1.0, 1e30):
        v = {"a": jnp.full(4, scale, jnp.float32), "b": jnp.zeros((0, 2))}
        np.testing.assert_allclose(_lanczos.norm(v), 2 * scale, rtol=1e-6)
    assert _lanczos.norm({"a": jnp.zeros(3)}) == 0


def test_a_product_that_is_almost_parallel_to_the_basis_is_orthogonalised_twice(x64):
    """Of A + 10⁸ I all but 10⁻⁸ of each product is removed: one pass would leave rounding errors of that much more."""
    a = matrix(1, 12) + 1e8 * jnp.eye(12)
    q = flat(run(a, 8, 8).basis)
    np.testing.assert_allclose(q @ q.T, np.eye(9), atol=1e-13)


def test_a_product_of_exactly_nothing_goes_on_too(x64):
    state = _lanczos.init(split(jnp.eye(6)[2]), 6)
    for _ in range(6):
        state = advance(jnp.zeros((6, 6)), state)
        assert state.beta == 0
    np.testing.assert_allclose(flat(state.basis)[:6] @ flat(state.basis)[:6].T, np.eye(6), atol=1e-12)
