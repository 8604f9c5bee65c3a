"""The ways of sampling that results set side by side."""

METHODS = {"unguided": "unguided", "cfg": "CFG", "guided": "guided"}  # name -> label
SOLVERS = {"ddim": "", "dpmsolver++": ", DPM-Solver++"}  # DDIM, of all three, goes without saying


def label_of(method: str, num_steps: int, solver: str = "ddim") -> str:
    """A setting as a row's name."""
    steps = "1 step" if num_steps == 1 else f"{num_steps} steps"
    return f"{METHODS[method]}, {steps}{SOLVERS[solver]}"
