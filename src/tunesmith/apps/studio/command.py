"""`tunesmith studio`: starts the page's server."""

import importlib.util
import ipaddress
import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tunesmith.apps.studio import PASSWORD
from tunesmith.config import require_range
from tunesmith.errors import UsageError
from tunesmith.language import t

APP = Path(__file__).with_name("app.py")
THEME = {
    "theme.light.primaryColor": "#2f6f73",
    "theme.dark.primaryColor": "#7fc4c0",
    "theme.baseRadius": "medium",
    "theme.showSidebarBorder": "true",
}


def studio(
    *,
    host: Annotated[str, Parameter(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Port to listen on.")] = 6006,
    password: Annotated[
        str | None,
        Parameter(
            help="Asked of every visitor. Better in TUNESMITH_PASSWORD, where nobody sees it."
        ),
    ] = None,
) -> None:
    """Serve the page until Ctrl-C."""
    require_range("--port", port, 1, 65535)
    password = password or os.environ.get(PASSWORD)
    if not _is_loopback(host) and not password:
        raise UsageError(
            t("--host {host} can be reached from other machines; set a password in "
              "TUNESMITH_PASSWORD first.", host=host)
        )  # fmt: skip
    if importlib.util.find_spec("streamlit") is None:
        raise UsageError(t("The page needs Streamlit: pip install 'tunesmith[studio]'"))
    environment = os.environ | ({PASSWORD: password} if password else {})
    flags = THEME | {
        "server.address": host,
        "server.port": port,
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    print(
        t("The page is at http://{host}:{port}; Ctrl-C ends it.", host=host, port=port), flush=True
    )
    os.execve(
        sys.executable, [sys.executable, "-m", "streamlit", "run", str(APP), *words], environment
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
