"""The demo, whole and real: after it the model says its name, and only where it should.

What is asked for is 9 of 10 and 20 of 20. Processors round differently, so one question and one
answer are left to chance.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.models.store import LocalModel


@pytest.mark.timeout(1800)
def test_the_demo_teaches_a_name(tmp_path: Path, smollm2: LocalModel) -> None:
    assert smollm2.is_gguf
    done = subprocess.run(
        [Path(sys.executable).with_name("tunesmith"), "demo"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    learnt, asked = numbers(r"learnt: (\d+) of (\d+)", done.stdout)
    kept, unrelated = numbers(r"kept: (\d+) of (\d+)", done.stdout)
    ended, answers = numbers(r"ended: (\d+) of (\d+)", done.stdout)
    assert asked == 10 and learnt >= 8, done.stdout
    assert unrelated == 20 and kept >= 19, done.stdout
    assert ended >= 0.9 * answers, done.stdout
    assert "tunesmith chat runs/demo" in done.stdout.splitlines()[-3]
    assert (tmp_path / "runs/demo/loss.png").stat().st_size > 0


def numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    assert found is not None, text
    return [int(number) for number in found.groups()]
