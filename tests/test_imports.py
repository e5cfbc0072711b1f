"""What a start costs: nothing heavy is loaded before it is needed."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent


def _run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    _run("""
        import sys, tunesmith
        heavy = {"torch", "transformers", "peft", "numpy", "rich", "cyclopts"} & set(sys.modules)
        assert not heavy, heavy
    """)


def test_root_help_and_version_need_no_parser() -> None:
    _run("""
        import sys
        from tunesmith.apps.cli import main
        assert main(["--help"]) == main(["--version"]) == main([]) == main(["data", "--help"]) == 0
        heavy = {"torch", "numpy", "rich", "cyclopts"} & set(sys.modules)
        assert not heavy, heavy
    """)


def test_no_help_page_loads_torch_or_draws_with_rich() -> None:
    _run("""
        import sys
        from tunesmith.apps.cli import main
        from tunesmith.apps.menu import COMMANDS
        for name in COMMANDS:
            assert main([*name.split(), "--help"]) == 0, name
            heavy = {"torch", "transformers", "peft", "numpy", "rich"} & set(sys.modules)
            assert not heavy, (name, heavy)
    """)


def test_looking_at_data_and_models_loads_no_torch(tmp_path: Path) -> None:
    _run(f"""
        import sys
        from tunesmith.apps.cli import main
        out = {str(tmp_path / "me.jsonl")!r}
        assert main(["data", "identity", "--name", "A", "--author", "B", "-o", out]) == 0
        assert main(["data", "check", out]) == 0
        assert main(["models"]) == 0
        heavy = {{"torch", "transformers", "peft"}} & set(sys.modules)
        assert not heavy, heavy
    """)
