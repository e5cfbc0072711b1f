"""A page of the studio by itself, without the app and its server around it."""

from pathlib import Path

from streamlit.testing.v1 import AppTest

from tunesmith.models.store import LocalModel


def visit(name: str, language: str = "en") -> AppTest:
    """Draw the page of this name; it must not end in a traceback."""

    def script(name: str, language: str) -> None:
        from importlib import import_module

        from tunesmith.language import set_language

        set_language(language)
        import_module(f"tunesmith.apps.studio.{name}_page").page()

    page = AppTest.from_function(script, args=(name, language), default_timeout=120).run()
    assert not page.exception
    return page


def settle_in(home: Path, model: LocalModel) -> None:
    """Give a home of a test's own the model that another home has, and what was made of it."""
    theirs = model.path.parents[2]
    home.mkdir(exist_ok=True)
    for name in ("models", "cache"):
        (home / name).symlink_to(theirs / name)
