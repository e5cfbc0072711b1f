"""Training data: write an identity set, bring files, see what is wrong with them."""

from pathlib import Path

import streamlit as st

from tunesmith import paths
from tunesmith.apps.studio.parts import sentences
from tunesmith.data.checks import check
from tunesmith.data.identity import write_identity
from tunesmith.errors import UsageError
from tunesmith.language import LANGUAGES, t

FOLDER = Path("data")
SUFFIXES = ("json", "jsonl", "csv", "parquet")


def page() -> None:
    """Draw the page."""
    st.header(t("Data"))
    with st.expander(t("Who your assistant is"), icon=":material/badge:", expanded=not files()):
        _identity()
    with st.expander(t("A file of your own"), icon=":material/upload:"):
        _upload()
    if not (here := files()):
        st.info(t("No data is here yet. Write down who your assistant is, or bring a file."))
        return
    chosen = st.selectbox(t("File"), here, key="file")
    with sentences():
        _findings(chosen)


def files() -> list[str]:
    """The training files of this working folder."""
    found = (path for suffix in SUFFIXES for path in FOLDER.glob(f"*.{suffix}"))
    return sorted(str(path) for path in found)


def _identity() -> None:
    with st.form("identity", border=False):
        left, right = st.columns(2)
        name = left.text_input(t("Name"), "不要葱姜蒜", help=t("What the assistant is called."))
        author = right.text_input(t("Author"), "Datawhale", help=t("Who made it."))
        languages = left.multiselect(t("Languages"), LANGUAGES, default=[*reversed(LANGUAGES)])
        file = right.text_input(t("Save as"), "me.jsonl")
        if st.form_submit_button(t("Write it down"), type="primary"):
            with sentences():
                path = FOLDER / _safe(file)
                rows = write_identity(path, name, author, languages=languages)
                st.session_state["file"] = str(path)
                st.success(t("{rows} rows written to {path}", rows=rows, path=path))


def _upload() -> None:
    given = st.file_uploader(t("JSON, JSONL, CSV or Parquet"), SUFFIXES)
    if given is not None and st.button(t("Keep it"), type="primary"):
        with sentences():
            path = FOLDER / _safe(given.name)
            if path.exists():
                raise UsageError(t("{path} exists already; choose another name.", path=path))
            try:
                paths.write_atomic(path, given.getvalue())
            except OSError as error:
                raise UsageError(
                    t("{path} cannot be written: {reason}.", path=path, reason=error.strerror)
                ) from error
            st.session_state["file"] = str(path)
            st.rerun()


def _findings(file: str) -> None:
    report = check([Path(file)])
    text = t("{usable} of {rows} rows can be trained on.", usable=report.usable, rows=report.rows)
    (st.warning if report.errors else st.success)(text)
    if report.findings:
        st.dataframe(
            [
                {
                    t("Place"): str(found.place),
                    t("Field"): found.field or "",
                    t("Problem"): found.problem,
                    t("Fix"): found.fix,
                }
                for found in report.findings
            ],
            hide_index=True,
        )


def _safe(name: str) -> str:
    """A plain file name with a known ending; whatever leads elsewhere is refused."""
    plain = Path(name.strip()).name
    if plain != name.strip() or plain.startswith(".") or Path(plain).suffix[1:] not in SUFFIXES:
        raise UsageError(
            t("{name} is no name for a data file; it needs to end in {endings}.",
              name=repr(name), endings=", ".join(f".{suffix}" for suffix in SUFFIXES))
        )  # fmt: skip
    return plain
