"""The same problem as one mixed-integer linear program, for solvers that can prove an optimum of small ones.

Variables x[i,e] (item i in expert e), y[e,c] (expert e serves domain c) and z[e,c] <= min(sum_i s[i,c] x[i,e], U_c y[e,c]),
what expert e brings to domain c, with U_c the `high` best scores of the domain. Experts are ordered by size.
"""

import numpy as np

from expert_merging.core.errors import UserError


def compact(problem):
    """(gain [v], A [rows, v] sparse, least [rows], most [rows], whole [v], top [v]): max gain v, least <= A v <= most,
    0 <= v <= top, whole where 1. Variables are x, y, z after one another, by rows."""
    from scipy.sparse import csr_array, eye_array, hstack, kron, vstack

    scores, n = problem.scores, problem.experts
    items, domains = scores.shape
    of_item = kron(eye_array(items), np.ones((1, n)))
    of_expert = kron(np.ones((1, items)), eye_array(n))
    brings = kron(scores.T, eye_array(n))  # [D n, items n]: row (c, e)
    turn = eye_array(n * domains).tocsr()[np.arange(n * domains).reshape(n, domains).T.ravel()]  # rows (c, e) of y, z
    best = np.sort(scores, axis=0)[-problem.high :].sum(0)
    served = kron(np.ones((1, n)), eye_array(domains))  # of y: experts that serve c
    serving = kron(eye_array(n), np.ones((1, domains)))  # of y: domains that e serves
    larger = of_expert.tocsr()[:-1] - of_expert.tocsr()[1:]

    def row(x=None, y=None, z=None):
        height = next(part for part in (x, y, z) if part is not None).shape[0]
        widths = (items * n, n * domains, n * domains)
        parts = [csr_array((height, w)) if part is None else part for part, w in zip((x, y, z), widths, strict=True)]
        return hstack(parts)

    rows = [
        (row(x=of_item), 1, 1),
        (row(x=of_expert), problem.low, problem.high),
        (row(y=serving), 1, domains),
        (row(y=served), 0, problem.per_domain),
        (row(x=-brings, z=turn), -np.inf, 0),
        (row(y=-kron(eye_array(n), np.diag(best)), z=eye_array(n * domains)), -np.inf, 0),
    ]
    if n > 1:
        rows.append((row(x=larger), 0, np.inf))
    matrix = csr_array(vstack([block for block, _, _ in rows]))
    least, most = (np.concatenate([np.full(one[0].shape[0], one[i], float) for one in rows]) for i in (1, 2))
    whole = np.r_[np.ones(items * n + n * domains), np.zeros(n * domains)]
    top = np.r_[np.ones(items * n + n * domains), np.tile(best, n)]
    return 1 - whole, matrix, least, most, whole, top


def by_highs(problem, seconds: float):
    """(labels, serves, bound) by SciPy's HiGHS; labels and serves are None where it found no solution in time."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    gain, matrix, least, most, whole, top = compact(problem)
    solved = milp(
        -gain, constraints=LinearConstraint(matrix, least, most), integrality=whole, bounds=Bounds(0, top),
        options={"time_limit": seconds, "mip_rel_gap": 1e-7},
    )  # fmt: skip
    bound = np.inf if solved.mip_dual_bound is None else -solved.mip_dual_bound
    return (*_read(problem, solved.x), bound)


def by_gurobi(problem, seconds: float, seed: int):
    """As `by_highs`, by Gurobi. Raises UserError where it is not installed, or has no licence for so large a problem."""
    try:
        import gurobipy
    except ImportError as error:
        raise UserError("solver gurobi needs gurobipy and its licence; install it, or use alternating") from error
    gain, matrix, least, most, whole, top = compact(problem)
    try:
        with gurobipy.Env(params={"OutputFlag": 0}) as environment, gurobipy.Model(env=environment) as model:
            model.setParam("TimeLimit", seconds)
            model.setParam("Seed", seed)
            kinds = np.where(whole > 0, gurobipy.GRB.BINARY, gurobipy.GRB.CONTINUOUS)
            v = model.addMVar(len(gain), ub=top, vtype=kinds)
            has_least, has_most = np.isfinite(least), np.isfinite(most)
            model.addConstr(matrix[has_least] @ v >= least[has_least])
            model.addConstr(matrix[has_most] @ v <= most[has_most])
            model.setObjective(gain @ v, gurobipy.GRB.MAXIMIZE)
            model.optimize()
            found = v.X if model.SolCount else None
            return (*_read(problem, found), model.ObjBound)
    except gurobipy.GurobiError as error:
        raise UserError(f"Gurobi: {error}; use solver alternating, which needs no licence") from error


def _read(problem, variables: np.ndarray | None):
    if variables is None:
        return None, None
    items, domains = problem.scores.shape
    x = variables[: items * problem.experts].reshape(items, problem.experts)
    y = variables[items * problem.experts :][: problem.experts * domains].reshape(problem.experts, domains)
    return x.argmax(1), y > 0.5
