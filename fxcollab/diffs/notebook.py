"""The view for notebooks."""

from __future__ import annotations

import html

from fxcollab.diffs.html import to_html
from fxcollab.diffs.scene import Scene
from fxcollab.diffs.svg import to_svg

_HEIGHT = 720


def show(scene: Scene) -> None:
    """Two outputs: the static picture, and the page in a frame of its own.

    Viewers that take scripts out, such as those of code hosts, drop the second and keep the first.
    """
    from IPython import display  # installed: IPython calls this

    for data in ({"image/svg+xml": to_svg(scene)}, {"text/html": framed(to_html(scene))}):
        display.display(data, raw=True)  # type: ignore[no-untyped-call]


def framed(page: str) -> str:
    """The page in a frame, isolated from the notebook around it."""
    frame = f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts allow-downloads" loading="lazy" '
    frame += f'style="width:100%;height:{_HEIGHT}px;border:1px solid #d0d5dd;border-radius:6px"></iframe>'
    return f"<details><summary>interactive: open modules, search, filter, sort</summary>{frame}</details>"
