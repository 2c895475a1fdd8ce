"""The exact assignment, the integer program's half-steps, and the bounds and proofs of its solutions."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from expert_merging.core.errors import UserError
from expert_merging.hemoe import solver
from expert_merging.hemoe.bound import tighten
from expert_merging.hemoe.partition import Settings
from expert_merging.hemoe.transport import assign, dual_prices


def scores_of(items, domains, seed):
    random = np.random.default_rng(seed)
    return np.log1p(random.gamma(0.5, 1, (items, domains)) * random.gamma(1, 1, (items, 1)))


def best_by_linear_program(profit, low, high):
    items, groups = profit.shape
    of_item = np.kron(np.eye(items), np.ones(groups))
    of_group = np.kron(np.ones(items), np.eye(groups))
    solved = linprog(
        -profit.ravel(), A_ub=np.r_[of_group, -of_group], b_ub=np.r_[high, -low], A_eq=of_item, b_eq=np.ones(items)
    )
    return -solved.fun


@st.composite
def assignments(draw):
    items, groups = draw(st.integers(1, 25)), draw(st.integers(1, 5))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    # Few different profits make ties, where exchanges can go round in circles.
    profit = (
        random.integers(0, 4, (items, groups)).astype(float) if draw(st.booleans()) else random.random((items, groups))
    )
    low = random.integers(0, items // groups + 1, groups)
    high = low + random.integers(0, items, groups)
    assume(high.sum() >= items)
    return profit, low, high


@given(assignments())
def test_assignment_is_the_linear_programs(case):
    profit, low, high = case
    labels = assign(profit, low, high)
    sizes = np.bincount(labels, minlength=profit.shape[1])
    assert (low <= sizes).all() and (sizes <= high).all()
    value = profit[np.arange(len(labels)), labels].sum()
    assert value == pytest.approx(best_by_linear_program(profit, low, high), abs=1e-8)
    prices = dual_prices(profit, low, high)
    above = (profit - prices).max(1).sum() + np.maximum(high * prices, low * prices).sum()
    assert above >= value - 1e-9


def all_serves(n, domains, q):
    """Every y that uses each domain's q experts, which is never worse, and leaves no expert idle."""
    columns = [np.isin(np.arange(n), chosen) for chosen in itertools.combinations(range(n), q)]
    for chosen in itertools.product(columns, repeat=domains):
        serves = np.stack(chosen, axis=1)
        if serves.any(1).all():
            yield serves


@st.composite
def problems(draw, most_experts=3, most_domains=3):
    n, domains = draw(st.integers(1, most_experts)), draw(st.integers(1, most_domains))
    q = draw(st.integers(1, n))
    assume(n <= domains * q)
    items = draw(st.integers(max(2, n), 12))
    low = draw(st.integers(1, items // n))
    high = draw(st.integers(-(-items // n), items))
    scores = scores_of(items, domains, draw(st.integers(0, 10**6)))
    return solver.Problem(scores, n, low, max(low, high), q)


@given(problems())
@settings(max_examples=40)
def test_solution_is_the_best_of_all(problem):
    solution = solver.solve(problem, count=2)
    best = max(
        solver.objective(problem.scores, solver.best_items(problem, serves), serves)
        for serves in all_serves(problem.experts, problem.scores.shape[1], problem.per_domain)
    )
    assert solution.objective <= best * (1 + 1e-9) <= solution.bound * (1 + 2e-9)
    assert solution.status == "optimal" and solution.objective == pytest.approx(best, rel=1e-9)


@given(problems(most_experts=6, most_domains=5))
@settings(max_examples=40)
def test_constraints_objective_and_bounds(problem):
    solution = solver.solve(problem, count=2)
    sizes = np.bincount(solution.labels, minlength=problem.experts)
    assert (problem.low <= sizes).all() and (sizes <= problem.high).all()
    assert (solution.serves.sum(1) >= 1).all() and (solution.serves.sum(0) <= problem.per_domain).all()
    recomputed = sum(
        problem.scores[solution.labels == e, c].sum() for e, c in zip(*np.nonzero(solution.serves), strict=True)
    )
    assert solution.objective == pytest.approx(recomputed)
    assert solution.objective <= solution.bound <= solver.cheap_bound(problem) * (1 + 1e-9)
    assert (np.diff(solution.history) >= -1e-9).all(), "a half-step lost something"


def test_no_heuristic_on_the_same_feasible_set_is_better():
    problem = solver.Problem(scores_of(200, 6, 0), 6, 17, 67, 2)
    solution = solver.solve(problem)
    random = np.random.default_rng(1)
    for sizes in ([34, 34, 33, 33, 33, 33], [67, 65, 17, 17, 17, 17]):
        labels = random.permutation(np.repeat(np.arange(6), sizes))
        serves = solver.best_serves(problem, solver.expert_values(problem, labels))
        assert solver.objective(problem.scores, labels, serves) <= solution.objective
    favourite = np.argsort(-problem.scores.max(1))  # greedy: each domain's best items, then what is left
    labels, sizes = np.full(200, -1), np.zeros(6, int)
    for item in favourite:
        for expert in np.argsort(-problem.scores[item]):
            if sizes[expert] < 34:
                labels[item], sizes[expert] = expert, sizes[expert] + 1
                break
    serves = solver.best_serves(problem, solver.expert_values(problem, labels))
    assert solver.objective(problem.scores, labels, serves) <= solution.objective


def test_highs_agrees_and_the_proof_is_not_its_own_witness():
    problem = solver.Problem(scores_of(12, 3, 3), 3, 2, 8, 2)
    mine, theirs = solver.solve(problem), solver.solve(problem, solver="highs")
    assert mine.status == theirs.status == "optimal"
    assert mine.objective == pytest.approx(theirs.objective, rel=1e-6)
    assert mine.bound == pytest.approx(theirs.bound, rel=1e-6)
    with pytest.raises(UserError, match="highs found no solution"):
        solver.solve(solver.Problem(scores_of(400, 8, 3), 8, 25, 100, 2), solver="highs", seconds=0.01)


def test_gurobi_where_the_user_has_it():
    problem = solver.Problem(scores_of(12, 3, 3), 3, 2, 8, 2)
    try:
        import gurobipy  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="needs gurobipy"):
            solver.solve(problem, solver="gurobi")
    else:
        assert solver.solve(problem, solver="gurobi").objective == pytest.approx(solver.solve(problem).objective)


def test_a_poor_start_is_mended_on_the_way_to_the_bound():
    problem = solver.Problem(scores_of(400, 6, 5), 6, 33, 133, 2)
    poor = np.zeros((6, 6), dtype=bool)
    poor[[0, 1, 2, 3, 4, 5], range(6)] = poor[[1, 2, 3, 4, 5, 0], range(6)] = True
    value = solver.objective(problem.scores, solver.best_items(problem, poor), poor)
    serves, better, bound = tighten(problem, poor, value, solver.cheap_bound(problem), seconds=60)
    assert better > 1.05 * value and bound < 0.9 * solver.cheap_bound(problem)
    assert better == pytest.approx(solver.objective(problem.scores, solver.best_items(problem, serves), serves))
    assert sorted(serves.sum(1)) == [1, 1, 1, 1, 2, 6], "one expert for all domains, one for two"


def test_equal_sizes_at_ratio_one_and_the_table_of_sizes():
    assert Settings(experts=8, ratio=1).sizes(8192) == (1024, 1024)
    assert Settings(experts=5, ratio=1).sizes(23) == (4, 5)
    released = {(r, n): Settings(experts=n, ratio=r, rounding="released") for r in (1, 4, 9) for n in (8, 16, 32)}
    table = {(1, 8): (16, 16), (4, 8): (8, 32), (9, 8): (5, 48), (1, 16): (8, 8), (4, 16): (4, 16), (9, 16): (3, 24)}
    table |= {(1, 32): (4, 4), (4, 32): (2, 8), (9, 32): (1, 12)}
    assert {key: setting.sizes(128) for key, setting in released.items()} == table
    for n, expected in ((8, (1, 2, 3)), (16, (2, 4, 6)), (32, (4, 8, 12))):
        for rounding in ("released", "exact"):
            got = [Settings(experts=n, experts_per_domain=l, rounding=rounding).per_domain(8) for l in (1, 2, 3)]
            assert tuple(got) == expected


@given(st.integers(1, 40), st.floats(1, 16), st.integers(1, 3000))
def test_sizes_never_differ_by_more_than_the_ratio(n, ratio, items):
    assume(items >= n)
    low, high = Settings(experts=n, ratio=ratio).sizes(items)
    assert n * low <= items <= n * high
    assert high <= ratio * low * (1 + 1e-6) or (low, high) == (items // n, -(-items // n)) or low == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 2, 11, 1, 1, 6), "11 experts cannot be made of 10"),
        ((10, 2, 3, 4, 5, 2), "at least 4 need 12 of the 10"),
        ((10, 2, 3, 1, 3, 2), "at most 3 hold 9 of the 10"),
        ((10, 2, 3, 1, 5, 1), "room for 2"),
        ((10, 9, 3, 1, 5, 4), "up to 4 experts; that must be 1 to 3"),
        ((10, 9, 3, 5, 4, 1), "the size ratio"),
    ],
)
def test_what_cannot_be_is_explained(arguments, words):
    with pytest.raises(UserError, match=words):
        solver.check_feasible(*arguments)


def test_scores_that_are_no_scores_are_refused():
    with pytest.raises(UserError, match="not negative"):
        solver.Problem(np.array([[1.0], [-1.0]]), 1, 1, 2, 1)
