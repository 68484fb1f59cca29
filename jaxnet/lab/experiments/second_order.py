"""What curvature buys the full batch: Newton and quasi-Newton steps against gradient descent and single examples."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.sparse.linalg import cg

from jaxnet import curvature, data, losses, nn, training
from jaxnet.contract import Array, ArrayTree
from jaxnet.lab.experiments.two_gaussians import minimum_of_weights, weights_only
from jaxnet.lab.record import Claim, Panel, Record, Series, above, below, close, slug

QUESTION = "What do second-order methods, which need the full batch, gain over gradient descent and single examples?"

DECAYS = (1e-2, 1e-3, 1e-4, 1e-5)
SHOWN = 1e-3
GAPS = (1e-1, 1e-2, 1e-3, 1e-6, 1e-9)
# Of the largest stable rate at the minimum; the last is beyond it.
RATES = np.append(np.geomspace(0.1, 0.9, 12), [0.95, 0.98, 1.05])
DAMPING = 0.03
PRODUCTS = 5
GRADIENTS_A_PRODUCT = 2
NEWTON_STEPS = 25
Batch = tuple[Array, Array]
REGRESSION = nn.dense(10, kernel_init=jax.nn.initializers.zeros)
CROSS_ENTROPY = losses.mean_loss(REGRESSION.apply, losses.softmax_cross_entropy)


def run(*, seed: int = 0, num_examples: int = 300, num_steps: int = 1000, num_epochs: int = 100) -> Record:
    """Softmax regression on digits with weight decay α, which is convex, to E* and near it, at four α.

    The cost is counted in gradients of the full batch; a Hessian product counts as two, a step on one of N examples as
    1/N. Newton's step solves (H + .03‖g‖) d = g by conjugate gradients: with 5 products, or to the end.

    Reference:
      Nocedal & Wright, "Numerical Optimization", 2006, sections 7.1 (Newton–CG) and 7.2 (L-BFGS); the damping: Li,
      Fukushima, Qi & Yamashita, "Regularized Newton Methods for Convex Minimization Problems", 2004.
    """
    with jax.enable_x64(True):
        return _run(seed, num_examples, num_steps, num_epochs)


class Curve(NamedTuple):
    """E − E* along a run, against the gradients spent."""

    cost: np.ndarray
    gap: np.ndarray

    def to(self, gap: float) -> float:
        """Gradients until E − E* is at most ``gap``; infinite if it never is."""
        reached = self.gap <= gap
        return float(self.cost[np.argmax(reached)]) if reached.any() else float("inf")


class Race(NamedTuple):
    """All methods at one weight decay.

    Attributes:
      condition: κ = λ_max/α at the minimum.
      descent: gradient descent at each of `RATES`.
      newton_cg: Newton steps by so few products.
      lbfgs: L-BFGS.
      single: single examples at a decayed rate.
      gradient_norms: ‖g‖ along Newton steps that are solved to the end.
    """

    condition: float
    descent: list[Curve]
    newton_cg: Curve
    lbfgs: Curve
    single: Curve
    gradient_norms: np.ndarray

    def best(self, gap: float) -> Curve:
        """Gradient descent at the rate that is first to reach the gap."""
        return min(self.descent, key=lambda curve: curve.to(gap))

    def order(self) -> float:
        """The p of ‖g_{k+1}‖ ∝ ‖g_k‖ᵖ over the last three gradients that rounding leaves alone."""
        clear = np.flatnonzero(self.gradient_norms > 1e-14)[-1]
        before, last = np.diff(np.log(self.gradient_norms[clear - 2 : clear + 1]))
        return float(last / before)

    def costs(self, gap: float) -> dict[str, float]:
        """Gradients to the gap, by method."""
        return {
            "gradient descent, best rate": self.best(gap).to(gap),
            "L-BFGS": self.lbfgs.to(gap),
            f"Newton–CG, {PRODUCTS} products a step": self.newton_cg.to(gap),
            "single examples": self.single.to(gap),
        }


def _regularised(decay: Array | float) -> Callable[[ArrayTree, Batch], Array]:
    """E(ω) + ½α‖ω‖²."""
    return lambda params, batch: CROSS_ENTROPY(params, batch) + decay / 2 * optax.tree.norm(params, squared=True)


@functools.partial(jax.jit, static_argnames=("num_steps", "max_products"))
def newton(
    decay: Array | float, start: ArrayTree, batch: Batch, num_steps: int, tol: float, max_products: int
) -> tuple[ArrayTree, Array, Array]:
    """ω ← ω − (H + .03‖g‖)⁻¹g; the end, and E and ‖g‖ before each step."""
    loss = _regularised(decay)

    def step(params: ArrayTree, batch: Batch) -> tuple[ArrayTree, tuple[Array, Array]]:
        value, gradient = jax.value_and_grad(loss)(params, batch)
        length = optax.tree.norm(gradient)
        damped = curvature.shift(curvature.hessian(loss, params, batch), DAMPING * length)
        direction, _ = cg(damped, gradient, tol=tol, maxiter=max_products)
        return optax.tree.sub(params, direction), (value, length)

    end, (values, lengths) = training.trajectory(step, start, batch, num_steps=num_steps)
    return end, values, lengths


@functools.partial(jax.jit, static_argnames="num_steps")
def gradient_descent(decay: Array | float, start: ArrayTree, batch: Batch, rates: Array, num_steps: int) -> Array:
    """E before each step, (rates, steps)."""

    def one(rate: Array) -> Array:
        optimizer = optax.sgd(rate)
        update, state = training.make_update(_regularised(decay), optimizer), training.init_state(start, optimizer)
        return training.trajectory(update, state, batch, num_steps=num_steps)[1]["loss"]

    return jax.vmap(one)(rates)


@functools.partial(jax.jit, static_argnames="num_steps")
def lbfgs(decay: Array | float, start: ArrayTree, batch: Batch, num_steps: int) -> tuple[Array, Array]:
    """E before each step of optax's L-BFGS, and the gradients that its line search took in it."""
    optimizer, value_fn = optax.lbfgs(), lambda params: _regularised(decay)(params, batch)
    value_and_grad = optax.value_and_grad_from_state(value_fn)

    # Not `make_update`: the line search has left value and gradient in the state, which counts those it took.
    def step(carry: tuple[ArrayTree, Any], _: None) -> tuple[tuple[ArrayTree, Any], tuple[Array, Array]]:
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), (value, state[-1].info.num_linesearch_steps)

    return training.trajectory(step, (start, optimizer.init(start)), num_steps=num_steps)[1]


@functools.partial(jax.jit, static_argnames=("num_epochs", "checks"))
def single_examples(
    decay: Array | float, start: ArrayTree, batch: Batch, key: Array, num_epochs: int, checks: int
) -> Array:
    """E at ``checks`` points of each epoch, at η_t = η₀/(1 + η₀αt); 1/η₀ is the largest curvature of an example."""
    loss, n = _regularised(decay), len(batch[1])
    largest = jnp.max(jnp.sum(batch[0] ** 2, axis=1) + 1) / 2 + decay
    orders = jax.vmap(lambda epoch: data.reshuffled(key, epoch, n))(jnp.arange(num_epochs))
    optimizer = optax.sgd(lambda time: 1 / (largest + decay * time))
    error_of = lambda params, row: loss(params, jax.tree.map(lambda x: x[row][None], batch))
    update, state = training.make_update(error_of, optimizer), training.init_state(start, optimizer)
    between_checks = functools.partial(training.trajectory, update)
    check = lambda state, _: loss(state.params, batch)
    return training.trajectory(between_checks, state, orders.reshape(num_epochs * checks, -1), observe=check)[1]


def _run(seed: int, num_examples: int, num_steps: int, num_epochs: int) -> Record:
    choice_key, key = jax.random.split(jax.random.key(seed))
    digits = data.digits()
    rows = jax.random.choice(choice_key, len(digits[1]), (num_examples,), replace=False)
    batch = jax.tree.map(lambda x: x[rows], digits)
    races = {decay: _race(decay, batch, key, num_steps, num_epochs) for decay in DECAYS}
    shown = races[SHOWN]
    kappa = np.array([race.condition for race in races.values()])
    powers = {
        name: np.polyfit(np.log(kappa), np.log([race.costs(1e-6)[name] for race in races.values()]), 1)[0]
        for name in list(shown.costs(1e-6))[:3]
    }
    return Record(
        name="second_order",
        question=QUESTION,
        config={"num_examples": num_examples, "num_steps": num_steps, "num_epochs": num_epochs},
        seed=seed,
        dtype="float64",
        measurements={
            "condition": kappa,
            "costs": {str(decay): {str(g): race.costs(g) for g in GAPS} for decay, race in races.items()},
            "powers": powers,
        },
        claims=[*_quadratic_claims(key), *_claims(races, powers)],
        rows=[
            (f"{name}: gradients to E − E* = {gap:g}", cost, f"α = {SHOWN}")
            for gap in GAPS
            for name, cost in shown.costs(gap).items()
        ],
        panels=[_gap_panel(shown), _newton_panel(races), _condition_panel(races, kappa)],
    )


def _race(decay: float, batch: Batch, key: Array, num_steps: int, num_epochs: int) -> Race:
    start = REGRESSION.init(key, batch[0].shape[1:])
    end, values, lengths = newton(decay, start, batch, NEWTON_STEPS, 1e-12, 4000)
    floor, largest = float(values[-1]), float(_sharpness(decay, end, batch, key))
    curve = lambda cost, values: Curve(np.asarray(cost, float), np.asarray(values) - floor)
    descent = gradient_descent(decay, start, batch, jnp.asarray(RATES * 2 / largest), num_steps)
    short = newton(decay, start, batch, NEWTON_STEPS * 4, 0.0, PRODUCTS)[1]
    # A call of cg with so many iterations takes one product more, for the residual of its start.
    a_step = 1 + GRADIENTS_A_PRODUCT * (PRODUCTS + 1)
    quasi, searches = lbfgs(decay, start, batch, 150)
    checks = 5
    single = single_examples(decay, start, batch, key, num_epochs, checks)
    return Race(
        condition=largest / decay,
        descent=[curve(np.arange(num_steps), values) for values in descent],
        newton_cg=curve(a_step * np.arange(len(short)), short),
        lbfgs=curve(1 + np.append(0, np.cumsum(searches)[:-1]), quasi),
        single=curve(np.arange(1, len(single) + 1) / checks, single),
        gradient_norms=np.asarray(lengths),
    )


@jax.jit
def _sharpness(decay: Array | float, params: ArrayTree, batch: Batch, key: Array) -> Array:
    return curvature.eigsh(curvature.hessian(_regularised(decay), params, batch), key=key, tol=1e-6).values[0]


def _quadratic_claims(key: Array) -> list[Claim]:
    """The two Gaussians' neuron is quadratic in two weights: a Newton step of two products ends at the minimum."""
    batch = data.two_gaussians_exact()
    start = jax.random.normal(key, (2,))
    gradient = jax.grad(weights_only)
    step, _ = cg(curvature.hessian(weights_only, start, batch), gradient(start, batch), tol=0.0, maxiter=2)
    distance = start - step - minimum_of_weights(batch)
    return [
        close(
            "newton_on_quadratic",
            "Newton on a quadratic: distance from the minimum after one step",
            0,
            optax.tree.norm(distance),
            1e-12,
        )
    ]


def _claims(races: dict[float, Race], powers: dict[str, float]) -> list[Claim]:
    shown = races[SHOWN]
    plain, quasi, *_ = shown.costs(1e-6).values()
    *others, single = shown.costs(0.1).values()
    meanwhile = shown.single.gap[shown.single.cost <= plain].min()
    orders = [
        close(slug("newton_order", a), f"Newton, α = {a:g}: order of convergence", 2, race.order(), 0.15)
        for a, race in races.items()
    ]
    of_descent, of_lbfgs, of_newton = powers.values()
    beyond = shown.descent[-1].gap[-1]
    return [
        *orders,
        above(
            "descent_beyond_limit", "gradient descent at 1.05 × 2/λ_max of the minimum: E − E* in the end", 1e-6, beyond
        ),
        close("power_of_descent", "gradient descent: gradients to 1e-6 grow as this power of κ", 1, of_descent, 0.25),
        below("power_of_lbfgs", "L-BFGS: as this power, of the conjugate gradients' bound √κ", 0.5, of_lbfgs),
        below("power_of_newton", "Newton–CG: as this power", 0.5, of_newton),
        below(
            "lbfgs_over_descent",
            f"α = {SHOWN}, to 1e-6: gradients of L-BFGS over those of gradient descent",
            0.5,
            quasi / plain,
        ),
        below(
            "single_over_others",
            f"α = {SHOWN}, to 0.1: gradients of single examples over the least of the others",
            1,
            single / min(others),
        ),
        above("single_floor", "single examples: least E − E* while gradient descent goes to 1e-6", 1e-6, meanwhile),
    ]


def _gap_panel(race: Race) -> Panel:
    curves = {
        "gradient descent, best rate to 1e-6": race.best(1e-6),
        "L-BFGS": race.lbfgs,
        f"Newton–CG, {PRODUCTS} products a step": race.newton_cg,
        "single examples, decayed rate": race.single,
    }
    series = []
    for name, curve in curves.items():
        shown = (curve.gap > 1e-12) & (curve.cost > 0)
        series.append(Series(name, curve.cost[shown], curve.gap[shown]))
    return Panel(
        name="gap_against_gradients",
        title=f"α = {SHOWN}: single examples are first to be near, L-BFGS is first to be there",
        xlabel=f"full-batch gradients (a Hessian product: {GRADIENTS_A_PRODUCT}; a single example: 1/N)",
        ylabel="E − E*",
        series=series,
        xscale="log",
        yscale="log",
    )


def _newton_panel(races: dict[float, Race]) -> Panel:
    series = []
    for decay, race in races.items():
        clear = race.gradient_norms[race.gradient_norms > 1e-14]
        series.append(Series(f"α = {decay:g}", clear[:-1], clear[1:], "line-points"))
    norms = np.geomspace(1e-7, 1e-1, 20)
    series.append(Series("slope 2", norms, 10 * norms**2, "dashed"))
    return Panel(
        name="newton_convergence",
        title="Newton steps: each doubles the number of correct digits, once near",
        xlabel="‖g‖ before a step",
        ylabel="‖g‖ after it",
        series=series,
        xscale="log",
        yscale="log",
    )


def _condition_panel(races: dict[float, Race], kappa: np.ndarray) -> Panel:
    costs = [race.costs(1e-6) for race in races.values()]
    series = [
        Series(name, kappa, [cost[name] for cost in costs], "line-points", colour)
        for colour, name in enumerate(list(costs[0])[:3])
    ]
    plain, quasi = series[0].y[1], series[1].y[1]
    series += [
        Series("∝ κ", kappa, plain * kappa / kappa[1], "dashed", 0),
        Series("∝ √κ", kappa, quasi * np.sqrt(kappa / kappa[1]), "dashed", 1),
    ]
    return Panel(
        name="gradients_against_condition",
        title="The worse the condition, the more curvature is worth: gradients to E − E* = 1e-6",
        xlabel="κ = λ_max/α at the minimum",
        ylabel="full-batch gradients",
        series=series,
        xscale="log",
        yscale="log",
    )
