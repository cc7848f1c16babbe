"""`cache …`: look at the feature cache, check it, clean it, take it elsewhere."""

from __future__ import annotations

import typer

from pipeline.commands.shared import JsonOption, opened

cache_app = typer.Typer(help="Look at the feature cache.", rich_markup_mode=None)


@cache_app.command("ls")
def cache_ls(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the feature spaces on disk."""
    from dataclasses import asdict

    from pipeline import terminal

    with opened(context) as workspace:
        spaces = [
            {
                "space": space.name,
                **asdict(space.totals()),
                "spec": space.spec.to_dict(),
                "made_by": dict(space.provenance),
            }
            for space in workspace.cache.spaces()
        ]
    result = {"spaces": spaces, **{key: sum(space[key] for space in spaces) for key in ("shards", "rows", "bytes")}}
    if as_json:
        terminal.emit_json(result)
        return
    if not spaces:
        terminal.say("the cache is empty; `features` fills it")
        return
    headers = ("space", "rows", "shards", "MB", "weights", "precision")
    terminal.table(
        [
            (s["space"], s["rows"], s["shards"], s["bytes"] / 1e6, s["made_by"].get("weights"), s["spec"]["precision"])
            for s in spaces
        ],
        headers,
    )
