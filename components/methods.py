"""The ways of sampling that results set side by side."""

METHODS = {"unguided": "unguided", "cfg": "CFG", "guided": "guided"}  # name -> label
SOLVERS = {"ddim": "", "dpmsolver++": ", DPM-Solver++"}  # DDIM, of all three, goes without saying
SAME_COST = 0.05  # a difference in forwards up to which costs are called equal


def label_of(method: str, num_steps: int, solver: str = "ddim") -> str:
    """A setting as a row's name."""
    steps = "1 step" if num_steps == 1 else f"{num_steps} steps"
    return f"{METHODS[method]}, {steps}{SOLVERS[solver]}"


def equal_cost_steps(num_steps: int, forwards_per_step: float) -> int:
    """With how many steps CFG, two forwards each, costs what a guided run does.

    Half of them where that is the same within `SAME_COST`, else the nearest, 1 at least.

    Args:
        num_steps: of the guided run.
        forwards_per_step: what its steps cost, in plain forwards.
    """
    half, cost = num_steps // 2, num_steps * forwards_per_step
    return half if is_same_cost(2 * half, cost) else max(1, round(cost / 2))


def is_same_cost(forwards: float, others: float) -> bool:
    """Whether so many forwards are about as many as the others."""
    return abs(forwards - others) <= SAME_COST * others
