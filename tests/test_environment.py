"""What a process of ours does to its surroundings."""

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
@pytest.mark.parametrize(
    ("variables", "is_cleared_again"), [({}, False), ({"MALLOC_ARENA_MAX": "1"}, True)]
)
def test_a_stage_keeps_the_memory_that_it_frees_unless_the_user_has_set_the_allocator(
    variables: dict[str, str], is_cleared_again: bool
) -> None:
    program = (
        "import resource\n"
        "from components.environment import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "for _ in range(3):\n"
        "    bytes(40_000_000) + b'.'\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
    )
    ours = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {name: x for name, x in os.environ.items() if not name.startswith(ours)}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    _, before, after = map(int, ran.stdout.split())
    assert (after - before > 1000) == is_cleared_again  # of some 20,000 pages of 4 kB
