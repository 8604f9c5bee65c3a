"""`python -m components.tracking`: bring to MLflow what earlier runs could not."""

from components.cli import main, without_arguments
from components.params import Params
from components.tracking.delivery import settle
from components.tracking.store import Store


def run(params: Params) -> None:
    """Deliver curves that are kept here, end runs whose process is gone.

    Raises TrackingError if MLflow can't be reached.
    """
    store = Store(params.tracking)
    settle(store)
    print(f"MLflow at {store.name} has all that earlier runs of this checkout left")


if __name__ == "__main__":
    without_arguments("tracking", __doc__)
    main(run, reads_inputs=False)
