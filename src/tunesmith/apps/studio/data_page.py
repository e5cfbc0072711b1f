"""Training data: write or bring it, see what is wrong with it, put it right, look at its tokens."""

from collections.abc import Sequence
from pathlib import Path

import streamlit as st

from tunesmith import paths
from tunesmith.apps.studio.data_files import (
    FOLDER,
    SUFFIXES,
    Stamp,
    free,
    named,
    require_free,
    stamp,
    writing,
)
from tunesmith.apps.studio.parts import sentences
from tunesmith.apps.studio.rows_editor import (
    edit_file,
    rows_of,
    show_next,
    unsaved,
    write_file,
)
from tunesmith.apps.studio.token_view import view_tokens
from tunesmith.data.checks import Report, check
from tunesmith.data.file_rows import write_rows
from tunesmith.data.findings import Finding
from tunesmith.data.fixes import Fixed, fix
from tunesmith.data.identity import write_identity
from tunesmith.language import LANGUAGES, current_language, t


def page() -> None:
    """Draw the page."""
    st.header(t("Data"))
    _say_what_was_written()
    with st.expander(t("Who your assistant is"), icon=":material/badge:", expanded=not files()):
        _identity()
    with st.expander(t("A file of your own"), icon=":material/upload:"):
        _bring()
    if (file := _chosen()) is None:
        st.info(t("No data is here yet. Write down who your assistant is, or bring a file."))
        return
    findings: Sequence[Finding] = ()
    with sentences():
        with st.spinner(t("The rows are being checked.")):
            report = _report(file, stamp(file), current_language())
        findings = report.findings
        _findings(report)
    rows, tokens = st.tabs([t("Rows"), t("Tokens")], on_change="rerun", key="view")
    with rows, sentences():
        if findings:
            _offer_fix(file, findings)
        edit_file(file, _problems(findings))
    with tokens, sentences():
        if tokens.open:
            view_tokens(file)


def files() -> list[str]:
    """The training files of this working folder."""
    found = (path for suffix in SUFFIXES for path in FOLDER.glob(f"*.{suffix}"))
    return sorted(str(path) for path in found)


def _say_what_was_written() -> None:
    """After a grid or a fix was saved, which stand below the choice of the file they change."""
    if written := st.session_state.pop("written", None):
        path, rows = written
        st.session_state["file"] = str(path)
        st.toast(t("{rows} rows written to {path}", rows=rows, path=path))


def _chosen() -> Path | None:
    changed, here = unsaved(), files()
    if changed is not None and str(changed) not in here:
        here.append(str(changed))  # deleted elsewhere; what was opened can still be saved
    last = st.session_state.get("file")
    if last is not None and last not in here:
        st.info(t("{path} is no longer here.", path=last))
        del st.session_state["file"]
    if not here:
        return None
    if changed is not None:
        st.session_state["file"] = str(changed)
    tip = t("Save or drop the changes first.") if changed is not None else None
    return Path(st.selectbox(t("File"), here, key="file", disabled=changed is not None, help=tip))


def _identity() -> None:
    with st.form("identity", border=False):
        left, right = st.columns(2)
        name = left.text_input(t("Name"), "不要葱姜蒜", help=t("What the assistant is called."))
        author = right.text_input(t("Author"), "Datawhale", help=t("Who made it."))
        languages = left.multiselect(t("Languages"), LANGUAGES, default=[*reversed(LANGUAGES)])
        file = right.text_input(t("Save as"), "me.jsonl")
        if st.form_submit_button(t("Write it down"), type="primary"):
            with sentences():
                path = named(file)
                with writing(path):
                    rows = write_identity(path, name, author, languages=languages)
                st.session_state["file"] = str(path)
                st.success(t("{rows} rows written to {path}", rows=rows, path=path))


def _bring() -> None:
    upload, paste, write = st.tabs([t("Upload"), t("Paste"), t("Write rows")])
    with upload, sentences():
        _upload()
    with paste, sentences():
        _paste()
    with write, sentences():
        write_file()


def _upload() -> None:
    given = st.file_uploader(t("JSON, JSONL, CSV or Parquet"), SUFFIXES)
    if given is not None and st.button(t("Keep it"), type="primary"):
        _keep(named(given.name), given.getvalue())


def _paste() -> None:
    with st.form("paste", border=False, enter_to_submit=False):
        text = st.text_area(t("JSON, JSONL or CSV"), height=180)
        name = st.text_input(t("Save as"), "pasted", help=t("Its ending is chosen for you."))
        if st.form_submit_button(t("Keep it"), type="primary") and text.strip():
            _keep(named(name.strip() + _ending(text)), text.encode())


def _ending(text: str) -> str:
    first_line = text.strip().partition("\n")[0].strip()
    if first_line.startswith("{") and first_line.endswith("}"):
        return ".jsonl"
    return ".json" if first_line.startswith(("{", "[")) else ".csv"


def _keep(path: Path, content: bytes) -> None:
    require_free(path)
    with writing(path):
        paths.write_atomic(path, content)
    st.session_state["file"] = str(path)
    st.rerun()


@st.cache_data(max_entries=8, show_spinner=False)
def _report(file: Path, stamp: Stamp | None, language: str) -> Report:
    """What a check says, once for each content of the file and each language."""
    return check([file])


def _findings(report: Report) -> None:
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


def _problems(findings: Sequence[Finding]) -> dict[int, str]:
    """What is wrong, by line."""
    problems: dict[int, str] = {}
    for found in findings:
        line = found.place.line
        problems[line] = f"{problems[line]} {found.problem}" if line in problems else found.problem
    return problems


def _offer_fix(file: Path, findings: Sequence[Finding]) -> None:
    fixed = _fixed(file, stamp(file), findings)
    if not fixed.count:
        return
    path = free(f"{file.stem.removesuffix('-fixed')}-fixed")
    tip = t("Copies, empty rows and turns that nothing answers are left out, control characters "
            "deleted.")  # fmt: skip
    if st.button(
        t("Fix what is certain ({count})", count=fixed.count),
        icon=":material/build:",
        help=tip,
        disabled=unsaved() is not None,
    ):
        with writing(path):
            write_rows(path, fixed.rows)
        show_next(path, len(fixed.rows))
    st.caption(t("It goes to {new}; {path} stays as it is.", new=path, path=file))


@st.cache_resource(max_entries=2, show_spinner=False)
def _fixed(file: Path, stamp: Stamp | None, _findings: Sequence[Finding]) -> Fixed:
    return fix(rows_of(file, stamp), _findings)
