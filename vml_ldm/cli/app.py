"""``vml-ldm app``: the web page, on this machine only."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec

from vml_ldm.families import ONE

from .files import UsageError, open_pipeline

HOST = "127.0.0.1"


def run(options: argparse.Namespace) -> int:
    """Serve the page until it is interrupted."""
    if find_spec("gradio") is None:
        raise UsageError('the page needs gradio, which is not installed; pip install "vml-ldm[app]" adds it.')
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    pipe = open_pipeline(options, "inpaint", families=ONE)
    from vml_ldm.app.page import THEME, build

    page = build(pipe)
    try:
        _, address, _ = page.queue().launch(
            server_name=HOST, server_port=options.port, inbrowser=options.browser, quiet=True,
            prevent_thread_lock=True, theme=THEME, footer_links=[],
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"port {options.port} of {HOST} is taken; pass another one with --port.") from error
    print(f"The page is at {address} (Ctrl+C ends it).", flush=True)
    page.block_thread()
    return 0
