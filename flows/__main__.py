"""`python -m flows distill` and the other flows, in this process.

It needs no server, and reports to that of PREFECT_API_URL if there is one.

Exit codes are those of the stages: 0 done, 1 failed, 2 a mistake in params.yaml, 3 not promoted.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from components import interrupt
from components.cli import MAY_PASS, leave, stop
from components.environment import quiet
from components.mlflow_place import without_secrets
from components.overrides import overridden
from components.params import Params, ParamsError, load_params
from components.paths import REPORT
from components.promote import Options, add_options
from flows import guard
from flows.start import STAGES

if TYPE_CHECKING:
    from httpx import HTTPError

SECONDS_TO_ANSWER = 5.0
# One line of a stage, without what Prefect puts in front of it.
TASK_RUN_FORMAT = "%(asctime)s | %(task_run_name)s | %(message)s"


def main() -> None:
    """Run the flow that the command line names.

    Exits with 2 for bad parameters, with another number if the flow fails.
    """
    arguments = parser().parse_args()
    quiet()
    os.environ.setdefault("PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT", TASK_RUN_FORMAT)
    try:
        params = load_params(Path("params.yaml"))
        check(arguments)
    except ParamsError as error:
        stop(error, exit_code=2)
    except ValueError as error:
        stop(error, exit_code=1)

    # By the default, SIGTERM would leave Prefect's server behind, as `kill -9` does.
    signal.signal(signal.SIGTERM, leave)
    guard.start()
    # Prefect reads its environment when it is imported, so only now.
    check_server()
    from httpx import HTTPError

    from flows.process import StageFailed

    try:
        sys.exit(start(arguments, params))
    except ParamsError as error:
        stop(error, exit_code=2)
    except StageFailed as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code if 0 < error.exit_code < 128 else 1)
    except HTTPError as error:
        print(f"error: {without_secrets(why_not(error))}", file=sys.stderr, flush=True)
        os._exit(MAY_PASS)  # Prefect would try for minutes to send the last lines of its log
    except KeyboardInterrupt:
        print(interrupt.SAID, file=sys.stderr)
        sys.exit(130)


def check(arguments: argparse.Namespace) -> None:
    """Look at what is asked for at once, before a server is started.

    Raises ParamsError for overrides that can't be, ValueError for a promotion's options that
    contradict one another.
    """
    if arguments.flow == "distill":
        overridden(Path("params.yaml"), arguments.overrides)
    elif arguments.flow == "promote":
        options = vars(arguments).items()
        Options(**{name: value for name, value in options if name not in ("flow", "version")})


def parser() -> argparse.ArgumentParser:
    """Of the command line: a subcommand for each flow."""
    whole = argparse.ArgumentParser(prog="python -m flows", description="Run a flow here.")
    flows = whole.add_subparsers(dest="flow", required=True)
    distillation = flows.add_parser("distill", help="train, measure and register a guide")
    distillation.add_argument(
        "--from",
        dest="start_at",
        default=STAGES[0],
        choices=STAGES,
        help="leave the stages before this one as they are",
    )
    distillation.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="another value than that of params.yaml: the run is then a DVC experiment of its own",
    )
    evaluation = flows.add_parser("evaluate-finetune", help="measure the guide on one more model")
    evaluation.add_argument("path", help="the fine-tune")
    evaluation.add_argument("reference", help="real images in its style")
    evaluation.add_argument("--name", default="", help="default: the last part of its path")
    flows.add_parser("reevaluate", help="measure the champion again")
    add_options(flows.add_parser("promote", help="make a registered guide the champion"))
    return whole


def start(arguments: argparse.Namespace, params: Params) -> int:
    """Run the flow to its end; returns the exit code."""
    from flows.distill import distill_flow
    from flows.evaluate import evaluate_finetune_flow, reevaluate_flow
    from flows.promote import promote_flow

    options = {name: value for name, value in vars(arguments).items() if name != "flow"}
    match arguments.flow:
        case "distill":
            distill_flow(**options)
            if not arguments.overrides:
                print(summary(params))
        case "evaluate-finetune":
            evaluate_finetune_flow(**options)
        case "reevaluate":
            reevaluate_flow()
        case _:
            return int(promote_flow(**options))
    return 0


def why_not(error: "HTTPError") -> str:
    """What to do about a request to Prefect's server that failed while a flow ran."""
    kept = "what the stages made is kept, and the same command goes on"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"Prefect's server does not let us in ({status}): set PREFECT_API_AUTH_STRING or "
            f"PREFECT_API_KEY as it wants it; {kept} then"
        )
    return (
        f"Prefect's server went away while this ran ({error}): {kept} when the server is back, or "
        "without one"
    )


def check_server() -> None:
    """Leave with one line if no server answers where PREFECT_API_URL or Prefect's profile says."""
    from httpx import HTTPError, HTTPStatusError, InvalidURL
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    url = PREFECT_API_URL.value()
    if not url:
        return
    settings = {"timeout": SECONDS_TO_ANSWER}
    try:  # by Prefect's client, which knows its settings: certificates, headers, keys
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(httpx_settings=settings, sync_client=True) as client,
        ):
            is_page = client.hello().headers.get("Content-Type", "").startswith("text/html")
    except HTTPStatusError:
        return  # it answers
    except (HTTPError, InvalidURL, OSError, ValueError) as error:
        stop(
            ValueError(
                f"no Prefect server answers at PREFECT_API_URL={url} ({error}): start it (prefect "
                "server start), or unset PREFECT_API_URL (or: prefect config unset "
                "PREFECT_API_URL) to run without one"
            ),
            exit_code=1,
        )
    if is_page:
        stop(
            ValueError(f"PREFECT_API_URL={url} is a page, not Prefect's API: does /api lack?"),
            exit_code=1,
        )


def summary(params: Params) -> str:
    """What came out, and what to do next."""
    from flows.artifacts import version_here

    python = os.path.relpath(sys.executable)
    model = list(params.models.values())[-1].path
    elsewhere = params.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    mlflow = f"at {without_secrets(elsewhere)}" if elsewhere else "make mlflow"
    version, why_not = version_here()
    promotion = f"{python} -m flows promote --version {version}" if version else why_not
    return f"""
What to decide by, a page:     {REPORT / "index.html"}
Images, CFG beside the guide:  {REPORT / "grid.png"}
Compare runs in MLflow:        {mlflow}
Make an image with the guide:  {python} -m components.generate --model {model} "blue heart"
Make it the champion:          {promotion}"""


if __name__ == "__main__":
    main()
